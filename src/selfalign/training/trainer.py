"""TRL's SFTTrainer with what it lacks: an order of rows that resumes, checkpoints that are whole, figures as curves."""

import json
import math
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfalign.core import preemption
from selfalign.core.errors import GateError
from selfalign.core.identity import seed_for
from selfalign.core.stage import Log
from selfalign.training import ranks, sharding
from selfalign.training.checkpoints import Checkpoints, storage_errors
from selfalign.training.config import TrainConfig
from selfalign.training.preflight import IGNORED

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

FIGURES = "figures.json"
"""In a checkpoint, beside the trainer's files: what has been counted so far."""


def trainer_class() -> Any:
    """The class, once the libraries are needed."""
    import torch
    from torch.utils.data import Sampler
    from transformers.trainer_pt_utils import get_length_grouped_indices
    from trl import SFTTrainer

    class Order(Sampler[int]):
        """The rows of an epoch in an order of its own: the seed's and the epoch's, whatever was drawn before.

        The libraries' samplers draw from the process's generator, which a resumed training finds in another state.
        `lengths`: rows of like length come in one batch of `batch` rows, the longest first.
        """

        def __init__(self, trainer: "Trainer", rows: int, lengths: Sequence[int] | None, batch: int) -> None:
            self.trainer, self.rows, self.lengths, self.batch = trainer, rows, lengths, batch

        def __len__(self) -> int:
            return self.rows

        def __iter__(self) -> Iterator[int]:
            epoch = int(self.trainer.state.epoch or 0)
            chance = torch.Generator().manual_seed(seed_for(self.trainer.args.seed, str(epoch), "order"))
            if self.lengths is None:
                return iter(torch.randperm(self.rows, generator=chance).tolist())
            return iter(get_length_grouped_indices(self.lengths, self.batch, generator=chance))

    class Trainer(SFTTrainer):  # type: ignore[misc]
        """Makes no network calls, counts tokens over all ranks, and is not slower than a plain loop on a CPU.

        `tokens`, without padding, and `loss_sum`, over steps, are since the beginning, also after a resume.
        """

        def __init__(
            self, config: TrainConfig, checkpoints: Checkpoints, save: Callable[[Any, Path], None], **arguments: Any
        ) -> None:
            self.config, self.checkpoints, self.save = config, checkpoints, save
            self.tokens, self.loss_sum = 0, 0.0
            self._uncounted: list[Any] = []
            self._clock, self._last = 0.0, 0
            super().__init__(**arguments)

        def _send_telemetry(self) -> None:
            pass

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            data = self.train_dataset
            grouped = self.args.train_sampling_strategy == "group_by_length"
            lengths = [len(ids) for ids in data["input_ids"]] if grouped else None
            batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * ranks.size()
            return Order(self, len(data), lengths, batch)

        def train(self, resume_from_checkpoint: str | None = None) -> Any:
            if resume_from_checkpoint is not None:
                figures = json.loads((Path(resume_from_checkpoint) / FIGURES).read_bytes())
                self.tokens, self.loss_sum, self._last = figures["tokens"], figures["loss_sum"], figures["step"]
            return super().train(resume_from_checkpoint=resume_from_checkpoint)

        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            if self.config.deepspeed is not None:
                # A polynomial asks for the defaults of the optimizer, which DeepSpeed's, around it, does not hand on.
                zero = self.optimizer.optimizer
                zero.defaults = zero.optimizer.defaults
            return super().create_scheduler(num_training_steps, optimizer)

        def _prepare_for_training(self, *arguments: Any, **named: Any) -> Any:
            prepared = super()._prepare_for_training(*arguments, **named)
            if self.config.deepspeed is not None:
                sharding.check_sharded(self, self.config.deepspeed)
            return prepared

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            ids_BT, mask_BT = inputs["input_ids"], inputs.get("attention_mask")
            if not self._uncounted:
                self._clock = time.monotonic()
            # Summed up when it is logged: to look at it here would make the device wait.
            self._uncounted.append(ids_BT.numel() if mask_BT is None else mask_BT.sum())
            if ids_BT.is_cuda or return_outputs or self.aux_loss_enabled:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            loss = completion_loss(model, inputs, self.model.get_output_embeddings(), num_items_in_batch)
            # `num_items_in_batch` counts all ranks' tokens, over which the gradients are then averaged.
            return loss if num_items_in_batch is None else loss * ranks.size()

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            if "loss" in logs:
                steps, self._last = self.state.global_step - self._last, self.state.global_step
                self.loss_sum += logs["loss"] * steps
                new = ranks.total(int(sum(self._uncounted)))
                self._uncounted.clear()
                self.tokens += new
                logs["tokens"] = self.tokens
                logs["tokens_per_second"] = new / max(time.monotonic() - self._clock, 1e-9)
                logs["memory_bytes"] = _peak_memory()
            super().log(logs, start_time)

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            draft, step, epoch = self.checkpoints.draft(), self.state.global_step, self.state.epoch
            preemption.defer(looks=False)
            with storage_errors(draft):
                if self.config.keep_epochs and epoch.is_integer():
                    # Before the checkpoint, which a resumed training would begin behind.
                    self.save(self, draft / "epoch")
                    if ranks.rank() == 0:
                        self.checkpoints.commit_epoch(draft / "epoch", int(epoch))
                super()._save_checkpoint(model, trial)
                ranks.barrier()
                if ranks.rank() == 0:
                    written = draft / f"checkpoint-{step}"
                    figures = {"step": step, "tokens": self.tokens, "loss_sum": self.loss_sum}
                    (written / FIGURES).write_text(json.dumps(figures))
                    self.checkpoints.commit(written, step)
                ranks.barrier()
            preemption.defer()

    return Trainer


