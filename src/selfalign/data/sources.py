"""Find the files that a recipe's `path` means: a file, a folder, a glob, or a dataset on the Hub."""

import glob
import json
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import astuple, dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from typing import TypeVar

from selfalign.core.errors import MismatchError, ServiceError, StorageError, UsageError
from selfalign.core.hub import explained, hub_errors
from selfalign.core.records import SourcePart
from selfalign.data.archives import codec_of
from selfalign.data.config import FormatName
from selfalign.data.formats import detect
from selfalign.data.readers import KINDS, LISTING, PART_BYTES, PART_ROWS, PROSE, SUFFIXES, extents, kind_of
from selfalign.data.rows import row_id, spelt

_HUB_PREFIX = "hf://datasets/"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_KINDS = f"{', '.join(KINDS[:-1])} or {KINDS[-1]}"
# What says something about the files beside it, and is no row of them. Pages are taken whatever they are called.
_ABOUT_KINDS = (".json", ".md", ".txt")
_ABOUT = ("readme", "license", "licence", "notice", "changelog", "dataset_infos", "dataset_dict")
# How long a file must have lain still before it is listed, for what was found to be kept: while its file system's clock
# stands still a change leaves no trace (git's racy entries).
_SETTLED_NS = 2_000_000_000
T = TypeVar("T")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Resolved:
    """What a path means: parts of its files, in order, and in each shard those that are read together.

    `commit` is what a Hub dataset resolved to: keep it under `pin_key`.
    """

    shards: tuple[tuple[SourcePart, ...], ...]
    commit: str | None = None

    @property
    def parts(self) -> tuple[SourcePart, ...]:
        """Those of all shards."""
        return tuple(part for shard in self.shards for part in shard)


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
    format: FormatName | None = None,
    listed: MutableMapping[str, str] | None = None,
    setting: str = "path",
    patience_s: float = 90.0,
) -> Resolved:
    """List what the files hold that `path` means, relative to `base_dir`: parts with their digests and format.

    A folder is searched throughout, but for hidden entries and texts called README or LICENSE. What is not there may be
    a dataset on the Hub: `org/name`, or `hf://datasets/org/name/pattern` for some of its files, at the commit that
    `pinned` gives for it, else at the one that `revision` has now. An outage of the Hub is waited for, up to
    `patience_s`. Where no `format` is named, each file's is told from its rows; texts and pages are documents
    always. `listed` keeps what was found by path, size and times, so that files which have not changed since are not
    read again.

    Raises UsageError where nothing is there, MismatchError where no format fits a file, StorageError where one cannot
    be read, ServiceError where the Hub cannot be reached; `setting` is the recipe's key that they name.
    """
    here = Path(os.path.abspath(base_dir / Path(path).expanduser()))
    commit = None
    if path.startswith(_HUB_PREFIX) or (not here.exists() and _HUB_NAME.fullmatch(path) and not kind_of(here)):
        files, base, commit = _from_hub(path, revision, pinned or {}, setting, patience_s)
    elif revision is not None:
        raise UsageError(f"{setting}: {path} is here, so it has no revision; take the revision out of the recipe")
    else:
        files, base = _here(here, path, setting)
    ids = ids_of([PurePath(spelt(str(file.relative_to(base)))) for file in files])
    notes = {} if listed is None else listed
    parts = (part for file, id in zip(files, ids, strict=True) for part in _parts(file, id, format, notes))
    return Resolved(tuple(_shards(parts)), commit)


def pin_key(path: str, revision: str | None) -> str:
    """The name under which the commit of a Hub dataset is kept: each of its revisions has its own."""
    name = _hub_path(path).name
    return name if revision is None else f"{name}@{revision}"


# Parts


def _parts(path: Path, id: str, format: str | None, listed: MutableMapping[str, str]) -> list[SourcePart]:
    try:
        stat = path.stat()
    except OSError as error:
        raise StorageError(f"{spelt(str(path))} cannot be read: {error.strerror}") from error
    # The time of change too, since no program can set it: a copy may keep size and time of modification.
    key = f"listed:{LISTING}:{path}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"
    if time.time_ns() - stat.st_ctime_ns < _SETTLED_NS:
        listed = {}
    if key not in listed:
        sha256, found = extents(path)
        listed[key] = json.dumps({"sha256": sha256, "extents": [astuple(extent) for extent in found]})
    known = json.loads(listed[key])

    def parts(format: str | None) -> list[SourcePart]:
        return [
            SourcePart(
                id=row_id(id, first),
                path=str(path),
                sha256=known["sha256"],
                rows=rows,
                first=first,
                offset=offset,
                size=size,
                line=line,
                format=format,
            )
            for rows, first, offset, size, line in known["extents"]
        ]

    if kind_of(path) in PROSE:
        return parts("document")
    if format is None:
        if "format" not in known:
            known["format"] = _format(parts(None))
            listed[key] = json.dumps(known)
        format = known["format"]
    return parts(format)


