"""What mla_decode should take on GPUs that we do not have: arithmetic, not one number of it measured on a GPU."""

from __future__ import annotations

import functools
import os
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from cases.mla_decode import Case

__all__ = ["BATCH_SIZES", "DEVICES", "NUM_HEADS", "SEQLENS", "Device", "Plan", "cases", "markdown"]

BATCH_SIZES = (1, 8, 32, 128)
SEQLENS = (1024, 8192, 32768)
NUM_HEADS = (8, 16, 28, 32, 64, 128)

_HERE = Path(__file__).parent
_FIXED_SECONDS = 3e-6  # both launches, the first tile's way through the pipeline, the last one's out
_WARPS, _TILE, _DIM, _RANK = 8, 32, 576, 512  # of splitkv at 512 + 64; tokens; numbers of a row and of its latent
_WGMMA_ROWS, _WGMMA_TILE, _WGMMA_SOFTMAX_CLOCKS = 64, 64, 650  # of wgmma_sm90; tokens; a warp's instructions for them
_SHARED_BYTES_PER_CLOCK = 128  # of an SM
_SOFTMAX_CLOCKS = 2 * 40 + 150  # both barriers and the latency of a tile's softmax


@dataclass(frozen=True)
class Device:
    """Datasheet figures of a GPU, but for `multiply_adds`."""

    name: str
    bandwidth: float  # bytes/s
    flops: float  # FLOP/s, bf16, dense
    num_sms: int
    clock: float  # Hz
    shared_memory: int  # bytes that a block can have
    multiply_adds: int  # per clock and SM with mma.sync, bf16
    has_wgmma: bool = False

    def seconds(self, case: Case) -> float:
        """The floor: each byte moved once, or each FLOP computed, whichever takes longer."""
        return max(case.num_bytes / self.bandwidth, case.flops / self.flops)

    @property
    def tile_clocks(self) -> float:
        """In which an SM's share of the bandwidth brings a tile."""
        return _TILE * _DIM * 2 * self.num_sms * self.clock / self.bandwidth


DEVICES = (
    Device("A100-80GB", 2039e9, 312e12, 108, 1.41e9, 163 << 10, 1024),
    # 63 % of what wgmma does, as microbenchmarks have it.
    Device("H100", 3350e9, 989e12, 132, 1.755e9, 227 << 10, 1290, has_wgmma=True),
    # What mma.sync does here is not known: as much as on the A100, per clock.
    Device("B200", 8000e9, 2250e12, 148, 1.85e9, 227 << 10, 1024),
)


class Plan(NamedTuple):
    """What plan.h decides for bf16 at 512 + 64."""

    rows: int
    num_row_blocks: int
    num_stages: int
    num_parts: int
    min_tiles_of_part: int


@functools.cache
def _plans() -> dict[tuple[int, Device], Plan]:
    """For each number of heads on each GPU: plan.h is asked, by a program that is compiled for the purpose."""
    keys = [(num_heads, device) for device in DEVICES for num_heads in NUM_HEADS]
    requests = "\n".join(
        f"{num_heads} {device.num_sms} {device.shared_memory} {device.has_wgmma:d}" for num_heads, device in keys
    )
    csrc = _HERE.parent / "csrc"
    with tempfile.TemporaryDirectory() as scratch:
        program = Path(scratch) / "print_plan"
        command = [os.environ.get("CXX", "c++"), "-std=c++17", f"-I{csrc}", f"-I{csrc / 'include'}"]
        subprocess.run([*command, "-o", program, _HERE / "print_plan.cpp"], check=True)
        answers = subprocess.run([program], input=requests, capture_output=True, text=True, check=True).stdout
    return {key: Plan(*map(int, line.split())) for key, line in zip(keys, answers.splitlines(), strict=True)}


