"""Where a run folder may lie: a path, or a URI of an object store. What is done to both, and how it differs.

In both, a name is committed once and never replaced (`commit`), and readers see whole files. An object store has no
folders and no renames: what needs a local file works in `scratch`, and is sent up when it is done.
"""

import errno
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from selfalign.core.errors import SelfalignError, ServiceError, StorageError, UsageError
from selfalign.core.identity import digest, file_digest

if TYPE_CHECKING:
    from upath import UPath

    Location: TypeAlias = Path | UPath
    """A path of this machine, or one in an object store, which has the same methods."""
else:
    # The library is loaded for a run folder that needs it.
    Location = Path

# A store that is away for a minute or two ends no run. (botocore reads both; who sets them is obeyed.)
PATIENCE = {"AWS_RETRY_MODE": "standard", "AWS_MAX_ATTEMPTS": "20"}
# Who raises what an object store, or the way to it, does wrong.
_CLIENTS = ("botocore.", "aiobotocore.", "aiohttp.", "fsspec.")


for _variable, _value in PATIENCE.items():
    # In workers, too, which get a location without asking for it.
    os.environ.setdefault(_variable, _value)


def located(name: str) -> Location:
    """The location that a user names: a path, or `s3://bucket/folder`. Raises UsageError for what cannot be used."""
    scheme, separator, rest = name.partition("://")
    if not separator:
        return Path(name)
    if scheme == "file":
        return Path(rest)
    from upath import UPath

    try:
        # Others write there too, so that what was listed before says nothing.
        location = UPath(name, use_listings_cache=False)
        _ = location.fs
    except (ImportError, ValueError) as error:
        advice = "; pip install -e '.[s3]' in the checkout" if scheme == "s3" else ""
        raise UsageError(f"{name}: {scheme}:// cannot be used here: {error}{advice}") from error
    return location


@contextmanager
def reachable() -> Iterator[None]:
    """Tell an object store that cannot be reached, or that refuses, as ServiceError."""
    try:
        yield
    except (SelfalignError, FileNotFoundError, FileExistsError, PermissionError):
        raise
    except Exception as error:
        # Some come as they are, some as the cause of an OSError.
        if not any(type(each).__module__.startswith(_CLIENTS) for each in (error, error.__cause__)):
            raise
        raise ServiceError(f"the object store cannot be reached: {error}; run again when it is back") from error


@contextmanager
def explained(path: Location) -> Iterator[None]:
    """Tell what goes wrong in writing `path` as StorageError, or ServiceError where the store is away."""
    try:
        with reachable():
            yield
    except OSError as error:
        why = error.strerror or str(error)
        raise StorageError(f"cannot write {path}: {why}; what was committed so far stays") from error


def commit(path: Location, data: bytes) -> bool:
    """Write `data` under its final name, durably and all at once. False where somebody committed that name before."""
    if not isinstance(path, Path):
        with explained(path):
            try:
                path.fs.pipe_file(path.path, data, mode="create")
            except OSError as error:
                if not _is_taken(error):
                    raise
                # A store may have written, before an answer was lost, what it then says was there already.
                return read(path) == data
            return True
    with _drafted(path, data) as draft:
        try:
            # A link, unlike a rename, never replaces what is there.
            os.link(draft, path)
        except FileExistsError:
            return False
        _sync(path.parent)
    return True


def commit_folder(draft: Path, final: Location) -> bool:
    """Give a written folder its final name, durably. False where somebody committed that name before.

    In an object store file by file, each of them once: the folder counts when something else names its files.
    """
    if not isinstance(final, Path):
        return _sent(draft, final)
    with explained(final):
        for path in (draft, *draft.rglob("*")):
            if path.is_file():
                # Some writers of weights let their user alone read them, whatever the umask says; the folder obeys it.
                path.chmod(draft.stat().st_mode & 0o666)
            _sync(path)
        try:
            os.rename(draft, final)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            shutil.rmtree(draft)
            return False
        _sync(final.parent)
    return True


def _is_taken(error: OSError) -> bool:
    """Whether a name was there already. The client knows only the words that AWS has for it, not those of others."""
    answer = getattr(error.__cause__, "response", None) or {}
    return isinstance(error, FileExistsError) or answer.get("Error", {}).get("Code") in ("PreconditionFailed", "412")


