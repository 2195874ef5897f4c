"""mma.sync, ldmatrix, cp.async, online softmax."""

import numpy as np
import pytest

import ptxvm

SRC = r"""
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cstdint>
__device__ __forceinline__ uint32_t su32(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void cp16(void *s, const void *g) { asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(su32(s)), "l"(g)); }
__device__ __forceinline__ void ldsm4(uint32_t *r, const void *p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(su32(p)));
}
__device__ __forceinline__ void ldsm2t(uint32_t *r, const void *p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(su32(p)));
}
__device__ __forceinline__ void mma(float *c, const uint32_t *a, const uint32_t *b) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// C[M,N] = A[M,K] B[K,N]; 64x64 tiles, k tiles of 32, 4 warps of 32x32, double-buffered with cp.async
template <bool WAIT, int PAD> __device__ void gemm_body(const __nv_bfloat16 *A, const __nv_bfloat16 *B, float *C, int M, int N, int K) {
  __shared__ __align__(16) __nv_bfloat16 sa[2][64][32 + PAD], sb[2][32][64 + PAD];
  int t = threadIdx.x, w = t / 32, l = t & 31, m0 = blockIdx.y * 64, n0 = blockIdx.x * 64, wm = (w & 1) * 32, wn = (w >> 1) * 32;
  float c[2][4][4] = {};
  auto load = [&](int s, int k0) {
    for (int i = t; i < 256; i += 128) cp16(&sa[s][i / 4][i % 4 * 8], A + (m0 + i / 4) * K + k0 + i % 4 * 8);
    for (int i = t; i < 256; i += 128) cp16(&sb[s][i / 8][i % 8 * 8], B + (k0 + i / 8) * N + n0 + i % 8 * 8);
    asm volatile("cp.async.commit_group;");
  };
  load(0, 0);
  for (int k0 = 0, s = 0; k0 < K; k0 += 32, s ^= 1) {
    if (k0 + 32 < K) { load(s ^ 1, k0 + 32); if (WAIT) asm volatile("cp.async.wait_group 1;"); }
    else if (WAIT) asm volatile("cp.async.wait_group 0;");
    __syncthreads();
    for (int kk = 0; kk < 32; kk += 16) {
      uint32_t a[2][4], b[4][2];
      for (int i = 0; i < 2; i++) ldsm4(a[i], &sa[s][wm + 16 * i + (l & 15)][kk + (l >> 4) * 8]);
      for (int j = 0; j < 4; j++) ldsm2t(b[j], &sb[s][kk + (l & 15)][wn + 8 * j]);
      for (int i = 0; i < 2; i++) for (int j = 0; j < 4; j++) mma(c[i][j], a[i], b[j]);
    }
    __syncthreads();
  }
  for (int i = 0; i < 2; i++) for (int j = 0; j < 4; j++) for (int q = 0; q < 4; q++)
    C[(m0 + wm + 16 * i + l / 4 + 8 * (q >> 1)) * N + n0 + wn + 8 * j + (l & 3) * 2 + (q & 1)] = c[i][j][q];
}
__global__ void gemm(const __nv_bfloat16 *A, const __nv_bfloat16 *B, float *C, int M, int N, int K) { gemm_body<true, 8>(A, B, C, M, N, K); }
__global__ void gemm_nopad(const __nv_bfloat16 *A, const __nv_bfloat16 *B, float *C, int M, int N, int K) { gemm_body<true, 0>(A, B, C, M, N, K); }
__global__ void gemm_nowait(const __nv_bfloat16 *A, const __nv_bfloat16 *B, float *C, int M, int N, int K) { gemm_body<false, 8>(A, B, C, M, N, K); }

// One warp, one mma of each shape; fragments are loaded by hand from row-major A[M][K], col-major B[N][K].
#define FRAG_A(T, K, PER) { for (int r = 0; r < 16 * K * (int)sizeof(T) / 128; r++) { T *p = (T *)&a[r]; for (int q = 0; q < PER; q++) p[q] = A[(g + 8 * (r & 1)) * K + t * PER + q + (r >> 1) * 4 * PER]; } }
#define FRAG_B(T, K, PER) { for (int r = 0; r < 8 * K * (int)sizeof(T) / 128; r++) { T *p = (T *)&b[r]; for (int q = 0; q < PER; q++) p[q] = B[g * K + t * PER + q + r * 4 * PER]; } }
#define OUT for (int q = 0; q < 4; q++) C[(g + 8 * (q >> 1)) * 8 + 2 * t + (q & 1)] = c[q];
__global__ void mma_f16_f16(const __half *A, const __half *B, float *C) {
  int l = threadIdx.x, g = l >> 2, t = l & 3; uint32_t a[4], b[2], d[2] = {0, 0};
  FRAG_A(__half, 16, 2) FRAG_B(__half, 16, 2)
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%0,%1}, {%2,%3,%4,%5}, {%6,%7}, {%0,%1};" : "+r"(d[0]), "+r"(d[1]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  float c[4]; for (int q = 0; q < 4; q++) c[q] = __half2float(((__half *)d)[q]);
  OUT
}
__global__ void mma_f16_k8(const __half *A, const __half *B, float *C) {
  int l = threadIdx.x, g = l >> 2, t = l & 3; uint32_t a[2], b[1]; float c[4] = {1, 1, 1, 1};
  FRAG_A(__half, 8, 2) FRAG_B(__half, 8, 2)
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};" : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(b[0]));
  OUT
}
__global__ void mma_tf32(const float *A, const float *B, float *C) {
  int l = threadIdx.x, g = l >> 2, t = l & 3; uint32_t a[4], b[2]; float c[4] = {0, 0, 0, 0};
  FRAG_A(float, 8, 1) FRAG_B(float, 8, 1)
  for (int i = 0; i < 4; i++) asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(a[i]) : "f"(__uint_as_float(a[i])));
  for (int i = 0; i < 2; i++) asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(b[i]) : "f"(__uint_as_float(b[i])));
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  OUT
}
__global__ void mma_s8(const int8_t *A, const int8_t *B, int *C) {
  int l = threadIdx.x, g = l >> 2, t = l & 3; uint32_t a[4], b[2]; int c[4] = {5, 5, 5, 5};
  FRAG_A(int8_t, 32, 4) FRAG_B(int8_t, 32, 4)
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  OUT
}
#if __CUDA_ARCH__ >= 890
__global__ void mma_e4m3(const uint8_t *A, const uint8_t *B, float *C) {
  int l = threadIdx.x, g = l >> 2, t = l & 3; uint32_t a[4], b[2]; float c[4] = {0, 0, 0, 0};
  FRAG_A(uint8_t, 32, 4) FRAG_B(uint8_t, 32, 4)
  asm volatile("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  OUT
}
#endif
__global__ void mma_f64(const double *A, const double *B, double *C) {
  int l = threadIdx.x; double c[2] = {0, 0};
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0,%1}, {%2}, {%3}, {%0,%1};" : "+d"(c[0]), "+d"(c[1]) : "d"(A[(l >> 2) * 4 + (l & 3)]), "d"(B[(l >> 2) * 4 + (l & 3)]));
  C[(l >> 2) * 8 + 2 * (l & 3)] = c[0]; C[(l >> 2) * 8 + 2 * (l & 3) + 1] = c[1];
}
__global__ void softmax(const float *x, float *y, int n) {  // one warp per row, online
  int l = threadIdx.x;
  const float *r = x + blockIdx.x * n;
  float m = -INFINITY, s = 0;
  for (int i = l; i < n; i += 32) {
    float v = r[i] * 1.44269504f, nm = fmaxf(m, v), e;
    float sc; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(sc) : "f"(m - nm)); asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(v - nm));
    s = s * sc + e; m = nm;
  }
  for (int o = 16; o; o >>= 1) {
    float om = __shfl_xor_sync(~0u, m, o), os = __shfl_xor_sync(~0u, s, o), nm = fmaxf(m, om);
    s = s * exp2f(m - nm) + os * exp2f(om - nm); m = nm;
  }
  for (int i = l; i < n; i += 32) y[blockIdx.x * n + i] = exp2f(r[i] * 1.44269504f - m) / s;
}
__global__ void zfill(const float *g, float *o, int n) {
  __shared__ __align__(16) float s[128];
  int b = threadIdx.x * 4, left = max(0, min(4, n - b)) * 4;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(su32(s + b)), "l"(g + b), "r"(left));
  asm volatile("cp.async.wait_all;");
  __syncwarp();
  for (int i = 0; i < 4; i++) o[b + i] = s[b + i];
}
__global__ void ldst_matrix(const uint16_t *x, uint16_t *y, uint16_t *z) {
  __shared__ __align__(16) uint16_t s[256], d[256], e[256];
  int l = threadIdx.x;
  for (int i = l; i < 256; i += 32) s[i] = x[i];
  __syncwarp();
  uint32_t r[4];
  ldsm4(r, s + l * 8);
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(su32(d + l * 8)), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]));
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(su32(e + l * 8)), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]));
  __syncwarp();
  for (int i = l; i < 256; i += 32) { y[i] = d[i]; z[i] = e[i]; }
#endif
}
"""