@dataclass(frozen=True)
class _Tile:
    """Clocks that an SM is busy with 32 tokens and so many rows, by what keeps it busy."""

    shared: float  # shared memory: all that is written to it and read from it
    tensor: float  # tensor cores
    serial: float  # if a tile's scores, softmax and sums do not overlap at all; copies always do

    @staticmethod
    def of(rows: int, device: Device) -> _Tile:
        if rows == _WGMMA_ROWS:
            return _Tile._of_wgmma(device)
        # Every byte is written once and read once for the scores; of the latent, once more for the sums.
        copied, keys, values = _TILE * _DIM * 2, _TILE * _DIM * 2, _TILE * _RANK * 2
        partial_scores = 2 * _WARPS * rows * _TILE * 4  # written and read
        probabilities = rows * _TILE * 2
        everything = copied + keys + values + partial_scores + (1 + _WARPS) * probabilities
        scores, sums = (rows * _TILE * numbers / device.multiply_adds for numbers in (_DIM, _RANK))
        serial = (
            max(scores, keys / _SHARED_BYTES_PER_CLOCK)
            + (partial_scores + probabilities) / _SHARED_BYTES_PER_CLOCK
            + _SOFTMAX_CLOCKS
            + max(sums, (values + _WARPS * probabilities) / _SHARED_BYTES_PER_CLOCK)
        )
        return _Tile(everything / _SHARED_BYTES_PER_CLOCK, scores + sums, serial)

    @staticmethod
    def _of_wgmma(device: Device) -> _Tile:
        # Both groups of warps compute all scores, from shared memory alone, and then each half of the sums.
        multiply_adds = device.flops / 2 / device.num_sms / device.clock
        groups, share = 2, _TILE / _WGMMA_TILE
        queries_and_keys = groups * (share * _WGMMA_ROWS + _TILE) * _DIM * 2
        values = _TILE * _RANK * 2
        scores = groups * _WGMMA_ROWS * _TILE * _DIM / multiply_adds
        sums = _WGMMA_ROWS * _TILE * _RANK / multiply_adds
        serial = (
            max(scores, queries_and_keys / _SHARED_BYTES_PER_CLOCK)
            + share * _WGMMA_SOFTMAX_CLOCKS
            + max(sums, values / _SHARED_BYTES_PER_CLOCK)
        )
        everything = _TILE * _DIM * 2 + queries_and_keys + values
        return _Tile(everything / _SHARED_BYTES_PER_CLOCK, scores + sums, serial)


def cases() -> Iterator[Case]:
    """The grid that bench/gpu.py times."""
    for batch_size in BATCH_SIZES:
        for seqlen in SEQLENS:
            for num_heads in NUM_HEADS:
                yield Case(batch_size=batch_size, seqlen=seqlen, num_heads=num_heads)