def completion_loss(
    model: Any, inputs: "Mapping[str, Tensor]", head: "Module", items: "Tensor | int | None"
) -> "Tensor":
    """Cross-entropy over the positions that carry loss, summed and divided by `items` (by default their number).

    Off Triton, TRL's fused head projects every position onto the vocabulary, and once more to go back; here only
    those that a label needs pass through `head`.
    """
    from torch.nn.functional import cross_entropy

    labels_BT = inputs["labels"][:, 1:]
    trained_BT = labels_BT != IGNORED

    def needed(_: Any, arguments: Any) -> Any:
        return arguments[0][:, :-1][trained_BT].unsqueeze(0)

    rest = {name: value for name, value in inputs.items() if name != "labels"}
    hook = head.register_forward_pre_hook(needed)
    try:
        logits_NV = model(**rest, use_cache=False).logits[0]
    finally:
        hook.remove()
    total = cross_entropy(logits_NV.float(), labels_BT[trained_BT], reduction="sum")
    return total / (trained_BT.sum().clamp(min=1) if items is None else items)


def reporter(config: TrainConfig, log: Log) -> Any:
    """The callback that says when to save, hands figures on, and ends a training whose loss is no number."""
    import torch
    from transformers import TrainerCallback

    wanted = ("loss", "learning_rate", "grad_norm", "tokens", "epoch", "tokens_per_second", "memory_bytes")

    def is_due(step: int, epoch: float) -> bool:
        if epoch.is_integer() and (config.keep_epochs or config.save_strategy == "epoch"):
            return True
        return config.save_strategy == "steps" and step % config.save_steps == 0

    class Reporter(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            preemption.defer()
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            if state.global_step and ranks.rank() == 0:
                log({"resumed_at": float(state.global_step)})

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step >= state.max_steps:
                # What comes now is the model itself.
                control.should_log = True
                return
            if ranks.total(int(preemption.asked())):
                control.should_training_stop = True
            control.should_save = control.should_training_stop or is_due(state.global_step, state.epoch)
            # What has been counted goes into the checkpoint.
            control.should_log = control.should_log or control.should_save

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            if "loss" not in logs:
                # The summary at the end, which `Trained.metrics` holds.
                return
            if not math.isfinite(logs["loss"]):
                at = f"the loss is {logs['loss']} at step {state.global_step}"
                raise GateError(f"{at}: lower learning_rate, or raise warmup_ratio")
            if ranks.rank() == 0:
                log(
                    {
                        "step": float(state.global_step),
                        "max_steps": float(state.max_steps),
                        **{k: float(logs[k]) for k in wanted if k in logs},
                    }
                )

    return Reporter()


def _peak_memory() -> int:
    """Bytes: of the device's memory, or of this process's where there is no device."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
