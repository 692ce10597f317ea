"""Read a run folder: its steps, their ledgers and metrics. Writes nothing."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

from selfalign.core.errors import UsageError
from selfalign.core.lease import anyone_present
from selfalign.core.locations import Location, read
from selfalign.core.records import Dropped, Record
from selfalign.core.store import Artifact, Manifest
from selfalign.core.tables import Shard, read_outcomes

R = TypeVar("R", bound=Record)


@dataclass(frozen=True)
class StepView:
    """A step as run.json and its artifact show it."""

    name: str
    arm: str | None
    state: str
    message: str | None
    artifact: Artifact

    @cached_property
    def manifest(self) -> Manifest | None:
        """None while it is incomplete."""
        return self.artifact.manifest()

    @property
    def finished(self) -> bool:
        """Whether it has a result, which its gate may have refused."""
        return self.manifest is not None and self.state in ("done", "failed")

    @property
    def title(self) -> str:
        """Name and arm."""
        return self.name if self.arm is None else f"{self.name} [{self.arm}]"

    def shards(self) -> list[Shard]:
        """Those that are there; where there is a manifest, those that it names."""
        if self.manifest is None:
            return [Shard(path, None) for path in self.artifact.shards()]
        return self.artifact.committed()

    def outcomes(self, record: type[R]) -> Iterator[R | Dropped]:
        """All rows, the dropped ones too."""
        for shard in self.shards():
            yield from read_outcomes(shard.path, record, shard.sha256)

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The rows of a JSONL file among its files."""
        path = self.artifact.files / name
        # A text ends its line at other characters, too.
        return [json.loads(line) for line in read(path).splitlines()] if path.exists() else []


@dataclass(frozen=True)
class RunView:
    """A run folder."""

    root: Location
    document: Mapping[str, Any]

    @staticmethod
    def open(root: Location) -> "RunView":
        """Raises UsageError where there is no run."""
        path = root / "run.json"
        try:
            return RunView(root, json.loads(read(path)))
        except (FileNotFoundError, NotADirectoryError, ValueError) as error:
            raise UsageError(
                f"{root} holds no run (no readable run.json); name a folder made by selfalign run"
            ) from error

    @cached_property
    def steps(self) -> list[StepView]:
        """In the order in which they run."""
        alive = anyone_present(self.root / "drivers")
        found = []
        for step in self.document["steps"]:
            folder = self.root / "artifacts" / step["artifact"]
            # A driver that was killed cannot say so.
            state = "waiting" if step["state"] == "running" and not alive else step["state"]
            identity = step["artifact"].rpartition("-")[2]
            view = StepView(step["name"], step["arm"], state, step["message"], Artifact(folder, identity))
            if state == "done" and view.manifest is None:
                # Its folder was deleted, as an error of ours may have advised.
                view = replace(view, state="waiting")
            found.append(view)
        return found

    def step(self, name: str, arm: str | None = None) -> StepView | None:
        """The step of that name, done or not."""
        return next((step for step in self.steps if (step.name, step.arm) == (name, arm)), None)

    def rounds(self, name: str, failed: bool = False) -> list[StepView]:
        """The main arm's steps `name@0`, `name@1`, … that are done; with `failed` those too whose gate refused them."""
        steps = [s for s in self.steps if s.name.startswith(f"{name}@") and s.arm is None]
        steps = [s for s in steps if s.state == "done" or (failed and s.finished)]
        return sorted(steps, key=lambda step: int(step.name.rpartition("@")[2]))

    @property
    def complete(self) -> bool:
        """Every step is done, or skipped because the rounds were stopped."""
        return all(step.state in ("done", "skipped") for step in self.steps)

    @property
    def final_round(self) -> int | None:
        """The last round of the main arm, or the one before where a guard found the last no better."""
        trained = [int(step.name.rpartition("@")[2]) for step in self.rounds("forward.train")]
        if not trained:
            return None
        measured = self.step(f"evaluate.forward@{trained[-1]}")
        stopped = measured is not None and measured.manifest is not None and measured.manifest.stop
        return trained[-2] if stopped and len(trained) > 1 else trained[-1]

    def final_model(self) -> Artifact | None:
        """The forward model of the final round."""
        step = self.step(f"forward.train@{self.final_round}")
        return step.artifact if step else None

    def curated(self) -> Location | None:
        """The folder of the pairs that the final model was trained on."""
        step = self.step(f"curate.select@{self.final_round}")
        return step.artifact.folder if step else None
