from __future__ import annotations

import itertools
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate, to_double
from hypothesis import given, settings
from hypothesis import strategies as st

from transmla_ext import ops, reference

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
RAGGED = ((0, 0), (1, 1), (0, 5), (47, 47), (49, 300), (3, 131), (130, 130), (5, 2), (4, 0))
Args = dict[str, Any]


def make_args(
    dtype: torch.dtype = torch.float32,
    *,
    qk_nope_head_dim: int = 32,
    qk_rope_head_dim: int = 16,
    v_head_dim: int = 24,
    num_heads: int = 3,
    seqlens: tuple[tuple[int, int], ...] = RAGGED,
) -> Args:
    """Arguments with scores of unit variance; seqlens are those of q and kv."""
    qk_head_dim = qk_nope_head_dim + qk_rope_head_dim
    cu_seqlens = [[0, *itertools.accumulate(lengths)] for lengths in zip(*seqlens, strict=True)] or [[0], [0]]
    num_tokens, num_kv_tokens = (ends[-1] for ends in cu_seqlens)
    return {
        "q": torch.randn(num_tokens, num_heads, qk_head_dim).to(dtype),
        "kv": torch.randn(num_kv_tokens, num_heads, qk_nope_head_dim + v_head_dim).to(dtype),
        "k_pe": torch.randn(num_kv_tokens, qk_rope_head_dim).to(dtype),
        "cu_seqlens_q": torch.tensor(cu_seqlens[0], dtype=torch.int32),
        "cu_seqlens_k": torch.tensor(cu_seqlens[1], dtype=torch.int32),
        "softmax_scale": qk_head_dim**-0.5,
    }


def assert_matches_reference(args: Args) -> None:
    actual = ops.mla_prefill(**args)
    baseline = reference.mla_prefill(**args)
    expected = reference.mla_prefill(**{name: to_double(value) for name, value in args.items()})
    for parts in zip(actual, baseline, expected, strict=True):
        assert_as_accurate(*parts)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
    [(32, 16, 24), (128, 64, 128), (64, 32, 64), (0, 32, 48), (24, 0, 96), (20, 6, 7), (1, 2, 1), (13, 4, 33)],
)
def test_ragged_batch_matches_the_reference(
    isa: str, dtype: torch.dtype, qk_nope_head_dim: int, qk_rope_head_dim: int, v_head_dim: int
) -> None:
    dims = {"qk_nope_head_dim": qk_nope_head_dim, "qk_rope_head_dim": qk_rope_head_dim, "v_head_dim": v_head_dim}
    assert_matches_reference(make_args(dtype, **dims))


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_blocks_and_tiles(isa: str, threads: int, dtype: torch.dtype) -> None:
    assert_matches_reference(make_args(dtype, num_heads=2, seqlens=((1000, 1300), (30, 700))))


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_causal_each_query_sees_the_whole_sequence(isa: str, dtype: torch.dtype) -> None:
    assert_matches_reference({**make_args(dtype), "causal": False})


