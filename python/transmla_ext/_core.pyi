from collections.abc import Sequence
from typing import TypedDict

class BuildInfo(TypedDict):
    version: str
    compiler: str
    build_type: str
    cpu_isas: list[str]
    cuda_archs: list[str]

def build_info() -> BuildInfo: ...
def cpu_isa() -> str:
    """The instruction set that the CPU kernels run with."""

def available_isas() -> list[str]:
    """The instruction sets that this build and this CPU have, best last."""

def force_isa(name: str) -> None:
    """Makes every later op use this instruction set; ValueError if it is not available. For tests."""

def reset_isa() -> None:
    """Back to the best instruction set."""

def plan_splits(batch_size: int, num_rows: int, max_seqlen: int, num_workers: int) -> int:
    """Parts worth cutting each sequence into so that every worker has something to do."""

class BlockPool:
    """Page allocator of a paged cache: hands out block ids, never touches the memory behind them."""

    def __init__(self, num_blocks: int) -> None: ...
    def allocate(self, count: int) -> list[int]:
        """All ``count`` blocks or none: RuntimeError when fewer are free."""

    def free(self, blocks: Sequence[int]) -> None:
        """ValueError, and nothing is freed, when a block is not in use or named twice."""

    @property
    def num_blocks(self) -> int: ...
    @property
    def num_free(self) -> int: ...
