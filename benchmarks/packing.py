"""Row 4b: how full packed sequences are, and that no document of one sees another.

`python benchmarks/run.py 4b` measures the row; `python benchmarks/packing.py` with options looks at other texts.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

from measure import Result, machine, show
from rich.table import Table
from sft import IN_A_BATCH, LIMA, MAX_LENGTH, MODEL, examples_of, pairs_of, rows_of

from selfalign.engines.loading import load_model
from selfalign.training.attention import choose_attention
from selfalign.training.packing import sequences
from selfalign.training.preflight import Tokenised

MUST, AIM, LEAKAGE_MUST = 0.98, 0.995, 1e-4


@dataclass(frozen=True)
class Leakage:
    """Largest differences between a document's logits in its pack and elsewhere.

    `alone`: the document by itself; `replaced`: the same pack with another text in every other document; `ones`: the
    document by itself, and its pack under a mask of ones, which hides no document from another.
    """

    alone: float
    replaced: float
    ones: float


def batches(packed: Any, size: int) -> Iterator[dict[str, Any]]:
    """Packed sequences as the trainer gives them to the model: `size` of them in one row, without a mask."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    for start in range(0, len(packed), size):
        batch: dict[str, Any] = collate([packed[place] for place in range(start, min(start + size, len(packed)))])
        del batch["labels"]
        yield batch


def leakage(packed: Any) -> Leakage:
    """Of all documents of all packs; under a mask of ones, which is slow, of the first batch alone."""
    import torch

    torch.set_num_threads(MODEL.threads)
    model = load_model(MODEL)
    choose_attention(model, packed=True)
    alone, replaced, ones = [], [], []

    def logits(**inputs: Any) -> Any:
        return model(**inputs, use_cache=False).logits[0]

    def largest(one: Any, other: Any) -> Any:
        return (one - other).abs().max()

    with torch.no_grad():
        for batch in batches(packed, IN_A_BATCH):
            ids = batch["input_ids"]
            bounds = list(pairwise(batch["cu_seq_lens_q"].tolist()))
            apart = logits(**batch)
            single = torch.cat([logits(input_ids=ids[:, start:end]) for start, end in bounds])
            alone.append(largest(apart, single))
            if not ones:
                ones.append(largest(logits(**batch, attention_mask=torch.ones_like(ids)), single))
            # Every second document becomes another, first those between, then the rest.
            odd_T = torch.cat([torch.full((end - start,), bool(n % 2)) for n, (start, end) in enumerate(bounds)])
            for same_T in (odd_T, ~odd_T) if odd_T.any() else ():
                other = torch.where(same_T, ids, (ids + 1) % model.config.vocab_size)
                replaced.append(largest(logits(**{**batch, "input_ids": other})[same_T], apart[same_T]))
    return Leakage(*(float(torch.stack(each).max()) for each in (alone, replaced, ones)))


def fills(rows: Sequence[Tokenised], packed: Any) -> dict[str, float]:
    """The share of tokens that is no padding, by how the rows are laid out."""
    lengths = [len(row.input_ids) for row in rows]

    def padded(order: Sequence[int]) -> float:
        places = range(0, len(order), IN_A_BATCH)
        return sum(order) / sum(max(b) * len(b) for b in (order[i : i + IN_A_BATCH] for i in places))

    return {
        "packed": sum(lengths) / (len(packed) * MAX_LENGTH),
        "sorted by length": padded(sorted(lengths)),
        "padded in shuffled order": padded(Random(0).sample(lengths, len(lengths))),
        "padded to the maximum": sum(lengths) / (len(rows) * MAX_LENGTH),
    }


def measured(pairs: Sequence[tuple[str, str]]) -> tuple[Result, Table]:
    """Measure the pairs' packs."""
    rows = rows_of(examples_of(pairs))
    packed = sequences(rows, MAX_LENGTH)
    fill, found = fills(rows, packed), leakage(packed)
    tokens = sum(len(row.input_ids) for row in rows)
    whole = sum(map(len, packed["input_ids"])) == tokens and sum(map(len, packed["seq_lengths"])) == len(rows)
    details = Table("", "")
    for name, share in fill.items():
        details.add_row(f"tokens that are no padding: {name}", f"{share:.1%}")
    for name, difference in {
        "alone": found.alone,
        "beside other texts": found.replaced,
        "alone, and the pack under a mask of ones": found.ones,
    }.items():
        details.add_row(f"largest logit difference of a document in its pack and {name}", f"{difference:.2g}")
    result = Result(
        row="4b",
        value=fill["packed"],
        unit="of the packed tokens are no padding",
        better="higher",
        must=MUST,
        aim=AIM,
        check=f"{len(rows)} rows of {tokens} tokens in {len(packed)} sequences, {'none' if whole else 'SOME'} lost; "
        f"largest logit difference of a document in its pack and alone {found.alone:.1g} (at most {LEAKAGE_MUST:g}), "
        f"and beside other texts {found.replaced:.1g} (at most 0)",
        passed=whole and found.alone <= LEAKAGE_MUST and found.replaced == 0,
        rounds=1,
        machine=machine(),
    )
    return result, details


def row() -> tuple[Result, Table]:
    """The row under its own conditions: LIMA where this checkout has it beside it, else texts as long."""
    return measured(pairs_of(LIMA if LIMA.is_file() else None))


def main(arguments: list[str]) -> int:
    """The process's exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=Path, help="JSON Lines with `conversations`, as LIMA's; else made up")
    parser.add_argument("--rows", type=int, help="a sample of so many")
    given = parser.parse_args(arguments)
    result, details = measured(pairs_of(given.texts, given.rows))
    show(result, details)
    return 0 if result.is_met else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
