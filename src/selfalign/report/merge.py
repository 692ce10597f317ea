"""`selfalign merge`: an adapter put into its base's weights, as a model of its own that answers the same."""

import shutil
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from selfalign.core.errors import MismatchError, StorageError, UsageError
from selfalign.core.locations import commit_folder
from selfalign.core.store import Artifact
from selfalign.engines.adapters import check_adapter
from selfalign.engines.chat import Chat
from selfalign.engines.config import ModelConfig, on_this_machine
from selfalign.engines.loading import load_model, load_tokenizer, settle_generation
from selfalign.report.ask import Found, find
from selfalign.stages.prompting import chat
from selfalign.training.preflight import stop_ids

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Dtype = Literal["float32", "float16", "bfloat16"]

PROMPTS = (
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "Write a haiku about a train that is late.",
    "List three things to check before a long journey by bicycle, and say why.",
)
TOLERANCE = {"float32": 1e-4, "float16": 0.02, "bfloat16": 0.15}
"""How far a logit may move, as a share of the largest one: merged weights are rounded to their dtype once more.

SmolLM2-135M with a LoRA of rank 16 after 12 steps showed 2e-6, 0.005 and 0.08.
"""

MAX_LOST = 0.5
"""Of what the adapter changes, the share that rounding may cost: small updates of weights that are on bfloat16's coarse
grid already vanish. The same model lost 1e-5, 0.03 and 0.26; one that is merged without its adapter loses 1."""


@dataclass(frozen=True)
class Merged:
    """A merged model, and how its logits differ over `PROMPTS`.

    `difference` is the largest from base + adapter, at most `allowed`. `lost` is the same as a root mean square, as a
    share of the adapter's own effect on the base (0..1). `from_quantised` is the largest from the adapter on the base
    in `quantisation`, which is what training saw; None where it was not quantised.
    """

    path: Path
    base: str
    dtype: Dtype
    difference: float
    allowed: float
    lost: float
    quantisation: str | None = None
    from_quantised: float | None = None


def merge(model: str, dest: Path, dtype: Dtype | None, say: Callable[[str], None]) -> Merged:
    """Merge what `model` names into the folder `dest`, which is there whole and checked, or not at all.

    The base is loaded unquantised, in `dtype` or the recipe's (bfloat16 for an adapter alone). Raises UsageError where
    there is nothing to merge or `dest` holds something, MismatchError where the adapter does not fit its base or the
    merged model's logits are not those of base + adapter.
    """
    if dest.exists() and not (dest.is_dir() and not any(dest.iterdir())):
        raise UsageError(f"{dest} is there already; name a folder that is not")
    if not Path(model).is_dir():
        raise UsageError(
            f"there is no folder {model}; name a run or an adapter (one on the Hub: `hf download` it first)"
        )
    found = find(model)
    if found.adapter is None:
        raise UsageError(f"{model} is a full model: there is no adapter to merge, use it as it is")
    adapter = found.adapter
    if adapter.name == "files":
        # The files of a run's artifact.
        Artifact(adapter.parent, "").verify_files()
    check_adapter(adapter, found.config)
    wanted = dtype or found.config.dtype
    plain = found.config.model_copy(update={"dtype": wanted, "quantisation": None})
    tokenizer = load_tokenizer(plain)
    prompts = _encoded(tokenizer)
    seen = _as_trained(found, adapter, prompts, say)
    dest.parent.mkdir(parents=True, exist_ok=True)
    draft = dest.with_name(f".{dest.name}.{uuid.uuid4().hex[:12]}")
    try:
        say(f"loading {plain.path} in {wanted}")
        adapted, bare = _merge_into(draft, plain, adapter, tokenizer, prompts)
        say("checking the merged model")
        result = ModelConfig(path=str(draft), dtype=wanted)
        if _encoded(load_tokenizer(result)) != prompts:
            raise MismatchError(
                f"{plain.path}: tokenizer or chat template change when they are saved; nothing was kept"
            )
        logits = _logits(load_model(result), prompts)
        difference, allowed, lost = _compare(logits, adapted, bare, wanted)
        if not commit_folder(draft, dest):
            raise UsageError(f"{dest} has been written by somebody else meanwhile; name another folder")
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return Merged(
        path=dest,
        base=plain.path,
        dtype=wanted,
        difference=difference,
        allowed=allowed,
        lost=lost,
        quantisation=found.config.quantisation,
        from_quantised=None if seen is None else _largest(logits, seen),
    )


