"""Rows 3 and 3b: our generation against `generate` prompt by prompt, and against batches sorted by their prompts.

`python benchmarks/run.py 3` measures a row; `python benchmarks/generation.py ROW` with options takes another model.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

from measure import Result, Spent, Work, by_turns, machine, median_ratio, show
from pydantic import TypeAdapter
from rich.table import Table

from selfalign.core.protocols import Request, Sampling
from selfalign.demo.base import base_folder
from selfalign.demo.pages import page
from selfalign.engines.config import ModelConfig
from selfalign.engines.loading import load_model, load_tokenizer
from selfalign.engines.open import open_engine
from selfalign.stages.prompting import chat

SLOTS = 16
PROMPTS, NEW = 256, 128
FEW, FEW_NEW = 32, 48
"""Where the model is not the demo's."""

ROUNDS = 5

PAGE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
"""The demo's base goes on with a page as it has read it, without marks of who speaks."""

Told = list[tuple[str, int]]
"""Replies, and how many tokens each has, the stop token among them."""


@dataclass(frozen=True)
class Job:
    """Prompts that the model in the folder `model` goes on with, greedily, in at most `new` tokens each."""

    model: str
    chat_template: str | None
    prompts: list[str]
    new: int

    @property
    def config(self) -> ModelConfig:
        """How all sides load it."""
        return ModelConfig(path=self.model, dtype="float32", chat_template=self.chat_template, slots=SLOTS)

    def write(self, file: Path) -> None:
        """Write the job."""
        file.write_text(json.dumps(asdict(self)), "utf-8")

    @staticmethod
    def read(file: str) -> "Job":
        """The job in a file."""
        return TypeAdapter(Job).validate_json(Path(file).read_bytes())


def job_of(folder: Path, count: int, new: int) -> Job:
    """Pages of questions and answers from the demo's world, each broken off somewhere in its first two thirds.

    The demo's base completes them, another model is given them in its chat template.
    """
    random = Random(0)
    pages = [str(page("faq", random)) for _ in range(count)]
    prompts = [text[: random.randint(8, max(8, len(text) * 2 // 3))].rstrip() for text in pages]
    return Job(str(folder), PAGE if folder == base_folder() else None, prompts, new)


# The sides. Each has loaded its model and done the work on two prompts before it is measured.


def ours(file: str) -> Work:
    """`Engine.generate`, as the stages call it."""
    job = Job.read(file)
    engine = open_engine(job.config)

    def work(count: int | None = None) -> Told:
        requests = [Request(str(n), chat(prompt)) for n, prompt in enumerate(job.prompts[:count])]
        replies = engine.generate(requests, Sampling(temperature=0, max_new_tokens=job.new))
        return [(reply.text, reply.tokens) for reply in replies]

    work(2)
    return work


def batched(file: str, rows: str) -> Work:
    """`generate` of transformers on `rows` prompts at a time, sorted by length and padded on the left."""
    import torch

    job = Job.read(file)
    tokenizer, model = load_tokenizer(job.config), load_model(job.config)
    tokenizer.padding_side = "left"
    torch.set_num_threads(1)

    def work(count: int | None = None) -> Told:
        rendered = [
            tokenizer.apply_chat_template(list(chat(prompt)), tokenize=False, add_generation_prompt=True)
            for prompt in job.prompts[:count]
        ]
        prompts = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        order = sorted(range(len(prompts)), key=lambda at: len(prompts[at]))
        told: dict[int, tuple[str, int]] = {}
        for start in range(0, len(order), int(rows)):
            chosen = order[start : start + int(rows)]
            batch = tokenizer.pad({"input_ids": [prompts[at] for at in chosen]}, return_tensors="pt")
            out = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                do_sample=False,
                max_new_tokens=job.new,
                pad_token_id=tokenizer.pad_token_id,
            )
            for at, new in zip(chosen, out[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
                stop = new.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in new else len(new)
                told[at] = (tokenizer.decode(new[:stop], skip_special_tokens=True).lstrip(), stop)
        return [told[at] for at in range(len(prompts))]

    work(2)
    return work


# The rows


@dataclass(frozen=True)
class Row:
    """What a row must be, and how many prompts the peer takes at a time."""

    must: float
    aim: float
    at_a_time: int
    peer: str


ROWS = {
    "3": Row(2.5, 4, 1, "generate, one by one"),
    "3b": Row(1.1, 1.3, SLOTS, f"generate, batches of {SLOTS} sorted by prompt"),
}


def measured(name: str, job: Job, rounds: int) -> tuple[Result, Table]:
    """Measure row `name` on a job."""
    row = ROWS[name]
    with TemporaryDirectory(prefix="generation-") as scratch:
        file = Path(scratch) / "job.json"
        job.write(file)
        sides = {
            "ours": ("generation:ours", str(file)),
            row.peer: ("generation:batched", str(file), str(row.at_a_time)),
        }
        spent = by_turns(sides, rounds)
    return result_of(name, spent)


def differing(spent: Sequence[Mapping[str, Spent]]) -> tuple[int, Told]:
    """How many replies are not the same on all sides in all rounds, in text and number of tokens; and ours."""
    told = [TypeAdapter(Told).validate_python(side.output) for each in spent for side in each.values()]
    return sum(len(set(same)) > 1 for same in zip(*told, strict=True)), told[0]


def result_of(name: str, spent: Sequence[Mapping[str, Spent]]) -> tuple[Result, Table]:
    """The row from what the sides spent. It counts only where all replies are the same."""
    row = ROWS[name]
    cpu = {side: [each[side].cpu_s for each in spent] for side in spent[0]}
    different, told = differing(spent)
    lengths = sorted(tokens for _, tokens in told)
    details = Table("", "CPU-s", "new tokens a CPU-s", "ours is faster")
    for side, seconds in cpu.items():
        middle = statistics.median(seconds)
        times = median_ratio(seconds, cpu["ours"])
        details.add_row(side, f"{middle:.2f}", f"{sum(lengths) / middle:,.0f}", f"{times:.2f}×")
    deciles = statistics.quantiles(lengths, n=10)
    result = Result(
        row=name,
        value=median_ratio(cpu[row.peer], cpu["ours"]) if different == 0 else None,
        unit=f"times the tokens a CPU-second of {row.peer}",
        better="higher",
        must=row.must,
        aim=row.aim,
        check=f"{len(told)} replies of {lengths[0]} to {lengths[-1]} tokens (deciles {deciles[0]:.0f}, "
        f"{deciles[4]:.0f}, {deciles[8]:.0f}), {SLOTS} slots: {different} differ in text or number of tokens",
        passed=different == 0,
        rounds=len(spent),
        machine=machine(),
    )
    return result, details


def _row(name: str) -> tuple[Result, Table]:
    return measured(name, job_of(base_folder(), PROMPTS, NEW), ROUNDS)


row_3, row_3b = (partial(_row, name) for name in ROWS)
"""The rows under their own conditions."""


def main(arguments: list[str]) -> int:
    """The process's exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("row", choices=ROWS)
    parser.add_argument("--model", type=Path, default=base_folder(), help="a folder; the demo's base by default")
    parser.add_argument("--prompts", type=int, help=f"{PROMPTS} for the demo's base, {FEW} for another model")
    parser.add_argument("--new", type=int, help=f"tokens of a reply at most, {NEW} or {FEW_NEW}")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    given = parser.parse_args(arguments)
    count, new = (PROMPTS, NEW) if given.model == base_folder() else (FEW, FEW_NEW)
    result, details = measured(given.row, job_of(given.model, given.prompts or count, given.new or new), given.rounds)
    show(result, details)
    return 0 if result.is_met else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
