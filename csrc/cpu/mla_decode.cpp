// One work item is a block of query rows against one part of one sequence. Scores are kept
// transposed, [token][row]: the softmax then runs along vectors of rows without a horizontal sum,
// and both products read one operand as vectors and the other as broadcasts.
#include "vec.h"

namespace transmla::TRANSMLA_ISA {
namespace {

constexpr index_t kRows = 32;  // rows of a block; its fp32 output (64 KB at rank 512) is in L2
constexpr index_t kTileTokens = 48;  // tokens converted to fp32 at a time
constexpr index_t kDepth = 128;      // numbers of q and k whose panels (16 KB, 24 KB) are in L1

// Register blocks: as many sums as hide the latency of two multiply-adds a cycle.
constexpr int kScoreTokens = kVecBytes == 64 ? 8 : 6;
constexpr int kScoreVecs = 2;
constexpr int kValueRows = 4;
constexpr int kValueVecs = kVecBytes == 64 ? 4 : 2;

constexpr index_t kPanelRows = kScoreVecs * kVecSize;
constexpr index_t kMinWorkPerWorker = 1 << 17;  // multiply-adds; less is not worth waking a thread

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
  parts.size = p.split_size > 0
                   ? p.split_size
                   : max(kTileTokens, round_up(ceil_div(length, p.num_splits), kTileTokens));
  parts.count = max(1, ceil_div(length, parts.size));
  return parts;
}

index_t rows_of(const MlaDecodeParams& p) { return p.seqlen_q * p.num_heads; }

// What a worker computes with.
struct Scratch {
  float* queries;                   // [panel][depth][row of panel], scaled
  float* tile;                      // [kTileTokens][tile_stride]
  float* scores;                    // [kTileTokens][kRows], later the probabilities
  float* sums;                      // [kRows][kv_lora_rank]: out times total
  float *top, *total, *correction;  // [kRows]: the softmax so far, its last rescaling
  int32_t *first, *limit;           // [kRows]: a row sees tokens first <= t < limit
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

// An odd number of cache lines: at 2^n bytes all tokens would share a few sets of the cache.
index_t tile_stride(index_t dim) { return (ceil_div(dim, 16) | 1) * 16; }

Scratch take_scratch(const MlaDecodeParams& p, Arena& arena) {
  const index_t dim = p.kv_lora_rank + p.qk_rope_head_dim;
  Scratch s;
  s.queries = arena.take<float>(kRows * dim);
  s.tile = arena.take<float>(kTileTokens * tile_stride(dim));
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

// scores[t][r] (+)= sum over d of keys[t][d] * queries[d][r], for T tokens and V vectors of rows.
// Every call sums from zero: fp32 keeps more digits in short sums.
template <int T, int V>
void add_scores(const float* const* keys, const float* queries, index_t depth, bool first,
                float* scores) {
  Vec sums[T][V] = {};
  for (index_t d = 0; d < depth; ++d) {
    Vec q[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) q[v] = load(queries + (d * V + v) * kVecSize);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const Vec key = broadcast(keys[t][d]);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sums[t][v] = fma(key, q[v], sums[t][v]);
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      float* score = scores + t * kRows + v * kVecSize;
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
                index_t sums_stride) {
  if constexpr (V > 1) size = kVecSize;
  Vec tile[R][V] = {};
  for (index_t t = 0; t < num_tokens; ++t) {
    Vec value[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) value[v] = load_up_to(values[t] + column + v * kVecSize, size);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec probability = broadcast(probabilities[t * kRows + r]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) tile[r][v] = fma(probability, value[v], tile[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      float* sum = sums + r * sums_stride + v * kVecSize;
      store_up_to(sum, fma(load_up_to(sum, size), broadcast(correction[r]), tile[r][v]), size);
    }
  }
}

template <class T>
class Item {
 public:
  Item(const MlaDecodeParams& p, const Scratch& s, index_t batch, index_t first_row)
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
    pack_queries();
    for (index_t t = tokens.begin; t < tokens.end; t += kTileTokens) {
      const index_t end = min(t + kTileTokens, tokens.end);
      load_tile(t, end);
      score(end - t);
      const bool all_seen = t >= s_.first[last] && end <= s_.limit[0];
      for (index_t v = 0; v < num_vecs_; ++v) softmax(v * kVecSize, t, end - t, !all_seen);
      accumulate(end - t);
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
  // Scores in units of log2 without a softcap, and of the softcap with one.
  void pack_queries() {
    const double unit = p_.softcap > 0 ? 1.0 / p_.softcap : kLog2E;
    const float scale = static_cast<float>(p_.softmax_scale * unit);
    for (index_t r = 0; r < num_vecs_ * kVecSize; ++r) {
      const index_t panel = r / kPanelRows;
      const index_t width = min(kPanelRows, num_vecs_ * kVecSize - panel * kPanelRows);
      float* to = s_.queries + panel * kPanelRows * dim_ + r % kPanelRows;
      if (r >= num_rows_) {
        for (index_t d = 0; d < dim_; ++d) to[d * width] = 0;
        continue;
      }
      const index_t row = first_row_ + r;
      const T* q = static_cast<const T*>(p_.q) + batch_ * p_.q_stride_batch +
                   row / p_.num_heads * p_.q_stride_token + row % p_.num_heads * p_.q_stride_head;
      for (index_t d = 0; d < dim_; d += kVecSize) {
        const Vec scaled = load_up_to(q + d, dim_ - d) * scale;
        for (index_t i = 0; i < min(kVecSize, dim_ - d); ++i) to[(d + i) * width] = scaled[i];
      }
    }
  }

  // Tokens [begin, end) as fp32 rows; the last one stands in for those that a block lacks.
  void load_tile(index_t begin, index_t end) {
    const int32_t* blocks = p_.block_table + batch_ * p_.block_table_stride;
    for (index_t t = begin; t < end; ++t) {
      const T* row = static_cast<const T*>(p_.latent_cache) +
                     blocks[t / p_.block_size] * p_.cache_stride_block +
                     t % p_.block_size * p_.cache_stride_token;
      rows_[t - begin] = as_floats(row, s_.tile + (t - begin) * tile_stride(dim_));
    }
    for (index_t t = end - begin; t % kScoreTokens != 0; ++t) rows_[t] = rows_[t - 1];
  }

  const float* as_floats(const float* row, float*) { return row; }
  template <class Half>
  const float* as_floats(const Half* row, float* to) {
    for (index_t d = 0; d < dim_; d += kVecSize) store(to + d, load_up_to(row + d, dim_ - d));
    return to;
  }

  void score(index_t num_tokens) {
    for (index_t depth = 0; depth < dim_; depth += kDepth) {
      const index_t length = min(kDepth, dim_ - depth);
      for (index_t v = 0; v < num_vecs_; v += kScoreVecs) {
        const index_t width = min(kScoreVecs, num_vecs_ - v);
        const float* queries = s_.queries + v * kVecSize * dim_ + depth * width * kVecSize;
        for (index_t t = 0; t < num_tokens; t += kScoreTokens) {
          const float* keys[kScoreTokens];
          for (int i = 0; i < kScoreTokens; ++i) keys[i] = rows_[t + i] + depth;
          float* scores = s_.scores + t * kRows + v * kVecSize;
          if (width == kScoreVecs) {
            add_scores<kScoreTokens, kScoreVecs>(keys, queries, length, depth == 0, scores);
          } else {
            add_scores<kScoreTokens, 1>(keys, queries, length, depth == 0, scores);
          }
        }
      }
    }
  }

  // Online softmax of the rows row .. row + kVecSize - 1.
  void softmax(index_t row, index_t begin, index_t num_tokens, bool masked) {
    float* scores = s_.scores + row;
    if (p_.softcap > 0) {
      const float cap = static_cast<float>(p_.softcap * kLog2E);
      for (index_t t = 0; t < num_tokens; ++t) {
        store(scores + t * kRows, tanh(load(scores + t * kRows)) * cap);
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
        store(scores + t * kRows, select(seen, load(scores + t * kRows), minus_infinity));
      }
    }
    const Vec old_top = load(s_.top + row);
    Vec top = old_top;
    for (index_t t = 0; t < num_tokens; ++t) top = max(top, load(scores + t * kRows));
    // A row that has seen nothing yet is shifted by 0: -inf - -inf is NaN.
    const Vec shift = select(top == -INFINITY, Vec{}, top);
    Vec total = {};
    for (index_t t = 0; t < num_tokens; ++t) {
      const Vec probability = exp2(load(scores + t * kRows) - shift);
      store(scores + t * kRows, probability);
      total += probability;
    }
    const Vec correction = exp2(old_top - shift);
    store(s_.top + row, top);
    store(s_.total + row, fma(load(s_.total + row), correction, total));
    store(s_.correction + row, correction);
  }

  void accumulate(index_t num_tokens) {
    constexpr index_t kColumns = kValueVecs * kVecSize;
    index_t column = 0;
    for (; column + kColumns <= p_.kv_lora_rank; column += kColumns) {
      accumulate_columns<kValueVecs>(num_tokens, column);
    }
    for (; column < p_.kv_lora_rank; column += kVecSize) accumulate_columns<1>(num_tokens, column);
  }

  template <int V>
  void accumulate_columns(index_t num_tokens, index_t column) {
    index_t r = 0;
    for (; r + kValueRows <= num_rows_; r += kValueRows) {
      accumulate_block<kValueRows, V>(num_tokens, column, r);
    }
    for (; r < num_rows_; ++r) accumulate_block<1, V>(num_tokens, column, r);
  }

  template <int R, int V>
  void accumulate_block(index_t num_tokens, index_t column, index_t row) {
    add_values<R, V>(s_.scores + row, rows_, num_tokens, column, p_.kv_lora_rank - column,
                     s_.correction + row, s_.sums + row * p_.kv_lora_rank + column,
                     p_.kv_lora_rank);
  }

  const MlaDecodeParams& p_;
  const Scratch s_;
  const index_t dim_, batch_, first_row_, num_rows_, num_vecs_;
  const float* rows_[kTileTokens];
};

template <class T>
void attend(const MlaDecodeParams& p, const Workspace& workspace, index_t worker, index_t* next) {
  const Scratch scratch = scratch_of(p, workspace.scratch, worker);
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
    Item<T> rows(p, scratch, batch, row);
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
      for (index_t worker = begin; worker < end; ++worker) attend<T>(p, workspace, worker, &next);
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
