"""Pages that several sequences may own, found again by the tokens that they hold."""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Sequence
from hashlib import sha256

from .._lib import core

__all__ = ["SharedBlockPool", "extend_keys"]


def extend_keys(keys: list[bytes], tokens: Sequence[int], block_size: int) -> None:
    """Appends the keys that a sequence's full pages still lack: hash of a page's tokens and of the key before it.

    Equal keys mean equal tokens from the sequence's first on. The hash is cryptographic, since whoever found two texts
    with one key could make a stranger's request read the wrong pages.
    """
    for end in range((len(keys) + 1) * block_size, len(tokens) + 1, block_size):
        page = array("q", tokens[end - block_size : end]).tobytes()
        keys.append(sha256((keys[-1] if keys else b"") + page).digest())


class SharedBlockPool:
    """A core.BlockPool whose pages count their owners, and stay findable when the last one has gone.

    A page without an owner counts as free; one that was published is emptied only when no other is left, the one given
    back longest ago first.
    """

    def __init__(self, num_blocks: int) -> None:
        self._pool = core.BlockPool(num_blocks)
        self._num_owners = [0] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # published, without an owner; first: next to be emptied

    @property
    def num_blocks(self) -> int:
        return self._pool.num_blocks

    @property
    def num_free(self) -> int:
        """Pages without an owner, findable or not."""
        return self._pool.num_free + len(self._idle)

    def num_owners(self, block: int) -> int:
        return self._num_owners[block]

    def is_private(self, block: int) -> bool:
        """Whether nobody but its one owner has, or could find, the page."""
        return self._num_owners[block] == 1 and block not in self._key_of

    def allocate(self, count: int) -> list[int]:
        """All ``count`` blocks or none, with one owner each: RuntimeError when fewer are free."""
        if count > self.num_free:
            raise RuntimeError(f"out of cache blocks: {count} wanted, {self.num_free} of {self.num_blocks} free")
        for _ in range(count - self._pool.num_free):
            block, _ = self._idle.popitem(last=False)
            self.forget(block)
            self._pool.free([block])
        blocks = self._pool.allocate(count)
        for block in blocks:
            self._num_owners[block] = 1
        return blocks

    def share(self, blocks: Sequence[int]) -> None:
        """One owner more for each block, which has one."""
        for block in blocks:
            self._num_owners[block] += 1

    def free(self, blocks: Sequence[int]) -> None:
        """One owner less for each block; ValueError, and nothing is freed, where there are not so many."""
        for block, count in Counter(blocks).items():
            if not 0 <= block < self.num_blocks or self._num_owners[block] < count:
                raise ValueError(f"block {block} has fewer owners than are to go")
        # The end of a sequence is of no use without its beginning, so that it is emptied first.
        for block in reversed(blocks):
            self._num_owners[block] -= 1
            if not self._num_owners[block]:
                if block in self._key_of:
                    self._idle[block] = None
                else:
                    self._pool.free([block])

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """Pages of the longest run of keys from the first on, each with one more owner: the caller."""
        blocks: list[int] = []
        for key in keys:
            if (block := self._block_of.get(key)) is None:
                break
            self._idle.pop(block, None)
            self._num_owners[block] += 1
            blocks.append(block)
        return blocks

    def publish(self, block: int, key: bytes) -> None:
        """Lets an owned page be found by key, unless another page is found by it already."""
        if self._block_of.setdefault(key, block) == block:
            self._key_of[block] = key

    def forget(self, block: int) -> None:
        """Lets a page no longer be found, before other tokens are written to it."""
        if (key := self._key_of.pop(block, None)) is not None:
            del self._block_of[key]
