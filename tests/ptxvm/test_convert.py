"""Conversions and half arithmetic against numpy and torch, over all 16-bit patterns where that is feasible."""

import numpy as np
import pytest
import torch

import ptxvm

SRC = r"""
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cstdint>
#define K(name, TI, TO, ...) __global__ void name(const TI *x, TO *y, int n) { int i = blockIdx.x * blockDim.x + threadIdx.x; if (i < n) { TI v = x[i]; __VA_ARGS__ } }
K(half2float, uint16_t, float, y[i] = __half2float(__ushort_as_half(v));)
K(bf2float, uint16_t, float, y[i] = __bfloat162float(__ushort_as_bfloat16(v));)
K(f2half, float, uint16_t, y[i] = __half_as_ushort(__float2half_rn(v));)
K(f2half_rz, float, uint16_t, y[i] = __half_as_ushort(__float2half_rz(v));)
K(f2bf, float, uint16_t, y[i] = __bfloat16_as_ushort(__float2bfloat16_rn(v));)
K(f2bf2, float, uint32_t, asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y[i]) : "f"(v), "f"(-v));)
K(f2h2, float, uint32_t, asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y[i]) : "f"(v), "f"(2 * v));)
K(f2e4, float, uint16_t, asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(y[i]) : "f"(-v), "f"(v));)
K(f2e5, float, uint16_t, asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(y[i]) : "f"(-v), "f"(v));)
K(e42h, uint16_t, uint32_t, asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(y[i]) : "h"(v));)
K(e52h, uint16_t, uint32_t, asm("cvt.rn.f16x2.e5m2x2 %0, %1;" : "=r"(y[i]) : "h"(v));)
K(hmath, uint16_t, uint16_t, __half h = __ushort_as_half(v), k = __float2half(1.2998046875f); y[4 * i] = __half_as_ushort(__hadd(h, k)); y[4 * i + 1] = __half_as_ushort(__hmul(h, k));
  y[4 * i + 2] = __half_as_ushort(__hfma(h, k, h)); y[4 * i + 3] = __half_as_ushort(__hmax(h, k));)
K(bmath, uint16_t, uint16_t, __nv_bfloat16 h = __ushort_as_bfloat16(v), k = __float2bfloat16(1.296875f); y[4 * i] = __bfloat16_as_ushort(__hadd(h, k)); y[4 * i + 1] = __bfloat16_as_ushort(__hmul(h, k));
  y[4 * i + 2] = __bfloat16_as_ushort(__hfma(h, k, h)); y[4 * i + 3] = __bfloat16_as_ushort(__hmin(h, k));)
K(f2i, float, int, y[8 * i] = __float2int_rn(v); y[8 * i + 1] = __float2int_rz(v); y[8 * i + 2] = __float2int_rd(v); y[8 * i + 3] = __float2int_ru(v);
  y[8 * i + 4] = (int)__float2uint_rz(v); y[8 * i + 5] = (signed char)(int)v; y[8 * i + 6] = (int)rintf(v * 0.001f); y[8 * i + 7] = (int)(long long)floorf(v * 0.5f);)
K(i2f, int, float, y[4 * i] = __int2float_rn(v); y[4 * i + 1] = __int2float_rz(v); y[4 * i + 2] = __uint2float_ru((unsigned)v); y[4 * i + 3] = (float)((long long)v * 1234567891ll);)
K(rounding, float, float, y[8 * i] = __fadd_rz(v, 1e-3f); y[8 * i + 1] = __fmul_ru(v, 1.1f); y[8 * i + 2] = __fdiv_rd(v, 3.f); y[8 * i + 3] = __fsqrt_rz(fabsf(v));
  y[8 * i + 4] = __fmaf_rd(v, 1.1f, 1e-3f); y[8 * i + 5] = __saturatef(v); y[8 * i + 6] = v / 3.f; y[8 * i + 7] = sqrtf(fabsf(v));)
K(d2f, double, float, y[3 * i] = __double2float_rn(v); y[3 * i + 1] = __double2float_rz(v); y[3 * i + 2] = __double2float_ru(v);)
K(tf32, float, float, uint32_t r; asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(v)); y[i] = __uint_as_float(r);)
K(cmps, float, int, float w = x[n - 1 - i]; y[i] = (v < w) | (v <= w) << 1 | (v == w) << 2 | (v != w) << 3 | (!(v < w)) << 4 | (!(v >= w)) << 5 | isnan(v) << 6 | isinf(v) << 7 | (fminf(v, w) == v) << 8;)
K(maths, float, float, y[4 * i] = sinf(v); y[4 * i + 1] = expf(v * 0.01f); y[4 * i + 2] = logf(fabsf(v)); y[4 * i + 3] = tanhf(v);)
"""