@pytest.mark.parametrize("softcap", [0.5, 30.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_softcap(isa: str, dtype: torch.dtype, softcap: float) -> None:
    assert_matches_reference({**make_args(dtype), "softcap": softcap})


@pytest.mark.parametrize("sliding_window", [1, 7, 64, 1000])
def test_sliding_window(isa: str, sliding_window: int) -> None:
    args = make_args(seqlens=(*RAGGED, (520, 900)))
    assert_matches_reference({**args, "sliding_window": sliding_window})


def test_tokens_before_the_window_are_never_read(isa: str) -> None:
    args = {**make_args(seqlens=((30, 400),)), "sliding_window": 20}
    expected = ops.mla_prefill(**args)
    args["kv"][: 400 - 30 - 19] = torch.nan
    args["k_pe"][: 400 - 30 - 19] = torch.nan
    assert all(map(torch.equal, ops.mla_prefill(**args), expected))


def test_a_sequence_is_as_it_is_alone(isa: str, threads: int) -> None:
    args = make_args(torch.bfloat16, seqlens=((40, 40), (5, 90), (600, 600)))
    out, lse = ops.mla_prefill(**args)
    for i in range(3):
        q, k = (slice(*args[name][i : i + 2].tolist()) for name in ("cu_seqlens_q", "cu_seqlens_k"))
        alone = {"q": args["q"][q], "kv": args["kv"][k], "k_pe": args["k_pe"][k]}
        lengths = {
            f"cu_seqlens_{name}": torch.tensor([0, len(alone[key])]).int() for name, key in (("q", "q"), ("k", "kv"))
        }
        alone_out, alone_lse = ops.mla_prefill(**{**args, **alone, **lengths})
        assert torch.equal(alone_out, out[q])
        assert torch.equal(alone_lse, lse[:, q])


def test_nan_in_one_sequence_stays_there(isa: str) -> None:
    args = make_args(seqlens=((40, 60), (40, 60)))
    args["kv"][3] = torch.nan
    out, lse = ops.mla_prefill(**args)
    assert out[:40].isnan().all()
    assert lse[:, :40].isnan().all()
    assert out[40:].isfinite().all()
    assert lse[:, 40:].isfinite().all()


def test_a_query_that_sees_nothing_gives_zero_and_minus_infinity(isa: str) -> None:
    out, lse = ops.mla_prefill(**make_args(seqlens=((5, 2), (4, 0))))
    unseeing = [0, 1, 2, 5, 6, 7, 8]
    assert torch.equal(out[unseeing], torch.zeros(7, 3, 24))
    assert torch.equal(lse[:, unseeing], torch.full((3, 7), -torch.inf))
    assert lse[:, 3:5].isfinite().all()


@pytest.mark.parametrize("seqlens", [(), ((0, 0),), ((0, 9),)])
def test_no_tokens(seqlens: tuple[tuple[int, int], ...]) -> None:
    out, lse = ops.mla_prefill(**make_args(seqlens=seqlens))
    assert out.shape == (0, 3, 24)
    assert lse.shape == (3, 0)


def test_parts_of_a_sequence_merge_into_the_whole(isa: str) -> None:
    whole = make_args(seqlens=((50, 200),))
    expected = ops.mla_prefill(**whole)
    parts = []
    for part, causal in ((slice(0, 150), False), (slice(150, 200), True)):
        kv, k_pe = whole["kv"][part], whole["k_pe"][part]
        lengths = torch.tensor([0, len(kv)], dtype=torch.int32)
        args = {**whole, "kv": kv, "k_pe": k_pe, "cu_seqlens_k": lengths, "causal": causal}
        parts += [x.unsqueeze(0) for x in ops.mla_prefill(**args)]
    for actual, part in zip(ops.merge_attn_states(*parts), expected, strict=True):
        torch.testing.assert_close(actual[0], part, atol=2e-6, rtol=2e-6)


def test_it_is_what_absorbed_attention_computes(isa: str) -> None:
    args = make_args(seqlens=((9, 40),))
    latent, w_kv_b = torch.randn(40, 16), torch.randn(3, 32 + 24, 16) / 4
    args["kv"] = torch.einsum("tr,hdr->thd", latent, w_kv_b)
    w_uk, w_uv = w_kv_b.split((32, 24), dim=1)
    q_nope, q_pe = args["q"].split((32, 16), dim=-1)
    q = torch.cat((torch.einsum("qhn,hnr->qhr", q_nope, w_uk), q_pe), dim=-1)
    cache = torch.cat((latent, args["k_pe"]), dim=-1)[None]
    table, seqlens = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([40], dtype=torch.int32)
    absorbed, lse = ops.mla_decode(q[None], cache, table, seqlens, 16, args["softmax_scale"])
    out, out_lse = ops.mla_prefill(**args)
    torch.testing.assert_close(out, torch.einsum("qhr,hvr->qhv", absorbed[0], w_uv), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out_lse, lse[0], atol=1e-5, rtol=1e-5)


def test_scores_of_any_size_do_not_overflow(isa: str) -> None:
    args = make_args()
    assert_matches_reference({**args, "softmax_scale": 100.0})
    assert_matches_reference({**args, "softmax_scale": 0.0})


def test_bits_do_not_depend_on_the_number_of_threads(isa: str, threads: int) -> None:
    args = make_args(seqlens=((700, 900), (33, 33)))
    actual = ops.mla_prefill(**args)
    torch.set_num_threads(1)
    assert all(map(torch.equal, actual, ops.mla_prefill(**args)))


def test_inputs_may_be_strided(isa: str) -> None:
    args = make_args(torch.bfloat16)
    contiguous = ops.mla_prefill(**args)
    latent = torch.full((args["kv"].size(0), 40), torch.nan, dtype=torch.bfloat16)
    strided = {
        "q": args["q"].transpose(0, 1).contiguous().transpose(0, 1),
        "kv": F.pad(args["kv"], (3, 5), value=torch.nan)[..., 3:-5],
        "k_pe": torch.cat((latent, args["k_pe"]), dim=-1)[:, 40:],
    }
    assert all(not tensor.is_contiguous() for tensor in strided.values())
    assert all(map(torch.equal, ops.mla_prefill(**{**args, **strided}), contiguous))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_sequence() -> None:
    def kilobytes(name: str) -> int:
        return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])

    def grown(seqlen: int) -> int:
        args = make_args(num_heads=1, seqlens=((64, seqlen),))
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
        before = kilobytes("VmRSS")
        ops.mla_prefill(**args)
        return kilobytes("VmHWM") - before

    grown(1000)
    assert grown(100_000) < 4096  # the scores alone have 25 MB


