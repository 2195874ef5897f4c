// One work item is a block of query rows against one part of one sequence. Scores are kept
// transposed, [token][row]: the softmax then runs along vectors of rows without a horizontal sum,
// and both products read one operand as vectors and the other as broadcasts. The tokens are widened
// to fp32 once, a few numbers of each at a time: the scores then find them in the L1 cache, the
// sums in L2. Meanwhile the next tokens come out of memory.
#include "vec.h"

namespace transmla::TRANSMLA_ISA {
namespace {

constexpr index_t kRows = 64;  // rows of a block; its fp32 output (128 KB at rank 512) is in L2
constexpr index_t kTileTokens = 48;   // tokens between two rescalings of that output
constexpr index_t kTileNumbers = 64;  // of each token that are widened at a time: 12 KB of L1

// Register blocks: as many sums as hide the latency of two multiply-adds a cycle, and as fit.
// AVX-512 multiplies with a broadcast in one instruction: no need to share it between two vectors.
constexpr int kScoreTokens = kVecBytes == 64 ? 24 : 6;
constexpr int kScoreVecs = kVecBytes == 64 ? 1 : 2;
constexpr int kValueRows = 4;
constexpr int kValueVecs = kVecBytes == 64 ? 4 : 3;
static_assert(kTileTokens % (kScoreVecs * kScoreTokens) == 0);

constexpr index_t kPanelRows = kScoreVecs * kVecSize;
constexpr index_t kMinWorkPerWorker = 1 << 17;  // multiply-adds; less is not worth waking a thread

constexpr index_t kCacheLine = 64;
constexpr index_t kPrefetchInterval = 4;          // steps of an inner loop
constexpr int kUnroll = kVecBytes == 64 ? 4 : 1;  // of these; narrower vectors lose

constexpr double kLog2E = 1.4426950408889634;
constexpr float kLn2 = 0.6931471805599453f;

index_t round_up(index_t a, index_t b) { return ceil_div(a, b) * b; }

struct TokenRange {
  index_t begin, end;
};

// Tokens that queries [first, last] of a sequence see.
TokenRange visible(const MlaDecodeParams& p, index_t seqlen, index_t first, index_t last) {
  const index_t end = max(0, seqlen - p.seqlen_q + last + 1);
  const index_t begin = seqlen - p.seqlen_q + first + 1 - p.sliding_window;
  return {p.sliding_window > 0 ? max(0, begin) : 0, end};
}

// How one sequence is cut: it depends on nothing but the sequence's own length.
struct Parts {
  TokenRange tokens;
  index_t size, count;
};

Parts cut(const MlaDecodeParams& p, index_t batch) {
  Parts parts;
  parts.tokens = visible(p, p.cache_seqlens[batch], 0, p.seqlen_q - 1);
  const index_t length = max(0, parts.tokens.end - parts.tokens.begin);
  parts.size = p.split_size;
  if (parts.size == 0) parts.size = round_up(max(1, ceil_div(length, p.num_splits)), kTileTokens);
  parts.count = max(1, ceil_div(length, parts.size));
  return parts;
}

index_t rows_of(const MlaDecodeParams& p) { return p.seqlen_q * p.num_heads; }

// What a worker computes with.
struct Scratch {
  float* queries;                   // [panel][depth][row of panel], scaled
  float* tile;                      // [numbers / kTileNumbers][kTileTokens][kTileNumbers]
  float* scores;                    // [panel][kTileTokens][row of panel], later the probabilities
  float* sums;                      // [kRows][kv_lora_rank]: out times total
  float *top, *total, *correction;  // [kRows]: the softmax so far, its last rescaling
  int32_t *first, *limit;           // [kRows]: a row sees tokens first <= t < limit
  index_t packed = -1;              // the first row in `queries`, counted over all sequences
};

// Hands out parts of the workspace; with base = nullptr it only measures.
struct Arena {
  char* base;
  size_t used = 0;

