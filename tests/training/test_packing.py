"""Packed sequences, and that no document of one sees another, whatever the model and however it is trained."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import accumulate, combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfalign.core.errors import MismatchError
from selfalign.demo.base import base_folder
from selfalign.training.attention import BY_DOCUMENT, choose_attention
from selfalign.training.packing import sequences
from selfalign.training.preflight import Tokenised

TINY = {
    **{"vocab_size": 384, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256},
}
LENGTHS = [23, 9, 14, 31, 1, 17, 12, 28]
PACK_TO = 40


def row(length: int, number: int = 0) -> Tokenised:
    """A row like no other of the same length, of which the first half is prompt."""
    ids = tuple(5 + (number * 31 + 7 * place) % 370 for place in range(length))
    return Tokenised(str(number), ids, (0,) * (length // 2) + (1,) * (length - length // 2), stops=True)


def fill(data: Any, pack_to: int) -> float:
    return sum(map(len, data["input_ids"])) / (len(data) * pack_to)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, PACK_TO), max_size=30))
def test_rows_are_packed_whole_and_once_and_no_two_sequences_would_fit_into_one(lengths: list[int]) -> None:
    rows = [row(length, number) for number, length in enumerate(lengths)]
    packed = sequences(rows, PACK_TO)
    found: Counter[tuple[tuple[int, ...], tuple[int, ...]]] = Counter()
    for sequence in packed:
        bounds = [0, *accumulate(sequence["seq_lengths"])]
        assert bounds[-1] == len(sequence["input_ids"]) == len(sequence["labels"]) <= PACK_TO
        found.update((tuple(sequence["input_ids"][a:b]), tuple(sequence["labels"][a:b])) for a, b in pairwise(bounds))
    assert found == Counter((r.input_ids, tuple(r.labels)) for r in rows)
    filled = [len(ids) for ids in packed["input_ids"]]
    assert all(one + other > PACK_TO for one, other in combinations(filled, 2))


def test_unpacked_every_row_is_a_sequence_in_its_place() -> None:
    rows = [row(length, number) for number, length in enumerate(LENGTHS)]
    data = sequences(rows, None)
    assert data.column_names == ["input_ids", "labels"]
    assert [tuple(ids) for ids in data["input_ids"]] == [r.input_ids for r in rows]
    assert [list(labels) for labels in data["labels"]] == [r.labels for r in rows]


def test_many_short_rows_leave_one_sequence_unfilled_and_not_one_in_every_thousand_rows() -> None:
    assert len(sequences([row(30, number) for number in range(2_500)], 2_048)) == 37


def test_lima_is_packed_to_more_than_995_of_1000(real_data: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_folder())
    lines = (real_data / "lima" / "train.jsonl").read_text("utf-8").splitlines()
    texts = ["".join(json.loads(line)["conversations"][:2]) for line in lines]
    lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]]
    rows = [row(min(length, 2_048), number) for number, length in enumerate(lengths)]
    assert len(rows) == 1_030
    assert fill(sequences(rows, None), 2_048) < 0.6
    assert fill(sequences(rows, 2_048), 2_048) > 0.995


Make = Callable[[], Any]


def demo() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base_folder())


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return made(LlamaForCausalLM, LlamaConfig(**TINY))


def qwen() -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return made(Qwen2ForCausalLM, Qwen2Config(**TINY))


def mistral(window: int) -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    return made(MistralForCausalLM, MistralConfig(**TINY, sliding_window=window))


def made(model_class: Any, config: Any) -> Any:
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    return model_class(config).eval()


def batch(lengths: Sequence[int] = LENGTHS) -> dict[str, Any]:
    """Several packed sequences in one row, as the trainer's collator makes it."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    packed = sequences([row(length, number) for number, length in enumerate(lengths)], PACK_TO)
    assert 1 < len(packed) < len(lengths)
    inputs: dict[str, Any] = DataCollatorForLanguageModeling(pad_token_id=1, padding_free=True)(list(packed))
    assert "attention_mask" not in inputs
    assert inputs["input_ids"].shape == (1, sum(lengths))
    return inputs


def bounds(inputs: dict[str, Any]) -> list[tuple[int, int]]:
    starts = (inputs["position_ids"][0] == 0).nonzero().flatten().tolist()
    return list(pairwise([*starts, inputs["input_ids"].shape[1]]))


def logits(model: Any, inputs: dict[str, Any], **more: Any) -> Any:
    """[T, V]"""
    import torch

    with torch.no_grad():
        return model(**{k: v for k, v in inputs.items() if k != "labels"}, **more, use_cache=False).logits[0]


MODELS = [demo, llama, qwen, lambda: mistral(64), lambda: mistral(8)]
NAMES = ["demo", "llama", "qwen", "mistral", "mistral-narrow"]
models = pytest.mark.parametrize("make", MODELS, ids=NAMES)


@models
def test_a_document_scores_in_its_pack_as_it_does_alone_and_would_not_under_a_mask_of_ones(make: Make) -> None:
    import torch

    model, inputs = make(), batch()
    choose_attention(model, packed=True)
    apart = logits(model, inputs)
    alone = torch.cat([logits(model, {"input_ids": inputs["input_ids"][:, a:b]}) for a, b in bounds(inputs)])
    assert len(bounds(inputs)) == len(LENGTHS)
    assert (apart - alone).abs().max() < 1e-4
    mixed = logits(model, inputs, attention_mask=torch.ones_like(inputs["input_ids"]))
    assert (mixed - alone).abs().max() > 1e-2


