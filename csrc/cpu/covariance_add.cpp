#include "vec.h"

namespace transmla::TRANSMLA_ISA {
namespace {

// One micro-tile of kRows * kMaxVecs accumulators fills the registers; both sides divide kPanel.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRows = 8, kMaxVecs = 3;
#else
constexpr int kRows = 6, kMaxVecs = 2;
#endif
constexpr index_t kCols = kMaxVecs * kVecSize;
constexpr index_t kPanel = 48;
// A worker's share: so many panels of rows and of columns stay in the L2 cache.
constexpr index_t kTilePanels = 3;
// Products are summed in fp32 over kChain tokens, these sums over kBlock tokens, the rest in fp64:
// rounding then costs at most kChain + kBlock / kChain units of 2^-24, whatever the data.
constexpr index_t kChain = 32;
constexpr index_t kBlock = 512;
// Of tokens that a worker packs at once: their rows of x stay in the L1 cache.
constexpr index_t kPackTokens = 8;
static_assert(kPanel % kRows == 0 && kPanel % kCols == 0, "no partial micro-tiles");

// A block of tokens in fp32: [num_groups, num_panels, tokens of the block, kPanel].
struct Block {
  index_t num_panels, num_tokens;
  float* x;
  float* weighted;  // x itself without weights

