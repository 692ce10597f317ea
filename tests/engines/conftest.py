"""One tiny base for all tests of engines."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from engines.tiny import opened, save_model, save_tokenizer
from selfalign.engines.transformers import TransformersEngine


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_tokenizer(folder)
    save_model(folder)
    return folder


@pytest.fixture(scope="module")
def engine(base: Path) -> Iterator[TransformersEngine]:
    engine = opened(base)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def reference(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
