"""The processes that train together: who this one is (RANK, WORLD_SIZE), and how they agree."""

import os
from typing import TypeVar

T = TypeVar("T")


def rank() -> int:
    """This process's number, 0 where it is alone."""
    return int(os.environ.get("RANK", "0"))


def size() -> int:
    """How many there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def from_first(value: T) -> T:
    """What rank 0 holds as `value`, which need mean nothing elsewhere."""
    if size() == 1:
        return value
    import torch.distributed

    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def total(value: int) -> int:
    """The sum of all ranks' values."""
    if size() == 1:
        return value
    import torch
    import torch.distributed

    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    sum_1 = torch.tensor([value], dtype=torch.int64, device=device)
    torch.distributed.all_reduce(sum_1)
    return int(sum_1)


def barrier() -> None:
    """Wait for all of them."""
    total(0)
