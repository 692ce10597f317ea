"""The one place that chooses an engine, and the one engine that a process holds."""

from selfalign.core.protocols import Engine
from selfalign.engines.config import ModelConfig

_held: tuple[ModelConfig, Engine] | None = None


def open_engine(config: ModelConfig) -> Engine:
    """The engine for `config`: the one that is held when it fits, else a new one in its place."""
    global _held
    if _held is None or _held[0] != config:
        release()
        _held = (config, _make(config))
    return _held[1]


def release() -> None:
    """Free the held model: before a build needs the memory, and at the end."""
    global _held
    if _held is not None:
        _held[1].close()
        _held = None


def _make(config: ModelConfig) -> Engine:
    match config.engine:
        case "transformers":
            from selfalign.engines.transformers import TransformersEngine

            return TransformersEngine(config)
        case "scripted":
            from selfalign.engines.scripted import ScriptedEngine

            return ScriptedEngine(config)
