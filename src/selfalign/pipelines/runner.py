"""Run a list of steps: order them, reuse what is there, run the rest, prove the ledger, obey gates and stops."""

import importlib.metadata
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, Protocol

from pydantic import JsonValue

from selfalign.core import preemption
from selfalign.core.errors import (
    GateError,
    InternalError,
    PreemptedError,
    SelfalignError,
    StorageError,
    StoreAwayError,
    UsageError,
)
from selfalign.core.identity import code_digest, file_digest
from selfalign.core.keys import Keys
from selfalign.core.lease import Lease, lease, presence
from selfalign.core.ledger import Ledger, total
from selfalign.core.locations import Location, commit, entries, reachable, remove, replace
from selfalign.core.metrics import Measurements
from selfalign.core.protocols import Backend, BuildJob, MapJob
from selfalign.core.records import Record, SourcePart
from selfalign.core.shards import ShardReport, input_rows, shard_report
from selfalign.core.stage import (
    BuildStage,
    Context,
    External,
    MapStage,
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
    content_digest,
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
        self._driver: Location | None = None

    @reachable()
    def run(self, wanted: Callable[[Step], bool] = lambda step: True) -> None:
        """Run the wanted steps. Raises what a failing step raises, after writing it into run.json."""
        with presence(self.store.root / "drivers", self.listener.note) as self._driver:
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
            self.messages[step.key] = (
                f"needs {missing[0].key}: run it first, by jobs/{section}.py{at} or --only {section}{at}, or run all "
                "without --only"
            )
            raise UsageError(f"{step.name} {self.messages[step.key]}")
        self.states[step.key] = "running"
        self._save()
        try:
            with reachable():
                reused = self.artifact(step).manifest() is not None
                manifest = self.artifact(step).manifest() or self._execute(step)
                check_inputs(manifest, self._input_digests(step))
                step.stage.check(manifest)
        except StoreAwayError:
            # It would be waited for again; that this driver is gone is seen all the same.
            raise
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
            # Shards are compared as they are read, and what lies in an object store as it is fetched.
            if isinstance(source, Artifact) and isinstance(source.files, Path) and source.name not in self._verified:
                source.verify_files()
                self._verified.add(source.name)
        with Measurements(self.artifact(step).folder) as measured:
            match step.stage:
                case MapStage() as stage:
                    return self._map(step, stage, context, measured)
                case WholeStage() as stage:
                    return self._whole(step, stage, context, measured)
                case BuildStage() as stage:
                    return self._build(step, stage, context, measured)
        raise InternalError(f"{step.name}: no such kind of stage")

    def _map(self, step: Step, stage: MapStage, context: Context, measured: Measurements) -> Manifest:
        artifact = self.artifact(step)
        main = context.inputs["rows"]
        sources: tuple[ShardSource, ...] = main.shards if isinstance(main, External) else tuple(main.committed())
        there = {path.name for path in artifact.shards()}
        todo = tuple(n for n in range(len(sources)) if artifact.shard(n).name not in there)
        rows = None if isinstance(main, External) else _rows_in(context.manifest("rows"))
        self.listener.step_started(step, rows)
        files: dict[str, str] = {}
        ledgers: list[Ledger] = []

        def count(report: ShardReport) -> None:
            files[artifact.shard(report.number).name] = report.sha256
            ledgers.append(report.ledger)
            self.listener.shard_done(step, report)

        def done(report: ShardReport) -> None:
            measured.add(
                {
                    "shard": report.number,
                    "rows": report.ledger.sources,
                    "tokens": report.tokens,
                    "seconds": report.seconds,
                }
            )
            count(report)

        for number in sorted(set(range(len(sources))) - set(todo)):
            count(shard_report(stage, input_rows(stage, sources[number]), artifact, number))
        measured.add({"shards": len(sources), "rows_there": sum(ledger.sources for ledger in ledgers)})
        if todo:
            job = MapJob(
                stage, context, artifact, sources, todo, step.resources, step.stall_minutes, driver=self._driver
            )
            self.backend.map(job, done)
        return self._finish(step, measured, total(ledgers), files)

    def _whole(self, step: Step, stage: WholeStage, context: Context, measured: Measurements) -> Manifest:
        artifact, started = self.artifact(step), time.monotonic()
        self.listener.step_started(step, None)
        rows: Rows[Record] = context.rows("rows", stage.record) if "rows" in step.inputs else ()
        outcomes, seen = iter(stage.run(rows, context)), Keys()
        ledgers: list[Ledger] = []
        files: dict[str, str] = {}
        # One shard at a time is held. A stage without any row has one empty shard.
        while (part := list(islice(outcomes, stage.shard_rows))) or not ledgers:
            for outcome in part:
                # Their hashes, because there may be many.
                if not seen.add(hash(outcome.id)):
                    raise InternalError(f"{step.name}: the id {outcome.id!r} came out twice")
            path = artifact.shard(len(ledgers))
            commit(path, to_parquet(part, stage.output))
            files[path.name] = file_digest(path)
            ledgers.append(ledger_of(path))
        ledger = total(ledgers)
        ledger.sources, ledger.in_ = len(rows), stage.units(rows, context)
        measured.add({"seconds": time.monotonic() - started})
        return self._finish(step, measured, ledger, files)

    def _build(self, step: Step, stage: BuildStage, context: Context, measured: Measurements) -> Manifest:
        artifact = self.artifact(step)
        with preemption.delivered(), lease(artifact.folder, self.wait, self.listener.note) as held:
            if (manifest := artifact.manifest()) is None:
                manifest = self._build_under(held, step, stage, context, measured)
            remove(artifact.kept)
        for path in entries(artifact.folder, "lease-*.json"):
            path.unlink(missing_ok=True)
        return manifest

    def _build_under(
        self, held: Lease, step: Step, stage: BuildStage, context: Context, measured: Measurements
    ) -> Manifest:
        started = time.monotonic()
        self.listener.step_started(step, None)

        def log(line: Mapping[str, float]) -> None:
            measured.add(line)
            self.listener.logged(step, line)

        try:
            job = BuildJob(stage, context, self.artifact(step), held, step.resources, self._driver)
            done = self.backend.build(job, log)
        except StoreAwayError:
            raise
        except SelfalignError:
            # What it took so far, since another attempt goes on from there.
            measured.add({"tokens": 0, "seconds": time.monotonic() - started})
            raise
        preemption.defer(looks=False)
        held.check()
        built = done.built
        measured.add({"tokens": built.tokens, "seconds": time.monotonic() - started})
        files = {f"files/{name}": sha256 for name, sha256 in done.files.items()}
        content = [f"files/{name}" for name in built.content]
        return self._finish(step, measured, built.ledger, files, content, built.metrics, built.stop)

    def _finish(
        self,
        step: Step,
        measured: Measurements,
        ledger: Ledger,
        files: Mapping[str, str],
        content: Sequence[str] | None = None,
        metrics: Mapping[str, JsonValue] | None = None,
        stop: str | None = None,
    ) -> Manifest:
        ledger.check(step.name)
        artifact, lines = self.artifact(step), measured.lines()
        return artifact.finish(
            Manifest(
                stage=step.stage.name,
                identity=artifact.identity,
                sha256=content_digest(files, list(files) if content is None else content),
                inputs=self._input_digests(step),
                files={name: files[name] for name in sorted(files)},
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


def _versions() -> dict[str, str]:
    found = {}
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