def _fractions(case: Case, device: Device) -> tuple[float, float]:
    """Of the floor over the modelled time: if L2 serves what is read again, and if HBM has to."""
    plan = _plans()[case.num_heads, device]
    tiles_of_sequence = -(-case.seqlen // _TILE)
    tiles_of_part = max(plan.min_tiles_of_part, -(-case.batch_size * tiles_of_sequence // plan.num_parts))
    computing = tiles_of_part * _Tile.of(plan.rows, device).serial / device.clock
    merged = 0
    for sequence in range(case.batch_size):
        first = sequence * tiles_of_sequence // tiles_of_part
        last = ((sequence + 1) * tiles_of_sequence - 1) // tiles_of_part
        merged += last - first + 1 if last > first else 0
    merged_bytes = 2 * merged * case.num_heads * (case.kv_lora_rank + 1) * 4  # written and read, fp32
    floor = device.seconds(case)
    again = (plan.num_row_blocks - 1) * case.cache_bytes + merged_bytes
    best, worst = (
        floor / (max(computing, num_bytes / device.bandwidth) + _FIXED_SECONDS)
        for num_bytes in (case.num_bytes, case.num_bytes + again)
    )
    return best, worst


def _table(headings: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [headings, ["---"] * len(headings), *rows])


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %"


def _cell(case: Case, device: Device) -> str:
    best, worst = (round(100 * fraction) for fraction in _fractions(case, device))
    microseconds = 1e6 * device.seconds(case)
    floor = f"{microseconds:,.{max(0, 3 - len(str(int(microseconds))))}f}"
    return f"{floor} · {best} %" if best == worst else f"{floor} · {worst}–{best} %"


def _device_section(device: Device) -> str:
    kernels = []
    for num_heads in NUM_HEADS:
        plan = _plans()[num_heads, device]
        tile = _Tile.of(plan.rows, device)
        serial = plan.num_row_blocks * tile.serial
        tiles_under_way = (plan.num_stages - 1) * (_WGMMA_TILE if plan.rows == _WGMMA_ROWS else _TILE) / _TILE
        kernels.append([
            str(num_heads),
            f"{plan.rows} × {plan.num_row_blocks}",
            f"{plan.num_stages}",
            f"{1e6 * tiles_under_way * device.tile_clocks / device.clock:.1f} us",
            _percent(plan.num_row_blocks * tile.shared, device.tile_clocks),
            _percent(plan.num_row_blocks * tile.tensor, device.tile_clocks),
            _percent(serial, device.tile_clocks),
            "memory" if serial < device.tile_clocks else f"SM: {_percent(device.tile_clocks, serial)} of the bandwidth",
        ])  # fmt: skip
    headings = ["heads", "rows × blocks", "stages", "latency covered", "shared memory", "tensor cores", "all in turn"]
    fractions = [
        [f"{batch_size}", f"{seqlen:,}"]
        + [_cell(Case(batch_size=batch_size, seqlen=seqlen, num_heads=n), device) for n in NUM_HEADS]
        for batch_size in BATCH_SIZES
        for seqlen in SEQLENS
    ]
    figures = (
        f"{device.bandwidth / 1e9:,.0f} GB/s, {device.flops / 1e12:,.0f} TFLOP/s, {device.num_sms} SMs at "
        f"{device.clock / 1e9:g} GHz, {device.multiply_adds:,} multiply-adds per clock and SM with mma.sync, "
        f"{device.shared_memory >> 10} KiB of shared memory a block"
    )
    return "\n\n".join([
        f"## {device.name} (model)",
        f"{figures}.",
        _table([*headings, "bound by"], kernels),
        "Floor in us · per cent of it that the kernel should reach:",
        _table(["batch", "context", *(f"{n} heads" for n in NUM_HEADS)], fractions),
    ])  # fmt: skip


def markdown() -> str:
    """bench/results/model.md."""
    case = Case(batch_size=32, seqlen=8192, num_heads=32)
    a100 = DEVICES[0]
    introduction = f"""\
# mla_decode on GPUs: a model

**Every number here is computed; none was measured on a GPU.** `python bench/gpu.py --model > bench/results/model.md`
writes this file, `python bench/gpu.py` measures the same cases on a GPU.

bf16, 512 + 64, one new token a sequence, blocks of 64 tokens.

- *Floor* = max(bytes / bandwidth, FLOPs / peak) by the datasheet. Bytes: the cache (1,152 a token), q, out, lse,
  block_table and cache_seqlens, once each. FLOPs: 2 × batch × heads × context × (576 + 512).
  For instance {case}: {case.num_bytes:,} bytes and {case.flops / 1e9:,.1f} GFLOP
  take the {a100.name} {1e6 * case.num_bytes / a100.bandwidth:.1f} us and {1e6 * case.flops / a100.flops:.1f} us.
- *Kernel*: all of these shapes get `splitkv` of `csrc/cuda/mla_decode` (mma.sync; cp.async, or TMA), but for more
  than 48 heads on the H100, which get `wgmma_sm90`. A block of the former has 8 warps and 16, 32 or 48 of a sequence's
  query rows, and goes through its part of the tokens 32 at a time; one of the latter has 64 rows, and two groups of
  4 warps that both compute the scores of 64 tokens. Each block of rows reads the whole cache of the sequence;
  *rows × blocks* says how many there are. `plan.h` decides.
- *Latency covered* is how long the HBM takes for the tiles whose copies are under way while one is computed; it
  answers within a microsecond.
- The next columns say how long an SM is busy with a tile of each block of rows, in per cent of the time in which its
  share of the bandwidth brings that tile. Shared memory moves {_SHARED_BYTES_PER_CLOCK} bytes per clock. *All in turn*
  is the time if scores, softmax ({_SOFTMAX_CLOCKS} clocks of latency, assumed, or {_WGMMA_SOFTMAX_CLOCKS}
  instructions) and sums do not overlap at all: below 100 % the memory is the bound.
- *Per cent* of the floor = floor / (max(bytes / bandwidth, tiles of the busiest SM × clocks in turn) + fixed).
  Fixed are {1e6 * _FIXED_SECONDS:g} us, assumed, for both launches, filling and draining. Of two numbers, in the first
  L2 misses all that is read again (by further blocks of rows, and to merge parts), in the second nothing. No kernel
  beats a copy, which reaches 90 to 93 % of the datasheet's bandwidth.

Not in the model: clocks below the boost clock, L2's own bandwidth, instruction issue, imbalance of ragged batches.
What ptxas and SASS say of the kernels (no spills, instructions of a tile) is in `tests/cuda/test_resources.py`; what
they move (each byte of the cache once for each block of rows), emulated, in `tests/cuda/test_mla_decode*.py`."""
    return "\n\n".join([introduction, *map(_device_section, DEVICES)]) + "\n"
