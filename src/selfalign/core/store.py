"""The run folder: artifacts that are complete when their manifest is there, and committed once.

```
run.json  recipe.json  artifacts/<stage>-<identity>/{shard-00000.parquet … | files/}  metrics.jsonl  manifest.json
                       while a build is under way: lease-000001.json  draft-<token>-…/  kept/ (checkpoints)
```

It lies on a file system or in an object store (`core.locations`). There metrics come in several files, and what is not
committed yet lies in this machine's scratch folder.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pydantic import JsonValue, TypeAdapter

from selfalign.core.errors import InternalError, MismatchError, StorageError
from selfalign.core.identity import digest, file_digest
from selfalign.core.ledger import Ledger
from selfalign.core.locations import Location, commit, entries, fetched, reachable, read, scratch
from selfalign.core.tables import Shard, another


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

    folder: Location
    identity: str

    @property
    def files(self) -> Location:
        """Where a build's files lie."""
        return self.folder / "files"

    def local_files(self) -> Path:
        """A build's files on this machine, where models can be loaded from them."""
        if isinstance(self.folder, Path):
            return self.folder / "files"
        manifest = self.manifest()
        if manifest is None:
            raise StorageError(f"{self.folder} has no manifest any more; run again to rebuild it")
        return fetched(self.files, {n.removeprefix("files/"): sha256 for n, sha256 in manifest.files.items()})

    @property
    def kept(self) -> Location:
        """What a build keeps for the case that it is ended early."""
        return self.folder / "kept"

    def draft(self, token: str) -> Path:
        """Where a build writes on this machine, before its files are committed."""
        return scratch(self.folder) / f"draft-{token}"

    @property
    def name(self) -> str:
        """`<stage>-<identity>`."""
        return self.folder.name

    def shard(self, number: int) -> Location:
        """The one name of a shard."""
        return self.folder / f"shard-{number:05d}.parquet"

    def shards(self) -> list[Location]:
        """The shards that are committed, in order."""
        return sorted(entries(self.folder, "shard-*.parquet"), key=lambda path: _by_number(path.name))

    def committed(self) -> list[Shard]:
        """The shards that the manifest names, in order. Raises InternalError while the artifact is incomplete."""
        manifest = self.complete()
        names = sorted((name for name in manifest.files if not name.startswith("files/")), key=_by_number)
        return [Shard(self.folder / name, manifest.files[name]) for name in names]

    def complete(self) -> Manifest:
        """The manifest. Raises InternalError while the artifact is incomplete."""
        if (manifest := self.manifest()) is None:
            raise InternalError(f"{self.name} is read before it is complete")
        return manifest

    def manifest(self) -> Manifest | None:
        """The manifest, or None while the artifact is incomplete."""
        path = self.folder / "manifest.json"
        try:
            return Manifest(**json.loads(read(path)))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise StorageError(f"{path} is damaged ({error}); delete its folder and run again") from error

    def verify_files(self) -> None:
        """Compare a build's files with the manifest. Raises StorageError naming the first that differs.

        Shards are compared by whoever reads them.
        """
        manifest = self.manifest()
        for name, sha256 in sorted(manifest.files.items()) if manifest else ():
            if name.startswith("files/") and _digest_if_there(self.folder / name) != sha256:
                raise another(self.folder / name, self.folder)

    def finish(self, manifest: Manifest) -> Manifest:
        """Make the artifact visible. Of two writers the first wins, and its manifest is returned."""
        # The manifest goes last: its existence is what makes the rest count.
        commit(self.folder / "manifest.json", json.dumps(asdict(manifest), indent=1).encode())
        return self.manifest() or manifest


@dataclass(frozen=True)
class Store:
    """A run folder."""

    root: Location

    def artifact(self, stage: str, identity: str) -> Artifact:
        """The artifact of that identity, whether or not it is there yet."""
        return Artifact(self.root / "artifacts" / f"{stage}-{identity}", identity)


def _by_number(name: str) -> tuple[int, str]:
    # Beyond 99,999 the numbers of shards are longer.
    return len(name), name


@reachable()
def _digest_if_there(path: Location) -> str | None:
    try:
        return file_digest(path)
    except (FileNotFoundError, IsADirectoryError):
        return None


def content_digest(files: Mapping[str, str], names: Sequence[str]) -> str:
    """SHA-256 over the named files' digests, as `files` has them: an artifact's content."""
    return digest({name: files[name] for name in names})


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
