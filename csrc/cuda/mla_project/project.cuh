// What follows the projection GEMMs, in one launch: blocks that absorb W_UK into the queries, then
// blocks that rotate the queries, then blocks that append to the cache.
#pragma once

#include "cuda/common/mma.cuh"
#include "cuda/common/pack.cuh"
#include "cuda/common/shared_memory.cuh"
#include "cuda/common/warp.cuh"
#include "transmla/mla_project.h"

namespace transmla {
namespace {

constexpr int kWarpSize = 32;
constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kColumns = 128;  // of the latent, a block's share; a warp has a quarter of it
constexpr int kDepth = 128;    // rows of W_UK in shared memory at a time; most heads have no more
constexpr int kChunk = 8;      // 16-bit numbers that one instruction moves

// Ranges of blocks; a block of a kernel below belongs to one of them.
struct ProjectGrid {
  unsigned absorb, rotate, append;
};

// A warp normalizes one row; write(i, numbers) takes what belongs from i on, and may write it over
// x. Rounds to T before the weight, as the models were trained.
template <class T, int kSize, class Write>
__device__ void normalize(const T* x, const T* weight, index_t n, float eps, const Write& write) {
  const index_t first = threadIdx.x % kWarpSize * kSize;
  float squares = 0;
  float numbers[kSize];
  for (index_t i = first; i < n; i += kWarpSize * kSize) {
    load(numbers, x + i);
#pragma unroll
    for (int k = 0; k < kSize; ++k) squares += numbers[k] * numbers[k];
  }
  const float scale = 1 / sqrtf(warp_sum(squares) / n + eps);
  for (index_t i = first; i < n; i += kWarpSize * kSize) {
    float weights[kSize];
    load(numbers, x + i);
    load(weights, weight + i);
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      T rounded;
      assign(rounded, numbers[k] * scale);
      numbers[k] = to_float(rounded) * weights[k];
    }
    write(i, numbers);
  }
}

// Turns kSize / 2 pairs (even, odd) into (even cos - odd sin, odd cos + even sin); one pair, whose
// numbers need no alignment, if kSize is 1. cos_sin holds the cosines of dim / 2 pairs, then their
// sines.
template <class T, int kSize, class Write>
__device__ __forceinline__ void rotate(const T* x, const float* cos_sin, index_t pair, index_t dim,
                                       const Write& write) {
  if constexpr (kSize == 1) {
    const float even = to_float(x[2 * pair]), odd = to_float(x[2 * pair + 1]);
    const float cosine = cos_sin[pair], sine = cos_sin[dim / 2 + pair];
    const float first[] = {even * cosine - odd * sine}, second[] = {odd * cosine + even * sine};
    write(2 * pair, first);
    write(2 * pair + 1, second);
  } else {
    float numbers[kSize], cosines[kSize / 2], sines[kSize / 2];
    load(numbers, x + 2 * pair);
    load(cosines, cos_sin + pair);
    load(sines, cos_sin + dim / 2 + pair);
#pragma unroll
    for (int k = 0; k < kSize / 2; ++k) {
      const float even = numbers[2 * k], odd = numbers[2 * k + 1];
      numbers[2 * k] = even * cosines[k] - odd * sines[k];
      numbers[2 * k + 1] = odd * cosines[k] + even * sines[k];
    }
    write(2 * pair, numbers);
  }
}

template <class T, int kSize>
constexpr int kPairs = kSize == 1 ? 1 : kSize / 2;

// A thread rotates kPairs pairs of one query.
template <class T, int kSize>
__device__ void rotate_queries(const MlaProjectParams& p, index_t thread) {
  const index_t steps = p.qk_rope_head_dim / 2 / kPairs<T, kSize>;
  const index_t row = thread / steps;  // token and head
  if (row >= p.num_tokens * p.num_heads) return;
  const T* q_proj = static_cast<const T*>(p.q_proj) +
                    row * (p.qk_nope_head_dim + p.qk_rope_head_dim) + p.qk_nope_head_dim;
  T* q = static_cast<T*>(p.q) + row * (p.kv_lora_rank + p.qk_rope_head_dim) + p.kv_lora_rank;
  const float* cos_sin = p.cos_sin + p.positions[row / p.num_heads] * p.qk_rope_head_dim;
  rotate<T, kSize>(q_proj, cos_sin, thread % steps * kPairs<T, kSize>, p.qk_rope_head_dim,
                   [&](index_t i, const auto& numbers) { store(q + i, numbers); });
}

// A warp makes what the cache is to hold of a token; write(i, numbers) takes it from column i on.
template <class T, int kSize, class Write>
__device__ void make_row(const MlaProjectParams& p, index_t token, const Write& write) {
  const index_t lane = threadIdx.x % kWarpSize;
  const index_t rank = p.kv_lora_rank;
  const T* latent = static_cast<const T*>(p.kv_a_proj) + token * (rank + p.qk_rope_head_dim);
  if (p.kv_norm) {
    normalize<T, kSize>(latent, static_cast<const T*>(p.kv_norm), rank, p.norm_eps, write);
  } else {
    for (index_t i = lane * kSize; i < rank; i += kWarpSize * kSize) {
      float numbers[kSize];
      load(numbers, latent + i);
      write(i, numbers);
    }
  }
  const float* cos_sin = p.cos_sin + p.positions[token] * p.qk_rope_head_dim;
  for (index_t pair = lane * kPairs<T, kSize>; pair < p.qk_rope_head_dim / 2;
       pair += kWarpSize * kPairs<T, kSize>) {
    rotate<T, kSize>(latent + rank, cos_sin, pair, p.qk_rope_head_dim,
                     [&](index_t i, const auto& numbers) { write(rank + i, numbers); });
  }
}

// A warp appends one token.
template <class T, int kSize>
__device__ void append(const MlaProjectParams& p, index_t token) {
  if (token >= p.num_tokens) return;
  const index_t slot = p.slot_mapping[token];
  if (slot < 0) return;
  const index_t block = slot / p.block_size, offset = slot % p.block_size;
  const index_t first = block * p.cache_stride_block + offset * p.cache_stride_token;
  if (p.cache_scales == nullptr) {
    T* cached = static_cast<T*>(p.latent_cache) + first;
    make_row<T, kSize>(p, token,
                       [&](index_t i, const auto& numbers) { store(cached + i, numbers); });
    return;
  }
  // Made twice: how many numbers a lane would have to keep is known to the caller alone.
  unsigned largest = 0;  // of the bits: nothing is larger than those of NaN
  make_row<T, kSize>(p, token, [&](index_t, const auto& numbers) {
    for (float number : numbers) largest = max(largest, __float_as_uint(fabsf(number)));
  });
  const float scale = scale_of_fp8(__uint_as_float(__reduce_max_sync(kAllLanes, largest)));
  const float inverse = 1 / scale;
  fp8* cached = static_cast<fp8*>(p.latent_cache) + first;
  make_row<T, kSize>(p, token, [&](index_t i, const auto& numbers) {
    float scaled[sizeof(numbers) / sizeof(float)];
    for (int k = 0; k < sizeof(numbers) / sizeof(float); ++k) scaled[k] = numbers[k] * inverse;
    store(cached + i, scaled);
  });
  if (threadIdx.x % kWarpSize == 0) p.cache_scales[block * p.scales_stride_block + offset] = scale;
}

template <class T, int kSize>
__device__ void rotate_or_append(const MlaProjectParams& p, const ProjectGrid& grid) {
  index_t block = blockIdx.x - grid.absorb;
  if (block < grid.rotate) {
    rotate_queries<T, kSize>(p, block * kThreads + threadIdx.x);
  } else {
    append<T, kSize>(p, (block - grid.rotate) * kWarps + threadIdx.x / kWarpSize);
  }
}

// Lane 4 g + i gives pairs i of four 8-column tiles and gets the four pairs of tile i.
__device__ __forceinline__ void transpose_quad(uint32_t (&pairs)[4]) {
  const int lane = threadIdx.x % 4;
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool high = lane & bit;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      const uint32_t got = __shfl_xor_sync(kAllLanes, high ? pairs[i] : pairs[i + bit], bit);
      (high ? pairs[i] : pairs[i + bit]) = got;
    }
  }
}

