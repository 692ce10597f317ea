"""Merging: what comes out answers as base and adapter did, and what would not leaves nothing behind."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from report.conftest import Run
from selfalign.core.errors import MismatchError, StorageError, UsageError
from selfalign.core.protocols import Sampling
from selfalign.demo.base import base_folder
from selfalign.recipe import Recipe
from selfalign.report import merge as merging
from selfalign.report.ask import ask
from selfalign.report.merge import Dtype, Merged, merge

PROMPT = "What is the capital of Vage?"


def quiet(text: str) -> None:
    """Says nothing."""


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter of the demo's base that changes what it says, as training saves it."""
    return saved(tmp_path_factory.mktemp("adapter"))


def saved(folder: Path, scale: float = 1.0, **settings: Any) -> Path:
    import torch
    from peft import LoraConfig, get_peft_model

    from selfalign.engines.config import ModelConfig
    from selfalign.engines.loading import load_model, load_tokenizer

    torch.manual_seed(0)
    base = ModelConfig(path=str(base_folder()), dtype="float32")
    lora = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear", **settings)
    model = get_peft_model(load_model(base), lora)
    for name, weights in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weights, std=0.2 * scale)
    model.save_pretrained(folder, save_embedding_layers=False)
    load_tokenizer(base).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_merged_model_has_the_logits_of_base_and_adapter(adapter: Path, tmp_path: Path, dtype: Dtype) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    merged = merge(str(adapter), tmp_path / "merged", dtype, quiet)
    assert merged.difference <= merged.allowed
    assert merged.lost < {"float32": 1e-4, "float16": 0.02, "bfloat16": 0.2}[dtype]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.dtype == getattr(torch, dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    assert not list((tmp_path / "merged").glob("adapter*"))


def test_it_is_asked_like_any_model_and_says_the_same(adapter: Path, tmp_path: Path) -> None:
    merge(str(adapter), tmp_path / "merged", "float32", quiet)
    greedy = Sampling(temperature=0, max_new_tokens=12)
    (before,), (after,) = (ask(str(model), [PROMPT], greedy, 0) for model in (adapter, tmp_path / "merged"))
    assert before == after != ask(str(base_folder()), [PROMPT], greedy, 0)[0]


def test_it_stops_where_the_template_ends_a_reply(adapter: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<|{{ m.role }}|> {{ m.content }}<|user|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    merge(str(folder), tmp_path / "merged", "float32", quiet)
    ends = json.loads((tmp_path / "merged" / "generation_config.json").read_text())["eos_token_id"]
    assert len(ends) == 2
    assert (tmp_path / "merged" / "chat_template.jinja").read_text() == (folder / "chat_template.jinja").read_text()


def run_of(run: Run, adapter: Path, **model: Any) -> str:
    folder = run.add("forward.train@1")
    shutil.copytree(adapter, folder / "files")
    source = {"path": "x.jsonl"}
    document = {"name": "a", "model": {"path": "x", **model}, "prepare": {"seed": source, "corpus": source}}
    (run.store.root / "recipe.json").write_text(Recipe.model_validate(document).model_dump_json())
    return str(run.store.root)


def test_a_run_merges_its_final_model_in_the_dtype_of_its_recipe(run: Run, adapter: Path, tmp_path: Path) -> None:
    merged = merge(run_of(run, adapter, dtype="float16"), tmp_path / "merged", None, quiet)
    assert (merged.dtype, merged.quantisation, merged.from_quantised) == ("float16", None, None)


def test_a_qlora_adapter_tells_how_far_training_was_from_the_unquantised_base(
    run: Run, adapter: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    model = run_of(run, adapter, dtype="float32", quantisation="nf4")
    merged = merge(model, tmp_path / "merged", None, said.append)
    assert merged.quantisation == "nf4"
    assert merged.from_quantised is not None
    assert merged.from_quantised > 100 * merged.difference
    assert any("nf4" in text for text in said)


def fails(model: str | Path, to: Path, error: type[Exception], message: str, dtype: Dtype = "float32") -> None:
    to.parent.mkdir(exist_ok=True)
    with pytest.raises(error, match=message):
        merge(str(model), to, dtype, quiet)
    assert not list(to.parent.iterdir())


def test_logits_that_differ_leave_nothing(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(merging.TOLERANCE, "float32", 0.0)
    fails(adapter, tmp_path / "out" / "merged", MismatchError, r"differ by up to \d.*float32 allows 0")


def test_an_adapter_that_is_not_merged_in_is_noticed(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import PeftModel

    monkeypatch.setattr(PeftModel, "merge_and_unload", lambda self, **_: self.unload(), raising=False)
    fails(adapter, tmp_path / "out" / "merged", MismatchError, "differ")
    # Where its effect is within what rounding may do, it is noticed by what is lost.
    fails(
        saved(tmp_path / "small", scale=0.0001),
        tmp_path / "out" / "merged",
        MismatchError,
        "100% .* is lost",
        "bfloat16",
    )


def test_an_adapter_without_effect_merges(tmp_path: Path) -> None:
    assert merge(str(saved(tmp_path / "none", scale=0.0)), tmp_path / "merged", "bfloat16", quiet).lost == 0


def test_a_full_model_has_nothing_to_merge(tmp_path: Path) -> None:
    fails(base_folder(), tmp_path / "out" / "merged", UsageError, "full model")
    for nowhere in ("org/adapter", tmp_path / "missing"):
        fails(nowhere, tmp_path / "out" / "merged", UsageError, "there is no folder")


def test_a_folder_that_holds_something_is_left_alone(adapter: Path, tmp_path: Path) -> None:
    mine = tmp_path / "merged" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(UsageError, match="is there already"):
        merge(str(adapter), mine.parent, None, quiet)
    assert mine.read_text() == "mine"
    mine.unlink()
    assert isinstance(merge(str(adapter), mine.parent, "float32", quiet), Merged)


def test_tensors_that_zero_saved_empty_are_refused(adapter: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(adapter, tmp_path / "adapter")
    weights = load_file(folder / "adapter_model.safetensors")
    name = next(iter(weights))
    save_file({**weights, name: weights[name].new_empty(0)}, folder / "adapter_model.safetensors")
    fails(folder, tmp_path / "out" / "merged", MismatchError, "1 of its tensors are empty.*ZeRO-3")


@pytest.mark.parametrize("keep", [0, 4, 2000])
def test_a_torn_adapter_is_told(adapter: Path, tmp_path: Path, keep: int) -> None:
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    fails(folder, tmp_path / "out" / "merged", MismatchError, "is damaged")
    weights.unlink()
    fails(folder, tmp_path / "out" / "merged", MismatchError, r"no adapter_model\.safetensors")


def test_an_adapter_of_another_base_is_told(tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "r": 4}))
    fails(folder, tmp_path / "out" / "merged", MismatchError, "does not fit the model")


def test_bytes_that_changed_since_training_are_refused(run: Run, adapter: Path, tmp_path: Path) -> None:
    model = run_of(run, adapter)
    path = run.view().steps[0].artifact.folder / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "files": {"files/adapter_model.safetensors": "0" * 64}}))
    fails(model, tmp_path / "out" / "merged", StorageError, "is not what")
