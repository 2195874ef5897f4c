"""The processes that share a conversion: those of torch.distributed where it is set up, else this one alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["add_up_", "from_first", "is_first", "joined", "rank", "size"]

T = TypeVar("T")


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if _together() else 0


def size() -> int:
    return dist.get_world_size() if _together() else 1


def is_first() -> bool:
    return rank() == 0


def add_up_(*tensors: Tensor | None) -> None:
    """Each tensor becomes its sum over the processes, in place."""
    if _together():
        for tensor in tensors:
            if tensor is not None:
                dist.all_reduce(tensor)


def from_first(compute: Callable[[], T]) -> T:
    """What the first process computes, in all of them: equal to the last bit, whatever machine each runs on."""
    if not _together():
        return compute()
    box: list[Any] = [compute() if is_first() else None]
    dist.broadcast_object_list(box, src=0)
    result: T = box[0]
    return result


@contextmanager
def joined() -> Iterator[None]:
    """Joins the processes that torchrun started, if it did."""
    launched = dist.is_available() and dist.is_torchelastic_launched() and not _together()
    if launched:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()
    try:
        yield
    finally:
        if launched:
            dist.destroy_process_group()
