"""bench/ without a GPU: what it counts, what it models, and that what it times is the same computation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import compare
import gpu
import model
import pytest
import roofline
import run
import torch
from cases import mla_decode, mla_prefill
from cases.mla_decode import BASELINES, Case
from roofline import Roofline, measure_roofline
from timing import Timing, measure
from torch import Tensor

from transmla_ext import ops, reference
from transmla_ext.capacity import GPUS

BENCH = Path(__file__).parents[1] / "bench"
CPU = torch.device("cpu")
SMALL = {"kv_lora_rank": 48, "qk_rope_head_dim": 16, "block_size": 16, "dtype": torch.float32}
A100 = model.DEVICES[0]


def test_bytes_and_flops_of_a_case_counted_by_hand() -> None:
    case = Case(batch_size=8, seqlen=1000, num_heads=32)
    q, out, lse = 32 * 576 * 2, 32 * 512 * 2, 32 * 4
    assert case.num_bytes == 8 * (1000 * 1152 + q + out + lse + 16 * 4 + 4)
    assert case.flops == 8 * 32 * 1000 * (2 * 576 + 2 * 512)


def test_bytes_are_those_of_the_tensors() -> None:
    case = Case(batch_size=3, seqlen=128, num_heads=7)  # two whole blocks a sequence
    (args,) = case.inputs(CPU, 1)
    tensors = [*ops.mla_decode(**args), *(value for value in args.values() if isinstance(value, Tensor))]
    assert case.num_bytes == sum(tensor.nbytes for tensor in tensors)


def test_input_sets_share_the_block_table_and_nothing_else() -> None:
    first, second = Case(batch_size=2, seqlen=64, num_heads=2, **SMALL).inputs(CPU, 2)
    assert first["block_table"] is second["block_table"]
    assert sorted(first["block_table"].flatten().tolist()) == list(range(8))
    assert not torch.equal(first["latent_cache"], second["latent_cache"])


@pytest.mark.parametrize("name", ["torch bmm", "torch SDPA", "torch GEMM"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_compositions_in_torch_compute_the_op(name: str, batch_size: int) -> None:
    (args,) = Case(batch_size=batch_size, seqlen=64, num_heads=5, **SMALL).inputs(CPU, 1)
    actual = BASELINES[name](args)(**args)
    torch.testing.assert_close(actual, reference.mla_decode(**args)[0])


@pytest.mark.parametrize("sliding_window", [0, 9])
def test_prefill_is_counted_by_hand_and_is_what_its_baselines_compute(sliding_window: int) -> None:
    case = mla_prefill.Case(seqlen_q=20, seqlen_k=30, num_heads=2, sliding_window=sliding_window)
    seen = 9 * 20 if sliding_window else 11 * 20 + 190
    assert case.flops == 2 * 2 * seen * (96 + 64)
    (args,) = case.inputs(CPU, 1)
    out, lse = mla_prefill.OP(**args)
    tensors = [out, lse, *(value for value in args.values() if isinstance(value, Tensor))]
    assert case.num_bytes == sum(tensor.nbytes for tensor in tensors)
    for prepare in mla_prefill.BASELINES.values():
        torch.testing.assert_close(prepare(args)(**args), out)


def test_other_libraries_get_their_own_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins with the signatures that FlashMLA and FlashInfer document, and their meaning."""
    (args,) = Case(batch_size=2, seqlen=64, num_heads=5, **SMALL).inputs(CPU, 1)
    expected = reference.mla_decode(**args)[0]

    def get_mla_metadata(cache_seqlens: Tensor, num_rows: int, num_heads_k: int) -> tuple[str, None]:
        assert (num_rows, num_heads_k) == (5, 1)
        return "schedule", None

    def flash_mla_with_kvcache(  # type: ignore[no-untyped-def]
        q, k_cache, block_table, cache_seqlens, head_dim_v, schedule, num_splits, softmax_scale
    ):
        assert (schedule, num_splits) == ("schedule", None)
        assert k_cache.shape == (8, 16, 1, 64)
        return reference.mla_decode(q, k_cache.squeeze(2), block_table, cache_seqlens, head_dim_v, softmax_scale)

    class Wrapper:
        def __init__(self, float_workspace_buffer: Tensor) -> None:
            assert float_workspace_buffer.nbytes == 128 << 20

        def plan(self, *plan: Any) -> None:
            qo_indptr, kv_indptr, kv_indices, kv_len_arr, num_heads, *sizes, causal, sm_scale, q_type, kv_type = plan
            assert qo_indptr.tolist() == [0, 1, 2]
            assert kv_indptr.tolist() == [0, 4, 8]
            assert (num_heads, sizes, causal, q_type, kv_type) == (5, [48, 16, 16], False, torch.float32, torch.float32)
            self.args = kv_indices.view(2, 4), kv_len_arr, sizes[0], sm_scale

        def run(self, q_nope: Tensor, q_pe: Tensor, ckv_cache: Tensor, kpe_cache: Tensor) -> Tensor:
            q, cache = torch.cat((q_nope, q_pe), dim=-1), torch.cat((ckv_cache, kpe_cache), dim=-1)
            return reference.mla_decode(q[:, None], cache, *self.args)[0][:, 0]

    flash_mla = SimpleNamespace(get_mla_metadata=get_mla_metadata, flash_mla_with_kvcache=flash_mla_with_kvcache)
    monkeypatch.setitem(sys.modules, "flash_mla", flash_mla)
    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "flashinfer.mla", SimpleNamespace(BatchMLAPagedAttentionWrapper=Wrapper))
    for prepare in (mla_decode.flash_mla, mla_decode.flashinfer):
        assert torch.equal(prepare(args)(**args), expected)


