"""Converted checkpoints in vLLM, on its CPU backend, against transformers running the same checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import FAMILIES, token_rows
from transformers import AutoModelForCausalLM
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

import transmla_ext
from transmla_ext.errors import UnsupportedModelError
from transmla_ext.plugins.vllm.model import native_class

pytestmark = pytest.mark.usefixtures("one_thread")

# vLLM takes a window in all layers of a Qwen2 or in none.
NATIVE = FAMILIES | {"qwen2": {}}
# Heads and a RoPE key as vLLM's own MLA kernels take them, once padded.
ENGINE = {"hidden_size": 256, "head_dim": 64}
# vLLM's own rotary op, which the eager mode takes by default, is wrong for MLA on the CPU.
EAGER = {"enforce_eager": True, "compilation_config": {"custom_ops": ["none"]}}
# Small enough that prompts are cut, run beside decoding sequences and lie on many pages.
CUT = {"max_num_batched_tokens": 16, "block_size": 16}
NEW = 24
PROMPTS = [torch.randint(2, 300, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (1, 50, 7, 33, 18)]


@pytest.fixture
def serve() -> Iterator[Callable[..., LLM]]:
    """serve(checkpoint, **options of vLLM) -> an engine in fp32 that is gone after the test."""

    engines = []

    def start(path: Path, **options: Any) -> LLM:
        small = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 8, "kv_cache_memory_bytes": 2**26}
        engines.append(LLM(str(path), **small | options))
        return engines[-1]

    yield start
    for engine in engines:  # the traceback of a test that failed would keep it for the next one
        engine.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()


def convert(model: Path, out: Path, **options: Any) -> Path:
    small = {"calibration_tokens": 1024, "sequence_length": 128, "refine_steps": 2, "progress": False}
    transmla_ext.convert(model, out, **small | options)
    return out


def check(
    llm: LLM, prompts: list[list[int]], reference: Path, dtype: torch.dtype = torch.float32, atol: float = 1e-4
) -> None:
    """Every greedy token is transformers' likeliest after the same text, up to ties, with the same log-probability."""
    greedy = SamplingParams(temperature=0, max_tokens=NEW, logprobs=0, ignore_eos=True)
    # transformers 5.19 would take sdpa for Gemma 2, which leaves its soft-cap out.
    model = AutoModelForCausalLM.from_pretrained(reference, dtype=dtype, attn_implementation="eager").eval()
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], greedy, use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens = list(output.outputs[0].token_ids)
        assert len(tokens) == NEW
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        expected = logits.float().log_softmax(-1)
        of_tokens = expected.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        torch.testing.assert_close(of_tokens, expected.amax(-1), atol=atol, rtol=0)
        actual = [logprobs[token].logprob for logprobs, token in zip(output.outputs[0].logprobs, tokens, strict=True)]
        torch.testing.assert_close(torch.tensor(actual), of_tokens, atol=atol, rtol=0)


@pytest.mark.parametrize("model_type", NATIVE)
def test_native(tiny_model: Callable[..., Path], serve: Callable[..., LLM], tmp_path: Path, model_type: str) -> None:
    path = convert(tiny_model(model_type, **NATIVE[model_type]), tmp_path / "out", kv_lora_rank=24, qk_rope_head_dim=8)
    llm = serve(path, **EAGER, **CUT)
    check(llm, PROMPTS, path)
    check(llm, PROMPTS, path)  # from the pages that the first time left


