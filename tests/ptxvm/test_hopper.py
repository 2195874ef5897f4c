"""sm_90a: mbarriers, bulk copies, TMA tensor copies, wgmma."""

import numpy as np
import pytest

import ptxvm

SRC = r"""
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cstdint>
struct alignas(64) Map { char b[128]; };
__device__ __forceinline__ uint32_t su32(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void bar_init(uint64_t *b, int n) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(su32(b)), "r"(n)); }
__device__ __forceinline__ void bar_arrive(uint64_t *b) { asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(su32(b)) : "memory"); }
__device__ __forceinline__ void bar_expect(uint64_t *b, uint32_t n) { asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(su32(b)), "r"(n) : "memory"); }
__device__ __forceinline__ void bar_wait(uint64_t *b, uint32_t parity) {
  asm volatile("{\n.reg .pred P1;\nLAB_WAIT:\nmbarrier.try_wait.parity.shared::cta.b64 P1, [%0], %1;\n@P1 bra DONE;\nbra LAB_WAIT;\nDONE:\n}" ::"r"(su32(b)), "r"(parity) : "memory");
}
__device__ __forceinline__ void bulk_load(void *s, const void *g, uint32_t n, uint64_t *b) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(su32(s)), "l"(g), "r"(n), "r"(su32(b)) : "memory");
}
__device__ __forceinline__ void tma2(void *s, const Map *m, int x, int y, uint64_t *b) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
               ::"r"(su32(s)), "l"((uint64_t)m), "r"(x), "r"(y), "r"(su32(b)) : "memory");
}
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// warp 0 produces 4-deep ring of 256-float stages by bulk copies, warps 1..4 consume. MODE 1: the consumers release too early;
// MODE 2: the producer never waits for a free stage; MODE 3: the consumers never release
template <int MODE> __device__ void pipe_body(const float *g, float *o, int n) {
  __shared__ __align__(128) float buf[4][256];
  __shared__ uint64_t full[4], empty[4];
  int w = threadIdx.x / 32, l = threadIdx.x & 31;
  if (threadIdx.x == 0) { for (int i = 0; i < 4; i++) { bar_init(full + i, 1); bar_init(empty + i, 4); } asm volatile("fence.mbarrier_init.release.cluster;"); }
  __syncthreads();
  if (w == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (l == 0) for (int i = 0; i < n; i++) {
      int s = i & 3;
      if (MODE != 2) bar_wait(empty + s, ((i >> 2) & 1) ^ 1);
      bar_expect(full + s, 1024);
      bulk_load(buf[s], g + i * 256, 1024, full + s);
    }
  } else {
    float sum = 0;
    for (int i = 0; i < n; i++) {
      int s = i & 3;
      bar_wait(full + s, (i >> 2) & 1);
      if (MODE == 1 && l == 0) bar_arrive(empty + s);
      if (MODE == 1) __syncwarp();
      for (int k = 0; k < 2; k++) sum += buf[s][(w - 1) * 64 + k * 32 + l];
      if (MODE != 1) __syncwarp();
      if (MODE != 1 && MODE != 3 && l == 0) bar_arrive(empty + s);
    }
    o[threadIdx.x - 32] = sum;
  }
}
__global__ void pipe(const float *g, float *o, int n) { pipe_body<0>(g, o, n); }
__global__ void pipe_early(const float *g, float *o, int n) { pipe_body<1>(g, o, n); }
__global__ void pipe_nofree(const float *g, float *o, int n) { pipe_body<2>(g, o, n); }
__global__ void pipe_stuck(const float *g, float *o, int n) { pipe_body<3>(g, o, n); }

__global__ void tma_copy(const __grid_constant__ Map in, const __grid_constant__ Map out, uint16_t *raw, int x, int y, int fence) {
  extern __shared__ __align__(1024) uint16_t s[];   // 32 x 64 halves
  __shared__ uint64_t b;
  if (threadIdx.x == 0) { bar_init(&b, 1); fence_async(); bar_expect(&b, 4096); tma2(s, &in, x, y, &b); }
  __syncthreads();
  bar_wait(&b, 0);
  for (int i = threadIdx.x; i < 2048; i += blockDim.x) raw[i] = s[i];
  __syncthreads();
  for (int i = threadIdx.x; i < 2048; i += blockDim.x) s[i] += 1;
  if (fence) fence_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"((uint64_t)&out), "r"(x), "r"(y), "r"(su32(s)) : "memory");
    asm volatile("cp.async.bulk.commit_group;");
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  }
}
__global__ void bulk_out(float *g, float *acc, int wait) {
  __shared__ __align__(128) float s[256];
  s[threadIdx.x] = threadIdx.x;
  fence_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], 1024;" ::"l"(g), "r"(su32(s)) : "memory");
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], 1024;" ::"l"(acc), "r"(su32(s)) : "memory");
    asm volatile("cp.async.bulk.commit_group;");
    if (wait) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
  }
}
__global__ void async_arrive(const float4 *g, float4 *o) {   // cp.async completing on an mbarrier
  __shared__ float4 s[64];
  __shared__ uint64_t b;
  if (threadIdx.x == 0) bar_init(&b, 64);
  __syncthreads();
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(su32(s + threadIdx.x)), "l"(g + threadIdx.x));
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(su32(&b)));
  bar_wait(&b, 0);
  o[threadIdx.x] = s[63 - threadIdx.x];
}

__device__ __forceinline__ uint64_t desc(const void *p, int lbo, int sbo, int mode) {
  return (uint64_t)((su32(p) & 0x3ffff) >> 4) | (uint64_t)(lbo >> 4) << 16 | (uint64_t)(sbo >> 4) << 32 | (uint64_t)mode << 62;
}
__device__ __forceinline__ void wg_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wg_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> __device__ __forceinline__ void wg_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }
template <int TA, int TB> __device__ __forceinline__ void wg_n16(float *d, uint64_t a, uint64_t b, int scale) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %10, 0;\nwgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%0,%1,%2,%3,%4,%5,%6,%7}, %8, %9, p, 1, 1, %11, %12;\n}"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]) : "l"(a), "l"(b), "r"(scale), "n"(TA), "n"(TB));
}
__device__ __forceinline__ void wg_n16_ra(float *d, const uint32_t *a, uint64_t b, int scale) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %13, 0;\nwgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%0,%1,%2,%3,%4,%5,%6,%7}, {%8,%9,%10,%11}, %12, p, 1, 1, 0;\n}"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(scale));
}
__device__ __forceinline__ void wg_fp8(float *d, uint64_t a, uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n16k32.f32.e4m3.e4m3 {%0,%1,%2,%3,%4,%5,%6,%7}, %8, %9, 1, 1, 1;"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]) : "l"(a), "l"(b));
}
__device__ __forceinline__ void wg_out(float *C, const float *d) {
  int t = threadIdx.x, w = t / 32, l = t & 31;
  for (int i = 0; i < 8; i++) C[(16 * w + l / 4 + 8 * (i >> 1 & 1)) * 16 + 8 * (i >> 2) + 2 * (l & 3) + (i & 1)] = d[i];
}
// C[64,16] = A[64,64] B[16,64]^T; A and B come by TMA with 128-byte swizzle. WAIT 0: missing wgmma.wait_group
template <int WAIT> __device__ void wgmma_body(const Map *ma, const Map *mb, float *C) {
  extern __shared__ __align__(1024) uint16_t sm[];
  uint16_t *sa = sm, *sb = sm + 64 * 64;
  __shared__ uint64_t bar;
  if (threadIdx.x == 0) { bar_init(&bar, 1); fence_async(); bar_expect(&bar, 8192 + 2048); tma2(sa, ma, 0, 0, &bar); tma2(sb, mb, 0, 0, &bar); }
  __syncthreads();
  bar_wait(&bar, 0);
  float d[8];
  wg_fence();
  for (int k = 0; k < 4; k++) wg_n16<0, 0>(d, desc(sa + 16 * k, 16, 1024, 1), desc(sb + 16 * k, 16, 1024, 1), k > 0);
  wg_commit();
  if (WAIT) wg_wait<0>();
  wg_out(C, d);
}
__global__ void wgmma_tma(const __grid_constant__ Map ma, const __grid_constant__ Map mb, float *C) { wgmma_body<1>(&ma, &mb, C); }
__global__ void wgmma_nowait(const __grid_constant__ Map ma, const __grid_constant__ Map mb, float *C) { wgmma_body<0>(&ma, &mb, C); }

// C[n][64,16] = A B[n]^T through one stage for B that thread 0 alone gives back: its wait covers the warpgroup's reads.
// MODE 1: given back before the wait; MODE 2: an ordinary read of warp 1 is not ordered before thread 0's arrival;
// MODE 3: warp 1 never commits
template <int MODE> __device__ void ring_body(const Map *ma, const Map *mb, float *C, int n) {
  extern __shared__ __align__(1024) uint16_t sm[];
  uint16_t *sa = sm, *sb = sm + 64 * 64;
  __shared__ uint64_t fa, full, empty;
  int t = threadIdx.x;
  if (t == 0) { bar_init(&fa, 1); bar_init(&full, 1); bar_init(&empty, 1); fence_async(); }
  __syncthreads();
  if (t >= 128) {
    if (t > 128) return;
    bar_expect(&fa, 8192);
    tma2(sa, ma, 0, 0, &fa);
    for (int i = 0; i < n; i++) { bar_wait(&empty, i & 1 ^ 1); bar_expect(&full, 2048); tma2(sb, mb, 0, 16 * i, &full); }
  } else {
    bar_wait(&fa, 0);
    for (int i = 0; i < n; i++) {
      float d[8], x = 0;
      bar_wait(&full, i & 1);
      if (MODE == 2 && t / 32 == 1) x = sb[t];
      wg_fence();
      for (int k = 0; k < 4; k++) wg_n16<0, 0>(d, desc(sa + 16 * k, 16, 1024, 1), desc(sb + 16 * k, 16, 1024, 1), k > 0);
      if (MODE == 3 && t / 32 == 1) bar_wait(&fa, 1);
      wg_commit();
      if (MODE == 1 && t == 0) bar_arrive(&empty);
      wg_wait<0>();
      if (MODE != 1 && t == 0) bar_arrive(&empty);
      wg_out(C + 1024 * i, d);
      if (MODE == 2 && x == 7) C[0] = x;  // keeps the read
    }
  }
}
__global__ void ring(const __grid_constant__ Map ma, const __grid_constant__ Map mb, float *C, int n) { ring_body<0>(&ma, &mb, C, n); }
__global__ void ring_early(const __grid_constant__ Map ma, const __grid_constant__ Map mb, float *C, int n) { ring_body<1>(&ma, &mb, C, n); }
__global__ void ring_generic(const __grid_constant__ Map ma, const __grid_constant__ Map mb, float *C, int n) { ring_body<2>(&ma, &mb, C, n); }
__global__ void ring_alone(const __grid_constant__ Map ma, const __grid_constant__ Map mb, float *C, int n) { ring_body<3>(&ma, &mb, C, n); }

// Operands placed by ordinary stores. MODE: 0 no swizzle K-major, 1 128B, 2 64B, 3 32B K-major; 4 A and B MN-major 128B; 5 A in registers;
// 6 e4m3 K-major 128B swizzle (A and B are bytes, 64x32 and 16x32); 7 missing fence.proxy.async
__device__ __forceinline__ int swz(int byte, int bits) { return byte ^ ((byte >> 3) & ((1 << bits) - 1) << 4); }
template <int MODE> __device__ void layout_body(const uint16_t *A, const uint16_t *B, float *C) {
  extern __shared__ __align__(1024) uint8_t raw[];
  uint8_t *sa = raw, *sb = raw + 16384;
  int t = threadIdx.x;
  constexpr int S = MODE == 2 ? 2 : MODE == 3 ? 1 : MODE == 0 ? 0 : 3, W = 16 << S;
  for (int i = t; i < 64 * 16; i += 128) {  // A[64][16]
    int r = i / 16, k = i % 16, at;
    if (MODE == 4) at = swz(k % 8 * 128 + k / 8 * 1024 + r * 2, 3);
    else if (MODE == 0) at = (r % 8) * 16 + (r / 8) * 256 + (k / 8) * 128 + (k % 8) * 2;
    else at = swz((r % 8) * W + (r / 8) * 8 * W + k * 2, S);
    *(uint16_t *)(sa + at) = A[i];
  }
  for (int i = t; i < 16 * 16; i += 128) {  // B[16][16] (n, k)
    int r = i / 16, k = i % 16, at;
    if (MODE == 4) at = swz(k % 8 * 128 + k / 8 * 1024 + r * 2, 3);
    else if (MODE == 0) at = (r % 8) * 16 + (r / 8) * 256 + (k / 8) * 128 + (k % 8) * 2;
    else at = swz((r % 8) * W + (r / 8) * 8 * W + k * 2, S);
    *(uint16_t *)(sb + at) = B[i];
  }
  if (MODE != 7) fence_async();
  __syncthreads();
  float d[8] = {};
  wg_fence();
  constexpr int m = MODE == 0 ? 0 : MODE == 2 ? 2 : MODE == 3 ? 3 : 1;
  if (MODE == 5) {
    uint32_t a[4];
    int w = t / 32, l = t & 31, g = l >> 2, q = l & 3;
    for (int r = 0; r < 4; r++) a[r] = *(const uint32_t *)(A + (16 * w + g + 8 * (r & 1)) * 16 + 2 * q + 8 * (r >> 1));
    wg_n16_ra(d, a, desc(sb, 16, 1024, 1), 1);
  } else if (MODE == 4) wg_n16<1, 1>(d, desc(sa, 1024, 1024, 1), desc(sb, 1024, 1024, 1), 1);
  else if (MODE == 6) wg_fp8(d, desc(sa, 16, 1024, 1), desc(sb, 16, 1024, 1));
  else if (MODE == 0) wg_n16<0, 0>(d, desc(sa, 128, 256, 0), desc(sb, 128, 256, 0), 0);
  else wg_n16<0, 0>(d, desc(sa, 16, 8 * W, m), desc(sb, 16, 8 * W, m), 1);
  wg_commit();
  wg_wait<0>();
  wg_out(C, d);
}
#define L(n) __global__ void layout##n(const uint16_t *A, const uint16_t *B, float *C) { layout_body<n>(A, B, C); }
L(0) L(1) L(2) L(3) L(4) L(5) L(6) L(7)
__global__ void cluster_ops(unsigned *o) {
  unsigned r, n, p = 0;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(n));
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;");
  asm volatile("{\n.reg .pred P;\nelect.sync _|P, 0xffffffff;\n@P mov.u32 %0, 1;\n}" : "+r"(p));
  asm volatile("griddepcontrol.wait;");
  o[threadIdx.x] = r * 100 + n * 10 + p;
}
"""


