"""The memory estimate, held against what trainings really take, and what is said when memory runs out."""

import json
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfalign.core.errors import MismatchError, UsageError, is_out_of_memory
from selfalign.core.lease import Lease, Owner
from selfalign.core.records import Example, Message
from selfalign.engines.adapters import skeleton
from selfalign.engines.config import ModelConfig
from selfalign.engines.loading import load_model
from selfalign.training.checkpoints import Checkpoints
from selfalign.training.config import TrainConfig
from selfalign.training.memory import (
    GIB,
    Batch,
    Card,
    Estimate,
    Forecast,
    estimate,
    explained_out_of_memory,
    forecast,
    largest_batch,
    this_card,
)
from selfalign.training.sft import train

A800 = Card("A800", 80 * GIB, is_gpu=True)
QLORA = TrainConfig(lora_r=32, lora_dropout=0.1, optim="adamw_8bit", gradient_checkpointing=True)
LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}


@contextmanager
def live_bytes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """Gives the most bytes that tensors held at once while training inside the block, to the byte, on any device."""
    from torch import Tensor
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Live(TorchDispatchMode):  # type: ignore[misc]
        now = peak = 0

        def __init__(self) -> None:
            super().__init__()
            self.held: set[int] = set()

        def meet(self, tensor: Tensor) -> None:
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self.held:
                self.held.add(key)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.leave, key, size)

        def leave(self, key: int, size: int) -> None:
            if key in self.held:
                self.held.remove(key)
                self.now -= size

        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = op(*args, **(kwargs or {}))
            for leaf in tree_leaves((args, kwargs, out)):
                if isinstance(leaf, Tensor):
                    self.meet(leaf)
            return out

    def load(*arguments: Any, **settings: Any) -> Any:
        model = load_model(*arguments, **settings)
        # While it is read, the file is mapped: no memory of the process's own. The weights count from their first use.
        live.held.clear()
        live.now = live.peak = 0
        return model

    monkeypatch.setattr("selfalign.training.sft.load_model", load)
    with Live() as live:
        yield lambda: live.peak


def shaped(folder: Path, **config: Any) -> ModelConfig:
    """A model of which only config.json is there."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False, **config}
    (folder / "config.json").write_text(json.dumps(whole))
    return ModelConfig(path=str(folder), dtype="bfloat16")


@pytest.fixture(scope="session")
def larger(base: Any, tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """Three million parameters, so that what is small in any model is small here."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("larger")
    shutil.copytree(base.path, path, dirs_exist_ok=True)
    torch.manual_seed(0)
    heads = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4}
    LlamaForCausalLM(
        LlamaConfig(vocab_size=384, hidden_size=256, intermediate_size=688, tie_word_embeddings=False, **heads)
    ).save_pretrained(path)
    return ModelConfig(path=str(path), chat_template="plain", dtype="float32")


class Run:
    """One training, as a stage starts it."""

    def __init__(self, examples: Sequence[Example], model: ModelConfig, config: TrainConfig, folder: Path) -> None:
        me = Owner.this_process()
        lease = folder / "lease-000001.json"
        lease.write_text(json.dumps(asdict(me)))
        kept = Checkpoints(folder / "kept", "this training", Lease(lease, me))
        self.preflight = train(examples, model, config, folder / "model", 0, lambda _: None, kept).preflight


def bytes_of(model: Any) -> int:
    """Weights with what quantisation keeps beside them."""
    total = 0
    for parameter in model.parameters():
        total += parameter.nbytes
        if (state := getattr(parameter, "quant_state", None)) is not None:
            total += state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
        if (scales := getattr(parameter, "SCB", None)) is not None:
            total += scales.nbytes
    return total


FULL: dict[str, Any] = {}
LORA = {"lora_r": 16}
LORA_QV = {**LORA, "lora_dropout": 0.1, "target_modules": ("q_proj", "v_proj")}
AGAIN = {"gradient_checkpointing": True}