  template <class T>
  T* take(index_t count) {
    T* result = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += round_up(count * sizeof(T), 64);
    return result;
  }
};

struct Workspace {
  index_t* first_part;  // [batch_size + 1]: parts of the sequences before
  float* part_out;      // [num_parts, rows, kv_lora_rank]
  float* part_lse;      // [num_parts, rows]
  Arena scratch;        // of worker 0; the other workers' follow
};

// Latent and RoPE key of a token, each in whole parts of kTileNumbers.
index_t tile_numbers(const MlaDecodeParams& p) {
  return round_up(p.kv_lora_rank, kTileNumbers) + round_up(p.qk_rope_head_dim, kTileNumbers);
}

Scratch take_scratch(const MlaDecodeParams& p, Arena& arena) {
  const index_t dim = p.kv_lora_rank + p.qk_rope_head_dim;
  Scratch s;
  s.queries = arena.take<float>(kRows * dim);
  s.tile = arena.take<float>(tile_numbers(p) * kTileTokens);
  s.scores = arena.take<float>(kTileTokens * kRows);
  s.sums = arena.take<float>(kRows * p.kv_lora_rank);
  s.top = arena.take<float>(kRows);
  s.total = arena.take<float>(kRows);
  s.correction = arena.take<float>(kRows);
  s.first = arena.take<int32_t>(kRows);
  s.limit = arena.take<int32_t>(kRows);
  return s;
}

Scratch scratch_of(const MlaDecodeParams& p, Arena arena, index_t worker) {
  Scratch scratch = take_scratch(p, arena);
  for (; worker > 0; --worker) scratch = take_scratch(p, arena);
  return scratch;
}

Workspace take_workspace(const MlaDecodeParams& p, Arena& arena) {
  index_t num_parts = 0;
  for (index_t b = 0; b < p.batch_size; ++b) num_parts += cut(p, b).count;
  Workspace workspace;
  workspace.first_part = arena.take<index_t>(p.batch_size + 1);
  workspace.part_out = arena.take<float>(num_parts * rows_of(p) * p.kv_lora_rank);
  workspace.part_lse = arena.take<float>(num_parts * rows_of(p));
  workspace.scratch = arena;
  return workspace;
}

// Asks for rows of the cache long before they are needed: pages lie anywhere, and the processor's
// own prefetching ends at each. A row's lines are spread over `row_steps` steps: in a rush they
// wait for each other, and the multiply-adds for them.
struct Prefetch {
  const void* const* row = nullptr;
  const void* const* end = nullptr;
  index_t row_lines = 0, row_steps = 1;
  index_t line = 0, due = 0;

  void step() {
    if (row == end) return;
    for (due += row_lines; due >= row_steps; due -= row_steps) {
      __builtin_prefetch(static_cast<const char*>(*row) + line * kCacheLine, 0, 2);  // into L2
      if (++line < row_lines) continue;
      line = 0;
      if (++row == end) return;
    }
  }
};

// body(0) .. body(n - 1), and a step of the prefetch before every few of them.
template <class Body>
void repeat(index_t n, Prefetch& shared_prefetch, const Body& body) {
  Prefetch prefetch = shared_prefetch;  // in registers, where the loop has room for it
  index_t i = 0;
  for (; i + kPrefetchInterval <= n; i += kPrefetchInterval) {
    prefetch.step();
#pragma GCC unroll kUnroll
    for (index_t j = 0; j < kPrefetchInterval; ++j) body(i + j);
  }
  for (; i < n; ++i) body(i);
  shared_prefetch = prefetch;
}

// scores[t][r] (+)= sum over d of keys[t][d] * queries[d][r], for T tokens and V vectors of rows.
// Every call sums from zero: fp32 keeps more digits in short sums.
template <int T, int V>
void add_scores(const float* keys, const float* queries, index_t depth, bool first, float* scores,
                Prefetch& prefetch) {
  Vec sums[T][V] = {};
  repeat(depth, prefetch, [&](index_t d) __attribute__((always_inline)) {
    Vec q[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) q[v] = load(queries + (d * V + v) * kVecSize);
#pragma GCC unroll 24
    for (int t = 0; t < T; ++t) {
      const Vec key = broadcast(keys[t * kTileNumbers + d]);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sums[t][v] = fma(key, q[v], sums[t][v]);
    }
  });
#pragma GCC unroll 24
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      float* score = scores + t * kPanelRows + v * kVecSize;
      store(score, first ? sums[t][v] : load(score) + sums[t][v]);
    }
  }
}

