"""The int8 latent cache with two scales for each token: appended by mla_project, read by mla_decode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accuracy import assert_as_accurate, to_double
from latent import decode_args
from test_mla_project import make_args
from torch import Tensor

from transmla_ext import ops, reference

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SIZES = [(512, 64), (88, 32), (48, 16), (20, 6), (7, 0)]  # kv_lora_rank, qk_rope_head_dim
MAX_CODE = 127
Args = dict[str, Any]


def quantised(args: Args) -> Args:
    """The same cache in int8, with scales that are up to twice too large; where no token is, they are NaN."""
    parts = args["latent_cache"].float().tensor_split((args["kv_lora_rank"],), dim=-1)
    scales = torch.stack([torch.nn.functional.pad(part.abs(), (0, 1)).amax(-1) for part in parts], dim=-1) / MAX_CODE
    scales = scales * (1 + torch.rand(scales.shape))
    codes = [
        (part / scale).round().nan_to_num(MAX_CODE) for part, scale in zip(parts, scales.split(1, -1), strict=True)
    ]
    return {**args, "latent_cache": torch.cat(codes, dim=-1).to(torch.int8), "cache_scales": scales}


def with_empty_int8_cache(args: Args) -> Args:
    shape = args["latent_cache"].shape
    cache = torch.full(shape, MAX_CODE, dtype=torch.int8)
    return {**args, "latent_cache": cache, "cache_scales": torch.full((*shape[:2], 2), torch.nan)}


def copied(args: Args) -> Args:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in args.items()}


def stored(args: Args) -> Tensor:
    """The numbers that an int8 cache stands for, fp64; NaN where nothing is stored."""
    rank = args["w_uk"].size(2)
    sizes = torch.tensor([rank, args["latent_cache"].size(-1) - rank])
    return args["latent_cache"].double() * args["cache_scales"].double().repeat_interleave(sizes, dim=-1)


def assert_matches_reference(args: Args) -> None:
    actual = ops.mla_decode(**args)
    baseline = reference.mla_decode(**args)
    expected = reference.mla_decode(**{name: to_double(value) for name, value in args.items()})
    for parts in zip(actual, baseline, expected, strict=True):
        assert_as_accurate(*parts)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kv_lora_rank", "qk_rope_head_dim"), SIZES)
def test_decode_matches_the_reference(isa: str, dtype: torch.dtype, kv_lora_rank: int, qk_rope_head_dim: int) -> None:
    args = decode_args(dtype, kv_lora_rank=kv_lora_rank, qk_rope_head_dim=qk_rope_head_dim, num_heads=17, seqlen_q=2)
    assert_matches_reference(quantised(args))


def test_unused_pages_and_their_scales_are_never_read(isa: str) -> None:
    args = quantised(decode_args(seqlen_q=2))
    poisoned = ops.mla_decode(**args)
    args["cache_scales"].nan_to_num_(0.0)
    args["latent_cache"][(args["cache_scales"] == 0).all(-1)] = 0
    assert all(map(torch.equal, poisoned, ops.mla_decode(**args)))


def test_each_scale_multiplies_its_own_part(isa: str) -> None:
    args = quantised(decode_args(seqlens=(1,), block_size=1))
    page = args["block_table"][0, 0]
    args["cache_scales"][page, 0] = scales = torch.tensor([0.5, 8.0])
    codes = args["latent_cache"][page, 0].float()
    out, lse = ops.mla_decode(**args)
    assert torch.equal(out[0, 0], (codes[:48] * scales[0]).expand(3, 48))
    token = codes * scales.repeat_interleave(torch.tensor([48, 16]))
    torch.testing.assert_close(lse[0, :, 0], args["q"][0, 0] @ token * args["softmax_scale"])


def test_scales_may_be_a_slice(isa: str) -> None:
    args = quantised(decode_args())
    contiguous = ops.mla_decode(**args)
    wide = torch.full((len(args["cache_scales"]), 2, 20, 2), torch.nan)[:, 1, 2:18]
    args["cache_scales"] = wide.copy_(args["cache_scales"])
    assert all(map(torch.equal, ops.mla_decode(**args), contiguous))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kv_lora_rank", "qk_rope_head_dim"), SIZES)
def test_append_is_as_accurate_as_the_reference(
    isa: str, dtype: torch.dtype, kv_lora_rank: int, qk_rope_head_dim: int
) -> None:
    args = make_args(dtype, kv_lora_rank=kv_lora_rank, qk_rope_head_dim=qk_rope_head_dim, num_tokens=20)
    exact = {name: to_double(value) for name, value in args.items()}
    reference.mla_project(**exact)
    int8, baseline = with_empty_int8_cache(args), with_empty_int8_cache(args)
    q, baseline_q = ops.mla_project(**int8), reference.mla_project(**baseline)
    assert_as_accurate(q, baseline_q, reference.mla_project(**{name: to_double(value) for name, value in args.items()}))
    assert_as_accurate(stored(int8), stored(baseline), exact["latent_cache"])


@pytest.mark.parametrize("norms", [True, False])
def test_numbers_are_off_by_half_a_step_and_the_largest_not_at_all(isa: str, norms: bool) -> None:
    args = make_args(num_tokens=20, norms=norms)
    plain, int8 = copied(args), with_empty_int8_cache(args)
    q = ops.mla_project(**plain)
    assert torch.equal(ops.mla_project(**int8), q)
    written = plain["latent_cache"].isfinite().all(-1)
    assert torch.equal(int8["cache_scales"].isfinite().all(-1), written)
    exact, codes, actual = (x[written] for x in (plain["latent_cache"].double(), int8["latent_cache"], stored(int8)))
    for part, scale in ((slice(48), 0), (slice(48, None), 1)):
        step = int8["cache_scales"][written][:, scale, None]
        assert (codes[:, part].abs().amax(-1) == MAX_CODE).all()
        torch.testing.assert_close(step * MAX_CODE, exact[:, part].abs().amax(-1, keepdim=True).float())
        assert ((actual - exact)[:, part].abs() <= 0.5001 * step).all()


def test_ties_are_rounded_to_even(isa: str) -> None:
    numbers = torch.cat((torch.arange(-126.5, 127), torch.tensor([127.0])))
    args = make_args(num_tokens=1, kv_lora_rank=len(numbers), qk_rope_head_dim=0, hidden_size=1, norms=False)
    args["hidden"], args["w_kv_a"] = torch.ones(1, 1), numbers[:, None]
    args = with_empty_int8_cache(args)
    ops.mla_project(**args)
    assert torch.equal(args["latent_cache"].flatten(0, 1)[args["slot_mapping"][0]], numbers.round().to(torch.int8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_have_scale_one_and_what_is_not_finite_has_none(isa: str, dtype: torch.dtype) -> None:
    args = make_args(dtype, num_tokens=4, norms=False)
    args["slot_mapping"] = torch.arange(4)
    args["hidden"][1:] = 0
    args["hidden"][2, 0] = torch.inf
    args["hidden"][3, -1] = torch.nan
    args = with_empty_int8_cache(args)
    ops.mla_project(**args)
    scales = args["cache_scales"].flatten(0, 1)[:4]
    assert torch.equal(scales[1], torch.ones(2))
    assert not args["latent_cache"].flatten(0, 1)[1].any()
    assert scales[0].isfinite().all()
    assert scales[2:].isnan().all()


def test_a_token_is_read_as_it_was_appended(isa: str) -> None:
    args = make_args(num_tokens=1, block_size=1)
    args["slot_mapping"] = torch.tensor([2])
    args = with_empty_int8_cache(args)
    q = ops.mla_project(**args)[:, None]
    cache, scales = args["latent_cache"], args["cache_scales"]
    block, one = (torch.tensor(number, dtype=torch.int32) for number in ([[2]], [1]))
    out, _ = ops.mla_decode(q, cache, block, one, 48, 1.0, cache_scales=scales)
    torch.testing.assert_close(out[0, 0].double(), stored(args)[2, 0, :48].expand(3, 48))


def test_misuse_says_what_was_expected_and_got() -> None:
    args = quantised(decode_args())
    scales = args["cache_scales"]
    with pytest.raises(
        RuntimeError, match=r"cache_scales must be float32 \[.*=16, latent and RoPE key=2\], got .*16\]"
    ):
        ops.mla_decode(**{**args, "cache_scales": scales[..., 0]})
    with pytest.raises(RuntimeError, match=r"cache_scales must be float32 .*got float64"):
        ops.mla_decode(**{**args, "cache_scales": scales.double()})
    with pytest.raises(RuntimeError, match=r"latent_cache must be float32 .*got int8"):
        ops.mla_decode(**{**args, "cache_scales": None})
    with pytest.raises(RuntimeError, match=r"latent_cache must be float8_e4m3fn or int8 .*got float16"):
        ops.mla_decode(**{**args, "latent_cache": args["latent_cache"].half()})


def test_opcheck() -> None:
    args = quantised(decode_args(torch.bfloat16, seqlen_q=2))
    scales = args.pop("cache_scales")
    torch.library.opcheck(torch.ops.transmla.mla_decode, (*args.values(), 0.0, 0, 0, False, scales))
    args = with_empty_int8_cache(make_args(torch.bfloat16, norms=False))
    scales = args.pop("cache_scales").fill_(1.0)
    torch.library.opcheck(torch.ops.transmla.mla_project, (*args.values(), *5 * [None], 1e-6, scales))
