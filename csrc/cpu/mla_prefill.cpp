// One work item is a block of queries of one head against all that they see. Scores are kept
// transposed, [token][query]: the softmax then runs along vectors of queries without a horizontal
// sum, and both products read one operand as vectors and the other as broadcasts.
#include "vec.h"

namespace transmla::TRANSMLA_ISA {
namespace {

// Register blocks: as many sums as 32 or 16 vector registers hold beside their operands.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kScoreTokens = 8, kValueVecs = 4;
#else
constexpr int kScoreTokens = 4, kValueVecs = 2;
#endif
constexpr int kPanelVecs = 3;
constexpr int kValueRows = 6;

constexpr index_t kPanelRows = kPanelVecs * kVecSize;  // queries whose scores are made at a time
constexpr index_t kTileTokens = 128;                   // converted to fp32 at a time
// Of a block: keys and values come from memory once for so many queries. Half of it is 4 % slower.
constexpr index_t kMaxRows = 480;
constexpr index_t kMinWorkPerWorker = 1 << 17;  // multiply-adds; less is not worth waking a thread
static_assert(kMaxRows % kPanelRows == 0 && kPanelRows % kValueRows == 0);
static_assert(kTileTokens % kScoreTokens == 0);

constexpr double kLog2E = 1.4426950408889634;
constexpr float kLn2 = 0.6931471805599453f;

index_t round_up(index_t a, index_t b) { return ceil_div(a, b) * b; }

struct Layout {
  explicit Layout(const MlaPrefillParams& p)
      : key_dim(p.qk_nope_head_dim + p.qk_rope_head_dim),
        value_offset(round_up(key_dim, kVecSize)),
        value_dim(round_up(p.v_head_dim, kVecSize)),
        // An odd number of cache lines: at 2^n bytes all tokens would share a few sets of a cache.
        tile_stride((ceil_div(value_offset + value_dim, 16) | 1) * 16) {}

  const index_t key_dim, value_offset, value_dim, tile_stride;
};

// What a worker computes with; without a base it only measures.
struct Scratch {
  Scratch(const Layout& layout, float* base) {
    const auto take = [&](index_t count) {
      float* result = base ? base + size : nullptr;
      size += round_up(count, 16);
      return result;
    };
    queries = take(kMaxRows * layout.key_dim);
    tile = take(kTileTokens * layout.tile_stride);
    scores = take(kTileTokens * kPanelRows);
    sums = take(kMaxRows * layout.value_dim);
    top = take(kMaxRows);
    total = take(kMaxRows);
    correction = take(kPanelRows);
  }

  float* queries;      // [panel][key_dim][query of panel], scaled
  float* tile;         // [kTileTokens][tile_stride]: key, value
  float* scores;       // [kTileTokens][kPanelRows], later the probabilities
  float* sums;         // [kMaxRows][value_dim]: out times total
  float *top, *total;  // [kMaxRows]: the softmax so far
  float* correction;   // [kPanelRows]: its last rescaling
  index_t size = 0;    // in floats
};

// How the queries of a sequence are cut: into equal blocks of whole panels.
struct Blocks {
  Blocks(const MlaPrefillParams& p, index_t batch) {
    const index_t seqlen_q = p.cu_seqlens_q[batch + 1] - p.cu_seqlens_q[batch];
    count = ceil_div(seqlen_q, kMaxRows);
    if (count == 0) return;
    size = round_up(ceil_div(seqlen_q, count), kPanelRows);
    count = ceil_div(seqlen_q, size);
  }