@pytest.fixture(scope="module")
def mod():
    return ptxvm.compile(SRC, arch="sm_90a")


ALL = np.arange(65536, dtype=np.uint16)
rng = np.random.default_rng(3)


def floats():
    """Interesting floats: all halves, bf16s, their midpoints and neighbours, random bit patterns."""
    h = ALL.view(np.float16).astype(np.float32)
    b = (ALL.astype(np.uint32) << 16).view(np.float32)
    mid = ((ALL.astype(np.uint32) << 16) | 0x8000).view(np.float32)
    u = h.view(np.uint32)
    hm = (u + np.uint32(0x1000)).view(np.float32)
    r = rng.integers(0, 2**32, 30000, dtype=np.uint32).view(np.float32)
    s = (rng.standard_normal(30000) * np.exp(rng.uniform(-14, 8, 30000))).astype(np.float32)
    return np.concatenate([h, b, mid, hm, (u + np.uint32(0x1001)).view(np.float32), r, s])


def run(mod, name, x, dtype, per=1, n=None):
    n = n or x.size
    y = np.zeros(n * per, dtype)
    with np.errstate(all="ignore"):
        mod.launch(f"_Z{len(name)}{name}", (n + 255) // 256, 256, [x, y, n])
    return y.reshape(n, per) if per > 1 else y


def same(a, b, bits):
    """Equal bit patterns, any NaN equal to any NaN."""
    a, b = a.reshape(-1), b.reshape(-1)
    nan = {
        "h": lambda v: (v & 0x7FFF) > 0x7C00,
        "b": lambda v: (v & 0x7FFF) > 0x7F80,
        "e4": lambda v: (v & 0x7F) == 0x7F,
        "e5": lambda v: (v & 0x7F) > 0x7C,
        "f": lambda v: (v & 0x7FFFFFFF) > 0x7F800000,
    }[bits]
    bad = ~((a == b) | (nan(a) & nan(b)))
    assert not bad.any(), [(int(i), hex(a[i]), hex(b[i])) for i in np.flatnonzero(bad)[:5]]


def test_half_to_float(mod):
    same(run(mod, "half2float", ALL, np.uint32), ALL.view(np.float16).astype(np.float32).view(np.uint32), "f")
    same(run(mod, "bf2float", ALL, np.uint32), ALL.astype(np.uint32) << 16, "f")


def test_float_to_half(mod):
    x = floats()
    with np.errstate(all="ignore"):
        same(run(mod, "f2half", x, np.uint16), x.astype(np.float16).view(np.uint16), "h")
    t = torch.from_numpy(x)
    same(run(mod, "f2bf", x, np.uint16), t.bfloat16().view(torch.int16).numpy().view(np.uint16), "b")
    y = run(mod, "f2bf2", x, np.uint32)
    same((y >> 16).astype(np.uint16), t.bfloat16().view(torch.int16).numpy().view(np.uint16), "b")
    same(y.astype(np.uint16), (-t).bfloat16().view(torch.int16).numpy().view(np.uint16), "b")
    y = run(mod, "f2h2", x, np.uint32)
    with np.errstate(all="ignore"):
        same((y >> 16).astype(np.uint16), x.astype(np.float16).view(np.uint16), "h")
        same(y.astype(np.uint16), (2 * x).astype(np.float16).view(np.uint16), "h")
    # toward zero: the rounded value never exceeds the input, and its successor does
    z = run(mod, "f2half_rz", x, np.uint16)
    ok = np.isfinite(x) & (np.abs(x) < 65504)
    zf, up = z.view(np.float16).astype(np.float64), ((z + 1).astype(np.uint16)).view(np.float16).astype(np.float64)
    xx = np.abs(x.astype(np.float64))
    assert (np.abs(zf)[ok] <= xx[ok]).all()
    assert (np.abs(up)[ok] > xx[ok]).all()


@pytest.mark.parametrize(("k", "dt", "lim"), [("e4", torch.float8_e4m3fn, 448), ("e5", torch.float8_e5m2, 57344)])
def test_fp8(mod, k, dt, lim):
    x = floats()
    x = x[~np.isnan(x)]
    y = run(mod, "f2" + k, x, np.uint16)
    t = torch.from_numpy(x).clamp(-lim, lim)
    same((y & 255).astype(np.uint8), t.to(dt).view(torch.uint8).numpy(), k)
    same((y >> 8).astype(np.uint8), (-t).to(dt).view(torch.uint8).numpy(), k)
    h = run(mod, k + "2h", ALL, np.uint32)
    for s in (0, 8):
        v = (
            torch.from_numpy(((ALL >> s) & 255).astype(np.uint8))
            .view(dt)
            .to(torch.float16)
            .view(torch.int16)
            .numpy()
            .view(np.uint16)
        )
        same((h >> (2 * s)).astype(np.uint16), v, "h")


def test_half_arithmetic(mod):
    with np.errstate(all="ignore"):
        y = run(mod, "hmath", ALL, np.uint16, 4)
        h, k = ALL.view(np.float16), np.float16(1.2998046875)
        d = h.astype(np.float64)
        for c, w in enumerate([h + k, h * k, (d * float(k) + d).astype(np.float16), np.fmax(h, k)]):
            same(y[:, c].copy(), w.view(np.uint16), "h")
        y = run(mod, "bmath", ALL, np.uint16, 4)
        b = torch.from_numpy(ALL.view(np.int16)).view(torch.bfloat16)
        kb = torch.tensor(1.296875, dtype=torch.bfloat16)
        f = b.double()
        for c, w in enumerate(
            [
                b + kb,
                b * kb,
                (f * 1.296875 + f).bfloat16(),
                torch.from_numpy(np.fmin(b.float().numpy(), np.float32(1.296875))).bfloat16(),
            ]
        ):
            same(y[:, c].copy(), w.view(torch.int16).numpy().view(np.uint16), "b")


def test_float_to_int(mod):
    x = np.concatenate(
        [
            floats()[::7],
            np.float32([0.5, 1.5, 2.5, -0.5, -1.5, 2**31, -(2**31), 2**32, 3e9, -1, np.nan, np.inf, -np.inf]),
        ]
    )
    y = run(mod, "f2i", x, np.int32, 8)
    d = x.astype(np.float64)
    nan = np.isnan(d)
    with np.errstate(all="ignore"):

        def clip(v):
            return np.where(nan, 0, np.clip(v, -(2**31), 2**31 - 1)).astype(np.int64).astype(np.int32)

        for c, f in enumerate([np.rint, np.trunc, np.floor, np.ceil]):
            assert (y[:, c] == clip(f(d))).all(), c
        assert (
            y[:, 4].view(np.uint32)
            == np.where(nan, 0, np.clip(np.trunc(d), 0, 2**32 - 1)).astype(np.uint64).astype(np.uint32)
        ).all()


def test_int_to_float(mod):
    x = np.concatenate(
        [rng.integers(-(2**31), 2**31, 5000), [0, 1, -1, 2**31 - 1, -(2**31), 16777217, 16777219]]
    ).astype(np.int32)
    y = run(mod, "i2f", x, np.float32, 4)
    assert (y[:, 0] == x.astype(np.float32)).all()
    d = x.astype(np.float64)
    assert (np.abs(y[:, 1].astype(np.float64)) <= np.abs(d)).all()
    assert (np.abs(np.nextafter(y[:, 1], np.copysign(np.float32(np.inf), y[:, 1])).astype(np.float64)) > np.abs(d))[
        x != 0
    ].all()
    u = x.view(np.uint32).astype(np.float64)
    assert (y[:, 2].astype(np.float64) >= u).all()
    assert (np.nextafter(y[:, 2], np.float32(-1)).astype(np.float64) < u)[u > 0].all()
    assert (y[:, 3] == (x.astype(np.int64) * 1234567891).astype(np.float32)).all()


def test_directed_rounding(mod):
    x = (rng.standard_normal(4000) * np.exp(rng.uniform(-10, 10, 4000))).astype(np.float32)
    y = run(mod, "rounding", x, np.float32, 8).astype(np.float64)
    d = x.astype(np.float64)

    def f(v):
        return float(np.float32(v))

    def ulp(v):
        return np.spacing(np.abs(v).astype(np.float32)).astype(np.float64)

    want = [d + f(1e-3), d * f(1.1), d / 3, np.sqrt(np.abs(d)), d * f(1.1) + f(1e-3)]
    for c, w in enumerate(want):
        assert (np.abs(y[:, c] - w) <= ulp(y[:, c])).all(), c
    assert (np.abs(y[:, 0]) <= np.abs(want[0])).all()
    assert (y[:, 1] >= want[1]).all()
    assert (y[:, 2] <= want[2]).all()
    assert (y[:, 3] <= want[3]).all()
    assert (y[:, 4] <= want[4] + 1e-12 * np.abs(want[4])).all()
    assert (y[:, 5] == np.clip(d, 0, 1)).all()
    assert (y[:, 6].astype(np.float32) == x / np.float32(3)).all()
    assert (y[:, 7].astype(np.float32) == np.sqrt(np.abs(x))).all()


def test_double_to_float(mod):
    x = rng.standard_normal(3000) * np.exp(rng.uniform(-50, 50, 3000))
    y = run(mod, "d2f", x, np.float32, 3).astype(np.float64)
    assert (y[:, 0] == x.astype(np.float32)).all()
    assert (np.abs(y[:, 1]) <= np.abs(x)).all()
    assert (y[:, 2] >= x).all()


def test_tf32(mod):
    x = floats()
    x = x[np.isfinite(x) & (np.abs(x) > 1e-30) & (np.abs(x) < 1e30)]
    y = run(mod, "tf32", x, np.uint32)
    assert (y == ((x.view(np.uint32) + 0x1000) & 0xFFFFE000)).all()


def test_comparisons(mod):
    x = np.concatenate([rng.standard_normal(500), [np.nan, np.inf, -np.inf, 0.0, -0.0]]).astype(np.float32)
    x = np.concatenate([x, x[::-1], x[:7]])
    y = run(mod, "cmps", x, np.int32)
    w = x[::-1]
    with np.errstate(all="ignore"):
        want = (
            (x < w)
            | (x <= w) << 1
            | (x == w) << 2
            | (x != w) << 3
            | ~(x < w) << 4
            | ~(x >= w) << 5
            | np.isnan(x) << 6
            | np.isinf(x) << 7
            | (np.fmin(x, w) == x) << 8
        )
    assert (y == want).all()


def test_library_maths(mod):
    x = (rng.standard_normal(3000) * 30).astype(np.float32)
    y = run(mod, "maths", x, np.float32, 4)
    for c, w in enumerate([np.sin(x), np.exp(x * np.float32(0.01)), np.log(np.abs(x)), np.tanh(x)]):
        assert np.allclose(y[:, c], w, rtol=1e-5, atol=2e-6), c
    big = np.float32([1e6, 3e7, 1e10, 123456.7])
    assert np.allclose(run(mod, "maths", big, np.float32, 4)[:, 0], np.sin(big.astype(np.float64)), atol=1e-5)
