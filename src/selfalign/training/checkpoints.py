"""Checkpoints of a training: there whole or not at all, and used only when every byte is what was written."""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from pydantic import JsonValue

from selfalign.core.errors import MismatchError, StorageError
from selfalign.core.identity import digest, file_digest
from selfalign.core.lease import Lease
from selfalign.core.locations import Location, commit_folder, entries, fetched, files_in, read, remove, scratch

_logger = logging.getLogger(__name__)

MARKER = "complete.json"
KEEP = 2
"""How many checkpoints stay: the newest, and one for the case that the newest is damaged."""


class _Marker(TypedDict):
    """What a marker says. `epochs`: the models of epochs that were kept before. `sha256` is over the rest."""

    identity: str
    epochs: list[str]
    files: dict[str, str]
    sha256: str


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one training in `folder`, and the models that it keeps of its epochs.

    A checkpoint is a folder `step-00000100` with a marker that names the training's `identity` and every
    file with its SHA-256. Optimiser and random states are pickles: nothing is loaded that a marker does not list.
    """

    folder: Location
    identity: str
    lease: Lease

    def draft(self) -> Path:
        """A folder for what is not committed yet."""
        return scratch(self.folder) / f"draft-{self.lease.owner.token}"

    def discard(self) -> None:
        """Remove what is not committed."""
        shutil.rmtree(self.draft(), ignore_errors=True)

    def commit(self, written: Path, step: int) -> None:
        """Give the folder `written` its name, with the marker, and remove all but the newest checkpoints.

        Raises LeaseHeldError where somebody else has taken the build over.
        """
        self._commit(written, self.folder / f"step-{step:08d}")
        for old in self._steps()[:-KEEP]:
            remove(old)

    def commit_epoch(self, written: Path, epoch: int) -> None:
        """Keep the model of an epoch. What is there already, from before a checkpoint was resumed from, stays."""
        self._commit(written, self.epoch(epoch))

    def epoch(self, number: int) -> Location:
        """The folder of the model of an epoch, counted from 1."""
        return self.folder / f"epoch-{number}"

    def take_epoch(self, number: int, folder: Path) -> None:
        """Give the model of an epoch to `folder`. Raises StorageError where it is not what was written."""
        path = self.epoch(number)
        if fault := _fault(path):
            raise StorageError(f"{path}: {fault}; run again to train from the checkpoint before it")
        # Linked, not moved: whoever goes on after a kill before the artifact is complete finds it here again.
        kept = fetched(path, _digests(path))
        shutil.copytree(kept, folder, copy_function=os.link, ignore=shutil.ignore_patterns(MARKER))

    def newest(self) -> Path | None:
        """The newest checkpoint that is whole, on this machine. Torn ones are named in a warning and removed, as drafts
        are.

        Raises MismatchError for a checkpoint of another training.
        """
        for leftover in scratch(self.folder).glob("draft-*"):
            shutil.rmtree(leftover)
        for path in self._epochs():
            if fault := _fault(path):
                _logger.warning("the model %s is trained again: %s", path, fault)
                remove(path)
        for path in reversed(self._steps()):
            if fault := _fault(path) or self._lacks(path):
                _logger.warning("the checkpoint %s is skipped: %s", path, fault)
                remove(path)
                continue
            if (theirs := _marker(path)["identity"]) != self.identity:
                raise MismatchError(
                    f"{path} is a checkpoint of another training ({theirs}, this one is {self.identity}): its recipe "
                    f"or its data differ. Delete {self.folder} to begin anew"
                )
            return fetched(path, _digests(path))
        return None

    def _lacks(self, path: Location) -> str | None:
        """What was kept before this checkpoint, and is gone."""
        there = {epoch.name for epoch in self._epochs()}
        gone = [name for name in _marker(path)["epochs"] if name not in there]
        return f"{gone[0]}, which it comes after, is not there" if gone else None

    def _commit(self, written: Path, final: Location) -> None:
        files: JsonValue = {name: file_digest(written / name) for name in files_in(written)}
        epochs: JsonValue = [path.name for path in self._epochs()]
        content: dict[str, JsonValue] = {"identity": self.identity, "epochs": epochs, "files": files}
        (written / MARKER).write_text(json.dumps({**content, "sha256": digest(content)}, indent=1))
        self.lease.check()
        commit_folder(written, final)

    def _steps(self) -> list[Location]:
        return entries(self.folder, "step-????????")

    def _epochs(self) -> list[Location]:
        return entries(self.folder, "epoch-*")


@contextmanager
def storage_errors(folder: Location) -> Iterator[None]:
    """Turn what the libraries say of a full disk, each in its own way, into StorageError."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise StorageError(f"cannot write {folder}: {error}; what was committed so far stays") from error
    except RuntimeError as error:
        # torch.save has no type for it, and names the file of its writer.
        if "inline_container" not in str(error) and "file write failed" not in str(error):
            raise
        raise StorageError(f"cannot write {folder}: is the disk full? What was committed so far stays") from error


def _marker(path: Location) -> _Marker:
    content: _Marker = json.loads(read(path / MARKER))
    return content


def _digests(path: Location) -> dict[str, str]:
    """The files of a whole checkpoint, its marker too, with their SHA-256."""
    return {**_marker(path)["files"], MARKER: file_digest(path / MARKER)}


def _fault(path: Location) -> str | None:
    """What is wrong with a checkpoint; None where it is whole."""
    try:
        marker = json.loads(read(path / MARKER))
        files = marker["files"]
        if marker.pop("sha256") != digest(marker):
            return f"its {MARKER} is damaged"
        there = set(files_in(path)) - {MARKER}
        if odd := there.symmetric_difference(files):
            missing = min(odd) in files
            return f"{min(odd)} is missing" if missing else f"it holds {min(odd)}, which its {MARKER} does not list"
        damaged = next((name for name in sorted(files) if file_digest(path / name) != files[name]), None)
    except FileNotFoundError:
        return f"it has no {MARKER}, so that its writing was not finished"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"its {MARKER} is damaged"
    return None if damaged is None else f"{damaged} is not what was written"
