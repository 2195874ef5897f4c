// Conversions between fp32, in which everything is summed, and the dtypes of tensors.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "transmla/types.h"

namespace transmla {

using bf16 = __nv_bfloat16;
using fp16 = __half;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(fp16 x) { return __half2float(x); }
__device__ inline float to_float(bf16 x) { return __bfloat162float(x); }

__device__ inline void assign(float& to, float x) { to = x; }
__device__ inline void assign(fp16& to, float x) { to = __float2half(x); }
__device__ inline void assign(bf16& to, float x) { to = __float2bfloat16(x); }

// Two numbers of T in a register, the first in the low half.
template <class T>
__device__ inline uint32_t pack(float low, float high) {
  uint32_t pair;
  if constexpr (std::is_same_v<T, bf16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
}

}  // namespace transmla
