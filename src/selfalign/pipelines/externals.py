"""Pin what lies outside the run: files and models by digest, Hub names by commit."""

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from pydantic import JsonValue

from selfalign.core.errors import UsageError
from selfalign.core.hub import explained, hub_errors
from selfalign.core.identity import digest, file_digest
from selfalign.core.records import SourcePart
from selfalign.core.stage import External
from selfalign.data.archives import codec_of
from selfalign.data.config import FormatName, SourceConfig
from selfalign.data.readers import kind_of
from selfalign.data.sources import pin_key, resolve
from selfalign.engines.adapters import refuse_adapter
from selfalign.engines.config import ModelConfig, has_accelerator, on_this_machine, template_text

_logger = logging.getLogger(__name__)


@dataclass
class Externals:
    """Looks things up once. `pinned` maps Hub names to commits and is kept in the run; `digests` saves reading
    files again that have not changed since (by path, size and times): a model's, and what a source's hold. `has_gpus`
    says whether models are loaded on GPUs; None: if this machine has one."""

    pinned: dict[str, str] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    has_gpus: bool | None = None
    _told: set[str] = field(default_factory=set)
    _found: dict[tuple[str, str | None, FormatName | None], External] = field(default_factory=dict)

    def source(self, config: SourceConfig, setting: str) -> External:
        """The rows of a source, in the format that it names or has."""
        return self._listed(config.path, config.revision, f"{setting}.path", config.format)

    def rows(self, path: str, setting: str) -> External:
        """Rows that a stage reads by itself, whatever their fields are."""
        return self._listed(path, None, setting, "document")

    def file(self, path: str, setting: str) -> External:
        """A file that a stage reads whole."""
        found = self.rows(path, setting)
        files = {row.path: row.sha256 for row in found.rows if isinstance(row, SourcePart)}
        if len(files) != 1:
            raise UsageError(f"{setting}: {path} holds {len(files)} files; name one")
        return External(*files.popitem(), found.shards)

    def _listed(self, path: str, revision: str | None, setting: str, format: FormatName | None) -> External:
        # Every arm asks for the same sources.
        key = (path, revision, format)
        if key not in self._found:
            self._found[key] = self._list(path, revision, setting, format)
        return self._found[key]

    def _list(self, path: str, revision: str | None, setting: str, format: FormatName | None) -> External:
        found = resolve(path, Path.cwd(), revision, self.pinned, setting=setting, format=format, listed=self.digests)
        if found.commit is not None:
            self.pinned[pin_key(path, revision)] = found.commit
        # How parts share shards counts too: what was read of one division must not be completed by another.
        shards: list[JsonValue] = [[_known_by(part) for part in shard] for shard in found.shards]
        return External(path, digest(shards), found.shards)

    def model(self, config: ModelConfig, setting: str) -> tuple[ModelConfig, External]:
        """The model as it will be loaded, at a pinned commit, and its digest."""
        resolved = on_this_machine(config, self.has_gpus)
        if resolved.dtype != config.dtype and config.path not in self._told:
            self._told.add(config.path)
            elsewhere = "no accelerator here" if self.has_gpus is None else "resources gives no worker a GPU"
            why = "this GPU has no bfloat16" if self.has_gpus is None and has_accelerator() else elsewhere
            _logger.info("%s: %s is loaded in %s, not %s", why, config.path, resolved.dtype, config.dtype)
        config = resolved
        if config.chat_template is not None:
            # By its text, so that a file that changes meanwhile, or is not there on a worker, does no harm.
            config = config.model_copy(update={"chat_template": template_text(config.chat_template)})
        path = Path(config.path).expanduser()
        if path.exists():
            config = config.model_copy(update={"path": str(path.resolve()), "revision": None})
            refuse_adapter(config, setting)
            return config, External(config.path, self._model_digest(path.resolve()))
        if config.path.startswith((".", "/", "~")) or config.path.count("/") != 1:
            raise UsageError(f"{setting}: no model at {config.path}; name a folder, or a model on the Hub (org/name)")
        key = f"model:{config.path}" + (f"@{config.revision}" if config.revision else "")
        commit = self.pinned.get(key) or _commit(config, setting)
        self.pinned[key] = commit
        return config.model_copy(update={"revision": commit}), External(config.path, f"{config.path}@{commit}")

    def _model_digest(self, path: Path) -> str:
        if path.is_file():
            return self._digest(path)
        files = sorted(p for p in path.iterdir() if p.is_file() and p.suffix not in (".md", ".bin", ".pt", ".pth"))
        return digest({p.name: self._digest(p) for p in files})

    def _digest(self, path: Path) -> str:
        stat = path.stat()
        key = f"{path}:{stat.st_size}:{stat.st_mtime_ns}"
        if key not in self.digests:
            self.digests[key] = file_digest(path)
        return self.digests[key]


def _known_by(part: SourcePart) -> JsonValue:
    """What tells a part from others: its bytes, and all that decides how they are read."""
    path = PurePath(part.path)
    return [part.id, part.sha256, part.rows, part.format, kind_of(path), codec_of(path)]


def _commit(config: ModelConfig, setting: str) -> str:
    from huggingface_hub import HfApi

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        found: str = api.resolve_revision(config.path, repo_type="model", revision=config.revision).resolved
    except hub_errors() as error:
        raise explained(config.path, error, setting) from error
    return found
