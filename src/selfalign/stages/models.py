"""Which model a step talks to: the recipe's base, a fully trained one, or the base with an adapter."""

from pathlib import Path

from selfalign.core.protocols import Engine
from selfalign.core.stage import Context, External
from selfalign.engines.config import ModelConfig


def model_at(model: ModelConfig, context: Context, role: str = "model") -> ModelConfig:
    """`model` as the input `role` provides it: what a step trained in full brings its own template along."""
    if isinstance(context.inputs[role], External):
        return model
    return model.model_copy(update={"path": str(context.path(role)), "revision": None, "chat_template": None})


def open_model(model: ModelConfig, context: Context) -> tuple[Engine, Path | None]:
    """The engine for the inputs `model` and, where there is one, `adapter`; and that adapter's folder."""
    from selfalign.engines.open import open_engine

    adapter = context.path("adapter") if "adapter" in context.inputs else None
    return open_engine(model_at(model, context)), adapter


def identity_of(context: Context) -> str:
    """Identity of the model that a step talks to."""
    return context.identity("adapter" if "adapter" in context.inputs else "model")
