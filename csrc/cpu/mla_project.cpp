#include <float.h>

#include "vec.h"

namespace transmla::TRANSMLA_ISA {
namespace {

constexpr int kTokens = kVecBytes == 64 ? 8 : 4;  // that share one pass over W_UK
constexpr int kMaxSums = 2 * kTokens;             // vectors of sums that fit the registers
constexpr index_t kDepth = 256;  // numbers of q_nope converted to fp32 at a time; most heads fit
constexpr index_t kBlock = 64;   // tokens of a task
constexpr index_t kMinWork = 1 << 17;  // multiply-adds; less is not worth waking a thread

template <class T>
Vec round_to(Vec v) {
  T numbers[kVecSize];
  store(numbers, v);
  return load(numbers);
}

// Rounds to T before the weight, as the models were trained. `out` may be `x`.
template <class T>
void normalize(const T* x, const T* weight, index_t n, float eps, T* out) {
  Vec squares = {};
  for (index_t i = 0; i < n; i += kVecSize) {
    const Vec v = load_up_to(x + i, n - i);
    squares = fma(v, v, squares);
  }
  const float scale = 1 / sqrtf(sum(squares) / n + eps);
  for (index_t i = 0; i < n; i += kVecSize) {
    const Vec v = round_to<T>(load_up_to(x + i, n - i) * scale);
    store_up_to(out + i, v * load_up_to(weight + i, n - i), n - i);
  }
}

// A pair of neighbours is one 64-bit lane.
typedef uint64_t PairVec __attribute__((vector_size(kVecBytes)));
typedef uint32_t HalfOfPairVec __attribute__((vector_size(kVecBytes / 2)));

// {p[0], p[0], p[1], p[1], ...}
Vec load_twice(const float* p) {
  HalfOfPairVec half;
  memcpy(&half, p, sizeof half);
  const PairVec low = __builtin_convertvector(half, PairVec);
  return (Vec)(low | low << 32);
}

// Turns the pairs (even, odd) into (even cos - odd sin, odd cos + even sin).
Vec turn(Vec pairs, const float* cosines, const float* sines) {
  const PairVec bits = (PairVec)pairs;
  const Vec swapped = (Vec)(bits << 32 | bits >> 32);
  const Vec minus_plus_sine = (Vec)((PairVec)load_twice(sines) ^ 0x80000000);
  return fma(swapped, minus_plus_sine, pairs * load_twice(cosines));
}

// cos_sin holds the cosines of the n / 2 pairs, then their sines.
template <class T>
void rotate(const T* x, const float* cos_sin, index_t n, T* out) {
  index_t i = 0;
  for (; i + kVecSize <= n; i += kVecSize) {
    store(out + i, turn(load(x + i), cos_sin + i / 2, cos_sin + (n + i) / 2));
  }
  if (i < n) {
    float cosines[kVecSize / 2] = {}, sines[kVecSize / 2] = {};
    memcpy(cosines, cos_sin + i / 2, (n - i) / 2 * sizeof(float));
    memcpy(sines, cos_sin + (n + i) / 2, (n - i) / 2 * sizeof(float));
    store_first(out + i, turn(load_first(x + i, n - i), cosines, sines), n - i);
  }
}

// x over its scale, which is the result: see kMaxInt8.
template <class T>
float quantize(const T* x, index_t n, int8_t* codes) {
  Vec top = {}, not_finite = {};  // 0 times a number that is not finite is NaN
  for (index_t i = 0; i < n; i += kVecSize) {
    const Vec v = load_up_to(x + i, n - i);
    top = max(top, max(v, -v));
    not_finite = fma(v, Vec{}, not_finite);
  }
  float largest = 0;
  for (int i = 0; i < kVecSize; ++i) largest = top[i] > largest ? top[i] : largest;
  float scale = largest / kMaxInt8;
  if (scale < FLT_MIN) scale = 1;  // as good as zeros
  for (index_t i = 0; i < n; i += kVecSize) {
    store_up_to(codes + i, load_up_to(x + i, n - i) / scale, n - i);
  }
  return scale + sum(not_finite);
}

template <class T>
class Projection {
 public:
  explicit Projection(const MlaProjectParams& p)
      : p_(p),
        head_dim_(p.qk_nope_head_dim + p.qk_rope_head_dim),
        cache_dim_(p.kv_lora_rank + p.qk_rope_head_dim) {}