  index_t panel_size() const { return kPanel * num_tokens; }
  index_t at(index_t group, index_t panel) const {
    return (group * num_panels + panel) * panel_size();
  }
};

// Of the largest block; the last one may have fewer tokens.
index_t block_size(const CovarianceAddParams& p) {
  return p.num_groups * ceil_div(p.dim, kPanel) * kPanel * min(p.num_tokens, kBlock);
}

size_t block_bytes(const CovarianceAddParams& p) {
  return (p.weight ? 2 : 1) * block_size(p) * sizeof(float);
}

template <class T>
void pack(const CovarianceAddParams& p, const Block& block, index_t token, index_t group,
          index_t begin, index_t end) {
  const T* x = static_cast<const T*>(p.x) + token * p.x_stride_token + group * p.x_stride_group;
  for (index_t panel = 0; panel < block.num_panels; ++panel) {
    const index_t at = block.at(group, panel);
    for (index_t t = begin; t < end; ++t) {
      const T* row = x + t * p.x_stride_token;
      for (index_t i = 0; i < kPanel; i += kVecSize) {
        const index_t size = p.dim - panel * kPanel - i;
        const Vec v = size > 0 ? load_up_to(row + panel * kPanel + i, size) : Vec{};
        const index_t to = at + t * kPanel + i;
        store(block.x + to, v);
        if (p.weight) store(block.weighted + to, v * p.weight[token + t]);
      }
    }
  }
}

// sums += rowsᵀ cols, for kRows rows and kVecs vectors of columns.
template <int kVecs>
void accumulate(const float* rows, const float* cols, index_t num_tokens, float* sums) {
  Vec chain[kRows][kVecs] = {};
  for (index_t t = 0; t < num_tokens; ++t) {
    Vec col[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) col[v] = load(cols + t * kPanel + v * kVecSize);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec row = broadcast(rows[t * kPanel + r]);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) chain[r][v] = fma(row, col[v], chain[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      float* sum = sums + r * kPanel + v * kVecSize;
      store(sum, load(sum) + chain[r][v]);
    }
  }
}

// The rows of one panel with the columns of another, in the lower triangle, and their mirror image
// in the end. Tokens come in order: the sums do not depend on the number of threads.
void add_panel(const CovarianceAddParams& p, const Block& block, index_t group, index_t row_panel,
               index_t col_panel, bool is_last) {
  const float* rows = block.weighted + block.at(group, row_panel);
  const float* cols = block.x + block.at(group, col_panel);
  const index_t row = row_panel * kPanel;
  const index_t col = col_panel * kPanel;
  const index_t num_rows = min(kPanel, p.dim - row);
  const index_t num_cols = min(kPanel, p.dim - col);
  double* acc = p.acc + group * p.dim * p.dim;
  alignas(64) float sums[kPanel * kPanel] = {};
  for (index_t token = 0; token < block.num_tokens; token += kChain) {
    const index_t num_tokens = min(kChain, block.num_tokens - token);
    // Brings the state into the cache while the products are summed: rows in step with the tokens.
    const index_t next_row = num_rows * (token + num_tokens) / block.num_tokens;
    for (index_t i = num_rows * token / block.num_tokens; i < next_row; ++i) {
      for (index_t j = 0; j < num_cols; j += 64 / sizeof(double)) {
        __builtin_prefetch(acc + (row + i) * p.dim + col + j, 1);
      }
    }
    for (index_t j = 0; j < num_cols; j += kCols) {
      for (index_t i = 0; i < num_rows; i += kRows) {
        const index_t size = min(num_cols - j, row + i + kRows - col - j);  // up to the diagonal
        if (size <= 0) continue;
        const auto add = size > (kMaxVecs - 1) * kVecSize ? accumulate<kMaxVecs>
                         : size > kVecSize                ? accumulate<kMaxVecs - 1>
                                                          : accumulate<1>;
        add(rows + token * kPanel + i, cols + token * kPanel + j, num_tokens,
            sums + i * kPanel + j);
      }
    }
  }
  for (index_t i = 0; i < num_rows; ++i) {
    const index_t size = min(num_cols, row + i + 1 - col);
    double* to = acc + (row + i) * p.dim + col;
    for (index_t j = 0; j < size; ++j) to[j] += sums[i * kPanel + j];
  }
  if (!is_last) return;
  for (index_t j = 0; j < num_cols; ++j) {
    double* to = acc + (col + j) * p.dim + row;
    for (index_t i = max(0, col + j - row); i < num_rows; ++i)
      to[i] = acc[(row + i) * p.dim + col + j];
  }
}

template <class T>
void add(const CovarianceAddParams& p, const ParallelFor& parallel_for) {
  const index_t num_panels = ceil_div(p.dim, kPanel);
  const index_t num_tiles = ceil_div(num_panels, kTilePanels);
  const index_t tiles_per_group = num_tiles * (num_tiles + 1) / 2;
  float* x = static_cast<float*>(p.workspace);
  float* weighted = p.weight ? x + block_size(p) : x;
  for (index_t token = 0; token < p.num_tokens; token += kBlock) {
    const Block block = {num_panels, min(kBlock, p.num_tokens - token), x, weighted};
    const index_t num_packs = ceil_div(block.num_tokens, kPackTokens);
    run_items(parallel_for, p.num_groups * num_packs, [&](index_t item, index_t) {
      const index_t begin = item % num_packs * kPackTokens;
      pack<T>(p, block, token, item / num_packs, begin, min(begin + kPackTokens, block.num_tokens));
    });
    const bool is_last = token + kBlock >= p.num_tokens;
    run_items(parallel_for, p.num_groups * tiles_per_group, [&](index_t item, index_t) {
      index_t row = 0;
      index_t col = item % tiles_per_group;
      while (col > row) col -= ++row;
      for (index_t i = row * kTilePanels; i < min((row + 1) * kTilePanels, num_panels); ++i) {
        for (index_t j = col * kTilePanels; j < min((col + 1) * kTilePanels, i + 1); ++j) {
          add_panel(p, block, item / tiles_per_group, i, j, is_last);
        }
      }
    });
  }
}

// With so many groups for each worker it takes them whole, and what it packs stays in its cache.
bool takes_whole_groups(const CovarianceAddParams& p, int num_threads) {
  return p.num_groups >= 4 * num_threads;
}

CovarianceAddParams one_group(CovarianceAddParams p) {
  p.num_groups = 1;
  return p;
}

}  // namespace

size_t covariance_add_cpu_workspace_size(const CovarianceAddParams& p, int num_threads) {
  return takes_whole_groups(p, num_threads) ? num_threads * block_bytes(one_group(p))
                                            : block_bytes(p);
}

void covariance_add_cpu(const CovarianceAddParams& p, const ParallelFor& parallel_for) {
  with_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (!takes_whole_groups(p, parallel_for.num_threads)) return add<T>(p, parallel_for);
    run_items(parallel_for, p.num_groups, [&](index_t group, index_t worker) {
      CovarianceAddParams only = one_group(p);
      only.x = static_cast<const T*>(p.x) + group * p.x_stride_group;
      only.acc = p.acc + group * p.dim * p.dim;
      only.workspace = static_cast<char*>(p.workspace) + worker * block_bytes(only);
      add<T>(only, serial());
    });
  });
}

}  // namespace transmla::TRANSMLA_ISA
