"""What ptxas makes of every kernel: nothing spilled and no local memory, on every supported architecture."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import harness
import ptxvm
import pytest

OPS = sorted(path.parent.name for path in Path(harness.CSRC, "cuda").glob("*/launch.cu"))


@pytest.mark.parametrize(
    ("ptx", "sass"),
    [("sm_80", "sm_80"), ("sm_80", "sm_86"), ("sm_80", "sm_89"), ("sm_90a", "sm_90a"), ("sm_100", "sm_100")],
)
@pytest.mark.parametrize("op", OPS)
def test_no_kernel_spills(op: str, ptx: str, sass: str, tmp_path: Path) -> None:
    source = tmp_path / "launch.ptx"
    source.write_text(harness.ptx_of(op, ptx))
    command = [ptxvm.nvcc(), "-cubin", f"-arch={sass}", "-Xptxas=--verbose,--warn-on-spills", "-o", tmp_path / "cubin"]
    result = subprocess.run([*command, source], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", result.stderr)
    assert len(frames) == len(re.findall(r"^(?:\.visible )?\.entry ", source.read_text(), re.MULTILINE)) > 0
    assert set(frames) == {("0", "0", "0")}, result.stderr
