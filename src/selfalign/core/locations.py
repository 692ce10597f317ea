"""Where a run folder may lie: a path, or a URI of an object store. What is done to both, and how it differs.

In both, a name is committed once and never replaced (`commit`), and readers see whole files. An object store has no
folders and no renames: what needs a local file works in `scratch`, and is sent up when it is done.
"""

import errno
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from selfalign.core.errors import SelfalignError, StorageError, StoreAwayError, UsageError
from selfalign.core.identity import digest, file_digest

if TYPE_CHECKING:
    from upath import UPath

    Location: TypeAlias = Path | UPath
    """A path of this machine, or one in an object store, which has the same methods."""
else:
    # The library is loaded for a run folder that needs it.
    Location = Path

# Who raises what an object store, or the way to it, does wrong.
_CLIENTS = ("botocore.", "aiobotocore.", "aiohttp.", "fsspec.")
# By their names: the client's library is loaded for a run folder that needs it.
_ON_THE_WAY = {"HTTPClientError", "ConnectionError", "IncompleteReadError", "ChecksumError", "FlexibleChecksumError"}
_ON_THE_WAY |= {"CredentialRetrievalError", "MetadataRetrievalError"}
# What a store says, as if the request were wrong, of one that it did not get whole.
_BROKEN_OFF = {"RequestTimeout", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch"}
_CONFLICTS = 5
# Copies of files in object stores that this process has compared with their digests.
_compared: set[Path] = set()


def located(name: str) -> Location:
    """The location that a user names: a path, or `s3://bucket/folder`. Raises UsageError for what cannot be used."""
    scheme, separator, rest = name.partition("://")
    if not separator:
        return Path(name)
    if scheme == "file":
        return Path(rest)
    if scheme != "s3":
        raise UsageError(f"{name}: name a folder, or s3://BUCKET/FOLDER; nothing is committed safely to {scheme}://")
    try:
        from selfalign.core.objects import ObjectPath
    except ImportError as error:
        raise UsageError(f"{name} needs the extra `s3`: {error}; pip install -e '.[s3]' in the checkout") from error
    if not rest.partition("/")[0]:
        raise UsageError(f"{name} names no bucket: s3://BUCKET/FOLDER")
    # Others write there too, so that what was listed before says nothing.
    location = ObjectPath(name, use_listings_cache=False)
    try:
        with reachable():
            location.fs.connect()
    except ValueError as error:
        raise UsageError(f"{name}: {error} (AWS_ENDPOINT_URL, AWS_MAX_ATTEMPTS, or the profile's)") from error
    return location


@contextmanager
def reachable() -> Iterator[None]:
    """Tell an object store that cannot be reached as StoreAwayError, and what it refuses for good as UsageError."""
    try:
        yield
    except SelfalignError:
        raise
    except Exception as error:
        # Some come as they are, some as the cause of an OSError.
        cause = next((each for each in (error, error.__cause__) if type(each).__module__.startswith(_CLIENTS)), None)
        if cause is not None and _is_refused(cause):
            raise UsageError(
                f"the object store refuses: {error}; see that the bucket is there, and that AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY (or AWS_PROFILE), AWS_DEFAULT_REGION and AWS_ENDPOINT_URL are the right ones, "
                "with leave to list, read, write and delete"
            ) from error
        if cause is None or isinstance(error, (FileNotFoundError, FileExistsError)):
            raise
        raise StoreAwayError(f"the object store cannot be reached: {error}; run again when it is back") from error


def _status(error: BaseException | None) -> int:
    """The HTTP status that a store answered, 0 where there was no answer."""
    response: Any = getattr(error, "response", None)
    return response["ResponseMetadata"]["HTTPStatusCode"] if isinstance(response, dict) else 0


def will_pass(error: Any) -> bool:
    """Whether a client's error may be gone when it tries again."""
    if status := _status(error):
        return status in (429, 500, 502, 503, 504) or error.response["Error"]["Code"] in _BROKEN_OFF
    kinds = {kind.__name__ for kind in type(error).__mro__}
    # What else the client says by itself is about its settings: no keys, no such profile, an impossible bucket.
    return "BotoCoreError" not in kinds or bool(kinds & _ON_THE_WAY)


def _is_refused(error: Any) -> bool:
    """Whether a client's error stays until the user has changed something."""
    if will_pass(error):
        return False
    status = _status(error)
    return not status or error.response["Error"]["Code"] == "NoSuchBucket" or status in (301, 400, 401, 403, 501)


@contextmanager
def explained(path: Location) -> Iterator[None]:
    """Tell what goes wrong in writing `path` as StorageError, and what an object store does as `reachable` tells it."""
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
            return _put(
                lambda: path.fs.pipe_file(path.path, data, mode="create"),
                # A store may have written, before an answer was lost, what it then says was there already.
                lambda: read(path) == data,
            )
    with _drafted(path, data) as draft:
        try:
            # A link, unlike a rename, never replaces what is there.
            os.link(draft, path)
        except FileExistsError:
            # NFS, asked twice because an answer was lost, may say this of the link that it made (link(2)).
            if draft.stat().st_nlink != 2:
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


def _put(put: Callable[[], object], is_mine: Callable[[], bool]) -> bool:
    """Write an object unless there is one; then say whether that one is one's own."""
    conflicts = 0
    while True:
        try:
            put()
            return True
        except OSError as error:
            status = _status(error.__cause__)
            # The client knows only the words that AWS has for a name that is taken, not those of others.
            if isinstance(error, FileExistsError) or status == 412:
                # Who committed it may have removed it since.
                with suppress(FileNotFoundError):
                    return is_mine()
                return False
            conflicts += 1
            # Somebody is writing or deleting it this moment.
            if status != 409 or conflicts == _CONFLICTS:
                raise
        time.sleep(0.1 * 2**conflicts)


def _sent(draft: Path, final: "UPath") -> bool:
    with explained(final):
        files = sorted(p for p in draft.rglob("*") if p.is_file())
        won = all(_send(path, final / path.relative_to(draft).as_posix()) for path in files)
        shutil.rmtree(draft)
    return won


def _send(path: Path, to: "UPath") -> bool:
    return _put(
        lambda: to.fs.put_file(str(path), to.path, mode="create"),
        # See `commit`.
        lambda: file_digest(to) == file_digest(path),
    )


def check_commits(folder: Location) -> None:
    """Raise UsageError for an object store that writes over what is there: of two drivers the last would win."""
    if isinstance(folder, Path):
        return
    path = folder / f".commits-{uuid.uuid4().hex}"
    commit(path, b"first")
    replaced = commit(path, b"second")
    remove(path)
    if replaced:
        raise UsageError(
            f"the object store of {folder} ignores the condition of a write (If-None-Match), by which the first commit "
            "of a name wins; use a store that knows it, or a folder"
        )


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

    A copy stays where it is, for whoever wants the same files, and is compared once by each process that does. Raises
    StorageError where the run's own files are not what they were.
    """
    if isinstance(folder, Path):
        return folder
    key = digest({**files})[:16]
    copy = scratch(folder) / key
    if _is_whole(copy, files):
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
        if commit_folder(draft, copy):
            _compared.add(copy)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return copy


def _is_whole(copy: Path, files: Mapping[str, str]) -> bool:
    # Temporary folders are tidied, file by file.
    if set(files_in(copy)) != set(files):
        return False
    # Another process may remove one that is damaged.
    with suppress(FileNotFoundError):
        if copy in _compared or all(file_digest(copy / name) == sha256 for name, sha256 in files.items()):
            _compared.add(copy)
            return True
    return False


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
