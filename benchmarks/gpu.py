"""What the benchmarks on a GPU share: true shapes with random weights, and what cards can do."""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfalign.demo.base import base_folder
from selfalign.engines.adapters import skeleton
from selfalign.engines.config import ModelConfig

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
QWEN = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True}


def shape_of(family: Mapping[str, Any], *sizes: int) -> dict[str, Any]:
    """A config.json from vocabulary, hidden and intermediate size, layers, heads and key-value heads."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return {**family, **dict(zip((*names, "num_key_value_heads"), sizes, strict=True)), "max_position_embeddings": 8192}


SHAPES = {
    "llama3.1-8b": shape_of(LLAMA, 128256, 4096, 14336, 32, 32, 8),
    "llama2-7b": shape_of(LLAMA, 32000, 4096, 11008, 32, 32, 32),
    "tinyllama-1.1b": shape_of(LLAMA, 32000, 2048, 5632, 22, 32, 4),
    "qwen2.5-0.5b": shape_of(QWEN, 151936, 896, 4864, 24, 14, 2),
    "smollm2-135m": shape_of({**LLAMA, "tie_word_embeddings": True}, 49152, 576, 1536, 30, 9, 3),
}


@dataclass(frozen=True)
class Peak:
    """A card's dense bfloat16 FLOP/s, and the bytes a second that its memory moves."""

    flops: float
    bandwidth: float


PEAKS = {
    "A800": Peak(312e12, 2.0e12),
    "A100": Peak(312e12, 2.0e12),
    "H100": Peak(989e12, 3.35e12),
    "H200": Peak(989e12, 4.8e12),
}


def peak_of(card: str) -> Peak | None:
    """What a card can do by the name that its driver gives it; None for one that is not known here."""
    return next((peak for name, peak in PEAKS.items() if name in card), None)


def write_model(shape: Mapping[str, Any], folder: Path) -> ModelConfig:
    """A model of that shape: random weights in bfloat16, a shard for each layer, and the demo's tokenizer."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    for file in base_folder().iterdir():
        if file.name.startswith(("tokenizer", "chat_template", "special_tokens")):
            shutil.copy(file, folder)
    (folder / "config.json").write_text(json.dumps({**shape, "dtype": "bfloat16"}))
    model = ModelConfig(path=str(folder), dtype="bfloat16")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chance = torch.Generator(device).manual_seed(0)
    shards: dict[str, dict[str, Any]] = {}
    for name, empty in skeleton(model).named_parameters():
        weights = torch.ones(empty.shape, dtype=torch.bfloat16, device=device)
        if empty.dim() > 1:
            weights.normal_(0, 0.02, generator=chance)
        part = name.split(".")[2] if ".layers." in name else "rest"
        shards.setdefault(f"model-{part}.safetensors", {})[name] = weights.cpu()
    for file_name, weights_by_name in shards.items():
        save_file(weights_by_name, folder / file_name, {"format": "pt"})
    index = {name: file_name for file_name, part in shards.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return model


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="selfalign-gpu-") as folder:
        yield Path(folder)