@settings(deadline=None, max_examples=40, derandomize=True)
@given(data=st.data())
def test_any_combination_matches_the_reference(data: st.DataObject) -> None:
    lengths = st.tuples(st.integers(0, 150), st.integers(0, 150))
    args = make_args(
        data.draw(st.sampled_from(DTYPES)),
        qk_nope_head_dim=data.draw(st.integers(1, 70)),
        qk_rope_head_dim=2 * data.draw(st.integers(0, 20)),
        v_head_dim=data.draw(st.integers(1, 70)),
        num_heads=data.draw(st.integers(1, 5)),
        seqlens=((40, 60), *data.draw(st.lists(lengths, max_size=4))),  # one for the errors to be compared over
    )
    args["causal"] = data.draw(st.booleans())
    args["sliding_window"] = data.draw(st.sampled_from([0, 0, 1, 10, 100])) if args["causal"] else 0
    args["softcap"] = data.draw(st.sampled_from([0.0, 30.0]))
    assert_matches_reference(args)


MISUSE = {
    "q": [
        (lambda q: q.double(), r"q must be bfloat16, float16 or float32 \[.*\], got float64 \[239, 3, 48\]"),
        (lambda q: q[0], r"q must be .*\[num_tokens, num_heads, .*got float32 \[3, 48\]"),
        (lambda q: q.transpose(1, 2), r"q must be .*dense in the last dimension.*with strides \["),
        (lambda q: q[..., :15], r"qk_rope_head_dim must be at most the last dimension of q, got 16"),
        (lambda q: q[1:], r"cu_seqlens_q\[9\] must be the number of tokens=238, got 239"),
    ],
    "kv": [
        (lambda kv: kv.half(), r"kv must be float32 .*, got float16"),
        (lambda kv: kv[:, :2], r"kv must be .*num_heads=3, .*, got float32 \[616, 2, 56\]"),
        (lambda kv: kv[1:], r"kv must be .*num_kv_tokens=616, .*, got float32 \[615, 3, 56\]"),
        (lambda kv: kv.transpose(1, 2).contiguous().transpose(1, 2), r"kv must be .*dense in the last dimension"),
        (lambda kv: kv[..., :32], r"v_head_dim must be at least 1: .*, got 0"),
    ],
    "k_pe": [
        (lambda k_pe: k_pe.half(), r"k_pe must be float32 \[num_kv_tokens, qk_rope_head_dim\], got float16"),
        (lambda k_pe: k_pe[:, None], r"k_pe must be float32 .*, got float32 \[616, 1, 16\]"),
        (lambda k_pe: k_pe.T.contiguous().T, r"k_pe must be .*dense in the last dimension"),
    ],
    "cu_seqlens_q": [
        (lambda ends: ends.long(), r"cu_seqlens_q must be int32 \[batch_size \+ 1\], got int64 \[10\]"),
        (lambda ends: ends[:0], r"batch_size must be at least 0, got -1"),
        (lambda ends: ends + 1, r"cu_seqlens_q\[0\] must be 0, got 1"),
        (lambda ends: ends * torch.tensor(5 * [1] + 5 * [0]).int(), r"cu_seqlens_q\[5\] must be at least .*=48, got 0"),
    ],
    "cu_seqlens_k": [
        (lambda ends: ends[1:], r"cu_seqlens_k must be int32 \[batch_size \+ 1=10\], got int32 \[9\]"),
        (lambda ends: ends.repeat_interleave(2)[::2], r"cu_seqlens_k must be .*contiguous.*strides \[2\]"),
        (lambda ends: ends - ends // 616, r"cu_seqlens_k\[9\] must be the number of tokens=616, got 615"),
    ],
    "softcap": [(lambda _: -1.0, r"softcap must be at least 0, got -1")],
    "sliding_window": [(lambda _: -1, r"sliding_window must be at least 0, got -1")],
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
    args = make_args()
    args[name] = change(args.get(name))
    with pytest.raises(RuntimeError, match="transmla::mla_prefill: " + message):
        ops.mla_prefill(**args)


def test_a_window_needs_causal() -> None:
    with pytest.raises(RuntimeError, match="transmla::mla_prefill: sliding_window must be 0 without causal, got 7"):
        ops.mla_prefill(**make_args(), causal=False, sliding_window=7)


def test_opcheck() -> None:
    args = make_args(torch.bfloat16)
    torch.library.opcheck(torch.ops.transmla.mla_prefill, (*args.values(), True, 0.0, 0))


def test_compiles_without_a_graph_break() -> None:
    args = make_args()
    compiled = torch.compile(lambda kwargs: ops.mla_prefill(**kwargs), fullgraph=True)
    assert all(map(torch.equal, compiled(args), ops.mla_prefill(**args)))


def test_lse_is_the_natural_logarithm() -> None:
    _, lse = ops.mla_prefill(**{**make_args(seqlens=((2, 33),)), "softmax_scale": 0.0})
    torch.testing.assert_close(lse, torch.tensor([math.log(32), math.log(33)]).expand(3, 2))
