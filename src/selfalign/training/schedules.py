"""Rows a step and steps by the number of rows, as papers give them: the recipe's `size_schedule`."""

import math
from collections.abc import Sequence
from itertools import pairwise

from selfalign.core.errors import UsageError
from selfalign.training.config import TrainConfig

# arXiv 2308.06259, the table of batch sizes and steps by the number of fine-tuning examples: {rows: steps}, for each
# batch. Its text changes from one batch to the other at 3,000 rows.
SMALL_BATCH, LARGE_BATCH, LARGE_FROM = 8, 32, 3000
SMALL = ((100, 30), (800, 300), (1600, 600))
LARGE = ((3200, 500), (6400, 600), (12_800, 600), (25_600, 1200), (51_200, 1600))


def humpback(rows: int) -> tuple[int, int]:
    """Rows a step and optimiser steps for `rows` training rows, as in arXiv 2308.06259; the table's points exactly.

    What lies between them is ours: straight lines on log-log axes within each batch size, the nearest of them going on
    where its points end (the paper's largest set has 195,043 rows), and steps in proportion to rows below the first.
    With more rows, batch x steps never falls.
    """
    if rows < SMALL[0][0]:
        first, steps = SMALL[0]
        return SMALL_BATCH, max(1, round(steps * rows / first))
    if rows < LARGE_FROM:
        return SMALL_BATCH, _on_lines(rows, SMALL)
    return LARGE_BATCH, _on_lines(rows, LARGE)


def _on_lines(rows: int, points: Sequence[tuple[int, int]]) -> int:
    """Steps at `rows` on the lines through `points`, of which the first and the last go on. Log-log axes."""
    lines = list(pairwise(points))
    (n0, s0), (n1, s1) = next((line for line in lines if rows <= line[1][0]), lines[-1])
    return round(s0 * math.pow(s1 / s0, math.log(rows / n0) / math.log(n1 / n0)))


def scheduled(config: TrainConfig, rows: int) -> TrainConfig:
    """`config` with its `size_schedule` turned into max_steps and gradient_accumulation_steps for `rows` rows.

    Raises UsageError where the batch is no multiple of what the processes take at once.
    """
    if config.size_schedule is None:
        return config
    batch, steps = humpback(rows)
    at_once = config.num_processes * config.per_device_train_batch_size
    if batch % at_once:
        raise UsageError(_unfit(config, rows, batch))
    settled = {"max_steps": steps, "gradient_accumulation_steps": batch // at_once, "size_schedule": None}
    return config.model_copy(update=settled)


def _unfit(config: TrainConfig, rows: int, batch: int) -> str:
    """What to set where `batch` rows cannot be shared out."""
    told = f"size_schedule={config.size_schedule} takes {batch} rows a step where there are {rows}"
    ranks, size = config.num_processes, config.per_device_train_batch_size
    if batch % ranks:
        fitting = ", ".join(str(n) for n in range(1, batch + 1) if batch % n == 0)
        return f"{told}, which num_processes={ranks} cannot share equally; set num_processes to one of {fitting}"
    fitting = ", ".join(str(n) for n in range(1, batch + 1) if batch % (ranks * n) == 0)
    return (
        f"{told}, no multiple of num_processes={ranks} times per_device_train_batch_size={size}; "
        f"set per_device_train_batch_size to {'one of ' if ',' in fitting else ''}{fitting}"
    )
