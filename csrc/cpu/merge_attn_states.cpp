#include "vec.h"

namespace transmla::TRANSMLA_ISA {
namespace {

// An empty part counts for nothing: +inf is what some kernels write for it.
float log_weight(float lse) { return lse == INFINITY ? -INFINITY : lse; }

template <class T>
void merge_row(const T* a, float weight_a, const T* b, float weight_b, T* out, index_t n) {
  // By select, not by product: an empty part may hold anything, and 0 * NaN is NaN.
  const Vec zero = {};
  const auto merged = [&](Vec x, Vec y) {
    return (weight_a == 0 ? zero : x * weight_a) + (weight_b == 0 ? zero : y * weight_b);
  };
  index_t i = 0;
  for (; i + kVecSize <= n; i += kVecSize) store(out + i, merged(load(a + i), load(b + i)));
  if (i < n) {
    store_first(out + i, merged(load_first(a + i, n - i), load_first(b + i, n - i)), n - i);
  }
}

template <class T>
void merge_rows(const MergeAttnStatesParams& p, index_t begin, index_t end) {
  for (index_t row = begin; row < end; ++row) {
    const index_t head = row % p.num_heads;
    const index_t token = row / p.num_heads;
    const index_t lse_index =
        (token / p.seqlen_q * p.num_heads + head) * p.seqlen_q + token % p.seqlen_q;
    const float a = log_weight(p.lse_a[lse_index]);
    const float b = log_weight(p.lse_b[lse_index]);
    const float top = a > b ? a : b;
    const bool empty = top == -INFINITY;
    const float exp_a = empty ? 0 : expf(a - top);
    const float exp_b = empty ? 0 : expf(b - top);
    const float scale = empty ? 0 : 1 / (exp_a + exp_b);
    const index_t offset = row * p.head_dim;
    merge_row(static_cast<const T*>(p.out_a) + offset, exp_a * scale,
              static_cast<const T*>(p.out_b) + offset, exp_b * scale,
              static_cast<T*>(p.out) + offset, p.head_dim);
    p.lse[lse_index] = empty ? -INFINITY : top + logf(exp_a + exp_b);
  }
}

}  // namespace

void merge_attn_states_cpu(const MergeAttnStatesParams& p, const ParallelFor& parallel_for) {
  constexpr index_t kNumbersPerTask = 16384;
  const index_t grain = max(1, kNumbersPerTask / max(p.head_dim, 1));
  with_dtype(p.dtype, [&](auto zero) {
    run(parallel_for, 0, p.batch_size * p.seqlen_q * p.num_heads, grain,
        [&](index_t begin, index_t end) { merge_rows<decltype(zero)>(p, begin, end); });
  });
}

}  // namespace transmla::TRANSMLA_ISA
