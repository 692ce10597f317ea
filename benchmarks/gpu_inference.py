"""Rating and generation on one GPU, on random weights of a true shape: `python benchmarks/gpu_inference.py [SHAPE]`.

Rating: 900 tokens shared, 400 of each pair's own. Generation: documents of 600 tokens, 64 new ones each, 256 slots. For
both, their share of the line of PERFORMANCE (half of the card's peak FLOP/s) and, where it is installed, of what bare
vLLM does with the same prompts, by turns in one run. No checkpoint and no network is needed. Where there is no GPU it
says so and measures nothing.
"""

import argparse
import importlib.util
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from time import perf_counter
from typing import Any

from gpu import SHAPES, Peak, peak_of, scratch, write_model
from measure import Result, Work, in_child, machine, show, write
from rich.console import Console
from rich.table import Table

from selfalign.core.protocols import Request, Sampling
from selfalign.core.records import Message
from selfalign.engines.adapters import skeleton
from selfalign.engines.chat import Chat
from selfalign.engines.config import ModelConfig
from selfalign.engines.loading import load_tokenizer
from selfalign.engines.open import open_engine, release
from selfalign.stages.curate.config import CurateConfig
from selfalign.stages.curate.rubric import CUE, RatingPrompt, rate
from selfalign.stages.prompting import chat

ROUNDS = 3
MUST, OF_VLLM = 0.6, 0.9


@dataclass(frozen=True)
class Load:
    """What is rated and generated, in tokens and rows."""

    shared: int = 900
    own: int = 400
    pairs: int = 512
    document: int = 600
    new: int = 64
    documents: int = 1024
    slots: int = 256


@dataclass(frozen=True)
class Speed:
    """Pairs rated and documents answered a second, and what share of them went as it should."""

    pairs_s: float
    documents_s: float
    right: float


@dataclass(frozen=True)
class Texts:
    """Words of one token each, as many as make up the prompts of a load."""

    prompt: RatingPrompt
    pairs: list[tuple[str, str, str]]
    documents: list[str]


