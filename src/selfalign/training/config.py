"""How a model is trained: the hyper-parameters of the recipe's `backward` and `forward` sections."""

from collections.abc import Iterator
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


Optimizer = Literal[
    "adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "adafactor"
]


class TrainConfig(Frozen):
    """Names and meanings are TRL's, PEFT's and Accelerate's. With `lora_r` an adapter is trained, else all weights.

    An optimiser step sees `num_processes` x `gradient_accumulation_steps` x `per_device_train_batch_size` rows.
    """

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
    optim: Optimizer = Field("adamw_torch", description="8bit: its states; paged: they give way to the host's memory")
    per_device_train_batch_size: PositiveInt = 8
    gradient_accumulation_steps: PositiveInt = 1
    num_train_epochs: PositiveFloat = 1.0
    max_steps: int = Field(-1, ge=-1, description="-1: by num_train_epochs")
    size_schedule: Literal["humpback"] | None = Field(
        None, description="rows a step and steps by the number of rows, as in arXiv 2308.06259 (Humpback)"
    )
    max_length: PositiveInt = 2048
    packing: bool = Field(False, description="several rows in one sequence, none of which sees another")
    group_by_length: bool = Field(False, description="rows of like length in one batch, which saves padding")
    gradient_checkpointing: bool = False
    num_processes: PositiveInt = Field(1, description="ranks, each with a device of its own")
    deepspeed: Literal["zero2", "zero3"] | None = Field(
        None, description="zero2 shards gradients and optimizer states over the ranks, zero3 the weights too"
    )
    keep_epochs: bool = Field(False, description="keep the model of each epoch, and evaluate it")
    save_strategy: Literal["steps", "epoch"] = "steps"
    save_steps: PositiveInt = 100
    logging_steps: PositiveInt = 10
    seed: NonNegativeInt | None = Field(None, description="the training seed; the run's by default")


def refuse_contradictions(config: TrainConfig, model: ModelConfig, where: str = "") -> None:
    """Raise UsageError for settings that cannot be met together. Loads nothing.

    `where` is the recipe's section, as in `arms.A4.forward`.
    """
    found = (*_about_weights(config, model), *_about_steps(config), *_about_sharding(config, model))
    if found:
        raise UsageError(f"{where}: {found[0]}" if where else found[0])


def _about_weights(config: TrainConfig, model: ModelConfig) -> Iterator[str]:
    """What is trained, and from which base."""
    if model.quantisation is not None and config.lora_r is None:
        yield (
            f"model.quantisation={model.quantisation} freezes the base weights, so there would be nothing to "
            "train; set lora_r to train an adapter, or model.quantisation=null to train all weights"
        )
    if config.lora_r is not None and "lm_head" in config.target_modules:
        yield "target_modules: an adapter on lm_head is not supported; name the layers below it"
    if model.quantisation != "nf4":
        instead = f"model.quantisation={model.quantisation or 'null'}"
        if not model.double_quantisation:
            yield f"model.double_quantisation=false belongs to nf4, and {instead}; leave it out, or set nf4"
        if model.quantisation_storage != "uint8":
            storage = f"model.quantisation_storage={model.quantisation_storage}"
            yield f"{storage} says how nf4 weights are held, and {instead}; leave it out, or set nf4"


def _about_steps(config: TrainConfig) -> Iterator[str]:
    """How many steps, of which rows, at which learning rate."""
    if config.max_steps == 0:
        yield "max_steps=0 trains nothing; set a number of steps, or -1 to go by num_train_epochs"
    if config.packing and config.group_by_length:
        yield "packing leaves no padding for group_by_length to save; set one of them to false"
    if config.size_schedule is not None:
        yield from _beside_a_schedule(config)
    if config.keep_epochs:
        if config.max_steps > 0:
            yield (
                f"keep_epochs keeps the models of whole epochs, and max_steps={config.max_steps} ends wherever it "
                "ends; set max_steps=-1 to go by num_train_epochs, or keep_epochs=false"
            )
        elif config.num_train_epochs != int(config.num_train_epochs):
            yield (
                f"keep_epochs keeps the models of whole epochs, and num_train_epochs={config.num_train_epochs:g} "
                "breaks the last one off; set a whole number, or keep_epochs to false"
            )
    if config.save_strategy == "epoch" and not _is_default(config, "save_steps"):
        yield (
            f"save_strategy=epoch saves no step that save_steps={config.save_steps} names; "
            "leave save_steps out, or set save_strategy to steps"
        )
    yield from _about_the_rate(config)


