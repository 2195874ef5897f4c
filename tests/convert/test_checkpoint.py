"""Reading is the same from every container; calibration text comes from every source."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from models import FAMILIES, Text
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from transmla_ext.checkpoint import open_checkpoint
from transmla_ext.convert.calibrate import calibration_tokens


def test_gguf_reads_as_transformers_dequantises_it(smollm2_gguf: Path, smollm2: Path) -> None:
    gguf, safetensors = open_checkpoint(smollm2_gguf), open_checkpoint(smollm2)
    assert gguf.shapes == safetensors.shapes
    assert gguf.config.num_key_value_heads == safetensors.config.num_key_value_heads == 3
    assert gguf.config.rope_parameters == safetensors.config.rope_parameters
    for name in gguf.shapes:
        if ".layers." not in name or ".layers.7." in name:
            assert torch.equal(gguf.tensor(name), safetensors.tensor(name)), name
    text = "def f(x):\n    return x ** 2  # naïve"
    assert gguf.tokenizer()(text).input_ids == safetensors.tokenizer()(text).input_ids


def test_shards_read_as_one_file(tiny_llama: Callable[..., Path]) -> None:
    whole, sharded = open_checkpoint(tiny_llama()), open_checkpoint(tiny_llama(max_shard_size="60KB"))
    assert len(sharded.identity()) > len(whole.identity())
    assert sharded.shapes == whole.shapes
    for name in whole.shapes:
        assert torch.equal(sharded.tensor(name), whole.tensor(name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_the_files(tiny_llama: Callable[..., Path], dtype: torch.dtype) -> None:
    assert open_checkpoint(tiny_llama(dtype=dtype)).dtype == dtype


def test_ropes_constants_do_not_make_it_fp32(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_llama(dtype=torch.float16), tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert open_checkpoint(model).dtype == torch.float16


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_experts_read_alike_published_and_stacked(
    tiny_model: Callable[..., Path], tmp_path: Path, model_type: str
) -> None:
    published = tiny_model(model_type, **FAMILIES[model_type], dtype=torch.bfloat16)
    assert any(".experts.3." in name for name in load_file(published / "model.safetensors"))
    stacked = Path(shutil.copytree(published, tmp_path / "stacked"))
    tensors = AutoModelForCausalLM.from_pretrained(published).state_dict()
    save_file(tensors, stacked / "model.safetensors", metadata={"format": "pt"})
    one, other = open_checkpoint(published), open_checkpoint(stacked)
    assert one.shapes == other.shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        assert torch.equal(one.tensor(name), tensor)
        assert torch.equal(other.tensor(name), tensor)


def test_calibration_text_may_be_a_file_a_list_or_a_dataset(
    tiny_llama: Callable[..., Path], topics_text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = open_checkpoint(tiny_llama()).tokenizer()
    text = topics_text.calibration[:20_000]
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")

    def load_dataset(name: str, *, split: str, streaming: bool) -> list[dict[str, Any]]:
        assert (name, split, streaming) == ("some/text", "train", True)
        return [{"text": text}, {"text": "never needed"}]

    datasets = ModuleType("datasets")
    datasets.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", datasets)
    read = [
        calibration_tokens(source, tokenizer, 2048, 128) for source in ([text], str(tmp_path / "text.txt"), "some/text")
    ]
    assert read[0].train.shape == (16, 128)
    assert read[0].held_out.shape == (2, 128)
    assert len({tokens.digest() for tokens in read}) == 1


def test_built_in_text_is_there_and_held_out_text_follows(tiny_llama: Callable[..., Path], topics_text: Text) -> None:
    tokenizer = open_checkpoint(tiny_llama()).tokenizer()
    tokens = calibration_tokens(None, tokenizer, 4000, 128)
    assert tokens.train.shape == (32, 128)  # rounded up to whole sequences
    assert tokens.held_out.shape == (4, 128)
    shown = tokenizer.decode(torch.cat([tokens.train, tokens.held_out]).flatten())
    assert topics_text.calibration.startswith(shown[:200])


def test_sequences_start_with_bos_where_the_tokenizer_adds_it(tiny_llama: Callable[..., Path]) -> None:
    tokenizer = open_checkpoint(tiny_llama()).tokenizer()
    plain = calibration_tokens(["to be or not to be " * 500], tokenizer, 512, 64)
    bos = tokenizer.bos_token_id
    call = tokenizer.__class__.__call__

    class WithBos(type(tokenizer)):  # type: ignore[misc]
        def __call__(self, text: str, add_special_tokens: bool = True, **options: Any) -> Any:
            encoded = call(self, text, add_special_tokens=False, **options)
            if add_special_tokens:
                encoded["input_ids"] = [bos, *encoded["input_ids"]]
            return encoded

    tokenizer.__class__ = WithBos
    marked = calibration_tokens(["to be or not to be " * 500], tokenizer, 512, 64)
    assert (marked.train[:, 0] == bos).all()
    assert torch.equal(marked.train[0, 1:], plain.train[0, :-1])
