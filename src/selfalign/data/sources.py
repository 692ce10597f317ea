"""Find the files that a recipe's `path` means: a file, a folder, a glob, or a dataset on the Hub."""

import glob
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from typing import TypeVar

from selfalign.core.errors import ServiceError, UsageError
from selfalign.core.hub import explained, hub_errors
from selfalign.core.records import SourceFile
from selfalign.data.readers import SUFFIXES, count_rows_and_digest

_HUB_PREFIX = "hf://datasets/"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_KINDS = " or ".join(SUFFIXES)
T = TypeVar("T")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Resolved:
    """The files of a path, in order. `commit` is what a Hub dataset resolved to: keep it under `pin_key`."""

    files: tuple[SourceFile, ...]
    commit: str | None = None


@dataclass(frozen=True, slots=True)
class _HubPath:
    name: str
    pattern: str | None


def resolve(
    path: str,
    base_dir: Path,
    revision: str | None = None,
    pinned: Mapping[str, str] | None = None,
    *,
    setting: str = "path",
    patience_s: float = 90.0,
) -> Resolved:
    """List the .jsonl and .parquet files that `path` means, relative to `base_dir`, with their digests.

    A folder is searched throughout, hidden entries aside. What is not there may be a dataset on the Hub: `org/name`,
    or `hf://datasets/org/name/pattern` for some of its files, at the commit that `pinned` gives for it, else at the one
    that `revision` has now. An outage of the Hub is waited for, up to `patience_s`.

    Raises UsageError where nothing is there, ServiceError where the Hub cannot be reached; `setting` is the
    recipe's key that they name.
    """
    here = Path(os.path.abspath(base_dir / Path(path).expanduser()))
    if path.startswith(_HUB_PREFIX) or (not here.exists() and _HUB_NAME.fullmatch(path) and not _is_data(here)):
        return _from_hub(path, revision, pinned or {}, setting, patience_s)
    if revision is not None:
        raise UsageError(f"{setting}: {path} is here, so it has no revision; take the revision out of the recipe")
    return Resolved(_listed(here, path, setting))


def pin_key(path: str, revision: str | None) -> str:
    """The name under which the commit of a Hub dataset is kept: each of its revisions has its own."""
    name = _hub_path(path).name
    return name if revision is None else f"{name}@{revision}"


# Files here


def _is_data(path: PurePath) -> bool:
    return path.suffix in SUFFIXES


def _listed(here: Path, path: str, setting: str) -> tuple[SourceFile, ...]:
    if here.is_file():
        if not _is_data(here):
            raise UsageError(f"{setting}: {path} is not a {_KINDS} file; convert it to one of them")
        return _source_files([here], here.parent)
    if here.is_dir():
        if not (found := _inside(here)):
            raise UsageError(f"{setting}: the folder {path} holds no {_KINDS} file; point it at one that does")
        return _source_files(found, here)
    if glob.has_magic(str(here)):
        found = sorted(p for p in map(Path, glob.glob(str(here), recursive=True)) if _is_data(p) and p.is_file())
        if not found:
            raise UsageError(f"{setting}: no {_KINDS} file matches {path} (looked for {here})")
        return _source_files(found, Path(os.path.commonpath([p.parent for p in found])))
    raise UsageError(f"{setting}: there is no file or folder {path} (looked for {here}); correct the path")


def _inside(folder: Path) -> list[Path]:
    found = (p for p in folder.rglob("*") if _is_data(p) and p.is_file())
    return sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts))


def _source_files(paths: list[Path], base: Path) -> tuple[SourceFile, ...]:
    files = []
    for path, id in zip(paths, ids_of([p.relative_to(base) for p in paths]), strict=True):
        rows, sha256 = count_rows_and_digest(path)
        files.append(SourceFile(id=id, path=str(path), sha256=sha256, rows=rows))
    return tuple(files)


def ids_of(paths: Iterable[PurePath]) -> list[str]:
    """An id for each file: its stem, with as much of its parent folders as tells it from the others."""
    named = [path.parts for path in paths]
    stems = [(*parts[:-1], PurePath(parts[-1]).stem) for parts in named]
    if len(set(stems)) < len(stems):
        # The same name with two endings.
        stems = named
    ids = [""] * len(stems)
    for length in range(1, max(map(len, stems), default=0) + 1):
        tails = ["/".join(parts[-length:]) for parts in stems]
        seen = Counter(tails)
        ids = [id or (tail if seen[tail] == 1 else "") for id, tail in zip(ids, tails, strict=True)]
    return ids


# Datasets on the Hub


def _hub_path(path: str) -> _HubPath:
    """Raises UsageError where `path` is not a dataset's name."""
    org, _, rest = path.removeprefix(_HUB_PREFIX).partition("/")
    name, _, pattern = rest.partition("/")
    if not _HUB_NAME.fullmatch(f"{org}/{name}"):
        raise UsageError(f"{path} is not a dataset's name; write {_HUB_PREFIX}ORG/NAME or {_HUB_PREFIX}ORG/NAME/FILE")
    return _HubPath(f"{org}/{name}", pattern or None)


def _from_hub(path: str, revision: str | None, pinned: Mapping[str, str], setting: str, patience_s: float) -> Resolved:
    from huggingface_hub import HfApi

    hub = _hub_path(path)
    # Read now, not when huggingface_hub was first imported.
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))

    def commit_now() -> str:
        # Without a connection this is the commit that was last seen.
        return api.resolve_revision(hub.name, repo_type="dataset", revision=revision).resolved

    def fetch() -> str:
        # Makes no call where all of this commit is in the cache.
        return api.snapshot_download(
            hub.name, repo_type="dataset", revision=commit, allow_patterns=hub.pattern or [f"*{s}" for s in SUFFIXES]
        )

    commit = pinned.get(pin_key(path, revision)) or _patiently(commit_now, hub.name, setting, patience_s)
    folder = Path(_patiently(fetch, hub.name, setting, patience_s))
    found = [p for p in _inside(folder) if fnmatchcase(p.relative_to(folder).as_posix(), hub.pattern or "*")]
    if not found:
        raise UsageError(f"{setting}: the dataset {path} holds no such {_KINDS} file at commit {commit}")
    return Resolved(_source_files(found, folder), commit)


def _patiently(call: Callable[[], T], name: str, setting: str, patience_s: float) -> T:
    """The result of `call`, tried again through an outage of the Hub for up to `patience_s`."""
    from huggingface_hub import is_offline_mode

    deadline, pause_s = time.monotonic() + patience_s, 1.0
    while True:
        try:
            return call()
        except hub_errors() as error:
            reason = explained(name, error, setting)
            hopeless = not isinstance(reason, ServiceError) or is_offline_mode()
            if hopeless or time.monotonic() + pause_s > deadline:
                raise reason from error
        _log.warning("the Hub does not answer for %s; trying again in %.0f s", name, pause_s)
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 15.0)
