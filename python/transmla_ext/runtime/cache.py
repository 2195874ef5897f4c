"""The latents and rotated keys of many sequences, in pages that any sequence may own."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor

from .prefix import SharedBlockPool

__all__ = ["CacheFullError", "CachedSequence", "PagedLatentCache", "StepTables"]

_numbers = count()


class CacheFullError(RuntimeError):
    """No pages left for the tokens asked for; nothing was changed."""


@dataclass(eq=False)
class CachedSequence:
    """Handle of a sequence in a cache: how many tokens it has there, and which pages."""

    length: int = 0
    blocks: list[int] = field(default_factory=list)
    freed: bool = False
    number: int = field(default_factory=lambda: next(_numbers))


@dataclass(frozen=True)
class StepTables:
    """Where the new tokens of one step go; views of buffers that the next step overwrites."""

    positions: Tensor  # [num_tokens], int64
    slot_mapping: Tensor  # [num_tokens], int64
    block_table: Tensor  # [batch_size, max_blocks], int32
    cache_seqlens: Tensor  # [batch_size], int32, the new tokens included


class PagedLatentCache:
    """One tensor [num_blocks, block_size, cache_dim] per layer, grown by doubling up to a limit.

    Args:
        cache_dims: numbers cached per token, one for each layer.
        block_size: tokens per page.
        max_tokens: limit of the cache, rounded up to whole pages; None sets the limit to half the device's memory
            (half of what is free, on a GPU).
    """

    def __init__(
        self,
        cache_dims: Sequence[int],
        *,
        dtype: torch.dtype,
        device: torch.device,
        block_size: int = 64,
        max_tokens: int | None = None,
    ) -> None:
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}")
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
        self.block_size = block_size
        self.bytes_per_token = sum(cache_dims) * dtype.itemsize
        if max_tokens is None:
            max_tokens = max(_memory_of(device) // 2 // self.bytes_per_token, block_size)
        self.pool = SharedBlockPool(-(-max_tokens // block_size))
        self.layers = [torch.empty(0, block_size, dim, dtype=dtype, device=device) for dim in cache_dims]

        self._device = device
        self._tokens = torch.empty(2, 0, dtype=torch.int64, device=device)  # positions, slot_mapping
        self._seqlens = torch.empty(0, dtype=torch.int32, device=device)
        self._table = torch.empty(0, 0, dtype=torch.int32, device=device)
        self._table_rows: list[tuple[int, int]] = []  # (sequence number, number of blocks) that each row shows

    @property
    def num_free_tokens(self) -> int:
        """Tokens that fit into pages which no sequence owns."""
        return self.pool.num_free * self.block_size

    def reserve(self, sequences: Sequence[CachedSequence], num_new: Sequence[int]) -> None:
        """Pages for num_new[i] more tokens of sequences[i], all or nothing: CacheFullError."""
        if any(sequence.freed for sequence in sequences):
            raise ValueError("a sequence was used after it was freed")
        if len({sequence.number for sequence in sequences}) < len(sequences):
            raise ValueError("a sequence is in the batch twice")
        missing = [self.num_missing(sequence, num) for sequence, num in zip(sequences, num_new, strict=True)]
        if sum(missing) > self.pool.num_free:
            raise CacheFullError(
                f"the latent cache is full: {sum(missing)} more pages of {self.block_size} tokens wanted, "
                f"{self.pool.num_free} of {self.pool.num_blocks} free; free sequences or load with a larger max_tokens"
            )
        for sequence, num, num_blocks in zip(sequences, num_new, missing, strict=True):
            if not all(map(self.pool.is_private, self._written(sequence, num))):
                self._make_private(sequence, num)
                num_blocks = self.num_missing(sequence, num)
            if num_blocks:
                sequence.blocks += self._allocate(num_blocks)

    def num_missing(self, sequence: CachedSequence, num_new: int) -> int:
        """Pages that num_new more tokens of a sequence take: new ones, and copies of shared ones that get written."""
        num_new_blocks = max(0, -(-(sequence.length + num_new) // self.block_size) - len(sequence.blocks))
        return num_new_blocks + sum(self.pool.num_owners(block) > 1 for block in self._written(sequence, num_new))

    def append(self, sequences: Sequence[CachedSequence], num_new: Sequence[int]) -> StepTables:
        """Counts num_new[i] more tokens of sequences[i] as cached, and says where they go; reserves what they need."""
        self.reserve(sequences, num_new)
        positions: list[int] = []
        slots: list[int] = []
        for sequence, num in zip(sequences, num_new, strict=True):
            new = range(sequence.length, sequence.length + num)
            positions += new
            slots += [sequence.blocks[i // self.block_size] * self.block_size + i % self.block_size for i in new]
            sequence.length += num
        return self._tables(sequences, positions, slots)

    def fork(self, sequence: CachedSequence, length: int) -> CachedSequence:
        """A new sequence of another's first ``length`` tokens, in the same pages until one of both writes there."""
        blocks = sequence.blocks[: -(-length // self.block_size)]
        self.pool.share(blocks)
        return CachedSequence(length, blocks)

    def free(self, sequences: Iterable[CachedSequence]) -> None:
        """Gives the pages back; a sequence that is already free stays so."""
        for sequence in sequences:
            self.pool.free(sequence.blocks)
            sequence.blocks = []
            sequence.freed = True

    def _written(self, sequence: CachedSequence, num_new: int) -> list[int]:
        """Those of a sequence's pages that its next num_new tokens are written to."""
        end = -(-(sequence.length + num_new) // self.block_size)
        return sequence.blocks[sequence.length // self.block_size : end] if num_new else []

    def _make_private(self, sequence: CachedSequence, num_new: int) -> None:
        """Copies pages that are about to be written and have other owners; the rest can no longer be found."""
        for i, block in enumerate(self._written(sequence, num_new), sequence.length // self.block_size):
            if self.pool.num_owners(block) == 1:
                self.pool.forget(block)
                continue
            [copy] = self._allocate(1)
            for layer in self.layers:
                layer[copy] = layer[block]
            sequence.blocks[i] = copy
            sequence.number = next(_numbers)  # its row of the block table is stale
            self.pool.free([block])

    def _allocate(self, num_blocks: int) -> list[int]:
        blocks = self.pool.allocate(num_blocks)
        self._grow(1 + max(blocks))
        return blocks

    @torch.inference_mode(False)  # or the pages could be written in inference mode only
    def _grow(self, num_blocks: int) -> None:
        for i, layer in enumerate(self.layers):
            have = layer.size(0)
            if have < num_blocks:
                capacity = min(max(num_blocks, 2 * have), self.pool.num_blocks)
                self.layers[i] = layer.new_empty(capacity, *layer.shape[1:])
                self.layers[i][:have] = layer

    def _tables(self, sequences: Sequence[CachedSequence], positions: list[int], slots: list[int]) -> StepTables:
        num_tokens, batch_size = len(slots), len(sequences)
        max_blocks = max(len(sequence.blocks) for sequence in sequences)
        if num_tokens > self._tokens.size(1):
            self._tokens = self._tokens.new_empty(2, 2 * num_tokens)
        if batch_size > self._table.size(0) or max_blocks > self._table.size(1):
            rows, columns = self._table.shape
            self._table = self._table.new_empty(
                rows if batch_size <= rows else 2 * batch_size, columns if max_blocks <= columns else 2 * max_blocks
            )
            self._seqlens = self._seqlens.new_empty(self._table.size(0))
            self._table_rows = [(-1, 0)] * self._table.size(0)

        self._tokens[:, :num_tokens] = torch.tensor((positions, slots))
        self._seqlens[:batch_size] = torch.tensor([sequence.length for sequence in sequences], dtype=torch.int32)
        for row, sequence in enumerate(sequences):
            shown = (sequence.number, len(sequence.blocks))
            if self._table_rows[row] != shown:
                self._table[row, : len(sequence.blocks)] = torch.tensor(sequence.blocks, dtype=torch.int32)
                self._table_rows[row] = shown
        return StepTables(
            positions=self._tokens[0, :num_tokens],
            slot_mapping=self._tokens[1, :num_tokens],
            block_table=self._table[:batch_size, :max_blocks],
            cache_seqlens=self._seqlens[:batch_size],
        )


def _memory_of(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
