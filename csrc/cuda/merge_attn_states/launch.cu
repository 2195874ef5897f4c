#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/kernels.h"

namespace transmla {
namespace {

constexpr int kWarpSize = 32;
constexpr int kRows = 4;  // of a block, a warp each

__device__ float to_float(float x) { return x; }
__device__ float to_float(__half x) { return __half2float(x); }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ void assign(float& to, float x) { to = x; }
__device__ void assign(__half& to, float x) { to = __float2half(x); }
__device__ void assign(__nv_bfloat16& to, float x) { to = __float2bfloat16(x); }

// kSize numbers that one instruction moves.
template <class T, int kSize>
struct alignas(kSize * sizeof(T)) Pack {
  T values[kSize];
};

// An empty part counts for nothing: +inf is what some kernels write for it.
__device__ float log_weight(float lse) { return lse == INFINITY ? -INFINITY : lse; }

// One warp merges the two states of one (batch, token, head).
template <class T, int kSize>
__global__ void __launch_bounds__(kRows* kWarpSize)
    merge_attn_states_kernel(const __grid_constant__ MergeAttnStatesParams p) {
  const index_t row = static_cast<index_t>(blockIdx.x) * kRows + threadIdx.y;
  if (row >= p.batch_size * p.seqlen_q * p.num_heads) return;
  const index_t head = row % p.num_heads;
  const index_t token = row / p.num_heads;
  const index_t lse_index =
      (token / p.seqlen_q * p.num_heads + head) * p.seqlen_q + token % p.seqlen_q;
  const float a = log_weight(p.lse_a[lse_index]);
  const float b = log_weight(p.lse_b[lse_index]);
  const float top = fmaxf(a, b);
  const bool empty = top == -INFINITY;
  const float exp_a = empty ? 0.0f : expf(a - top);
  const float exp_b = empty ? 0.0f : expf(b - top);
  const float scale = empty ? 0.0f : 1.0f / (exp_a + exp_b);
  const float weight_a = exp_a * scale;
  const float weight_b = exp_b * scale;

  using Packed = Pack<T, kSize>;
  const index_t num_packs = p.head_dim / kSize;
  const auto* __restrict__ out_a = static_cast<const Packed*>(p.out_a) + row * num_packs;
  const auto* __restrict__ out_b = static_cast<const Packed*>(p.out_b) + row * num_packs;
  auto* __restrict__ out = static_cast<Packed*>(p.out) + row * num_packs;
  for (index_t i = threadIdx.x; i < num_packs; i += kWarpSize) {
    const Packed x = out_a[i];
    const Packed y = out_b[i];
    Packed merged;
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      // By select, not by product: an empty part may hold anything, and 0 * NaN is NaN.
      assign(merged.values[k], (weight_a == 0 ? 0.0f : to_float(x.values[k]) * weight_a) +
                                   (weight_b == 0 ? 0.0f : to_float(y.values[k]) * weight_b));
    }
    out[i] = merged;
  }
  if (threadIdx.x == 0) p.lse[lse_index] = empty ? -INFINITY : top + logf(exp_a + exp_b);
}

template <class T>
void merge(const MergeAttnStatesParams& p, cudaStream_t stream) {
  constexpr int kSize = 16 / sizeof(T);
  const index_t num_rows = p.batch_size * p.seqlen_q * p.num_heads;
  const auto num_blocks = static_cast<unsigned>((num_rows + kRows - 1) / kRows);
  const auto address = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); };
  const bool aligned =
      p.head_dim % kSize == 0 && (address(p.out_a) | address(p.out_b) | address(p.out)) % 16 == 0;
  const auto kernel = aligned ? merge_attn_states_kernel<T, kSize> : merge_attn_states_kernel<T, 1>;
  kernel<<<num_blocks, dim3(kWarpSize, kRows), 0, stream>>>(p);
}

}  // namespace

int launch_merge_attn_states(const MergeAttnStatesParams& params, void* stream) {
  if (params.batch_size * params.seqlen_q * params.num_heads == 0) return cudaSuccess;
  switch (params.dtype) {
    case DType::kFloat32:
      merge<float>(params, static_cast<cudaStream_t>(stream));
      break;
    case DType::kBFloat16:
      merge<__nv_bfloat16>(params, static_cast<cudaStream_t>(stream));
      break;
    case DType::kFloat16:
      merge<__half>(params, static_cast<cudaStream_t>(stream));
      break;
  }
  return cudaGetLastError();
}

}  // namespace transmla