def texts_of(model: ModelConfig, load: Load) -> Texts:
    """The texts, which say nothing."""
    random = Random(0)
    tokenizer = load_tokenizer(model)
    encode = Chat(tokenizer)
    words = sorted(token[1:] for token in tokenizer.get_vocab() if token[0] == "Ġ" and token[1:].isalpha())

    def length(messages: Sequence[Message]) -> int:
        return len(encode.encode([encode.prompt(messages)])[0])

    def some(count: int) -> str:
        return " ".join(random.choices(words, k=count))

    pair = "Question: {instruction}\nAnswer: {response}"
    bare = length(RatingPrompt("", pair).messages("", ""))
    rubric = RatingPrompt(some(load.shared - bare), pair)
    pairs = [(str(n), some(load.own // 10), some(load.own - load.own // 10)) for n in range(load.pairs)]
    around = length(chat(some(1))) - 1
    return Texts(rubric, pairs, [some(load.document - around) for _ in range(load.documents)])


def ours(model: ModelConfig, load: Load, texts: Texts) -> Speed:
    """`rate` and `generate` as the stages call them, on an engine that has seen other texts before."""
    engine = open_engine(model.model_copy(update={"slots": load.slots}))
    other = texts_of(model, Load(load.shared // 2, load.own // 2, 8, load.document // 2, 4, 8, load.slots))
    config = CurateConfig()
    rate(engine, None, other.pairs, config, other.prompt)
    engine.generate([Request("", chat(text)) for text in other.documents], Sampling(temperature=0, max_new_tokens=4))

    began = perf_counter()
    verdicts = rate(engine, None, texts.pairs, config, texts.prompt)
    rated = perf_counter()
    requests = [Request(str(n), chat(text)) for n, text in enumerate(texts.documents)]
    replies = engine.generate(requests, Sampling(temperature=0, max_new_tokens=load.new))
    answered = perf_counter()
    release()
    well = sum(v["rating"] is not None for v in verdicts) + sum(reply.tokens == load.new for reply in replies)
    right = well / (len(verdicts) + len(replies))
    return Speed(len(verdicts) / (rated - began), len(replies) / (answered - rated), right)


def prompts_of(model: ModelConfig, texts: Texts) -> dict[str, list[list[int]]]:
    """The tokens of both, for a peer."""
    encode = Chat(load_tokenizer(model))
    cue = Message(role="assistant", content=CUE.lstrip("\n"))
    rated = [encode.prompt([*texts.prompt.messages(x, y), cue]) for _, x, y in texts.pairs]
    documents = [encode.prompt(chat(text)) for text in texts.documents]
    return {"rate": encode.encode(rated), "generate": encode.encode(documents)}


def vllm(folder: str, file: str) -> Work:
    """Bare vLLM with prefix caching on the tokens in `file`: one token with log-probabilities, then all of a reply."""
    from vllm import LLM, SamplingParams

    given = json.loads(Path(file).read_text("utf-8"))
    new, slots = given["load"]["new"], given["load"]["slots"]
    engine = LLM(model=folder, dtype="bfloat16", enable_prefix_caching=True, max_model_len=4096, max_num_seqs=slots)
    rating = SamplingParams(temperature=0, max_tokens=1, logprobs=5)
    writing = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
    engine.generate([{"prompt_token_ids": ids[::-1]} for ids in given["generate"][:8]], rating, use_tqdm=False)

    def work() -> Any:
        began = perf_counter()
        engine.generate([{"prompt_token_ids": ids} for ids in given["rate"]], rating, use_tqdm=False)
        rated = perf_counter()
        replies = engine.generate([{"prompt_token_ids": ids} for ids in given["generate"]], writing, use_tqdm=False)
        answered = perf_counter()
        right = statistics.mean(len(reply.outputs[0].token_ids) == new for reply in replies)
        return asdict(Speed(len(given["rate"]) / (rated - began), len(replies) / (answered - rated), right))

    return work


def line(shape: Mapping[str, Any], load: Load, peak: Peak) -> Speed:
    """What a card does at half of its peak FLOP/s.

    Two FLOPs a weight and token, without the embeddings, and causal attention. A step of decoding takes that long for
    all slots, or as long as reading weights and keys and values does, whichever is longer.
    """
    with scratch() as folder:
        (folder / "config.json").write_text(json.dumps(dict(shape)))
        model = skeleton(ModelConfig(path=str(folder)))
    config = model.config
    embedding = config.vocab_size * config.hidden_size
    weights = sum(p.numel() for p in model.parameters()) - (1 if config.tie_word_embeddings else 2) * embedding

    def flops(context: float) -> float:
        return float(2 * weights + 4 * config.num_hidden_layers * config.hidden_size * context)

    a_pair = load.own * flops(load.shared + load.own / 2)
    written = load.document + load.new / 2
    heads = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    cached = 2 * 2 * config.num_hidden_layers * heads * written
    computing = load.slots * (flops(written) + 2 * embedding) / (0.5 * peak.flops)
    reading = (2 * (weights + embedding) + load.slots * cached) / peak.bandwidth
    a_document = load.document * flops(load.document / 2) / (0.5 * peak.flops)
    a_document += load.new * max(computing, reading) / load.slots
    return Speed(0.5 * peak.flops / a_pair, 1 / a_document, 1.0)


def by_turns(model: ModelConfig, load: Load, folder: Path) -> dict[str, Speed]:
    """Each side's medians over the rounds."""
    texts = texts_of(model, load)
    found: dict[str, list[Speed]] = {"ours": []}
    tokens = folder / "prompts.json"
    tokens.write_text(json.dumps({**prompts_of(model, texts), "load": asdict(load)}))
    for _ in range(ROUNDS):
        found["ours"].append(ours(model, load, texts))
        if importlib.util.find_spec("vllm"):
            output = in_child("gpu_inference:vllm", model.path, str(tokens)).output
            assert isinstance(output, dict)
            found.setdefault("bare vLLM", []).append(Speed(**output))
    return {
        side: Speed(
            statistics.median(s.pairs_s for s in speeds),
            statistics.median(s.documents_s for s in speeds),
            min(s.right for s in speeds),
        )
        for side, speeds in found.items()
    }


def results(sides: Mapping[str, Speed], goal: Speed, machine: str) -> list[Result]:
    """Rating and generation as shares of the line; they fail where vLLM is much faster, or rows went wrong."""
    made = []
    for name, field in (("gpu_rating", "pairs_s"), ("gpu_generation", "documents_s")):
        mine, theirs = (getattr(sides[side], field) if side in sides else None for side in ("ours", "bare vLLM"))
        compared = "bare vLLM is not installed and was not compared with"
        if theirs is not None:
            compared = f"at least {OF_VLLM} of bare vLLM (it was {mine / theirs:.2f})"
        right = sides["ours"].right
        made.append(
            Result(
                row=name,
                value=mine / getattr(goal, field),
                unit="of the line",
                better="higher",
                must=MUST,
                aim=1.0,
                check=f"{right:.1%} of the rows rated or written to the end (at least 99%); {compared}",
                passed=right >= 0.99 and (theirs is None or mine >= OF_VLLM * theirs),
                rounds=ROUNDS,
                machine=machine,
            )
        )
    return made


def main(arguments: Sequence[str]) -> int:
    """The process's exit code."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", nargs="?", choices=SHAPES, default="llama3.1-8b")
    shape = SHAPES[parser.parse_args(arguments).shape]
    if not torch.cuda.is_available():
        print("there is no GPU here: nothing was measured")
        return 0
    card = torch.cuda.get_device_name()
    with scratch() as folder:
        sides = by_turns(write_model(shape, folder / "model"), Load(), folder)
    peak = peak_of(card)
    goal = None if peak is None else line(shape, Load(), peak)
    table = table_of(sides, goal)
    if goal is None:
        Console(width=None if sys.stdout.isatty() else 160).print(table)
        return 0
    made = results(sides, goal, f"{card}; {machine()}")
    for result in made:
        write(result)
        show(result, table)
    return 0 if all(result.is_met for result in made) else 1


def table_of(sides: Mapping[str, Speed], goal: Speed | None) -> Table:
    """What each side did, and its shares of the line where the card's is known."""
    table = Table("side", "pairs/s", "of the line", "documents/s", "of the line")
    for side, speed in sides.items():
        shares = ("unknown peak",) * 2
        if goal is not None:
            shares = (f"{speed.pairs_s / goal.pairs_s:.0%}", f"{speed.documents_s / goal.documents_s:.0%}")
        table.add_row(side, f"{speed.pairs_s:.1f}", shares[0], f"{speed.documents_s:.1f}", shares[1])
    return table


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
