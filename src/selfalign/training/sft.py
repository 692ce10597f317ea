"""Supervised fine-tuning on completions: all weights, an adapter, or an adapter on a quantised base."""

import gc
import json
import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfalign.core import locations, preemption
from selfalign.core.errors import InternalError, MismatchError, PreemptedError
from selfalign.core.records import Example
from selfalign.core.stage import Log
from selfalign.engines.adapters import skeleton
from selfalign.engines.config import ModelConfig
from selfalign.engines.loading import load_model, load_tokenizer, settle_generation
from selfalign.training import ranks, sharding
from selfalign.training.attention import choose_attention
from selfalign.training.checkpoints import Checkpoints, storage_errors
from selfalign.training.config import TrainConfig, refuse_contradictions
from selfalign.training.memory import explained_out_of_memory, forecast, largest_batch
from selfalign.training.packing import sequences
from selfalign.training.preflight import IGNORED, Preflight, Tokenised, check, check_saved, fit, stop_ids, tokenise
from selfalign.training.schedules import scheduled
from selfalign.training.trainer import reporter, trainer_class

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

_logger = logging.getLogger(__name__)

PREFLIGHT = "preflight.txt"
"""Beside the checkpoints while the training is under way, and then with the model."""

SAVED_ROWS = 8
"""Rows that the saved tokenizer and template must read as they were trained."""


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
    examples: Sequence[Example],
    model: ModelConfig,
    config: TrainConfig,
    folder: Path,
    seed: int,
    log: Log,
    checkpoints: Checkpoints,
) -> Trained:
    """Fine-tune `model` on `examples` and save it, or its adapter, with tokenizer and template to `folder`.

    Run by every rank with the same arguments; rank 0 saves. It goes on from the newest whole checkpoint, and then ends
    with the bytes that it would have ended with anyway: equal arguments and threads give equal bytes on a CPU. `log`
    receives, on rank 0, the figures of docs/training.md every `logging_steps` and at the last step.

    Raises UsageError for settings that contradict each other, MismatchError where data, template, model and checkpoint
    do not fit, GateError when the loss is no longer a number, PreemptedError once it has saved what it was asked to.
    """
    import torch

    refuse_contradictions(config, model)
    if ranks.size() != config.num_processes:
        raise InternalError(f"num_processes={config.num_processes}, and {ranks.size()} processes were started")
    torch.set_num_threads(model.threads)
    sharding.start(config.deepspeed)
    if not torch.cuda.is_available():
        model = model.model_copy(update={"dtype": "float32"})
    tokenizer = load_tokenizer(model)
    stops = stop_ids(tokenizer, model)
    rows, too_long = fit((tokenise(e, tokenizer, stops) for e in examples), config.max_length)
    recipe, config = config, scheduled(config, len(rows))
    data = sequences(rows, config.max_length if config.packing else None)
    packed = len(data) if config.packing else 0
    report = check(rows, tokenizer, too_long, _steps(len(data), config), packed, config.max_length)
    shape = skeleton(model)
    _check_fit(shape, rows, config)
    lengths = [len(ids) for ids in data["input_ids"]]
    trained = [sum(label != IGNORED for label in labels) for labels in data["labels"]]
    memory = forecast(model, recipe, largest_batch(lengths, trained, recipe), shape)
    report = replace(report, memory=memory.text())
    newest = ranks.from_first(checkpoints.newest() if ranks.rank() == 0 else None)
    if ranks.rank() == 0:
        locations.replace(checkpoints.folder / PREFLIGHT, f"{report.text()}\n".encode())
        _logger.info("%s", report.text())
        if newest is not None:
            _logger.info("going on from %s", newest)

    arguments = _arguments(model, config, checkpoints.draft(), seed)
    with explained_out_of_memory("loading the model", memory):
        base = load_model(_trainable(model, config))
    use_cache = base.config.use_cache
    settle_generation(base, stops)
    choose_attention(base, config.packing)

    def save(trainer: Any, to: Path) -> None:
        _save(trainer, tokenizer, model, to, use_cache)

    with explained_out_of_memory("training", memory):
        trainer = _trainer(base, tokenizer, data, model, config, arguments, log, checkpoints, save)
        trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
    if ranks.rank() == 0:
        checkpoints.discard()
    if trainer.state.global_step < trainer.state.max_steps:
        preemption.deliver()
        raise PreemptedError("stopped, since another rank was; the same command goes on from here")
    # From here on nobody looks whether the training is to end, since it has.
    preemption.defer(looks=False)
    with storage_errors(folder):
        save(trainer, folder)
    if ranks.rank() == 0:
        (folder / PREFLIGHT).write_text(report.text() + "\n", encoding="utf-8")
        check_saved(folder, examples[:SAVED_ROWS], tokenizer, stops)
        for epoch in range(1, math.ceil(config.num_train_epochs) if config.keep_epochs else 1):
            checkpoints.take_epoch(epoch, folder / f"epoch-{epoch}")
    steps = trainer.state.global_step
    metrics = {
        "train_loss": round(trainer.loss_sum / steps, 6),
        "steps": float(steps),
        "rows": float(report.rows),
        "tokens": float(trainer.tokens),
        "too_long": float(too_long),
        "truncated": report.truncated_share,
    }
    del trainer, base, save, arguments
    gc.collect()
    torch.cuda.empty_cache()
    sharding.leave()
    files = tuple(sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()))
    return Trained(files, tuple(f for f in files if _is_content(f)), metrics, report)


