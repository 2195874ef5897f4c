// acc += Xᵀ diag(weight) X, a tile of the lower triangle and its mirror image a block. A block
// walks through all tokens in order, so the sums are the same in every run.
#pragma once

#include "cuda/common/mma.cuh"
#include "cuda/common/pack.cuh"
#include "cuda/common/shared_memory.cuh"
#include "transmla/covariance_add.h"

namespace transmla {
namespace {

constexpr int kThreads = 256;
constexpr int kWarpSize = 32;

struct Tile {
  index_t group;
  int row, col;  // of its first number
};

__device__ Tile tile_of_block(index_t dim, int size) {
  const auto num_tiles = static_cast<unsigned>((dim + size - 1) / size);
  const unsigned tiles_per_group = num_tiles * (num_tiles + 1) / 2;
  unsigned row = 0;
  unsigned col = blockIdx.x % tiles_per_group;
  while (col > row) col -= ++row;
  return {blockIdx.x / tiles_per_group, static_cast<int>(row) * size, static_cast<int>(col) * size};
}

// acc[row, col] and acc[row, col + 1], col even: += what of them lies in the lower triangle, and
// the same above it.
__device__ __forceinline__ void add_pair(double* acc, int dim, int row, int col, double first,
                                         double second) {
  if (row >= dim || col > row) return;
  double* below = acc + static_cast<index_t>(row) * dim + col;
  double* above = acc + static_cast<index_t>(col) * dim + row;
  if (col < row && reinterpret_cast<uintptr_t>(below) % sizeof(double2) == 0) {
    auto* pair = reinterpret_cast<double2*>(below);
    *pair = make_double2(pair->x + first, pair->y + second);
  } else {
    below[0] += first;
    if (col < row) below[1] += second;
  }
  if (col < row) above[0] += first;
  if (col + 1 < row) above[dim] += second;
}

constexpr int kTile = 128;
constexpr int kStageTokens = 64;
constexpr int kStages = 3;
constexpr int kRowBytes = 128;  // of a token in a half tile
constexpr int kHalfBytes = kStageTokens * kRowBytes;
constexpr int kOperandBytes = 2 * kHalfBytes;   // both halves of a tile
constexpr int kStageBytes = 2 * kOperandBytes;  // rows, then columns
constexpr int kTensorCoreSmem = kStages * kStageBytes;
// Rounding in fp32 costs a unit of 2^-24 for each 16 tokens: 16 units, then the sum goes to fp64.
constexpr int kFoldTokens = 256;
// Of a warp: 4 x 4 instructions of 16 x 8.
constexpr int kWarpRows = 64, kWarpCols = 32;

// One block adds a tile of kTile x kTile: 16-bit numbers without weights, on tensor cores.
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    covariance_add_kernel(const __grid_constant__ CovarianceAddParams p) {
  extern __shared__ __align__(1024) uint8_t smem[];
  const Tile tile = tile_of_block(p.dim, kTile);
  const int dim = static_cast<int>(p.dim);
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const int warp_row = warp % 2 * kWarpRows;
  const int warp_col = warp / 2 * kWarpCols;
  const bool diagonal = tile.row == tile.col;
  const T* x = static_cast<const T*>(p.x) + tile.group * p.x_stride_group;
  const int num_tokens = static_cast<int>(p.num_tokens);
  const uint32_t stages = shared_address(smem);

  const auto load_stage = [&](int token, int stage) {
    // 16 chunks are a token's tile; a diagonal tile is its own columns.
    for (int operand = 0; operand < (diagonal ? 1 : 2); ++operand) {
      const int first = operand == 0 ? tile.row : tile.col;
      const uint32_t to = stages + stage * kStageBytes + operand * kOperandBytes;
#pragma unroll
      for (int i = 0; i < kStageTokens * 16 / kThreads; ++i) {
        const int row = i * (kThreads / 16) + threadIdx.x / 16;
        const int chunk = threadIdx.x % 16;
        const bool valid = token + row < num_tokens && first + chunk * 8 < dim;
        copy_async(to + chunk / 8 * kHalfBytes + swizzle<kRowBytes>(row, chunk % 8),
                   x + (valid ? (token + row) * p.x_stride_token + first + chunk * 8 : 0), valid);
      }
    }
  };

  double state[4][4][4] = {};
  float sums[4][4][4] = {};
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (stage * kStageTokens < num_tokens) load_stage(stage * kStageTokens, stage);
    commit_copies();
  }
  int stage = 0;
#pragma unroll 1
  for (int token = 0; token < num_tokens; token += kStageTokens) {
    wait_for_copies<kStages - 2>();
    __syncthreads();
    const int ahead = token + (kStages - 1) * kStageTokens;
    if (ahead < num_tokens) load_stage(ahead, stage == 0 ? kStages - 1 : stage - 1);
    commit_copies();

    const uint32_t rows = stages + stage * kStageBytes + warp_row / 64 * kHalfBytes;
    const uint32_t cols =
        stages + stage * kStageBytes + (diagonal ? 0 : kOperandBytes) + warp_col / 64 * kHalfBytes;
#pragma unroll
    for (int k = 0; k < kStageTokens / 16; ++k) {
      uint32_t b[2][4];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        load_matrices_transposed(
            b[n],
            cols + swizzle<kRowBytes>(k * 16 + lane % 16, warp_col % 64 / 8 + n * 2 + lane / 16));
      }
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        uint32_t a[4];
        load_matrices_transposed(
            a, rows + swizzle<kRowBytes>(k * 16 + lane % 8 + lane / 16 * 8, m * 2 + lane / 8 % 2));
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          multiply_add<T>(sums[m][n], a, b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
        }
      }
    }
    if ((token + kStageTokens) % kFoldTokens == 0 || token + kStageTokens >= num_tokens) {
#pragma unroll
      for (int m = 0; m < 4; ++m) {
#pragma unroll
        for (int n = 0; n < 4; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            state[m][n][i] += static_cast<double>(sums[m][n][i]);
            sums[m][n][i] = 0;
          }
        }
      }
    }
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }

  double* acc = p.acc + tile.group * p.dim * p.dim;