// An absorbing block computes kColumns columns of q_nope W_UK of one head, for all tokens of its
// part, kTokens at a time; W_UK of a usual head stays in shared memory.
template <class T, int kTokens>
__global__ void __launch_bounds__(kThreads)
    mla_project_kernel(const __grid_constant__ MlaProjectParams p,
                       const __grid_constant__ ProjectGrid grid, int tokens_per_block) {
  if (blockIdx.x >= grid.absorb) return rotate_or_append<T, kChunk>(p, grid);

  constexpr int kRowBytes = 128;
  constexpr int kRowChunks = kRowBytes / 16;
  constexpr int kHalves = kColumns / (kRowChunks * kChunk);
  __shared__ alignas(1024) uint8_t w_tile[kHalves][kDepth * kRowBytes];
  __shared__ alignas(1024) uint8_t q_tile[kHalves][kTokens * kRowBytes];

  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const int num_slices = (p.kv_lora_rank + kColumns - 1) / kColumns;
  const int slice = blockIdx.x % num_slices;
  const index_t head = blockIdx.x / num_slices % p.num_heads;
  const index_t part = blockIdx.x / num_slices / p.num_heads;
  const index_t end = min(p.num_tokens, (part + 1) * tokens_per_block);
  const index_t head_dim = p.qk_nope_head_dim + p.qk_rope_head_dim;
  const index_t cache_dim = p.kv_lora_rank + p.qk_rope_head_dim;
  const T* w_uk = static_cast<const T*>(p.w_uk) + head * p.w_uk_stride_head;
  const T* q_proj = static_cast<const T*>(p.q_proj) + head * head_dim;
  T* q = static_cast<T*>(p.q) + head * cache_dim;

  const auto load_w = [&](index_t depth) {
    for (int i = threadIdx.x; i < kDepth * kHalves * kRowChunks; i += kThreads) {
      const int chunk = i % (kHalves * kRowChunks), row = i / (kHalves * kRowChunks);
      const index_t column = slice * kColumns + chunk * kChunk;
      const bool valid = depth + row < p.qk_nope_head_dim && column < p.kv_lora_rank;
      copy_async(
          shared_address(w_tile[chunk / kRowChunks]) + swizzle<kRowBytes>(row, chunk % kRowChunks),
          w_uk + (valid ? (depth + row) * p.w_uk_stride_row + column : 0), valid);
    }
  };
  const auto load_q = [&](index_t token, index_t depth) {
    for (int i = threadIdx.x; i < kTokens * kHalves * kRowChunks; i += kThreads) {
      const int chunk = i % (kHalves * kRowChunks), row = i / (kHalves * kRowChunks);
      const index_t column = depth + chunk * kChunk;
      const bool valid = token + row < end && column < p.qk_nope_head_dim;
      copy_async(
          shared_address(q_tile[chunk / kRowChunks]) + swizzle<kRowBytes>(row, chunk % kRowChunks),
          q_proj + (valid ? (token + row) * p.num_heads * head_dim + column : 0), valid);
    }
  };

  const bool one_pass = p.qk_nope_head_dim <= kDepth;
  if (one_pass) load_w(0);
  for (index_t token = part * tokens_per_block; token < end; token += kTokens) {
    float sums[kTokens / 16][4][4] = {};
    for (index_t depth = 0; depth < p.qk_nope_head_dim; depth += kDepth) {
      if (!one_pass) load_w(depth);
      load_q(token, depth);
      commit_copies();
      wait_for_copies<0>();
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kDepth / 16; ++k) {
        if (depth + k * 16 >= p.qk_nope_head_dim) break;
        uint32_t w[2][4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int row = k * 16 + lane % 16;
          const int chunk = warp % 2 * 4 + i * 2 + lane / 16;
          load_matrices_transposed(
              w[i], shared_address(w_tile[warp / 2]) + swizzle<kRowBytes>(row, chunk));
        }
#pragma unroll
        for (int m = 0; m < kTokens / 16; ++m) {
          uint32_t rows[4];
          load_matrices(rows, shared_address(q_tile[k / 4]) +
                                  swizzle<kRowBytes>(m * 16 + lane % 16, k % 4 * 2 + lane / 16));
#pragma unroll
          for (int n = 0; n < 4; ++n) {
            multiply_add<T>(sums[m][n], rows, w[n / 2][n % 2 * 2], w[n / 2][n % 2 * 2 + 1]);
          }
        }
      }
      __syncthreads();
    }
    const index_t column = slice * kColumns + warp * kWarpSize + lane % 4 * kChunk;
#pragma unroll
    for (int m = 0; m < kTokens / 16; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t pairs[4];
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          pairs[n] = pack<T>(sums[m][n][2 * half], sums[m][n][2 * half + 1]);
        }
        transpose_quad(pairs);
        const index_t row = token + m * 16 + half * 8 + lane / 4;
        if (row < end && column < p.kv_lora_rank) {
          *reinterpret_cast<uint4*>(q + row * p.num_heads * cache_dim + column) =
              make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        }
      }
    }
  }
}

