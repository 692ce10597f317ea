from collections.abc import Callable
from pathlib import Path

import pytest

from selfalign.engines import config
from selfalign.engines.config import ModelConfig, has_bfloat16, on_this_machine

A800 = "GPU-5a1f3c9e-7d42-1b06-9c8f-2e4d6b8a0c13, 8.0"
T4 = "GPU-b7e20d44-03ac-5f91-8e67-c1d2f3a4b596, 7.5"
Smi = Callable[..., None]


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Smi:
    """A machine with GPUs, and an nvidia-smi that answers this query alone."""

    def install(*gpus: str, script: str | None = None, visible: str | None = None) -> None:
        table = "\n".join(f"{n}, {gpu}" for n, gpu in enumerate(gpus))
        asked = "--query-gpu=index,uuid,compute_cap --format=csv,noheader"
        answer = f'[ "$*" = "{asked}" ] || exit 2\ncat <<END\n{table}\nEND'
        file = tmp_path / "nvidia-smi"
        file.write_text(f"#!/bin/sh\n{script or answer}\n")
        file.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(config, "has_accelerator", lambda: True)
    config._compute_capabilities.cache_clear()
    return install


def test_a_card_without_bfloat16_takes_float16(smi: Smi) -> None:
    smi(T4)
    assert on_this_machine(ModelConfig(path="x", dtype="bfloat16")).dtype == "float16"
    assert on_this_machine(ModelConfig(path="x", dtype="float32")).dtype == "float32"


def test_a_card_with_bfloat16_keeps_it(smi: Smi) -> None:
    smi(A800)
    asked = ModelConfig(path="x", dtype="bfloat16", quantisation="nf4", quantisation_storage="bfloat16")
    assert on_this_machine(asked) == asked


@pytest.mark.parametrize(
    ("visible", "expected"),
    [("0", True), ("1", False), ("0,1", False), ("GPU-5a1f", True), ("GPU-b7e2", False), ("MIG-5a1f3c9e", True)],
)
def test_only_the_visible_cards_count(smi: Smi, visible: str, expected: bool) -> None:
    smi(A800, T4, visible=visible)
    assert has_bfloat16() is expected


def test_of_several_cards_the_oldest_decides(smi: Smi) -> None:
    smi(A800, T4)
    assert not has_bfloat16()


@pytest.mark.parametrize(
    "script",
    [
        "echo 'Field \"compute_cap\" is not a valid field to query.'; exit 2",
        "echo 'No devices were found'; exit 6",
        "echo 'No devices were found'",
    ],
)
def test_where_the_driver_does_not_tell_the_recipe_is_believed(smi: Smi, script: str) -> None:
    smi(script=script)
    assert on_this_machine(ModelConfig(path="x")).dtype == "bfloat16"


def test_without_the_drivers_tool_the_recipe_is_believed(smi: Smi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert on_this_machine(ModelConfig(path="x")).dtype == "bfloat16"


def test_what_packed_weights_are_held_in_goes_with_the_dtype(smi: Smi) -> None:
    smi(T4)
    asked = ModelConfig(path="x", quantisation="nf4", quantisation_storage="bfloat16")
    assert on_this_machine(asked).quantisation_storage == "float16"
    bytes_ = asked.model_copy(update={"quantisation_storage": "uint8"})
    assert on_this_machine(bytes_).quantisation_storage == "uint8"


def test_without_a_gpu_all_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "has_accelerator", lambda: False)
    asked = ModelConfig(path="x", quantisation="nf4", quantisation_storage="bfloat16")
    found = on_this_machine(asked)
    assert (found.dtype, found.quantisation_storage, found.quantisation) == ("float32", "float32", "nf4")
