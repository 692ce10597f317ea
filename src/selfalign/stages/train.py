"""Train the backward or the forward model on composed rows."""

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

from pydantic import Field, JsonValue, PositiveInt, model_validator

from selfalign.core.errors import GateError
from selfalign.core.ledger import Ledger
from selfalign.core.records import Example
from selfalign.core.stage import BuildStage, Built, Context, Log, Place, Settings
from selfalign.engines.config import ModelConfig
from selfalign.engines.open import release
from selfalign.stages.compose import ComposeConfig
from selfalign.training.config import TrainConfig


class BackwardConfig(TrainConfig):
    """The backward model p(instruction | response)."""


class ForwardConfig(TrainConfig, ComposeConfig):
    """The forward models M0, M1, …: always trained from the base."""

    seed_max_steps: PositiveInt | None = Field(None, description="max_steps of M0, which sees the seed alone")
    match_exposure: str | None = Field(None, description="show each row as often as this arm does, in more steps")

    @model_validator(mode="after")
    def _steps_once(self) -> "ForwardConfig":
        for name in ("seed_max_steps", "match_exposure"):
            if self.size_schedule is not None and (value := getattr(self, name)) is not None:
                raise ValueError(
                    f"size_schedule={self.size_schedule} decides the steps of each model, and so does {name}={value}; "
                    "set size_schedule to null, or leave it out"
                )
        return self

    def training(self, k: int) -> TrainConfig:
        """The hyper-parameters of M_k alone."""
        config = TrainConfig(**self.model_dump(include=set(TrainConfig.model_fields)))
        if k == 0 and self.seed_max_steps is not None:
            # M0 goes by steps, which end inside an epoch.
            return config.model_copy(update={"max_steps": self.seed_max_steps, "keep_epochs": False})
        return config


@dataclass(frozen=True)
class Train(BuildStage):
    """Rows → a model folder, or an adapter's. With an input `match`, each row is seen as often as there."""

    name: ClassVar[str] = "train"
    version: ClassVar[int] = 2
    seeded: ClassVar[bool] = True
    config: TrainConfig
    model: ModelConfig

    def settings(self) -> Settings:
        # Slots are the engine's: fewer of them, after it ran out of memory, must not retrain the model.
        loading: JsonValue = {key: value for key, value in self.model.loading().items() if key != "slots"}
        # When it saves and logs decides no weight, nor does it what is kept from forward to backward or made again.
        quiet = {"save_strategy", "save_steps", "logging_steps", "gradient_checkpointing"}
        return {"training": self.config.model_dump(mode="json", exclude=quiet), "engine": loading}

    @property
    def processes(self) -> int | None:
        """Ranks of their own where there are several, or where DeepSpeed wants to be launched."""
        alone = self.config.num_processes == 1 and self.config.deepspeed is None
        return None if alone else self.config.num_processes

    def build(self, context: Context, place: Place, log: Log) -> Built:
        from selfalign.training.checkpoints import Checkpoints
        from selfalign.training.sft import train

        # The card holds one model: the engine that generated or rated gives way.
        release()
        examples = list(context.rows("rows", Example))
        if not examples:
            raise GateError("no row is left to train on; `selfalign status` says where they were dropped")
        config = self.config
        if "match" in context.inputs and config.max_steps > 0:
            there = len(context.rows("match", Example))
            config = config.model_copy(update={"max_steps": round(config.max_steps * len(examples) / there)})
        seed = context.seed if config.seed is None else config.seed
        checkpoints = Checkpoints(place.kept, place.identity, place.lease)
        trained = train(examples, self.model, config, place.draft, seed, log, checkpoints)
        rows, too_long = int(trained.metrics["rows"]), int(trained.metrics["too_long"])
        ledger = Ledger(len(examples), len(examples), rows, Counter({"too_long": too_long} if too_long else {}))
        return Built(trained.content, ledger, dict(trained.metrics), int(trained.metrics["tokens"]))
