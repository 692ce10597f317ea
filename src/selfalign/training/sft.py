"""Supervised fine-tuning on completions: all weights, an adapter, or an adapter on a quantised base."""

import gc
import logging
import math
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfalign.core.errors import GateError, MismatchError
from selfalign.core.records import Example
from selfalign.core.stage import Log
from selfalign.engines.config import ModelConfig
from selfalign.engines.loading import load_model, load_tokenizer, settle_generation
from selfalign.training.config import TrainConfig, refuse_contradictions
from selfalign.training.preflight import IGNORED, Preflight, Tokenised, check, fit, stop_ids, tokenise

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from torch.nn import Module
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Trained:
    """What a training left in its folder. Names are relative to it.

    `content` are the files whose bytes are the model (weights, tokenizer, template); configurations, which may hold
    paths and versions, are among `files` only. `metrics`: train_loss (mean over all steps), steps, rows, tokens
    (seen in all epochs), too_long (rows dropped), truncated (share of rows, 0..1).
    """

    files: tuple[str, ...]
    content: tuple[str, ...]
    metrics: Mapping[str, float]
    preflight: Preflight


def train(
    examples: Sequence[Example], model: ModelConfig, config: TrainConfig, folder: Path, seed: int, log: Log
) -> Trained:
    """Fine-tune `model` on `examples` and save it, or its adapter, with tokenizer and template to `folder`.

    `log` receives loss, learning_rate, grad_norm, tokens and step every `logging_steps` and at the last step.
    Equal arguments and threads give equal bytes on a CPU. Raises UsageError for settings that contradict each other,
    MismatchError where data, template and model do not fit, GateError when the loss is no longer a number.
    """
    import torch

    refuse_contradictions(config, model)
    torch.set_num_threads(model.threads)
    if not torch.cuda.is_available():
        model = model.model_copy(update={"dtype": "float32"})
    tokenizer = load_tokenizer(model)
    stops = stop_ids(tokenizer, model)
    rows, too_long = fit((tokenise(e, tokenizer, stops) for e in examples), config.max_length)
    data = _dataset(rows, config)
    report = check(rows, tokenizer, too_long, _steps(len(data), config))
    _logger.info("%s", report.text())

    base = load_model(_trainable(model, config))
    use_cache = base.config.use_cache
    _check_fit(base, rows, config)
    settle_generation(base, stops)
    with _scratch(folder) as scratch:
        trainer = _trainer(base, tokenizer, data, model, config, scratch, seed, log)
        result = trainer.train()
    # TRL turns the cache off for training, and the saved configuration would keep it off for every reader.
    base.config.use_cache = use_cache
    _save(trainer.model, tokenizer, model, folder)
    metrics = {
        "train_loss": float(result.training_loss),
        "steps": float(result.global_step),
        "rows": float(report.rows),
        "tokens": float(trainer.tokens_seen),
        "too_long": float(too_long),
        "truncated": report.truncated_share,
    }
    del trainer, base, result
    gc.collect()
    torch.cuda.empty_cache()
    files = tuple(sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()))
    return Trained(files, tuple(f for f in files if _is_content(f)), metrics, report)


def _trainable(model: ModelConfig, config: TrainConfig) -> ModelConfig:
    """All weights are trained in float32 under autocast: in 16 bits, small updates round to nothing."""
    return model if config.lora_r is not None else model.model_copy(update={"dtype": "float32"})


def _dataset(rows: Sequence[Tokenised], config: TrainConfig) -> "Dataset":
    """Input ids and labels, packed into sequences of at most `max_length` where the recipe asks for it."""
    import datasets
    from trl import pack_dataset

    columns = {"input_ids": [list(r.input_ids) for r in rows], "labels": [r.labels for r in rows]}
    data = datasets.Dataset.from_dict(columns)
    if not (config.packing and rows):
        return data
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        return pack_dataset(data, config.max_length, "bfd")
    finally:
        if shown:
            datasets.enable_progress_bars()


def _steps(sequences: int, config: TrainConfig) -> int:
    """Optimiser steps, as the trainer counts them on one device."""
    if config.max_steps > 0:
        return config.max_steps
    batches = math.ceil(sequences / config.per_device_train_batch_size)
    return math.ceil(math.ceil(batches / config.gradient_accumulation_steps) * config.num_train_epochs)


def _check_fit(base: "PreTrainedModel", rows: Sequence[Tokenised], config: TrainConfig) -> None:
    """Raise MismatchError for tokens or target modules that the model does not have."""
    size = base.get_input_embeddings().weight.shape[0]
    largest = max(max(row.input_ids) for row in rows)
    if largest >= size:
        raise MismatchError(f"the tokenizer gives token {largest}, the model has {size}: they do not belong together")
    if config.lora_r is not None and config.target_modules != "all-linear":
        names = [name for name, _ in base.named_modules()]
        missing = [t for t in config.target_modules if not any(n == t or n.endswith(f".{t}") for n in names)]
        if missing:
            raise MismatchError(f"target_modules: the model has no {', '.join(missing)}; all-linear fits any model")