@pytest.fixture(scope="module")
def mod():
    return ptxvm.compile(SRC, arch="sm_90a")


def bf16(a):
    u = np.ascontiguousarray(a, np.float32).view(np.uint32)
    return ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16)


def unbf16(u):
    return (u.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


rng = np.random.default_rng(2)


def test_producer_consumer(mod):
    g, o = rng.random((13, 256), dtype=np.float32), np.zeros(128, np.float32)
    st = mod.launch("_Z4pipe", 1, 160, [g, o, 13])
    want = g.reshape(13, 4, 2, 32).sum((0, 2)).reshape(-1)
    assert np.allclose(o, want, rtol=1e-5)
    assert st["bulk_load_bytes"] == 13 * 1024
    assert st.cls("mbarrier") > 0


def test_pipeline_bugs(mod):
    g, o = rng.random((13, 256), dtype=np.float32), np.zeros(128, np.float32)
    with pytest.raises(ptxvm.PtxError, match="race|in flight"):
        mod.launch("pipe_early", 1, 160, [g, o, 13])
    with pytest.raises(ptxvm.PtxError, match="race|in flight|arrivals"):
        mod.launch("pipe_nofree", 1, 160, [g, o, 13])
    with pytest.raises(ptxvm.PtxError) as e:
        mod.launch("pipe_stuck", 1, 160, [g, o, 13])
    assert "deadlock" in str(e.value)
    assert "4 of 4 arrivals pending" in str(e.value)


@pytest.mark.parametrize("sw", [0, 128])
@pytest.mark.parametrize("xy", [(0, 0), (64, 32), (40, 90), (-8, -3)])
def test_tma(mod, sw, xy):
    src = rng.integers(0, 60000, (100, 136)).astype(np.uint16)
    dst = np.zeros_like(src)
    raw = np.zeros((32, 8, 8), np.uint16)
    mem = ptxvm.Memory()
    mem.register(src, "src")
    mem.register(dst, "dst")
    a, b = ptxvm.tensor_map(src, (32, 64), sw), ptxvm.tensor_map(dst, (32, 64), sw)
    x, y = xy
    mod.launch("tma_copy", 1, 64, [a, b, raw, x, y, 1], smem=4096, mem=mem)
    pad = np.zeros((300, 400), np.uint16)
    pad[100:200, 100:236] = src
    tile = pad[100 + y : 132 + y, 100 + x : 164 + x].reshape(32, 8, 8)
    r = np.arange(32)[:, None]
    c = np.arange(8)[None, :]
    assert (raw[r, c ^ (r % 8 if sw else 0)] == tile).all()
    want = np.zeros_like(src)
    ys, xs = slice(max(0, y), min(100, y + 32)), slice(max(0, x), min(136, x + 64))
    want[ys, xs] = src[ys, xs] + 1
    assert (dst == want).all()
    if xy == (0, 0):
        with pytest.raises(ptxvm.PtxError, match="fence.proxy.async"):
            mod.launch("tma_copy", 1, 64, [a, b, raw, x, y, 0], smem=4096, mem=mem)


def test_bulk_store(mod):
    g, acc = np.zeros(256, np.float32), np.ones(256, np.float32)
    mod.launch("bulk_out", 1, 256, [g, acc, 1])
    assert (g == np.arange(256)).all()
    assert (acc == 1 + np.arange(256)).all()
    g[:] = 0
    st = mod.launch("bulk_out", 1, 256, [g, acc, 0])
    assert st["warnings"]
    assert "never waited" in st["warnings"][0]
    assert not g.any()


def test_cp_async_on_mbarrier(mod):
    g, o = rng.random((64, 4), dtype=np.float32), np.zeros((64, 4), np.float32)
    mod.launch("async_arrive", 1, 64, [g, o])
    assert (o == g[::-1]).all()


def test_wgmma_tma(mod):
    A, B, C = bf16(rng.standard_normal((64, 64))), bf16(rng.standard_normal((16, 64))), np.zeros((64, 16), np.float32)
    mem = ptxvm.Memory()
    mem.register(A)
    mem.register(B)
    args = [ptxvm.tensor_map(A, (64, 64), 128), ptxvm.tensor_map(B, (16, 64), 128), C]
    st = mod.launch("wgmma_tma", 1, 128, args, smem=12288, mem=mem)
    assert np.allclose(C, unbf16(A) @ unbf16(B).T, rtol=1e-5, atol=1e-5)
    assert st["flops"]["wgmma.bf16"] == 2 * 64 * 16 * 64
    with pytest.raises(ptxvm.PtxError, match="wgmma.wait_group"):
        mod.launch("wgmma_nowait", 1, 128, args, smem=12288, mem=mem)


def test_wgmma_group_completes_for_the_warpgroup(mod):
    n = 5
    A, B, C = (
        bf16(rng.standard_normal((64, 64))),
        bf16(rng.standard_normal((16 * n, 64))),
        np.zeros((n, 64, 16), np.float32),
    )
    mem = ptxvm.Memory()
    mem.register(A)
    mem.register(B)
    args = [ptxvm.tensor_map(A, (64, 64), 128), ptxvm.tensor_map(B, (16, 64), 128), C, n]
    mod.launch("ring", 1, 160, args, smem=12288, mem=mem)
    want = np.einsum("mk,nik->nmi", unbf16(A), unbf16(B).reshape(n, 16, 64))
    assert np.allclose(C, want, rtol=1e-5, atol=1e-5)
    with pytest.raises(ptxvm.PtxError, match="race|in flight"):
        mod.launch("ring_early", 1, 160, args, smem=12288, mem=mem)
    with pytest.raises(ptxvm.PtxError, match=r"write after read.*warp 1\b"):
        mod.launch("ring_generic", 1, 160, args, smem=12288, mem=mem)
    with pytest.raises(ptxvm.PtxError, match="commit the wgmma-group"):
        mod.launch("ring_alone", 1, 160, args, smem=12288, mem=mem)


@pytest.mark.parametrize("mode", range(6))
def test_wgmma_layouts(mod, mode):
    A, B, C = bf16(rng.standard_normal((64, 16))), bf16(rng.standard_normal((16, 16))), np.zeros((64, 16), np.float32)
    mod.launch(f"layout{mode}", 1, 128, [A, B, C], smem=32768)
    assert np.allclose(C, unbf16(A) @ unbf16(B).T, rtol=1e-5, atol=1e-5)


def test_wgmma_fp8(mod):
    import torch

    A, B = torch.randn(64, 32).to(torch.float8_e4m3fn), torch.randn(16, 32).to(torch.float8_e4m3fn)
    C = np.zeros((64, 16), np.float32)
    mod.launch("layout6", 1, 128, [A.view(torch.int16), B.view(torch.int16), C], smem=32768)
    assert np.allclose(C, (A.double() @ B.double().T).numpy(), rtol=1e-5, atol=1e-5)


def test_missing_proxy_fence(mod):
    A, B, C = bf16(rng.standard_normal((64, 16))), bf16(rng.standard_normal((16, 16))), np.zeros((64, 16), np.float32)
    with pytest.raises(ptxvm.PtxError, match="fence.proxy.async"):
        mod.launch("layout7", 1, 128, [A, B, C], smem=32768)


def test_cluster_of_one(mod):
    o = np.zeros(32, np.uint32)
    mod.launch("cluster_ops", 1, 32, [o])
    assert o[0] == 11
    assert (o[1:] == 10).all()