def test_a_case_is_timed_against_every_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "cache_bytes", lambda _: 100_000)
    case = Case(batch_size=2, seqlen=64, num_heads=2, **SMALL)
    result = compare.time_case(mla_decode, case, CPU, Roofline(bandwidth=1e10, flops=1e11), budget=0)
    assert result["num_sets"] * case.num_bytes > 2 * 100_000
    for name in (compare.OURS, "torch bmm", "torch SDPA", "torch GEMM"):
        figures = result[name]
        assert 0 < figures["us, lower quartile"] <= figures["us"] <= figures["us, upper quartile"]
        assert figures["GB/s"] == pytest.approx(case.num_bytes / figures["us"] / 1e3)
        assert figures["% of bandwidth"] == pytest.approx(10 * figures["GB/s"])
        assert figures["% of GEMM"] == pytest.approx(figures["GFLOP/s"])
    assert len(compare.line(mla_decode, result).splitlines()) == 1


def test_flops_are_measured_right_before_our_op_and_right_after(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "cache_bytes", lambda _: 0)
    case, rates = Case(batch_size=2, seqlen=64, num_heads=2, **SMALL), iter([1e11, 3e11])
    ceilings = Roofline(bandwidth=1e10, flops=1.0)
    result = compare.time_case(mla_decode, case, CPU, ceilings, budget=0, measure_flops=lambda: next(rates))
    assert result["roofline"]["flops"] == 2e11
    assert result["ours"]["% of GEMM"] == pytest.approx(result["ours"]["GFLOP/s"] / 2)


def test_what_does_not_fit_or_does_not_agree_is_skipped_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    case, ceilings = Case(batch_size=2, seqlen=64, num_heads=2, **SMALL), Roofline(1e10, 1e11)
    monkeypatch.setattr(compare, "cache_bytes", lambda _: 0)

    def twice(args: dict[str, Any]) -> Any:
        return lambda **args: 2 * ops.mla_decode(**args)[0]

    def absent(args: dict[str, Any]) -> Any:
        raise RuntimeError("only on another GPU\nand more")

    monkeypatch.setattr(mla_decode, "BASELINES", {"twice": twice, "absent": absent, "torch bmm": absent})
    monkeypatch.setattr(compare, "_free_bytes", lambda _: case.num_bytes)
    result = compare.time_case(mla_decode, case, CPU, ceilings, budget=0)
    assert result["twice"]["skipped"] == "its result differs from ours by 100.0%"
    assert result["absent"]["skipped"] == "RuntimeError: only on another GPU"
    assert case.gathered_bytes > case.num_bytes
    assert "are free" in result["torch bmm"]["skipped"]
    text = compare.line(mla_decode, result)
    assert "absent: RuntimeError: only on another GPU" in text
    monkeypatch.setattr(compare, "_free_bytes", lambda _: 0)
    assert "are free" in compare.line(mla_decode, compare.time_case(mla_decode, case, CPU, ceilings, budget=0))


def test_every_set_of_inputs_has_its_turn() -> None:
    seen: list[int] = []
    timing = measure(lambda x: seen.append(x), [{"x": 0}, {"x": 1}, {"x": 2}], device=CPU, budget=0)
    assert seen == [i % 3 for i in range(len(seen))]
    assert timing.num_calls == len(seen) - 1 == 5


def test_a_roofline_is_the_slower_of_moving_and_computing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Roofline(bandwidth=10, flops=100).seconds(num_bytes=20, flops=100) == 2
    assert Roofline(bandwidth=10, flops=100).seconds(num_bytes=20, flops=500) == 5
    measured = measure_roofline(CPU, torch.float32, stream_bytes=1 << 20, gemm_size=64)
    assert 1e7 < measured.bandwidth < 1e13
    assert 1e7 < measured.flops < 1e15
    monkeypatch.setattr(roofline, "measure", lambda *_, **__: Timing(2.0, 2.0, 2.0, 1))
    measured = measure_roofline(CPU, torch.float32, stream_bytes=1 << 20, gemm_size=64)
    assert measured == Roofline(bandwidth=2**20, flops=64**3)  # of both streams; a multiply-add is two FLOPs


def test_the_model_has_the_figures_of_the_capacity_planner() -> None:
    for device in model.DEVICES:
        assert (device.bandwidth, device.flops) == (GPUS[device.name].bandwidth * 1e9, GPUS[device.name].tflops * 1e12)


