"""One invocation on one run folder: the recipe resolved, its steps made, and run or planned."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from selfalign.core.errors import UsageError
from selfalign.core.protocols import Backend
from selfalign.core.stage import External, Step
from selfalign.core.store import Store, replace
from selfalign.engines.config import ModelConfig
from selfalign.engines.open import release
from selfalign.pipelines.backtranslate import steps
from selfalign.pipelines.externals import Externals
from selfalign.pipelines.runner import Listener, Runner, Silent
from selfalign.recipe import Recipe, load
from selfalign.stages.train import Train
from selfalign.training.sharding import require


class Planned(TypedDict):
    """A line of `selfalign plan`. `rows` of its main input, where that is known already."""

    name: str
    arm: str | None
    state: str
    rows: int | None


@dataclass(frozen=True)
class Session:
    """See the module."""

    root: Path
    recipe: Recipe
    steps: Sequence[Step]
    externals: Externals

    @staticmethod
    def open(path: Path, overrides: Sequence[str], root: Path | None) -> "Session":
        """Resolve a recipe against its run folder, where the Hub names that it pinned before are kept."""
        loaded = load(path, overrides)
        root = root or Path("runs") / loaded.recipe.name
        externals = Externals(_kept(root / "pinned.json"), _kept(root / "digests.json"))
        return Session(root, loaded.recipe, steps(loaded, externals), externals)

    def run(
        self, listener: Listener, backend: str | None, only: str | None, round: int | None, wait: bool = True
    ) -> None:
        """Run the wanted steps."""
        sections = sorted({step.section for step in self.steps})
        if only is not None and only not in sections:
            raise UsageError(f"--only {only}: there is no such section; this recipe has {', '.join(sections)}")
        rounds = sorted({step.round for step in self.steps if step.round is not None})
        if round is not None and round not in rounds:
            raise UsageError(f"--round {round}: this recipe has the rounds {', '.join(map(str, rounds))}")
        there = _kept_name(self.root / "recipe.json")
        if there not in (None, self.recipe.name):
            raise UsageError(f"{self.root} holds a run of the recipe {there!r}; name another folder with --run")
        self.root.mkdir(parents=True, exist_ok=True)
        replace(self.root / "recipe.json", self.recipe.model_dump_json(indent=1).encode())
        replace(self.root / "pinned.json", json.dumps(self.externals.pinned, indent=1).encode())
        replace(self.root / "digests.json", json.dumps(self.externals.digests).encode())
        chosen = _backend(backend)
        runner = Runner(self.steps, Store(self.root.resolve()), chosen, listener, wait)
        todo = [step for step in self.steps if runner.artifact(step).manifest() is None]
        if todo:
            self._check_models()
        for step in todo:
            # Told now, and not when everything before the training has been done.
            if isinstance(step.stage, Train) and step.stage.config.deepspeed is not None:
                require(step.stage.config.deepspeed)
        try:
            runner.run(lambda step: only in (None, step.section) and round in (None, step.round))
        finally:
            release()
            chosen.close()

    def plan(self) -> list[Planned]:
        """Each step with what would happen to it."""
        runner = Runner(self.steps, Store(self.root.resolve()), _backend("local"), Silent())
        states, planned = runner.look(), []
        for step in runner.steps:
            source = step.inputs.get("rows")
            rows: int | None = None
            if isinstance(source, External):
                rows = sum(getattr(row, "rows", 1) for row in source.rows)
            elif source is not None and (manifest := runner.artifact(source).manifest()) is not None:
                kept = manifest.ledger["kept"]
                rows = kept if isinstance(kept, int) else None
            state = {"done": "reused", "waiting": "to run"}.get(states[step.key], states[step.key])
            planned.append(Planned(name=step.name, arm=step.arm, state=state, rows=rows))
        return planned

    def _check_models(self) -> None:
        """Load every tokenizer: a missing model, a gated one or one without a template is told before time is spent."""
        from selfalign.engines.loading import load_tokenizer

        settings = {self.recipe.curate.rater.model: "curate.rater.model"}
        if (agreement := self.recipe.curate.agreement) is not None:
            settings.setdefault(agreement.against.rater.model, "curate.agreement.against.rater.model")
        if (judge := self.recipe.evaluate.judge) is not None:
            settings[judge.model] = "evaluate.judge.model"
        models: set[ModelConfig] = {model for s in self.steps if (model := getattr(s.stage, "model", None)) is not None}
        for model in sorted(models, key=str):
            if model.engine == "transformers":
                load_tokenizer(model, settings.get(model.path, "model.path"))


def _kept(path: Path) -> dict[str, str]:
    try:
        kept = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UsageError(f"{path} is damaged; delete it to look its entries up again") from error
    return {str(key): str(value) for key, value in kept.items()}


def _kept_name(path: Path) -> str | None:
    return json.loads(path.read_bytes())["name"] if path.exists() else None


def _backend(name: str | None) -> Backend:
    """Ray where it was asked for, or where we run under it already; this process otherwise."""
    if name == "ray" or (name is None and (os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_JOB_ID"))):
        from selfalign.backends.ray import RayBackend

        return RayBackend()
    from selfalign.backends.local import LocalBackend

    return LocalBackend()
