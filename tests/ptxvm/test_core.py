"""Basics: scalars, shared memory, divergence, atomics, calls, parameters, checks, counters."""

import ctypes

import numpy as np
import pytest

import ptxvm

SRC = r"""
#include <cstdio>
#include <cassert>
struct Args { const float *x; float *y; int n; float a; int t[4]; };
__global__ void broadcast(const float *a, float *o) { o[threadIdx.x] = a[0] + a[threadIdx.x * 8]; }
__global__ void saxpy(float a, const float *x, float *y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = a * x[i] + y[i];
}
__global__ void reduce(const float *x, float *out, int n) {
  __shared__ float s[32];
  float v = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) v += x[i];
  for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(~0u, v, o);
  if ((threadIdx.x & 31) == 0) s[threadIdx.x >> 5] = v;
  __syncthreads();
  if (threadIdx.x < 32) {
    v = threadIdx.x < blockDim.x / 32 ? s[threadIdx.x] : 0;
    for (int o = 16; o; o >>= 1) v += __shfl_down_sync(~0u, v, o);
    if (threadIdx.x == 0) atomicAdd(out, v);
  }
}
__global__ void matmul(const float *A, const float *B, float *C, int n) {
  __shared__ float a[16][16], b[16][16];
  int tx = threadIdx.x, ty = threadIdx.y, r = blockIdx.y * 16 + ty, c = blockIdx.x * 16 + tx;
  float s = 0;
  for (int k = 0; k < n; k += 16) {
    a[ty][tx] = A[r * n + k + tx];
    b[ty][tx] = B[(k + ty) * n + c];
    __syncthreads();
    for (int j = 0; j < 16; j++) s += a[ty][j] * b[j][tx];
    __syncthreads();
  }
  C[r * n + c] = s;
}
__global__ void histogram(const int *x, int *h, int n) {
  __shared__ int s[16];
  if (threadIdx.x < 16) s[threadIdx.x] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += blockDim.x) atomicAdd(&s[x[i] & 15], 1);
  __syncthreads();
  if (threadIdx.x < 16) atomicAdd(&h[threadIdx.x], s[threadIdx.x]);
}
__global__ void atomics(int *i, unsigned long long *u, float *f, double *d) {
  atomicMax(i, (int)threadIdx.x); atomicMin(i + 1, -(int)threadIdx.x); atomicExch(i + 2, 7); atomicOr(i + 3, 1 << (threadIdx.x & 31));
  atomicInc((unsigned *)i + 4, 9); atomicCAS(i + 5, 0, 42); atomicXor(i + 6, threadIdx.x);
  atomicAdd(u, 1ull << 33); atomicAdd(f, 0.5f); atomicAdd(d, 0.25);
}
__global__ void collatz(const unsigned *x, int *steps, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  unsigned long long v = x[i];
  int s = 0;
  while (v != 1) { if (v & 1) v = 3 * v + 1; else v >>= 1; s++; }
  steps[i] = s;
}
__global__ void missing_sync(float *o) {
  __shared__ float s[256];
  s[threadIdx.x] = 0;
  __syncthreads();
  s[threadIdx.x] = threadIdx.x;
  o[threadIdx.x] = s[threadIdx.x ^ 32];
}
__global__ void war(float *o) {
  __shared__ float s[256];
  s[threadIdx.x] = threadIdx.x;
  __syncthreads();
  float v = s[blockDim.x - 1 - threadIdx.x];
  s[threadIdx.x] = v;
  __syncthreads();
  o[threadIdx.x] = s[threadIdx.x];
}
__global__ void uninit(float *o) { __shared__ float s[64]; if (threadIdx.x) s[threadIdx.x] = 1; __syncthreads(); o[threadIdx.x] = s[threadIdx.x]; }
__global__ void bytes_ok(unsigned char *o) {
  __shared__ unsigned char s[256];
  s[(threadIdx.x & 31) * 8 + (threadIdx.x >> 5)] = threadIdx.x;   // neighbours in a word belong to different warps
  __syncthreads();
  o[threadIdx.x] = s[threadIdx.x];
}
__global__ void strided(float *o, int stride) {
  extern __shared__ float d[];
  d[threadIdx.x * stride] = threadIdx.x;
  __syncthreads();
  o[threadIdx.x] = d[threadIdx.x * stride];
}
__global__ void vec4(float4 *o) {
  extern __shared__ float4 q[];
  q[threadIdx.x] = make_float4(threadIdx.x, 1, 2, 3);
  __syncthreads();
  o[threadIdx.x] = q[threadIdx.x];
}
__global__ void bigsmem(int *o, int n) {
  extern __shared__ int big[];
  for (int i = threadIdx.x; i < n; i += blockDim.x) big[i] = i * 3;
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += blockDim.x) o[i] = big[n - 1 - i];
}
__noinline__ __device__ int fib(int n) { return n < 2 ? n : fib(n - 1) + fib(n - 2); }
__noinline__ __device__ float poly(float x, Args a) { return a.t[0] + x * (a.t[1] + x * (a.t[2] + x * a.t[3])) + a.a; }
__global__ void calls(int *o) { o[threadIdx.x] = fib(threadIdx.x % 10); }
__global__ void structs(Args a) { int i = threadIdx.x; if (i < a.n) a.y[i] = poly(a.x[i], a); }
__global__ void localarr(const int *idx, int *o) {
  int a[16];
  for (int i = 0; i < 16; i++) a[i] = i * i + threadIdx.x;
  o[threadIdx.x] = a[idx[threadIdx.x] & 15] + a[idx[threadIdx.x + 1] & 15];
}
__global__ void sw(int *o) {
  int r = 0;
  switch (threadIdx.x & 7) { case 0: r = 5; break; case 1: r = threadIdx.x * 3; break; case 2: r = 11; break; case 3: r = o[0]; break;
    case 4: r = 19; break; case 5: r = -1; break; case 6: r = threadIdx.x << 4; break; default: r = 100; }
  o[threadIdx.x + 1] = r;
}
__global__ void bardead() { if (threadIdx.x < 32) asm volatile("barrier.sync 1, 64;"); else asm volatile("barrier.sync 2, 64;"); }
__global__ void turns(int *next, int *o) {
  if (threadIdx.x % 32 == 0) o[atomicAdd(next, 1)] = blockIdx.x * 8 + threadIdx.x / 32;
}
__global__ void votes(unsigned *o) {
  unsigned l = threadIdx.x;
  o[l] = __ballot_sync(~0u, l % 3 == 0);
  o[32 + l] = __match_any_sync(~0u, l / 5);
  o[64 + l] = __reduce_add_sync(~0u, l);
  o[96 + l] = __shfl_up_sync(~0u, l, 3);
  o[128 + l] = __shfl_sync(~0u, l, l + 1, 8);
  o[160 + l] = __any_sync(~0u, l == 31) + 2 * __all_sync(~0u, l < 31);
  if (l & 1) o[192 + l] = __activemask(); else o[192 + l] = 7;
  o[224 + l] = __syncthreads_count(l > 9);
}
__constant__ float coef[4];
__device__ int counter = 5;
__device__ int *pcounter = &counter;
__global__ void globals(float *o) { o[threadIdx.x] = coef[threadIdx.x & 3] * *pcounter; if (threadIdx.x == 0) atomicAdd(pcounter, 1); }
__global__ void asserts(int x) { assert(x == 3); }
__global__ void prints(int x) { printf("x=%d %s %.2f %llu\n", x, "str", 1.25, 1ull << 40); }
__global__ void lookback(volatile int *flag, int *o) {   // blocks in order, chained through flags
  if (threadIdx.x == 0) {
    if (blockIdx.x) while (flag[blockIdx.x - 1] == 0) {}
    o[blockIdx.x] = (blockIdx.x ? o[blockIdx.x - 1] : 0) + blockIdx.x;
    __threadfence();
    flag[blockIdx.x] = 1;
  }
}
__global__ void spinlock(int *lock, int *c) {            // lanes of a warp contend
  bool done = false;
  while (!done) { if (atomicCAS(lock, 0, 1) == 0) { *(volatile int *)c += 1; __threadfence(); atomicExch(lock, 0); done = true; } }
}
__global__ void jacobi(const double *A, double *w, double *V) {  // cyclic Jacobi of a symmetric 8x8 by one thread
  double a[8][8], v[8][8];
  for (int i = 0; i < 8; i++) for (int j = 0; j < 8; j++) { a[i][j] = A[i * 8 + j]; v[i][j] = i == j; }
  for (int sweep = 0; sweep < 12; sweep++)
    for (int p = 0; p < 7; p++) for (int q = p + 1; q < 8; q++) {
      if (fabs(a[p][q]) < 1e-300) continue;
      double th = (a[q][q] - a[p][p]) / (2 * a[p][q]);
      double t = copysign(1.0, th) / (fabs(th) + sqrt(th * th + 1)), c = rsqrt(t * t + 1), s = t * c;
      for (int k = 0; k < 8; k++) { double x = a[k][p], y = a[k][q]; a[k][p] = c * x - s * y; a[k][q] = s * x + c * y; }
      for (int k = 0; k < 8; k++) { double x = a[p][k], y = a[q][k]; a[p][k] = c * x - s * y; a[q][k] = s * x + c * y; }
      for (int k = 0; k < 8; k++) { double x = v[k][p], y = v[k][q]; v[k][p] = c * x - s * y; v[k][q] = s * x + c * y; }
    }
  for (int i = 0; i < 8; i++) { w[i] = a[i][i]; for (int j = 0; j < 8; j++) V[i * 8 + j] = v[i][j]; }
}
__global__ void intops(const unsigned *x, const unsigned *y, unsigned *o, int n) {
  int i = threadIdx.x;
  unsigned a = x[i], b = y[i];
  o[i] = __popc(a); o[n + i] = __clz(a); o[2 * n + i] = __brev(a); o[3 * n + i] = __byte_perm(a, b, 0x3175);
  o[4 * n + i] = __umulhi(a, b); o[5 * n + i] = (unsigned)__mulhi((int)a, (int)b); o[6 * n + i] = __funnelshift_l(a, b, b);
  o[7 * n + i] = a / (b | 1); o[8 * n + i] = (unsigned)((int)a % (int)(b | 1)); o[9 * n + i] = __ffs(a);
  o[10 * n + i] = (unsigned)__dp4a((int)a, (int)b, 5); o[11 * n + i] = __usad(a, b, 1); o[12 * n + i] = (a & b) ^ (~a | (b >> 3));
  o[13 * n + i] = (unsigned)(((unsigned long long)a * b + 77) % 1000003ull); o[14 * n + i] = (unsigned)((long long)(int)a / ((int)b | 1));
}
"""