// sums[r][c] = sums[r][c] * correction[r] + sum over t of probabilities[t][r] * values[t][c], for R
// rows and V vectors of `size` columns: fewer than a vector only if V is 1. Again the tile is
// summed from zero.
template <int R, int V>
void add_values(const float* probabilities, const float* const* values, index_t num_tokens,
                index_t column, index_t size, const float* correction, float* sums,
                index_t sums_stride, Prefetch& prefetch) {
  if constexpr (V > 1) size = kVecSize;
  Vec tile[R][V] = {};
  repeat(num_tokens, prefetch, [&](index_t t) __attribute__((always_inline)) {
    Vec value[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) value[v] = load_up_to(values[t] + column + v * kVecSize, size);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec probability = broadcast(probabilities[t * kPanelRows + r]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) tile[r][v] = fma(probability, value[v], tile[r][v]);
    }
  });
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      float* sum = sums + r * sums_stride + v * kVecSize;
      store_up_to(sum, fma(load_up_to(sum, size), broadcast(correction[r]), tile[r][v]), size);
    }
  }
}

// T is the dtype of q and out, Cached that of the cache: T, or int8_t and numbers over their
// scales.
template <class T, class Cached>
class Item {
 public:
  Item(const MlaDecodeParams& p, Scratch& s, index_t batch, index_t first_row)
      : p_(p),
        s_(s),
        dim_(p.kv_lora_rank + p.qk_rope_head_dim),
        batch_(batch),
        first_row_(first_row),
        num_rows_(min(kRows, rows_of(p) - first_row)),
        num_vecs_(ceil_div(num_rows_, kVecSize)) {
    const index_t seqlen = p.cache_seqlens[batch];
    for (index_t r = 0; r < num_vecs_ * kVecSize; ++r) {
      const index_t query = (first_row + min(r, num_rows_ - 1)) / p.num_heads;
      const TokenRange seen = visible(p, seqlen, query, query);
      s.first[r] = static_cast<int32_t>(seen.begin);
      s.limit[r] = static_cast<int32_t>(seen.end);
      s.top[r] = -INFINITY;
      s.total[r] = 0;
    }
    memset(s.sums, 0, num_rows_ * p.kv_lora_rank * sizeof(float));
  }

  void attend(TokenRange tokens) {
    const index_t last = num_rows_ - 1;
    tokens.begin = max(tokens.begin, s_.first[0]);
    tokens.end = min(tokens.end, s_.limit[last]);
    if (tokens.begin >= tokens.end) return;
    locate(tokens.begin, tokens.end);
    prefetch_next(row_lines());
    pack_queries();
    for (index_t t = tokens.begin; t < tokens.end; t += kTileTokens) {
      tile_ = next_;
      locate(t + kTileTokens, tokens.end);
      prefetch_next(steps_per_token());
      score();
      const bool all_seen = t >= s_.first[last] && t + tile_.count <= s_.limit[0];
      for (index_t v = 0; v < num_vecs_; ++v) softmax(v * kVecSize, t, tile_.count, !all_seen);
      accumulate();
    }
  }

