#pragma once

#include <algorithm>
#include <cmath>
#include <tuple>

#include "aten.h"
#include "check.h"
#include "transmla/batched_pca.h"

namespace transmla {

// By LAPACK. It gets the transposes' upper triangles: what it calls columns are rows in memory, so
// that nothing has to be turned on the way in, and the reduction takes less time than from `L`.
inline void lapack_pca(const Tensor& cov, double* eigenvalues, double* eigenvectors) {
  const int64_t n = cov.size(2);
  const auto turn = [](const Tensor& x) { return torch::stable::transpose(x, 1, 2); };
  const auto [values, columns] = call_aten<2>("aten::linalg_eigh", "", turn(cov), std::string("U"));
  const Tensor rows = torch::stable::contiguous(turn(columns));
  const double* from = rows.const_data_ptr<double>();
  const double* ascending = values.const_data_ptr<double>();
  constexpr int64_t kCacheLine = 8;
  for (int64_t matrix = 0; matrix < cov.size(0); ++matrix) {
    std::reverse_copy(ascending, ascending + n, eigenvalues);
    for (int64_t next = 0; next < n; next += kCacheLine) {
      const int64_t begin = std::min(next, n - kCacheLine);
      const double* last = from + (n - 1 - begin) * n;
      double largest[kCacheLine] = {};  // the component
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t k = 0; k < kCacheLine; ++k) {
          const double x = last[i - k * n];
          eigenvectors[i * n + begin + k] = x;
          largest[k] = std::abs(x) > std::abs(largest[k]) ? x : largest[k];
        }
      }
      for (double& x : largest) x = std::copysign(1.0, x);
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t k = 0; k < kCacheLine; ++k) eigenvectors[i * n + begin + k] *= largest[k];
      }
    }
    from += n * n;
    ascending += n;
    eigenvalues += n;
    eigenvectors += n * n;
  }
}

// For large matrices on a GPU: cuSOLVER's.
inline std::tuple<Tensor, Tensor> torch_pca(const Tensor& cov) {
  const auto [ascending, columns] = call_aten<2>("aten::linalg_eigh", "", cov, std::string("L"));
  const std::array<int64_t, 1> last = {-1};
  const auto flip = [&](const Tensor& x) {
    return call_aten<1>("aten::flip", "", x, torch::headeronly::IntHeaderOnlyArrayRef(last))[0];
  };
  const Tensor eigenvectors = flip(columns);
  const Tensor magnitudes = call_aten<1>("aten::abs", "", eigenvectors)[0];
  const Tensor largest =
      call_aten<1>("aten::argmax", "", magnitudes, std::optional<int64_t>(-2), true)[0];
  const Tensor components =
      call_aten<1>("aten::gather", "", eigenvectors, int64_t{-2}, largest, false)[0];
  const Tensor signs = call_aten<1>("aten::sign", "", components)[0];
  const Tensor signed_vectors = call_aten<1>("aten::mul", "Tensor", eigenvectors, signs)[0];
  return {flip(ascending), torch::stable::contiguous(signed_vectors)};
}

template <class Backend>
std::tuple<Tensor, Tensor> batched_pca(const Tensor& cov) {
  const Check check("batched_pca", cov);
  const Dim dim = {"dim", cov.dim() == 3 ? cov.size(2) : -1};
  check.tensor("cov", cov, {ScalarType::Float, ScalarType::Double}, {{"num_matrices"}, dim, dim},
               Strides::kAny);

  const Tensor wide = torch::stable::contiguous(to_dtype(cov, ScalarType::Double));
  if constexpr (Backend::kOnHost) {
    for (int64_t row = 0; row < cov.size(0) * dim.size; ++row) {
      check.finite("cov", wide.const_data_ptr<double>() + row * dim.size, row % dim.size + 1);
    }
  }
  Tensor eigenvalues = torch::stable::new_empty(wide, {cov.size(0), dim.size});
  Tensor eigenvectors = torch::stable::empty_like(wide);
  if (dim.size <= Backend::kMaxPcaDim) {
    BatchedPcaParams params{};
    params.cov = wide.const_data_ptr<double>();
    params.eigenvalues = eigenvalues.mutable_data_ptr<double>();
    params.eigenvectors = eigenvectors.mutable_data_ptr<double>();
    params.num_matrices = cov.size(0);
    params.dim = dim.size;
    Backend::launch(params, wide);
  } else if constexpr (Backend::kOnHost) {
    split_batch(wide, [&](int64_t begin, int64_t end) {
      lapack_pca(slice(wide, begin, end), eigenvalues.mutable_data_ptr<double>() + begin * dim.size,
                 eigenvectors.mutable_data_ptr<double>() + begin * dim.size * dim.size);
    });
  } else {
    std::tie(eigenvalues, eigenvectors) = torch_pca(wide);
  }
  return {to_dtype(eigenvalues, cov.scalar_type()), to_dtype(eigenvectors, cov.scalar_type())};
}

}  // namespace transmla