def _as_trained(
    found: Found, adapter: Path, prompts: Sequence[list[int]], say: Callable[[str], None]
) -> "list[Tensor] | None":
    """Logits of the adapter on the quantised base; None where training saw none."""
    if found.config.quantisation is None:
        return None
    say(f"loading {found.config.path} in {found.config.quantisation}, as training saw it")
    return _logits(_adapted(load_model(on_this_machine(found.config)), adapter), prompts)


def _merge_into(
    folder: Path,
    config: ModelConfig,
    adapter: Path,
    tokenizer: "PreTrainedTokenizerFast",
    prompts: Sequence[list[int]],
) -> "tuple[list[Tensor], list[Tensor]]":
    """Save the merged model; the logits of base + adapter, and those of the base."""
    from safetensors import SafetensorError

    base = load_model(config)
    if getattr(base.config, "quantization_config", None) is not None:
        raise MismatchError(
            f"{config.path} is published quantised, and merging would round its weights once more; the adapter itself "
            "works as it is"
        )
    model = _adapted(base, adapter)
    adapted = _logits(model, prompts)
    with model.disable_adapter():
        bare = _logits(model, prompts)
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except (ValueError, NotImplementedError, AttributeError) as error:
        raise MismatchError(f"{adapter} cannot be merged: {error}") from error
    settle_generation(merged, stop_ids(tokenizer, config))
    try:
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"the merged model cannot be saved to {folder.parent}: {error}") from error
    return adapted, bare


def _adapted(base: "PreTrainedModel", adapter: Path) -> "PeftModel":
    """The base with every weight of the adapter in its place."""
    from peft import PeftConfig, PeftModel

    model = PeftModel(base, PeftConfig.from_pretrained(str(adapter)), autocast_adapter_dtype=False)
    model.load_adapter(str(adapter), "default", autocast_adapter_dtype=False)
    return model.eval()


def _encoded(tokenizer: "PreTrainedTokenizerFast") -> list[list[int]]:
    asked = Chat(tokenizer)
    return asked.encode([asked.prompt(chat(prompt)) for prompt in PROMPTS])


def _logits(model: "PreTrainedModel | PeftModel", prompts: Sequence[list[int]]) -> "list[Tensor]":
    """For each prompt the logits [T, V] after each of its tokens, float32, on the CPU."""
    import torch

    with torch.inference_mode():
        ids = (torch.tensor([prompt], device=model.device) for prompt in prompts)
        return [model(input_ids=ids_BT, use_cache=False).logits[0].float().cpu() for ids_BT in ids]


def _compare(
    merged: "Sequence[Tensor]", adapted: "Sequence[Tensor]", bare: "Sequence[Tensor]", dtype: Dtype
) -> tuple[float, float, float]:
    """`difference`, `allowed` and `lost`. Raises MismatchError where they are too much."""
    difference = _largest(merged, adapted)
    allowed = TOLERANCE[dtype] * max(float(logits_TV.abs().max()) for logits_TV in adapted)
    advice = "nothing was kept. Merge in another dtype (--dtype float32 rounds least), or use the adapter as it is"
    # Written so that NaN fails too.
    if not difference <= allowed:
        raise MismatchError(
            f"the merged model's logits differ by up to {difference:.4g} from those of base and adapter, and {dtype} "
            f"allows {allowed:.4g}; {advice}"
        )
    effect = _mean_square(bare, adapted)
    lost = (_mean_square(merged, adapted) / effect) ** 0.5 if effect else 0.0
    if lost > MAX_LOST:
        raise MismatchError(
            f"merged in {dtype}, {lost:.0%} of what the adapter changes is lost, and at most {MAX_LOST:.0%} may be; "
            + advice
        )
    return difference, allowed, lost


def _largest(one: "Sequence[Tensor]", other: "Sequence[Tensor]") -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


def _mean_square(one: "Sequence[Tensor]", other: "Sequence[Tensor]") -> float:
    return sum(float((a - b).square().mean()) for a, b in zip(one, other, strict=True)) / len(one)