def test_clocks_of_a_tile_computed_by_hand() -> None:
    assert A100.tile_clocks == pytest.approx(36_864 * 108 * 1.41e9 / 2.039e12)
    tile = model._Tile.of(32, A100)
    assert tile.tensor == 32 * 32 * (576 + 512) / 1024
    # 36,864 bytes of cache in and out again, 32,768 of them twice; 8 × 4 KB of partial scores and 2 KB of
    # probabilities written, the former read by one warp, the latter by eight.
    assert tile.shared == (2 * 36_864 + 32_768 + 2 * 8 * 4096 + 9 * 2048) / 128
    assert tile.serial == 576 + (65_536 + 2048) / 128 + 230 + 512


def test_clocks_of_a_tile_of_wgmma_computed_by_hand() -> None:
    tile = model._Tile.of(64, model.DEVICES[1])
    multiply_adds = 989e12 / 2 / 132 / 1.755e9
    # Of 64 rows and 32 tokens all scores twice and the sums once, in each group all queries for 64 tokens.
    assert tile.tensor == pytest.approx(64 * 32 * (2 * 576 + 512) / multiply_adds)
    assert tile.shared == (36_864 + 2 * (73_728 / 2 + 36_864) + 32_768) / 128
    assert tile.serial == pytest.approx(1152 + 325 + 64 * 32 * 512 / multiply_adds)


def test_dry_run_lists_the_cases_with_their_floors(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--dry-run"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + 4 * 3 * 6
    assert gpu.main(["--dry-run", "--batch", "32", "--context", "8192", "--heads", "32", "64"]) == 0
    heading, line, _ = capsys.readouterr().out.splitlines()
    assert "model" in heading
    # 304.24 MB / 2.039 TB/s
    assert line.split() == [
        "batch",
        "32,",
        "context",
        "8,192,",
        "32",
        "heads,",
        "bfloat16",
        "304.24",
        "18.25",
        "149.21",
        "90.82",
        "38.03",
    ]


def test_the_modelled_results_are_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--model"]) == 0
    stored = (BENCH / "results/model.md").read_text()
    assert capsys.readouterr().out == stored, "python bench/gpu.py --model > bench/results/model.md"


def test_without_a_gpu_it_says_what_can_be_done(tmp_path: Path) -> None:
    command = [sys.executable, BENCH / "gpu.py", "--json", tmp_path / "results.json"]
    no_gpu = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, capture_output=True, text=True, env=no_gpu)
    assert result.returncode == 2
    assert result.stderr.startswith("error: no CUDA device")
    assert "--dry-run" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arch", "capability", "runs"),
    [
        ("80-real", (8, 0), True),
        ("80-real", (8, 9), True),
        ("86-real", (8, 0), False),
        ("80-real", (9, 0), False),
        ("80", (9, 0), True),
        ("80-virtual", (10, 0), True),
        ("90a-real", (9, 0), True),
        ("90a-real", (10, 0), False),
        ("90a", (10, 0), False),
        ("100-real", (10, 3), True),
        ("120", (10, 0), False),
    ],
)
def test_which_gpus_a_build_runs_on(arch: str, capability: tuple[int, int], runs: bool) -> None:
    assert gpu.runs_on(arch, *capability) == runs


def test_a_build_for_another_gpu_is_said_to_be_missing() -> None:
    with pytest.raises(gpu.BenchError, match=r"CMAKE_CUDA_ARCHITECTURES=70-real.* -m pip install"):
        gpu._ensure_built(7, 0, build=False)


def test_a_run_prints_and_keeps_every_case_and_its_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], one_thread: None
) -> None:
    monkeypatch.setattr(compare, "cache_bytes", lambda _: 0)
    monkeypatch.setattr(run, "measure_roofline", lambda *_: Roofline(bandwidth=1e10, flops=1e11))
    monkeypatch.setattr(mla_decode, "QUICK", [Case(batch_size=b, seqlen=64, num_heads=2, **SMALL) for b in (1, 2)])
    options = ["--op", "mla_decode", "--quick", "--threads", "1", "--budget", "0"]
    results, picture = tmp_path / "cpu.json", tmp_path / "cpu.png"
    assert run.main([*options, "--json", str(results), "--plot", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "batch 2, context 64, 2 heads, float32" in out
    first, second = json.loads(results.read_text())["cases"]
    assert (first["op"], first["threads"], second["batch_size"]) == ("mla_decode", 1, 2)
    ratios = [min(r[name]["us"] for name in BASELINES if "us" in r[name]) / r["ours"]["us"] for r in (first, second)]
    row = next(line for line in out.splitlines() if line.startswith("mla_decode    "))
    assert row.split()[-2:] == [f"{min(ratios):.2f}", "×"]
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", run.OPS)
def test_every_op_has_cases_and_something_to_compare_with(name: str) -> None:
    op = run.load_op(name)
    for cases in (op.QUICK, op.CASES):
        assert len({str(case) for case in cases}) == len(cases) > 0
    assert op.BASELINES