@models
def test_other_documents_of_a_pack_do_not_move_a_bit(make: Make) -> None:
    model, inputs = make(), batch()
    choose_attention(model, packed=True)
    start, end = bounds(inputs)[3]
    other = {**inputs, "input_ids": (inputs["input_ids"] + 101) % 384}
    other["input_ids"][:, start:end] = inputs["input_ids"][:, start:end]
    before, after = logits(model, inputs), logits(model, other)
    assert before[start:end].equal(after[start:end])
    assert not before.equal(after)


@models
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("masked", [False, True], ids=["apart", "mask-of-ones"])
def test_no_gradient_flows_between_documents_and_it_would_under_a_mask_of_ones(
    make: Make, checkpointing: bool, masked: bool
) -> None:
    import torch

    model, inputs = make().train(), batch()
    choose_attention(model, packed=True)
    if checkpointing:
        model.gradient_checkpointing_enable()
    ids = inputs.pop("input_ids")
    embedded_BTD = model.get_input_embeddings()(ids).detach().requires_grad_()
    more = {"attention_mask": torch.ones_like(ids)} if masked else {}
    start, end = bounds({**inputs, "input_ids": ids})[3]
    del inputs["labels"]
    model(inputs_embeds=embedded_BTD, **inputs, **more, use_cache=False).logits[0, start:end].square().sum().backward()
    moved_T = embedded_BTD.grad[0].abs().sum(-1)
    assert moved_T[start:end].min() > 0
    assert bool(moved_T[:start].any()) is masked
    assert not moved_T[end:].any()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("make", MODELS[:3], ids=NAMES[:3])
def test_a_pack_gives_the_gradients_of_its_documents(make: Make, checkpointing: bool) -> None:
    from torch.nn.functional import cross_entropy

    def gradients(model: Any, parts: list[dict[str, Any]]) -> dict[str, Any]:
        for part in parts:
            labels = part["labels"][0, 1:]
            found = model(**{k: v for k, v in part.items() if k != "labels"}, use_cache=False).logits[0, :-1]
            cross_entropy(found, labels, reduction="sum").backward()
        return {name: p.grad for name, p in model.named_parameters()}

    inputs = batch()
    documents = [{n: inputs[n][:, a:b] for n in ("input_ids", "labels")} for a, b in bounds(inputs) if b - a > 1]
    whole, apart = make().train(), make().train()
    choose_attention(whole, packed=True)
    if checkpointing:
        whole.gradient_checkpointing_enable()
    packed, expected = gradients(whole, [inputs]), gradients(apart, documents)
    for name, gradient in expected.items():
        assert (packed[name] - gradient).abs().max() <= 1e-4 * max(1.0, float(gradient.abs().max())), name


@pytest.mark.parametrize(("window", "whole"), [(31, False), (30, True)])
def test_each_document_is_one_causal_call_without_a_mask_unless_a_sliding_window_is_narrower(
    window: int, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    calls: list[tuple[int, bool]] = []
    kernel = torch.nn.functional.scaled_dot_product_attention

    def seen(query: Any, *rest: Any, attn_mask: Any, **more: Any) -> Any:
        calls.append((query.shape[2], attn_mask is None))
        return kernel(query, *rest, attn_mask=attn_mask, **more)

    model, inputs = mistral(window), batch()
    choose_attention(model, packed=True)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", seen)
    logits(model, inputs)
    each = [(b - a, True) for a, b in bounds(inputs)]
    assert calls == ([(sum(LENGTHS), False)] if whole else each) * TINY["num_hidden_layers"]


@models
def test_what_is_not_packed_is_attended_to_as_before(make: Make) -> None:
    import torch

    plain, ours = make(), make()
    choose_attention(ours, packed=True)
    ids, mask = torch.arange(5, 65).view(3, 20), torch.ones(3, 20, dtype=torch.long)
    mask[1, :7] = 0
    right = mask.flip(1)
    positions = torch.stack([torch.arange(20), torch.arange(20), torch.cat([torch.arange(8), torch.arange(12)])])
    for more in ({}, {"attention_mask": mask}, {"attention_mask": right}, {"position_ids": positions}):
        with torch.no_grad():
            assert plain(ids, **more).logits.equal(ours(ids, **more).logits)
    asked = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert plain.generate(ids, **asked).equal(ours.generate(ids, **asked))


def test_the_choice_does_not_come_out_with_the_model(tmp_path: Path) -> None:
    model = llama()
    choose_attention(model, packed=True)
    assert model.config._attn_implementation == BY_DOCUMENT
    model.save_pretrained(tmp_path)
    assert "attn" not in (tmp_path / "config.json").read_text()


def test_a_model_whose_attention_cannot_be_chosen_is_refused() -> None:
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(MismatchError, match=r"BloomForCausalLM cannot .* set packing to false"):
        choose_attention(model, packed=True)


def test_a_model_that_sdpa_does_not_fit_is_refused() -> None:
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(**TINY, head_dim=8, num_local_experts=2, num_experts_per_tok=1)
    with pytest.raises(MismatchError, match="GptOssForCausalLM cannot"):
        choose_attention(GptOssForCausalLM(config), packed=True)
