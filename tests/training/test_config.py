from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from selfalign.core.errors import UsageError
from selfalign.engines.config import ModelConfig
from selfalign.recipe import load
from selfalign.stages.train import ForwardConfig
from selfalign.training.config import LrSchedulerKwargs, TrainConfig, refuse_contradictions

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


@dataclass(frozen=True)
class Clash:
    """Settings that cannot be met together, what the message must name, and a change that it advises."""

    train: dict[str, Any]
    named: tuple[str, ...]
    cure: dict[str, Any]
    model: dict[str, Any] = field(default_factory=dict)
    model_cure: dict[str, Any] = field(default_factory=dict)


QLORA = {"lora_r": 8}
NF4 = {"quantisation": "nf4"}
CLASHES = [
    Clash({}, ("model.quantisation=nf4", "lora_r"), {"lora_r": 8}, NF4),
    Clash({}, ("model.quantisation=int8", "lora_r"), {}, {"quantisation": "int8"}, {"quantisation": None}),
    Clash(
        {**QLORA, "target_modules": ("q_proj", "lm_head")}, ("target_modules", "lm_head"), {"target_modules": ("q",)}
    ),
    Clash(
        {},
        ("model.double_quantisation=false", "model.quantisation=null"),
        {},
        {"double_quantisation": False},
        {"double_quantisation": True},
    ),
    Clash(
        QLORA,
        ("model.quantisation_storage=bfloat16", "model.quantisation=int8"),
        {},
        {"quantisation": "int8", "quantisation_storage": "bfloat16"},
        {"quantisation": "nf4"},
    ),
    Clash({"max_steps": 0}, ("max_steps=0", "num_train_epochs"), {"max_steps": -1}),
    Clash({"packing": True, "group_by_length": True}, ("packing", "group_by_length"), {"packing": False}),
    Clash(
        {"lr_scheduler_type": "constant", "warmup_ratio": 0.1},
        ("constant", "warmup_ratio"),
        {"lr_scheduler_type": "constant_with_warmup"},
    ),
    Clash(
        {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"lr_end": 1e-6}},
        ("lr_scheduler_kwargs.lr_end", "lr_scheduler_type=cosine", "polynomial"),
        {"lr_scheduler_type": "polynomial"},
    ),
    Clash(
        {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"power": 2}},
        ("lr_scheduler_kwargs.power", "lr_scheduler_type=constant"),
        {"lr_scheduler_kwargs": {}},
    ),
    Clash(
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
        ("lr_scheduler_kwargs.min_lr_rate", "cosine_with_min_lr"),
        {"lr_scheduler_type": "cosine_with_min_lr"},
    ),
    Clash(
        {"lr_scheduler_type": "cosine_with_min_lr"},
        ("lr_scheduler_type=cosine_with_min_lr", "lr_scheduler_kwargs.min_lr_rate"),
        {"lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
    ),
    Clash(
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1e-5}},
        ("lr_scheduler_kwargs.lr_end=1e-05", "learning_rate=1e-05"),
        {"learning_rate": 2e-5},
    ),
    Clash({"optim": "adafactor", "adam_beta2": 0.95}, ("adafactor", "adam_beta2"), {"optim": "adamw_torch"}),
    Clash({"keep_epochs": True, "max_steps": 9}, ("keep_epochs", "max_steps=9"), {"max_steps": -1}),
    Clash(
        {"keep_epochs": True, "num_train_epochs": 1.5}, ("keep_epochs", "num_train_epochs=1.5"), {"num_train_epochs": 2}
    ),
    Clash(
        {"save_strategy": "epoch", "save_steps": 5},
        ("save_strategy=epoch", "save_steps=5"),
        {"save_strategy": "steps"},
    ),
    Clash({"size_schedule": "humpback", "max_steps": 5}, ("size_schedule", "max_steps=5"), {"size_schedule": None}),
    Clash(
        {"size_schedule": "humpback", "num_train_epochs": 2},
        ("size_schedule", "num_train_epochs=2"),
        {"num_train_epochs": 1},
    ),
    Clash(
        {"size_schedule": "humpback", "gradient_accumulation_steps": 4},
        ("size_schedule", "gradient_accumulation_steps=4"),
        {"gradient_accumulation_steps": 1},
    ),
    Clash({"size_schedule": "humpback", "packing": True}, ("size_schedule", "packing"), {"packing": False}),
    Clash({"size_schedule": "humpback", "keep_epochs": True}, ("size_schedule", "keep_epochs"), {"keep_epochs": False}),
    Clash(
        {"deepspeed": "zero3", "optim": "paged_adamw_8bit"},
        ("deepspeed=zero3", "optim=paged_adamw_8bit", "set optim to adamw_8bit"),
        {"optim": "adamw_8bit"},
    ),
    Clash(
        {"deepspeed": "zero3", "optim": "paged_adamw_32bit"},
        ("deepspeed=zero3", "optim=paged_adamw_32bit", "set optim to adamw_torch"),
        {"optim": "adamw_torch"},
    ),
    Clash({"deepspeed": "zero2", "optim": "adafactor"}, ("deepspeed=zero2", "optim=adafactor"), {"deepspeed": None}),
    Clash(
        {**QLORA, "deepspeed": "zero3"},
        ("deepspeed=zero3", "model.quantisation=int8", "zero2"),
        {"deepspeed": "zero2"},
        {"quantisation": "int8"},
    ),
    Clash(
        {**QLORA, "deepspeed": "zero2"},
        ("deepspeed=zero2", "model.dtype=bfloat16", "model.quantisation_storage=float32"),
        {},
        {**NF4, "quantisation_storage": "float32"},
        {"quantisation_storage": "uint8"},
    ),
]