  index_t count, size = 0;
};

// scores[t][r] = sum over d of keys[t][d] * queries[d][r], for T tokens and V vectors of queries.
template <int T, int V>
void score_block(const float* keys, index_t key_stride, const float* queries, index_t dim,
                 float* scores) {
  Vec sums[T][V] = {};
  for (index_t d = 0; d < dim; ++d) {
    Vec q[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) q[v] = load(queries + (d * V + v) * kVecSize);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const Vec key = broadcast(keys[t * key_stride + d]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[t][v] = fma(key, q[v], sums[t][v]);
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(scores + t * kPanelRows + v * kVecSize, sums[t][v]);
  }
}

// sums[r] = sums[r] * correction[r] + sum over t of probabilities[t][r] * values[t], for R queries
// and V vectors of columns. The tile is summed from zero: fp32 keeps more digits in short sums.
template <int R, int V>
void add_values(const float* probabilities, const float* values, index_t value_stride,
                index_t num_tokens, const float* correction, float* sums, index_t sums_stride) {
  Vec tile[R][V] = {};
  for (index_t t = 0; t < num_tokens; ++t) {
    Vec value[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) value[v] = load(values + t * value_stride + v * kVecSize);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec probability = broadcast(probabilities[t * kPanelRows + r]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) tile[r][v] = fma(probability, value[v], tile[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      float* sum = sums + r * sums_stride + v * kVecSize;
      store(sum, fma(load(sum), broadcast(correction[r]), tile[r][v]));
    }
  }
}

template <class T>
class Item {
 public:
  Item(const MlaPrefillParams& p, const Layout& layout, const Scratch& scratch, index_t batch,
       index_t head, index_t first_query, index_t max_rows)
      : p_(p),
        layout_(layout),
        s_(scratch),
        head_(head),
        first_token_(p.cu_seqlens_q[batch] + first_query),
        num_rows_(min(max_rows, p.cu_seqlens_q[batch + 1] - first_token_)),
        kv_begin_(p.cu_seqlens_k[batch]),
        seqlen_k_(p.cu_seqlens_k[batch + 1] - kv_begin_),
        position_(seqlen_k_ - (p.cu_seqlens_q[batch + 1] - first_token_)) {}

  void attend() {
    const index_t padded_rows = round_up(num_rows_, kPanelRows);
    for (index_t r = 0; r < padded_rows; ++r) {
      s_.top[r] = -INFINITY;
      s_.total[r] = 0;
    }
    memset(s_.sums, 0, padded_rows * layout_.value_dim * sizeof(float));
    const index_t begin = first_seen(0), end = end_of_seen(num_rows_ - 1);
    if (begin < end) pack_queries();
    for (index_t t = begin; t < end; t += kTileTokens) {
      const index_t tile_end = min(t + kTileTokens, end);
      load_tile(t, tile_end);
      for (index_t row = 0; row < num_rows_; row += kPanelRows) attend_tile(row, t, tile_end);
    }
    finish();
  }

 private:
  // Query `row` of the block sees tokens first_seen(row) up to end_of_seen(row) of its sequence.
  index_t first_seen(index_t row) const {
    return p_.sliding_window > 0 ? max(0, position_ + row + 1 - p_.sliding_window) : 0;
  }
  index_t end_of_seen(index_t row) const {
    return p_.causal ? max(0, position_ + row + 1) : seqlen_k_;
  }

  index_t panel_vecs(index_t row) const {
    return min(kPanelVecs, ceil_div(num_rows_ - row, kVecSize));
  }

  // Scores in units of log2 without a softcap, and of the softcap with one.
  void pack_queries() {
    const double unit = p_.softcap > 0 ? 1.0 / p_.softcap : kLog2E;
    const float scale = static_cast<float>(p_.softmax_scale * unit);
    for (index_t row = 0; row < num_rows_; row += kPanelRows) {
      const index_t width = panel_vecs(row) * kVecSize;
      for (index_t r = 0; r < width; ++r) {
        // The last query stands in for those that a vector lacks.
        const index_t token = first_token_ + min(row + r, num_rows_ - 1);
        copy(s_.tile + r * layout_.tile_stride,
             static_cast<const T*>(p_.q) + token * p_.q_stride_token + head_ * p_.q_stride_head,
             layout_.key_dim);
      }
      float* to = s_.queries + row * layout_.key_dim;
      for (index_t d = 0; d < layout_.key_dim; ++d, to += width) {
        for (index_t r = 0; r < width; ++r) to[r] = s_.tile[r * layout_.tile_stride + d] * scale;
      }
    }
  }

  void load_tile(index_t begin, index_t end) {
    for (index_t t = begin; t < end; ++t) {
      const T* kv = static_cast<const T*>(p_.kv) + (kv_begin_ + t) * p_.kv_stride_token +
                    head_ * p_.kv_stride_head;
      const T* k_pe = static_cast<const T*>(p_.k_pe) + (kv_begin_ + t) * p_.k_pe_stride_token;
      float* row = s_.tile + (t - begin) * layout_.tile_stride;
      // In this order: a copy may write up to a vector too many.
      copy(row, kv, p_.qk_nope_head_dim);
      copy(row + p_.qk_nope_head_dim, k_pe, p_.qk_rope_head_dim);
      copy(row + layout_.value_offset, kv + p_.qk_nope_head_dim, p_.v_head_dim);
    }
  }

  static void copy(float* to, const T* from, index_t count) {
    for (index_t i = 0; i < count; i += kVecSize) store(to + i, load_up_to(from + i, count - i));
  }

  // The queries of a panel over a tile, which ends earlier for those that see less of it.
  void attend_tile(index_t row, index_t begin, index_t end) {
    const index_t last_row = min(row + kPanelRows, num_rows_) - 1;
    end = min(end, end_of_seen(last_row));
    if (begin >= end || end <= first_seen(row)) return;
    const bool masked = begin < first_seen(last_row) || end_of_seen(row) < end;
    switch (panel_vecs(row)) {
      case 1:
        score<1>(row, begin, end - begin, masked);
        break;
      case 2:
        score<2>(row, begin, end - begin, masked);
        break;
      default:
        score<kPanelVecs>(row, begin, end - begin, masked);
    }
    accumulate(row, last_row + 1, begin, end);
  }

  template <int V>
  void score(index_t row, index_t begin, index_t num_tokens, bool masked) {
    for (index_t t = 0; t < num_tokens; t += kScoreTokens) {
      score_block<kScoreTokens, V>(s_.tile + t * layout_.tile_stride, layout_.tile_stride,
                                   s_.queries + row * layout_.key_dim, layout_.key_dim,
                                   s_.scores + t * kPanelRows);
    }
    if (p_.softcap > 0) cap<V>(num_tokens);
    if (masked) mask<V>(row, begin, num_tokens);
    softmax<V>(row, num_tokens);
  }

  template <int V>
  void cap(index_t num_tokens) {
    const float cap = static_cast<float>(p_.softcap * kLog2E);
    for (index_t t = 0; t < num_tokens; ++t) {
      for (int v = 0; v < V; ++v) {
        float* score = s_.scores + t * kPanelRows + v * kVecSize;
        store(score, tanh(load(score)) * cap);
      }
    }
  }

  template <int V>
  void mask(index_t row, index_t begin, index_t num_tokens) {
    for (int v = 0; v < V; ++v) {
      IVec first, end;
      for (int i = 0; i < kVecSize; ++i) {
        first[i] = static_cast<int32_t>(first_seen(row + v * kVecSize + i));
        end[i] = static_cast<int32_t>(end_of_seen(row + v * kVecSize + i));
      }
      for (index_t t = 0; t < num_tokens; ++t) {
        const int32_t token = static_cast<int32_t>(begin + t);
        const IVec seen = (first <= token) & (end > token);
        float* score = s_.scores + t * kPanelRows + v * kVecSize;
        store(score, select(seen, load(score), broadcast(-INFINITY)));
      }
    }
  }

  // Online softmax of V vectors of queries, side by side: one alone would wait for each maximum.
  template <int V>
  void softmax(index_t row, index_t num_tokens) {
    Vec old_top[V], top[V], shift[V], total[V] = {};
    for (int v = 0; v < V; ++v) top[v] = old_top[v] = load(s_.top + row + v * kVecSize);
    for (index_t t = 0; t < num_tokens; ++t) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        top[v] = max(top[v], load(s_.scores + t * kPanelRows + v * kVecSize));
      }
    }
    // A query that has seen nothing yet is shifted by 0: -inf - -inf is NaN.
    for (int v = 0; v < V; ++v) shift[v] = select(top[v] == -INFINITY, Vec{}, top[v]);
    for (index_t t = 0; t < num_tokens; ++t) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        float* score = s_.scores + t * kPanelRows + v * kVecSize;
        const Vec probability = exp2(load(score) - shift[v]);
        store(score, probability);
        total[v] += probability;
      }
    }
    for (int v = 0; v < V; ++v) {
      float* old_total = s_.total + row + v * kVecSize;
      const Vec correction = exp2(old_top[v] - shift[v]);
      store(s_.top + row + v * kVecSize, top[v]);
      store(old_total, fma(load(old_total), correction, total[v]));
      store(s_.correction + v * kVecSize, correction);
    }
  }

