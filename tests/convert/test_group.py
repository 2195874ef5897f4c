"""Conversion by several processes: what one process gives."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from models import token_rows
from test_convert import convert, logits

TEXT = "she sells sea shells by the sea shore, and for x in range(10): print(x, end=' ')\n" * 200
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.mark.parametrize(("refine_steps", "tolerance"), [(0, 1e-4), (6, 1e-3)])
def test_two_processes_give_what_one_gives(
    tiny_llama: Callable[..., Path], tmp_path: Path, refine_steps: int, tolerance: float
) -> None:
    model, text = tiny_llama(), tmp_path / "text.txt"
    text.write_text(TEXT)
    options = {"kv_lora_rank": 24, "qk_rope_head_dim": 8, "refine_steps": refine_steps}
    report = convert(model, tmp_path / "one", calibration=text, **options)
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    command = [*TORCHRUN, "-m", "transmla_ext", "convert", str(model), str(tmp_path / "two"), *arguments]
    command += ["--calibration", str(text), "--calibration-tokens=1024", "--sequence-length=128", "--quiet"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("written to") == 1
    tokens = token_rows(model, TEXT, 2, 100)
    one, two = logits(tmp_path / "one", tokens), logits(tmp_path / "two", tokens)
    assert (one - two).abs().max() <= tolerance * one.abs().max()
    assert (logits(model, tokens) - one).abs().max() > 10 * tolerance * one.abs().max()
    assert (tmp_path / "two" / "conversion_report.json").exists()
    assert report.excess_nats > 0


def test_more_processes_than_sequences_are_refused(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    command = [*TORCHRUN, "-m", "transmla_ext", "convert", str(tiny_llama()), str(tmp_path / "out")]
    command += ["--kv-lora-rank=24", "--qk-rope-head-dim=8", "--calibration-tokens=128", "--sequence-length=128"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode != 0
    assert "one sequence of 128 for each of 2 processes" in run.stderr.replace("\n", " ")
    assert not (tmp_path / "out").exists()