@pytest.mark.parametrize(
    ("settings", "quantisation", "tokens"),
    [
        (FULL, None, 96),
        (FULL, None, 320),
        ({**AGAIN, "gradient_accumulation_steps": 2}, None, 96),
        ({**AGAIN, "gradient_accumulation_steps": 2}, None, 320),
        ({**FULL, "packing": True}, None, 320),
        (LORA, None, 96),
        (LORA_QV, None, 320),
        ({**LORA, **AGAIN, "lora_dropout": 0.1}, None, 96),
        ({**LORA, **AGAIN, "lora_dropout": 0.1}, None, 320),
        ({**LORA, **AGAIN}, "nf4", 320),
        ({**LORA, **AGAIN}, "int8", 320),
    ],
    ids=lambda value: "-".join(value) or "full" if isinstance(value, dict) else str(value),
)
def test_the_estimate_is_never_less_than_a_training_takes_and_at_most_a_quarter_more(
    larger: ModelConfig,
    example: Callable[..., Example],
    settings: dict[str, Any],
    quantisation: Any,
    tokens: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = larger.model_copy(update={"quantisation": quantisation})
    config = TrainConfig(per_device_train_batch_size=4, max_steps=2, max_length=tokens, **settings)
    rows = [example("where " * 8, "the lake " * tokens, str(n)) for n in range(8)]
    with live_bytes(monkeypatch) as peak:
        report = Run(rows, model, config, tmp_path).preflight
    batch = largest_batch([tokens] * 8, [report.trained_tokens // 8] * 8, config)
    assert peak() <= estimate(model, config, batch, skeleton(model), is_gpu=False).peak <= 1.25 * peak()


@pytest.mark.parametrize("settings", [{}, {"lora_r": 8}, {"lora_r": 8, "gradient_checkpointing": True}], ids=str)
def test_in_16_bits_autograd_keeps_what_the_estimate_says(larger: ModelConfig, settings: dict[str, Any]) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = TrainConfig(**settings)
    half = larger.model_copy(update={"dtype": "bfloat16"})
    # All weights are trained in float32 under autocast, adapters over a base in 16 bits.
    dtype = torch.float32 if config.lora_r is None else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(larger.path, dtype=dtype).train()
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    if config.lora_r is not None:
        lora = LoraConfig(task_type="CAUSAL_LM", r=config.lora_r, target_modules="all-linear")
        model = get_peft_model(model, lora).get_base_model()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    ids = torch.randint(4, 300, (4, 128))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        model.model(ids, use_cache=False)
    found = sum(storage.nbytes() for storage in kept.values())
    said = estimate(half, config, Batch(4, 128, 100), skeleton(half)).activations
    assert said == pytest.approx(found, rel=0.05)


@pytest.mark.parametrize(
    ("changes", "lora_r"),
    [
        ({}, None),
        ({}, 8),
        ({"quantisation": "nf4"}, 8),
        ({"quantisation": "nf4", "double_quantisation": False}, 8),
        ({"quantisation": "nf4", "quantisation_storage": "bfloat16"}, 8),
        ({"quantisation": "int8"}, 8),
    ],
    ids=str,
)
def test_the_weights_take_what_a_loaded_model_takes(
    larger: ModelConfig, changes: dict[str, Any], lora_r: int | None
) -> None:
    model = larger.model_copy(update=changes)
    said = estimate(model, TrainConfig(lora_r=lora_r), Batch(1, 8, 8), skeleton(model), is_gpu=False)
    assert said.weights == pytest.approx(bytes_of(load_model(model)), rel=0.002)


def test_states_and_their_shards_are_those_of_the_zero_paper(tmp_path: Path) -> None:
    # Rajbhandari et al., arXiv 1910.02054, figure 1: 7.5B parameters, Adam, 64 devices, in GB.
    model = shaped(tmp_path, vocab_size=50000, hidden_size=4096, intermediate_size=12000, num_hidden_layers=33)
    config = TrainConfig(num_processes=64, deepspeed="zero2", optim="adamw_torch")
    shape = skeleton(model)
    scale = 7.5e9 / sum(p.numel() for p in shape.parameters())
    assert scale == pytest.approx(1, abs=0.1)
    two, three = (
        estimate(model, config.model_copy(update={"deepspeed": stage}), Batch(1, 8, 8), shape).states * scale / 1e9
        for stage in ("zero2", "zero3")
    )
    assert (two, three) == pytest.approx((16.6, 1.9), abs=0.05)


def test_a_quantised_base_is_loaded_whole_by_every_rank_before_it_is_sharded(tmp_path: Path) -> None:
    model = shaped(tmp_path, **LLAMA_8B).model_copy(update={"quantisation": "nf4"})
    shape, batch = skeleton(model), Batch(1, 64, 32)
    alone = estimate(model, QLORA, batch, shape)
    shared = estimate(model, QLORA.model_copy(update={"num_processes": 8, "deepspeed": "zero3"}), batch, shape)
    assert shared.states < alone.weights / 4
    assert shared.peak >= alone.weights + shared.context
    assert shared.certain >= alone.weights


def test_ddp_holds_gradients_twice(tmp_path: Path) -> None:
    model = shaped(tmp_path, **LLAMA_8B)
    shape, batch = skeleton(model), Batch(1, 64, 32)
    one, two = (estimate(model, TrainConfig(num_processes=n), batch, shape).gradients for n in (1, 2))
    assert two == 2 * one


def test_beside_a_schedule_no_accumulation_is_advised_that_it_would_refuse(tmp_path: Path) -> None:
    model = shaped(tmp_path, **LLAMA_8B).model_copy(update={"quantisation": "nf4"})
    config = QLORA.model_copy(update={"size_schedule": "humpback", "per_device_train_batch_size": 8})
    found = forecast(model, config, Batch(8, 4096, 8 * 4096), skeleton(model), replace(A800, total=12 * GIB))
    smaller = next(text for text in found.advice if text.startswith("per_device_train_batch_size="))
    assert "gradient_accumulation_steps" not in smaller


def test_qlora_of_eight_billion_fits_a_small_card_and_training_all_of_it_does_not(tmp_path: Path) -> None:
    model = shaped(tmp_path, **LLAMA_8B)
    qlora = model.model_copy(update={"quantisation": "nf4"})
    batch = Batch(1, 1024, 500)
    assert forecast(qlora, QLORA, batch, skeleton(qlora), replace(A800, total=12 * GIB)).fits
    with pytest.raises(UsageError) as caught:
        forecast(model, TrainConfig(), batch, skeleton(model), A800)
    text = str(caught.value)
    assert "weights, adapter, gradients and optimizer alone take 119.7 GiB, and it has 80.0" in text
    assert [line[:28] for line in text.splitlines()[1:]] == [
        "  1. model.quantisation=nf4 ",
        "  2. deepspeed=zero3 with nu",
        "  3. optim=paged_adamw_8bit:",
    ]


def test_what_will_not_fit_is_said_loudly_with_the_three_settings_that_help_most(tmp_path: Path) -> None:
    model = shaped(tmp_path, **LLAMA_8B).model_copy(update={"quantisation": "nf4"})
    config = QLORA.model_copy(update={"gradient_checkpointing": False, "per_device_train_batch_size": 8})
    found = forecast(model, config, Batch(8, 2048, 9000), skeleton(model), A800)
    assert not found.fits
    assert "PREDICTION: THIS WILL RUN OUT OF MEMORY" in found.text()
    assert len(found.advice) == 3
    assert found.advice[0].startswith("gradient_checkpointing=true: about ")
    assert found.advice[1].startswith(
        "per_device_train_batch_size=4 with gradient_accumulation_steps=2 (the same step)"
    )
    assert all(advice in found.text() for advice in found.advice)
    small = forecast(model, QLORA, Batch(8, 2048, 9000), skeleton(model), A800)
    assert small.fits
    assert "PREDICTION" not in small.text()
    assert "8 rows of 2048 tokens" in small.text()


def test_states_that_can_be_evicted_do_not_make_it_certain_that_it_cannot_fit(tmp_path: Path) -> None:
    model = shaped(tmp_path, **LLAMA_8B)
    config = TrainConfig(optim="paged_adamw_32bit")
    whole = estimate(model, config, Batch(1, 128, 100), skeleton(model))
    assert whole.certain == whole.states - whole.optimizer
    card = replace(A800, total=whole.certain)
    assert not forecast(model, config, Batch(1, 128, 100), skeleton(model), card).fits


def test_where_nothing_is_left_to_change_a_smaller_model_is(tmp_path: Path) -> None:
    model = shaped(tmp_path, **LLAMA_8B).model_copy(update={"quantisation": "nf4"})
    config = QLORA.model_copy(update={"per_device_train_batch_size": 1, "lora_r": 8})
    assert forecast(model, config, Batch(1, 64, 60), skeleton(model), replace(A800, is_gpu=False)).advice == (
        "model.path: a smaller model",
    )


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "phi3", "qwen3", "gemma2", "mixtral"])
def test_any_decoder_can_be_estimated(family: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
    with torch.device("meta"):
        shape = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))
    for config in (TrainConfig(), QLORA):
        found = estimate(ModelConfig(path="-"), config, Batch(2, 64, 100), shape)
        assert min(found.weights, found.gradients, found.optimizer, found.activations, found.layer) > 0


