// Numbers of a tensor that one instruction moves.
#pragma once

#include "cuda/common/dtype.cuh"

namespace transmla {

template <class T, int kSize>
struct alignas(kSize * sizeof(T)) Pack {
  T values[kSize];
};

template <class T, int kSize>
__device__ __forceinline__ void load(float (&to)[kSize], const T* from) {
  const auto pack = *reinterpret_cast<const Pack<T, kSize>*>(from);
#pragma unroll
  for (int i = 0; i < kSize; ++i) to[i] = to_float(pack.values[i]);
}

template <class T, int kSize>
__device__ __forceinline__ void store(T* to, const float (&from)[kSize]) {
  if constexpr (sizeof(T) == 2 && kSize == 8) {
    // The intrinsic, because nvcc takes assignments of 16 bytes apart.
    __stwb(reinterpret_cast<uint4*>(to),
           make_uint4(pack<T>(from[0], from[1]), pack<T>(from[2], from[3]),
                      pack<T>(from[4], from[5]), pack<T>(from[6], from[7])));
  } else {
    Pack<T, kSize> numbers;
#pragma unroll
    for (int i = 0; i < kSize; ++i) assign(numbers.values[i], from[i]);
    *reinterpret_cast<Pack<T, kSize>*>(to) = numbers;
  }
}

}  // namespace transmla