@pytest.fixture(scope="module")
def mod():
    return ptxvm.compile(SRC)


rng = np.random.default_rng(0)


def test_saxpy(mod):
    x, y = rng.random((2, 1000), dtype=np.float32)
    y = y.copy()
    want = np.float32(2) * x + y
    st = mod.launch("saxpy", 8, 128, [2.0, x, y, 1000])
    assert np.allclose(y, want, rtol=1e-6)
    assert st["flops"]["fp32"] == 2000
    assert st["global_bytes"] == {"load": 8000, "store": 4000, "atomic": 0}
    assert st["unique_bytes_read"] == 8000
    assert st["unique_bytes_written"] == 4000
    assert st.coalescing("load") == 1.0
    assert st["divergent_branches"] == 1


def test_broadcasts_do_not_make_up_for_strides(mod):
    a, o = rng.random(256, dtype=np.float32), np.zeros(32, np.float32)
    st = mod.launch("broadcast", 1, 32, [a, o])
    assert np.allclose(o, a[0] + a[::8])
    assert st["global_sectors"]["load"] == 33
    assert st["global_ideal_sectors"]["load"] == 5


@pytest.mark.parametrize("threads", [1, 2])
def test_reduce(mod, threads):
    x = rng.random(10000, dtype=np.float32)
    o = np.zeros(1, np.float32)
    mod.launch("reduce", 6, 256, [x, o, 10000], threads=threads)
    assert np.isclose(o[0], x.sum(dtype=np.float64), rtol=1e-5)


