"""Which model, in which precision, run by which engine: the recipe's `model` section."""

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from selfalign.core.errors import UsageError
from selfalign.core.frozen import Frozen, RecipePath

TEMPLATES = Path(__file__).parent / "templates"


class ModelConfig(Frozen):
    """A base model and how it is loaded."""

    path: Annotated[str, RecipePath] = Field(description="a folder, or a Hub name")
    revision: str | None = Field(None, description="a commit, tag or branch of a Hub name")
    chat_template: Annotated[str | None, RecipePath("plain", "chatml")] = Field(
        None, description="a file, or one of ours: plain, chatml"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    quantisation: Literal["nf4", "int8"] | None = None
    engine: Literal["transformers", "scripted"] = "transformers"
    slots: PositiveInt = Field(16, description="sequences in one batch")
    threads: PositiveInt = Field(1, description="CPU threads; they decide the last bits of a sum")

    def loading(self) -> dict[str, str | int | None]:
        """How the model is run, for identity: the template by its text, the model itself by its digest elsewhere."""
        template = None if self.chat_template is None else template_text(self.chat_template)
        return {**self.model_dump(exclude={"path", "revision"}), "chat_template": template}


def template_text(name: str) -> str:
    """The chat template called `name`: a file, or one of ours without its ending. A template itself stays as it is."""
    if "{{" in name or "{%" in name:
        return name
    ours = TEMPLATES / f"{name}.jinja"
    path = ours if ours.is_file() else Path(name)
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        known = ", ".join(sorted(p.stem for p in TEMPLATES.glob("*.jinja")))
        raise UsageError(f"model.chat_template: no file {name!r}; name a file, or one of ours: {known}") from error


def has_accelerator() -> bool:
    """Whether this machine offers a GPU, told without importing torch."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    return Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists()


def on_this_machine(config: ModelConfig) -> ModelConfig:
    """`config` as it will really be loaded here: without an accelerator, float32; NF4 works on a CPU and stays."""
    if has_accelerator():
        return config
    return config.model_copy(update={"dtype": "float32"})
