#include "cuda/common/pack.cuh"
#include "cuda/kernels.h"

namespace transmla {
namespace {

constexpr int kWarpSize = 32;
constexpr int kRows = 4;  // of a block, a warp each

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

  const T* __restrict__ out_a = static_cast<const T*>(p.out_a) + row * p.head_dim;
  const T* __restrict__ out_b = static_cast<const T*>(p.out_b) + row * p.head_dim;
  T* __restrict__ out = static_cast<T*>(p.out) + row * p.head_dim;
  for (index_t i = threadIdx.x * kSize; i < p.head_dim; i += kWarpSize * kSize) {
    float x[kSize], y[kSize];
    load(x, out_a + i);
    load(y, out_b + i);
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      // By select, not by product: an empty part may hold anything, and 0 * NaN is NaN.
      x[k] = (weight_a == 0 ? 0.0f : x[k] * weight_a) + (weight_b == 0 ? 0.0f : y[k] * weight_b);
    }
    store(out + i, x);
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
      merge<bf16>(params, static_cast<cudaStream_t>(stream));
      break;
    case DType::kFloat16:
      merge<fp16>(params, static_cast<cudaStream_t>(stream));
      break;
  }
  return cudaGetLastError();
}

}  // namespace transmla