def _trainer(
    base: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerFast",
    data: "Dataset",
    model: ModelConfig,
    config: TrainConfig,
    scratch: Path,
    seed: int,
    log: Log,
) -> Any:
    """TRL's SFTTrainer over ready labels. It seeds every generator before it draws the adapter's weights."""
    from transformers import PrinterCallback

    trainer = _trainer_class()(
        model=base,
        args=_arguments(model, config, scratch, seed),
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=_lora(model, config),
        callbacks=[_reporter(log)],
    )
    trainer.remove_callback(PrinterCallback)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            # TRL casts adapters over a quantised base to bfloat16, where small updates round to nothing.
            parameter.data = parameter.data.float()
    return trainer


def _arguments(model: ModelConfig, config: TrainConfig, scratch: Path, seed: int) -> Any:
    import torch
    from trl import SFTConfig

    ours = {"lora_r", "lora_alpha", "lora_dropout", "target_modules", "warmup_ratio", "group_by_length", "seed"}
    settings = config.model_dump(exclude=ours, exclude_none=True)
    gpu = torch.cuda.is_available()
    with warnings.catch_warnings():
        # TRL reads gradient_checkpointing, of which transformers says that its name will change.
        warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated", FutureWarning)
        return SFTConfig(
            output_dir=str(scratch),
            **settings,
            # A number below 1 is a share of all steps.
            warmup_steps=config.warmup_ratio,
            train_sampling_strategy="group_by_length" if config.group_by_length else "random",
            seed=seed if config.seed is None else config.seed,
            packing_strategy="bfd",
            dataset_kwargs={"skip_prepare_dataset": True},
            use_cpu=not gpu,
            bf16=gpu and model.dtype == "bfloat16",
            fp16=gpu and model.dtype == "float16",
            dataloader_pin_memory=gpu,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            # A loss that is no number must be seen, not averaged away.
            logging_nan_inf_filter=False,
        )


def _lora(model: ModelConfig, config: TrainConfig) -> Any:
    if config.lora_r is None:
        return None
    from peft import LoraConfig

    targets = config.target_modules
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        revision=model.revision,
    )


def _trainer_class() -> Any:
    from trl import SFTTrainer

    class Trainer(SFTTrainer):  # type: ignore[misc]
        """SFTTrainer that makes no network calls, counts tokens, and is not slower than a plain loop on a CPU."""

        tokens_seen = 0

        def _send_telemetry(self) -> None:
            pass

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            ids_BT, mask_BT = inputs["input_ids"], inputs.get("attention_mask")
            self.tokens_seen += ids_BT.numel() if mask_BT is None else int(mask_BT.sum())
            if ids_BT.is_cuda or return_outputs or self.aux_loss_enabled:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            return completion_loss(model, inputs, self.model.get_output_embeddings(), num_items_in_batch)

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            logs["tokens"] = self.tokens_seen
            super().log(logs, start_time)

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


def _reporter(log: Log) -> Any:
    from transformers import TrainerCallback

    wanted = ("loss", "learning_rate", "grad_norm", "tokens", "epoch")

    class Reporter(TrainerCallback):  # type: ignore[misc]
        """Hands figures on, and stops a training whose loss is no longer a number."""

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step >= state.max_steps:
                control.should_log = True

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            if "loss" not in logs:
                # The summary at the end, which `Trained.metrics` holds.
                return
            if not math.isfinite(logs["loss"]):
                at = f"the loss is {logs['loss']} at step {state.global_step}"
                raise GateError(f"{at}: lower learning_rate, or raise warmup_ratio")
            log(
                {
                    "step": float(state.global_step),
                    "max_steps": float(state.max_steps),
                    **{k: float(logs[k]) for k in wanted if k in logs},
                }
            )

    return Reporter()


def _save(trained: Any, tokenizer: "PreTrainedTokenizerFast", model: ModelConfig, folder: Path) -> None:
    """Weights as safetensors in the recipe's dtype, or the adapter; tokenizer and chat template beside them."""
    import torch
    from peft import PeftModel

    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(trained, PeftModel):
        # "auto" asks the Hub whether the vocabulary has grown; ours never does.
        trained.save_pretrained(folder, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)
    else:
        trained.to(getattr(torch, model.dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _is_content(name: str) -> bool:
    return name.endswith((".safetensors", ".jinja")) or name in ("tokenizer.json", "tokenizer.model")


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A folder beside the result for what the trainer must write; gone afterwards."""
    parent = folder.parent / "tmp"
    parent.mkdir(parents=True, exist_ok=True)
    path = Path(tempfile.mkdtemp(dir=parent, prefix="train-"))
    try:
        yield path
    finally:
        shutil.rmtree(path)
        with suppress(OSError):
            # Others may be using it.
            parent.rmdir()
