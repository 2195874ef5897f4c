from __future__ import annotations

from typing import Any

import pytest
import torch
from accuracy import assert_as_accurate, to_double
from torch import Tensor
from torch._subclasses import FakeTensorMode

from transmla_ext import ops, reference

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
Args = dict[str, Any]


def make_args(
    dtype: torch.dtype = torch.float32,
    *,
    num_tokens: int = 5,
    hidden_size: int = 40,
    num_heads: int = 3,
    kv_lora_rank: int = 48,
    qk_nope_head_dim: int = 20,
    qk_rope_head_dim: int = 16,
    block_size: int = 4,
    norms: bool = True,
    q_lora_rank: int | None = None,
    biases: bool = False,
) -> Args:
    """Arguments whose products have unit variance; every third token is not stored, the cache holds NaN."""
    q_in = hidden_size if q_lora_rank is None else q_lora_rank

    def random(*shape: int, variance: int = 1) -> Tensor:
        return (torch.randn(*shape) / variance**0.5).to(dtype)

    angles = torch.rand(64, qk_rope_head_dim // 2) * 6
    num_blocks = num_tokens // block_size + 2
    slot_mapping = torch.randperm(num_blocks * block_size)[:num_tokens]
    slot_mapping[2::3] = -1
    args: Args = {
        "hidden": random(num_tokens, hidden_size),
        "w_q": random(num_heads * (qk_nope_head_dim + qk_rope_head_dim), q_in, variance=q_in),
        "w_kv_a": random(kv_lora_rank + qk_rope_head_dim, hidden_size, variance=hidden_size),
        "w_uk": random(num_heads, qk_nope_head_dim, kv_lora_rank, variance=max(1, qk_nope_head_dim)),
        "cos_sin": torch.cat((angles.cos(), angles.sin()), dim=-1),
        "positions": torch.randint(64, (num_tokens,)),
        "slot_mapping": slot_mapping,
        "latent_cache": random(num_blocks, block_size, kv_lora_rank + qk_rope_head_dim).fill_(torch.nan),
    }
    if norms:
        args["kv_norm"] = random(kv_lora_rank)
    if biases:
        args["b_q"], args["b_kv_a"] = random(len(args["w_q"])), random(len(args["w_kv_a"]))
    if q_lora_rank is not None:
        args["w_q_a"] = random(q_lora_rank, hidden_size, variance=hidden_size)
        if norms:
            args["q_a_norm"] = random(q_lora_rank)
    return args


def project(op: Any, args: Args) -> tuple[Tensor, Tensor]:
    """The queries and the cache after the call, which leaves ``args`` alone."""
    cache = args["latent_cache"].clone()
    q = op(**{**args, "latent_cache": cache})
    return q, cache


def assert_matches_reference(args: Args) -> None:
    actual = project(ops.mla_project, args)
    baseline = project(reference.mla_project, args)
    expected = project(reference.mla_project, {name: to_double(value) for name, value in args.items()})
    for parts in zip(actual, baseline, expected, strict=True):
        assert_as_accurate(*parts)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kv_lora_rank", "qk_rope_head_dim"), [(16, 16), (88, 32), (24, 8), (20, 6), (3, 2), (7, 0), (512, 64)]
)
def test_matches_the_reference(isa: str, dtype: torch.dtype, kv_lora_rank: int, qk_rope_head_dim: int) -> None:
    assert_matches_reference(make_args(dtype, kv_lora_rank=kv_lora_rank, qk_rope_head_dim=qk_rope_head_dim))


# 300 is more than the kernel converts at a time, 150 tokens more than a task has.
@pytest.mark.parametrize("qk_nope_head_dim", [1, 17, 128, 300])
@pytest.mark.parametrize("num_tokens", [1, 15, 150])
def test_any_nope_dim_and_number_of_tokens(isa: str, threads: int, qk_nope_head_dim: int, num_tokens: int) -> None:
    assert_matches_reference(make_args(torch.bfloat16, qk_nope_head_dim=qk_nope_head_dim, num_tokens=num_tokens))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("q_lora_rank", [None, 12])