  void accumulate(index_t row, index_t end_row, index_t begin, index_t end) {
    index_t column = add_columns<kValueVecs>(0, row, end_row, begin, end);
    column = add_columns<2>(column, row, end_row, begin, end);
    add_columns<1>(column, row, end_row, begin, end);
  }

  // As many times V vectors of columns as are left; returns the first column after them.
  template <int V>
  index_t add_columns(index_t column, index_t row, index_t end_row, index_t begin, index_t end) {
    for (; column + V * kVecSize <= layout_.value_dim; column += V * kVecSize) {
      for (index_t r = row; r < end_row; r += kValueRows) {
        const index_t num_seen = min(end, end_of_seen(r + kValueRows - 1)) - begin;
        add_values<kValueRows, V>(s_.scores + r - row, s_.tile + layout_.value_offset + column,
                                  layout_.tile_stride, num_seen, s_.correction + r - row,
                                  s_.sums + r * layout_.value_dim + column, layout_.value_dim);
      }
    }
    return column;
  }

  void finish() const {
    for (index_t r = 0; r < num_rows_; ++r) {
      const index_t token = first_token_ + r;
      const bool empty = s_.total[r] == 0;
      const float scale = empty ? 0 : 1 / s_.total[r];
      T* out = static_cast<T*>(p_.out) + (token * p_.num_heads + head_) * p_.v_head_dim;
      for (index_t c = 0; c < p_.v_head_dim; c += kVecSize) {
        const Vec sum = load(s_.sums + r * layout_.value_dim + c);
        store_up_to(out + c, sum * scale, p_.v_head_dim - c);
      }
      p_.lse[head_ * p_.num_tokens + token] =
          empty ? -INFINITY : fmaf(s_.top[r], kLn2, logf(s_.total[r]));
    }
  }

