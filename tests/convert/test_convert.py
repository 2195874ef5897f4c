"""convert() end to end on tiny random models: exact where it claims to be, whole or not at all, resumable."""

import filecmp
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import token_rows
from torch import Tensor
from transformers import AutoModelForCausalLM

import transmla_ext
from transmla_ext.convert import ConversionReport, dry_run
from transmla_ext.convert.calibrate import Predictions
from transmla_ext.convert.recall import recall_tokens, recalled

SMALL: dict[str, Any] = {"calibration_tokens": 1024, "sequence_length": 128, "refine_steps": 3, "progress": False}


def convert(model: Path, out: Path, **options: Any) -> ConversionReport:
    return transmla_ext.convert(model, out, **{**SMALL, **options})


def logits(path: Path, tokens: Tensor, dtype: torch.dtype | str = "auto") -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, trust_remote_code=False).eval()
    with torch.no_grad():
        return model(tokens).logits.double()


def kl(p: Tensor, q: Tensor) -> float:
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize(
    "shape", [{}, {"num_key_value_heads": 4}, {"num_key_value_heads": 1}, {"tie_word_embeddings": True}]
)
def test_full_rank_is_exact(tiny_llama: Callable[..., Path], tmp_path: Path, shape: dict[str, Any]) -> None:
    model = tiny_llama(**shape)
    report = convert(model, tmp_path / "out", kv_lora_rank="full")
    tokens = token_rows(model, "for x in range(10): print(x)\n" * 40, 2, 100)
    torch.testing.assert_close(logits(tmp_path / "out", tokens), logits(model, tokens), atol=1e-4, rtol=0)
    assert report.perplexity_after == pytest.approx(report.perplexity_before, rel=1e-5)
    assert max(layer.attention_error for layer in report.layers) < 1e-9


@pytest.mark.parametrize(
    "options",
    [
        {"kv_lora_rank": 24, "qk_rope_head_dim": 16},
        {"kv_lora_rank": 24, "qk_rope_head_dim": 8},
        {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "q_lora_rank": 40},
    ],
)
@pytest.mark.parametrize("shape", [{}, {"tie_word_embeddings": True, "rms_norm_eps": 1e-6}])
def test_stock_checkpoint_gives_the_native_models_logits(
    tiny_llama: Callable[..., Path], tmp_path: Path, options: dict[str, Any], shape: dict[str, Any]
) -> None:
    model = tiny_llama(**shape)
    native = convert(model, tmp_path / "native", **options)
    stock = convert(model, tmp_path / "stock", format="deepseek_v3", **options)
    assert stock.layers == native.layers
    config = json.loads((tmp_path / "stock" / "config.json").read_text())
    assert config["model_type"] == "deepseek_v3"
    assert "auto_map" not in config
    tokens = token_rows(model, "while True: pass\n" * 60, 2, 100)
    expected = logits(tmp_path / "native", tokens)
    assert kl(expected, logits(tmp_path / "stock", tokens)) <= 1e-6
    assert kl(logits(model, tokens), expected) > 1e-3  # half the cache is gone: equality would mean nothing converted


