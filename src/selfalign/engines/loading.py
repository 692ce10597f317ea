"""Load a base model and its tokenizer: the one place where weights enter a process."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfalign.core.errors import MismatchError, UsageError
from selfalign.core.hub import explained, hub_errors
from selfalign.engines.config import ModelConfig, template_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def load_tokenizer(config: ModelConfig, setting: str = "model.path") -> "PreTrainedTokenizerFast":
    """The tokenizer with the chat template that training and inference share. Errors name the recipe's `setting`.

    Raises UsageError where there is no model, or no chat template and the recipe names none.
    """
    from transformers import AutoTokenizer

    tokenizer = _fetch(AutoTokenizer, config, setting)
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
    """The base model in its dtype and quantisation, on this process's accelerator where there is one, in eval mode."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.integrations import is_deepspeed_zero3_enabled

    dtype = getattr(torch, config.dtype)
    extra: dict[str, Any] = {}
    if config.quantisation == "nf4":
        extra["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=config.double_quantisation,
            bnb_4bit_quant_storage=getattr(torch, config.quantisation_storage),
            bnb_4bit_compute_dtype=dtype,
        )
    elif config.quantisation == "int8":
        extra["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    model = _fetch(
        AutoModelForCausalLM,
        config,
        "model.path",
        use_safetensors=True,
        dtype=dtype,
        # Under ZeRO-3 every rank loads its share, and DeepSpeed says where.
        device_map=None if is_deepspeed_zero3_enabled() else {"": device},
        **extra,
    )
    if device == "cpu":
        for module in model.modules():
            # bitsandbytes repacks NF4 weights for bfloat16 CPUs on first use, and loses bits when a later look at the
            # weights (loading an adapter is one) packs them back: the same prompt then scores differently.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    return model.eval()


def settle_generation(model: "PreTrainedModel", stops: frozenset[int]) -> None:
    """Generation settings that can be saved and that end a reply where training ended it.

    Models are published with a temperature but without sampling, which can be loaded and not saved: that must not
    come out after the training.
    """
    generation = model.generation_config
    if generation is None:
        return
    generation.eos_token_id = sorted(stops)
    try:
        generation.validate(strict=True)
    except ValueError:
        generation.do_sample = True


def _fetch(auto_class: Any, config: ModelConfig, setting: str, **extra: Any) -> Any:
    from transformers.utils.logging import disable_progress_bar

    # Of its bars for each file that is read or written; what is downloaded still shows its own.
    disable_progress_bar()
    local = Path(config.path).is_dir()
    if not local and config.path.startswith((".", "/", "~")):
        raise UsageError(f"{setting}: no folder {config.path!r}")
    try:
        return auto_class.from_pretrained(
            config.path, revision=None if local else config.revision, local_files_only=local, **extra
        )
    except hub_errors() as error:
        raise explained(config.path, error, setting) from error
