import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import CONFIGS, VOCAB_SIZE
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from transmla_ext import load
from transmla_ext.errors import CheckpointError, UnsupportedModelError
from transmla_ext.runtime import CacheFullError

LENGTHS = (1, 14, 7)


def sequences_of(length, num=3):
    return torch.randint(0, VOCAB_SIZE - 1, (num, length), generator=torch.Generator().manual_seed(3)).tolist()


def transformers_logits(path, sequences, dtype=torch.float32):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    with torch.no_grad():
        return torch.stack([model(torch.tensor([ids])).logits[0] for ids in sequences])


def poison_free_pages(model, live):
    for layer in model.cache.layers:
        free = torch.ones(layer.size(0), dtype=torch.bool)
        free[[block for sequence in live for block in sequence.blocks]] = False
        layer[free] = torch.nan


@pytest.mark.parametrize("fused", [True, False], ids=["mla_prefill", "sdpa"])
@pytest.mark.parametrize("name", CONFIGS)
def test_decode_is_prefill_is_transformers(checkpoints, name, fused):
    ids = sequences_of(24)
    expected = transformers_logits(checkpoints[name], ids)
    model = load(checkpoints[name], block_size=4, max_tokens=256)
    model._prefills_fused = fused

    # Leave holes, so that the sequences under test get scattered, used pages.
    _, junk = model.prefill(sequences_of(9, num=8))
    model.free(junk[::2])
    poison_free_pages(model, junk[1::2])

    logits, sequences = model.prefill([ids[i][:n] for i, n in enumerate(LENGTHS)])
    for i, n in enumerate(LENGTHS):
        torch.testing.assert_close(logits[i], expected[i, n - 1], atol=1e-3, rtol=0)
    # Each joins the batch when the longer ones are through: it gets ragged and changes its rows.
    for step in range(24):
        batch = [i for i, n in enumerate(LENGTHS) if n <= step]
        if batch:
            logits = model.decode([sequences[i] for i in batch], [ids[i][step] for i in batch])
            for row, i in enumerate(batch):
                torch.testing.assert_close(logits[row], expected[i, step], atol=1e-3, rtol=0)

    whole, _ = model.prefill(ids)
    torch.testing.assert_close(whole, expected[:, -1], atol=1e-3, rtol=0)
    model.free(junk)


@pytest.mark.parametrize("fused", [True, False], ids=["mla_prefill", "sdpa"])
@pytest.mark.parametrize("name", ["native", "stock-q-lora"])
@pytest.mark.parametrize("chunk_size", [1, 5, 16])
def test_chunked_prefill_is_whole_prefill(checkpoints, name, chunk_size, fused):
    model = load(checkpoints[name], block_size=4)
    model._prefills_fused = fused
    prompts = [ids[:n] for ids, n in zip(sequences_of(14), LENGTHS, strict=True)]
    expected, _ = model.prefill(prompts)
    actual, sequences = model.prefill(prompts, chunk_size=chunk_size)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
    more = sequences_of(11)
    actual, _ = model.prefill(more, sequences=sequences, chunk_size=chunk_size)
    expected, _ = model.prefill([a + b for a, b in zip(prompts, more, strict=True)])
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["native", "stock"])
def test_bf16_is_as_accurate_as_transformers(checkpoints, name):
    ids = sequences_of(24)
    expected = transformers_logits(checkpoints[name], ids)
    baseline = (transformers_logits(checkpoints[name], ids, torch.bfloat16) - expected)[:, -8:]
    model = load(checkpoints[name], dtype="bfloat16", block_size=4)
    _, sequences = model.prefill([row[:16] for row in ids])
    actual = torch.stack([model.decode(sequences, [row[step] for row in ids]) for step in range(16, 24)], dim=1)
    assert actual.dtype == torch.bfloat16
    error = actual - expected[:, -8:]
    assert error.abs().max() <= 2 * baseline.abs().max()
    assert error.abs().mean() <= 1.5 * baseline.abs().mean()


def test_positions_past_the_first_rope_table(checkpoints, model, monkeypatch):
    ids = sequences_of(128, num=1)
    expected = transformers_logits(checkpoints["native"], ids)
    logits, sequences = model.prefill([ids[0][:20]])
    model._cos_sin = [table[:20] for table in model._cos_sin]
    logits = model.decode(sequences, [ids[0][20]])
    torch.testing.assert_close(logits[0], expected[0, 20], atol=1e-3, rtol=0)
    logits, _ = model.prefill([ids[0][21:]], sequences=sequences)
    torch.testing.assert_close(logits[0], expected[0, -1], atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match="129 tokens in a sequence, but the model has 128 positions"):
        model.decode(sequences, [0])