  void query(index_t head, index_t begin, index_t end) const {
    absorb<kTokens>(head, begin, end);
    for (index_t token = begin; token < end; ++token) {
      rotate(q_proj(token, head) + p_.qk_nope_head_dim, cos_sin(token), p_.qk_rope_head_dim,
             q(token, head) + p_.kv_lora_rank);
    }
  }

  void append(index_t begin, index_t end) const {
    const index_t rank = p_.kv_lora_rank;
    for (index_t token = begin; token < end; ++token) {
      const index_t slot = p_.slot_mapping[token];
      if (slot < 0) continue;
      const index_t block = slot / p_.block_size, offset = slot % p_.block_size;
      const index_t place = block * p_.cache_stride_block + offset * p_.cache_stride_token;
      // For an int8 cache the token is made where it came from, and then quantised.
      T* latent = static_cast<T*>(p_.kv_a_proj) + token * cache_dim_;
      T* cached = p_.cache_scales ? latent : static_cast<T*>(p_.latent_cache) + place;
      if (p_.kv_norm) {
        normalize(latent, static_cast<const T*>(p_.kv_norm), rank, p_.norm_eps, cached);
      } else if (cached != latent) {
        memcpy(cached, latent, rank * sizeof(T));
      }
      rotate(latent + rank, cos_sin(token), p_.qk_rope_head_dim, cached + rank);
      if (p_.cache_scales) {
        float* scales =
            p_.cache_scales + block * p_.scales_stride_block + offset * p_.scales_stride_token;
        int8_t* codes = static_cast<int8_t*>(p_.latent_cache) + place;
        scales[0] = quantize(latent, rank, codes);
        scales[1] = quantize(latent + rank, p_.qk_rope_head_dim, codes + rank);
      }
    }
  }

 private:
  const T* q_proj(index_t token, index_t head) const {
    return static_cast<const T*>(p_.q_proj) + (token * p_.num_heads + head) * head_dim_;
  }

  T* q(index_t token, index_t head) const {
    return static_cast<T*>(p_.q) + (token * p_.num_heads + head) * cache_dim_;
  }

  const float* cos_sin(index_t token) const {
    return p_.cos_sin + p_.positions[token] * p_.qk_rope_head_dim;
  }

  // q_nope W_UK of one head, N tokens at a time and the rest by halves.
  template <int N>
  void absorb(index_t head, index_t begin, index_t end) const {
    float q_nope[N][kDepth];
    index_t token = begin;
    for (; token + N <= end; token += N) {
      index_t depth = -1;  // of the part in q_nope
      const auto load_depth = [&](index_t wanted) {
        if (depth == wanted) return;
        depth = wanted;
        for (int t = 0; t < N; ++t) {
          const T* from = q_proj(token + t, head) + depth;
          const index_t size = min(kDepth, p_.qk_nope_head_dim - depth);
          for (index_t i = 0; i < size; i += kVecSize) {
            store_up_to(q_nope[t] + i, load_up_to(from + i, size - i), size - i);
          }
        }
      };
      absorb_columns<N, kMaxSums / N>(head, token, 0, q_nope, load_depth);
    }
    if constexpr (N > 1) absorb<N / 2>(head, token, end);
  }

  // V vectors of columns at a time and the rest by halves, the last one perhaps partial.
  template <int N, int V, class LoadDepth>
  void absorb_columns(index_t head, index_t token, index_t column, const float (*q_nope)[kDepth],
                      const LoadDepth& load_depth) const {
    constexpr index_t kLeast = V > 1 ? V * kVecSize : 1;
    for (; column + kLeast <= p_.kv_lora_rank; column += V * kVecSize) {
      absorb_block<N, V>(head, token, column, q_nope, load_depth);
    }
    if constexpr (V > 1) absorb_columns<N, V / 2>(head, token, column, q_nope, load_depth);
  }

