"""Two processes, really run: they learn what one learns, shard what they say, and hand over whole weights."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from selfalign.core.errors import InternalError, UsageError
from selfalign.engines.config import ModelConfig
from selfalign.training import sharding
from selfalign.training.sharding import check_sharded, gathered, settings, start

CASES = (("tied", "full"), ("untied", "full"), ("untied", "lora"), ("tied", "qlora"))
STEPS, ROWS_A_STEP = 3, 4
CLOSE = 1e-5
FIGURES, LOGGED = "figures.json", ("loss", "grad_norm", "learning_rate")


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_the_settings_leave_the_optimizer_and_every_size_to_the_arguments(stage: sharding.Stage) -> None:
    shipped = json.loads(Path(settings(stage)).read_text())
    assert shipped["zero_optimization"]["stage"] == int(stage[-1])
    # DeepSpeed would compile an optimizer of its own.
    assert "optimizer" not in shipped
    batch = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    assert {shipped[name] for name in batch} == {"auto"}
    assert shipped["bf16"] == shipped["fp16"] == {"enabled": "auto"}


def test_an_environment_that_would_turn_deepspeed_off_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(UsageError, match="ACCELERATE_USE_CPU"):
        start("zero2")


def test_deepspeed_that_is_not_installed_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UsageError, match=r"-e '\.\[deepspeed\]'"):
        start("zero3")


@pytest.fixture
def trainer() -> Callable[..., Any]:
    """What a training of 100 numbers in two ranks looks like: `held` of them are updated here."""
    import torch

    def make(stage: int, held: int, **parameter: Any) -> Any:
        weight = torch.nn.Parameter(torch.zeros(10, 10))
        for name, value in parameter.items():
            setattr(weight, name, value)
        groups = [{"params": [torch.zeros(held)]}]
        engine = SimpleNamespace(
            zero_optimization_stage=lambda: stage, world_size=2, optimizer=SimpleNamespace(param_groups=groups)
        )
        model = SimpleNamespace(parameters=lambda: [weight], named_parameters=lambda: [("weight", weight)])
        return SimpleNamespace(is_deepspeed_enabled=True, model_wrapped=engine, model=model)

    return make


def test_deepspeed_that_is_off_or_does_not_shard_is_a_bug(trainer: Callable[..., Any]) -> None:
    import torch

    check_sharded(trainer(2, 50), "zero2")
    off = trainer(2, 50)
    off.is_deepspeed_enabled = False
    with pytest.raises(InternalError, match="the model is a SimpleNamespace"):
        check_sharded(off, "zero2")
    with pytest.raises(InternalError, match="runs at zero2"):
        check_sharded(trainer(2, 50), "zero3")
    for held in (100, 40):
        with pytest.raises(InternalError, match=f"of 2 holds {held} of 100"):
            check_sharded(trainer(2, held), "zero2")
    check_sharded(trainer(3, 50, ds_numel=100, ds_tensor=torch.zeros(50)), "zero3")
    with pytest.raises(InternalError, match="not sharded, weight"):
        check_sharded(trainer(3, 50), "zero3")
    with pytest.raises(InternalError, match="holds 100 of 100"):
        check_sharded(trainer(3, 50, ds_numel=100, ds_tensor=torch.zeros(100)), "zero3")


def test_empty_weights_are_never_handed_over() -> None:
    import torch

    emptied = torch.nn.Linear(2, 2)
    emptied.weight.data = torch.empty(0)
    with pytest.raises(InternalError, match="1 of 2 trained tensors are empty, weight"):
        gathered(SimpleNamespace(model=emptied))


# In processes of their own


@pytest.fixture(scope="module")
def bases(base: Any) -> dict[str, Path]:
    """A base whose output head is a matrix of its own, and one where it is the embeddings'."""
    from selfalign.demo.base import base_folder

    return {"untied": base.path, "tied": base_folder()}