def _format(parts: Iterable[SourcePart]) -> str | None:
    """That of the first row that fits any, however far into the file it stands. Raises MismatchError."""
    unfitting: MismatchError | None = None
    for part in parts:
        try:
            if format := detect(part):
                return format
        except MismatchError as error:
            unfitting = unfitting or error
    if unfitting:
        raise unfitting
    return None


def _shards(parts: Iterable[SourcePart]) -> Iterator[tuple[SourcePart, ...]]:
    """Consecutive parts together, up to the size of a large one."""
    shard: list[SourcePart] = []
    rows = size = 0
    for part in parts:
        if shard and (rows + part.rows > PART_ROWS or size + part.size > PART_BYTES):
            yield tuple(shard)
            shard, rows, size = [], 0, 0
        shard.append(part)
        rows, size = rows + part.rows, size + part.size
    if shard:
        yield tuple(shard)


# Files here


def _here(here: Path, path: str, setting: str) -> tuple[list[Path], Path]:
    """The files, and the folder that their ids begin from."""
    if here.is_file():
        if not kind_of(here):
            raise UsageError(f"{setting}: {path} is not a {_KINDS} file; convert it to one of them")
        return [here], here.parent
    if here.is_dir():
        if not (found := _inside(here, path)):
            raise UsageError(f"{setting}: the folder {path} holds no {_KINDS} file; point it at one that does")
        return found, here
    if glob.has_magic(str(here)):
        found = sorted(p for p in map(Path, glob.glob(str(here), recursive=True)) if kind_of(p) and p.is_file())
        if not found:
            raise UsageError(f"{setting}: no {_KINDS} file matches {path} (looked for {here})")
        return found, Path(os.path.commonpath([p.parent for p in found]))
    raise UsageError(f"{setting}: there is no file or folder {path} (looked for {here}); correct the path")


def _inside(folder: Path, path: str) -> list[Path]:
    """The files of a folder that are read; how many are not is told."""
    shown = _visible(folder)
    found = [p for p in shown if (kind := kind_of(p)) and not (kind in _ABOUT_KINDS and _about(p))]
    if left_out := sorted(set(shown).difference(found)):
        example = spelt(str(left_out[0].relative_to(folder)))
        _log.info("%s: %d of its %d files are left out, %s among them", path, len(left_out), len(shown), example)
    return found


def _about(path: Path) -> bool:
    return path.name.lower().split(".")[0] in _ABOUT


def _visible(folder: Path) -> list[Path]:
    shown = (p for p in folder.rglob("*") if not any(part.startswith(".") for part in p.relative_to(folder).parts))
    return sorted((p for p in shown if p.is_file()), key=lambda path: path.parts)


def ids_of(paths: Iterable[PurePath]) -> list[str]:
    """An id for each file: its stem, with as much of its parent folders as tells it from the others."""
    named = [path.parts for path in paths]
    stems = [(*parts[:-1], _stem(PurePath(parts[-1]))) for parts in named]
    if len(set(stems)) < len(stems):
        # The same name with two endings.
        stems = named
    ids = [""] * len(stems)
    for length in range(1, max(map(len, stems), default=0) + 1):
        tails = ["/".join(parts[-length:]) for parts in stems]
        seen = Counter(tails)
        ids = [id or (tail if seen[tail] == 1 else "") for id, tail in zip(ids, tails, strict=True)]
    return ids


def _stem(path: PurePath) -> str:
    return PurePath(path.stem).stem if codec_of(path) else path.stem


# Datasets on the Hub


def _hub_path(path: str) -> _HubPath:
    """Raises UsageError where `path` is not a dataset's name."""
    org, _, rest = path.removeprefix(_HUB_PREFIX).partition("/")
    name, _, pattern = rest.partition("/")
    if not _HUB_NAME.fullmatch(f"{org}/{name}"):
        raise UsageError(f"{path} is not a dataset's name; write {_HUB_PREFIX}ORG/NAME or {_HUB_PREFIX}ORG/NAME/FILE")
    return _HubPath(f"{org}/{name}", pattern or None)


def _from_hub(
    path: str, revision: str | None, pinned: Mapping[str, str], setting: str, patience_s: float
) -> tuple[list[Path], Path, str]:
    """The files, the folder that their ids begin from, and the commit."""
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
            hub.name,
            repo_type="dataset",
            revision=commit,
            allow_patterns=hub.pattern or [f"*{_any_case(suffix)}" for suffix in SUFFIXES],
            ignore_patterns=None if hub.pattern else ["README.md", "*/README.md"],
        )

    commit = pinned.get(pin_key(path, revision)) or _patiently(commit_now, hub.name, setting, patience_s)
    folder = Path(_patiently(fetch, hub.name, setting, patience_s))
    if hub.pattern is None:
        found = _inside(folder, path)
    else:
        visible = (p for p in _visible(folder) if kind_of(p))
        found = [p for p in visible if fnmatchcase(p.relative_to(folder).as_posix(), hub.pattern)]
    if not found:
        raise UsageError(f"{setting}: the dataset {path} holds no such {_KINDS} file at commit {commit}")
    return found, folder, commit


def _any_case(suffix: str) -> str:
    return "".join(f"[{c}{c.upper()}]" if c.isalpha() else c for c in suffix)


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
