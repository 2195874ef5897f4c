// Merges the results of a sequence's parts by their lse.
#pragma once

#include "cuda/common/pack.cuh"
#include "cuda/mla_decode/parts.cuh"

namespace transmla {

constexpr int kCombineThreads = 128;

// One block merges one row (token, head) of one sequence, always in the order of the parts.
template <class T, int kSize>
__global__ void __launch_bounds__(kCombineThreads)
    mla_decode_combine_kernel(const __grid_constant__ MlaDecodeParams p,
                              const __grid_constant__ MlaDecodePlan plan) {
  const int num_rows = static_cast<int>(p.seqlen_q * p.num_heads);
  const int batch = blockIdx.x / num_rows, row = blockIdx.x % num_rows;
  const Slots slots(p, plan, batch);
  if (slots.count == 1) return;

  const PartResults parts(p, plan);
  const auto index_of = [&](int part) { return slots[part] * index_t{num_rows} + row; };
  float top = -INFINITY, total = 0;
  for (int i = threadIdx.x % 32; i < slots.count; i += 32) {
    top = fmaxf(top, parts.lse[index_of(i)]);
  }
  top = warp_max(top);
  const float shift = top == -INFINITY ? 0 : top;
  for (int i = threadIdx.x % 32; i < slots.count; i += 32) {
    total += exp2f(parts.lse[index_of(i)] - shift);
  }
  total = warp_sum(total);

  const int rank = static_cast<int>(p.kv_lora_rank);
  const float scale = total == 0 ? 0 : 1 / total;
  T* out = static_cast<T*>(p.out) + index_t{blockIdx.x} * rank;
  for (int column = threadIdx.x * kSize; column < rank; column += kCombineThreads * kSize) {
    float sum[kSize] = {};
#pragma unroll 4
    for (int i = 0; i < slots.count; ++i) {
      const float weight = exp2f(parts.lse[index_of(i)] - shift) * scale;
      float part[kSize];
      load(part, parts.out + index_of(i) * rank + column);
#pragma unroll
      for (int k = 0; k < kSize; ++k) sum[k] += part[k] * weight;
    }
    store(out + column, sum);
  }
  if (threadIdx.x == 0) p.lse[lse_index(p, batch, row)] = lse_of(top, total) * kLn2;
}

}  // namespace transmla