// fp32, and shapes whose rows are not made of whole chunks: an absorbing thread computes one column
// of kPlainTokens tokens.
constexpr int kPlainTokens = 8;

template <class T>
__global__ void __launch_bounds__(kThreads)
    mla_project_plain_kernel(const __grid_constant__ MlaProjectParams p,
                             const __grid_constant__ ProjectGrid grid) {
  if (blockIdx.x >= grid.absorb) return rotate_or_append<T, 1>(p, grid);

  const int num_slices = (p.kv_lora_rank + kColumns - 1) / kColumns;
  const index_t column = blockIdx.x % num_slices * kColumns + threadIdx.x;
  const index_t head = blockIdx.x / num_slices % p.num_heads;
  const index_t first = blockIdx.x / num_slices / p.num_heads * kPlainTokens;
  if (column >= p.kv_lora_rank) return;
  const index_t head_dim = p.qk_nope_head_dim + p.qk_rope_head_dim;
  const T* q_proj = static_cast<const T*>(p.q_proj) + head * head_dim;
  const T* w_uk = static_cast<const T*>(p.w_uk) + head * p.w_uk_stride_head + column;
  float sums[kPlainTokens] = {};
  for (index_t k = 0; k < p.qk_nope_head_dim; ++k) {
    const float w = to_float(w_uk[k * p.w_uk_stride_row]);
#pragma unroll
    for (int t = 0; t < kPlainTokens; ++t) {
      const index_t token = min(first + t, p.num_tokens - 1);
      sums[t] += to_float(q_proj[token * p.num_heads * head_dim + k]) * w;
    }
  }
  T* q = static_cast<T*>(p.q) + head * (p.kv_lora_rank + p.qk_rope_head_dim) + column;
#pragma unroll
  for (int t = 0; t < kPlainTokens; ++t) {
    if (first + t < p.num_tokens) {
      assign(q[(first + t) * p.num_heads * (p.kv_lora_rank + p.qk_rope_head_dim)], sums[t]);
    }
  }
}

// A warp normalizes one row.
template <class T, int kSize>
__global__ void __launch_bounds__(kThreads)
    rms_norm_kernel(const __grid_constant__ RmsNormParams p) {
  const index_t row = static_cast<index_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
  if (row >= p.num_rows) return;
  T* out = static_cast<T*>(p.out) + row * p.dim;
  normalize<T, kSize>(static_cast<const T*>(p.x) + row * p.dim, static_cast<const T*>(p.weight),
                      p.dim, p.eps,
                      [&](index_t i, const auto& numbers) { store(out + i, numbers); });
}

}  // namespace
}  // namespace transmla
