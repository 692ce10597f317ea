"""Adapters against bases: what does not fit is named by shapes alone."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from selfalign.core.errors import MismatchError, UsageError
from selfalign.engines.adapters import WEIGHTS, check_adapter, refuse_adapter, skeleton
from selfalign.engines.config import ModelConfig
from selfalign.engines.transformers import TransformersEngine

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def config_of(folder: Path, **changes: Any) -> ModelConfig:
    """A base of which only config.json is there: whoever opens weights fails."""
    LlamaConfig(**{**SHAPE, **changes}, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    return ModelConfig(path=str(folder), dtype="float32")


def adapter_of(folder: Path, base: str = "org/base", **settings: Any) -> Path:
    torch.manual_seed(0)
    lora = {"r": 4, "target_modules": ["q_proj", "down_proj"], **settings}
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**SHAPE)), LoraConfig(task_type="CAUSAL_LM", **lora))
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.fixture
def base(tmp_path: Path) -> ModelConfig:
    return config_of(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return adapter_of(tmp_path / "adapter")


def test_a_skeleton_has_the_modules_and_shapes_and_no_weights(base: ModelConfig) -> None:
    shape = skeleton(base)
    whole = LlamaForCausalLM(LlamaConfig(**SHAPE))
    assert {n: p.shape for n, p in shape.named_parameters()} == {n: p.shape for n, p in whole.named_parameters()}
    assert {p.device.type for p in shape.parameters()} == {"meta"}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2}},
        {"use_rslora": True, "use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ],
    ids=str,
)
def test_an_adapter_of_the_base_fits_it(base: ModelConfig, tmp_path: Path, settings: dict[str, Any]) -> None:
    check_adapter(adapter_of(tmp_path / "adapter", **settings), base)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"hidden_size": 48}, r"6 weights have another shape: .* is \[32, 4\] and would be \[48, 4\]"),
        ({"intermediate_size": 96}, r"2 weights have another shape: .*down_proj\.lora_A"),
        ({"num_hidden_layers": 3}, r"4 weights have no counterpart, such as .*layers\.2"),
        ({"num_hidden_layers": 1}, r"4 weights have no counterpart, such as .*layers\.1"),
    ],
    ids=lambda value: str(value),
)
def test_an_adapter_of_another_base_is_named_before_any_weights_are_read(
    adapter: Path, tmp_path: Path, changes: dict[str, Any], why: str
) -> None:
    other = config_of(tmp_path / "other", **changes)
    with pytest.raises(MismatchError, match=rf"does not fit the model .*other: it was trained on org/base, and {why}"):
        check_adapter(adapter, other)


def test_an_adapter_for_modules_that_the_base_does_not_have_is_named(adapter: Path, base: ModelConfig) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(path.read_text().replace("q_proj", "c_attn").replace("down_proj", "c_proj"))
    with pytest.raises(MismatchError, match=r"trained on org/base, and .*not found in the base model"):
        check_adapter(adapter, base)


def _empty(weights: Path) -> None:
    tensors = load_file(weights)
    save_file({**tensors, min(tensors): torch.empty(0)}, weights)


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (lambda path: path.unlink(), "has no adapter_model.safetensors"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "is damaged"),
        (lambda path: path.write_bytes(b""), "is damaged"),
        (_empty, "1 of its tensors are empty.*ZeRO-3"),
    ],
    ids=["missing", "torn", "nothing", "empty tensor"],
)
def test_weights_that_are_not_whole_are_refused(
    adapter: Path, base: ModelConfig, harm: Callable[[Path], None], why: str
) -> None:
    harm(adapter / WEIGHTS)
    with pytest.raises(MismatchError, match=why):
        check_adapter(adapter, base)


@pytest.mark.parametrize("text", ["{", '{"peft_type": "NOVEL"}', '{"r": 4}', "[]"])
def test_settings_that_cannot_be_read_are_refused(adapter: Path, base: ModelConfig, text: str) -> None:
    (adapter / "adapter_config.json").write_text(text)
    with pytest.raises(MismatchError, match=r"adapter_config.json cannot be read"):
        check_adapter(adapter, base)


def test_a_folder_without_an_adapter_and_a_prompt_adapter_are_told_apart(base: ModelConfig, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no adapter_config.json"):
        check_adapter(Path(base.path), base)
    PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4).save_pretrained(tmp_path / "prompt")
    with pytest.raises(MismatchError, match="learn a prompt"):
        check_adapter(tmp_path / "prompt", base)


def test_an_adapter_in_the_place_of_a_model_is_told_what_to_do(adapter: Path, base: ModelConfig) -> None:
    config = ModelConfig(path=str(adapter))
    advice = r"model\.path: .* is an adapter, not a model; name its base \(org/base\), or merge it \(selfalign merge "
    for use in (refuse_adapter, skeleton, TransformersEngine):
        with pytest.raises(MismatchError, match=advice):
            use(config)
    with pytest.raises(MismatchError, match=r"^curate\.rater\.model: "):
        refuse_adapter(config, "curate.rater.model")
    refuse_adapter(base)
    # A model with an adapter beside it is a model.
    shutil.copy(Path(base.path) / "config.json", adapter)
    refuse_adapter(config)


def test_a_base_that_is_not_there_is_a_matter_of_usage(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UsageError, match=r"cannot be loaded|neither here nor on the Hub"):
        check_adapter(adapter, ModelConfig(path=str(tmp_path / "nothing")))


def test_the_settings_of_the_adapter_are_left_as_they_are(adapter: Path, base: ModelConfig) -> None:
    before = {p.name: p.read_bytes() for p in adapter.iterdir()}
    check_adapter(adapter, base)
    assert {p.name: p.read_bytes() for p in adapter.iterdir()} == before
    assert json.loads(before["adapter_config.json"])["base_model_name_or_path"] == "org/base"
