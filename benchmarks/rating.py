"""Rows 2, 2b and 2c: our rating against distilabel's, against batched `generate`, and against prefills without a cache.

`python benchmarks/run.py 2` measures a row; `python benchmarks/rating.py ROW` with options takes another model.
"""

import argparse
import json
import math
import re
import shutil
import statistics
import sys
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

from measure import Result, Spent, Work, by_turns, in_child, machine, median_ratio, show
from pydantic import TypeAdapter
from rich.table import Table
from sft import LIMA, pairs_of

from selfalign.core.errors import UsageError
from selfalign.core.protocols import Request
from selfalign.core.records import Message
from selfalign.demo.base import base_folder
from selfalign.engines.chat import Chat, common_prefix
from selfalign.engines.config import ModelConfig
from selfalign.engines.loading import load_model, load_tokenizer
from selfalign.engines.open import open_engine, release
from selfalign.evaluation.metrics import spearman
from selfalign.stages.curate.config import CurateConfig
from selfalign.stages.curate.rubric import CONTINUATIONS, CUE, GRADES, RatingPrompt, rate
from selfalign.stages.prompting import fill

EXAMPLES = Path(__file__).parents[1] / "recipes" / "prompts" / "rate_examples.jsonl"
DISTILABEL_SIDE = "distilabel_side:rates"
DISTILABEL = Path(__file__).parents[1] / ".venv-distilabel" / "bin" / "python"

SHARED, OWN, NEW = 553, 120, 120
LONG_SHARED, LONG_OWN = 900, 400
PAIRS, ROUNDS = 32, 5

BATCH, BATCH_ENDING = 16, 8
"""Rows that the peer of 2b generates for at a time: of 1, 4, 8, 16 and 32 the fastest, in CPU-seconds, where replies do
not end before the limit, and where they do."""

WITHIN = 1e-4


# The work that all sides do


@dataclass(frozen=True)
class Job:
    """Pairs to be rated by the model in the folder `model`. `new` is how many tokens a peer may write."""

    model: str
    prompt: RatingPrompt
    pairs: list[tuple[str, str, str]]
    new: int

    @property
    def config(self) -> ModelConfig:
        """How all sides load it."""
        return ModelConfig(path=self.model, dtype="float32")

    @property
    def conversations(self) -> list[list[Message]]:
        """What the peers are asked."""
        return [list(self.prompt.messages(instruction, response)) for _, instruction, response in self.pairs]

    def write(self, file: Path) -> None:
        """Write the job, and the conversations for a peer that has none of our code."""
        file.write_text(json.dumps({**asdict(self), "conversations": self.conversations}), "utf-8")

    @staticmethod
    def read(file: str) -> "Job":
        """The job in a file."""
        return TypeAdapter(Job).validate_json(Path(file).read_bytes())


def job_of(folder: Path, count: int, shared: int, own: int, new: int = NEW) -> Job:
    """Pairs of LIMA (made-up ones where it is not there) under our rubric and examples.

    What all prompts begin with is cut to `shared` tokens, and responses so that a pair adds from half of `own` tokens
    to half as many again.
    """
    config = ModelConfig(path=str(folder), dtype="float32")
    chat = Chat(load_tokenizer(config))
    ours = RatingPrompt.of(CurateConfig(few_shot_file=str(EXAMPLES)))
    pairs = _cut(pairs_of(LIMA if LIMA.is_file() else None), count, own, chat)
    shots = [fill(ours.pair, instruction=x, response=y) + f"\n\n{reply}" for x, y, reply in ours.few_shot]
    # In a large vocabulary they are short: then they are said again.
    text = "\n\n".join([ours.rubric, *shots * 3])

    def sharing(characters: int) -> int:
        prompt = RatingPrompt(text[:characters], ours.pair)
        return common_prefix(chat.encode([chat.prompt(prompt.messages(x, y)) for _, x, y in pairs]))

    prompt = RatingPrompt(text[: bisect_left(range(len(text)), shared, key=sharing)], ours.pair)
    return Job(str(folder), prompt, pairs, new)