  const MlaPrefillParams& p_;
  const Layout& layout_;
  const Scratch& s_;
  const index_t head_, first_token_, num_rows_, kv_begin_, seqlen_k_;
  const index_t position_;  // of the block's first query in its sequence
};

template <class T>
void attend_items(const MlaPrefillParams& p, index_t worker, index_t num_items, index_t* next) {
  const Layout layout(p);
  const index_t size = Scratch(layout, nullptr).size;
  const Scratch scratch(layout, static_cast<float*>(p.workspace) + worker * size);
  index_t batch = 0, first_item = 0;
  index_t item;
  while ((item = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED)) < num_items) {
    while (item >= first_item + Blocks(p, batch).count * p.num_heads) {
      first_item += Blocks(p, batch++).count * p.num_heads;
    }
    // Head by head, whose keys and values then stay in the cache, and the longest block first.
    const Blocks blocks(p, batch);
    const index_t head = (item - first_item) / blocks.count;
    const index_t block = blocks.count - 1 - (item - first_item) % blocks.count;
    Item<T>(p, layout, scratch, batch, head, block * blocks.size, blocks.size).attend();
  }
}

}  // namespace

size_t mla_prefill_cpu_workspace_size(const MlaPrefillParams& p, int num_threads) {
  return Scratch(Layout(p), nullptr).size * sizeof(float) * num_threads;
}

void mla_prefill_cpu(const MlaPrefillParams& p, const ParallelFor& parallel_for) {
  index_t num_items = 0, work = 0;
  for (index_t b = 0; b < p.batch_size; ++b) {
    const index_t seqlen_q = p.cu_seqlens_q[b + 1] - p.cu_seqlens_q[b];
    const index_t seqlen_k = p.cu_seqlens_k[b + 1] - p.cu_seqlens_k[b];
    num_items += Blocks(p, b).count * p.num_heads;
    work += seqlen_q * seqlen_k * p.num_heads * Layout(p).tile_stride;
  }
  const index_t num_workers =
      min(min(parallel_for.num_threads, num_items), max(1, work / kMinWorkPerWorker));
  index_t next = 0;
  with_dtype(p.dtype, [&](auto zero) {
    run(parallel_for, 0, num_workers, 1, [&](index_t begin, index_t end) {
      for (index_t worker = begin; worker < end; ++worker) {
        attend_items<decltype(zero)>(p, worker, num_items, &next);
      }
    });
  });
}

}  // namespace transmla::TRANSMLA_ISA
