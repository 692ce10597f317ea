"""Load a base model and its tokenizer: the one place where weights enter a process."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfalign.core.errors import MismatchError, ServiceError, UsageError
from selfalign.engines.config import ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

TEMPLATES = Path(__file__).parent / "templates"


def template_text(name: str) -> str:
    """The chat template called `name`: a file, or one of ours without its ending."""
    ours = TEMPLATES / f"{name}.jinja"
    path = ours if ours.is_file() else Path(name)
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        known = ", ".join(sorted(p.stem for p in TEMPLATES.glob("*.jinja")))
        raise UsageError(f"model.chat_template: no file {name!r}; name a file, or one of ours: {known}") from error


def load_tokenizer(config: ModelConfig) -> "PreTrainedTokenizerFast":
    """The tokenizer with the chat template that training and inference share.

    Raises UsageError where there is no model, or no chat template and the recipe names none.
    """
    from transformers import AutoTokenizer

    tokenizer = _fetch(AutoTokenizer, config)
    if config.chat_template is not None:
        tokenizer.chat_template = template_text(config.chat_template)
    if not tokenizer.chat_template:
        raise UsageError(
            f"{config.path} has no chat template; set model.chat_template to a file or to one of ours "
            "(plain works with any tokenizer)"
        )
    if tokenizer.eos_token_id is None:
        raise MismatchError(f"{config.path}: the tokenizer has no end-of-sequence token, so no reply could end")
    if tokenizer.pad_token_id is None:
        # Padding is masked by position, never by id, so sharing the id with the stop token is safe here.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(config: ModelConfig) -> "PreTrainedModel":
    """The base model in its dtype and quantisation, on the accelerator where there is one, in eval mode."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = getattr(torch, config.dtype)
    extra: dict[str, Any] = {}
    if config.quantisation == "nf4":
        extra["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    elif config.quantisation == "int8":
        extra["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = _fetch(AutoModelForCausalLM, config, dtype=dtype, device_map={"": device}, **extra)
    return model.eval()  # type: ignore[no-any-return]


def _fetch(auto_class: Any, config: ModelConfig, **extra: Any) -> Any:
    local = Path(config.path).is_dir()
    if not local and config.path.startswith((".", "/", "~")):
        raise UsageError(f"model.path: no folder {config.path!r}")
    try:
        return auto_class.from_pretrained(
            config.path, revision=None if local else config.revision, local_files_only=local, **extra
        )
    except OSError as error:
        raise _explained(config.path, error) from error


def _explained(name: str, error: OSError) -> UsageError | ServiceError:
    """One sentence for each way in which the Hub says no."""
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    found = {type(e) for e in chain}
    if any(issubclass(t, GatedRepoError) for t in found):
        how = "accept its licence on the Hub" if os.environ.get("HF_TOKEN") else "set HF_TOKEN"
        return UsageError(f"{name} is gated on the Hub: {how}, or point model.path at a local folder")
    if any(issubclass(t, RepositoryNotFoundError) for t in found):
        return UsageError(f"{name} is neither a folder nor a model on the Hub (or it is private: set HF_TOKEN)")
    if any(issubclass(t, (OfflineModeIsEnabled, LocalEntryNotFoundError)) for t in found):
        return ServiceError(
            f"{name} is not in the local cache and the Hub cannot be reached; check the network and "
            "HF_HUB_OFFLINE, or point model.path at a local folder"
        )
    return UsageError(f"{name} cannot be loaded: {error}")
