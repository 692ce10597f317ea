import gc
import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from selfalign.core.errors import GateError, MismatchError, UsageError
from selfalign.core.lease import Lease, Owner
from selfalign.core.records import Example
from selfalign.engines.config import ModelConfig
from selfalign.training.checkpoints import Checkpoints
from selfalign.training.config import TrainConfig
from selfalign.training.preflight import Tokenised, tokenise
from selfalign.training.sft import Trained, train
from selfalign.training.trainer import completion_loss

FULL = TrainConfig(learning_rate=3e-3, max_steps=12, logging_steps=4, max_length=64)
LORA = FULL.model_copy(update={"lora_r": 8, "lora_dropout": 0.1, "learning_rate": 1e-2})


class Run:
    """One training, with what it logged."""

    def __init__(
        self, examples: Sequence[Example], model: ModelConfig, config: TrainConfig, folder: Path, seed: int = 0
    ) -> None:
        self.logged: list[dict[str, float]] = []
        self.folder = folder
        me = Owner.this_process()
        lease = folder.parent / "lease-000001.json"
        lease.write_text(json.dumps(asdict(me)))
        kept = Checkpoints(folder.parent / "kept", "this training", Lease(lease, me))
        self.trained: Trained = train(examples, model, config, folder, seed, self._log, kept)

    def _log(self, figures: Mapping[str, float]) -> None:
        self.logged.append(dict(figures))

    @property
    def fell_by(self) -> float:
        return self.logged[0]["loss"] - self.logged[-1]["loss"]

    def hashes(self) -> dict[str, str]:
        return {n: hashlib.sha256((self.folder / n).read_bytes()).hexdigest() for n in self.trained.content}


def logits(model: Any, row: Tokenised) -> Any:
    import torch

    with torch.no_grad():
        return model(torch.tensor([row.input_ids])).logits


def load(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, local_files_only=True)