def _beside_a_schedule(config: TrainConfig) -> Iterator[str]:
    """What a size_schedule decides by itself."""
    chosen = f"size_schedule={config.size_schedule}"
    for name in ("max_steps", "num_train_epochs", "gradient_accumulation_steps"):
        if not _is_default(config, name):
            own = f"{name}={getattr(config, name)}"
            default = TrainConfig.model_fields[name].default
            yield f"{chosen} decides rows a step and steps, as does {own}; set {name}={default}, or size_schedule=null"
    if config.packing:
        yield f"{chosen} counts rows, and packing joins them to sequences; set packing to false, or leave it out"
    if config.keep_epochs:
        yield f"{chosen} goes by steps, which end inside an epoch; set keep_epochs to false, or leave it out"


_RATE_SETTINGS = {"polynomial": {"lr_end", "power"}, "cosine_with_min_lr": {"min_lr_rate"}}


def _about_the_rate(config: TrainConfig) -> Iterator[str]:
    """The learning rate's course, and the optimizer that follows it."""
    schedule, settings = config.lr_scheduler_type, config.lr_scheduler_kwargs
    named = f"lr_scheduler_type={schedule}"
    if schedule == "constant" and config.warmup_ratio > 0:
        yield f"{named} ignores warmup_ratio; name constant_with_warmup, or set warmup_ratio to 0"
    for key in settings.model_dump(exclude_none=True):
        if key not in _RATE_SETTINGS.get(schedule, ()):
            owner = next(name for name, keys in _RATE_SETTINGS.items() if key in keys)
            yield f"lr_scheduler_kwargs.{key} belongs to {owner}, and {named}; leave it out, or name {owner}"
    # transformers ends a polynomial at 1e-7 where nothing is said.
    end = 1e-7 if settings.lr_end is None else settings.lr_end
    if schedule == "polynomial" and end >= config.learning_rate:
        yield (
            f"{named} falls to lr_scheduler_kwargs.lr_end={end:g}, which learning_rate={config.learning_rate:g} is not "
            "above; lower lr_end, or raise learning_rate"
        )
    if schedule == "cosine_with_min_lr" and settings.min_lr_rate is None:
        yield f"{named} needs lr_scheduler_kwargs.min_lr_rate, the share of learning_rate it ends at; or name cosine"
    if config.optim == "adafactor" and not _is_default(config, "adam_beta2"):
        yield f"optim=adafactor has no adam_beta2 ({config.adam_beta2:g}); leave it out, or name an AdamW"


def _about_sharding(config: TrainConfig, model: ModelConfig) -> Iterator[str]:
    """What DeepSpeed cannot share out."""
    if config.deepspeed is None:
        return
    engine = f"deepspeed={config.deepspeed}"
    if config.deepspeed == "zero3" and config.optim.startswith("paged_"):
        yield (
            f"{engine} gives each process its share of the optimizer states and moves it, and optim={config.optim} "
            f"moves them too; set optim to {config.optim.removeprefix('paged_').replace('_32bit', '_torch')}"
        )
    if config.optim == "adafactor":
        yield (
            f"{engine} cuts weights into flat shards, which have no rows and columns for optim=adafactor to factor; "
            "set optim to adamw_torch or adamw_8bit, or deepspeed to null"
        )
    if config.deepspeed == "zero3" and model.quantisation == "int8":
        yield (
            f"{engine} would shard nothing: model.quantisation=int8 keeps all weights on each process; "
            "set model.quantisation to nf4, or deepspeed to zero2"
        )
    if model.dtype != "float32" and model.quantisation_storage not in ("uint8", model.dtype):
        yield (
            f"{engine} casts all that is held as a floating type to model.dtype={model.dtype}, packed weights in "
            f"model.quantisation_storage={model.quantisation_storage} too; set it to {model.dtype} or uint8"
        )


def _is_default(config: TrainConfig, name: str) -> bool:
    return bool(getattr(config, name) == TrainConfig.model_fields[name].default)
