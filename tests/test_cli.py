"""The command line does what its help says, and a mistake is one line."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "transmla_ext", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


SMALL = ("--kv-lora-rank", 24, "--qk-rope-head-dim", 8, "--calibration-tokens", 512, "--sequence-length", 128)


def test_convert_then_generate(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    model, out = tiny_llama(), tmp_path / "out"
    planned = run("convert", model, out, *SMALL, "--dry-run")
    assert planned.returncode == 0, planned.stderr
    assert "50.00%" in planned.stdout
    assert not list(tmp_path.iterdir())

    converted = run("convert", model, out, *SMALL)
    assert converted.returncode == 0, converted.stderr
    assert "excess nats" in converted.stdout
    first, second = (run("generate", out, "while True:", "--max-new-tokens", 8) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout
    assert first.stdout.strip()


def test_a_mistake_is_one_line_that_says_what_to_do(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    bad = run("convert", tiny_llama(), tmp_path / "out", *SMALL)
    assert bad.returncode == 2
    assert bad.stderr.startswith("error: ")
    assert "--overwrite" in bad.stderr
    assert len(bad.stderr.splitlines()) == 1
    assert run("generate", tiny_llama(), "x").stderr.startswith("error: ")


def test_env_names_versions_and_kernels() -> None:
    result = run("env")
    assert result.returncode == 0, result.stderr
    for word in ("torch", "transformers", "cpu kernels", "build"):
        assert word in result.stdout


@pytest.mark.parametrize("command", ["convert", "generate"])
def test_help_has_examples(command: str) -> None:
    assert "Example" in run(command, "--help").stdout