def test_all_weights_train_and_reload_with_tokenizer_and_template(
    base: Any, examples: list[Example], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    run = Run(examples, base.chatml, FULL, tmp_path / "model")
    assert run.fell_by > 0.3
    assert capsys.readouterr().out == ""
    assert run.trained.content == ("chat_template.jinja", "model.safetensors", "tokenizer.json")
    assert set(run.trained.files) == {
        *run.trained.content,
        "config.json",
        "generation_config.json",
        "preflight.txt",
        "tokenizer_config.json",
    }
    tokenizer = AutoTokenizer.from_pretrained(run.folder)
    assert tokenizer.chat_template == base.tokenizer("chatml").chat_template
    model = load(run.folder)
    assert model.config.use_cache is True
    assert set(model.generation_config.eos_token_id) == {1, 3}
    row = tokenise(examples[0], tokenizer)
    assert (logits(model, row) - logits(load(base.path), row)).abs().max() > 0.1


@pytest.mark.parametrize("quantisation", [None, "nf4", "int8"])
def test_an_adapter_trains_on_a_base_and_on_a_quantised_base(
    base: Any, examples: list[Example], tmp_path: Path, quantisation: Any
) -> None:
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    model = base.plain.model_copy(update={"quantisation": quantisation})
    run = Run(examples, model, LORA, tmp_path / "adapter")
    assert run.fell_by > 0.2
    assert run.trained.content == ("adapter_model.safetensors", "chat_template.jinja", "tokenizer.json")
    assert set(run.trained.files) == {
        *run.trained.content,
        *("adapter_config.json", "preflight.txt", "tokenizer_config.json"),
    }
    weights = load_file(run.folder / "adapter_model.safetensors")
    assert {str(w.dtype) for w in weights.values()} == {"torch.float32"}
    assert all("lora_" in name and w.abs().max() > 0 for name, w in weights.items())
    assert not any("lm_head" in name or "embed" in name for name in weights)
    row = tokenise(examples[0], AutoTokenizer.from_pretrained(run.folder))
    plain = load(base.path)
    before = logits(plain, row)
    assert (logits(PeftModel.from_pretrained(plain, str(run.folder)), row) - before).abs().max() > 0.05


@pytest.mark.parametrize(
    "config", [FULL, LORA, LORA.model_copy(update={"packing": True})], ids=["full", "lora", "packed"]
)
def test_equal_arguments_give_equal_bytes_whatever_was_drawn_before(
    base: Any, examples: list[Example], tmp_path: Path, config: TrainConfig
) -> None:
    import numpy
    import torch

    first = Run(examples, base.plain, config, tmp_path / "1")
    random.seed(5)
    numpy.random.seed(5)
    torch.manual_seed(5)
    assert Run(examples, base.plain, config, tmp_path / "2").hashes() == first.hashes()
    other = Run(examples, base.plain, config, tmp_path / "3", seed=1).hashes()
    assert [n for n, h in other.items() if h != first.hashes()[n]] == [first.trained.content[0 if config.lora_r else 1]]
    seeded = config.model_copy(update={"seed": 1})
    assert Run(examples, base.plain, seeded, tmp_path / "4").hashes() == other


@pytest.mark.parametrize("config", [FULL, LORA], ids=["full", "lora"])
def test_gradient_checkpointing_changes_no_byte(
    base: Any, examples: list[Example], tmp_path: Path, config: TrainConfig
) -> None:
    short = config.model_copy(update={"max_steps": 4})
    checkpointed = short.model_copy(update={"gradient_checkpointing": True})
    hashes = Run(examples, base.plain, checkpointed, tmp_path / "1").hashes()
    assert hashes == Run(examples, base.plain, short, tmp_path / "2").hashes()


def test_a_training_seed_of_its_own_wins_over_the_runs(base: Any, examples: list[Example], tmp_path: Path) -> None:
    config = FULL.model_copy(update={"max_steps": 2, "seed": 3})
    one = Run(examples, base.plain, config, tmp_path / "1", seed=1)
    assert Run(examples, base.plain, config, tmp_path / "2", seed=2).hashes() == one.hashes()


@pytest.mark.parametrize("setting", ["packing", "group_by_length", "gradient_checkpointing"])
def test_packing_grouping_and_checkpointing_train(
    base: Any, examples: list[Example], tmp_path: Path, setting: str
) -> None:
    config = FULL.model_copy(update={setting: True, "max_length": 128, "per_device_train_batch_size": 4})
    run = Run(examples, base.plain, config, tmp_path / "m")
    assert run.fell_by > 0.2
    assert run.trained.metrics["rows"] == len(examples)


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_32bit", "adamw_torch_fused"])
def test_the_recipes_optimisers_step_without_an_accelerator(
    base: Any, examples: list[Example], tmp_path: Path, optim: str
) -> None:
    run = Run(examples, base.plain, FULL.model_copy(update={"optim": optim}), tmp_path / "m")
    assert run.fell_by > 0.2


def test_packing_gives_the_same_loss_as_no_packing(base: Any, examples: list[Example], tmp_path: Path) -> None:
    once = FULL.model_copy(update={"max_steps": 1, "logging_steps": 1, "per_device_train_batch_size": 64})
    apart = Run(examples, base.plain, once, tmp_path / "1")
    packed = Run(examples, base.plain, once.model_copy(update={"packing": True}), tmp_path / "2")
    assert packed.logged[0]["loss"] == pytest.approx(apart.logged[0]["loss"], abs=1e-4)
    assert packed.logged[0]["grad_norm"] == pytest.approx(apart.logged[0]["grad_norm"], rel=1e-3)


def test_the_prompt_gets_no_loss_and_the_loss_is_the_models_own(base: Any, examples: list[Example]) -> None:
    import torch
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    tokenizer = base.tokenizer()
    rows = [tokenise(e, tokenizer) for e in examples[:5]]
    collate = DataCollatorForLanguageModeling(pad_token_id=1)
    batch = collate([{"input_ids": list(r.input_ids), "labels": r.labels} for r in rows])
    trained = sum(sum(r.completion_mask) for r in rows)
    assert int((batch["labels"] != -100).sum()) == trained
    model = load(base.path)
    own = model(**batch, use_cache=False).loss
    ours = completion_loss(model, batch, model.get_output_embeddings(), None)
    assert ours.item() == pytest.approx(own.item(), abs=1e-5)
    halved = completion_loss(model, batch, model.get_output_embeddings(), torch.tensor(2 * trained))
    assert halved.item() == pytest.approx(own.item() / 2, abs=1e-5)
    # The hook is gone: the head sees every position again.
    assert model(batch["input_ids"]).logits.shape[:2] == batch["input_ids"].shape


def test_accumulated_small_batches_are_one_large_batch(base: Any, examples: list[Example], tmp_path: Path) -> None:
    once = FULL.model_copy(update={"max_steps": 1, "logging_steps": 1, "per_device_train_batch_size": 8})
    small = once.model_copy(update={"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4})
    whole = Run(examples, base.plain, once, tmp_path / "1").logged[0]
    parts = Run(examples, base.plain, small, tmp_path / "2").logged[0]
    assert parts["loss"] == pytest.approx(whole["loss"], abs=1e-4)
    assert parts["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-3)


def test_the_report_foretells_the_steps_and_the_last_one_is_logged(
    base: Any, examples: list[Example], tmp_path: Path
) -> None:
    config = TrainConfig(
        per_device_train_batch_size=4, gradient_accumulation_steps=2, num_train_epochs=1.5, max_length=64
    )
    run = Run(examples, base.plain, config, tmp_path / "m")
    assert run.trained.metrics["steps"] == run.trained.preflight.steps == 6
    last = run.logged[-1]
    assert last["step"] == 6
    assert set(last) == {
        *("step", "max_steps", "epoch", "loss", "learning_rate", "grad_norm"),
        *("tokens", "tokens_per_second", "memory_bytes"),
    }
    assert last["tokens"] == run.trained.metrics["tokens"] > run.trained.preflight.tokens


def test_warm_up_and_schedule_are_those_of_the_recipe(base: Any, examples: list[Example], tmp_path: Path) -> None:
    config = TrainConfig(
        learning_rate=1e-3,
        lr_scheduler_type="polynomial",
        lr_scheduler_kwargs={"lr_end": 9e-4, "power": 1.0},  # type: ignore[arg-type]
        warmup_ratio=0.2,
        max_steps=10,
        logging_steps=1,
        max_length=64,
    )
    rates = [entry["learning_rate"] for entry in Run(examples, base.plain, config, tmp_path / "m").logged]
    assert rates[:3] == pytest.approx([0, 5e-4, 1e-3])
    assert rates[-1] == pytest.approx(9.125e-4)


def test_rows_too_long_are_counted_in_the_metrics(base: Any, example: Callable[..., Example], tmp_path: Path) -> None:
    rows = [example(), example(prompt="the lake " * 60), example(completion="the lake " * 60), example()]
    config = FULL.model_copy(update={"max_steps": 1})
    metrics = Run(rows, base.plain, config, tmp_path / "m").trained.metrics
    assert (metrics["rows"], metrics["too_long"], metrics["truncated"]) == (3, 1, pytest.approx(1 / 3))


def test_a_recipe_that_leaves_no_row_is_refused(base: Any, examples: list[Example], tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match=f"no example is left to train on; {len(examples)} have"):
        Run(examples, base.plain, FULL.model_copy(update={"max_length": 4, "packing": True}), tmp_path / "m")


def test_contradictions_are_refused_before_anything_is_loaded(examples: list[Example], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="lora_r"):
        Run(examples, ModelConfig(path="/nowhere", quantisation="nf4"), FULL, tmp_path / "m")


def test_a_template_without_a_stop_token_is_refused_before_the_weights_are_loaded(
    base: Any, examples: list[Example], tmp_path: Path, endless: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("selfalign.training.sft.load_model", lambda _: pytest.fail("the weights were loaded"))
    model = base.plain.model_copy(update={"chat_template": endless})
    with pytest.raises(MismatchError, match="never learn to stop"):
        Run(examples, model, FULL, tmp_path / "m")


def test_target_modules_the_model_lacks_are_named(base: Any, examples: list[Example], tmp_path: Path) -> None:
    config = LORA.model_copy(update={"target_modules": ("q_proj", "c_attn")})
    with pytest.raises(MismatchError, match="no c_attn"):
        Run(examples, base.plain, config, tmp_path / "m")


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(
    base: Any, example: Callable[..., Example], tmp_path: Path
) -> None:
    import shutil

    path = tmp_path / "base"
    shutil.copytree(base.path, path)
    tokenizer = base.tokenizer()
    tokenizer.add_tokens([f"<extra{n}>" for n in range(200)])
    tokenizer.save_pretrained(path)
    model = ModelConfig(path=str(path), chat_template="plain")
    with pytest.raises(MismatchError, match="belong together"):
        Run([example(completion="<extra199>")], model, FULL, tmp_path / "m")


def test_a_loss_that_is_no_number_stops_the_training(base: Any, examples: list[Example], tmp_path: Path) -> None:
    config = FULL.model_copy(update={"learning_rate": 1e30, "max_grad_norm": 0.0, "logging_steps": 1})
    with pytest.raises(GateError, match="learning_rate"):
        Run(examples, base.plain, config, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_training_opens_no_connection(
    base: Any, examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a connection was opened")

    for name in ("CI", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    Run(examples, base.plain, LORA.model_copy(update={"max_steps": 1}), tmp_path / "m")


def test_a_training_leaves_no_model_in_memory(base: Any, examples: list[Example], tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    def models() -> int:
        gc.collect()
        # By type: isinstance would wake lazy objects of other libraries.
        return sum(type(o) is LlamaForCausalLM for o in gc.get_objects())

    before = models()
    Run(examples, base.plain, LORA.model_copy(update={"max_steps": 1}), tmp_path / "m")
    assert models() == before
