"""compare() reports what its conversions do, judges by text that none was calibrated on, and resumes."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import transmla_ext
from transmla_ext.checkpoint import open_checkpoint
from transmla_ext.convert import Comparison, compare, pipeline
from transmla_ext.convert.calibrate import calibration_tokens
from transmla_ext.text import split_text

SMALL: dict[str, Any] = {
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "calibration_tokens": 512,
    "sequence_length": 64,
    "refine_steps": 2,
    "progress": False,
}
MODEL = {"max_position_embeddings": 640}  # room to recall something over 512 tokens
DIRECTORIES = ["transmla", "transmla-refined", "auto-closed-form", "auto-alone", "auto"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def compared(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Comparison]:
    out = tmp_path_factory.mktemp("compare") / "out"
    return out, compare(tiny_llama(**MODEL), out, seed=3, **SMALL)


def test_variants_are_what_their_reports_say(compared: tuple[Path, Comparison]) -> None:
    out, _ = compared
    original, *converted = json.loads((out / "compare.json").read_text())["variants"]
    assert [variant["directory"] for variant in converted] == DIRECTORIES
    reports = [json.loads((out / name / "conversion_report.json").read_text()) for name in DIRECTORIES]
    for variant, report in zip(converted, reports, strict=True):
        assert variant["perplexity"] == report["perplexity_after"]
        assert variant["excess_nats"] == report["excess_nats"]
        assert variant["ratio"] == report["excess_nats"] / reports[0]["excess_nats"]
        assert variant["agreement"] == report["agreement"] < 1
        assert variant["recall"] == {distance: after for distance, (_, after) in report["recall"].items()}
        assert variant["cache_bytes"] == 2 * 4 * (16 + 8)
        assert variant["seconds"] > 0
        assert original["perplexity"] == report["perplexity_before"]
    assert list(original["recall"]) == ["512"]
    assert original["recall"] == {distance: before for distance, (before, _) in reports[0]["recall"].items()}
    assert (original["excess_nats"], original["agreement"], original["cache_bytes"]) == (0, 1, 2 * 4 * 64)


def test_each_ingredient_is_in_the_variant_named_for_it(compared: tuple[Path, Comparison]) -> None:
    out, _ = compared
    plans = [json.loads((out / name / "conversion_report.json").read_text())["plan"] for name in DIRECTORIES]
    made_by = [(plan["method"], plan["refine_steps"], plan["refine_window"] > 1) for plan in plans]
    expected = [("transmla", 0, True), ("transmla", 2, True), ("auto", 0, True), ("auto", 2, False), ("auto", 2, True)]
    assert made_by == expected
    assert len(plans[0]["freqfold"]) > 1


def test_markdown_and_table_hold_every_variant_and_how_to_have_it_again(compared: tuple[Path, Comparison]) -> None:
    out, comparison = compared
    text = (out / "compare.md").read_text()
    assert "recall at 512 |" in text
    for option in ("--kv-lora-rank 16", "--qk-rope-head-dim 8", "--seed 3", "--refine-steps 2", "--sequence-length 64"):
        assert option in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1
    assert len(rows) == 2 + comparison.table().row_count == 2 + 6
    for row, variant in zip(rows[2:], comparison.variants, strict=True):
        assert row.startswith(f"| {variant.name} | {variant.perplexity:.2f} | {variant.excess_nats:.3f} |")
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_every_variant_can_be_loaded(compared: tuple[Path, Comparison]) -> None:
    out, _ = compared
    for name in DIRECTORIES:
        assert transmla_ext.load(out / name).generate(["while True:"], max_new_tokens=2)


def test_the_last_quarter_is_not_calibrated_on(
    tiny_llama: Callable[..., Path], compared: tuple[Path, Comparison], tmp_path: Path
) -> None:
    numbers = " ".join(map(str, range(1000, 3000)))
    (tmp_path / "numbers.txt").write_text(numbers)
    for source in (tmp_path / "numbers.txt", [numbers]):
        calibration, test = split_text(source)
        assert "".join(calibration + test) == numbers
        assert len(test[0]) == pytest.approx(len(numbers) / 4, abs=1)
    tokenizer = open_checkpoint(tiny_llama()).tokenizer()
    tokens = calibration_tokens(*split_text(None)[:1], tokenizer, 512, 64, split_text(None)[1])
    shared = {tuple(row) for row in torch.cat([tokens.train, tokens.held_out]).tolist()}
    assert not shared & {tuple(row) for row in tokens.test.tolist()}
    _, comparison = compared
    assert list(comparison.tokens.values()) == [tokens.train.numel(), tokens.held_out.numel(), tokens.test.numel()]


def test_a_test_text_leaves_the_calibration_text_whole(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    digits, letters = "0123456789 " * 400, "the quick brown fox " * 60
    compare(tiny_llama(), tmp_path / "out", calibration=[digits], test=[letters], **SMALL)
    options = {key: value for key, value in SMALL.items() if key != "refine_steps"}
    alone = transmla_ext.convert(
        tiny_llama(), tmp_path / "alone", calibration=[digits], test=[letters], refine_steps=0, **options
    )
    saved = json.loads((tmp_path / "out" / "auto-closed-form" / "conversion_report.json").read_text())
    assert saved == json.loads(json.dumps(alone.to_dict()))


def compare_and_kill(monkeypatch: pytest.MonkeyPatch, after: int, *args: Any, **options: Any) -> None:
    """compare(), interrupted when all layers of the model after the first so many are done."""
    export, models = pipeline._export, iter(range(after + 1))

    def interrupted(*args: Any) -> None:
        if next(models) == after:
            raise KeyboardInterrupt
        export(*args)

    monkeypatch.setattr(pipeline, "_export", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(*args, **options)
    monkeypatch.setattr(pipeline, "_export", export)


def test_a_killed_comparison_does_not_repeat_what_is_finished(
    tiny_llama: Callable[..., Path],
    compared: tuple[Path, Comparison],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    compare_and_kill(monkeypatch, 2, tiny_llama(**MODEL), out, seed=3, **SMALL)
    assert not out.exists()
    finished = {name: (partial / name / "config.json").stat().st_mtime_ns for name in DIRECTORIES[:2]}

    resumed = compare(tiny_llama(**MODEL), out, seed=3, **SMALL)
    assert {name: (out / name / "config.json").stat().st_mtime_ns for name in finished} == finished
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    whole = compared[1].variants
    assert [replace(variant, seconds=None) for variant in resumed.variants] == [replace(v, seconds=None) for v in whole]
    assert [variant.seconds is None for variant in resumed.variants] == [True, False, False, True, False, False]
    assert "| resumed |" in (out / "compare.md").read_text()


def test_another_comparison_starts_anew(
    tiny_llama: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, config = tmp_path / "out", Path("transmla", "config.json")
    compare_and_kill(monkeypatch, 1, tiny_llama(), out, seed=3, layers=1, **SMALL)
    before = (tmp_path / "out.partial" / config).stat().st_mtime_ns
    compare(tiny_llama(), out, seed=4, layers=1, **SMALL)
    assert (out / config).stat().st_mtime_ns > before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kv_lora_rank": 20}, ["kv_lora_rank", "multiple of 8", "got 20"]),
        ({"format": "gguf"}, ["format", "'gguf'"]),
        ({"refine_steps": 0}, ["refine_steps must be >= 1, got 0"]),
        ({"calibration": "wikitext"}, ["'wikitext' is no file", "--test"]),
        ({"calibration": ["too short"]}, ["calibration text too short"]),
        ({"test": ["?"]}, ["test text too short"]),
        ({"layers": 3}, ["layers must be from 1 to the model's 2"]),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    tiny_llama: Callable[..., Path], tmp_path: Path, options: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ValueError, match=".*".join(map(re.escape, words))):
        compare(tiny_llama(), tmp_path / "out", **{**SMALL, **options})
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_not_replaced(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path, tmp_path / "file"):
        with pytest.raises(ValueError, match="choose another"):
            compare(tiny_llama(), out, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