  // Writes the rows' normalised output, and their lse at lse_index(row).
  template <class Out, class LseIndex>
  void finish(Out* out, float* lse, const LseIndex& lse_index) const {
    for (index_t r = 0; r < num_rows_; ++r) {
      const bool empty = s_.total[r] == 0;
      const float scale = empty ? 0 : 1 / s_.total[r];
      const float* sums = s_.sums + r * p_.kv_lora_rank;
      for (index_t c = 0; c < p_.kv_lora_rank; c += kVecSize) {
        const index_t size = p_.kv_lora_rank - c;
        store_up_to(out + r * p_.kv_lora_rank + c, load_up_to(sums + c, size) * scale, size);
      }
      lse[lse_index(first_row_ + r)] = empty ? -INFINITY : fmaf(s_.top[r], kLn2, logf(s_.total[r]));
    }
  }

 private:
  static constexpr bool kScaled = sizeof(Cached) == 1;
  // Values of fp32 are used where they are: of 16 rows, copying them took a twentieth of the time.
  static constexpr bool kInPlace = sizeof(Cached) == sizeof(float);

  // Where in the cache a tile's tokens are.
  struct Tile {
    index_t count;
    const void* rows[kTileTokens];
    const float* scales[kTileTokens];  // of its latent and of its RoPE key
  };

  // Scores in units of log2 without a softcap, and of the softcap with one.
  void pack_queries() {
    const index_t id = batch_ * rows_of(p_) + first_row_;
    if (s_.packed == id) return;  // by the part before
    const double unit = p_.softcap > 0 ? 1.0 / p_.softcap : kLog2E;
    const float scale = static_cast<float>(p_.softmax_scale * unit);
    for (index_t v = 0; v < num_vecs_; ++v) {
      // Rows that are missing repeat the last one, and nothing reads their scores.
      const T* q[kVecSize];
      for (index_t r = 0; r < kVecSize; ++r) {
        const index_t row = first_row_ + min(v * kVecSize + r, num_rows_ - 1);
        q[r] = static_cast<const T*>(p_.q) + batch_ * p_.q_stride_batch +
               row / p_.num_heads * p_.q_stride_token + row % p_.num_heads * p_.q_stride_head;
      }
      const index_t panel = v / kScoreVecs * kScoreVecs;
      const index_t width = min(kScoreVecs, num_vecs_ - panel) * kVecSize;
      float* to = s_.queries + (panel * dim_ + v % kScoreVecs) * kVecSize;
      for (index_t d = 0; d < dim_; d += kVecSize) {
        Vec square[kVecSize];
#pragma GCC unroll 16
        for (index_t r = 0; r < kVecSize; ++r) {
          prefetch_.step();
          square[r] = load_up_to(q[r] + d, dim_ - d) * scale;
        }
        transpose(square, AllLanes{});
        const index_t size = min(kVecSize, dim_ - d);
        for (index_t i = 0; i < size; ++i) store(to + (d + i) * width, square[i]);
      }
    }
    s_.packed = id;
  }

  // The tile from token `begin` on goes to next_.
  void locate(index_t begin, index_t end) {
    next_.count = max(0, min(kTileTokens, end - begin));
    const int32_t* block = p_.block_table + batch_ * p_.block_table_stride + begin / p_.block_size;
    index_t slot = begin % p_.block_size;
    for (index_t i = 0; i < next_.count; ++i) {
      next_.rows[i] = static_cast<const Cached*>(p_.latent_cache) + *block * p_.cache_stride_block +
                      slot * p_.cache_stride_token;
      next_.scales[i] =
          p_.cache_scales + *block * p_.scales_stride_block + slot * p_.scales_stride_token;
      if (++slot < p_.block_size) continue;
      slot = 0;
      ++block;
    }
  }

  void prefetch_next(index_t row_steps) {
    prefetch_ = {next_.rows, next_.rows + next_.count, row_lines(), row_steps};
  }

  index_t row_lines() const {
    return ceil_div(dim_ * static_cast<index_t>(sizeof(Cached)), kCacheLine);
  }

