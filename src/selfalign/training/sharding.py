"""Training in several ranks: joining them, DeepSpeed ZeRO's settings, proof that it shards, and the whole weights."""

import importlib.util
import os
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from selfalign.core.errors import InternalError, UsageError
from selfalign.training import ranks

if TYPE_CHECKING:
    from torch import Tensor

Stage = Literal["zero2", "zero3"]

# Rank 0 writes the weights of a large model while the others wait.
PATIENCE = timedelta(minutes=30)
# A share is rounded up, for small models by a lot; who holds everything holds twice two ranks' share, or more.
PADDED = 1.5


def settings(stage: Stage) -> str:
    """The DeepSpeed configuration that comes with the package: a JSON file for `SFTConfig(deepspeed=…)`.

    ZeRO-2 shards gradients and optimiser states over the ranks, ZeRO-3 the parameters too (arXiv 1910.02054). Its
    "auto" values are filled from the other arguments. It names no optimizer: DeepSpeed would compile one of its own.
    """
    return str(Path(__file__).parent / "deepspeed" / f"{stage}.json")


def require(stage: Stage) -> None:
    """Raise UsageError where DeepSpeed is not installed. Imports nothing."""
    if importlib.util.find_spec("deepspeed") is None:
        install = "pip install -c constraints.txt -e '.[deepspeed]' in the checkout"
        raise UsageError(f"deepspeed={stage} needs the extra `deepspeed`: {install}")


def start(stage: Stage | None) -> None:
    """Join the ranks that were started, over NCCL or, without a GPU, gloo. Alone and without DeepSpeed: nothing.

    torchrun leaves it to each rank to join the others; Ray Train has joined them already.

    Comes before the training's arguments and the model: under ZeRO-3 a model is sharded while it is loaded, by the
    arguments, which must stay alive. Raises UsageError where DeepSpeed is not installed or would not be used.
    """
    import torch
    import torch.distributed

    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    else:
        # Accelerate imports DeepSpeed wherever it is installed, which would then tell of its search on standard output.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    backend = "nccl" if gpu else "gloo"
    if stage is None:
        if ranks.size() > 1 and not torch.distributed.is_initialized():
            torch.distributed.init_process_group(backend, timeout=PATIENCE)
        return
    require(stage)
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on", "y", "t"):
        raise UsageError(f"deepspeed={stage}: ACCELERATE_USE_CPU in the environment would turn it off; unset it")
    import deepspeed
    import deepspeed.ops

    if not gpu:
        # A reduction for inference through shared memory, which no training calls: compiling it takes minutes, and a
        # compilation that is killed leaves a lock for which the next one waits for ever.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False, timeout=PATIENCE)


def leave() -> None:
    """End what `start` began, so that the process can go on, or end, alone: models are loaded whole again."""
    import torch.distributed
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def check_sharded(trainer: Any, stage: Stage) -> None:
    """Raise InternalError unless DeepSpeed runs at `stage` and this rank holds no more than its share.

    `trainer` has begun to train: DeepSpeed takes the model over only then. Counted in numbers, not bytes: under ZeRO-2
    the parameters that the optimiser updates here, under ZeRO-3 the pieces of all parameters.
    """
    engine = trainer.model_wrapped
    if not trainer.is_deepspeed_enabled or not hasattr(engine, "zero_optimization_stage"):
        raise InternalError(f"deepspeed={stage} was asked for, and the model is a {type(engine).__name__}")
    if (at := f"zero{engine.zero_optimization_stage()}") != stage:
        raise InternalError(f"deepspeed={stage} was asked for, and DeepSpeed runs at {at}")
    parameters = list(trainer.model.parameters())
    if stage == "zero3":
        if whole := [n for n, p in trainer.model.named_parameters() if not hasattr(p, "ds_tensor")]:
            raise InternalError(f"deepspeed={stage}: {len(whole)} parameters are not sharded, {whole[0]} among them")
        total = sum(p.ds_numel for p in parameters)
        held = sum(p.ds_tensor.numel() for p in parameters)
    else:
        total = sum(p.numel() for p in parameters if p.requires_grad)
        held = sum(p.numel() for group in engine.optimizer.param_groups for p in group["params"])
    size = engine.world_size
    if not total <= held * size <= total * PADDED:
        raise InternalError(f"deepspeed={stage}: rank {ranks.rank()} of {size} holds {held} of {total} numbers")


def gathered(trainer: Any) -> "dict[str, Tensor] | None":
    """The trained weights, whole and on the CPU, by their names in the model; where there is an adapter, its alone.

    To be called by every rank; None on all but rank 0. Tied weights are one tensor under both names. Raises
    InternalError where a tensor is empty, as those that ZeRO-3 leaves in the model are.
    """
    from peft import PeftModel

    model, whole = trainer.model, dict[int, "Tensor"]()
    if isinstance(model, PeftModel):
        found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    else:
        found = model.state_dict(keep_vars=True)
    for tensor in found.values():
        # One at a time, so that no device ever holds two.
        if id(tensor) not in whole:
            with _whole(tensor):
                whole[id(tensor)] = tensor.detach().to("cpu", copy=True) if ranks.rank() == 0 else tensor
    if ranks.rank() != 0:
        return None
    if empty := [name for name, tensor in found.items() if not whole[id(tensor)].numel()]:
        raise InternalError(f"{len(empty)} of {len(found)} trained tensors are empty, {empty[0]} among them")
    return {name: whole[id(tensor)] for name, tensor in found.items()}


def _whole(tensor: "Tensor") -> Any:
    if not hasattr(tensor, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([tensor])