def _cut(pairs: Sequence[tuple[str, str]], count: int, own: int, chat: Chat) -> list[tuple[str, str, str]]:
    random = Random(0)
    sizes = [round(own * (0.5 + (n + 0.5) / count)) for n in range(count)]
    random.shuffle(sizes)
    done: list[tuple[str, str, str]] = []
    for instruction, response in random.sample(pairs, len(pairs)):
        if len(done) == count:
            break
        asked, answer = chat.encode([instruction, response])
        # No response falls short, so that the mean is what is wanted.
        if len(asked) <= own / 4 and len(answer) >= 1.5 * own:
            kept = chat.decode(answer[: sizes[len(done)] - len(asked)])
            done.append((str(len(done)), instruction, kept))
    return done


def tokens_of(job: Job) -> tuple[int, float]:
    """How many tokens all prompts share, and how many each adds, on average."""
    chat = Chat(load_tokenizer(job.config))
    ids = chat.encode([chat.prompt(each) for each in job.conversations])
    shared = common_prefix(ids)
    return shared, statistics.mean(len(each) - shared for each in ids)


# The sides. Each has loaded its model and done the work on two pairs before it is measured.


def ours(file: str) -> Work:
    """`rate` as the curation stage calls it. The shared prompt's keys and values are part of the work."""
    job = Job.read(file)

    def work(count: int | None = None) -> list[float | None]:
        rated = rate(open_engine(job.config), None, job.pairs[:count], CurateConfig(), job.prompt)
        return [verdict["rating"] for verdict in rated]

    work(2)
    release()
    open_engine(job.config)
    return work


def uncached(file: str) -> Work:
    """Every prompt in a pass of its own, one after the other: for a CPU the fastest way without a cache."""
    job = Job.read(file)
    read = _reader(job)

    def work(count: int | None = None) -> list[float]:
        return [_mean_grade(read(messages)) for messages in job.conversations[:count]]

    work(2)
    return work


def batched(file: str, folder: str, rows: str) -> Work:
    """`generate` on `rows` prompts of like length at a time, padded on the left; the model is in `folder`."""
    import torch

    job = Job.read(file)
    config = ModelConfig(path=folder, dtype="float32")
    tokenizer, model = load_tokenizer(config), load_model(config)
    tokenizer.padding_side = "left"
    torch.set_num_threads(1)

    def work(count: int | None = None) -> list[str]:
        rendered = [
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            for messages in job.conversations[:count]
        ]
        lengths = [len(ids) for ids in tokenizer(rendered, add_special_tokens=False)["input_ids"]]
        order = sorted(range(len(rendered)), key=lambda at: lengths[at])
        replies = [""] * len(rendered)
        for start in range(0, len(order), int(rows)):
            chosen = order[start : start + int(rows)]
            batch = tokenizer(
                [rendered[at] for at in chosen], add_special_tokens=False, padding=True, return_tensors="pt"
            )
            out = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                do_sample=False,
                max_new_tokens=job.new,
                pad_token_id=tokenizer.pad_token_id,
            )
            texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
            for at, text in zip(chosen, texts, strict=True):
                replies[at] = text
        return replies

    work(2)
    return work


def _reader(job: Job) -> Callable[[Sequence[Message]], list[float]]:
    """Log-probabilities of the five grades behind a conversation, by transformers alone."""
    import torch

    tokenizer, model = load_tokenizer(job.config), load_model(job.config)
    chat = Chat(tokenizer)
    torch.set_num_threads(1)
    asked = [*job.conversations[0], Message(role="assistant", content=CUE.lstrip("\n"))]
    opened, *joints = chat.encode([chat.prompt(asked), *(chat.prompt(asked, grade) for grade in CONTINUATIONS)])
    # Some tokenizers write a grade's space as a token of its own, which all grades share.
    place = common_prefix(joints)
    between, grades = joints[0][len(opened) : place], [joint[place] for joint in joints]

    def read(messages: Sequence[Message]) -> list[float]:
        text = chat.prompt([*messages, Message(role="assistant", content=CUE.lstrip("\n"))])
        ids = torch.tensor([chat.encode([text])[0] + between])
        with torch.inference_mode():
            logits_BLV = model(input_ids=ids, use_cache=False, logits_to_keep=len(between) + 1).logits
        logs_LV = logits_BLV[0].log_softmax(-1)
        logs: list[float] = (logs_LV[-1, grades] + logs_LV[range(len(between)), between].sum()).tolist()
        return logs

    return read