@pytest.mark.slow
def test_native_as_users_run_it(
    tiny_model: Callable[..., Path],
    serve: Callable[..., LLM],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Compiled, in processes of its own, which have to find the plug-in; with other ranks in each layer.
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    path = convert(tiny_model("llama"), tmp_path / "out", kv_lora_rank="auto", cache_bytes=2 * 4 * 36)
    shapes = json.loads((path / "config.json").read_text())["mla"]
    assert shapes[0]["kv_lora_rank"] != shapes[1]["kv_lora_rank"]
    check(serve(path), PROMPTS, path)


def test_native_when_the_cache_is_too_small_for_all(
    tiny_model: Callable[..., Path], serve: Callable[..., LLM], tmp_path: Path
) -> None:
    path = convert(tiny_model("llama"), tmp_path / "out", kv_lora_rank=24, qk_rope_head_dim=8, q_lora_rank=48)
    prompts = torch.randint(2, 300, (5, 15), generator=torch.Generator().manual_seed(3)).tolist()
    small = {"max_model_len": 64, "block_size": 16, "num_gpu_blocks_override": 9}  # 15 pages would be wanted
    llm = serve(path, **EAGER, **small, disable_log_stats=False)
    check(llm, prompts, path)
    (preemptions,) = (metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")
    assert preemptions > 0


def test_native_in_bf16(tiny_model: Callable[..., Path], serve: Callable[..., LLM], tmp_path: Path) -> None:
    path = convert(tiny_model("llama"), tmp_path / "out", kv_lora_rank=24, qk_rope_head_dim=8, dtype="bfloat16")
    check(serve(path, **EAGER, dtype="bfloat16"), PROMPTS, path, torch.bfloat16, atol=0.1)


@pytest.mark.parametrize(("q_lora_rank", "options"), [(None, EAGER), (96, {})], ids=["eager", "compiled-q-lora"])
def test_stock(
    tiny_model: Callable[..., Path],
    serve: Callable[..., LLM],
    tmp_path: Path,
    q_lora_rank: int | None,
    options: dict[str, Any],
) -> None:
    ranks = {"kv_lora_rank": 128, "qk_rope_head_dim": 64, "q_lora_rank": q_lora_rank}
    path = convert(tiny_model("llama", **ENGINE), tmp_path / "out", format="deepseek_v3", **ranks)
    check(serve(path, **options), PROMPTS, path)


def test_stock_experts(tiny_model: Callable[..., Path], serve: Callable[..., LLM], tmp_path: Path) -> None:
    # transformers leaves norm_topk_prob out of a deepseek_v2 model; the native one of the same weights does not.
    model = tiny_model("mixtral", **ENGINE, num_local_experts=4, num_experts_per_tok=2)
    stock, native = (
        convert(model, tmp_path / format, kv_lora_rank=128, qk_rope_head_dim=64, format=format)
        for format in ("deepseek_v2", "transmla")
    )
    check(serve(stock, **EAGER), PROMPTS, native)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["transmla", "deepseek_v3"])
def test_smollm2(smollm2: Path, topics_text: Any, serve: Callable[..., LLM], tmp_path: Path, format: str) -> None:
    path = convert(smollm2, tmp_path / "out", kv_lora_rank=320, qk_rope_head_dim=64, refine_steps=0, format=format)
    rows = token_rows(smollm2, topics_text.held_out, 3, 100).tolist()
    check(serve(path, **EAGER), [row[:length] for row, length in zip(rows, (100, 12, 55), strict=True)], path)


def test_native_refusals() -> None:
    def build(**fields: Any) -> None:
        fine = {"rope_type": "default", "world_size": 1, "cache_dtype": "auto"}
        rope_type, world_size, cache_dtype = (fine | fields).values()
        config = SimpleNamespace(rope_parameters={"rope_type": rope_type})
        native_class("TransMLALlamaForCausalLM")(
            vllm_config=SimpleNamespace(
                model_config=SimpleNamespace(hf_config=config),
                parallel_config=SimpleNamespace(world_size=world_size),
                cache_config=SimpleNamespace(cache_dtype=cache_dtype),
            )
        )

    with pytest.raises(UnsupportedModelError, match="RoPE of type longrope is not supported here"):
        build(rope_type="longrope")
    with pytest.raises(ValueError, match="a native TransMLA model runs on one device"):
        build(world_size=2)
    with pytest.raises(ValueError, match="leave kv_cache_dtype at 'auto', got 'fp8'"):
        build(cache_dtype="fp8")