def _sent(draft: Path, final: "UPath") -> bool:
    won = True
    with explained(final):
        for path in sorted(p for p in draft.rglob("*") if p.is_file()):
            to = final / path.relative_to(draft).as_posix()
            try:
                to.fs.put_file(str(path), to.path, mode="create")
            except OSError as error:
                if not _is_taken(error):
                    raise
                # See `commit`.
                if file_digest(to) != file_digest(path):
                    won = False
                    break
        shutil.rmtree(draft)
    return won


@reachable()
def read(path: Location) -> bytes:
    """A file that may be replaced meanwhile: the bytes of one writing of it."""
    if isinstance(path, Path):
        return path.read_bytes()
    data: bytes = path.fs.cat_file(path.path)
    return data


def replace(path: Location, data: bytes) -> None:
    """Write a file that may change (run.json): readers see the old or the new one, whole."""
    if not isinstance(path, Path):
        with explained(path):
            path.fs.pipe_file(path.path, data)
        return
    with _drafted(path, data) as draft:
        os.replace(draft, path)


@reachable()
def touch(path: Location) -> None:
    """Make a file of one's own look as if it were written now."""
    if isinstance(path, Path):
        os.utime(path)
    else:
        # An object has no other time than that of its writing. Nobody else writes this one.
        path.fs.pipe_file(path.path, read(path))


@reachable()
def remove(path: Location) -> None:
    """Remove a folder with all that it holds, or what there is of it."""
    if isinstance(path, Path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(FileNotFoundError):
            path.fs.rm(path.path, recursive=True)


@reachable()
def files_in(folder: Location) -> list[str]:
    """The names of all files below a folder, relative to it, in order. None where there is no folder."""
    if isinstance(folder, Path):
        return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_symlink() or not p.is_dir())
    found: list[str] = []
    with suppress(FileNotFoundError):
        found = folder.fs.find(folder.path)
    return sorted(name.removeprefix(folder.path).strip("/") for name in found)


@reachable()
def entries(folder: Location, pattern: str) -> list[Location]:
    """What lies in a folder under names that match, in order. None where there is no folder."""
    if isinstance(folder, Path):
        return sorted(folder.glob(pattern), key=lambda path: path.name)
    found: list[str] = []
    # In one listing, because others add and remove meanwhile.
    with suppress(FileNotFoundError):
        found = folder.fs.ls(folder.path, detail=False)
    names = sorted(name.rstrip("/").rpartition("/")[2] for name in found)
    return [folder / name for name in names if fnmatchcase(name, pattern)]


def fetched(folder: Location, files: Mapping[str, str]) -> Path:
    """A folder of a run as one of this machine: itself, or a copy of `files`, each compared with its SHA-256.

    A copy stays where it is, for whoever wants the same files. Raises StorageError for one that is not what it was.
    """
    if isinstance(folder, Path):
        return folder
    key = digest({**files})[:16]
    copy = scratch(folder) / key
    # Temporary folders are tidied, file by file.
    if set(files_in(copy)) == set(files):
        return copy
    remove(copy)
    draft = copy.with_name(f".{key}.{uuid.uuid4().hex[:12]}")
    try:
        with explained(folder):
            for name, sha256 in files.items():
                (draft / name).parent.mkdir(parents=True, exist_ok=True)
                folder.fs.get_file((folder / name).path, str(draft / name))
                if file_digest(draft / name) != sha256:
                    raise StorageError(f"{folder / name} is not what was committed (changed bytes)")
        # Another process of this machine may have been quicker.
        commit_folder(draft, copy)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return copy


def scratch(folder: Location) -> Path:
    """Where this machine works on a folder of a run: the folder itself, or one of its user's, made if need be.

    It lies in SELFALIGN_SCRATCH, else in the machine's temporary folder, and within the scratch of the folder above.
    """
    if isinstance(folder, Path):
        return folder
    root = Path(os.environ.get("SELFALIGN_SCRATCH") or tempfile.gettempdir()) / f"selfalign-{os.getuid()}"
    with explained(root):
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        if root.stat().st_uid != os.getuid():
            raise UsageError(f"{root} belongs to somebody else; name another folder by SELFALIGN_SCRATCH")
        path = root / folder.path.strip("/")
        path.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def _drafted(path: Path, data: bytes) -> Iterator[Path]:
    """`data` in a durable file beside `path`, under a name that is gone afterwards."""
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with draft.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield draft
        finally:
            draft.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Make a file's bytes, or the names in a folder, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
