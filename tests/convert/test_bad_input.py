"""Bad input gets a clear error before any work, and nothing is left behind."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import transmla_ext
from transmla_ext.convert.export import check_stock
from transmla_ext.errors import CheckpointError, UnsupportedModelError

GOOD: dict[str, Any] = {
    "kv_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "calibration_tokens": 512,
    "refine_steps": 2,
    "sequence_length": 128,
    "progress": False,
}


@pytest.fixture
def model(tiny_llama: Callable[..., Path], tmp_path: Path) -> Path:
    """A directory of its own, to be broken."""
    return Path(shutil.copytree(tiny_llama(), tmp_path / "model"))


def assert_refused(model: Path, error: type[Exception], *words: str, **options: Any) -> None:
    """convert() raises `error` whose text holds all words, and leaves no file behind."""
    before = sorted(model.parent.rglob("*"))
    with pytest.raises(error) as raised:
        transmla_ext.convert(model, model.parent / "out", **{**GOOD, **options})
    for word in words:
        assert word in str(raised.value)
    assert sorted(model.parent.rglob("*")) == before


def edit_config(model: Path, **changes: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))


def edit_weights(model: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    tensors = load_file(model / "model.safetensors")
    changed = change(tensors.pop(name))
    if changed is not None:
        tensors[name] = changed
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kv_lora_rank": 0}, ["kv_lora_rank", "from 8 to 56", "got 0"]),
        ({"kv_lora_rank": 20}, ["kv_lora_rank", "multiple of 8", "got 20"]),
        ({"kv_lora_rank": 64}, ["kv_lora_rank", "from 8 to 56", "got 64"]),
        ({"qk_rope_head_dim": 12}, ["qk_rope_head_dim", "divides the 16 numbers of a head that RoPE turns", "got 12"]),
        ({"qk_rope_head_dim": 32}, ["qk_rope_head_dim", "divides the 16 numbers", "got 32"]),
        ({"kv_lora_rank": "full"}, ["kv_lora_rank='full'", "leave qk_rope_head_dim out"]),
        ({"q_lora_rank": 1000}, ["q_lora_rank", "from 8 to 64", "got 1000"]),
        ({"freqfold": 3}, ["freqfold", "2, 4, 8", "got 3"]),
        ({"format": "gguf"}, ["format", "transmla, deepseek_v3, deepseek_v2", "'gguf'"]),
        ({"method": "best"}, ["method", "auto, transmla", "'best'"]),
        ({"dtype": "int8"}, ["dtype", "float32, bfloat16, float16", "'int8'"]),
        ({"dtype": "float16", "format": "deepseek_v3"}, ["bfloat16 or float32", "float16"]),
        ({"pad_to_engine": True}, ["pad_to_engine", "stock formats"]),
        ({"pad_to_engine": True, "format": "deepseek_v3"}, ["pad_to_engine", "qk_rope_head_dim <= 64"]),
        ({"kv_lora_rank": "full", "qk_rope_head_dim": None, "format": "deepseek_v3"}, ["use format='transmla'"]),
        ({"calibration": ["too short"]}, ["calibration text too short", "lower calibration_tokens=512"]),
        ({"calibration": "no-such-file.txt"}, ["no-such-file.txt"]),
        ({"calibration_tokens": 0}, ["calibration_tokens", "got 0"]),
        ({"refine_steps": -1}, ["refine_steps", "got -1"]),
        ({"refine_window": 0}, ["refine_window", "got 0"]),
        ({"test": ["too short"]}, ["test text too short", "one sequence of 128 tokens"]),
        ({"layers": 3}, ["layers must be from 1 to the model's 2", "got 3"]),
        ({"sequence_length": 100000}, ["sequence_length=100000", "512 positions"]),
    ],
)
def test_argument(model: Path, options: dict[str, Any], words: list[str]) -> None:
    assert_refused(model, ValueError, *words, **options)


def test_unknown_architecture_names_the_supported_ones(model: Path) -> None:
    for model_type in ("gpt2", "no_such_model"):
        edit_config(model, model_type=model_type)
        assert_refused(model, UnsupportedModelError, model_type, "supported: gemma2,", "llama")
    for model_type in ("transmla_llama", "deepseek_v3"):
        edit_config(model, model_type=model_type)
        assert_refused(model, UnsupportedModelError, model_type, "latent attention already")


def test_tensors_that_the_config_has_no_place_for(model: Path) -> None:
    edit_config(model, attention_bias=True)
    assert_refused(model, CheckpointError, "has no tensor model.layers.0.self_attn.q_proj.bias")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"hidden_act": "no_such_act"}, "no_such_act"),
        ({"rope_parameters": {"rope_type": "no_such_rope", "rope_theta": 1e4}}, "no_such_rope"),
        ({"num_key_value_heads": 0}, "ZeroDivisionError"),
    ],
)
def test_config_that_transformers_has_no_model_for(model: Path, changes: dict[str, Any], word: str) -> None:
    edit_config(model, **changes)
    assert_refused(model, CheckpointError, "transformers cannot build the llama of this config.json", word)


def test_file_without_tensors(model: Path) -> None:
    save_file({}, model / "model.safetensors")
    assert_refused(model, CheckpointError, "has no tensor model.embed_tokens.weight")


def test_scaled_rope_has_no_stock_export(model: Path) -> None:
    edit_config(model, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0})
    assert_refused(model, UnsupportedModelError, "deepseek_v3", "linear", format="deepseek_v3")


def test_truncated_shard(model: Path) -> None:
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[: len(data) // 2])
    assert_refused(model, CheckpointError, "model.safetensors", "truncated")


def test_missing_shard(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_llama(max_shard_size="60KB"), tmp_path / "model"))
    shards = sorted(model.glob("model-*.safetensors"))
    assert len(shards) > 1
    shards[1].unlink()
    assert_refused(model, CheckpointError, shards[1].name, "download")


def test_truncated_index_and_config(model: Path) -> None:
    (model / "model.safetensors.index.json").write_text('{"weight_map": {')
    assert_refused(model, CheckpointError, "model.safetensors.index.json")
    (model / "model.safetensors.index.json").unlink()
    (model / "config.json").write_text("{")
    assert_refused(model, CheckpointError, "config.json")
    (model / "config.json").unlink()
    assert_refused(model, CheckpointError, "no config.json")


def test_missing_tensor(model: Path) -> None:
    edit_weights(model, "model.layers.1.mlp.up_proj.weight", lambda tensor: None)
    assert_refused(model, CheckpointError, "model.layers.1.mlp.up_proj.weight")


def test_shape_that_contradicts_the_config(model: Path) -> None:
    edit_weights(model, "model.layers.1.self_attn.k_proj.weight", lambda tensor: tensor[:16].clone())
    assert_refused(model, CheckpointError, "model.layers.1.self_attn.k_proj.weight", "[16, 64]", "[32, 64]")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda expert: None, ["has no tensor"]),
        (lambda expert: torch.cat([expert, expert[:1]]), ["[97, 64]", "asks for [96, 64]"]),
        (lambda expert: expert[:, 1:].clone(), ["[96, 63]", "asks for [96, 64]"]),
    ],
)
def test_one_bad_expert_of_many(
    tiny_model: Callable[..., Path], tmp_path: Path, change: Callable[[torch.Tensor], Any], words: list[str]
) -> None:
    model = Path(shutil.copytree(tiny_model("mixtral", num_local_experts=4), tmp_path / "model"))
    name = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    edit_weights(model, name, change)
    assert_refused(model, CheckpointError, name, *words)


def test_tensor_without_a_place(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.self_attn.k_norm.weight"] = torch.ones(16)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert_refused(model, CheckpointError, "model.layers.0.self_attn.k_norm.weight")


def test_wrong_dtype(model: Path) -> None:
    edit_weights(model, "model.layers.0.mlp.up_proj.weight", lambda tensor: tensor.to(torch.int8))
    assert_refused(model, CheckpointError, "model.layers.0.mlp.up_proj.weight is I8", "BF16")


def test_quantised_model(model: Path) -> None:
    edit_config(model, quantization_config={"quant_method": "gptq", "bits": 4})
    assert_refused(model, CheckpointError, "quantised")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_in_weights(model: Path, value: float) -> None:
    def poison(tensor: torch.Tensor) -> torch.Tensor:
        tensor[3, 5] = value
        return tensor

    edit_weights(model, "model.layers.1.self_attn.v_proj.weight", poison)
    assert_refused(model, CheckpointError, "model.layers.1.self_attn.v_proj.weight", "NaN")


def test_pickles_are_refused(model: Path) -> None:
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    assert_refused(model, CheckpointError, "pytorch_model.bin", "pickles", "safetensors")


def test_no_tokenizer(model: Path) -> None:
    for file in model.glob("tokenizer*"):
        file.unlink()
    assert_refused(model, CheckpointError, "tokenizer")


def test_truncated_gguf(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00\x10")
    assert_refused(path, CheckpointError, "model.gguf")


def test_path_that_is_no_model(tmp_path: Path) -> None:
    assert_refused(tmp_path / "nowhere", CheckpointError, "does not exist")
    (tmp_path / "model.pt").write_bytes(b"")
    assert_refused(tmp_path / "model.pt", CheckpointError, ".gguf")


def test_full_disk_says_so_and_leaves_nothing(model: Path) -> None:
    """A limit on the size of a file stands in for the full disk; the kernel refuses the same write call."""
    script = (
        "import resource, sys, transmla_ext\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))\n"
        "transmla_ext.convert(sys.argv[1], sys.argv[2], kv_lora_rank=24, qk_rope_head_dim=8, calibration_tokens=512,\n"
        "                     sequence_length=128, refine_steps=2, progress=False)\n"
    )
    before = sorted(model.parent.rglob("*"))
    run = subprocess.run(
        [sys.executable, "-c", script, model, model.parent / "out"], capture_output=True, text=True, check=False
    )
    assert run.returncode != 0
    assert "is full; free some space" in run.stderr
    assert sorted(model.parent.rglob("*")) == before


def test_no_room_is_known_before_any_work(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 100, 0))
    assert_refused(model, ValueError, "0.00 GB free")


def test_output_path_that_is_a_file(model: Path) -> None:
    (model.parent / "out").write_text("")
    assert_refused(model, ValueError, "is a file")


@pytest.mark.parametrize("out", ["model", "."])
def test_output_that_would_replace_the_model(model: Path, out: str) -> None:
    with pytest.raises(ValueError, match="holds the model itself"):
        transmla_ext.convert(model, model.parent / out, **GOOD, overwrite=True)
    assert (model / "model.safetensors").exists()


STOCK: dict[str, Any] = {
    "tie_word_embeddings": False,
    "rope_interleave": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}


@pytest.mark.parametrize(
    ("names", "changes", "word"),
    [
        (["lm_head.weight", "model.layers.0.self_attn.kv_a_proj_with_mqa.bias"], {}, "kv_a_proj_with_mqa.bias"),
        (["model.embed_tokens.weight"], {}, "lm_head.weight"),
        (["lm_head.weight"], {"tie_word_embeddings": True}, "lm_head.weight"),
        (["lm_head.weight"], {"rope_interleave": False}, "rope_interleave"),
        (["lm_head.weight"], {"rope_parameters": {"rope_type": "llama3"}}, "llama3"),
    ],
)
def test_exporter_refuses_what_engines_drop_silently(names: list[str], changes: dict[str, Any], word: str) -> None:
    check_stock(["lm_head.weight"], STOCK)
    with pytest.raises(UnsupportedModelError, match=word):
        check_stock(names, STOCK | changes)
