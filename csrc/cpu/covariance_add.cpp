#include "vec.h"

namespace transmla::TRANSMLA_ISA {
namespace {

// One micro-tile of kRows * kMaxVecs accumulators fills the registers; both sides divide kTile.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRows = 8, kMaxVecs = 3;
#else
constexpr int kRows = 6, kMaxVecs = 2;
#endif
constexpr index_t kTile = 96;
// Products are summed in fp32 over kChain tokens, these sums over kBlock tokens, the rest in fp64:
// rounding then costs at most kChain + kBlock / kChain units of 2^-24, whatever the data.
constexpr index_t kChain = 32;
constexpr index_t kBlock = 128;
static_assert(kTile % kRows == 0 && kTile % (kMaxVecs * kVecSize) == 0, "no partial micro-tiles");

struct Workspace {
  double state[kTile * kTile];
  float rows[kBlock * kTile];  // weighted
  float cols[kBlock * kTile];
};

// state += rowsᵀ cols, for kRows rows and kVecs vectors of columns.
template <int kVecs>
void accumulate(const float* rows, const float* cols, index_t num_tokens, double* state) {
  Vec total[kRows][kVecs] = {};
  for (index_t begin = 0; begin < num_tokens; begin += kChain) {
    Vec chain[kRows][kVecs] = {};
    const index_t end = min(begin + kChain, num_tokens);
    for (index_t t = begin; t < end; ++t) {
      Vec col[kVecs];
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) col[v] = load(cols + t * kTile + v * kVecSize);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Vec row = broadcast(rows[t * kTile + r]);
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) chain[r][v] = fma(row, col[v], chain[r][v]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) total[r][v] += chain[r][v];
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVecs; ++v) {
      double* sums = state + r * kTile + v * kVecSize;
      for (int lane = 0; lane < kVecSize; ++lane) sums[lane] += total[r][v][lane];
    }
  }
}

// fp32 copies of `size` numbers of each token, kTile apart.
template <class T>
void pack(const T* x, index_t stride, const float* weight, index_t num_tokens, index_t size,
          float* panel) {
  for (index_t t = 0; t < num_tokens; ++t, x += stride, panel += kTile) {
    const float factor = weight ? weight[t] : 1;
    for (index_t i = 0; i < size; i += kVecSize) {
      store_up_to(panel + i, load_up_to(x + i, size - i) * factor, size - i);
    }
  }
}

// One tile of one group, at (row, col) of the lower triangle, and its mirror image. A worker walks
// through all tokens in order: the sums do not depend on the number of threads.
template <class T>
void add_tile(const CovarianceAddParams& p, index_t group, index_t row, index_t col, Workspace* w) {
  const T* x = static_cast<const T*>(p.x) + group * p.x_stride_group;
  const index_t num_rows = min(kTile, p.dim - row);
  const index_t num_cols = min(kTile, p.dim - col);
  memset(w, 0, sizeof *w);
  for (index_t token = 0; token < p.num_tokens; token += kBlock) {
    const index_t num_tokens = min(kBlock, p.num_tokens - token);
    const T* block = x + token * p.x_stride_token;
    pack(block + row, p.x_stride_token, p.weight ? p.weight + token : nullptr, num_tokens, num_rows,
         w->rows);
    pack(block + col, p.x_stride_token, nullptr, num_tokens, num_cols, w->cols);
    for (index_t j = 0; j < num_cols; j += kMaxVecs * kVecSize) {
      const index_t num_vecs = min(kMaxVecs, ceil_div(num_cols - j, kVecSize));
      const auto add = num_vecs == kMaxVecs ? accumulate<kMaxVecs>
                       : num_vecs == 1      ? accumulate<1>
                                            : accumulate<kMaxVecs - 1>;
      for (index_t i = 0; i < num_rows; i += kRows) {
        if (row + i + kRows <= col + j) continue;  // above the diagonal
        add(w->rows + i, w->cols + j, num_tokens, w->state + i * kTile + j);
      }
    }
  }
  double* acc = p.acc + group * p.dim * p.dim;
  for (index_t i = row; i < row + num_rows; ++i) {
    for (index_t j = col; j < min(col + num_cols, i + 1); ++j) {
      const double sum = w->state[(i - row) * kTile + j - col];
      acc[i * p.dim + j] += sum;
      if (i != j) acc[j * p.dim + i] += sum;
    }
  }
}

}  // namespace

size_t covariance_add_cpu_workspace_size(const CovarianceAddParams&, int num_threads) {
  return num_threads * sizeof(Workspace);
}

void covariance_add_cpu(const CovarianceAddParams& p, const ParallelFor& parallel_for) {
  const index_t num_tiles = ceil_div(p.dim, kTile);
  const index_t tiles_per_group = num_tiles * (num_tiles + 1) / 2;
  with_dtype(p.dtype, [&](auto zero) {
    run_items(parallel_for, p.num_groups * tiles_per_group, [&](index_t item, index_t worker) {
      index_t row = 0;
      index_t col = item % tiles_per_group;
      while (col > row) col -= ++row;
      add_tile<decltype(zero)>(p, item / tiles_per_group, row * kTile, col * kTile,
                               static_cast<Workspace*>(p.workspace) + worker);
    });
  });
}

}  // namespace transmla::TRANSMLA_ISA
