"""How a model is trained: the hyper-parameters of the recipe's `backward` and `forward` sections."""

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from selfalign.core.frozen import Frozen


class TrainConfig(Frozen):
    """Names and meanings are TRL's and PEFT's. With `lora_r` an adapter is trained, else all weights."""

    lora_r: PositiveInt | None = None
    lora_alpha: PositiveInt = 16
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    learning_rate: PositiveFloat = 1e-5
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    warmup_ratio: float = Field(0.0, ge=0, le=1)
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
