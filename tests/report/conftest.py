"""A run folder written by hand."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from selfalign.core.identity import file_digest
from selfalign.core.locations import commit, files_in
from selfalign.core.records import Outcome, Record
from selfalign.core.store import Manifest, Store
from selfalign.core.tables import to_parquet
from selfalign.report.run import RunView


class Run:
    """Steps in the order in which they were added."""

    def __init__(self, root: Path) -> None:
        self.store, self.steps = Store(root), []
        self._write()

    def add(
        self,
        name: str,
        *,
        arm: str | None = None,
        state: str = "done",
        metrics: Mapping[str, Any] | None = None,
        ledger: Mapping[str, Any] | None = None,
        rows: Sequence[Outcome] = (),
        record: type[Record] | None = None,
        files: Mapping[str, str] | None = None,
        stop: str | None = None,
    ) -> Path:
        """Its artifact's folder."""
        artifact = self.store.artifact(name.split("@")[0], f"{len(self.steps):016x}")
        if record is not None:
            commit(artifact.shard(0), to_parquet(rows, record))
        for file, text in (files or {}).items():
            commit(artifact.files / file, text.encode())
        if state == "done":
            counts = {"sources": 3, "in": 3, "kept": 3, "rejected": {}, "quarantined": {}, **(ledger or {})}
            made = {file: file_digest(artifact.folder / file) for file in files_in(artifact.folder)}
            artifact.finish(
                Manifest(
                    name, artifact.identity, "f" * 64, {}, made, counts, metrics or {}, stop, tokens=7, seconds=1.5
                )
            )
        step = {"name": name, "arm": arm, "artifact": artifact.name, "state": state, "message": None}
        self.steps.append(step)
        self._write()
        return artifact.folder

    def view(self) -> RunView:
        """As a reader finds it."""
        return RunView.open(self.store.root)

    def _write(self) -> None:
        self.store.root.mkdir(exist_ok=True)
        (self.store.root / "run.json").write_text(json.dumps({"steps": self.steps}))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run")


@pytest.fixture
def measured() -> Callable[..., dict[str, Any]]:
    """An evaluation's metrics."""

    def make(share: float | None, loss: float = 2.0, **more: Any) -> dict[str, Any]:
        exact = None if share is None else {"share": share, "ci": [share - 0.1, share + 0.1], "n": 9}
        held_out = {"nats_per_token": loss, "ci": [loss - 0.1, loss + 0.1], "n": 9}
        return {"held_out": held_out, "exact_match": exact, "against_base": None, **more}

    return make