def bf16(a):
    u = np.ascontiguousarray(a, np.float32).view(np.uint32)
    return ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16)


def unbf16(u):
    return (u.astype(np.uint32) << 16).view(np.float32)


@pytest.fixture(scope="module")
def mod():
    return ptxvm.compile(SRC)


@pytest.fixture(scope="module")
def mod90():
    return ptxvm.compile(SRC, arch="sm_90a")


rng = np.random.default_rng(1)


@pytest.mark.parametrize("shape", [(64, 64, 32), (128, 192, 160)])
def test_gemm(mod, shape):
    M, N, K = shape
    A, B = bf16(rng.standard_normal((M, K))), bf16(rng.standard_normal((K, N)))
    C = np.zeros((M, N), np.float32)
    st = mod.launch("_Z4gemm", (N // 64, M // 64), 128, [A, B, C, M, N, K])
    want = unbf16(A).astype(np.float64) @ unbf16(B).astype(np.float64)
    assert np.allclose(C, want, rtol=1e-5, atol=1e-4)
    assert st["flops"]["mma.bf16"] == 2 * M * N * K
    assert st["cp_async_bytes"] == (M * K * N // 64 + K * N * M // 64) * 2
    assert st["shared_wavefronts"]["ldmatrix"] == st["shared_ideal_wavefronts"]["ldmatrix"]


def test_gemm_conflicts(mod):
    A, B, C = bf16(rng.random((64, 32))), bf16(rng.random((32, 64))), np.zeros((64, 64), np.float32)
    st = mod.launch("gemm_nopad", 1, 128, [A, B, C, 64, 64, 32])
    # rows of 64 bytes conflict 4 ways, rows of 128 bytes 8 ways
    a, b = 4 * 2 * 2 * 4, 4 * 2 * 4 * 2
    assert st["shared_ideal_wavefronts"]["ldmatrix"] == a + b
    assert st["shared_wavefronts"]["ldmatrix"] == 4 * a + 8 * b


def test_missing_wait(mod):
    A, B, C = bf16(rng.random((64, 64))), bf16(rng.random((64, 64))), np.zeros((64, 64), np.float32)
    with pytest.raises(ptxvm.PtxError, match="in flight"):
        mod.launch("gemm_nowait", 1, 128, [A, B, C, 64, 64, 64])
    mod.launch("gemm_nowait", 1, 128, [A, B, C, 64, 64, 64], checks={"uninit": False, "race": False})
    assert not np.allclose(C, unbf16(A) @ unbf16(B), rtol=1e-2)  # stale data shows


def test_mma_shapes(mod, mod90):
    A, B = rng.standard_normal((16, 16)).astype(np.float16), rng.standard_normal((8, 16)).astype(np.float16)
    C = np.zeros((16, 8), np.float32)
    mod.launch("mma_f16_f16", 1, 32, [A, B, C])
    assert ((A.astype(float) @ B.T.astype(float)).astype(np.float16) == C).all()
    A, B = A[:, :8].copy(), B[:, :8].copy()
    mod.launch("mma_f16_k8", 1, 32, [A, B, C])
    assert np.allclose(C, 1 + A.astype(float) @ B.T.astype(float), rtol=1e-6, atol=1e-6)
    A, B = rng.standard_normal((16, 8)).astype(np.float32), rng.standard_normal((8, 8)).astype(np.float32)
    mod.launch("mma_tf32", 1, 32, [A, B, C])
    assert np.allclose(C, A @ B.T, atol=1e-2)
    assert not np.allclose(C, A @ B.T, atol=1e-6)
    A, B = rng.integers(-128, 128, (16, 32)).astype(np.int8), rng.integers(-128, 128, (8, 32)).astype(np.int8)
    D = np.zeros((16, 8), np.int32)
    mod.launch("mma_s8", 1, 32, [A, B, D])
    assert (5 + A.astype(int) @ B.T.astype(int) == D).all()
    A, B, E = rng.standard_normal((8, 4)), rng.standard_normal((8, 4)), np.zeros((8, 8))
    st = mod.launch("mma_f64", 1, 32, [A, B, E])
    assert np.allclose(E, A @ B.T)
    assert st["flops"]["mma.f64"] == 512
    import torch

    A = torch.randn(16, 32).to(torch.float8_e4m3fn)
    B = torch.randn(8, 32).to(torch.float8_e4m3fn)
    mod90.launch("mma_e4m3", 1, 32, [A.view(torch.uint8), B.view(torch.uint8), C])
    assert np.allclose(C, (A.double() @ B.double().T).numpy(), rtol=1e-5)


def test_softmax(mod):
    x = rng.standard_normal((5, 300)).astype(np.float32) * 5
    y = np.zeros_like(x)
    st = mod.launch("softmax", 5, 32, [x, y, 300])
    e = np.exp(x - x.max(1, keepdims=True))
    assert np.allclose(y, e / e.sum(1, keepdims=True), rtol=1e-5, atol=1e-7)
    assert st.cls("sfu") > 0


def test_zfill(mod):
    g, o = rng.random(70, dtype=np.float32), np.ones(128, np.float32)
    mod.launch("zfill", 1, 32, [g, o, 70])
    assert (o[:70] == g).all()
    assert (o[70:] == 0).all()


def test_matrix_moves(mod90):
    x = np.arange(256, dtype=np.uint16)
    y, z = np.zeros((2, 256), np.uint16)
    y, z = y.copy(), z.copy()
    mod90.launch("ldst_matrix", 1, 32, [x, y, z])
    assert (y == x).all()
    assert (z.reshape(4, 8, 8) == x.reshape(4, 8, 8).transpose(0, 2, 1)).all()
