#include "vec.h"

namespace transmla::TRANSMLA_ISA {
namespace {

constexpr int kRows = 4;                          // of w that a pass reads side by side
constexpr int kTokens = kVecBytes == 64 ? 4 : 2;  // that share a pass: its sums stay in registers
constexpr index_t kMinWork = 1 << 15;     // multiply-adds; less is not worth waking a thread
constexpr index_t kPiecesPerWorker = 16;  // cores differ in speed, if only by who else uses them

// Dot products of kRows rows of w and N of x, x_stride apart; meanwhile num_next rows are fetched.
template <int N, class T>
void multiply(const T* const (&w)[kRows], const T* const* next, int num_next, const float* x,
              index_t x_stride, index_t size, float (*out)[kVecSize]) {
  Vec sums[N][kRows] = {};
  const auto add = [&](index_t i, index_t count) {
    Vec rows[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) rows[r] = load_up_to(w[r] + i, count);
#pragma GCC unroll 4
    for (int t = 0; t < N; ++t) {
      const Vec numbers = load_up_to(x + t * x_stride + i, count);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) sums[t][r] = fma(numbers, rows[r], sums[t][r]);
    }
  };
  constexpr index_t kLine = 64 / sizeof(T);
  index_t i = 0;
  for (; i + kLine <= size; i += kLine) {
    // The hardware's prefetcher stops at the end of a page. Into L2: L1 is too small for long rows.
    for (int r = 0; r < num_next; ++r) __builtin_prefetch(next[r] + i, 0, 2);
#pragma GCC unroll 8
    for (index_t v = 0; v < kLine; v += kVecSize) add(i + v, kVecSize);
  }
  for (; i < size; i += kVecSize) add(i, size - i);
  for (int t = 0; t < N; ++t) {
    for (int r = 0; r < kRows; ++r) out[t][r] = sum(sums[t][r]);
  }
}

template <class T>
class Linear {
 public:
  // Widens x, which every row of w is multiplied with.
  explicit Linear(const LinearParams& p)
      : p_(p), stride_token_(p.x_stride_token), stride_group_(p.x_stride_group) {
    if constexpr (sizeof(T) == sizeof(float)) {
      x_ = static_cast<const float*>(p.x);
    } else {
      float* wide = static_cast<float*>(p.workspace);
      for (index_t token = 0; token < p.num_tokens; ++token) {
        for (index_t group = 0; group < p.num_groups; ++group, wide += p.in_features) {
          const T* x = static_cast<const T*>(p.x) + token * stride_token_ + group * stride_group_;
          for (index_t i = 0; i < p.in_features; i += kVecSize) {
            const index_t count = p.in_features - i;
            store_up_to(wide + i, load_up_to(x + i, count), count);
          }
        }
      }
      x_ = static_cast<const float*>(p.workspace);
      stride_group_ = p.in_features;
      stride_token_ = p.num_groups * stride_group_;
    }
  }

  index_t num_blocks() const { return p_.num_groups * blocks_of_group(); }

  // A block is up to kRows rows of a group's w, for all tokens; `next` is the one to fetch.
  void multiply_block(index_t block, index_t next) const {
    const T* w[kRows];
    const T* next_w[kRows];
    locate(block, w);
    locate(next, next_w);
    const index_t first = block % blocks_of_group() * kRows;
    const index_t count = min(kRows, p_.out_features - first);
    tokens<kTokens>(w, next_w, block / blocks_of_group(), first, count, 0);
  }

 private:
  index_t blocks_of_group() const { return ceil_div(p_.out_features, kRows); }

  // The rows of a block; the last one again where it has fewer.
  void locate(index_t block, const T* (&w)[kRows]) const {
    const index_t first = block % blocks_of_group() * kRows;
    for (index_t r = 0; r < kRows; ++r) {
      w[r] = static_cast<const T*>(p_.w) + block / blocks_of_group() * p_.w_stride_group +
             min(first + r, p_.out_features - 1) * p_.w_stride_row;
    }
  }

  // N tokens at a time and the rest by halves.
  template <int N>
  void tokens(const T* const (&w)[kRows], const T* const (&next)[kRows], index_t group,
              index_t first, index_t count, index_t token) const {
    const index_t num_passes =
        p_.num_tokens / kTokens + __builtin_popcount(p_.num_tokens % kTokens);
    const index_t column = group * p_.out_features + first;
    const T* bias = p_.bias ? static_cast<const T*>(p_.bias) + column : nullptr;
    for (; token + N <= p_.num_tokens; token += N) {
      float sums[N][kVecSize] = {};
      // Each pass fetches its share, so that the memory is never idle.
      const index_t pass = token / kTokens + __builtin_popcount(token % kTokens);
      const index_t begin = pass * kRows / num_passes, end = (pass + 1) * kRows / num_passes;
      multiply<N>(w, next + begin, end - begin, x_ + token * stride_token_ + group * stride_group_,
                  stride_token_, p_.in_features, sums);
      for (int t = 0; t < N; ++t) {
        T* out = static_cast<T*>(p_.out) + (token + t) * p_.num_groups * p_.out_features + column;
        const Vec v = bias ? load(sums[t]) + load_up_to(bias, count) : load(sums[t]);
        store_up_to(out, v, count);
      }
    }
    if constexpr (N > 1) tokens<N / 2>(w, next, group, first, count, token);
  }

  const LinearParams& p_;
  const float* x_;
  index_t stride_token_, stride_group_;
};

}  // namespace

size_t linear_cpu_workspace_size(const LinearParams& p, int) {
  if (p.dtype == DType::kFloat32) return 0;
  return p.num_tokens * p.num_groups * p.in_features * sizeof(float);
}

void linear_cpu(const LinearParams& p, const ParallelFor& parallel_for) {
  const index_t work = p.num_groups * p.out_features * p.in_features * p.num_tokens;
  const index_t num_workers = max(1, min(parallel_for.num_threads, ceil_div(work, kMinWork)));
  with_dtype(p.dtype, [&](auto zero) {
    const Linear<decltype(zero)> linear(p);
    const index_t num_blocks = linear.num_blocks();
    const index_t piece = max(1, num_blocks / (kPiecesPerWorker * num_workers));
    index_t taken = 0;
    const auto take = [&] { return __atomic_fetch_add(&taken, piece, __ATOMIC_RELAXED); };
    run(parallel_for, 0, num_workers, 1, [&](index_t begin, index_t end) {
      for (index_t worker = begin; worker < end; ++worker) {
        // The next piece is taken early, so that its first rows can be fetched.
        for (index_t first = take(), next; first < num_blocks; first = next) {
          next = take();
          const index_t last = min(first + piece, num_blocks) - 1;
          for (index_t block = first; block <= last; ++block) {
            linear.multiply_block(block, block < last ? block + 1 : min(next, num_blocks - 1));
          }
        }
      }
    });
  });
}

}  // namespace transmla::TRANSMLA_ISA
