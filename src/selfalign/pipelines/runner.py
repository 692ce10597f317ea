"""Run a list of steps: order them, reuse what is there, run the rest, prove the ledger, obey gates and stops."""

import importlib.metadata
import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, Protocol

from pydantic import JsonValue

from selfalign.core import preemption
from selfalign.core.errors import (
    GateError,
    InternalError,
    LeaseHeldError,
    PreemptedError,
    SelfalignError,
    StorageError,
    UsageError,
)
from selfalign.core.identity import code_digest, file_digest
from selfalign.core.lease import Lease, lease, presence
from selfalign.core.ledger import Ledger, total
from selfalign.core.protocols import Backend, BuildJob, MapJob
from selfalign.core.records import Record, SourcePart
from selfalign.core.shards import ShardReport, input_rows, shard_ledger
from selfalign.core.stage import (
    BuildStage,
    Context,
    External,
    MapStage,
    Place,
    Rows,
    ShardSource,
    Stage,
    Step,
    WholeStage,
)
from selfalign.core.store import (
    Artifact,
    Manifest,
    Store,
    check_inputs,
    commit,
    commit_folder,
    content_digest,
    replace,
)
from selfalign.core.tables import ledger_of, to_parquet

State = Literal["done", "running", "waiting", "skipped", "failed"]
# Libraries that may decide bytes.
VERSIONS = (
    *("selfalign", "torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "pyarrow"),
    *("accelerate", "deepspeed", "liger_kernel", "flash_attn", "numpy", "selectolax", "py3langid"),
)


class Listener(Protocol):
    """Who is told how a run goes on. Units are rows for maps; `total` is None where it is unknown."""

    def step_started(self, step: Step, total: int | None) -> None: ...

    def shard_done(self, step: Step, report: ShardReport) -> None: ...

    def step_done(self, step: Step, manifest: Manifest, reused: bool) -> None: ...

    def logged(self, step: Step, line: Mapping[str, float]) -> None: ...

    def note(self, text: str) -> None: ...


class Silent:
    """A listener for programs and tests."""

    def step_started(self, step: Step, total: int | None) -> None:
        """Nothing."""

    def shard_done(self, step: Step, report: ShardReport) -> None:
        """Nothing."""

    def step_done(self, step: Step, manifest: Manifest, reused: bool) -> None:
        """Nothing."""

    def logged(self, step: Step, line: Mapping[str, float]) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""


def in_order(steps: Sequence[Step]) -> list[Step]:
    """Every step after those it needs; gates as early as their inputs allow, so that they fail before time is spent."""
    ordered: dict[str, Step] = {}

    def visit(step: Step) -> None:
        if step.key not in ordered:
            for parent in step.parents():
                visit(parent)
            ordered[step.key] = step

    gates = [step for step in steps if type(step.stage).check is not Stage.check]
    # The fewer builds a gate waits for, the earlier: one that needs no training comes before any training.
    for step in [*sorted(gates, key=lambda gate: len(_builds(gate) - {gate.identity})), *steps]:
        visit(step)
    return list(ordered.values())


def _builds(step: Step) -> set[str]:
    """The builds that must be done before a step."""
    own = {step.identity} if isinstance(step.stage, BuildStage) else set()
    return own.union(*(_builds(parent) for parent in step.parents()))


@dataclass
class Runner:
    """One run of `steps` in a run folder."""

    steps: Sequence[Step]
    store: Store
    backend: Backend
    listener: Listener
    wait: bool = True

    def __post_init__(self) -> None:
        self.steps = in_order(self.steps)
        self.states: dict[str, State] = {step.key: "waiting" for step in self.steps}
        self.messages: dict[str, str] = {}
        self._verified: set[str] = set()

    def run(self, wanted: Callable[[Step], bool] = lambda step: True) -> None:
        """Run the wanted steps. Raises what a failing step raises, after writing it into run.json."""
        with presence(self.store.root / "drivers", self.listener.note):
            self.look()
            self._save()
            for step in self.steps:
                if wanted(step) and self.states[step.key] in ("waiting", "failed"):
                    self._advance(step)
                else:
                    self._settle(step)
            self._save()

    def look(self) -> Mapping[str, State]:
        """What is done, failed or behind a stop already. Runs nothing."""
        for step in self.steps:
            self._settle(step)
        return self.states

    def artifact(self, step: Step) -> Artifact:
        """Where the step's output lies, or will."""
        return self.store.artifact(step.stage.name, step.identity)

    def _settle(self, step: Step) -> None:
        """Mark a step that need not run: complete and good, or behind a stop."""
        if self.states[step.key] == "skipped" or self._stopped(step):
            self.states[step.key] = "skipped"
            return
        manifest = self.artifact(step).manifest()
        ready = all(self.states[p.key] == "done" for p in step.parents())
        if manifest is None or not ready:
            return
        check_inputs(manifest, self._input_digests(step))
        self._warn_versions(step, manifest)
        try:
            step.stage.check(manifest)
        except GateError as error:
            # Told as an error when its turn comes, so that a failed gate reads the same on the second run.
            self.states[step.key], self.messages[step.key] = "failed", str(error)
            return
        self.states[step.key] = "done"

    def _stopped(self, step: Step) -> bool:
        for parent in step.parents():
            if self.states.get(parent.key) == "skipped":
                return True
            manifest = self.artifact(parent).manifest()
            if manifest is not None and manifest.stop:
                self.messages[step.key] = f"{parent.name} stopped the rounds: {manifest.stop}"
                return True
        return False

    def _advance(self, step: Step) -> None:
        if self._stopped(step):
            self.states[step.key] = "skipped"
            return
        missing = [p for p in step.parents() if self.states[p.key] != "done"]
        if missing:
            section, k = missing[0].section, missing[0].round
            at = "" if k is None else f" --round {k}"
            self.messages[step.key] = f"needs {missing[0].key}: run it first (--only {section}{at}, or without --only)"
            raise UsageError(f"{step.name} {self.messages[step.key]}")
        self.states[step.key] = "running"
        self._save()
        try:
            reused = self.artifact(step).manifest() is not None
            manifest = self.artifact(step).manifest() or self._execute(step)
            check_inputs(manifest, self._input_digests(step))
            step.stage.check(manifest)
        except SelfalignError as error:
            # Asked to end, a step is no failure; it may even be done.
            ended: State = "waiting" if self.artifact(step).manifest() is None else "done"
            self.states[step.key] = ended if isinstance(error, PreemptedError) else "failed"
            self.messages[step.key] = str(error)
            self._save()
            raise
        self.states[step.key] = "done"
        self._save()
        self.listener.step_done(step, manifest, reused)

    def _execute(self, step: Step) -> Manifest:
        context = Context(step.stage.name, step.seed, self._inputs(step))
        for source in context.inputs.values():
            if isinstance(source, External):
                _check_unchanged(source)
            if isinstance(source, Artifact) and source.name not in self._verified:
                source.verify()
                self._verified.add(source.name)
        artifact = self.artifact(step)
        artifact.folder.mkdir(parents=True, exist_ok=True)
        _end_line(artifact.folder / "metrics.jsonl")
        match step.stage:
            case MapStage() as stage:
                return self._map(step, stage, context, artifact)
            case WholeStage() as stage:
                return self._whole(step, stage, context, artifact)
            case BuildStage() as stage:
                return self._build(step, stage, context, artifact)
        raise InternalError(f"{step.name}: no such kind of stage")

    def _map(self, step: Step, stage: MapStage, context: Context, artifact: Artifact) -> Manifest:
        main = context.inputs["rows"]
        sources: tuple[ShardSource, ...] = main.shards if isinstance(main, External) else tuple(main.shards())
        todo = tuple(n for n in range(len(sources)) if not artifact.shard(n).exists())
        self.listener.step_started(step, None if isinstance(main, External) else _rows_in(context.manifest("rows")))
        ledgers: dict[int, Ledger] = {}
        for number in set(range(len(sources))) - set(todo):
            ledgers[number] = shard_ledger(stage, input_rows(stage, sources[number]), artifact, number)
            self.listener.shard_done(step, ShardReport(number, ledgers[number]))

        def done(report: ShardReport) -> None:
            ledgers[report.number] = report.ledger
            self._measure(artifact, {"shard": report.number, "tokens": report.tokens, "seconds": report.seconds})
            self.listener.shard_done(step, report)

        if todo:
            self.backend.map(MapJob(stage, context, artifact, sources, todo, step.resources), done)
        ledger = total(ledgers[number] for number in range(len(sources)))
        return self._finish(step, artifact, ledger, [p.name for p in artifact.shards()])

    def _whole(self, step: Step, stage: WholeStage, context: Context, artifact: Artifact) -> Manifest:
        started = time.monotonic()
        self.listener.step_started(step, None)
        rows: Rows[Record] = context.rows("rows", stage.record) if "rows" in step.inputs else ()
        outcomes, seen = iter(stage.run(rows, context)), set[int]()
        ledgers: list[Ledger] = []
        # One shard at a time is held. A stage without any row has one empty shard.
        while (part := list(islice(outcomes, stage.shard_rows))) or not ledgers:
            for outcome in part:
                # Their hashes, because there may be many.
                if hash(outcome.id) in seen:
                    raise InternalError(f"{step.name}: the id {outcome.id!r} came out twice")
                seen.add(hash(outcome.id))
            path = artifact.shard(len(ledgers))
            commit(path, to_parquet(part, stage.output))
            ledgers.append(ledger_of(path))
        ledger = total(ledgers)
        ledger.sources, ledger.in_ = len(rows), stage.units(rows, context)
        self._measure(artifact, {"seconds": time.monotonic() - started})
        return self._finish(step, artifact, ledger, [artifact.shard(n).name for n in range(len(ledgers))])

    def _build(self, step: Step, stage: BuildStage, context: Context, artifact: Artifact) -> Manifest:
        path = artifact.folder / "lease.json"
        with preemption.delivered(), lease(path, self.wait, self.listener.note) as held:
            if (manifest := artifact.manifest()) is None:
                # What a dead builder left: drafts, or files whose manifest it never wrote.
                for leftover in [*artifact.folder.glob("draft-*"), artifact.files]:
                    shutil.rmtree(leftover, ignore_errors=True)
                manifest = self._build_under(held, step, stage, context, artifact)
            shutil.rmtree(artifact.kept, ignore_errors=True)
            return manifest

    def _build_under(
        self, held: Lease, step: Step, stage: BuildStage, context: Context, artifact: Artifact
    ) -> Manifest:
        started = time.monotonic()
        self.listener.step_started(step, None)

        def log(line: Mapping[str, float]) -> None:
            self._measure(artifact, line)
            self.listener.logged(step, line)

        draft = artifact.folder / f"draft-{held.owner.token}"
        draft.mkdir()
        place = Place(draft, artifact.kept, artifact.identity, held)
        try:
            built = self.backend.build(BuildJob(stage, context, place, step.resources), log)
        except SelfalignError:
            # What it took so far, since another attempt goes on from there.
            self._measure(artifact, {"tokens": 0, "seconds": time.monotonic() - started})
            raise
        preemption.defer(looks=False)
        held.check()
        if not commit_folder(draft, artifact.files):
            raise LeaseHeldError(f"{artifact.name}: somebody else took over and committed it; run again to use it")
        self._measure(artifact, {"tokens": built.tokens, "seconds": time.monotonic() - started})
        names = sorted(p.relative_to(artifact.folder).as_posix() for p in artifact.files.rglob("*") if p.is_file())
        return self._finish(
            step,
            artifact,
            built.ledger,
            names,
            content=[f"files/{name}" for name in built.content],
            metrics=built.metrics,
            stop=built.stop,
        )

    def _finish(
        self,
        step: Step,
        artifact: Artifact,
        ledger: Ledger,
        names: Iterable[str],
        content: Sequence[str] | None = None,
        metrics: Mapping[str, JsonValue] | None = None,
        stop: str | None = None,
    ) -> Manifest:
        names = list(names)
        ledger.check(step.name)
        lines = _lines(artifact.folder / "metrics.jsonl")
        return artifact.finish(
            Manifest(
                stage=step.stage.name,
                identity=artifact.identity,
                sha256=content_digest(artifact.folder, names if content is None else content),
                inputs=self._input_digests(step),
                files={name: file_digest(artifact.folder / name) for name in names},
                ledger=ledger.to_json(),
                metrics=metrics or {},
                stop=stop,
                tokens=int(sum(line.get("tokens", 0) for line in lines if "seconds" in line)),
                seconds=round(sum(line.get("seconds", 0) for line in lines), 3),
                code=code_digest(),
                versions=_versions(),
            )
        )

    def _inputs(self, step: Step) -> dict[str, Artifact | External]:
        return {
            role: source if isinstance(source, External) else self.artifact(source)
            for role, source in step.inputs.items()
        }

    def _input_digests(self, step: Step) -> dict[str, str]:
        digests = {}
        for role, source in self._inputs(step).items():
            if isinstance(source, External):
                digests[role] = source.digest
            elif (manifest := source.manifest()) is not None:
                digests[role] = manifest.sha256
        return digests

    def _measure(self, artifact: Artifact, line: Mapping[str, float]) -> None:
        with (artifact.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(dict(line)) + "\n")

    def _warn_versions(self, step: Step, manifest: Manifest) -> None:
        now = _versions()
        changed = {k: (v, now.get(k)) for k, v in manifest.versions.items() if k != "selfalign" and now.get(k) != v}
        if changed:
            told = ", ".join(f"{k} {then} (now {new})" for k, (then, new) in changed.items())
            self.listener.note(f"{step.key} is reused; it was made with {told}")

    def _save(self) -> None:
        steps = [
            {
                "name": step.name,
                "arm": step.arm,
                "artifact": self.artifact(step).name,
                "state": self.states[step.key],
                "message": self.messages.get(step.key),
            }
            for step in self.steps
        ]
        replace(self.store.root / "run.json", json.dumps({"steps": steps}, indent=1).encode())


def _check_unchanged(source: External) -> None:
    for path, sha256 in {(row.path, row.sha256) for row in source.rows if isinstance(row, SourcePart)}:
        if file_digest(Path(path)) != sha256:
            raise StorageError(f"{path} has changed since this run began; run again to read it anew")


def _rows_in(manifest: Manifest | None) -> int:
    kept = manifest.ledger["kept"] if manifest else 0
    return kept if isinstance(kept, int) else 0


def _end_line(path: Path) -> None:
    """What is measured next must not be lost with the last, torn word of a process that was killed."""
    if path.exists() and not path.read_bytes().endswith(b"\n"):
        with path.open("a") as file:
            file.write("\n")


def _lines(path: Path) -> list[dict[str, float]]:
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        # A torn line is the last word of a process that was killed while measuring.
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def _versions() -> dict[str, str]:
    found = {}
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
