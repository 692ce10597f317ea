"""One invocation on one run folder: the recipe resolved, its steps made, and run or planned."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from selfalign.core.errors import UsageError
from selfalign.core.locations import Location, check_commits, read, replace
from selfalign.core.protocols import Backend
from selfalign.core.stage import External, Step
from selfalign.core.store import Store
from selfalign.engines.config import ModelConfig
from selfalign.engines.open import release
from selfalign.pipelines.backtranslate import steps
from selfalign.pipelines.externals import Externals
from selfalign.pipelines.runner import Listener, Runner, Silent
from selfalign.recipe import SECTIONS, Recipe, load
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

    root: Location
    recipe: Recipe
    steps: Sequence[Step]
    externals: Externals

    @staticmethod
    def open(path: Path, overrides: Sequence[str], root: Location | None, backend: str | None = None) -> "Session":
        """Resolve a recipe against its run folder, where the Hub names that it pinned before are kept.

        On Ray, models are loaded by workers: as GPUs do it where `resources` gives them any, whatever this machine has.
        """
        loaded = load(path, overrides)
        root = root or Path("runs") / loaded.recipe.name
        workers = (getattr(loaded.recipe.resources, section) for section in SECTIONS)
        has_gpus = any(resources.gpus for resources in workers) if _is_ray(backend) else None
        externals = Externals(_kept(root / "pinned.json"), _kept(root / "digests.json"), has_gpus)
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
        _check_lasting(self.root)
        check_commits(self.root)
        there = _kept_name(self.root / "recipe.json")
        if there not in (None, self.recipe.name):
            raise UsageError(f"{self.root} holds a run of the recipe {there!r}; name another folder with --run")
        replace(self.root / "recipe.json", self.recipe.model_dump_json(indent=1).encode())
        replace(self.root / "pinned.json", json.dumps(self.externals.pinned, indent=1).encode())
        replace(self.root / "digests.json", json.dumps(self.externals.digests).encode())
        store = Store(_absolute(self.root))
        todo = [s for s in self.steps if store.artifact(s.stage.name, s.identity).manifest() is None]
        if todo:
            self._check_models()
        for step in todo:
            # Told now, and not when everything before the training has been done.
            if isinstance(step.stage, Train) and step.stage.config.deepspeed is not None:
                require(step.stage.config.deepspeed)
        chosen = _backend(backend)
        try:
            runner = Runner(self.steps, store, chosen, listener, wait)
            runner.run(lambda step: _is_wanted(step, only, round))
        finally:
            release()
            chosen.close()

    def plan(self) -> list[Planned]:
        """Each step with what would happen to it."""
        runner = Runner(self.steps, Store(_absolute(self.root)), _backend("local"), Silent())
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


def _is_wanted(step: Step, only: str | None, round: int | None) -> bool:
    """A round of one section includes what that section does before any, once."""
    if only is not None and step.section == only and step.round is None:
        return True
    return only in (None, step.section) and round in (None, step.round)


def _absolute(root: Location) -> Location:
    """Where workers look for it too, whatever folder they work in."""
    return root.resolve() if isinstance(root, Path) else root


def _check_lasting(root: Location) -> None:
    """Refuse a run folder in the copy that Ray makes of a job's working directory, since it goes with the cluster."""
    if isinstance(root, Path) and "runtime_resources" in root.resolve().parts:
        raise UsageError(
            f"the run folder {root} would lie in Ray's own copy of the submitted folder and be lost with it; name one "
            "that lasts and that all nodes see, as in --run /shared/runs/NAME or --run s3://BUCKET/NAME"
        )


def _kept(path: Location) -> dict[str, str]:
    try:
        kept = json.loads(read(path))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UsageError(f"{path} is damaged; delete it to look its entries up again") from error
    return {str(key): str(value) for key, value in kept.items()}


def _kept_name(path: Location) -> str | None:
    try:
        name: str = json.loads(read(path))["name"]
    except (FileNotFoundError, ValueError):
        # A torn one is written anew right away.
        return None
    return name


def _is_ray(backend: str | None) -> bool:
    """Whether Ray was asked for, or we run under it already."""
    under = bool(os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_JOB_ID"))
    return backend == "ray" or (backend is None and under)


def _backend(name: str | None) -> Backend:
    """The backend that was asked for, by default the one that we run under."""
    if _is_ray(name):
        from selfalign.backends.ray import RayBackend

        return RayBackend()
    from selfalign.backends.local import LocalBackend

    return LocalBackend()
