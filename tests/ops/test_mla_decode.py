from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from accuracy import assert_as_accurate, to_double
from hypothesis import given, settings
from hypothesis import strategies as st
from latent import NO_BLOCK, decode_args
from torch import Tensor
from torch._subclasses import FakeTensorMode

from transmla_ext import ops, reference

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def assert_matches_reference(args: dict[str, Any]) -> None:
    actual = ops.mla_decode(**args)
    baseline = reference.mla_decode(**args)
    expected = reference.mla_decode(**{name: to_double(value) for name, value in args.items()})
    for parts in zip(actual, baseline, expected, strict=True):
        assert_as_accurate(*parts)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kv_lora_rank", "qk_rope_head_dim"), [(16, 16), (48, 16), (88, 32), (24, 8), (20, 6), (7, 0), (512, 64)]
)
def test_ragged_batch_matches_the_reference(
    isa: str, dtype: torch.dtype, kv_lora_rank: int, qk_rope_head_dim: int
) -> None:
    assert_matches_reference(decode_args(dtype, kv_lora_rank=kv_lora_rank, qk_rope_head_dim=qk_rope_head_dim))


@pytest.mark.parametrize("num_heads", [1, 7, 9, 16, 33])
def test_any_number_of_heads(isa: str, num_heads: int) -> None:
    assert_matches_reference(decode_args(num_heads=num_heads))
    assert_matches_reference(decode_args(torch.bfloat16, num_heads=num_heads, seqlen_q=2))


@pytest.mark.parametrize("block_size", [1, 5, 64])
def test_any_block_size(isa: str, block_size: int) -> None:
    assert_matches_reference(decode_args(block_size=block_size))