def test_optional_norms_and_query_factors(isa: str, dtype: torch.dtype, norms: bool, q_lora_rank: int | None) -> None:
    assert_matches_reference(make_args(dtype, norms=norms, q_lora_rank=q_lora_rank))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("q_lora_rank", [None, 12])
def test_biases_are_added_before_norm_and_rotation(isa: str, dtype: torch.dtype, q_lora_rank: int | None) -> None:
    assert_matches_reference(make_args(dtype, biases=True, q_lora_rank=q_lora_rank))


@pytest.mark.parametrize("norm_eps", [1e-6, 10.0])
def test_norm_eps_is_added_to_the_mean_square(isa: str, norm_eps: float) -> None:
    args = make_args(q_lora_rank=12)
    args["hidden"] *= 1e-3
    assert_matches_reference({**args, "norm_eps": norm_eps})


@pytest.mark.parametrize("num_heads", [1, 9, 33])
def test_any_number_of_heads(isa: str, threads: int, num_heads: int) -> None:
    assert_matches_reference(make_args(num_heads=num_heads, num_tokens=70))


def test_no_nope_part_gives_zero_latent_queries(isa: str) -> None:
    args = make_args(qk_nope_head_dim=0)
    assert_matches_reference(args)
    q, _ = project(ops.mla_project, args)
    assert torch.equal(q[..., :48], torch.zeros(5, 3, 48))


def test_tokens_without_a_slot_are_not_stored(isa: str) -> None:
    args = make_args()
    q, cache = project(ops.mla_project, args)
    stored = args["slot_mapping"][args["slot_mapping"] >= 0]
    written = cache.flatten(0, 1).isfinite().all(-1)
    assert written.nonzero().flatten().tolist() == sorted(stored.tolist())
    assert q.isfinite().all()


def test_bits_do_not_depend_on_the_number_of_threads(isa: str, threads: int) -> None:
    args = make_args(torch.bfloat16, num_tokens=150, num_heads=7)
    actual = project(ops.mla_project, args)
    torch.set_num_threads(1)
    for first, second in zip(actual, project(ops.mla_project, args), strict=True):
        assert torch.equal(first.nan_to_num(), second.nan_to_num())


def test_weights_and_cache_may_be_strided(isa: str) -> None:
    args = make_args(torch.bfloat16)
    q, cache = project(ops.mla_project, args)
    # As W_UK lies in kv_b_proj.weight, above W_UV; as layers that share one cache; as weights kept transposed.
    kv_b_proj = torch.full((3, 20 + 8, 48), torch.nan, dtype=torch.bfloat16)
    layers = torch.full((cache.size(0), 2, *cache.shape[1:]), torch.nan, dtype=torch.bfloat16)
    strided = {
        "w_uk": kv_b_proj[:, :20].copy_(args["w_uk"]),
        "latent_cache": layers[:, 1],
        "w_q": args["w_q"].T.contiguous().T,
        "w_kv_a": args["w_kv_a"].T.contiguous().T,
        "hidden": args["hidden"].T.contiguous().T,
    }
    assert all(not tensor.is_contiguous() for tensor in strided.values())
    assert_as_accurate(ops.mla_project(**{**args, **strided}), q, q.double())
    assert_as_accurate(layers[:, 1], cache, cache.double())
    assert layers[:, 0].isnan().all()


