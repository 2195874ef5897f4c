"""What ptxas makes of every kernel, on every supported architecture: nothing spilled, no local memory; and what a tile
costs in the main loop of mla_decode, read from SASS."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import harness
import ptxvm
import pytest

OPS = sorted(path.parent.name for path in Path(harness.CSRC, "cuda").glob("*/launch.cu"))
TARGETS = [("sm_80", "sm_80"), ("sm_80", "sm_86"), ("sm_80", "sm_89"), ("sm_90a", "sm_90a"), ("sm_100", "sm_100")]

# Of a warp of splitkv, by its tiles of 16 rows and the number of warps: the most of any architecture, as written.
INSTRUCTIONS_OF_A_TILE = {
    "sm80": {(1, 8): 616, (2, 8): 713, (3, 8): 974, (1, 4): 595, (2, 4): 802, (3, 4): 1030},
    "fp8": {(1, 8): 846, (2, 8): 946, (3, 8): 1205, (1, 4): 827, (2, 4): 1050, (3, 4): 1286},
    "sm90": {(1, 8): 587, (2, 8): 690, (3, 8): 931, (1, 4): 567, (2, 4): 774, (3, 4): 991},
}
# Past L1, and 128 bytes at a time into L2: 64 and 16 columns of 32 tokens, 16 bytes a lane; of fp8 the scales as well.
_COPY = "LDGSTS.E.BYPASS.LTC128B.128"
COPIES_OF_A_TILE = {"sm80": 10 * [_COPY], "fp8": [*5 * [_COPY], "LDGSTS.E"], "sm90": []}


@functools.cache
def assemble(op: str, ptx: str, sass: str) -> tuple[str, bytes]:
    """What ptxas says about an op's kernels, and the cubin."""
    with tempfile.TemporaryDirectory() as scratch:
        source, cubin = Path(scratch, "launch.ptx"), Path(scratch, "launch.cubin")
        source.write_text(harness.ptx_of(op, ptx))
        command = [ptxvm.nvcc(), "-cubin", f"-arch={sass}", "-Xptxas=--verbose,--warn-on-spills", "-o", cubin, source]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stderr, cubin.read_bytes()


@pytest.mark.parametrize(("ptx", "sass"), TARGETS)
@pytest.mark.parametrize("op", OPS)
def test_no_kernel_spills(op: str, ptx: str, sass: str) -> None:
    log, _ = assemble(op, ptx, sass)
    assert "warning" not in log
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert len(frames) == len(re.findall(r"^(?:\.visible )?\.entry ", harness.ptx_of(op, ptx), re.MULTILINE)) > 0
    assert set(frames) == {("0", "0", "0")}, log


def nvdisasm() -> str:
    """The disassembler of the CUDA toolkit, on PATH or from PyPI."""
    wheels = Path(pytest.__file__).parents[1] / "nvidia"
    found = shutil.which("nvdisasm") or next((str(path) for path in wheels.glob("*/bin/nvdisasm")), None)
    assert found, "There is no nvdisasm: pip install nvidia-cuda-nvdisasm"
    return found


def main_loops(cubin: bytes, opcode: str, tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """Of every kernel that has one: its name, and the instructions of its shortest loop that holds `opcode`."""
    path = tmp_path / "cubin"
    path.write_bytes(cubin)
    listing = subprocess.run([nvdisasm(), "-c", path], capture_output=True, text=True, check=True).stdout
    for name, text in re.findall(r"^\.text\.(\w+):\n(.*?)(?=^//-|\Z)", listing, flags=re.MULTILINE | re.DOTALL):
        instructions: list[str] = []
        labels: dict[str, int] = {}
        loops: list[list[str]] = []
        for line in text.splitlines():
            if label := re.match(r"(\.L_x_\d+):", line):
                labels[label[1]] = len(instructions)
            elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([^;]*?)\s*;", line):
                instructions.append(instruction[1])
                target = re.search(r"BRA.*(\.L_x_\d+)", instruction[1])
                if target and target[1] in labels:
                    loops.append(instructions[labels[target[1]] :])
        if loops := [loop for loop in loops if any(line.startswith(opcode) for line in loop)]:
            yield name, min(loops, key=len)


@pytest.mark.parametrize(("ptx", "sass"), TARGETS)
def test_a_tile_of_mla_decode_costs_what_it_should(ptx: str, sass: str, tmp_path: Path) -> None:
    kernels = 0
    for name, loop in main_loops(assemble("mla_decode", ptx, sass)[1], "HMMA", tmp_path):
        row_tiles, num_warps = map(int, re.findall(r"Li(\d)E", name))
        (variant,) = re.findall(r"splitkv_(\w+?)_kernel", name)
        opcodes = Counter(line.split()[0].split(".")[0] for line in loop)
        # A warp's 80 columns in steps of 16 against 32 tokens, then 32 tokens against its 64 columns.
        assert opcodes["HMMA"] == row_tiles * (80 // 16 * 32 // 8 + 32 // 16 * 64 // 8)
        # Keys, values, probabilities, and the queries of the last 16 columns, twice if sums come in two parts.
        assert opcodes["LDSM"] == 80 // 16 * 2 + 64 // 16 * 2 + 2 * row_tiles + row_tiles * (2 if row_tiles == 3 else 1)
        copies = [line.split()[0] for line in loop if line.startswith("LDGSTS")]
        assert copies == COPIES_OF_A_TILE[variant]
        if variant == "sm90":
            assert opcodes["UTMALDG"] == 4  # at most: 64 and 16 columns, twice if a page may end after 16 tokens
        assert opcodes["BAR"] == 2
        assert not opcodes.keys() & {"LDL", "STL"}
        assert len(loop) <= 1.05 * INSTRUCTIONS_OF_A_TILE[variant][row_tiles, num_warps]
        kernels += 1
    assert kernels == 2 * 2 * 3 * (2 if ptx == "sm_80" else 3)  # dtypes, widths, rows, ways to copy


@pytest.mark.parametrize(("ptx", "sass"), TARGETS)
def test_main_loops_have_the_products_and_loads_of_their_tiles(ptx: str, sass: str, tmp_path: Path) -> None:
    def counts(op: str) -> dict[str, Counter[str]]:
        loops = main_loops(assemble(op, ptx, sass)[1], "HMMA", tmp_path)
        return {name: Counter(line.split()[0].split(".")[0] for line in loop) for name, loop in loops}

    for opcodes in counts("covariance_add").values():  # a warp's 64 x 32 sums of 64 tokens
        assert opcodes["HMMA"] == 64 // 16 * (64 // 16) * (32 // 8)
        assert opcodes["LDSM"] == 64 // 16 * (64 // 16 + 32 // 16)
        assert opcodes["DADD"] == 64 * 32 // 32
        assert opcodes["BAR"] == 1
    for name, opcodes in counts("mla_project").items():  # a warp's 32 columns of 16 or 64 tokens
        tokens = 64 if "Li64E" in name else 16
        assert opcodes["HMMA"] == 128 // 16 * (tokens // 16) * (32 // 8)
        assert opcodes["LDSM"] == 128 // 16 * (tokens // 16 + 32 // 16)
        assert opcodes["BAR"] == 2
    assert len(counts("covariance_add")) == 2
    assert len(counts("mla_project")) == 2 * 2