def test_a_full_cache_leaks_nothing(checkpoint):
    model = load(checkpoint, block_size=4, max_tokens=32)
    with pytest.raises(CacheFullError):
        model.prefill(sequences_of(20))
    assert model.cache.num_free_tokens == 32
    with pytest.raises(CacheFullError):
        model.generate(sequences_of(8), max_new_tokens=8, eos=())
    assert model.cache.num_free_tokens == 32
    model.generate(sequences_of(8), max_new_tokens=1)


def test_prefill_and_decode_refuse_bad_arguments(model):
    for bad, message in (([], "at least one"), ([[]], "a prompt is empty"), ([[VOCAB_SIZE]], "token ids must be in")):
        with pytest.raises(ValueError, match=message):
            model.prefill(bad)
    with pytest.raises(ValueError, match="chunk_size"):
        model.prefill([[1]], chunk_size=0)
    _, sequences = model.prefill([[1], [2]])
    with pytest.raises(ValueError, match="got 1, 2"):
        model.decode(sequences, [1])
    model.free(sequences)
    with pytest.raises(ValueError, match="after it was freed"):
        model.decode(sequences, [1, 2])


def test_load_refuses_what_is_no_mla_checkpoint(tmp_path, checkpoint):
    with pytest.raises(CheckpointError, match=r"no config.json"):
        load(tmp_path)
    partial = tmp_path / "model.partial"
    shutil.copytree(checkpoint, partial)
    with pytest.raises(CheckpointError, match="unfinished conversion"):
        load(partial)
    llama = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    LlamaForCausalLM(llama).save_pretrained(tmp_path / "llama")
    with pytest.raises(UnsupportedModelError, match="'llama' has no latent attention; convert it first: transmla"):
        load(tmp_path / "llama")
    with pytest.raises(ValueError, match="dtype must be one of"):
        load(checkpoint, dtype=torch.float64)


def test_load_refuses_pickles(tmp_path, checkpoint):
    path = shutil.copytree(checkpoint, tmp_path / "model")
    weights = path / "model.safetensors"
    torch.save(load_file(weights), path / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(CheckpointError, match="pickles are not read"):
        load(path)


def test_load_refuses_missing_and_unexpected_tensors(tmp_path, checkpoint):
    path = shutil.copytree(checkpoint, tmp_path / "model")
    weights = load_file(path / "model.safetensors")
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    tensor = weights.pop(name)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"missing keys: {name}"):
        load(path)
    bias = name.replace("weight", "bias")
    save_file(
        weights | {name: tensor, bias: tensor[:, 0].clone()}, path / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(CheckpointError, match=f"unexpected keys: {bias}"):
        load(path)


def test_load_refuses_damaged_files(tmp_path, checkpoint):
    path = shutil.copytree(checkpoint, tmp_path / "model")
    weights = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load(path)
    (path / "model.safetensors").write_bytes(weights)
    config = json.loads((path / "config.json").read_text())
    for damage, message in (
        ({"mla": config["mla"][:2]}, "mla must hold one entry for each of 3 layers, got 2"),
        ({"intermediate_size": 97}, "cannot be loaded"),
    ):
        (path / "config.json").write_text(json.dumps(config | damage))
        with pytest.raises(CheckpointError, match=message):
            load(path)


def test_the_stock_format_is_no_fp16(checkpoints):
    with pytest.raises(UnsupportedModelError, match="not in fp16"):
        load(checkpoints["stock"], dtype="float16")
    load(checkpoints["native"], dtype="float16").generate([[1, 2, 3]], max_new_tokens=3)


@pytest.mark.parametrize("fields", [{"attention_bias": True}, {"rope_interleave": False}])
def test_load_refuses_deepseek_variants_that_it_would_get_wrong(tmp_path, checkpoints, fields):
    config = json.loads((checkpoints["stock"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | fields))
    AutoModelForCausalLM.from_config(type(CONFIGS["stock"]).from_pretrained(tmp_path)).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=next(iter(fields))):
        load(tmp_path)
