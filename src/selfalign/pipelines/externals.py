"""Pin what lies outside the run: files and models by digest, Hub names by commit."""

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path

from selfalign.core.errors import UsageError
from selfalign.core.hub import explained, hub_errors
from selfalign.core.identity import digest, file_digest
from selfalign.core.stage import External
from selfalign.data.config import SourceConfig
from selfalign.data.sources import pin_key, resolve
from selfalign.engines.config import ModelConfig, on_this_machine, template_text

_logger = logging.getLogger(__name__)


@dataclass
class Externals:
    """Looks things up once. `pinned` maps Hub names to commits and is kept in the run; `digests` saves reading
    model files again that have not changed since (by path, size and time)."""

    pinned: dict[str, str] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    _told: set[str] = field(default_factory=set)

    def source(self, config: SourceConfig, setting: str) -> External:
        """The files of a source, each a row."""
        found = resolve(config.path, Path.cwd(), config.revision, self.pinned, setting=f"{setting}.path")
        if found.commit is not None:
            self.pinned[pin_key(config.path, config.revision)] = found.commit
        files = [(file.id, file.sha256, file.rows) for file in found.files]
        return External(config.path, digest([list(file) for file in files]), found.files)

    def file(self, path: str, setting: str) -> External:
        """A file that a stage reads whole."""
        found = resolve(path, Path.cwd(), None, self.pinned, setting=setting)
        if found.commit is not None:
            self.pinned[pin_key(path, None)] = found.commit
        if len(found.files) != 1:
            raise UsageError(f"{setting}: {path} holds {len(found.files)} files; name one")
        return External(found.files[0].path, found.files[0].sha256, found.files)

    def model(self, config: ModelConfig, setting: str) -> tuple[ModelConfig, External]:
        """The model as it will be loaded on this machine, at a pinned commit, and its digest."""
        resolved = on_this_machine(config)
        if resolved.dtype != config.dtype and config.path not in self._told:
            self._told.add(config.path)
            _logger.info("no accelerator here: %s is loaded in %s, not %s", config.path, resolved.dtype, config.dtype)
        config = resolved
        if config.chat_template is not None:
            # By its text, so that a file that changes meanwhile, or is not there on a worker, does no harm.
            config = config.model_copy(update={"chat_template": template_text(config.chat_template)})
        path = Path(config.path).expanduser()
        if path.exists():
            config = config.model_copy(update={"path": str(path.resolve()), "revision": None})
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


def _commit(config: ModelConfig, setting: str) -> str:
    from huggingface_hub import HfApi

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        found: str = api.resolve_revision(config.path, repo_type="model", revision=config.revision).resolved
    except hub_errors() as error:
        raise explained(config.path, error, setting) from error
    return found
