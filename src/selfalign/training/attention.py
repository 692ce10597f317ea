"""Attention within each document of a packed sequence, at the cost of the documents alone.

For packed positions transformers gives sdpa a mask of the whole sequence: right, but N tokens cost N² in time and in
the mask's memory, and kernels for causal attention take no mask. Here each document is one causal call without one.
"""

from typing import TYPE_CHECKING, Any

from selfalign.core.errors import MismatchError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from transformers import PreTrainedModel

# transformers reads the name: what is called sdpa is refused for models that sdpa does not fit.
BY_DOCUMENT = "sdpa_by_document"


def choose_attention(model: "PreTrainedModel", packed: bool) -> None:
    """FlashAttention 2 where it is installed and fits the model; else, where rows are `packed`, ours.

    Either keeps the documents of a packed sequence apart. Ours is meant for what a padding-free collator makes: no
    mask, no cache, `position_ids` that begin again in each document; other input is attended to as by sdpa. Raises
    MismatchError for a model whose attention cannot be chosen.
    """
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.utils import is_flash_attn_2_available

    AttentionInterface.register(BY_DOCUMENT, _attend)
    AttentionMaskInterface.register(BY_DOCUMENT, _mask)
    flash = is_flash_attn_2_available() and model._supports_flash_attn and model.dtype != torch.float32
    if not packed and not flash:
        return
    name = "flash_attention_2" if flash else BY_DOCUMENT
    refusal = f"packing: {type(model).__name__} cannot be told to keep packed documents apart; set packing to false"
    try:
        model.set_attn_implementation(name)
    except (ImportError, ValueError) as error:
        raise MismatchError(f"{refusal} ({error})") from error
    if model.config._attn_implementation != name:
        # transformers only warns, and such a model may read position_ids without keeping documents apart.
        raise MismatchError(refusal)


def _mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Any,
    attention_mask: "Tensor | None" = None,
    allow_is_causal_skip: bool = True,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: Any = "cpu",
    **rest: Any,
) -> "Tensor | tuple[int, ...] | None":
    """The lengths of the documents, where nothing but documents divides one sequence; else the mask for sdpa.

    Bounds are read off the mask that transformers would have made: a token that may not see the one before it.
    """
    import torch
    from transformers.masking_utils import sdpa_mask

    # transformers allows the skip wherever positions run through; vmap is for masks that a model adds.
    packed = not allow_is_causal_skip and attention_mask is None and not use_vmap
    if packed and batch_size == 1 and q_length == kv_length:
        zero = torch.zeros((), dtype=torch.long, device=device)
        later_T = torch.arange(1, q_length, device=device)
        starts = later_T[~mask_function(zero, zero, later_T, later_T - 1)].tolist()
        lengths = tuple(end - start for start, end in zip([0, *starts], [*starts, q_length], strict=True))
        # A sliding window limits no document that fits into it.
        if local_size is None or max(lengths) <= local_size:
            return lengths
    mask: Tensor | None = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        local_size=local_size,
        use_vmap=use_vmap,
        device=device,
        **rest,
    )
    return mask


def _attend(
    module: "Module",
    query_BHTD: "Tensor",
    key_BHTD: "Tensor",
    value_BHTD: "Tensor",
    attention_mask: "Tensor | tuple[int, ...] | None",
    **rest: Any,
) -> "tuple[Tensor, None]":
    """sdpa, document by document where `_mask` has given their lengths. Returns [B, T, H, D]."""
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if not isinstance(attention_mask, tuple):
        whole: tuple[Tensor, None] = sdpa_attention_forward(
            module, query_BHTD, key_BHTD, value_BHTD, attention_mask, **rest
        )
        return whole
    lengths = list(attention_mask)
    parts = zip(*(torch.split(each, lengths, dim=2) for each in (query_BHTD, key_BHTD, value_BHTD)), strict=True)
    return torch.cat([sdpa_attention_forward(module, *each, None, **rest)[0] for each in parts], dim=1), None