def _trainable(model: ModelConfig, config: TrainConfig) -> ModelConfig:
    """All weights are trained in float32 under autocast: in 16 bits, small updates round to nothing. DeepSpeed keeps
    float32 copies of its own, sharded."""
    if config.lora_r is not None or config.deepspeed is not None:
        return model
    return model.model_copy(update={"dtype": "float32"})


def _steps(sequences: int, config: TrainConfig) -> int:
    """Optimiser steps, as the trainer counts them."""
    if config.max_steps > 0:
        return config.max_steps
    batches = math.ceil(math.ceil(sequences / config.per_device_train_batch_size) / config.num_processes)
    return math.ceil(math.ceil(batches / config.gradient_accumulation_steps) * config.num_train_epochs)


def _check_fit(shape: "PreTrainedModel", rows: Sequence[Tokenised], config: TrainConfig) -> None:
    """Raise MismatchError for tokens or target modules that the model does not have."""
    size = shape.get_input_embeddings().weight.shape[0]
    largest = max(max(row.input_ids) for row in rows)
    if largest >= size:
        raise MismatchError(f"the tokenizer gives token {largest}, the model has {size}: they do not belong together")
    if config.lora_r is not None and config.target_modules != "all-linear":
        names = [name for name, _ in shape.named_modules()]
        missing = [t for t in config.target_modules if not any(n == t or n.endswith(f".{t}") for n in names)]
        if missing:
            raise MismatchError(f"target_modules: the model has no {', '.join(missing)}; all-linear fits any model")


def _trainer(
    base: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerFast",
    data: "Dataset",
    model: ModelConfig,
    config: TrainConfig,
    arguments: Any,
    log: Log,
    checkpoints: Checkpoints,
    save: Any,
) -> Any:
    """TRL's SFTTrainer over ready labels. It seeds every generator before it draws the adapter's weights."""
    import torch
    from transformers import PrinterCallback

    trainer = trainer_class()(
        config,
        checkpoints,
        save,
        model=base,
        args=arguments,
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=_lora(model, config),
        callbacks=[reporter(config, log)],
    )
    trainer.remove_callback(PrinterCallback)
    # TRL casts adapters over a quantised base to bfloat16, where small updates round to nothing. DeepSpeed keeps copies
    # in float32 of its own, and gathers tensors of one type only.
    dtype = torch.float32 if config.deepspeed is None else getattr(torch, model.dtype)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return trainer


def _arguments(model: ModelConfig, config: TrainConfig, scratch: Path, seed: int) -> Any:
    import torch
    from trl import SFTConfig

    ours = {
        *("lora_r", "lora_alpha", "lora_dropout", "target_modules", "warmup_ratio", "group_by_length", "seed"),
        *("size_schedule", "num_processes", "deepspeed", "keep_epochs", "save_strategy", "save_steps"),
    }
    settings = config.model_dump(exclude=ours, exclude_none=True)
    gpu = torch.cuda.is_available()
    with warnings.catch_warnings():
        # TRL reads gradient_checkpointing, of which transformers says that its name will change.
        warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated", FutureWarning)
        arguments = SFTConfig(
            output_dir=str(scratch),
            **settings,
            # A number below 1 is a share of all steps.
            warmup_steps=config.warmup_ratio,
            train_sampling_strategy="group_by_length" if config.group_by_length else "random",
            seed=seed if config.seed is None else config.seed,
            packing_strategy="bfd",
            dataset_kwargs={"skip_prepare_dataset": True},
            use_cpu=not gpu,
            # Every trained weight is used in every step.
            ddp_find_unused_parameters=False,
            use_liger_kernel=gpu and find_spec("liger_kernel") is not None,
            bf16=gpu and model.dtype == "bfloat16",
            fp16=gpu and model.dtype == "float16",
            dataloader_pin_memory=gpu,
            # The reporter says when to save.
            save_strategy="no",
            deepspeed=None if config.deepspeed is None else sharding.settings(config.deepspeed),
            report_to="none",
            disable_tqdm=True,
            # A loss that is no number must be seen, not averaged away.
            logging_nan_inf_filter=False,
        )
    if gpu:
        # transformers would spread the batch over every visible GPU. Each rank has one.
        arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


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


def _save(
    trainer: Any, tokenizer: "PreTrainedTokenizerFast", model: ModelConfig, folder: Path, use_cache: bool
) -> None:
    """Weights as safetensors in the recipe's dtype, or the adapter; tokenizer and chat template beside them."""
    import torch
    from peft import PeftModel

    trained = trainer.model
    weights = sharding.gathered(trainer)
    if weights is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(trained, PeftModel):
        # "auto" asks the Hub whether the vocabulary has grown; ours never does.
        trained.save_pretrained(folder, state_dict=weights, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)
    else:
        dtype, cast = getattr(torch, model.dtype), dict[int, Any]()
        # Tied weights stay one tensor.
        state = {name: cast.setdefault(id(tensor), tensor.to(dtype)) for name, tensor in weights.items()}
        trained.save_pretrained(folder, state_dict=state)
        # As it is saved: TRL turns the cache off for training, and the training's own dtype is float32.
        config = json.loads((folder / "config.json").read_bytes())
        config.update(use_cache=use_cache, dtype=model.dtype)
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    tokenizer.save_pretrained(folder)


def _is_content(name: str) -> bool:
    return name.endswith((".safetensors", ".jinja")) or Path(name).name in ("tokenizer.json", "tokenizer.model")