def test_padding_to_engine_shapes_changes_no_logit(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny_llama(head_dim=64, hidden_size=96)
    tokens = token_rows(model, "import this\n" * 60, 2, 100)
    convert(model, tmp_path / "native", kv_lora_rank=64, qk_rope_head_dim=32)
    expected = logits(tmp_path / "native", tokens)
    for pad, shape in ((False, (64, 32, 64, 64)), (True, (512, 64, 128, 128))):
        out = tmp_path / f"stock-{pad}"
        report = convert(model, out, kv_lora_rank=64, qk_rope_head_dim=32, format="deepseek_v3", pad_to_engine=pad)
        config = json.loads((out / "config.json").read_text())
        names = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
        assert tuple(config[name] for name in names) == shape
        assert report.plan.cache_bytes_after == 2 * 4 * (shape[0] + shape[1])
        assert kl(expected, logits(out, tokens)) <= 1e-6


def test_wide_rope_keys_are_padded_unasked_and_narrow_ones_are_not(tiny_llama: Callable[..., Path]) -> None:
    model = tiny_llama(head_dim=64, hidden_size=96)
    for rope, cached in ((64, 512 + 64), (32, 64 + 32)):
        plan = dry_run(model, kv_lora_rank=64, qk_rope_head_dim=rope, format="deepseek_v3")
        assert plan.cache_bytes_after == 2 * 4 * cached


def test_plan_knows_the_output_without_reading_weights(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    for format in ("transmla", "deepseek_v3"):
        options = {"kv_lora_rank": 24, "qk_rope_head_dim": 8, "format": format, "dtype": "bfloat16"}
        plan = dry_run(model, calibration_tokens=1024, sequence_length=128, refine_steps=3, **options)
        report = convert(model, tmp_path / format, **options)
        assert report.plan == plan
        index = json.loads((tmp_path / format / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == plan.output_bytes
        assert plan.cache_bytes_before == 2 * 2 * 2 * 2 * 16
        assert plan.cache_bytes_after == 2 * 2 * (24 + 8)
        assert "50.00%" in str(plan)


def test_plan_counts_the_memory_of_the_largest_layer(tiny_model: Callable[..., Path]) -> None:
    def peak(mlp_only_layers: list[int]) -> int:
        experts = {"num_experts": 4, "moe_intermediate_size": 32, "intermediate_size": 48}
        model = tiny_model("qwen3_moe", mlp_only_layers=mlp_only_layers, **experts)
        return dry_run(model, kv_lora_rank=24, qk_rope_head_dim=8, sequence_length=128).peak_memory_bytes

    assert peak([]) == peak([0]) > peak([0, 1])


@pytest.mark.parametrize("format", ["transmla", "deepseek_v3"])
def test_how_to_generate_is_kept_and_where_it_came_from_is_not(
    tiny_llama: Callable[..., Path], tmp_path: Path, format: str
) -> None:
    model = Path(shutil.copytree(tiny_llama(), tmp_path / "model"))
    (model / "generation_config.json").write_text('{"eos_token_id": [1, 7]}')
    fields = json.loads((model / "config.json").read_text())
    fields["auto_map"] = {"AutoModelForCausalLM": "modeling.Model"}
    (model / "config.json").write_text(json.dumps(fields))
    convert(model, tmp_path / "out", kv_lora_rank=24, qk_rope_head_dim=8, format=format)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config.eos_token_id == [1, 7]
    config = (tmp_path / "out" / "config.json").read_text()
    assert "auto_map" not in config
    assert str(tmp_path) not in config


def test_freqfold_auto_takes_each_layers_best(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny_llama(num_hidden_layers=3)
    options: dict[str, Any] = {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "method": "transmla", "refine_steps": 0}
    fixed = {
        fold: convert(model, tmp_path / str(fold), freqfold=fold, **options).layers
        for fold in dry_run(model, **options).freqfold
    }
    assert len(fixed) > 1
    for index, layer in enumerate(convert(model, tmp_path / "auto", **options).layers):
        best = min((layers[index] for layers in fixed.values()), key=lambda layer: layer.attention_error)
        assert replace(layer, hidden_state_error=0.0) == replace(best, hidden_state_error=0.0)


def test_report_holds_what_the_model_does(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    report = convert(tiny_llama(), tmp_path / "out", kv_lora_rank=24, qk_rope_head_dim=8)
    saved = json.loads((tmp_path / "out" / "conversion_report.json").read_text())
    assert saved == report.to_dict()
    assert saved["perplexity_after"] == report.perplexity_after
    assert (tmp_path / "out" / "conversion_report.png").read_bytes().startswith(b"\x89PNG")
    assert "excess nats" in (tmp_path / "out" / "conversion_report.txt").read_text()


def test_report_is_what_the_written_model_does(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny_llama(max_position_embeddings=1024)
    text = "the quick brown fox jumps over the lazy dog, " * 400
    for name, test in (("held out", None), ("test text", ["she sells sea shells by the sea shore, " * 100])):
        out = tmp_path / name
        report = convert(model, out, calibration=[text], test=test, kv_lora_rank=24, qk_rope_head_dim=8)
        tokens = token_rows(model, text, 9, 128)[8:] if test is None else token_rows(model, test[0], 20, 128)
        assert report.test_tokens == tokens.numel()
        likeliest = []
        for path, perplexity in ((model, report.perplexity_before), (out, report.perplexity_after)):
            rows = logits(path, tokens)[:, :-1].flatten(0, 1)
            nll = torch.nn.functional.cross_entropy(rows, tokens[:, 1:].flatten())
            assert float(nll.exp()) == pytest.approx(perplexity, rel=1e-4)
            likeliest.append(rows.argmax(-1))
        assert report.agreement == pytest.approx(float((likeliest[0] == likeliest[1]).float().mean()), abs=2e-3)
        assert list(report.recall) == [512]  # the model has no room for 2048


def test_recall_asks_for_a_random_string_again() -> None:
    text = torch.arange(100, 400).view(3, 100)
    tokens = recall_tokens(text, distance=150, num_sequences=2)
    assert tokens.shape == (2, 150 + 64)
    assert torch.equal(tokens[:, 150:], tokens[:, :64])
    assert torch.equal(tokens[:, 64:150], text.flatten().view(2, 150)[:, 64:])
    assert not torch.equal(tokens[0, :64], tokens[1, :64])
    assert recalled(Predictions(0.0, tokens[:, 1:]), tokens) == 1.0
    wrong = tokens[:, 1:].clone()
    wrong[0, -28:] = 0
    assert recalled(Predictions(0.0, wrong), tokens) == 0.75


SCRIPT = """
import sys, torch, transmla_ext
torch.set_num_threads(2)
transmla_ext.convert(sys.argv[1], sys.argv[2], kv_lora_rank=24, qk_rope_head_dim=8, calibration_tokens=int(sys.argv[3]),
                     sequence_length=128, refine_steps=3, progress=False)
# Not ru_maxrss: that starts at what the parent had when it forked.
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def start(model: Path, out: Path, calibration_tokens: int = 8192) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(model), str(out), str(calibration_tokens)], stdout=subprocess.PIPE
    )


def same_directories(a: Path, b: Path) -> bool:
    names = sorted(path.name for path in a.iterdir())
    match, _, _ = filecmp.cmpfiles(a, b, names, shallow=False)
    return names == sorted(path.name for path in b.iterdir()) == sorted(match)


def test_killed_conversion_resumes_to_the_same_bytes(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny_llama(num_hidden_layers=8)  # two windows
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(model, whole).wait() == 0
    partial = tmp_path / "killed.partial"
    for layers_done in (1, 6, 11):
        process = start(model, killed)
        while process.poll() is None and len(list(partial.glob("layer-*.json"))) < layers_done:
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.01))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, f"finished before {layers_done} files: nothing was interrupted"
        assert not killed.exists()
        assert not (partial / "config.json").exists()
        with pytest.raises(transmla_ext.errors.TransMLAError, match="unfinished"):
            transmla_ext.load(partial)
    before = {path.name: path.stat().st_mtime_ns for path in partial.glob("layer-*.json")}
    process = start(model, killed)
    made_again: list[str] = []
    while process.poll() is None and partial.exists():
        with suppress(FileNotFoundError):  # gone once the model is written
            made_again += [name for name, stamp in before.items() if (partial / name).stat().st_mtime_ns != stamp]
        time.sleep(0.01)
    assert made_again == []
    assert process.wait() == 0
    assert not partial.exists()
    assert same_directories(whole, killed)


def test_another_plan_does_not_resume_from_the_old_one(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    model, out = tiny_llama(num_hidden_layers=6), tmp_path / "out"
    process = start(model, out)
    while process.poll() is None and not list((tmp_path / "out.partial").glob("layer-*.json")):
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert (tmp_path / "out.partial").exists()
    convert(model, out, kv_lora_rank=16, qk_rope_head_dim=8)
    convert(model, tmp_path / "fresh", kv_lora_rank=16, qk_rope_head_dim=8)
    assert same_directories(out, tmp_path / "fresh")


def test_overwrite_replaces_the_whole_directory(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old.txt").write_text("old")
    with pytest.raises(ValueError, match="not empty"):
        convert(tiny_llama(), out, kv_lora_rank=24, qk_rope_head_dim=8)
    assert [path.name for path in out.iterdir()] == ["old.txt"]
    convert(tiny_llama(), out, kv_lora_rank=24, qk_rope_head_dim=8, overwrite=True)
    assert (out / "config.json").exists()
    assert not (out / "old.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_peak_memory_does_not_grow_with_the_number_of_layers(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    """Layers of 11 MB each: two more windows of them held at once would show as 130 MB."""

    def peak(layers: int) -> int:
        shape = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 1}
        process = start(tiny_llama(num_hidden_layers=layers, **shape), tmp_path / f"out-{layers}", 1024)
        printed, _ = process.communicate()
        assert process.returncode == 0
        return int(printed.split()[1]) * 1024

    assert peak(18) < peak(6) + 40e6
