// Conversions between fp32, in which everything is summed, and the dtypes of tensors.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "transmla/types.h"

namespace transmla {

using bf16 = __nv_bfloat16;
using fp16 = __half;

// float8_e4m3fn: four bits of exponent, whose bias is 7, and three of mantissa; no infinities.
struct fp8 {
  uint8_t code;
};

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(fp16 x) { return __half2float(x); }
__device__ inline float to_float(bf16 x) { return __bfloat162float(x); }

// As there is no instruction below sm_89: the code's bits are moved to those of a float, and the
// bias is made up for by a product, which is exact and normalizes subnormal numbers. The code of
// NaN is not looked for: what is not finite has NaN for its scale.
__device__ inline float to_float(fp8 x) {
  return __uint_as_float((x.code & 0x7f) << 20 | (x.code & 0x80) << 24) * 0x1p120f;
}

__device__ inline void assign(float& to, float x) { to = x; }
__device__ inline void assign(fp16& to, float x) { to = __float2half(x); }
__device__ inline void assign(bf16& to, float x) { to = __float2bfloat16(x); }

// Eight codes as numbers of T, times 2^-8: then fp16 needs no product. Exact, and as to_float() in
// all else.
template <class T>
__device__ inline uint4 widen(uint2 codes) {
  constexpr int kShift = std::is_same_v<T, bf16> ? 4 : 1;  // to where T has its exponent
  const auto pair = [](unsigned four, unsigned selector) {
    const unsigned high = __byte_perm(four, 0, selector);  // each code is the high byte of its half
    unsigned numbers = (high & 0x80008000) | (high & 0x7f007f00) >> kShift;
    if constexpr (std::is_same_v<T, bf16>) {
      // By 2^112, which leaves 2^-8 of what the bias takes. mul is for sm_90 and later.
      asm("fma.rn.bf16x2 %0, %0, %1, %2;" : "+r"(numbers) : "r"(0x77807780), "r"(0));
    }
    return numbers;
  };
  return make_uint4(pair(codes.x, 0x1404), pair(codes.x, 0x3424), pair(codes.y, 0x1404),
                    pair(codes.y, 0x3424));
}

// To nearest, ties to even; what is too large becomes the largest number.
__device__ inline void assign(fp8& to, float x) {
  constexpr float kSmallestNormal = 0x1p-6f;
  constexpr float kRounder = 0x1p14f;  // whose last place is the smallest subnormal number, 2^-9
  const unsigned bits = __float_as_uint(fabsf(x));
  unsigned code;
  if (fabsf(x) < kSmallestNormal) {
    code = __float_as_uint(fabsf(x) + kRounder) - __float_as_uint(kRounder);
  } else {
    code = min(((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - (120 << 3), 0x7eu);
  }
  if (isnan(x)) code = 0x7f;
  to.code = static_cast<uint8_t>(code | (__float_as_uint(x) >> 24 & 0x80));
}

// The least power of two that brings numbers up to `largest` into the range of fp8; NaN if that is
// not finite. A power, because a product with it is exact: of a probability, before it is rounded.
__device__ inline float scale_of_fp8(float largest) {
  const float least = largest / kMaxFp8;
  if (!isfinite(least)) return NAN;
  if (least == 0) return 1;
  return __uint_as_float((__float_as_uint(least) + 0x7fffff) & 0x7f800000);
}

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
