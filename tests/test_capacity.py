"""plan(): what it predicts from a config is what one computes by hand."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import Gemma2Config, GPT2Config, LlamaConfig, MixtralConfig, Phi3Config, PreTrainedConfig, Qwen3Config

from transmla_ext import plan
from transmla_ext.capacity import GPU, GPUS, Capacity, CapacityPlan
from transmla_ext.errors import CheckpointError, UnsupportedModelError

README = Path(__file__).parents[1] / "README.md"

ONE = ["512+64"]

# transformers' defaults are LLaMA-2-7B's: 32 layers, 32 heads of 128 numbers, 32,000 tokens, an untied head.
LLAMA_2_7B = LlamaConfig(max_position_embeddings=4096)
LLAMA_3_8B = LlamaConfig(
    num_key_value_heads=8, intermediate_size=14336, vocab_size=128256, max_position_embeddings=8192
)
MIXTRAL_8X7B = MixtralConfig()
EMBEDDINGS = 32000 * 4096


def candidate(model: PreTrainedConfig = LLAMA_2_7B, pair: str = "512+64", **options: Any) -> Capacity:
    return plan(model, candidates=[pair], **options).candidates[0]


def test_llama_2_7b_in_numbers() -> None:
    capacities = plan(LLAMA_2_7B, gpu="24GB", context=8192, candidates=[(512, 64)])
    before, (after,) = capacities.original, capacities.candidates
    assert before.cache_bytes_per_token == 2 * 32 * 2 * 4096 == 524_288
    assert after.cache_bytes_per_token == 2 * 32 * (512 + 64) == 36_864
    assert before.weight_bytes == 2 * 6_738_415_616
    attention = 4096 * 32 * (128 + 64) + 4096 * (512 + 64) + 512 * 32 * (128 + 128) + 4096 * 4096
    assert after.weight_bytes == 2 * (6_738_415_616 - 32 * 4 * 4096**2 + 32 * attention)
    # 0.9 * 24 GiB - 13.48 GB = 9.72 GB for sequences of 4.29 GB, and 10.91 GB for sequences of 0.302 GB
    assert (before.max_batch_size, after.max_batch_size) == (2, 36)


def test_a_step_takes_as_long_as_the_slower_of_bytes_and_flops() -> None:
    before = plan(LLAMA_2_7B, gpu="24GB", context=8192, candidates=ONE).original.full
    assert before is not None
    weights = 6_738_415_616 - EMBEDDINGS
    assert before.weight_bytes == 2 * weights
    assert before.cache_bytes == 8192 * 524_288
    assert before.flops == 2 * weights + 8192 * 32 * 32 * 4 * 128
    assert before.tokens_per_second == pytest.approx(2 / ((2 * weights + 2 * 8192 * 524_288) / 1008e9))

    after = candidate(gpu="24GB", context=1024).full
    assert after is not None
    assert after.flops == after.weight_bytes + 1024 * 32 * 32 * 2 * (512 + 64 + 512)
    assert after.compute_seconds == pytest.approx(288 * after.flops / 165.2e12)
    assert after.compute_seconds > after.memory_seconds
    assert after.tokens_per_second == pytest.approx(288 / after.compute_seconds)


def test_a_tied_head_is_read_and_an_embedding_table_is_not() -> None:
    tied = plan(LlamaConfig(tie_word_embeddings=True), candidates=ONE).original
    untied = plan(LLAMA_2_7B, candidates=ONE).original
    assert tied.weight_bytes == untied.weight_bytes - 2 * EMBEDDINGS
    assert tied.single is not None
    assert untied.single is not None
    assert tied.single.weight_bytes == untied.single.weight_bytes


@pytest.mark.parametrize("gpu", GPUS)
def test_the_largest_batch_and_context_fill_the_memory(gpu: str) -> None:
    capacities = plan(LLAMA_2_7B, gpu=gpu, context=1000, candidates=ONE)
    usable = 0.9 * GPUS[gpu].memory * 2**30
    for column in capacities.columns:
        free = usable - column.weight_bytes
        assert column.max_batch_size == int(free / 1000 / column.cache_bytes_per_token)
        assert column.max_context == int(free / column.cache_bytes_per_token)


def test_weights_that_do_not_fit() -> None:
    capacities = plan(MIXTRAL_8X7B, gpu="24GB", candidates=ONE)
    assert {(c.max_batch_size, c.max_context, c.full) for c in capacities.columns} == {(0, 0, None)}
    assert "The weights do not fit (original, " in str(capacities)
    assert "do not fit" not in str(plan(MIXTRAL_8X7B, gpu="H200", candidates=ONE))


def test_a_sequence_that_does_not_fit_before_fits_after() -> None:
    capacities = plan(LLAMA_2_7B, gpu="24GB", context=32768, candidates=ONE)
    assert capacities.original.max_batch_size == 0
    assert capacities.original.full is capacities.candidates[0].alike is None
    assert capacities.candidates[0].max_batch_size == 9
    assert "do not fit" not in str(capacities)


def test_more_memory_and_shorter_contexts_never_hurt() -> None:
    def speeds(memory: float, context: int) -> list[float]:
        columns = plan(LLAMA_3_8B, gpu=GPU("", memory, 1008, 165.2), context=context, candidates=ONE).columns
        return [column.full.tokens_per_second if column.full else 0 for column in columns]

    for context in (512, 32768):
        middle = speeds(24, context)
        for better in (speeds(48, context), speeds(24, context // 2)):
            assert all(after >= before * (1 - 1e-9) for before, after in zip(middle, better, strict=True))


def test_smaller_caches_mean_larger_batches_and_more_tokens() -> None:
    for before, after in itertools.pairwise(plan(LLAMA_3_8B).candidates):
        assert after.cache_bytes_per_token < before.cache_bytes_per_token
        assert after.max_batch_size > before.max_batch_size
        assert after.full.tokens_per_second > before.full.tokens_per_second


def test_by_default_512_64_and_cuts_of_50_to_93_percent() -> None:
    assert [c.name for c in plan(LLAMA_2_7B).candidates] == ["4032 + 64", "2496 + 64", "960 + 64", "512 + 64"]
    gqa = plan(LLAMA_3_8B).candidates
    assert [c.name for c in gqa] == ["960 + 64", "576 + 64", "512 + 64", "192 + 64", "112 + 32"]
    small = LlamaConfig(hidden_size=576, num_attention_heads=9, num_key_value_heads=3, num_hidden_layers=2)
    assert [c.name for c in plan(small).candidates] == ["160 + 32", "88 + 32", "40 + 8", "16 + 8"]


def test_tensor_parallelism_splits_kv_heads_but_not_the_latent() -> None:
    one, eight = (plan(LLAMA_3_8B, candidates=ONE, tensor_parallel=n) for n in (1, 8))
    assert eight.original.cache_bytes_per_token * 8 == one.original.cache_bytes_per_token == 32 * 2 * 2 * 1024
    assert eight.candidates[0].cache_bytes_per_token == one.candidates[0].cache_bytes_per_token
    assert eight.original.weight_bytes * 8 == one.original.weight_bytes
    assert one.candidates[0].cache_ratios == {1: 2048 / 576, 2: 1024 / 576, 4: 512 / 576, 8: 256 / 576}
    assert one.candidates[0].cache_ratios == eight.candidates[0].cache_ratios
    # Past one KV head a GPU, it holds a copy.
    sixteen = plan(LLAMA_3_8B, candidates=ONE, tensor_parallel=16)
    assert sixteen.original.cache_bytes_per_token == eight.original.cache_bytes_per_token


def test_a_token_reads_its_experts_and_a_large_batch_all() -> None:
    expert = 32 * 3 * 4096 * 14336
    total = plan(MIXTRAL_8X7B, gpu="B200", candidates=ONE).original
    assert total.weight_bytes == 2 * 46_702_792_704
    assert total.single is not None
    assert total.single.weight_bytes == 2 * (46_702_792_704 - EMBEDDINGS - 6 * expert)
    attention = 8192 * 32 * 32 * 4 * 128
    assert total.single.flops == total.single.weight_bytes + attention
    assert total.full is not None
    assert total.full.flops == total.single.flops
    assert total.full.weight_bytes == pytest.approx(2 * (46_702_792_704 - EMBEDDINGS), rel=1e-6)
    two = plan(MIXTRAL_8X7B, gpu=GPU("two", 107, 3350, 989), context=32768, candidates=ONE).original.full
    assert two is not None
    assert two.batch_size == 2
    assert two.weight_bytes == 2 * (46_702_792_704 - EMBEDDINGS - round(8 * expert * 0.75**2))


def test_a_window_bounds_the_cache_of_its_layers() -> None:
    config = Gemma2Config(sliding_window=4096)  # every other layer
    layers, per_layer = config.num_hidden_layers, 2 * 2 * config.num_key_value_heads * config.head_dim
    for context, cached in ((1024, 1024 * layers), (8192, (8192 + 4096) * layers // 2)):
        step = plan(config, context=context, candidates=ONE).original.single
        assert step is not None
        assert step.cache_bytes == cached * per_layer


def engines(config: PreTrainedConfig, pair: str) -> tuple[str, ...]:
    loads = candidate(config, pair).engines
    assert list(loads) == [
        "transmla_ext", "transformers", "vLLM, CUDA", "vLLM, CPU", "SGLang, CUDA", "vLLM, SGLang: Triton"
    ]  # fmt: skip
    return tuple(loads.values())


def test_engines_and_the_shapes_they_take() -> None:
    assert engines(LLAMA_2_7B, "512+64") == ("both", "both", "stock", "stock", "stock", "stock")
    assert engines(LLAMA_2_7B, "448+64") == ("both", "both", "stock", "padded", "padded", "stock")
    assert engines(LLAMA_2_7B, "192+64") == ("both", "both", "padded", "padded", "padded", "stock")
    assert engines(LLAMA_2_7B, "544+32") == ("both", "both", "no", "no", "no", "no")
    assert engines(LLAMA_2_7B, "96+32") == ("both", "both", "padded", "padded", "padded", "padded")
    assert engines(LLAMA_2_7B, "960+64") == ("both", "both", "no", "no", "no", "stock")
    assert engines(LLAMA_2_7B, "448+128") == ("both", "both", "no", "no", "no", "no")
    one_head = LlamaConfig(
        num_key_value_heads=1, num_attention_heads=64
    )  # all of its key is RoPE: no place in DeepSeek
    assert engines(one_head, "48+64") == ("native", "native", "no", "no", "no", "no")
    assert engines(Phi3Config(), "512+48") == ("both", "both", "no", "no", "no", "no")  # heads of 96
    assert engines(MIXTRAL_8X7B, "512+64") == ("native", "native", "stock", "stock", "stock", "stock")


def test_padding_tells_what_it_costs() -> None:
    multi_query = LlamaConfig(num_key_value_heads=1)  # 16,384 bytes per token, less than 512 + 64 takes
    assert "36,864 bytes per token" in str(plan(multi_query, candidates=["96+32"]))
    assert "Padded" not in str(plan(LLAMA_2_7B, candidates=ONE))


def test_a_model_without_a_stock_export_runs_natively_and_says_why() -> None:
    assert engines(Qwen3Config(), "512+64") == ("native", "native", "no", "no", "no", "no")
    capacities = plan(Qwen3Config(), candidates=ONE)
    assert capacities.no_stock_export is not None
    assert capacities.no_stock_export in " ".join(str(capacities).split())


def test_to_dict_is_json_with_every_number() -> None:
    capacities = plan(LLAMA_2_7B, gpu="24,1008,165.2", candidates=ONE)
    values = json.loads(json.dumps(capacities.to_dict()))
    assert values["candidates"][0]["cache_bytes_per_token"] == 36_864
    assert values["candidates"][0]["full"]["tokens_per_second"] == capacities.candidates[0].full.tokens_per_second
    assert values["original"]["cache_ratios"]["8"] == 1
    assert values["gpu"]["bandwidth"] == 1008


def test_the_table_puts_the_numbers_into_the_formula(tmp_path: Path) -> None:
    LLAMA_2_7B.save_pretrained(tmp_path / "llama")
    text = str(plan(tmp_path / "llama", gpu="24gb", candidates=["512 + 64"]))
    assert text.lstrip().startswith("llama on 24GB at context 8,192")
    assert text == str(plan(tmp_path / "llama" / "config.json", gpu="24GB", candidates=[(512, 64)]))
    for part in ("524,288", "36,864", "92.97%", "13.21 GB + 2 × 4.295 GB take 21.63 ms", "4,096 positions"):
        assert part in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpu": "H1000"}, r"gpu must be one of 24GB, .*, B200, or 'GB,GB/s,TFLOP/s'"),
        ({"gpu": "80,0,989"}, "gpu must be one of"),
        ({"context": 0}, "context must be at least 1 token, got 0"),
        ({"tensor_parallel": 3}, "tensor_parallel must divide the 32 heads, got 3"),
        ({"candidates": ["512"]}, r"kv_lora_rank\+qk_rope_head_dim, such as 512\+64; got '512'"),
        ({"candidates": ["512+48"]}, r"multiple of 8 that divides the 128 numbers .* got 48"),
        ({"candidates": [(8192, 64)]}, r"from 8 to 8128 \(nothing lost\), got 8192"),
        ({"candidates": ["100+64"]}, "kv_lora_rank must be a multiple of 8"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(LLAMA_2_7B, **options)


def test_bad_models(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        plan(tmp_path)
    with pytest.raises(CheckpointError, match="absent does not exist; give a local directory"):
        plan(tmp_path / "absent")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="is not a model's configuration"):
        plan(tmp_path)
    with pytest.raises(UnsupportedModelError, match="model_type 'gpt2' is not supported"):
        plan(GPT2Config())


def test_the_readme_has_these_predictions() -> None:
    row = re.compile(r"\| (\d+) GB \| ([\d,]+) \| (\d+) → (\d+) \| ([\d.]+) × \| ([\d.]+) × \| [\d.]+ × \|")
    rows = row.findall(README.read_text())
    assert len(rows) == 3
    for memory, context, *expected in rows:
        capacities: CapacityPlan = plan(
            LLAMA_2_7B, gpu=f"{memory}GB", context=int(context.replace(",", "")), candidates=ONE
        )
        before, after = capacities.columns
        assert expected == [
            str(before.max_batch_size),
            str(after.max_batch_size),
            f"{after.full.tokens_per_second / before.full.tokens_per_second:.1f}",
            f"{after.alike.tokens_per_second / before.alike.tokens_per_second:.1f}",
        ]
