"""Row 4: our training, packed, against TRL padding to the maximum and TRL padding each batch to its longest row.

`python benchmarks/run.py 4` measures the row; `python benchmarks/sft.py` with options looks at other texts, settings.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

from measure import Result, Spent, Work, by_turns, machine, median_ratio, show
from pydantic import TypeAdapter
from rich.table import Table

from selfalign.core.lease import Lease, Owner
from selfalign.core.records import Example, Message
from selfalign.demo.base import base_folder
from selfalign.engines.config import ModelConfig
from selfalign.engines.loading import load_tokenizer
from selfalign.training.checkpoints import Checkpoints
from selfalign.training.config import TrainConfig
from selfalign.training.preflight import Tokenised, fit, tokenise
from selfalign.training.sft import train

LIMA = Path(__file__).parents[2] / "shared" / "data" / "lima" / "train.jsonl"
MAX_LENGTH = 2_048
ROWS, IN_A_BATCH, ROUNDS = 48, 4, 5
MUST, AIM, ARRIVAL_MUST = 2.5, 3.0, 1.3
LOSSES_WITHIN, NORMS_WITHIN = 1e-4, 1e-3
MODEL = ModelConfig(path=str(base_folder()), dtype="float32")

LIMA_TOKENS = (
    *(31, 82, 141, 190, 246, 286, 319, 349, 380, 413, 451),
    *(484, 535, 579, 641, 750, 896, 1_185, 1_540, 2_046, 3_630),
)
"""Every twentieth of LIMA's first turns, prompt and reply, by their tokens in SmolLM2's vocabulary of 49,152."""

SHARE = 0.44
"""Of a text's characters. The demo's base writes 1.87 characters a token, SmolLM2 4.27: so much of a text leaves as
many tokens as the whole has in a usual vocabulary."""


# The rows


def pairs_of(path: Path | None, count: int | None = None) -> list[tuple[str, str]]:
    """Prompts and replies in LIMA's form, cut to `SHARE`, or made up with LIMA's lengths; a sample where `count` is."""
    if path is None:
        return made_up(1_030 if count is None else count)
    with path.open(encoding="utf-8") as lines:
        turns = [json.loads(line)["conversations"] for line in lines]
    pairs = [(_cut(prompt), _cut(reply)) for prompt, reply, *_ in (each for each in turns if len(each) > 1)]
    return pairs if count is None else Random(0).sample(pairs, min(count, len(pairs)))


def _cut(text: str) -> str:
    return text[: max(1, round(SHARE * len(text)))]


def made_up(count: int) -> list[tuple[str, str]]:
    """Words without sense, one token each, in texts as long as LIMA's, of which a twelfth is prompt."""
    random = Random(0)
    words = sorted(t[1:] for t in load_tokenizer(MODEL).get_vocab() if t[0] == "Ġ" and t[1:].isalpha())
    pairs = []
    for _ in range(count):
        place = random.random() * (len(LIMA_TOKENS) - 1)
        low, high = LIMA_TOKENS[int(place)], LIMA_TOKENS[int(place) + 1]
        tokens = round(low + (high - low) * (place % 1))
        text = random.choices(words, k=tokens)
        asked = max(1, tokens // 12)
        pairs.append((" ".join(text[:asked]), " ".join(text[asked:])))
    return pairs


def examples_of(pairs: Sequence[tuple[str, str]]) -> list[Example]:
    """Training examples."""
    return [
        Example(
            id=str(number),
            kind="seed",
            prompt=(Message(role="user", content=prompt),),
            completion=(Message(role="assistant", content=reply),),
        )
        for number, (prompt, reply) in enumerate(pairs)
    ]


def rows_of(examples: Sequence[Example]) -> list[Tokenised]:
    """The rows that all sides train, at most `MAX_LENGTH` tokens each."""
    tokenizer = load_tokenizer(MODEL)
    return fit((tokenise(each, tokenizer) for each in examples), MAX_LENGTH)[0]


# The sides: each tokenises, loads, trains one step on all rows, saves, and tells the loss and the gradient's norm.

Step = Callable[[Sequence[Example], Path], dict[str, float]]
_SAME = {
    "max_length": MAX_LENGTH,
    "per_device_train_batch_size": IN_A_BATCH,
    "num_train_epochs": 1,
    "logging_steps": 1,
    "gradient_checkpointing": False,
}


def ours(pairs: str, scratch: str, how: str) -> Work:
    """`train` as a recipe calls it, under the settings in `how`."""

    def step(examples: Sequence[Example], folder: Path) -> dict[str, float]:
        settings = {**_SAME, **json.loads(how), "gradient_accumulation_steps": len(examples)}
        logged: list[Mapping[str, float]] = []
        checkpoints = Checkpoints(folder / "kept", "row 4", Lease(folder / "lease.json", Owner.this_process()))
        train(examples, MODEL, TrainConfig(**settings), folder / "model", 0, logged.append, checkpoints)
        last = next(each for each in reversed(logged) if "loss" in each)
        return {"loss": last["loss"], "norm": last["grad_norm"]}

    return _prepared(step, pairs, scratch)


def trl(pairs: str, scratch: str, how: str) -> Work:
    """TRL's SFTTrainer over the same rows, with its own collator and loss, under the settings in `how`."""
    # It would tell its makers.
    os.environ["HF_HUB_OFFLINE"] = "1"
    settings = {**_SAME, **json.loads(how)}

    def step(examples: Sequence[Example], folder: Path) -> dict[str, float]:
        import datasets
        import torch
        from transformers import AutoModelForCausalLM
        from trl import SFTConfig, SFTTrainer

        torch.set_num_threads(1)
        rows = [{"input_ids": list(row.input_ids), "labels": row.labels} for row in rows_of(examples)]
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(MODEL.path, dtype=torch.float32),
            args=SFTConfig(
                **settings,
                output_dir=str(folder),
                gradient_accumulation_steps=len(rows),
                dataset_kwargs={"skip_prepare_dataset": True},
                use_cpu=True,
                bf16=False,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=load_tokenizer(MODEL),
        )
        trainer.train()
        trainer.save_model(str(folder / "model"))
        logged = trainer.state.log_history[0]
        return {"loss": logged["loss"], "norm": logged["grad_norm"]}

    return _prepared(step, pairs, scratch)


def _prepared(step: Step, pairs: str, scratch: str) -> Work:
    """The step over all rows, once it has been taken on two, which imports what is imported late."""
    examples = examples_of(TypeAdapter(list[tuple[str, str]]).validate_json(Path(pairs).read_bytes()))

    def work(count: int | None = None) -> object:
        # The libraries write to stdout, where nothing but the measure is expected.
        with TemporaryDirectory(dir=scratch) as folder, redirect_stdout(sys.stderr):
            return step(examples[:count], Path(folder))

    work(2)
    return work


# The row


@dataclass(frozen=True)
class Checked:
    """By how much losses (per trained token) and gradient norms (relative) of all sides and rounds differ at most."""

    losses: float
    norms: float

    @property
    def holds(self) -> bool:
        """Whether all sides have trained the same."""
        return self.losses <= LOSSES_WITHIN and self.norms <= NORMS_WITHIN


def check(outputs: Sequence[Mapping[str, float]]) -> Checked:
    """Hold what the sides tell against each other: equal weights and rows give equal losses and gradient norms."""
    losses, norms = [each["loss"] for each in outputs], [each["norm"] for each in outputs]
    return Checked(max(losses) - min(losses), max(norms) / min(norms) - 1)


def measured(pairs: Sequence[tuple[str, str]], rounds: int, **more: object) -> tuple[Result, Table]:
    """Measure all sides on the pairs, with `more` settings, which TRL and we call the same."""
    how = {
        "packed": ("ours", {"packing": True}),
        "grouped by length": ("ours", {"group_by_length": True}),
        "TRL, in arrival order": ("trl", {}),
        "TRL, to the maximum": ("trl", {"pad_to_multiple_of": MAX_LENGTH}),
    }
    with TemporaryDirectory(prefix="sft-") as folder:
        file = Path(folder) / "pairs.json"
        file.write_text(json.dumps(pairs), "utf-8")
        sides = {
            name: (f"sft:{side}", str(file), folder, json.dumps({**settings, **more}))
            for name, (side, settings) in how.items()
        }
        spent = by_turns(sides, rounds)
    tokens = sum(len(row.input_ids) for row in rows_of(examples_of(pairs)))
    told = [TypeAdapter(dict[str, float]).validate_python(s.output) for each in spent for s in each.values()]
    return result_of(spent, check(told), len(pairs), tokens)


def result_of(spent: Sequence[Mapping[str, Spent]], held: Checked, rows: int, tokens: int) -> tuple[Result, Table]:
    """The row from what the sides spent: it counts only where they were held to have trained the same."""
    cpu = {name: [each[name].cpu_s for each in spent] for name in spent[0]}
    times = {name: median_ratio(seconds, cpu["packed"]) for name, seconds in cpu.items()}
    details = Table("", "CPU-s", "useful tokens a CPU-s", "packed is faster", "peak MiB")
    for name, seconds in cpu.items():
        peak = statistics.median(each[name].peak_bytes / 2**20 for each in spent)
        middle = statistics.median(seconds)
        details.add_row(name, f"{middle:.2f}", f"{tokens / middle:,.0f}", f"{times[name]:.2f}×", f"{peak:.0f}")
    arrival = times["TRL, in arrival order"]
    result = Result(
        row="4",
        value=times["TRL, to the maximum"] if held.holds else None,
        unit="times TRL's useful tokens a CPU-second, padding to the maximum",
        better="higher",
        must=MUST,
        aim=AIM,
        check=f"{rows} rows of {tokens} tokens in one step: losses within {held.losses:.1g} "
        f"(at most {LOSSES_WITHIN:g}), gradient norms within {held.norms:.1g} (at most {NORMS_WITHIN:g}); "
        f"{arrival:.2f} times padding in arrival order, at least {ARRIVAL_MUST}",
        passed=held.holds and arrival >= ARRIVAL_MUST,
        rounds=len(spent),
        machine=machine(),
    )
    return result, details


def row() -> tuple[Result, Table]:
    """The row under its own conditions: LIMA where this checkout has it beside it, else texts as long."""
    return measured(pairs_of(LIMA if LIMA.is_file() else None, ROWS), ROUNDS)


def main(arguments: list[str]) -> int:
    """The process's exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--texts", type=Path, help="a file in LIMA's form, JSON Lines with `conversations`; else made up"
    )
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--batch", type=int, default=IN_A_BATCH, help="per_device_train_batch_size of all sides")
    parser.add_argument("--checkpointing", action="store_true", help="with gradient checkpointing on all sides")
    given = parser.parse_args(arguments)
    result, details = measured(
        pairs_of(given.texts, given.rows),
        given.rounds,
        per_device_train_batch_size=given.batch,
        gradient_checkpointing=given.checkpointing,
    )
    show(result, details)
    return 0 if result.is_met else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