def _mean_grade(logs: Sequence[float]) -> float:
    shares = [math.exp(log) for log in logs]
    return sum(grade * share for grade, share in zip(GRADES, shares, strict=True)) / sum(shares)


# The checks


def logits_differ(job: Job) -> float:
    """By how much the grades' log-probabilities from our engine, behind its cached prefix, differ at most from those of
    prefills without any."""
    cue = Message(role="assistant", content=CUE.lstrip("\n"))
    requests = [Request(str(n), (*messages, cue)) for n, messages in enumerate(job.conversations)]
    scores = open_engine(job.config).score(requests, [CONTINUATIONS] * len(requests))
    release()
    read = _reader(job)
    found: list[float] = []
    for row, messages in zip(scores, job.conversations, strict=True):
        if row is None:
            return math.inf
        found += [abs(score.log_prob - log) for score, log in zip(row, read(messages), strict=True)]
    return _largest(found)


def ratings_differ(spent: Sequence[Mapping[str, Spent]]) -> float:
    """By how much the ratings of all sides and rounds differ at most; infinitely where one is missing."""
    told = [TypeAdapter(list[float | None]).validate_python(side.output) for each in spent for side in each.values()]
    return _largest([math.inf if None in same else max(same) - min(same) for same in zip(*told, strict=True)])


def _largest(differences: Sequence[float]) -> float:
    # A maximum would not see what is not a number.
    return max(differences) if all(map(math.isfinite, differences)) else math.inf


def grade_in(reply: str) -> int | None:
    """What a peer reads: the first score of a reply."""
    found = re.search(r"Score:\s*([1-5])", reply)
    return int(found[1]) if found else None


def agreement(ours: Sequence[float | None], replies: Sequence[str]) -> str:
    """How ratings and a peer's replies agree, in words."""
    graded = zip(ours, map(grade_in, replies), strict=True)
    both = [(rating, grade) for rating, grade in graded if rating is not None and grade is not None]
    told = f"{len(both)} of {len(replies)} replies hold a score"
    if not both:
        return told
    near = sum(abs(rating - grade) <= 1 for rating, grade in both)
    mine, theirs = zip(*both, strict=True)
    rho = spearman(mine, theirs)
    return f"{told}, {near} of them within 1 of our rating" + ("" if rho is None else f", Spearman {rho:.2f}")


# The rows


@dataclass(frozen=True)
class Row:
    """What a row must be, and the side that its value is measured against.

    `few` pairs are enough for minutes where the model is not the demo's.
    """

    shared: int
    own: int
    few: int
    must: float
    aim: float
    against: str
    unit: str


ROWS = {
    "2": Row(SHARED, OWN, 4, 10, 20, f"distilabel, {NEW} new", "times distilabel's ratings a CPU-second"),
    "2b": Row(SHARED, OWN, 4, 4, 6, f"batched, {NEW} new", "times the ratings a CPU-second of batched generate"),
    "2c": Row(LONG_SHARED, LONG_OWN, 8, 1.8, 2.8, "uncached", "times the ratings a CPU-second of uncached prefills"),
}


def measured(name: str, folder: Path, count: int, rounds: int) -> tuple[Result, Table]:
    """Measure row `name` on the model in `folder` with `count` pairs. UsageError where its peer is not installed."""
    if name == "2" and not DISTILABEL.is_file():
        raise UsageError("row 2 compares with distilabel, which has an environment of its own: make bench-peers")
    row = ROWS[name]
    job = job_of(folder, count, row.shared, row.own)
    with TemporaryDirectory(prefix="rating-") as scratch:
        file = str(Path(scratch) / "job.json")
        job.write(Path(file))
        sides = {"ours": ("rating:ours", file)}
        if name == "2c":
            sides["uncached"] = ("rating:uncached", file)
        else:
            endless = without_stop(folder, Path(scratch) / "model")
            sides[row.against] = _peer(name, file, endless, BATCH)
        foreign = str(DISTILABEL) if name == "2" else sys.executable
        spent = by_turns(sides, rounds, {row.against: foreign})
        # For what the peer says, and what it takes, where its replies end.
        ending = None if name == "2c" else in_child(*_peer(name, file, folder, BATCH_ENDING), interpreter=foreign)
    return result_of(name, job, spent, ending, ratings_differ(spent) if ending is None else logits_differ(job))