  template <int N, int V, class LoadDepth>
  void absorb_block(index_t head, index_t token, index_t column, const float (*q_nope)[kDepth],
                    const LoadDepth& load_depth) const {
    const index_t size = V > 1 ? kVecSize : p_.kv_lora_rank - column;
    // The columns that come next, perhaps of the next head: down the rows the hardware's prefetcher
    // does not follow.
    const index_t ahead =
        column + V * kVecSize < p_.kv_lora_rank ? V * kVecSize : p_.w_uk_stride_head - column;
    const T* w_uk = static_cast<const T*>(p_.w_uk) + head * p_.w_uk_stride_head + column;
    Vec sums[N][V] = {};
    for (index_t depth = 0; depth < p_.qk_nope_head_dim; depth += kDepth) {
      load_depth(depth);
      const index_t rows = min(kDepth, p_.qk_nope_head_dim - depth);
      for (index_t k = 0; k < rows; ++k, w_uk += p_.w_uk_stride_row) {
        for (index_t v = 0; v < V * kVecSize; v += kLine) {
          __builtin_prefetch(w_uk + ahead + v, 0, 2);
        }
        Vec numbers[N];
#pragma GCC unroll 8
        for (int t = 0; t < N; ++t) numbers[t] = broadcast(q_nope[t][k]);
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) {
          const Vec w = load_up_to(w_uk + v * kVecSize, size);
#pragma GCC unroll 8
          for (int t = 0; t < N; ++t) sums[t][v] = fma(numbers[t], w, sums[t][v]);
        }
      }
    }
    for (int t = 0; t < N; ++t) {
      T* out = q(token + t, head) + column;
      for (int v = 0; v < V; ++v) store_up_to(out + v * kVecSize, sums[t][v], size);
    }
  }

  static constexpr index_t kLine = 64 / sizeof(T);

  const MlaProjectParams& p_;
  const index_t head_dim_, cache_dim_;
};

}  // namespace

void rms_norm_cpu(const RmsNormParams& p, const ParallelFor& parallel_for) {
  const index_t grain = max(1, kMinWork / max(1, 2 * p.dim));
  with_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    run(parallel_for, 0, p.num_rows, grain, [&](index_t begin, index_t end) {
      for (index_t row = begin; row < end; ++row) {
        normalize(static_cast<const T*>(p.x) + row * p.dim, static_cast<const T*>(p.weight), p.dim,
                  p.eps, static_cast<T*>(p.out) + row * p.dim);
      }
    });
  });
}

void mla_project_cpu(const MlaProjectParams& p, const ParallelFor& parallel_for) {
  // Head by head, so that a worker's blocks share the head's W_UK; the tasks after the last head
  // append to the cache.
  const index_t num_blocks = ceil_div(p.num_tokens, kBlock);
  // Few tokens wait for W_UK, for as long as eight compute.
  const index_t tokens = max(8, min(kBlock, p.num_tokens));
  const index_t work = tokens * p.kv_lora_rank * max(1, p.qk_nope_head_dim);
  const index_t grain = max(1, kMinWork / max(1, work));
  with_dtype(p.dtype, [&](auto zero) {
    const Projection<decltype(zero)> projection(p);
    run(parallel_for, 0, (p.num_heads + 1) * num_blocks, grain, [&](index_t begin, index_t end) {
      for (index_t task = begin; task < end; ++task) {
        const index_t head = task / num_blocks;
        const index_t first = task % num_blocks * kBlock;
        const index_t last = min(first + kBlock, p.num_tokens);
        if (head < p.num_heads) {
          projection.query(head, first, last);
        } else {
          projection.append(first, last);
        }
      }
    });
  });
}

}  // namespace transmla::TRANSMLA_ISA
