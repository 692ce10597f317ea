"""`selfalign gc`: remove from a run folder what no step of it names, and what dead writers left behind."""

import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from selfalign.core.errors import LeaseHeldError, StorageError, UsageError
from selfalign.core.lease import anyone_present
from selfalign.core.locations import Location, read, scratch
from selfalign.core.store import Artifact

_logger = logging.getLogger(__name__)

# Only what we name ourselves is ever removed: a user's own files may lie anywhere in the folder.
_ARTIFACT = re.compile(r"[a-z_]+(\.[a-z_]+)?-[0-9a-f]{16}")
_DRAFT = re.compile(r"\.[\w.-]+\.(json|parquet|html)\.[0-9a-f]{12}")
_GOING = re.compile(r"\.[\w.-]+\.gone\.[0-9a-f]{12}")
_JOURNAL = re.compile(r"journal-(\d{5,})(\.jsonl?)?")
_LEASE = re.compile(r"lease(-\d{6,})?\.json")
_PART = re.compile(r"manifest\.json|metrics\.jsonl|shard-\d{5,}\.parquet|files|kept|draft-[0-9a-f-]+")
_OBJECTS_STAY = (
    "%s: its objects stay: a folder of them cannot be set aside whole, and the next run might count on half of it. "
    "Nobody needs artifacts that run.json does not name, kept/ beside a manifest.json, and drivers/ when nobody works "
    "on the run. A lifecycle rule by age would take what runs need; one that aborts incomplete uploads is safe"
)


@dataclass(frozen=True)
class Garbage:
    """Something to remove: its size in bytes, and why nobody needs it."""

    path: Path
    size: int
    why: str


def collect(root: Location, dry_run: bool = False) -> Iterator[Garbage]:
    """What no step of the run needs, each removed before it is yielded unless `dry_run`.

    Of a run in an object store that is what this machine has of it, and the objects stay. No symbolic link is followed.
    Stopped at any moment, the next call goes on. Raises UsageError where there is no run, LeaseHeldError while somebody
    works on it.
    """
    if isinstance(root, Path):
        # Its name may be a link, which is how people put runs on another disk.
        root = root.resolve()
    named = _named(root)
    _check_alone(root)
    place = scratch(root)
    if (place / "artifacts").is_symlink():
        raise UsageError(f"{place / 'artifacts'} is a link; gc follows none, so that it removes nothing elsewhere")
    if not isinstance(root, Path):
        _logger.warning(_OBJECTS_STAY, root)
    for garbage in _found(root, named) if isinstance(root, Path) else _here(root, place / "artifacts"):
        if not dry_run:
            # Again for each: somebody may have begun since, or begun and ended.
            _check_alone(root)
            if isinstance(root, Path) and garbage.path.name in _named(root):
                continue
            _remove(root, garbage.path)
        yield garbage


def _named(root: Location) -> frozenset[str]:
    """The artifacts that the run's steps name."""
    path = root / "run.json"
    try:
        named = frozenset(str(step["artifact"]) for step in json.loads(read(path))["steps"])
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{root} holds no run (no readable run.json), so nothing in it is known to be ours") from error
    if not named:
        raise UsageError(f"{path} names no step, so that nothing can be told from what is needed; run the recipe first")
    return named


def _check_alone(root: Location) -> None:
    if anyone_present(root / "drivers"):
        raise LeaseHeldError(f"somebody works on {root} (see {root / 'drivers'}); run gc again when it has ended")


def _found(root: Path, named: frozenset[str]) -> Iterator[Garbage]:
    for folder in (root, root / "drivers", root / "artifacts"):
        yield from _drafts(folder)
    for path in _entries(root / "drivers"):
        # No driver is alive.
        if path.suffix == ".json" and not path.name.startswith(".") and path.is_file():
            yield _garbage(path, "a driver that has died")
    for folder in _entries(root / "artifacts"):
        if not _ARTIFACT.fullmatch(folder.name) or not folder.is_dir():
            continue
        if anyone_present(folder):
            # A build's lease, held from another host that runs no driver here.
            continue
        if folder.name in named:
            yield from _within(folder)
        elif strange := [path.name for path in folder.iterdir() if not _is_ours(path.name)]:
            _logger.warning("%s stays, though no step names it: %s in it is not ours", folder, strange[0])
        else:
            yield _garbage(folder, "an artifact that no step names")


def _here(root: Location, folder: Path) -> Iterator[Garbage]:
    """What this machine has of a run in an object store."""
    yield from _drafts(folder)
    for path in _entries(folder):
        # A build's lease, held by a worker whose driver has died.
        if _ARTIFACT.fullmatch(path.name) and not anyone_present(root / "artifacts" / path.name):
            yield _garbage(path, "this machine's copies and drafts of an artifact")


def _within(folder: Path) -> Iterator[Garbage]:
    """What can go of an artifact that stays."""
    yield from _drafts(folder)
    artifact = Artifact(folder, folder.name.rpartition("-")[2])
    shards = {path.name for path in artifact.shards()}
    for path in _entries(folder):
        journal = _JOURNAL.fullmatch(path.name)
        if journal and artifact.shard(int(journal[1])).name in shards:
            yield _garbage(path, "a journal of a shard that is complete")
        elif path.is_dir() and path.name.startswith("draft-"):
            yield _garbage(path, "a build that was not finished")
        elif path == artifact.kept and path.is_dir() and (folder / "manifest.json").exists():
            yield _garbage(path, "checkpoints of a build that is complete")
        elif path == artifact.files and path.is_dir() and not (folder / "manifest.json").exists():
            yield _garbage(path, "a build whose manifest was never written")
        elif _LEASE.fullmatch(path.name) and path.is_file():
            yield _garbage(path, "a builder that has died")


def _is_ours(name: str) -> bool:
    return any(pattern.fullmatch(name) for pattern in (_PART, _JOURNAL, _LEASE, _DRAFT, _GOING))


def _drafts(folder: Path) -> Iterator[Garbage]:
    for path in _entries(folder):
        if _DRAFT.fullmatch(path.name) and path.is_file():
            yield _garbage(path, "a file that was not finished")
        elif _GOING.fullmatch(path.name) and path.is_dir():
            yield _garbage(path, "a folder whose removal was not finished")


def _entries(folder: Path) -> list[Path]:
    """What lies in a folder, as it is now. Links are no part of it, and a link to a folder holds nothing."""
    if folder.is_symlink() or not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if not path.is_symlink())


def _garbage(path: Path, why: str) -> Garbage:
    inside = [Path(top, name) for top, _, names in os.walk(path) for name in names]
    return Garbage(path, sum(file.lstat().st_size for file in inside or [path] if not file.is_dir()), why)


def _remove(root: Location, path: Path) -> None:
    """Remove a file, or a folder with what it holds; a link inside it goes, what it leads to stays."""
    try:
        if path.is_dir():
            # Under its own name it is there whole or not at all, whoever begins while it goes.
            shutil.rmtree(path if _GOING.fullmatch(path.name) else _set_aside(root, path))
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"cannot remove {path}: {error.strerror}; what was removed so far is gone") from error


def _set_aside(root: Location, path: Path) -> Path:
    """Give a folder a name that nobody looks for."""
    going = path.with_name(f".{path.name}.gone.{uuid.uuid4().hex[:12]}")
    path.rename(going)
    try:
        _check_alone(root)
    except LeaseHeldError:
        # Who began before the new name may have seen the old one, and counts on it.
        with suppress(OSError):
            going.rename(path)
        raise
    return going
