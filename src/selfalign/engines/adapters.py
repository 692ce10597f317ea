"""Adapters are held against their base by names and shapes alone, before any weights are loaded."""

from pathlib import Path
from typing import TYPE_CHECKING

from selfalign.core.errors import MismatchError, UsageError
from selfalign.core.hub import explained, hub_errors
from selfalign.engines.config import ModelConfig

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

WEIGHTS = "adapter_model.safetensors"


def skeleton(config: ModelConfig, setting: str = "model.path") -> "PreTrainedModel":
    """The base model without its weights, on the meta device: its modules and their shapes, by config.json alone.

    Raises what loading it would raise, and MismatchError where the recipe's `setting` names an adapter.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    refuse_adapter(config, setting)
    local = Path(config.path).is_dir()
    try:
        settings = AutoConfig.from_pretrained(
            config.path, revision=None if local else config.revision, local_files_only=local
        )
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(settings)
    except hub_errors() as error:
        raise explained(config.path, error, setting) from error


def refuse_adapter(config: ModelConfig, setting: str = "model.path") -> None:
    """Raise MismatchError where `setting` names an adapter: transformers would load its base unasked, and it on top."""
    folder = Path(config.path)
    if (folder / "config.json").is_file() or not (folder / "adapter_config.json").is_file():
        return
    raise MismatchError(
        f"{setting}: {folder} is an adapter, not a model; name its base ({_settings(folder).base_model_name_or_path}), "
        f"or merge it (selfalign merge {folder} FOLDER) and name that folder"
    )


def check_adapter(adapter: Path, base: ModelConfig) -> None:
    """Raise MismatchError where `adapter` cannot be put on `base`: what it is made for, and what does not fit.

    Reads the adapter's settings and the header of its weights, and the base's config.json. UsageError where the folder
    holds no adapter.
    """
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict

    config = _settings(adapter)
    found = _shapes(adapter)
    try:
        # The same classes that will hold the weights, so that whatever they would refuse is refused here.
        model = PeftModel(skeleton(base), config, low_cpu_mem_usage=True)
    except ValueError as error:
        raise _misfit(adapter, config, base, str(error)) from error
    wanted = {name: tuple(t.shape) for name, t in get_peft_model_state_dict(model, save_embedding_layers=False).items()}
    known = {**{name: tuple(t.shape) for name, t in model.state_dict().items()}, **wanted}
    if odd := sorted(set(wanted) - set(found) | set(found) - set(known)):
        raise _misfit(adapter, config, base, f"{len(odd)} weights have no counterpart, such as {odd[0]}")
    if odd := sorted(name for name, shape in found.items() if shape != known[name]):
        shapes = f"{odd[0]} is {list(found[odd[0]])} and would be {list(known[odd[0]])}"
        raise _misfit(adapter, config, base, f"{len(odd)} weights have another shape: {shapes}")


def _misfit(adapter: Path, config: "PeftConfig", base: ModelConfig, why: str) -> MismatchError:
    return MismatchError(
        f"the adapter {adapter} does not fit the model {base.path}: it was trained on "
        f"{config.base_model_name_or_path}, and {' '.join(why.split())}"
    )


def _settings(adapter: Path) -> "PeftConfig":
    from peft import PeftConfig

    if not (adapter / "adapter_config.json").is_file():
        raise UsageError(f"{adapter} is not an adapter: it has no adapter_config.json")
    try:
        config = PeftConfig.from_pretrained(str(adapter))
    except (ValueError, KeyError, TypeError) as error:
        raise MismatchError(f"{adapter / 'adapter_config.json'} cannot be read: {error}") from error
    if config.is_prompt_learning:
        raise MismatchError(f"{adapter}: adapters that learn a prompt ({config.peft_type}) are not supported; use LoRA")
    return config


def _shapes(adapter: Path) -> dict[str, tuple[int, ...]]:
    """The weights' shapes by name, from the header of the file."""
    from safetensors import SafetensorError, safe_open

    path = adapter / WEIGHTS
    if not path.is_file():
        raise MismatchError(f"{adapter} has no {WEIGHTS}; other formats are not loaded")
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise MismatchError(f"{path} is damaged: {error}; train or copy it again") from error
    if empty := [name for name, shape in shapes.items() if 0 in shape]:
        raise MismatchError(
            f"{path}: {len(empty)} of its tensors are empty, such as {empty[0]}; ZeRO-3 saves adapters so where they "
            "are not gathered first: train or convert it again"
        )
    return shapes
