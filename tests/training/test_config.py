from typing import Any

import pytest
from pydantic import ValidationError

from selfalign.core.errors import UsageError
from selfalign.engines.config import ModelConfig
from selfalign.training.config import LrSchedulerKwargs, TrainConfig, refuse_contradictions


@pytest.mark.parametrize(
    ("settings", "quantisation", "named"),
    [
        ({}, "nf4", "lora_r"),
        ({}, "int8", "lora_r"),
        ({"packing": True, "group_by_length": True}, None, "group_by_length"),
        ({"lr_scheduler_type": "constant", "warmup_ratio": 0.1}, None, "constant_with_warmup"),
        ({"max_steps": 0}, None, "max_steps"),
        ({"lora_r": 8, "target_modules": ("q_proj", "lm_head")}, None, "lm_head"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_by_name(
    settings: dict[str, Any], quantisation: Any, named: str
) -> None:
    model = ModelConfig(path="nowhere", quantisation=quantisation)
    with pytest.raises(UsageError, match=named):
        refuse_contradictions(TrainConfig(**settings), model)


def test_the_recipes_of_the_seed_systems_contradict_nothing() -> None:
    refuse_contradictions(
        TrainConfig(lora_r=32, lora_dropout=0.1, warmup_ratio=0.1), ModelConfig(path="x", quantisation="nf4")
    )
    refuse_contradictions(TrainConfig(packing=True), ModelConfig(path="x"))
    refuse_contradictions(TrainConfig(lora_r=64, group_by_length=True), ModelConfig(path="x", quantisation="nf4"))


def test_a_warm_up_over_the_whole_run_is_no_share_of_it() -> None:
    with pytest.raises(ValidationError):
        TrainConfig(warmup_ratio=1.0)


def test_a_configuration_can_be_hashed_by_content() -> None:
    one = TrainConfig(lr_scheduler_kwargs=LrSchedulerKwargs(lr_end=9e-6))
    assert hash(one) == hash(TrainConfig(lr_scheduler_kwargs=LrSchedulerKwargs(lr_end=9e-6)))
