"""The command line does what its help says, and a mistake is one line."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from transmla_ext.architectures import ARCHITECTURES, support_table
from transmla_ext.cli import main


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """run(*arguments): the console script, in this process."""

    def call(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["transmla", *map(str, arguments)])
        capsys.readouterr()  # what making the model printed
        with pytest.raises(SystemExit) as exit_:
            main()
        out, err = capsys.readouterr()
        return Result(exit_.value.code or 0, out, err)

    return call


SMALL = ("--kv-lora-rank", 24, "--qk-rope-head-dim", 8, "--calibration-tokens", 512, "--sequence-length", 128)


def test_convert_then_generate(run: Callable[..., Result], tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    model, out = tiny_llama(), tmp_path / "out"
    planned = run("convert", model, out, *SMALL, "--dry-run")
    assert planned.code == 0, planned.err
    assert "50.00%" in planned.out
    assert not list(tmp_path.iterdir())

    converted = run("convert", model, out, *SMALL)
    assert converted.code == 0, converted.err
    assert "excess nats" in converted.out
    first, second = (run("generate", out, "while True:", "--max-new-tokens", 8) for _ in range(2))
    assert first.code == 0, first.err
    assert first.out == second.out
    assert first.out.strip()


def test_models_lists_every_family(run: Callable[..., Result]) -> None:
    listed = run("models")
    assert listed.code == 0
    assert all(model_type in listed.out for model_type in ARCHITECTURES)


def test_the_support_table_of_the_readme_is_the_registry_s() -> None:
    headings, *rows = support_table()
    lines = [f"| {' | '.join(row)} |" for row in (headings, ("---",) * len(headings), *rows)]
    assert "\n".join(lines) in (Path(__file__).parents[1] / "README.md").read_text()


def test_layers_converts_a_model_of_the_first_ones(
    run: Callable[..., Result], tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    assert run("convert", tiny_llama(), tmp_path / "out", *SMALL, "--layers", 1).code == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 1
    assert run("generate", tmp_path / "out", "while True:", "--max-new-tokens", 2).code == 0


def test_compare_writes_how_it_was_called(
    run: Callable[..., Result], tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    own = ("--layers", 1, "--refine-steps", 1, "--seed", 5, "--format", "deepseek_v3")
    compared = run("compare", tiny_llama(), tmp_path / "out", *SMALL, *own, "--quiet")
    assert compared.code == 0, compared.err
    assert "TransMLA" in compared.out
    written = (tmp_path / "out" / "compare.md").read_text()
    for option, value in zip((*SMALL, *own)[::2], (*SMALL, *own)[1::2], strict=True):
        assert f" {option} {value} " in written
    assert run("generate", tmp_path / "out" / "auto", "while True:", "--max-new-tokens", 2).code == 0


def test_a_mistake_is_one_line_that_says_what_to_do(
    run: Callable[..., Result], tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    bad = run("convert", tiny_llama(), tmp_path / "out", *SMALL)
    assert bad.code == 2
    assert bad.err.startswith("error: ")
    assert "--overwrite" in bad.err
    assert len(bad.err.splitlines()) == 1
    assert run("generate", tiny_llama(), "x").err.startswith("error: ")


def test_plan_prints_a_table_or_json(run: Callable[..., Result], tiny_llama: Callable[..., Path]) -> None:
    options = ("plan", tiny_llama(), "--gpu", "1,100,10", "--candidate", "24+8", "--candidate", "40+16")
    table = run(*options)
    assert table.code == 0, table.err
    assert "original" in table.out
    assert "24 + 8" in table.out
    values = json.loads(run(*options, "--json").out)
    assert [c["cache_bytes_per_token"] for c in values["candidates"]] == [2 * 2 * 32, 2 * 2 * 56]
    assert values["original"]["cache_bytes_per_token"] == 2 * 2 * 64


def test_a_plan_that_cannot_be_is_one_line(run: Callable[..., Result], tiny_llama: Callable[..., Path]) -> None:
    for options in (("absent",), (tiny_llama(), "--gpu", "4090"), (tiny_llama(), "--candidate", "24+6")):
        bad = run("plan", *options)
        assert bad.code == 2
        assert bad.err.startswith("error: ")
        assert len(bad.err.splitlines()) == 1


def test_env_names_versions_and_kernels(run: Callable[..., Result]) -> None:
    result = run("env")
    assert result.code == 0, result.err
    for word in ("torch", "transformers", "cpu kernels", "build"):
        assert word in result.out


@pytest.mark.parametrize(
    ("command", "default"),
    [
        ("convert", "free]"),
        ("compare", "convert's]"),
        ("eval", "checkpoint's]"),
        ("heal", "preset's]"),
        ("generate", "checkpoint's]"),
        ("serve", "needed]"),
        ("plan", "%]"),
    ],
)
def test_help_has_examples_and_defaults(run: Callable[..., Result], command: str, default: str) -> None:
    text = run(command, "--help").out
    assert "Example" in text
    assert default in text


def test_serve_without_its_packages_says_how_to_get_them(
    run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in [name for name in sys.modules if name.startswith("transmla_ext.serve")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    missing = run("serve", tmp_path)
    assert (missing.code, len(missing.err.splitlines())) == (2, 1)
    assert "pip install 'transmla_ext[serve]'" in missing.err


def test_serve_refuses_what_is_no_model(run: Callable[..., Result], tmp_path: Path) -> None:
    bad = run("serve", tmp_path, "--port", 0)
    assert (bad.code, len(bad.err.splitlines())) == (2, 1)
    assert "no config.json" in bad.err


def test_the_package_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "transmla_ext", "--help"]
    assert "convert" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
