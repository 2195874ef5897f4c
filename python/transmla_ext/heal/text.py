"""What a healing reads: packed sequences on disk, and the teacher's likeliest tokens if those are cached."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import Dataset

from ..checkpoint import Staging
from ..convert import group
from .training import CHUNK_TOKENS, Teacher

__all__ = ["PackedText", "cache_teacher"]

_BLOCK = 64  # sequences of a file of the teacher's likeliest tokens: some tens of megabytes


class PackedText(Dataset[dict[str, Tensor]]):
    """Sequences in a file, mapped into memory, so that all processes and epochs share what was tokenised once.

    Args:
        work: the directory of the file and of what `cache_teacher` wrote.
        cached: give the teacher's likeliest tokens too.
    """

    FILE = "tokens.bin"  # [num_sequences, sequence_length], int32

    def __init__(self, work: Path, sequence_length: int, *, cached: bool) -> None:
        self.work, self.cached = work, cached
        self.tokens = np.memmap(work / self.FILE, dtype=np.int32, mode="r").reshape(-1, sequence_length)

    @classmethod
    def write(cls, work: Staging, rows: Iterable[list[int]]) -> None:
        with work.whole(cls.FILE) as file, file.open("wb") as out:
            for row in rows:
                out.write(np.asarray(row, dtype=np.int32).tobytes())

    def __len__(self) -> int:
        return len(self.tokens)

    def row(self, index: int) -> Tensor:
        """[sequence_length], int64."""
        return torch.from_numpy(self.tokens[index].astype(np.int64))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """input_ids [sequence_length], index, and with `cached` top_ids and top_log_p [sequence_length - 1, top_k]."""
        item = {"input_ids": self.row(index), "index": torch.tensor(index)}
        if self.cached:
            with safe_open(self.work / _block_name(index // _BLOCK), framework="pt") as block:
                for name in ("top_ids", "top_log_p"):
                    item[name] = block.get_slice(name)[index % _BLOCK]
        return item


def cache_teacher(text: PackedText, teacher: Teacher, work: Staging, top_k: int, bar: Progress) -> None:
    """Writes the log-probabilities of each next token's `top_k` likeliest, a share of the text in every process."""
    blocks = [number for number in range(-(-len(text) // _BLOCK)) if not work.has(_block_name(number))]
    for number in bar.track(blocks[group.rank() :: group.size()], description="Asking the teacher"):
        rows = [text.row(index) for index in range(number * _BLOCK, min(len(text), (number + 1) * _BLOCK))]
        top = [torch.cat(parts) for parts in zip(*_likeliest(teacher, rows, top_k), strict=True)]
        shape = (len(rows), -1, top_k)
        work.write_tensors(_block_name(number), {"top_ids": top[0].view(shape), "top_log_p": top[1].view(shape)})


@torch.no_grad()
def _likeliest(teacher: Teacher, rows: list[Tensor], top_k: int) -> Iterator[tuple[Tensor, Tensor]]:
    for row in rows:
        for hidden in teacher.hidden(row[None])[0, :-1].split(CHUNK_TOKENS):
            log_p, ids = teacher.log_p(hidden).topk(top_k)
            yield ids.int().cpu(), log_p.cpu()


def _block_name(number: int) -> str:
    return f"teacher-{number:06d}.safetensors"