@pytest.fixture(scope="module")
def alone(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process learns from the same rows."""
    folder = tmp_path_factory.mktemp("alone")
    learn(folder, bases, None)
    return folder


@pytest.mark.train
@pytest.mark.parametrize("stage", [None, "zero2", "zero3"])
def test_two_ranks_learn_what_one_learns_and_save_what_they_learned(
    stage: sharding.Stage | None, bases: dict[str, Path], alone: Path, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    job = json.dumps({"folder": str(tmp_path), "bases": {k: str(v) for k, v in bases.items()}, "stage": stage})
    # Nothing may be compiled.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    done = subprocess.run([*torchrun, __file__, job], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert not (tmp_path / "extensions").exists()
    for name, kind in CASES:
        one, two = alone / name / kind, tmp_path / name / kind
        for file in one.glob("*.safetensors"):
            expected, found = load_file(file), load_file(two / file.name)
            assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in expected.items()}
            assert max((found[n] - expected[n]).abs().max() for n in found) < CLOSE
        logits = [torch.load(two / f"logits-{rank}.pt") for rank in range(2)]
        assert torch.equal(*logits)
        assert (reloaded(two, bases[name], kind) - logits[0]).abs().max() < CLOSE
        # Adam forgives gradients of another scale; their norms do not.
        figures, theirs = (json.loads((f / FIGURES).read_text()) for f in (one, two))
        assert theirs == pytest.approx(figures, rel=CLOSE)


def reloaded(folder: Path, base: Path, kind: str) -> Any:
    """The logits of what was saved."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    if kind == "full":
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    else:
        model = PeftModel.from_pretrained(load(base, kind), folder)
    with torch.no_grad():
        return model.eval()(probe()).logits


def probe() -> Any:
    import torch

    return torch.arange(5, 29).view(2, 12)


def load(base: Path, kind: str) -> Any:
    from selfalign.engines.loading import load_model

    quantisation: Any = {"quantisation": "nf4", "quantisation_storage": "float32"} if kind == "qlora" else {}
    return load_model(ModelConfig(path=str(base), dtype="float32", **quantisation))


def learn(folder: Path, bases: dict[str, Path], stage: sharding.Stage | None) -> None:
    """Train every case, and save it with its logits: the work of one rank, or of all there are."""
    for name, kind in CASES:
        _learn(folder / name / kind, bases[name], kind, stage)


def _learn(folder: Path, base: Path, kind: str, stage: sharding.Stage | None) -> None:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from selfalign.engines.loading import load_tokenizer, settle_generation
    from selfalign.training import ranks
    from selfalign.training.trainer import completion_loss

    class Checked(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            if stage is not None:
                check_sharded(trainer, stage)

    class Trainer(SFTTrainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, *_: Any, num_items_in_batch: Any = None, **__: Any) -> Any:
            loss = completion_loss(model, inputs, self.model.get_output_embeddings(), num_items_in_batch)
            return loss * ranks.size()

    arguments = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=ROWS_A_STEP // ranks.size(),
        max_steps=STEPS,
        learning_rate=3e-4,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True},
        deepspeed=None if stage is None else settings(stage),
    )
    drawn = torch.randint(5, 300, (STEPS * ROWS_A_STEP, 16), generator=torch.Generator().manual_seed(1)).tolist()
    # Completions of every length: what the ranks average is tokens, not rows.
    rows = [{"input_ids": ids, "labels": [-100] * (2 + n) + ids[2 + n :]} for n, ids in enumerate(drawn)]
    model = load(base, kind)
    settle_generation(model, frozenset([1]))
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(ModelConfig(path=str(base), chat_template="plain")),
        peft_config=None if kind == "full" else LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"),
        callbacks=[Checked()],
    )
    if kind == "qlora":
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    trainer.train()
    state = gathered(trainer)
    folder.mkdir(parents=True, exist_ok=True)
    if state is not None:
        extra = {} if kind == "full" else {"save_embedding_layers": False}
        trainer.model.save_pretrained(folder, state_dict=state, **extra)
        figures = [entry[name] for entry in trainer.state.log_history if "loss" in entry for name in LOGGED]
        (folder / FIGURES).write_text(json.dumps(figures))
    trainer.model_wrapped.eval()
    with torch.no_grad():
        logits = trainer.model_wrapped(probe()).logits
    torch.save(logits, folder / f"logits-{ranks.rank()}.pt")


def main(job: Any) -> None:
    import torch

    torch.set_num_threads(1)
    start(job["stage"])
    learn(Path(job["folder"]), {k: Path(v) for k, v in job["bases"].items()}, job["stage"])
    sharding.leave()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