def _peer(name: str, file: str, folder: Path, rows: int) -> tuple[str, ...]:
    """The peer of row 2 or 2b on the model in `folder`, as `in_child` takes it."""
    return ("rating:batched", file, str(folder), str(rows)) if name == "2b" else (DISTILABEL_SIDE, file, str(folder))


def without_stop(folder: Path, copy: Path) -> Path:
    """A copy of the model whose replies do not end before the limit, since it names no stop token."""
    shutil.copytree(folder, copy)
    settings = json.loads((copy / "generation_config.json").read_text("utf-8"))
    settings.pop("eos_token_id", None)
    (copy / "generation_config.json").write_text(json.dumps(settings), "utf-8")
    return copy


def result_of(
    name: str, job: Job, spent: Sequence[Mapping[str, Spent]], ending: Spent | None, difference: float
) -> tuple[Result, Table]:
    """The row from what the sides spent. It counts only where what is held against each other differs by little.

    `ending` is what the peer spent once where its replies end.
    """
    row = ROWS[name]
    cpu = {side: [each[side].cpu_s for each in spent] for side in spent[0]}
    times = {side: median_ratio(seconds, cpu["ours"]) for side, seconds in cpu.items()}
    details = Table("", "CPU-s", "ms a pair", "ours is faster", "")
    pairs = len(job.pairs)
    for side, seconds in cpu.items():
        middle = statistics.median(seconds)
        details.add_row(side, f"{middle:.2f}", f"{1e3 * middle / pairs:.1f}", f"{times[side]:.2f}×", "")
    if ending is not None:
        ours = spent[0]["ours"]
        rated = TypeAdapter(list[float | None]).validate_python(ours.output)
        told = agreement(rated, TypeAdapter(list[str]).validate_python(ending.output))
        faster = ending.cpu_s / statistics.median(cpu["ours"])
        took = (f"{ending.cpu_s:.2f}", f"{1e3 * ending.cpu_s / pairs:.1f}", f"{faster:.2f}×")
        details.add_row("the same, ending where it would (once)", *took, told)
    shared, own = tokens_of(job)
    what = "ratings" if name == "2c" else "log-probabilities of the grades, cached and not,"
    result = Result(
        row=name,
        value=times[row.against] if difference <= WITHIN else None,
        unit=row.unit,
        better="higher",
        must=row.must,
        aim=row.aim,
        check=f"{pairs} pairs, {shared} tokens shared and {own:.0f} of their own: {what} within "
        f"{difference:.1g} (at most {WITHIN:g})",
        passed=difference <= WITHIN,
        rounds=len(spent),
        machine=machine(),
    )
    return result, details


def _row(name: str) -> tuple[Result, Table]:
    return measured(name, base_folder(), PAIRS, ROUNDS)


row_2, row_2b, row_2c = (partial(_row, name) for name in ROWS)
"""The rows under their own conditions."""


def main(arguments: list[str]) -> int:
    """The process's exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("row", choices=ROWS)
    parser.add_argument("--model", type=Path, default=base_folder(), help="a folder; the demo's base by default")
    parser.add_argument("--pairs", type=int, help=f"{PAIRS} for the demo's base, 4 or 8 for another model")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    given = parser.parse_args(arguments)
    count = given.pairs or (PAIRS if given.model == base_folder() else ROWS[given.row].few)
    result, details = measured(given.row, given.model, count, given.rounds)
    show(result, details)
    return 0 if result.is_met else 1


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UsageError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