def test_decoding_what_was_projected_is_attention(isa: str) -> None:
    """The two ops of a layer together against attention over keys that are expanded and rotated one by one."""
    args = make_args(num_tokens=6, block_size=8, norms=False)
    args["slot_mapping"] = torch.arange(6)
    q, cache = project(ops.mla_project, args)
    out, _ = ops.mla_decode(
        q[None], cache, torch.zeros(1, 1, dtype=torch.int32), torch.tensor([6], dtype=torch.int32), 48, 1.0
    )

    wide = {name: to_double(value) for name, value in args.items()}
    q_nope, q_pe = (wide["hidden"] @ wide["w_q"].T).view(6, 3, 36).split((20, 16), dim=-1)
    latent, k_pe = (wide["hidden"] @ wide["w_kv_a"].T).split((48, 16), dim=-1)
    cos, sin = wide["cos_sin"][wide["positions"]].chunk(2, dim=-1)
    turn = torch.complex(cos, sin)

    def rotated(x: Tensor, turn: Tensor) -> Tensor:
        return torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn

    k_nope = torch.einsum("hnr,sr->shn", wide["w_uk"], latent)
    scores = torch.einsum("thn,shn->hts", q_nope, k_nope)
    scores += torch.einsum("thp,sp->hts", rotated(q_pe, turn[:, None]), rotated(k_pe, turn).conj()).real
    weights = scores.masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf).softmax(-1)
    torch.testing.assert_close(out[0].double(), torch.einsum("hts,sr->thr", weights, latent), rtol=0, atol=1e-5)


def test_no_tokens(isa: str) -> None:
    args = make_args(num_tokens=0)
    assert ops.mla_project(**args).shape == (0, 3, 64)
    assert args["latent_cache"].isnan().all()