  index_t steps_per_token() const {
    constexpr index_t kBlock = (kScoreTokens * kScoreVecs + kValueRows * kValueVecs) / 2;
    return max(1, num_vecs_ * (dim_ + p_.kv_lora_rank) / (kBlock * kPrefetchInterval));
  }

  // Numbers column .. column + size - 1 of the tile's tokens, with one scale, as fp32.
  void load_tile(index_t column, index_t size, float* tile) {
    // Tokens that the last block lacks are multiplied with as well: slowly, if they are subnormal.
    const index_t end = round_up(tile_.count, kScoreVecs * kScoreTokens);
    memset(tile + tile_.count * kTileNumbers, 0,
           (end - tile_.count) * kTileNumbers * sizeof(float));
    for (index_t t = 0; t < tile_.count; ++t) {
      const Cached* from = static_cast<const Cached*>(tile_.rows[t]) + column;
      float* to = tile + t * kTileNumbers;
      const float scale = kScaled ? tile_.scales[t][column >= p_.kv_lora_rank] : 1;
      const auto convert = [&](index_t d, Vec numbers) {
        store(to + d, kScaled ? numbers * scale : numbers);
      };
      if (size == kTileNumbers) {
#pragma GCC unroll 16
        for (index_t d = 0; d < kTileNumbers; d += kVecSize) convert(d, load(from + d));
      } else {
        for (index_t d = 0; d < size; d += kVecSize) convert(d, load_up_to(from + d, size - d));
      }
    }
  }

  void score() {
    index_t length;
    float* tile = s_.tile;
    for (index_t depth = 0; depth < dim_; depth += length) {
      length =
          min(kTileNumbers, (kScaled && depth < p_.kv_lora_rank ? p_.kv_lora_rank : dim_) - depth);
      load_tile(depth, length, tile);
      index_t v = 0;
      for (; v + kScoreVecs <= num_vecs_; v += kScoreVecs) {
        score_vecs<kScoreTokens, kScoreVecs>(v, depth, length, tile);
      }
      for (; v < num_vecs_; ++v) score_vecs<kScoreVecs * kScoreTokens, 1>(v, depth, length, tile);
      if (!kInPlace) tile += kTileTokens * kTileNumbers;
    }
  }

  // Nothing reads the scores of the tokens that the last block lacks.
  template <int N, int V>
  void score_vecs(index_t first_vec, index_t depth, index_t length, const float* tile) {
    const float* queries = s_.queries + (first_vec * dim_ + depth * V) * kVecSize;
    for (index_t t = 0; t < tile_.count; t += N) {
      add_scores<N, V>(tile + t * kTileNumbers, queries, length, depth == 0,
                       scores_of(first_vec * kVecSize) + t * kPanelRows, prefetch_);
    }
  }

  // Of the tile's first token; those of the next are kPanelRows further.
  float* scores_of(index_t row) {
    return s_.scores + row / kPanelRows * kTileTokens * kPanelRows + row % kPanelRows;
  }

  // Online softmax of the rows row .. row + kVecSize - 1.
  void softmax(index_t row, index_t begin, index_t num_tokens, bool masked) {
    float* scores = scores_of(row);
    if (p_.softcap > 0) {
      const float cap = static_cast<float>(p_.softcap * kLog2E);
      for (index_t t = 0; t < num_tokens; ++t) {
        store(scores + t * kPanelRows, tanh(load(scores + t * kPanelRows)) * cap);
      }
    }
    if (masked) {
      const Vec minus_infinity = broadcast(-INFINITY);
      IVec first, limit;
      memcpy(&first, s_.first + row, sizeof first);
      memcpy(&limit, s_.limit + row, sizeof limit);
      for (index_t t = 0; t < num_tokens; ++t) {
        const int32_t token = static_cast<int32_t>(begin + t);
        const IVec seen = (first <= token) & (limit > token);
        store(scores + t * kPanelRows, select(seen, load(scores + t * kPanelRows), minus_infinity));
      }
    }
    const Vec old_top = load(s_.top + row);
    Vec top = old_top;
    for (index_t t = 0; t < num_tokens; ++t) top = max(top, load(scores + t * kPanelRows));
    // A row that has seen nothing yet is shifted by 0: -inf - -inf is NaN.
    const Vec shift = select(top == -INFINITY, Vec{}, top);
    Vec total = {};
    for (index_t t = 0; t < num_tokens; ++t) {
      const Vec probability = exp2(load(scores + t * kPanelRows) - shift);
      store(scores + t * kPanelRows, probability);
      total += probability;
    }
    const Vec correction = exp2(old_top - shift);
    store(s_.top + row, top);
    store(s_.total + row, fma(load(s_.total + row), correction, total));
    store(s_.correction + row, correction);
  }