#pragma unroll
  for (int m = 0; m < 4; ++m) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        add_pair(acc, dim, tile.row + warp_row + m * 16 + half * 8 + lane / 4,
                 tile.col + warp_col + n * 8 + lane % 4 * 2, state[m][n][2 * half],
                 state[m][n][2 * half + 1]);
      }
    }
  }
}

constexpr int kPlainTile = 64;
constexpr int kPerThread = 4;  // rows, and columns
// Rounding costs at most kChain + kBlock / kChain units of 2^-24, as on the CPU.
constexpr int kChain = 32;
constexpr int kBlock = 128;

// One block adds a tile of kPlainTile x kPlainTile: fp32, weights, and rows that are not made of
// whole chunks.
template <class T>
__global__ void __launch_bounds__(kThreads)
    covariance_add_plain_kernel(const __grid_constant__ CovarianceAddParams p) {
  __shared__ alignas(16) float weighted[kChain][kPlainTile];
  __shared__ alignas(16) float plain[kChain][kPlainTile];
  const Tile tile = tile_of_block(p.dim, kPlainTile);
  const int dim = static_cast<int>(p.dim);
  const int row = threadIdx.x / (kPlainTile / kPerThread) * kPerThread;
  const int col = threadIdx.x % (kPlainTile / kPerThread) * kPerThread;
  const T* x = static_cast<const T*>(p.x) + tile.group * p.x_stride_group;

  double state[kPerThread][kPerThread] = {};
  float sums[kPerThread][kPerThread] = {};
  for (index_t first = 0; first < p.num_tokens; first += kChain) {
    for (int i = threadIdx.x; i < kChain * kPlainTile; i += kThreads) {
      const int t = i / kPlainTile, j = i % kPlainTile;
      const index_t token = first + t;
      const T* numbers = x + token * p.x_stride_token;
      const bool live = token < p.num_tokens;
      const float weight = live && p.weight ? p.weight[token] : 1;
      weighted[t][j] = live && tile.row + j < dim ? weight * to_float(numbers[tile.row + j]) : 0;
      plain[t][j] = live && tile.col + j < dim ? to_float(numbers[tile.col + j]) : 0;
    }
    __syncthreads();
    float chain[kPerThread][kPerThread] = {};
#pragma unroll 8
    for (int t = 0; t < kChain; ++t) {
      float a[kPerThread], b[kPerThread];
      load(a, &weighted[t][row]);
      load(b, &plain[t][col]);
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
#pragma unroll
        for (int j = 0; j < kPerThread; ++j) chain[i][j] += a[i] * b[j];
      }
    }
    __syncthreads();
    const bool fold = (first + kChain) % kBlock == 0 || first + kChain >= p.num_tokens;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
#pragma unroll
      for (int j = 0; j < kPerThread; ++j) {
        sums[i][j] += chain[i][j];
        if (fold) {
          state[i][j] += static_cast<double>(sums[i][j]);
          sums[i][j] = 0;
        }
      }
    }
  }
  double* acc = p.acc + tile.group * p.dim * p.dim;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    add_pair(acc, dim, tile.row + row + i, tile.col + col, state[i][0], state[i][1]);
    add_pair(acc, dim, tile.row + row + i, tile.col + col + 2, state[i][2], state[i][3]);
  }
}

}  // namespace
}  // namespace transmla
