"""How a model is trained: the hyper-parameters of the recipe's `backward` and `forward` sections."""

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from selfalign.core.errors import UsageError
from selfalign.core.frozen import Frozen
from selfalign.engines.config import ModelConfig


class LrSchedulerKwargs(Frozen):
    """What a schedule takes beyond its name. `lr_end` and `power` belong to polynomial (power 1 is a line that
    ends at `lr_end` instead of 0), `min_lr_rate` to cosine_with_min_lr."""

    lr_end: NonNegativeFloat | None = None
    power: PositiveFloat | None = None
    min_lr_rate: float | None = Field(None, ge=0, le=1)


class TrainConfig(Frozen):
    """Names and meanings are TRL's and PEFT's. With `lora_r` an adapter is trained, else all weights."""

    lora_r: PositiveInt | None = None
    lora_alpha: PositiveInt = 16
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    learning_rate: PositiveFloat = 1e-5
    lr_scheduler_type: Literal[
        "linear", "cosine", "constant", "constant_with_warmup", "polynomial", "cosine_with_min_lr"
    ] = "linear"
    lr_scheduler_kwargs: LrSchedulerKwargs = LrSchedulerKwargs()
    warmup_ratio: float = Field(0.0, ge=0, lt=1)
    weight_decay: NonNegativeFloat = 0.0
    adam_beta2: float = Field(0.999, gt=0, lt=1)
    max_grad_norm: NonNegativeFloat = 1.0
    optim: str = "adamw_torch"
    per_device_train_batch_size: PositiveInt = 8
    gradient_accumulation_steps: PositiveInt = 1
    num_train_epochs: PositiveFloat = 1.0
    max_steps: int = Field(-1, ge=-1, description="-1: by num_train_epochs")
    max_length: PositiveInt = 2048
    packing: bool = False
    group_by_length: bool = False
    gradient_checkpointing: bool = False
    logging_steps: PositiveInt = 10
    seed: NonNegativeInt | None = Field(None, description="the training seed; the run's by default")


def refuse_contradictions(config: TrainConfig, model: ModelConfig) -> None:
    """Raise UsageError for settings that cannot be met together. Loads nothing."""
    if model.quantisation is not None and config.lora_r is None:
        raise UsageError(
            f"model.quantisation={model.quantisation} freezes the base weights, so there would be nothing to "
            "train; set lora_r to train an adapter, or model.quantisation=null to train all weights"
        )
    if config.packing and config.group_by_length:
        raise UsageError("packing leaves no padding for group_by_length to save; set one of them to false")
    if config.lr_scheduler_type == "constant" and config.warmup_ratio > 0:
        raise UsageError(
            "lr_scheduler_type=constant ignores warmup_ratio; name constant_with_warmup, or set warmup_ratio to 0"
        )
    if config.max_steps == 0:
        raise UsageError("max_steps=0 trains nothing; set a number of steps, or -1 to go by num_train_epochs")
    if config.lora_r is not None and "lm_head" in config.target_modules:
        raise UsageError("target_modules: an adapter on lm_head is not supported; name the layers below it")