  void accumulate() {
    for (index_t column = 0; column < p_.kv_lora_rank; column += kTileNumbers) {
      const index_t end = min(column + kTileNumbers, p_.kv_lora_rank);
      locate_values(column);
      accumulate_columns<kValueVecs>(column, end);
    }
  }

  void locate_values(index_t column) {
    for (index_t t = 0; t < tile_.count; ++t) {
      values_[t] = kInPlace ? static_cast<const float*>(tile_.rows[t]) + column
                            : s_.tile + column * kTileTokens + t * kTileNumbers;
    }
  }

  // V vectors at a time, and the rest by fewer; the last one may be partial.
  template <int V>
  void accumulate_columns(index_t first, index_t end, index_t column = 0) {
    constexpr index_t kLeast = V > 1 ? V * kVecSize : 1;
    for (; first + column + kLeast <= end; column += V * kVecSize) {
      index_t r = 0;
      for (; r + kValueRows <= num_rows_; r += kValueRows) {
        accumulate_block<kValueRows, V>(first, end, column, r);
      }
      for (; r < num_rows_; ++r) accumulate_block<1, V>(first, end, column, r);
    }
    if constexpr (V > 1) accumulate_columns<V - 1>(first, end, column);
  }

  template <int R, int V>
  void accumulate_block(index_t first, index_t end, index_t column, index_t row) {
    add_values<R, V>(scores_of(row), values_, tile_.count, column, end - first - column,
                     s_.correction + row, s_.sums + row * p_.kv_lora_rank + first + column,
                     p_.kv_lora_rank, prefetch_);
  }

  const MlaDecodeParams& p_;
  Scratch& s_;
  const index_t dim_, batch_, first_row_, num_rows_, num_vecs_;
  Tile tile_, next_;
  const float* values_[kTileTokens];
  Prefetch prefetch_;
};

template <class T, class Cached>
void attend(const MlaDecodeParams& p, const Workspace& workspace, index_t worker, index_t* next) {
  Scratch scratch = scratch_of(p, workspace.scratch, worker);
  const index_t num_row_blocks = ceil_div(rows_of(p), kRows);
  const index_t num_items = workspace.first_part[p.batch_size] * num_row_blocks;
  index_t batch = 0;
  index_t item;
  while ((item = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED)) < num_items) {
    const index_t part = item / num_row_blocks;
    const index_t row = item % num_row_blocks * kRows;
    while (workspace.first_part[batch + 1] <= part) ++batch;

    const Parts parts = cut(p, batch);
    const index_t begin = parts.tokens.begin + (part - workspace.first_part[batch]) * parts.size;
    Item<T, Cached> rows(p, scratch, batch, row);
    rows.attend({begin, min(begin + parts.size, parts.tokens.end)});
    if (parts.count == 1) {
      T* out = static_cast<T*>(p.out) + (batch * rows_of(p) + row) * p.kv_lora_rank;
      float* lse = p.lse + batch * rows_of(p);
      rows.finish(out, lse,
                  [&](index_t r) { return r % p.num_heads * p.seqlen_q + r / p.num_heads; });
    } else {
      float* out = workspace.part_out + (part * rows_of(p) + row) * p.kv_lora_rank;
      rows.finish(out, workspace.part_lse + part * rows_of(p), [](index_t r) { return r; });
    }
  }
}