def test_matmul(mod):
    A, B = rng.random((2, 64, 64), dtype=np.float32)
    A, B, C = A.copy(), B.copy(), np.zeros((64, 64), np.float32)
    st = mod.launch("matmul", (4, 4), (16, 16), [A, B, C, 64])
    assert np.allclose(C, A @ B, rtol=1e-5)
    assert st["flops"]["fp32"] == 2 * 64**3
    assert st.cls("barrier") == 16 * 8 * 8


def test_atomics(mod):
    x = rng.integers(0, 1000, 5000).astype(np.int32)
    h = np.zeros(16, np.int32)
    mod.launch("histogram", 1, 256, [x, h, 5000])
    assert (h == np.bincount(x & 15, minlength=16)).all()
    i, u, f, d = np.zeros(8, np.int32), np.zeros(1, np.uint64), np.zeros(1, np.float32), np.zeros(1)
    mod.launch("atomics", 3, 64, [i, u, f, d])
    assert list(i[:7]) == [63, -63, 7, -1, 192 % 10, 42, 0]
    assert u[0] == 192 << 33
    assert f[0] == 96
    assert d[0] == 48


def test_divergence(mod):
    x = np.arange(1, 301, dtype=np.uint32)
    o = np.zeros(300, np.int32)
    st = mod.launch("collatz", 3, 128, [x, o, 300])

    def steps(v):
        s = 0
        while v != 1:
            v, s = (3 * v + 1 if v & 1 else v // 2), s + 1
        return s

    assert list(o) == [steps(int(v)) for v in x]
    assert st["divergent_branches"] > 100


def test_switch(mod):
    o = np.zeros(65, np.int32)
    o[0] = 77
    mod.launch("sw", 1, 64, [o])
    f = [
        lambda i: 5,
        lambda i: 3 * i,
        lambda i: 11,
        lambda i: 77,
        lambda i: 19,
        lambda i: -1,
        lambda i: i << 4,
        lambda i: 100,
    ]
    assert list(o[1:]) == [f[i & 7](i) for i in range(64)]


def test_out_of_bounds(mod):
    x, y = np.zeros((2, 1000), np.float32)
    x, y = x.copy(), y.copy()
    with pytest.raises(ptxvm.PtxError) as e:
        mod.launch("saxpy", 8, 128, [2.0, x, y, 1001])
    t = str(e.value)
    assert "out of bounds" in t
    assert "saxpy" in t
    assert "PTX line" in t
    assert "block (7,0,0)" in t
    assert "thread (104,0,0)" in t


def test_race(mod):
    o = np.zeros(256, np.float32)
    with pytest.raises(ptxvm.PtxError, match="race"):
        mod.launch("missing_sync", 1, 256, [o])
    mod.launch("missing_sync", 1, 256, [o], checks={"race": False})
    with pytest.raises(ptxvm.PtxError, match="write after read|read after write"):
        mod.launch("war", 1, 256, [o])
    mod.launch("war", 1, 32, [o])
    b = np.zeros(256, np.uint8)
    mod.launch("bytes_ok", 1, 256, [b])


def test_uninitialised(mod):
    o = np.zeros(64, np.float32)
    with pytest.raises(ptxvm.PtxError, match="uninitialised"):
        mod.launch("uninit", 1, 64, [o])
    mod.launch("uninit", 1, 64, [o], checks={"uninit": False})


@pytest.mark.parametrize(("stride", "ways"), [(1, 1), (2, 2), (3, 1), (4, 4), (32, 32), (33, 1)])
def test_bank_conflicts(mod, stride, ways):
    o = np.zeros(32, np.float32)
    st = mod.launch("strided", 1, 32, [o, stride], smem=4 * 32 * 40)
    assert st["shared_wavefronts"]["store"] == ways
    assert st["shared_ideal_wavefronts"]["store"] == 1
    assert st["shared_wavefronts"]["load"] == ways


def test_vector_shared(mod):
    o = np.zeros((64, 4), np.float32)
    st = mod.launch("vec4", 1, 64, [o], smem=1024)
    assert (o[:, 0] == np.arange(64)).all()
    assert (o[:, 3] == 3).all()
    assert st["shared_wavefronts"]["load"] == 8 == st["shared_ideal_wavefronts"]["load"]


def test_big_dynamic_shared(mod):
    n = 50000
    o = np.zeros(n, np.int32)
    st = mod.launch("bigsmem", 1, 256, [o, n], smem=4 * n)
    assert (o == 3 * np.arange(n)[::-1]).all()
    assert st["smem"] >= 200000
    with pytest.raises(ptxvm.PtxError, match="shared-memory access out of bounds"):
        mod.launch("bigsmem", 1, 256, [o, n], smem=4 * n - 4)
    with pytest.raises(ptxvm.PtxError, match="limit"):
        mod.launch("bigsmem", 1, 256, [o, n], smem=240000)


def test_calls(mod):
    o = np.zeros(40, np.int32)
    mod.launch("calls", 1, 40, [o])
    fib = [0, 1, 1, 2, 3, 5, 8, 13, 21, 34]
    assert list(o) == [fib[i % 10] for i in range(40)]


def test_struct_by_value(mod):
    class Args(ctypes.Structure):
        _fields_ = [
            ("x", ctypes.c_uint64),
            ("y", ctypes.c_uint64),
            ("n", ctypes.c_int),
            ("a", ctypes.c_float),
            ("t", ctypes.c_int * 4),
        ]

    x, y = rng.random(50, dtype=np.float32), np.zeros(50, np.float32)
    mem = ptxvm.Memory()
    a = Args(mem.register(x), mem.register(y), 50, 0.5, (ctypes.c_int * 4)(1, 2, 3, 4))
    mod.launch("structs", 1, 64, [a], mem=mem)
    assert np.allclose(y, 1 + x * (2 + x * (3 + x * 4)) + 0.5, rtol=1e-5)
    y[:] = 0
    mod.launch("structs", 1, 64, [bytes(a)], mem=mem)
    assert y.any()
    with pytest.raises(ptxvm.PtxError, match="out of bounds"):
        mod.launch("structs", 1, 64, [a])


def test_local_array(mod):
    idx = rng.integers(0, 16, 65).astype(np.int32)
    o = np.zeros(64, np.int32)
    st = mod.launch("localarr", 1, 64, [idx, o])
    t = np.arange(64)
    assert (o == idx[:-1] ** 2 + t + idx[1:] ** 2 + t).all()
    assert st.cls("ld_local") + st.cls("st_local") > 0


def test_deadlock_report(mod):
    with pytest.raises(ptxvm.PtxError) as e:
        mod.launch("bardead", 1, 64, [])
    assert "deadlock" in str(e.value)
    assert "barrier 1 (32 of 64" in str(e.value)
    assert "barrier 2" in str(e.value)


def test_votes(mod):
    o = np.zeros(256, np.uint32)
    mod.launch("votes", 1, 32, [o])
    o = o.reshape(8, 32)
    lanes = np.arange(32)
    ball = sum(1 << i for i in range(0, 32, 3))
    assert (o[0] == ball).all()
    assert all(o[1][l] == sum(1 << j for j in range(32) if j // 5 == l // 5) for l in range(32))
    assert (o[2] == 496).all()
    assert (o[3] == np.where(lanes < 3, lanes, lanes - 3)).all()
    assert (o[4] == (lanes & ~7) + ((lanes + 1) & 7)).all()
    assert (o[5] == 1).all()
    assert (o[6][1::2] == 0xAAAAAAAA).all()
    assert (o[7] == 22).all()


def test_module_variables(mod):
    mod.symbol("coef", np.float32)[:] = [1, 2, 3, 4]
    mod.symbol("counter", np.int32)[0] = 5
    o = np.zeros(32, np.float32)
    mod.launch("globals", 1, 32, [o])
    assert (o == np.tile([5, 10, 15, 20], 8)).all()
    assert mod.symbol("counter", np.int32)[0] == 6


def test_assert_and_printf(mod):
    mod.launch("asserts", 1, 1, [3])
    with pytest.raises(ptxvm.PtxError, match="x == 3"):
        mod.launch("asserts", 1, 1, [4])
    assert mod.launch("prints", 1, 2, [9])["output"] == "x=9 str 1.25 1099511627776\n" * 2


def test_between_blocks(mod):
    f, o = np.zeros(8, np.int32), np.zeros(8, np.int32)
    mod.launch("lookback", 8, 32, [f, o])
    assert list(o) == list(np.cumsum(np.arange(8)))


def test_intra_warp_lock(mod):
    l, c = np.zeros(1, np.int32), np.zeros(1, np.int32)
    mod.launch("spinlock", 2, 64, [l, c], max_insts=10_000_000)
    assert c[0] == 128


def test_order_of_warps_and_blocks(mod):
    def turns(order):
        out = np.full(32, -1, np.int32)
        mod.launch("turns", 4, 256, [np.zeros(1, np.int32), out], order=order)
        return out.tolist()

    assert turns(0) == list(range(32))
    assert turns(1) == turns(1) != turns(2)
    for order in (1, 2):
        blocks = [turn // 8 for turn in turns(order)]
        assert blocks == sorted(blocks, reverse=True)
        assert sorted(turns(order)) == list(range(32)) != turns(order)[::-1]


def test_endless_loop(mod):
    l, c = np.ones(1, np.int32), np.zeros(1, np.int32)
    with pytest.raises(ptxvm.PtxError, match="max_insts"):
        mod.launch("spinlock", 1, 32, [l, c], max_insts=100000)


def test_f64_jacobi(mod):
    A = rng.standard_normal((8, 8))
    A = A + A.T
    w, V = np.zeros(8), np.zeros((8, 8))
    mod.launch("jacobi", 1, 1, [A, w, V])
    assert np.allclose(np.sort(w), np.linalg.eigvalsh(A), atol=1e-12)
    assert np.allclose(V @ np.diag(w) @ V.T, A, atol=1e-12)


def test_integer_ops(mod):
    n = 128
    x, y = rng.integers(0, 2**32, (2, n), dtype=np.uint32)
    x, y = x.copy(), y.copy()
    x[0] = 0
    o = np.zeros((15, n), np.uint32)
    mod.launch("intops", 1, n, [x, y, o, n])
    X, Y = [int(v) for v in x], [int(v) for v in y]
    M = 2**32

    def s(v):
        return v - M if v >> 31 else v

    def tdiv(a, b):
        return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)

    def dp4a(a, b, c):
        def by(v, k):
            return ((v >> 8 * k & 255) ^ 128) - 128

        return c + sum(by(a, k) * by(b, k) for k in range(4))

    def perm(a, b, sel):
        v = a | b << 32
        return sum((v >> 8 * (sel >> 4 * k & 7) & 255) << 8 * k for k in range(4))

    for i, (a, b) in enumerate(zip(X, Y, strict=False)):
        sh = b & 31
        want = [
            bin(a).count("1"),
            32 - a.bit_length(),
            int(f"{a:032b}"[::-1], 2),
            perm(a, b, 0x3175),
            a * b >> 32,
            (s(a) * s(b) >> 32) % M,
            ((b << 32 | a) << sh >> 32) % M,
            a // (b | 1),
            (s(a) - tdiv(s(a), s(b | 1)) * s(b | 1)) % M,
            (a & -a).bit_length(),
            dp4a(a, b, 5) % M,
            abs(a - b) + 1,
            ((a & b) ^ (~a | b >> 3)) % M,
            (a * b + 77) % 1000003,
            tdiv(s(a), s(b | 1)) % M,
        ]
        assert list(o[:, i]) == want, (i, hex(a), hex(b))


def test_unknown_instruction():
    ptx = """.version 8.0
.target sm_80
.address_size 64
.visible .entry k() {
  .reg .b32 %r<3>;
  mov.u32 %r1, 3;
  frobnicate.u32 %r2, %r1;
  ret;
}"""
    with pytest.raises(ptxvm.PtxError, match="PTX line 7.*frobnicate"):
        ptxvm.load(ptx)
    with pytest.raises(ptxvm.PtxError, match="modifier '.wow'"):
        ptxvm.load(ptx.replace("frobnicate.u32 %r2, %r1", "add.wow.u32 %r2, %r1, %r1"))
