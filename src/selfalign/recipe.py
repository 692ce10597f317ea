"""A recipe: the sections' configurations as one document, and its arms."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, JsonValue, PositiveInt, model_validator

from selfalign.core import yaml_config
from selfalign.core.frozen import Frozen
from selfalign.core.stage import STALL_MINUTES, Resources, WholeStage
from selfalign.engines.config import ModelConfig
from selfalign.stages.augment import AugmentConfig
from selfalign.stages.curate.config import CurateConfig
from selfalign.stages.evaluate import EvaluateConfig
from selfalign.stages.prepare.config import PrepareConfig
from selfalign.stages.train import BackwardConfig, ForwardConfig

SECTIONS = ("prepare", "backward", "augment", "curate", "forward", "evaluate")


class ResourcesConfig(Frozen):
    """What each section's workers get, and how long one may hang. The one section that identity leaves out."""

    stall_minutes: float = Field(
        STALL_MINUTES, gt=0, le=100_000, description="a batch may take so long, or twice the longest before"
    )

    prepare: Resources = Resources()
    backward: Resources = Resources()
    augment: Resources = Resources()
    curate: Resources = Resources()
    forward: Resources = Resources()
    evaluate: Resources = Resources()


class Recipe(Frozen):
    """The whole truth of a run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(0, ge=0, lt=2**32)
    model: ModelConfig
    prepare: PrepareConfig
    backward: BackwardConfig = BackwardConfig()
    augment: AugmentConfig = AugmentConfig()
    curate: CurateConfig = CurateConfig()
    forward: ForwardConfig = ForwardConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    rounds: PositiveInt = 1
    shard_rows: PositiveInt = Field(
        WholeStage.shard_rows, description="rows a shard of what one writer makes, and of the maps that read it"
    )
    arms: Mapping[str, Mapping[str, JsonValue]] | None = Field(None, description="name: overrides of the keys above")
    resources: ResourcesConfig = ResourcesConfig()

    @model_validator(mode="after")
    def _arm_names(self) -> "Recipe":
        for name in self.arms or {}:
            if name in ("main", "base") or re.fullmatch(r"M\d+", name):
                raise ValueError(f"arms: {name} means something already in the results; give the arm another name")
        return self


@dataclass(frozen=True)
class Loaded:
    """A recipe and its arms, resolved. `arms` holds a whole recipe a name, with the arm's overrides applied."""

    recipe: Recipe
    arms: Mapping[str, Recipe]


def load(path: Path, overrides: Sequence[str] = ()) -> Loaded:
    """Read a recipe with overrides. Raises RecipeError that names file, line, key and the nearest valid key."""
    document = yaml_config.override(yaml_config.read(path), overrides)
    recipe = yaml_config.validate(document, Recipe)
    arms = {}
    for name, settings in (recipe.arms or {}).items():
        # An arm shows an effect in its first round, unless it says otherwise.
        first = yaml_config.apply(document, {"rounds": 1})
        arms[name] = yaml_config.validate(yaml_config.apply(first, settings, at=("arms", name)), Recipe)
    return Loaded(recipe, arms)