// Merges the parts of one row of a sequence by their lse, which become weights.
template <class T>
void merge_parts(const MlaDecodeParams& p, const Workspace& workspace, index_t batch, index_t row) {
  const index_t num_rows = rows_of(p);
  const index_t first = workspace.first_part[batch];
  const index_t num_parts = workspace.first_part[batch + 1] - first;
  float* weights = workspace.part_lse + first * num_rows + row;
  float top = -INFINITY;
  for (index_t i = 0; i < num_parts; ++i) {
    const float lse = weights[i * num_rows];
    top = lse > top ? lse : top;
  }
  const float shift = top == -INFINITY ? 0 : top;
  float total = 0;
  for (index_t i = 0; i < num_parts; ++i) {
    total += weights[i * num_rows] = expf(weights[i * num_rows] - shift);
  }

  const float scale = total == 0 ? 0 : 1 / total;
  const float* parts = workspace.part_out + (first * num_rows + row) * p.kv_lora_rank;
  T* out = static_cast<T*>(p.out) + (batch * num_rows + row) * p.kv_lora_rank;
  for (index_t c = 0; c < p.kv_lora_rank; c += kVecSize) {
    const index_t size = p.kv_lora_rank - c;
    Vec sum = {};
    for (index_t i = 0; i < num_parts; ++i) {
      const Vec part = load_up_to(parts + i * num_rows * p.kv_lora_rank + c, size);
      sum = fma(part, broadcast(weights[i * num_rows]), sum);
    }
    store_up_to(out + c, sum * scale, size);
  }
  p.lse[batch * num_rows + row % p.num_heads * p.seqlen_q + row / p.num_heads] =
      total == 0 ? -INFINITY : shift + logf(total);
}

}  // namespace

size_t mla_decode_cpu_workspace_size(const MlaDecodeParams& p, int num_threads) {
  Arena arena = {nullptr};
  take_workspace(p, arena);
  for (int worker = 0; worker < num_threads; ++worker) take_scratch(p, arena);
  return arena.used;
}

void mla_decode_cpu(const MlaDecodeParams& p, const ParallelFor& parallel_for) {
  Arena arena = {static_cast<char*>(p.workspace)};
  const Workspace workspace = take_workspace(p, arena);
  index_t work = 0;
  workspace.first_part[0] = 0;
  for (index_t b = 0; b < p.batch_size; ++b) {
    const Parts parts = cut(p, b);
    workspace.first_part[b + 1] = workspace.first_part[b] + parts.count;
    work += (parts.tokens.end - parts.tokens.begin) * rows_of(p) * p.kv_lora_rank;
  }
  const index_t num_parts = workspace.first_part[p.batch_size];
  const index_t num_workers =
      min(min(parallel_for.num_threads, num_parts * ceil_div(rows_of(p), kRows)),
          ceil_div(work, kMinWorkPerWorker));

  with_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    index_t next = 0;
    run(parallel_for, 0, max(1, num_workers), 1, [&](index_t begin, index_t end) {
      for (index_t worker = begin; worker < end; ++worker) {
        if (p.cache_scales) {
          attend<T, int8_t>(p, workspace, worker, &next);
        } else {
          attend<T, T>(p, workspace, worker, &next);
        }
      }
    });
    if (num_parts == p.batch_size) return;
    run(parallel_for, 0, p.batch_size * rows_of(p), 8, [&](index_t begin, index_t end) {
      for (index_t i = begin; i < end; ++i) {
        const index_t batch = i / rows_of(p);
        const bool cut = workspace.first_part[batch + 1] - workspace.first_part[batch] > 1;
        if (cut) merge_parts<T>(p, workspace, batch, i % rows_of(p));
      }
    });
  });
}

}  // namespace transmla::TRANSMLA_ISA
