// Reductions over the lanes of a warp; every lane gets the result.
#pragma once

namespace transmla {

constexpr unsigned kAllLanes = 0xffffffff;

template <class T>
__device__ inline T warp_sum(T x) {
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kAllLanes, x, lanes);
  return x;
}

__device__ inline float warp_max(float x) {
  for (int lanes = 16; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, lanes));
  return x;
}

}  // namespace transmla
