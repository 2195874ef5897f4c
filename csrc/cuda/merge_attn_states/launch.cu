#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/kernels.h"

namespace transmla {
namespace {

constexpr int kThreads = 128;

__device__ float to_float(float x) { return x; }
__device__ float to_float(__half x) { return __half2float(x); }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ void assign(float& to, float x) { to = x; }
__device__ void assign(__half& to, float x) { to = __float2half(x); }
__device__ void assign(__nv_bfloat16& to, float x) { to = __float2bfloat16(x); }

// An empty part counts for nothing: +inf is what some kernels write for it.
__device__ float log_weight(float lse) { return lse == INFINITY ? -INFINITY : lse; }

// One block merges the two states of one (batch, token, head).
template <class T>
__global__ void __launch_bounds__(kThreads)
    merge_attn_states_kernel(const __grid_constant__ MergeAttnStatesParams p) {
  const index_t row = blockIdx.x;
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
  for (index_t i = threadIdx.x; i < p.head_dim; i += kThreads) {
    // By select, not by product: an empty part may hold anything, and 0 * NaN is NaN.
    const float x = weight_a == 0 ? 0.0f : to_float(out_a[i]) * weight_a;
    const float y = weight_b == 0 ? 0.0f : to_float(out_b[i]) * weight_b;
    assign(out[i], x + y);
  }
  if (threadIdx.x == 0) p.lse[lse_index] = empty ? -INFINITY : top + logf(exp_a + exp_b);
}

}  // namespace

int launch_merge_attn_states(const MergeAttnStatesParams& params, void* stream) {
  const index_t num_rows = params.batch_size * params.seqlen_q * params.num_heads;
  if (num_rows == 0) return cudaSuccess;
  const auto launch = [&](auto kernel) {
    kernel<<<num_rows, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(params);
  };
  switch (params.dtype) {
    case DType::kFloat32:
      launch(merge_attn_states_kernel<float>);
      break;
    case DType::kBFloat16:
      launch(merge_attn_states_kernel<__nv_bfloat16>);
      break;
    case DType::kFloat16:
      launch(merge_attn_states_kernel<__half>);
      break;
  }
  return cudaGetLastError();
}

}  // namespace transmla