@pytest.mark.parametrize("seqlen_q", [2, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_new_query_sees_no_later_token(isa: str, dtype: torch.dtype, seqlen_q: int) -> None:
    # Sequences of 1 and 0 tokens have fewer tokens than queries: the first queries see nothing.
    assert_matches_reference(decode_args(dtype, seqlen_q=seqlen_q, num_heads=7))


@pytest.mark.parametrize("softcap", [0.5, 30.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_softcap(isa: str, dtype: torch.dtype, softcap: float) -> None:
    assert_matches_reference({**decode_args(dtype), "softcap": softcap})


@pytest.mark.parametrize("sliding_window", [1, 7, 64, 1000])
@pytest.mark.parametrize("seqlen_q", [1, 5])
def test_sliding_window(isa: str, sliding_window: int, seqlen_q: int) -> None:
    assert_matches_reference({**decode_args(seqlen_q=seqlen_q), "sliding_window": sliding_window, "num_splits": 3})


def test_pages_before_the_window_are_never_read(isa: str) -> None:
    args = {**decode_args(seqlens=(257,)), "sliding_window": 20}
    expected = ops.mla_decode(**args)
    args["latent_cache"][args["block_table"][0, :14].long()] = torch.nan
    args["block_table"][0, :14] = NO_BLOCK
    assert all(map(torch.equal, ops.mla_decode(**args), expected))


@pytest.mark.parametrize("num_splits", [1, 3, 7, 100])
@pytest.mark.parametrize("seqlen_q", [1, 2])
def test_num_splits_does_not_change_the_result(isa: str, threads: int, num_splits: int, seqlen_q: int) -> None:
    args = decode_args(seqlens=(0, 1, 33, 257, 900), seqlen_q=seqlen_q)
    assert_matches_reference({**args, "num_splits": num_splits})


@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_invariant_bits_do_not_depend_on_the_batch(isa: str, threads: int, dtype: torch.dtype) -> None:
    args = {**decode_args(dtype, seqlens=(900, 33, 1, 257)), "batch_invariant": True}
    out, lse = ops.mla_decode(**args)
    for i in range(4):
        row = {name: args[name][i : i + 1] for name in ("q", "block_table", "cache_seqlens")}
        alone_out, alone_lse = ops.mla_decode(**{**args, **row})
        assert torch.equal(alone_out[0], out[i])
        assert torch.equal(alone_lse[0], lse[i])


def test_bits_do_not_depend_on_the_number_of_threads(isa: str, threads: int) -> None:
    args = {**decode_args(num_heads=33, seqlens=(900, 33, 1)), "num_splits": 4}
    actual = ops.mla_decode(**args)
    torch.set_num_threads(1)
    assert all(map(torch.equal, actual, ops.mla_decode(**args)))


def test_unused_pages_are_never_read(isa: str) -> None:
    args = decode_args(seqlen_q=2)
    poisoned = ops.mla_decode(**args)
    args["latent_cache"].nan_to_num_(0.0)
    args["block_table"][args["block_table"] == NO_BLOCK] = 0
    assert all(map(torch.equal, poisoned, ops.mla_decode(**args)))


def test_empty_sequence_gives_zero_and_minus_infinity(isa: str) -> None:
    out, lse = ops.mla_decode(**decode_args(seqlens=(0, 5, 0), seqlen_q=2))
    assert torch.equal(out[::2], torch.zeros(2, 2, 3, 48))
    assert torch.equal(lse[::2], torch.full((2, 3, 2), -torch.inf))


def test_empty_batch() -> None:
    out, lse = ops.mla_decode(**decode_args(seqlens=()))
    assert out.shape == (0, 1, 3, 48)
    assert lse.shape == (0, 3, 1)


def test_one_token_is_returned_as_it_is(isa: str) -> None:
    args = decode_args(torch.bfloat16, seqlens=(1,), block_size=1)
    out, _ = ops.mla_decode(**args)
    latent = args["latent_cache"][args["block_table"][0, 0], 0, :48]
    assert torch.equal(out[0, 0], latent.expand(3, 48))


def test_nan_in_one_sequence_stays_there(isa: str) -> None:
    args = decode_args(seqlens=(40, 40))
    args["latent_cache"][args["block_table"][0, 1], 3] = torch.nan
    out, lse = ops.mla_decode(**args)
    assert out[0].isnan().all()
    assert lse[0].isnan().all()
    assert out[1].isfinite().all()
    assert lse[1].isfinite().all()


def test_scores_of_any_size_do_not_overflow(isa: str) -> None:
    args = decode_args(seqlens=(257,))
    assert_matches_reference({**args, "softmax_scale": 100.0})
    assert_matches_reference({**args, "softmax_scale": 0.0})


def test_query_cache_and_block_table_may_be_strided(isa: str) -> None:
    args = decode_args(torch.bfloat16, seqlen_q=2)
    contiguous = ops.mla_decode(**args)
    q, cache, table = args["q"], args["latent_cache"], args["block_table"]
    strided_cache = torch.full((cache.size(0), 2, *cache.shape[1:]), torch.nan, dtype=cache.dtype)[:, 1]
    strided = {
        "q": q.transpose(1, 2).contiguous().transpose(1, 2),
        "latent_cache": strided_cache.copy_(cache),
        "block_table": torch.nn.functional.pad(table, (0, 3), value=NO_BLOCK)[:, : table.size(1)],
    }
    assert all(not tensor.is_contiguous() for tensor in strided.values())
    assert all(map(torch.equal, ops.mla_decode(**{**args, **strided}), contiguous))


@settings(deadline=None, max_examples=40, derandomize=True)
@given(data=st.data())
def test_any_combination_matches_the_reference(data: st.DataObject) -> None:
    args = decode_args(
        data.draw(st.sampled_from(DTYPES)),
        kv_lora_rank=data.draw(st.integers(1, 70)),
        qk_rope_head_dim=2 * data.draw(st.integers(0, 20)),
        num_heads=data.draw(st.integers(1, 20)),
        block_size=data.draw(st.integers(1, 40)),
        seqlen_q=data.draw(st.integers(1, 4)),
        seqlens=tuple(data.draw(st.lists(st.integers(0, 150), min_size=1, max_size=4))),
    )
    args["num_splits"] = data.draw(st.integers(0, 5))
    args["batch_invariant"] = data.draw(st.booleans())
    args["sliding_window"] = data.draw(st.sampled_from([0, 0, 1, 10, 100]))
    args["softcap"] = data.draw(st.sampled_from([0.0, 2.0]))
    assert_matches_reference(args)


MISUSE = {
    "q": [
        (lambda q: q.double(), r"q must be bfloat16, float16 or float32 \[.*\], got float64 \[6, 1, 3, 64\]"),
        (lambda q: q[0], r"q must be .*\[batch_size, seqlen_q, num_heads, .*got float32 \[1, 3, 64\]"),
        (lambda q: q.transpose(2, 3), r"q must be .*dense in the last dimension.*with strides \["),
    ],
    "latent_cache": [
        (lambda cache: cache.half(), r"latent_cache must be float32 .*, got float16"),
        (lambda cache: cache[..., :60], r"latent_cache must be .*=64\], got float32 \[.*, 16, 60\]"),
        (lambda cache: cache[0], r"latent_cache must be .*\[num_blocks, block_size, .*got float32 \[16, 64\]"),
        (lambda cache: cache[:, :0], r"block_size must be at least 1, got 0"),
        (lambda cache: cache.mT.contiguous().mT, r"latent_cache must be .*dense in the last dimension"),
    ],
    "block_table": [
        (lambda table: table.long(), r"block_table must be int32 \[batch_size=6, max_blocks\], got int64 \[6, 19\]"),
        (lambda table: table[:2], r"block_table must be int32 \[batch_size=6, max_blocks\], got int32 \[2, 19\]"),
        (lambda table: table[:, :1], r"cache_seqlens\[2\] must be .*=16, got 31"),
        (lambda table: table + 1000, r"block_table\[1, 0\] must be .*=27, got 10\d\d"),
        (lambda table: -1 - table, r"block_table\[1, 0\] must be .*=27, got -\d"),
    ],
    "cache_seqlens": [
        (lambda seqlens: seqlens.long(), r"cache_seqlens must be int32 \[batch_size=6\], got int64 \[6\]"),
        (lambda seqlens: seqlens[1:], r"cache_seqlens must be int32 \[batch_size=6\], got int32 \[5\]"),
        (lambda seqlens: seqlens - 1, r"cache_seqlens\[0\] must be .*, got -1"),
        (lambda seqlens: seqlens.repeat_interleave(2)[::2], r"cache_seqlens must be .*contiguous.*strides \[2\]"),
    ],
    "kv_lora_rank": [
        (lambda _: 0, r"kv_lora_rank must be .*, got 0"),
        (lambda _: 65, r"kv_lora_rank must be .*got 65"),
    ],
    "softcap": [(lambda _: -1.0, r"softcap must be at least 0, got -1")],
    "sliding_window": [(lambda _: -1, r"sliding_window must be at least 0, got -1")],
    "num_splits": [(lambda _: -1, r"num_splits must be at least 0, got -1")],
}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        pytest.param(name, change, message, id=f"{name}-{i}")
        for name, cases in MISUSE.items()
        for i, (change, message) in enumerate(cases)
    ],
)
def test_misuse_says_what_was_expected_and_got(name: str, change: Any, message: str) -> None:
    args = decode_args()
    args[name] = change(args.get(name))
    with pytest.raises(RuntimeError, match="transmla::mla_decode: " + message):
        ops.mla_decode(**args)


def test_fp8_cache_is_checked_and_for_cuda() -> None:
    args = decode_args()
    args["cache_scales"] = torch.ones(args["latent_cache"].shape[:2])
    num_blocks, block_size = args["cache_scales"].shape
    with pytest.raises(RuntimeError, match=r"latent_cache must be float8_e4m3fn .*got float32"):
        ops.mla_decode(**args)
    args["latent_cache"] = args["latent_cache"].to(torch.float8_e4m3fn)
    with pytest.raises(RuntimeError, match="transmla::mla_decode: a float8_e4m3fn latent_cache is for CUDA"):
        ops.mla_decode(**args)
    with pytest.raises(
        RuntimeError, match=rf"cache_scales must be float32 \[num_blocks={num_blocks}, block_size={block_size}\]"
    ):
        ops.mla_decode(**{**args, "cache_scales": args["cache_scales"][1:]})
    with pytest.raises(RuntimeError, match=r"cache_scales must be float32 .*got float64"):
        ops.mla_decode(**{**args, "cache_scales": args["cache_scales"].double()})
    with pytest.raises(RuntimeError, match=r"latent_cache must be float32 .*got float8_e4m3fn"):
        ops.mla_decode(**{**args, "cache_scales": None})


def test_compilers_are_told_of_an_fp8_cache() -> None:
    """Not opcheck, which runs the op: the CPU has no kernel."""
    args = decode_args(torch.bfloat16, seqlen_q=2)
    args["cache_scales"] = torch.ones(args["latent_cache"].shape[:2])
    args["latent_cache"] = args["latent_cache"].to(torch.float8_e4m3fn)
    with FakeTensorMode() as mode:
        fakes = {name: mode.from_tensor(x) if isinstance(x, Tensor) else x for name, x in args.items()}
        out, lse = ops.mla_decode(**fakes)
    assert (out.shape, out.dtype) == ((6, 2, 3, 48), torch.bfloat16)
    assert (lse.shape, lse.dtype) == ((6, 3, 2), torch.float32)


def test_opcheck() -> None:
    args = decode_args(torch.bfloat16, seqlen_q=2)
    torch.library.opcheck(torch.ops.transmla.mla_decode, (*args.values(), 0.0, 0, 0, False))


def test_compiles_without_a_graph_break() -> None:
    args = decode_args()
    compiled = torch.compile(lambda kwargs: ops.mla_decode(**kwargs), fullgraph=True)
    assert all(map(torch.equal, compiled(args), ops.mla_decode(**args)))


def test_lse_is_the_natural_logarithm() -> None:
    args = decode_args(seqlens=(33,))
    _, lse = ops.mla_decode(**{**args, "softmax_scale": 0.0})
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(33)))