@given(rows=st.integers(1, 16), length=st.integers(16, 4096), masked=st.booleans(), packed=st.booleans())
def test_less_to_do_never_takes_more(tmp_path_factory: Any, rows: int, length: int, masked: bool, packed: bool) -> None:
    model = ModelConfig(path="-", quantisation="nf4")
    shape = _llama_8b(tmp_path_factory)
    batch = Batch(rows, length, rows * length // 2, packed, masked)
    whole = estimate(model, QLORA, batch, shape)
    for less in (batch.cut(max(rows // 2, 1), length), batch.cut(rows, length // 2)):
        assert estimate(model, QLORA, less, shape).peak <= whole.peak
    kept = QLORA.model_copy(update={"gradient_checkpointing": False})
    assert estimate(model, kept, batch, shape).activations > whole.activations
    assert estimate(model, kept, batch, shape).states == whole.states


_shapes: list[Any] = []


def _llama_8b(folders: pytest.TempPathFactory) -> Any:
    if not _shapes:
        _shapes.append(skeleton(shaped(folders.mktemp("8b"), **LLAMA_8B)))
    return _shapes[0]


def test_the_largest_micro_batch_has_the_longest_rows_padded_to_the_longest() -> None:
    config = TrainConfig(per_device_train_batch_size=2)
    assert largest_batch([5, 9, 7], [1, 4, 6], config) == Batch(2, 9, 10, masked=True)
    assert not largest_batch([9, 9, 9], [1, 4, 6], config).masked
    assert largest_batch([5], [2], config) == Batch(1, 5, 2)
    assert largest_batch([9, 7], [4, 4], config.model_copy(update={"packing": True})) == Batch(2, 9, 8, packed=True)


def test_without_a_gpu_the_ranks_share_the_machines_memory() -> None:
    alone, shared = this_card(), this_card(ranks=2)
    assert not alone.is_gpu
    assert alone.total == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert shared.total == alone.total // 2
    assert "shared by 2 ranks" in shared.name


# Out of memory


NOTHING = Estimate(*[0] * 10, paged=False)
CASE = Forecast(NOTHING, Batch(1, 1, 1), A800, ("gradient_checkpointing=true", "max_length=64", "lora_r=8"))


def _cuda() -> Exception:
    import torch

    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")


@pytest.mark.parametrize(
    "make",
    [
        _cuda,
        MemoryError,
        lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you ..."),
        lambda: RuntimeError("CUDA error: out of memory"),
        lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        lambda: OSError(12, "Cannot allocate memory"),
    ],
    ids=["cuda", "python", "cpu", "driver", "cublas", "system"],
)
def test_running_out_of_memory_says_where_and_which_three_settings_to_change(make: Callable[[], Exception]) -> None:
    with pytest.raises(UsageError) as caught, explained_out_of_memory("loading the model", CASE):
        raise make()
    assert caught.value.exit_code == 2
    text = str(caught.value)
    assert text.startswith("out of memory while loading the model on A800, which has 80.0 GiB")
    assert text.splitlines()[1:] == [
        "Change in the recipe's section, the one that helps most first:",
        "  1. gradient_checkpointing=true",
        "  2. max_length=64",
        "  3. lora_r=8",
    ]
    assert caught.value.__cause__ is not None


def test_running_out_of_memory_inside_another_error_is_found() -> None:
    error = UsageError("the model cannot be loaded")
    error.__cause__ = OSError(12, "Cannot allocate memory")
    with pytest.raises(UsageError, match="out of memory while training"), explained_out_of_memory("training", CASE):
        raise error


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes cannot be multiplied"), MismatchError("no"), OSError(28, "full")]
)
def test_any_other_error_passes_as_it_is(error: Exception) -> None:
    assert not is_out_of_memory(error)
    with pytest.raises(type(error)) as caught, explained_out_of_memory("training", CASE):
        raise error
    assert caught.value is error


_CHILD = """
import resource, sys
from pathlib import Path
from selfalign.core.errors import SelfalignError
from training.test_memory import Run, ROOM, long_rows
from selfalign.engines.config import ModelConfig
from selfalign.training.config import TrainConfig
import torch, trl, peft, datasets, transformers

model = ModelConfig(path=sys.argv[1], chat_template="plain", dtype="float32")
config = TrainConfig(per_device_train_batch_size=8, max_steps=1, max_length=512)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
try:
    Run(long_rows(), model, config, Path(sys.argv[2]))
except SelfalignError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""
ROOM = 300 * 2**20


def long_rows() -> list[Example]:
    user, assistant = Message(role="user", content="where"), Message(role="assistant", content="the lake " * 600)
    return [Example(id=str(n), kind="seed", prompt=(user,), completion=(assistant,)) for n in range(8)]


@pytest.mark.slow
def test_a_training_that_runs_out_ends_with_2_and_says_what_to_change(larger: ModelConfig, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, larger.path, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr[-2000:]
    assert "out of memory while training on this machine's memory" in done.stderr
    assert "1. " in done.stderr
    assert "3. " in done.stderr