@pytest.mark.parametrize("clash", CLASHES, ids=lambda clash: " + ".join(clash.named[:2]))
def test_settings_that_contradict_each_other_are_refused_by_name_with_what_to_set(clash: Clash) -> None:
    model = ModelConfig(path="nowhere", **clash.model)
    with pytest.raises(UsageError, match="forward: ") as caught:
        refuse_contradictions(TrainConfig(**clash.train), model, "forward")
    for name in clash.named:
        assert name in str(caught.value)
    cured = TrainConfig(**{**clash.train, **clash.cure})
    refuse_contradictions(cured, ModelConfig(path="nowhere", **{**clash.model, **clash.model_cure}))


@pytest.mark.parametrize("other", [{"seed_max_steps": 5}, {"match_exposure": "main"}], ids=str)
def test_a_size_schedule_leaves_no_steps_to_be_set_for_a_model(other: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=f"size_schedule=humpback.*{next(iter(other))}"):
        ForwardConfig(size_schedule="humpback", **other)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_no_shipped_recipe_contradicts_itself_and_no_arm_of_one(path: Path) -> None:
    loaded = load(path)
    for recipe in (loaded.recipe, *loaded.arms.values()):
        refuse_contradictions(recipe.backward, recipe.model)
        for k in range(recipe.rounds + 1):
            refuse_contradictions(recipe.forward.training(k), recipe.model)


@pytest.mark.parametrize(
    ("train", "model"),
    [
        # Each tried with DeepSpeed 0.19 on two processes: same loss as without, weights sharded, resumed to the bit.
        ({"deepspeed": "zero3", "optim": "adamw_8bit"}, {}),
        ({"deepspeed": "zero2", "optim": "paged_adamw_8bit"}, {}),
        ({**QLORA, "deepspeed": "zero2"}, {"quantisation": "int8"}),
        ({**QLORA, "deepspeed": "zero3"}, NF4),
        ({**QLORA, "deepspeed": "zero3"}, {**NF4, "quantisation_storage": "bfloat16"}),
        # Without DeepSpeed the storage type is never cast, and all weights are trained in float32 under autocast.
        (QLORA, {**NF4, "quantisation_storage": "float32"}),
        ({"packing": True, "deepspeed": "zero3"}, {"dtype": "float16"}),
    ],
)
def test_what_can_be_met_is_not_refused(train: dict[str, Any], model: dict[str, Any]) -> None:
    refuse_contradictions(TrainConfig(**train), ModelConfig(path="nowhere", **model))


def test_a_warm_up_over_the_whole_run_is_no_share_of_it() -> None:
    with pytest.raises(ValidationError):
        TrainConfig(warmup_ratio=1.0)


def test_a_configuration_can_be_hashed_by_content() -> None:
    one = TrainConfig(lr_scheduler_kwargs=LrSchedulerKwargs(lr_end=9e-6))
    assert hash(one) == hash(TrainConfig(lr_scheduler_kwargs=LrSchedulerKwargs(lr_end=9e-6)))
