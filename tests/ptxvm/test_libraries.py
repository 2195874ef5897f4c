"""Code of CUDA's own headers: cooperative groups, libcu++ barriers, CUB; debug and fast-math builds."""

import numpy as np
import pytest

import ptxvm

SRC = r"""
#include <cooperative_groups.h>
#include <cooperative_groups/reduce.h>
#include <cooperative_groups/scan.h>
#include <cooperative_groups/memcpy_async.h>
#include <cuda/barrier>
#include <cub/cub.cuh>
namespace cg = cooperative_groups;
__global__ void cgk(const int *x, int *o) {
  __shared__ int s[128];
  auto b = cg::this_thread_block();
  auto w = cg::tiled_partition<32>(b);
  auto q = cg::tiled_partition<8>(b);
  cg::memcpy_async(b, s, x, sizeof(int) * 128);
  cg::wait(b);
  int v = s[b.thread_rank()];
  o[b.thread_rank()] = cg::reduce(w, v, cg::plus<int>());
  o[128 + b.thread_rank()] = cg::reduce(q, v, cg::greater<int>());
  o[256 + b.thread_rank()] = cg::exclusive_scan(w, v);
  if (v & 1) { auto a = cg::coalesced_threads(); o[384 + b.thread_rank()] = a.thread_rank() + 100 * a.size(); } else o[384 + b.thread_rank()] = -1;
}
__global__ void barrierk(const int *x, int *o) {
  __shared__ cuda::barrier<cuda::thread_scope_block> bar;
  __shared__ int s[128];
  if (threadIdx.x == 0) init(&bar, 128);
  __syncthreads();
  for (int r = 0; r < 3; r++) {
    cuda::memcpy_async(&s[threadIdx.x], x + r * 128 + threadIdx.x, sizeof(int), bar);
    bar.arrive_and_wait();
    o[r * 128 + threadIdx.x] = s[127 - threadIdx.x];
    bar.arrive_and_wait();
  }
}
__global__ void cubk(const int *x, int *o) {
  using Sort = cub::BlockRadixSort<int, 128, 2>;
  using Scan = cub::BlockScan<int, 128>;
  using Red = cub::BlockReduce<int, 128>;
  __shared__ union { typename Sort::TempStorage a; typename Scan::TempStorage b; typename Red::TempStorage c; } t;
  int k[2] = {x[2 * threadIdx.x], x[2 * threadIdx.x + 1]};
  int sum = Red(t.c).Sum(k[0] + k[1]);
  if (threadIdx.x == 0) o[512] = sum;
  __syncthreads();
  Sort(t.a).Sort(k);
  __syncthreads();
  o[2 * threadIdx.x] = k[0]; o[2 * threadIdx.x + 1] = k[1];
  int p;
  Scan(t.b).ExclusiveSum(k[0], p);
  o[256 + threadIdx.x] = p;
}
"""

MATH = r"""
#include <cstdint>
struct V { virtual __device__ float f(float x) = 0; };
struct A : V { float k; __device__ A(float k) : k(k) {} __device__ float f(float x) override { return k * x; } };
__global__ void virt(float *o) { A a(3.f); V *v = &a; o[threadIdx.x] = v->f(o[threadIdx.x]); }
__device__ float (*table[2])(float);
__noinline__ __device__ float f0(float x) { return x + 1; }
__noinline__ __device__ float f1(float x) { return x * 2; }
__global__ void fptr(float *o, int k) { float (*f)(float) = k ? f1 : f0; o[threadIdx.x] = f(o[threadIdx.x]); }
__global__ void math(const float *x, float *y, int n) {
  int i = threadIdx.x + blockIdx.x * blockDim.x;
  if (i >= n) return;
  float v = x[i];
  y[6 * i] = expf(v); y[6 * i + 1] = sqrtf(fabsf(v)) / (1 + v * v); y[6 * i + 2] = __sinf(v); y[6 * i + 3] = powf(fabsf(v), 1.7f); y[6 * i + 4] = erff(v); y[6 * i + 5] = rsqrtf(v * v + 1);
}
__global__ void dmath(const double *x, double *y, int n) {
  int i = threadIdx.x;
  if (i >= n) return;
  double v = x[i];
  y[6 * i] = exp(v); y[6 * i + 1] = log(fabs(v)); y[6 * i + 2] = sin(v); y[6 * i + 3] = pow(fabs(v), 1.7); y[6 * i + 4] = atan2(v, 2.0); y[6 * i + 5] = fmod(v, 0.7);
}
"""
rng = np.random.default_rng(4)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_libraries(arch):
    mod = ptxvm.compile(SRC, arch=arch, flags=["-std=c++17"])
    x = rng.integers(0, 1000, 128).astype(np.int32)
    o = np.zeros(512, np.int32)
    mod.launch("cgk", 1, 128, [x, o])
    o = o.reshape(4, 128)
    xs = x.reshape(4, 32)
    assert (o[0] == np.repeat(xs.sum(1), 32)).all()
    assert (o[1] == np.repeat(x.reshape(16, 8).max(1), 8)).all()
    assert (o[2].reshape(4, 32) == np.cumsum(xs, 1) - xs).all()
    odd = xs & 1
    want = np.where(odd, np.cumsum(odd, 1) - odd + 100 * odd.sum(1, keepdims=True), -1)
    assert (o[3].reshape(4, 32) == want).all()
    x = rng.integers(0, 1000, 384).astype(np.int32)
    o = np.zeros(384, np.int32)
    mod.launch("barrierk", 1, 128, [x, o])
    assert (o.reshape(3, 128) == x.reshape(3, 128)[:, ::-1]).all()
    x = rng.integers(-(10**9), 10**9, 256).astype(np.int32)
    o = np.zeros(513, np.int32)
    mod.launch("cubk", 1, 128, [x, o])
    s = np.sort(x)
    with np.errstate(over="ignore"):
        assert (o[:256] == s).all()
        assert o[512] == x.sum(dtype=np.int32)
        assert (o[256:384] == np.cumsum(s[::2], dtype=np.int32) - s[::2]).all()


@pytest.mark.parametrize("flags", [[], ["-use_fast_math"], ["-G"], ["-Xcicc", "-O0"]])
def test_builds(flags):
    mod = ptxvm.compile(MATH, flags=flags)
    x = (rng.standard_normal(300) * 3).astype(np.float32)
    y = np.zeros((300, 6), np.float32)
    mod.launch("_Z4math", 3, 128, [x, y, 300])
    from math import erf

    d = x.astype(np.float64)
    want = [
        np.exp(d),
        np.sqrt(np.abs(d)) / (1 + d * d),
        np.sin(d),
        np.abs(d) ** 1.7,
        np.array([erf(v) for v in d]),
        1 / np.sqrt(d * d + 1),
    ]
    for c, w in enumerate(want):
        assert np.allclose(y[:, c], w, rtol=1e-5, atol=1e-6), c
    yd = np.zeros((300, 6))
    mod.launch("dmath", 1, 320, [d, yd, 300])
    for c, w in enumerate(
        [np.exp(d), np.log(np.abs(d)), np.sin(d), np.abs(d) ** 1.7, np.arctan2(d, 2), np.fmod(d, 0.7)]
    ):
        assert np.allclose(yd[:, c], w, rtol=1e-12, atol=1e-13), c
    o = np.arange(32, dtype=np.float32)
    mod.launch("virt", 1, 32, [o])
    assert (o == 3 * np.arange(32)).all()
    mod.launch("fptr", 1, 32, [o, 1])
    mod.launch("fptr", 1, 32, [o, 0])
    assert (o == 6 * np.arange(32) + 1).all()
