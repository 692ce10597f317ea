"""The run folder: artifacts that are complete when their manifest is there, and committed once.

```
run.json  recipe.json  artifacts/<stage>-<identity>/{shard-00000.parquet … | files/}  metrics.jsonl  manifest.json
                       while a build is under way: lease.json  draft-<token>/  kept/ (checkpoints)
```
"""

import errno
import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pydantic import JsonValue, TypeAdapter

from selfalign.core.errors import MismatchError, StorageError
from selfalign.core.identity import digest, file_digest
from selfalign.core.ledger import Ledger


@dataclass(frozen=True)
class Manifest:
    """What a complete artifact says of itself. `sha256` is over its content, `inputs` over its inputs' content."""

    stage: str
    identity: str
    sha256: str
    inputs: Mapping[str, str]
    files: Mapping[str, str]
    ledger: Mapping[str, JsonValue]
    metrics: Mapping[str, JsonValue] = field(default_factory=dict)
    stop: str | None = None
    tokens: int = 0
    seconds: float = 0.0
    code: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Artifact:
    """The output of one step, complete or not."""

    folder: Path
    identity: str

    @property
    def files(self) -> Path:
        """Where a build's files lie."""
        return self.folder / "files"

    @property
    def kept(self) -> Path:
        """What a build keeps for the case that it is ended early."""
        return self.folder / "kept"

    @property
    def name(self) -> str:
        """`<stage>-<identity>`."""
        return self.folder.name

    def shard(self, number: int) -> Path:
        """The one name of a shard."""
        return self.folder / f"shard-{number:05d}.parquet"

    def shards(self) -> list[Path]:
        """The shards that are committed, in order."""
        return sorted(self.folder.glob("shard-?????.parquet"))

    def manifest(self) -> Manifest | None:
        """The manifest, or None while the artifact is incomplete."""
        path = self.folder / "manifest.json"
        try:
            return Manifest(**json.loads(path.read_bytes()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise StorageError(f"{path} is damaged ({error}); delete its folder and run again") from error

    def verify(self) -> None:
        """Compare every file with the manifest. Raises StorageError naming the first that differs."""
        manifest = self.manifest()
        for name, sha256 in (manifest.files if manifest else {}).items():
            path = self.folder / name
            if not path.is_file() or file_digest(path) != sha256:
                raise StorageError(
                    f"{path} is not what {self.name} committed (missing or changed bytes); "
                    "delete that folder and run again to rebuild it"
                )

    def finish(self, manifest: Manifest) -> Manifest:
        """Make the artifact visible. Of two writers the first wins, and its manifest is returned."""
        # The manifest goes last: its existence is what makes the rest count.
        commit(self.folder / "manifest.json", json.dumps(asdict(manifest), indent=1).encode())
        return self.manifest() or manifest


@dataclass(frozen=True)
class Store:
    """A run folder."""

    root: Path

    def artifact(self, stage: str, identity: str) -> Artifact:
        """The artifact of that identity, whether or not it is there yet."""
        return Artifact(self.root / "artifacts" / f"{stage}-{identity}", identity)


def commit(path: Path, data: bytes) -> bool:
    """Write `data` under its final name, durably and all at once. False where somebody committed that name before."""
    with _drafted(path, data) as draft:
        try:
            # A link, unlike a rename, never replaces what is there.
            os.link(draft, path)
        except FileExistsError:
            return False
        _sync(path.parent)
    return True


def commit_folder(draft: Path, final: Path) -> bool:
    """Give a written folder its final name, durably. False where somebody committed that name before."""
    with _explained(final):
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


def replace(path: Path, data: bytes) -> None:
    """Write a file that may change (run.json): readers see the old or the new one, whole."""
    with _drafted(path, data) as draft:
        os.replace(draft, path)


@contextmanager
def _drafted(path: Path, data: bytes) -> Iterator[Path]:
    """`data` in a durable file beside `path`, under a name that is gone afterwards."""
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    with _explained(path):
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


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}; what was committed so far stays") from error


def content_digest(folder: Path, names: Sequence[str]) -> str:
    """SHA-256 over the named files' digests: an artifact's content."""
    return digest({name: file_digest(folder / name) for name in names})


def check_inputs(manifest: Manifest, inputs: Mapping[str, str]) -> None:
    """Refuse a reused artifact that was made from other bytes than its inputs now hold."""
    for role, sha256 in manifest.inputs.items():
        if inputs.get(role) != sha256:
            raise MismatchError(
                f"{manifest.stage}-{manifest.identity} was made from other data than its input {role!r} holds now "
                f"(SHA-256 {sha256[:12]}… then, {(inputs.get(role) or 'none')[:12]}… now); delete that folder to "
                "make it anew"
            )


def balanced(manifest: Manifest) -> Ledger:
    """The manifest's ledger as counts."""
    counts = TypeAdapter(dict[str, int | dict[str, int]]).validate_python(manifest.ledger)
    whole = {key: value for key, value in counts.items() if isinstance(value, int)}
    parts = {key: Counter(value) for key, value in counts.items() if isinstance(value, dict)}
    noted = parts.get("noted", Counter())
    return Ledger(whole["sources"], whole["in"], whole["kept"], parts["rejected"], parts["quarantined"], noted)


def dropped(manifest: Manifest) -> str:
    """What a step dropped and why, for a gate's message."""
    ledger = balanced(manifest)
    if not ledger.in_:
        return "nothing came in: `selfalign status` says where the rows were dropped before, and why"
    told = ", ".join(f"{n} {reason}" for reason, n in (ledger.rejected + ledger.quarantined).items())
    return f"dropped here: {told or 'nothing'}"
