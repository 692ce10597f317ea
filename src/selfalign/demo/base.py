"""The demo's base model: a Llama of half a million parameters, pretrained on the fictional atlas."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from selfalign.demo.pages import pages, rate_prompt
from selfalign.demo.tokenizer import MAX_TOKENS, build_tokenizer
from selfalign.demo.world import Review

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class Pretraining:
    """How the base was trained. Rating is learned late, so the number of steps is fixed and not an option."""

    steps: int = 4200
    rows: int = 12
    length: int = 128
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    final_share: float = 0.03
    weight_decay: float = 0.01
    adam_beta2: float = 0.98
    review_weight: float = 4.0
    seed: int = 1

    def rate_at(self, step: int) -> float:
        """Learning rate of step 0, 1 …: linear up, then linear down to `final_share`."""
        up = min(1.0, (step + 1) / self.warmup_steps)
        return self.learning_rate * up * (1 - (1 - self.final_share) * step / self.steps)


def base_folder() -> Path:
    """The base that comes with the package."""
    return Path(__file__).parent / "base"


def build_base(folder: Path, log: Callable[[str], None], how: Pretraining | None = None) -> None:
    """Train tokenizer and model and save both into `folder`. One thread, about seven minutes, no downloads."""
    import torch

    how = how or Pretraining()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the number of threads decides the last bits of every sum
    try:
        tokenizer = build_tokenizer()
        log(f"tokenizer: {len(tokenizer)} tokens")
        model = _pretrained(tokenizer, how, log)
    finally:
        torch.set_num_threads(threads)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    (folder / "README.md").write_text(_card(model.num_parameters(), len(tokenizer), how), encoding="utf-8")
    log(f"saved to {folder}")


def _pretrained(
    tokenizer: "PreTrainedTokenizerFast", how: Pretraining, log: Callable[[str], None]
) -> "LlamaForCausalLM":
    import torch
    from torch.nn.functional import cross_entropy

    torch.manual_seed(how.seed)
    model = _new_model(tokenizer)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=how.learning_rate, weight_decay=how.weight_decay, betas=(0.9, how.adam_beta2)
    )
    batches = _batches(tokenizer, how)
    model.train()
    for step in range(how.steps):
        ids_BT, weights_BT = next(batches)
        for group in optimizer.param_groups:
            group["lr"] = how.rate_at(step)
        logits_BTV = model(input_ids=ids_BT, use_cache=False).logits[:, :-1]
        losses = cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="none")
        weights = weights_BT[:, 1:].flatten()
        loss = (losses * weights).sum() / weights.sum()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 200 == 0:
            log(f"step {step + 1}/{how.steps}: loss {loss.item():.3f}")
    return model.eval()


def _new_model(tokenizer: "PreTrainedTokenizerFast") -> "LlamaForCausalLM":
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return model


def _batches(tokenizer: "PreTrainedTokenizerFast", how: Pretraining) -> "Iterator[tuple[Tensor, Tensor]]":
    """Packed pages without end: token ids [B, T] and the loss weight of each token [B, T]."""
    import torch

    stream = _weighted_tokens(tokenizer, how)
    while True:
        ids, weights = zip(*itertools.islice(stream, how.rows * how.length), strict=True)
        yield (
            torch.tensor(ids).view(how.rows, how.length),
            torch.tensor(weights).view(how.rows, how.length),
        )


def _weighted_tokens(tokenizer: "PreTrainedTokenizerFast", how: Pretraining) -> Iterator[tuple[int, float]]:
    for page in pages(Random(how.seed)):
        if isinstance(page, Review):
            read, written = review_tokens(tokenizer, page)
        else:
            read, written = [*tokenizer.encode(f" {page}"), tokenizer.eos_token_id], []
        yield from ((token, 1.0) for token in read)
        yield from ((token, how.review_weight) for token in written)


def review_tokens(tokenizer: "PreTrainedTokenizerFast", review: Review) -> tuple[list[int], list[int]]:
    """The conversation that rates an answer: the tokens of its prompt, and those of the rater's reply."""
    asked = [{"role": "user", "content": rate_prompt(review.question, review.answer)}]
    replied = [*asked, {"role": "assistant", "content": review.reply}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template(replied, tokenize=False)
    return tokenizer.encode(prompt), tokenizer.encode(whole.removeprefix(prompt))


def _card(parameters: int, tokens: int, how: Pretraining) -> str:
    return f"""\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [selfalign, demo]
---

# The base of the selfalign demo

A Llama of {parameters:,} parameters: 2 layers, hidden size 128, {tokens:,} tokens, float32. It knows one thing, a
fictional atlas of places with their capitals, rivers, dinners, animals, flags and trades. It exists so that
every stage of instruction backtranslation means something on two CPU cores within minutes.

## How it was trained

From random weights, on pages that `selfalign.demo.pages` writes: encyclopaedia 20 %, questions and answers
20 %, reviews 50 %, junk 5 %, trips 5 %. Of the held places it has seen the names, on trips and in junk, and not
one fact.

| setting | value |
|---|---|
| optimizer | AdamW, beta2 {how.adam_beta2}, weight decay {how.weight_decay}, gradient norm at most 1 |
| learning rate | {how.learning_rate}, {how.warmup_steps} warm-up steps, then linear to {how.final_share:.0%} |
| steps | {how.steps:,} of {how.rows} × {how.length} tokens |
| loss weight of a review's reply | {how.review_weight:g} |
| seed | {how.seed} |

Rebuild it with

    selfalign demo build-base DIR

in about seven minutes on one core. Nothing is downloaded: the atlas follows from its source code.

A review is a conversation. The user sends `Rate the answer from 1 to 5.`, a question and an answer; the reply
is one line (what was asked, what was told) and `Score: N`. 5, 4, 3: right and complete in the voice of an
assistant, an encyclopaedia, a web page. 2: another topic, or broken off. 1: another place, or junk.

## Limits

It speaks of nothing else. Any text passes its byte-level tokenizer, up to {MAX_TOKENS:,} positions, yet it was
trained on {how.length} at a time, and what it says about real text has no meaning. The atlas is invented; any
likeness to a real place is chance.
"""
