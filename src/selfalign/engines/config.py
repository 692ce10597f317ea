"""Which model, in which precision, run by which engine: the recipe's `model` section."""

import os
from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveInt

from selfalign.core.frozen import Frozen


class ModelConfig(Frozen):
    """A base model and how it is loaded."""

    path: str = Field(description="a folder, or a Hub name")
    revision: str | None = Field(None, description="a commit, tag or branch of a Hub name")
    chat_template: str | None = Field(None, description="a file, or one of ours: plain, chatml")
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    quantisation: Literal["nf4", "int8"] | None = None
    engine: Literal["transformers", "scripted"] = "transformers"
    slots: PositiveInt = Field(16, description="sequences in one batch")
    threads: PositiveInt = Field(1, description="CPU threads; they decide the last bits of a sum")


def has_accelerator() -> bool:
    """Whether this machine offers a GPU, told without importing torch."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    return Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists()


def on_this_machine(config: ModelConfig) -> ModelConfig:
    """`config` as it will really be loaded here: without an accelerator, float32; NF4 works on a CPU and stays."""
    if has_accelerator():
        return config
    return config.model_copy(update={"dtype": "float32"})
