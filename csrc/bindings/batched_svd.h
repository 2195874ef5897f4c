#pragma once

#include <algorithm>
#include <optional>
#include <tuple>

#include "aten.h"
#include "check.h"
#include "transmla/batched_svd.h"

namespace transmla {

// LAPACK's, or cuSOLVER's.
inline std::array<Tensor, 3> torch_svd(const Tensor& a) {
  const std::optional<std::string> driver;
  return call_aten<3>("aten::linalg_svd", "", a, false, driver);
}

// to[c][r] = from[r][c]
inline void write_transposed(const double* from, int64_t rows, int64_t cols, double* to) {
  constexpr int64_t kCacheLine = 8;
  int64_t r = 0;
  for (; r + kCacheLine <= rows; r += kCacheLine) {
    for (int64_t c = 0; c < cols; ++c) {
      for (int64_t i = 0; i < kCacheLine; ++i) to[c * rows + r + i] = from[(r + i) * cols + c];
    }
  }
  for (; r < rows; ++r) {
    for (int64_t c = 0; c < cols; ++c) to[c * rows + r] = from[r * cols + c];
  }
}

// By LAPACK, which takes up to 1.8 times as long for a wide matrix as for its transpose.
inline void lapack_svd(const Tensor& a, double* u, double* s, double* vh) {
  const int64_t count = a.size(0), m = std::max(a.size(1), a.size(2));
  const int64_t n = std::min(a.size(1), a.size(2));
  const bool is_wide = a.size(1) < a.size(2);
  const auto turn = [](const Tensor& x) { return torch::stable::transpose(x, 1, 2); };
  const auto usv = torch_svd(is_wide ? turn(a) : a);
  // LAPACK's columns are rows in memory: [count, n, m] and [count, n, n].
  const Tensor left = torch::stable::contiguous(turn(usv[0]));
  const Tensor right = torch::stable::contiguous(turn(usv[2]));
  const double* lefts = left.const_data_ptr<double>();
  const double* rights = right.const_data_ptr<double>();
  std::copy_n(usv[1].const_data_ptr<double>(), count * n, s);
  if (is_wide) {
    std::copy_n(rights, count * n * n, u);
    std::copy_n(lefts, count * n * m, vh);
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    write_transposed(lefts + i * n * m, n, m, u + i * n * m);
    write_transposed(rights + i * n * n, n, n, vh + i * n * n);
  }
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor> batched_svd(const Tensor& a) {
  const Check check("batched_svd", a);
  check.tensor("a", a, {ScalarType::Float, ScalarType::Double},
               {{"num_matrices"}, {"rows"}, {"cols"}}, Strides::kAny);
  const int64_t num_matrices = a.size(0), rows = a.size(1), cols = a.size(2);
  const int64_t k = std::min(rows, cols);

  const Tensor wide = torch::stable::contiguous(to_dtype(a, ScalarType::Double));
  if constexpr (Backend::kOnHost) check.finite("a", wide.const_data_ptr<double>(), wide.numel());
  Tensor u = torch::stable::new_empty(wide, {num_matrices, rows, k});
  Tensor s = torch::stable::new_empty(wide, {num_matrices, k});
  Tensor vh = torch::stable::new_empty(wide, {num_matrices, k, cols});
  if (k <= Backend::kMaxSvdShortSide && std::max(rows, cols) <= Backend::kMaxSvdLongSide) {
    BatchedSvdParams params{};
    params.a = wide.const_data_ptr<double>();
    params.u = u.mutable_data_ptr<double>();
    params.s = s.mutable_data_ptr<double>();
    params.vh = vh.mutable_data_ptr<double>();
    params.num_matrices = num_matrices;
    params.rows = rows;
    params.cols = cols;
    Backend::launch(params, wide);
  } else if constexpr (Backend::kOnHost) {
    split_batch(wide, [&](int64_t begin, int64_t end) {
      lapack_svd(slice(wide, begin, end), u.mutable_data_ptr<double>() + begin * rows * k,
                 s.mutable_data_ptr<double>() + begin * k,
                 vh.mutable_data_ptr<double>() + begin * k * cols);
    });
  } else {
    const auto usv = torch_svd(wide);
    u = torch::stable::contiguous(usv[0]);
    s = usv[1];
    vh = torch::stable::contiguous(usv[2]);
  }
  const ScalarType dtype = a.scalar_type();
  return {to_dtype(u, dtype), to_dtype(s, dtype), to_dtype(vh, dtype)};
}

}  // namespace transmla