MISUSE = {
    "hidden": [
        (lambda x: x.double(), r"hidden must be bfloat16, float16 or float32 \[.*\], got float64 \[5, 40\]"),
        (lambda x: x[None], r"hidden must be .*\[num_tokens, hidden_size\], got float32 \[1, 5, 40\]"),
    ],
    "w_q": [
        (lambda w: w.half(), r"w_q must be float32 .*, got float16 \[108, 12\]"),
        (lambda w: w[:-1], r"w_q must be float32 \[num_heads \* .*=108, q_lora_rank=12\], got float32 \[107, 12\]"),
    ],
    "w_kv_a": [
        (lambda w: w.half(), r"w_kv_a must be float32 .*, got float16 \[64, 40\]"),
        (lambda w: w[1:], r"w_kv_a must be float32 \[.*=64, hidden_size=40\], got float32 \[63, 40\]"),
    ],
    "w_uk": [
        (lambda w: w.half(), r"w_uk must be float32 .*, got float16 \[3, 20, 48\]"),
        (lambda w: w[0], r"w_uk must be .*\[num_heads, qk_nope_head_dim, kv_lora_rank\], got float32 \[20, 48\]"),
        (lambda w: w.mT.contiguous().mT, r"w_uk must be .*dense in the last dimension, got .* with strides"),
    ],
    "cos_sin": [
        (lambda x: x.double(), r"cos_sin must be float32 .*, got float64 \[64, 16\]"),
        (lambda x: x[:, 2:], r"cos_sin must be .*\[max_position, qk_rope_head_dim=16\].*, got float32 \[64, 14\]"),
        (lambda x: x.T.contiguous().T, r"cos_sin must be .*contiguous, got .* with strides"),
    ],
    "positions": [
        (lambda x: x.int(), r"positions must be int64 \[num_tokens=5\], got int32 \[5\]"),
        (lambda x: x[1:], r"positions must be int64 \[num_tokens=5\], got int64 \[4\]"),
        (lambda x: x.fill_(64), r"positions\[0\] must be .*max_position=64, got 64"),
        (lambda x: x.fill_(-1), r"positions\[0\] must be .*max_position=64, got -1"),
    ],
    "slot_mapping": [
        (lambda x: x.int(), r"slot_mapping must be int64 \[num_tokens=5\], got int32 \[5\]"),
        (lambda x: x.fill_(12), r"slot_mapping\[0\] must be below num_blocks \* block_size=12, got 12"),
    ],
    "latent_cache": [
        (lambda x: x.half(), r"latent_cache must be float32 .*, got float16 \[3, 4, 64\]"),
        (lambda x: x[0], r"latent_cache must be .*\[num_blocks, block_size, .*\], got float32 \[4, 64\]"),
        (lambda x: x[:, :0], r"block_size must be at least 1, got 0"),
        (lambda x: x[..., :-1], r"qk_rope_head_dim must be even .*, got 15"),
        (lambda x: x[..., :40], r"qk_rope_head_dim must be .*at least 0.*, got -8"),
        (lambda x: x.mT.contiguous().mT, r"latent_cache must be .*dense in the last dimension, got .* with strides"),
    ],
    "w_q_a": [
        (lambda w: w[:, 1:], r"w_q_a must be .*\[q_lora_rank, hidden_size=40\], got float32 \[12, 39\]"),
        (lambda _: None, r"q_a_norm must be None without w_q_a"),
    ],
    "q_a_norm": [(lambda w: w[1:], r"q_a_norm must be float32 \[q_lora_rank=12\], got float32 \[11\]")],
    "kv_norm": [
        (lambda w: w.half(), r"kv_norm must be float32 \[kv_lora_rank=48\], got float16 \[48\]"),
        (lambda w: w[1:], r"kv_norm must be float32 \[kv_lora_rank=48\], got float32 \[47\]"),
    ],
    "b_q": [(lambda b: b[1:], r"b_q must be float32 \[num_heads \* \(.*\)=108\], got float32 \[107\]")],
    "b_kv_a": [(lambda b: b.half(), r"b_kv_a must be float32 \[.*=64\], got float16 \[64\]")],
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
    args = make_args(q_lora_rank=12, biases=True)
    args[name] = change(args[name])
    with pytest.raises(RuntimeError, match="transmla::mla_project: " + message):
        ops.mla_project(**args)


def test_fp8_cache_is_for_cuda() -> None:
    args = make_args()
    args["cache_scales"] = torch.ones(args["latent_cache"].shape[:2])
    with pytest.raises(RuntimeError, match=r"latent_cache must be float8_e4m3fn .*got float32"):
        ops.mla_project(**args)
    args["latent_cache"] = args["latent_cache"].to(torch.float8_e4m3fn)
    with pytest.raises(RuntimeError, match="transmla::mla_project: a float8_e4m3fn latent_cache is for CUDA"):
        ops.mla_project(**args)
    with pytest.raises(RuntimeError, match=r"cache_scales must be float32 .*got float64"):
        ops.mla_project(**{**args, "cache_scales": args["cache_scales"].double()})


def test_compilers_are_told_of_an_fp8_cache() -> None:
    """Not opcheck, which runs the op: the CPU has no kernel."""
    arguments = torch.ops.transmla.mla_project.default._schema.arguments
    assert {argument.name for argument in arguments if argument.is_write} == {"latent_cache", "cache_scales"}
    args = make_args(torch.bfloat16)
    args["latent_cache"] = args["latent_cache"].to(torch.float8_e4m3fn)
    args["cache_scales"] = torch.ones(args["latent_cache"].shape[:2])
    with FakeTensorMode() as mode:
        q = ops.mla_project(**{name: mode.from_tensor(value) for name, value in args.items()})
    assert (q.shape, q.dtype) == ((5, 3, 64), torch.bfloat16)


def test_opcheck() -> None:
    args = make_args(torch.bfloat16, q_lora_rank=12, biases=True)
    args["latent_cache"].zero_()
    optional = [args.pop(name) for name in ("w_q_a", "q_a_norm", "kv_norm", "b_q", "b_kv_a")]
    torch.library.opcheck(torch.ops.transmla.mla_project, (*args.values(), *optional, 1e-6))


def test_compiles_without_a_graph_break() -> None:
    args = make_args()
    args["latent_cache"].zero_()
    compiled = torch.compile(lambda kwargs: ops.mla_project(**kwargs), fullgraph=True)
    assert all(map(torch.equal, project(lambda **kwargs: compiled(kwargs), args), project(ops.mla_project, args)))
