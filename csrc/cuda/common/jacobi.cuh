// One-sided Jacobi in fp64: a block turns the columns of a matrix until they are orthogonal.
#pragma once

#include <cfloat>

#include "cuda/common/warp.cuh"
#include "transmla/types.h"

namespace transmla {
namespace {

constexpr int kJacobiThreads = 512;
constexpr int kJacobiWarps = kJacobiThreads / 32;
constexpr int kMaxColumns = 256;
// A squared length below this is zero: matrices are scaled to a largest entry near 1, and products
// of two such lengths are still normal numbers.
constexpr double kNothing = 1e-140;

struct Columns {
  double* data;  // [count, length] in global memory, one column a row
  int count, length;
  int product_length;  // numbers that count in products; the others are only turned along
};

__device__ inline double* column(const Columns& c, int i) {
  return c.data + static_cast<index_t>(i) * c.length;
}

// The largest of all threads' numbers, NaN if one is; for all of them. Between two calls there has
// to be a barrier.
__device__ inline double block_max(double x) {
  __shared__ double of_warps[kJacobiWarps];
  const auto larger = [](double a, double b) { return isnan(a) || a > b ? a : b; };
  for (int lanes = 16; lanes > 0; lanes /= 2) x = larger(x, __shfl_xor_sync(kAllLanes, x, lanes));
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = x;
  __syncthreads();
  x = of_warps[0];
  for (int warp = 1; warp < kJacobiWarps; ++warp) x = larger(x, of_warps[warp]);
  return x;
}

// Power of two that brings `top` near 1: then squares neither overflow nor vanish.
__device__ inline double balance(double top) {
  int exponent = 0;
  frexp(top, &exponent);
  return ldexp(1.0, exponent < -1000 ? 1000 : -exponent);
}

// A warp turns two columns in their plane until they are orthogonal; false if they were.
__device__ inline bool turn(double* x, double* y, int length, int product_length) {
  const int lane = threadIdx.x % 32;
  double xx = 0, yy = 0, xy = 0;
  for (int i = lane; i < product_length; i += 32) {
    xx += x[i] * x[i];
    yy += y[i] * y[i];
    xy += x[i] * y[i];
  }
  xx = warp_sum(xx);
  yy = warp_sum(yy);
  xy = warp_sum(xy);
  const double tolerance = DBL_EPSILON * DBL_EPSILON * product_length;  // of squares
  if (xx < kNothing || yy < kNothing || xy * xy <= tolerance * xx * yy) return false;
  const double cotangent = (yy - xx) / (2 * xy);  // of the double angle
  const double tangent =
      copysign(1.0, cotangent) / (fabs(cotangent) + sqrt(1 + cotangent * cotangent));
  const double cosine = 1 / sqrt(1 + tangent * tangent);
  const double sine = tangent * cosine;
  for (int i = lane; i < length; i += 32) {
    const double old = x[i];
    x[i] = cosine * old - sine * y[i];
    y[i] = sine * old + cosine * y[i];
  }
  return true;
}

// Sweeps over all pairs of columns; two groups of `group` columns are in shared memory at a time,
// whose pairs the warps share out as rounds of a tournament. Columns never change places: moved
// between rounds, some would never meet.
__device__ inline void orthogonalize(const Columns& c, int group, double* smem) {
  constexpr int kMaxSweeps = 40;  // about ten are usual
  const int warp = threadIdx.x / 32;
  const int num_groups = max(2, (c.count + group - 1) / group);
  const auto place = [&](int member, int first, int second) {
    return member < group ? first * group + member : (second - 1) * group + member;
  };
  const auto move = [&](int first, int second, auto copy) {
    for (int member = warp; member < 2 * group; member += kJacobiWarps) {
      const int at = place(member, first, second);
      for (int i = threadIdx.x % 32; at < c.count && i < c.length; i += 32) {
        copy(smem[member * c.length + i], column(c, at)[i]);
      }
    }
    __syncthreads();
  };
  for (int sweep = 0; sweep < kMaxSweeps; ++sweep) {
    bool turned = false;
    for (int first = 0; first + 1 < num_groups; ++first) {
      for (int second = first + 1; second < num_groups; ++second) {
        move(first, second, [](double& shared, double& global) { shared = global; });
        const int others = 2 * group - 1;
        for (int round = 0; round < others; ++round) {
          // Member 0 stays, the others go round it.
          const auto member = [&](int seat) {
            return seat == 0 ? 0 : 1 + (seat - 1 + round) % others;
          };
          for (int seat = warp; seat < group; seat += kJacobiWarps) {
            const int x = member(seat), y = member(others - seat);
            if (max(place(x, first, second), place(y, first, second)) < c.count) {
              turned |= turn(smem + x * c.length, smem + y * c.length, c.length, c.product_length);
            }
          }
          __syncthreads();
        }
        move(first, second, [](double& shared, double& global) { global = shared; });
      }
    }
    if (!__syncthreads_or(turned)) break;
  }
}

// Squared length of a column, by a warp.
__device__ inline double squared_length(const Columns& c, int i) {
  double squares = 0;
  for (int k = threadIdx.x % 32; k < c.product_length; k += 32) {
    squares += column(c, i)[k] * column(c, i)[k];
  }
  return warp_sum(squares);
}

// Place of keys[i] in descending order; equal keys keep theirs.
__device__ inline int rank_of(const double* keys, int i, int count) {
  int rank = 0;
  for (int k = 0; k < count; ++k) rank += keys[k] > keys[i] || (keys[k] == keys[i] && k < i);
  return rank;
}

// Columns that fit into the current device's shared memory twice; at most half of all.
inline int columns_per_group(index_t count, index_t length) {
  constexpr int kStaticShared = 8 << 10;
  int ordinal = 0, bytes = 0;
  cudaGetDevice(&ordinal);
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, ordinal);
  const index_t fitting = (bytes - kStaticShared) / (2 * sizeof(double) * length);
  return static_cast<int>(fitting < (count + 1) / 2 ? fitting : (count + 1) / 2);
}

template <class Params>
cudaError_t launch_jacobi(void (*kernel)(Params, int), const Params& params, index_t count,
                          index_t length, void* stream) {
  const int group = columns_per_group(count, length);
  const size_t smem = 2 * sizeof(double) * group * length;
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(smem));
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(params.num_matrices), kJacobiThreads, smem,
           static_cast<cudaStream_t>(stream)>>>(params, group);
  return cudaGetLastError();
}

}  // namespace
}  // namespace transmla
