"""The sequences that are trained: rows as they are, or packed so that hardly a token is padding."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from selfalign.training.preflight import Tokenised

if TYPE_CHECKING:
    from datasets import Dataset


def sequences(rows: Sequence[Tokenised], pack_to: int | None) -> "Dataset":
    """`input_ids` and `labels`, a sequence a row; with `pack_to`, whole rows by best fit in at most that many tokens.

    A packed sequence also has `seq_lengths`, the tokens of each of its rows, from which TRL's collator makes positions
    that begin at 0 in every row. No row may have more than `pack_to` tokens. Best fit decreasing: arXiv 2404.10830.
    """
    import datasets
    from trl import pack_dataset

    columns = {"input_ids": [list(r.input_ids) for r in rows], "labels": [r.labels for r in rows]}
    data = datasets.Dataset.from_dict(columns)
    if pack_to is None or not rows:
        return data
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        # By default every 1,000 rows are packed apart, each time with a last sequence that nothing fills.
        return pack_dataset(data, pack_to, "bfd", map_kwargs={"batch_size": len(rows)})
    finally:
        if shown:
            datasets.enable_progress_bars()
