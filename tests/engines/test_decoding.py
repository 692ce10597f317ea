"""Decoding step by step, and how the next token is drawn."""

import math
import random
from collections import Counter
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from selfalign.core.protocols import Sampling
from selfalign.engines.decoding import Joining, Row, Slots, cached, choose, prefill


def drawn(logits: list[float], sampling: Sampling, draws: int = 4000) -> Counter[int]:
    noise = torch.rand(draws, generator=torch.Generator().manual_seed(1)).tolist()
    return Counter(choose(torch.tensor([logits]).expand(draws, -1), sampling, noise))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_as_often_as_the_temperature_says(temperature: float) -> None:
    logits = [1.0, 0.0, -1.0, 2.0]
    counts = drawn(logits, Sampling(temperature=temperature, top_p=1))
    wanted = torch.tensor([x / temperature for x in logits]).softmax(-1).tolist()
    assert all(abs(counts[token] / 4000 - p) < 0.03 for token, p in enumerate(wanted))


def test_top_p_keeps_the_fewest_tokens_that_reach_it_and_top_k_the_first_k() -> None:
    logits = [math.log(p) for p in (0.1, 0.5, 0.15, 0.25)]
    assert set(drawn(logits, Sampling(temperature=1, top_p=0.45))) == {1}
    assert set(drawn(logits, Sampling(temperature=1, top_p=0.6))) == {1, 3}
    assert set(drawn(logits, Sampling(temperature=1, top_p=1, top_k=3))) == {1, 2, 3}
    # Of the first two, renormalised, the first alone holds two thirds.
    assert set(drawn(logits, Sampling(temperature=1, top_p=0.6, top_k=2))) == {1}


def test_a_nucleus_wider_than_the_first_look_is_still_exact() -> None:
    counts = drawn([-at / 10_000 for at in range(2000)], Sampling(temperature=1, top_p=0.9), draws=1000)
    weights = torch.tensor([-at / 10_000 for at in range(2000)]).double().softmax(-1).cumsum(-1)
    last = int((weights < 0.9).sum())
    assert 1024 < last - 50 < max(counts) <= last


def gemma() -> Any:
    """Layers that see a window alternate with layers that see all, and logits are capped after the vocabulary."""
    torch.manual_seed(2)
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    config = Gemma2Config(
        vocab_size=400, hidden_size=64, intermediate_size=128, sliding_window=24, initializer_range=0.2, **shape
    )
    return Gemma2ForCausalLM(config).eval()


@pytest.fixture(params=["llama", "gemma"])
def model(request: pytest.FixtureRequest, reference: Any) -> Any:
    return reference if request.param == "llama" else gemma()


def test_a_prefill_gives_the_logits_that_were_asked_for_in_each_row(model: Any) -> None:
    rng = random.Random(4)
    rows = [[rng.randrange(2, 400) for _ in range(length)] for length in (30, 7, 12)]
    wanted = [[0, 3, 29], [6], [5, 2]]
    with torch.inference_mode():
        logits, _ = prefill(model, rows, wanted, None)
        for row, positions, got in zip(rows, wanted, logits, strict=True):
            want = model(torch.tensor([row]), use_cache=False).logits[0, positions]
            assert got.shape == want.shape
            assert (got - want).abs().max() < 1e-4


def test_logits_of_every_decoding_step_equal_a_full_forward_pass(model: Any) -> None:
    rng = random.Random(1)
    shared = [rng.randrange(2, 400) for _ in range(40)]
    tails = [[rng.randrange(2, 400) for _ in range(length)] for length in (3, 17, 9)]
    written = [[rng.randrange(2, 400) for _ in range(70)] for _ in tails]
    with torch.inference_mode():
        _, prefix = prefill(model, [shared], [[39]], None)
        first, cache = prefill(model, tails, [[len(tail) - 1] for tail in tails], cached(prefix))
        parts = [[(k[row], v[row]) for k, v in cached(cache)] for row in range(3)]
        rows = [Row(tail) for tail in tails]
        slots = Slots(model)
        # The third row joins late, when the others have written ten tokens; the first leaves after twenty.
        joining = [Joining(row, 40 + len(row.prompt), part) for row, part in zip(rows, parts, strict=True)]
        slots.repack(joining[:2])
        for step in range(70):
            if step == 10:
                slots.repack(joining[2:])
            if step == 20:
                rows[0].done = True
                slots.repack()
            for row, tokens in zip(rows, written, strict=True):
                if row in slots.rows:
                    row.new.append(tokens[len(row.new)])
            logits = slots.step()
            for row, got in zip(slots.rows, logits, strict=True):
                want = model(torch.tensor([[*shared, *row.prompt, *row.new]]), use_cache=False).logits[0, -1]
                assert (got - want).abs().max() < 1e-4
        for row, got in zip(rows, first, strict=True):
            want = model(torch.tensor([[*shared, *row.prompt]]), use_cache=False).logits[0, -1]
            assert (got[0] - want).abs().max() < 1e-4
