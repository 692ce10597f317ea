"""Which model, in which precision, run by which engine: the recipe's `model` section."""

import os
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from selfalign.core.errors import UsageError
from selfalign.core.frozen import Frozen, RecipePath

ABILITIES: dict[str, frozenset[str]] = {
    "transformers": frozenset({"generate", "choose", "likelihood"}),
    "scripted": frozenset({"generate", "choose"}),
}
"""What an engine can do: write replies, score a few short options, score whole texts."""

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
    double_quantisation: bool = Field(True, description="nf4: quantise its scales too, .4 bits a weight less")
    quantisation_storage: Literal["uint8", "bfloat16", "float16", "float32"] = Field(
        "uint8", description="nf4: the type that holds the packed weights; under DeepSpeed uint8 or the dtype"
    )
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


def has_bfloat16() -> bool:
    """Whether all visible GPUs compute in bfloat16: NVIDIA's do from compute capability 8.0, which a T4 is below.

    Told without importing torch. Where the driver's tool does not tell, they do: then loading will show it.
    """
    known = _compute_capabilities(os.environ.get("CUDA_VISIBLE_DEVICES"))
    return all(capability >= 8.0 for capability in known)


@cache
def _compute_capabilities(visible: str | None) -> tuple[float, ...]:
    """Of the GPUs that `visible` names by number or by the beginning of a UUID (None: of all), as far as known."""
    command = ["nvidia-smi", "--query-gpu=index,uuid,compute_cap", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    wanted = None if visible is None else [name.strip() for name in visible.split(",") if name.strip()]
    # Anything else is a remark: that there is no device, or a field that an old driver cannot tell.
    rows = re.findall(r"^(\d+), (\S+), (\d+\.\d+)$", told, re.MULTILINE)
    return tuple(
        float(capability)
        for index, uuid, capability in rows
        if wanted is None or index in wanted or uuid.startswith(tuple(w for w in wanted if not w.isdecimal()))
    )


def on_this_machine(config: ModelConfig, has_gpus: bool | None = None) -> ModelConfig:
    """`config` as it will really be loaded: float32 without an accelerator, where NF4 works and stays, and float16
    where the GPU has no bfloat16. `has_gpus` speaks of other machines, whose GPUs are not looked at; None of this one.
    """
    if not (has_accelerator() if has_gpus is None else has_gpus):
        return _in(config, "float32")
    if has_gpus is None and config.dtype == "bfloat16" and not has_bfloat16():
        return _in(config, "float16")
    return config


def _in(config: ModelConfig, dtype: str) -> ModelConfig:
    """`config` in another dtype."""
    # What packed weights are held in goes with it: DeepSpeed casts it as it casts weights.
    held = dtype if config.quantisation_storage == config.dtype else config.quantisation_storage
    return config.model_copy(update={"dtype": dtype, "quantisation_storage": held})
