#pragma once

#include <tuple>

#include "aten.h"
#include "check.h"
#include "transmla/batched_pca.h"

namespace transmla {

// For large matrices: LAPACK's, or cuSOLVER's.
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
  Tensor eigenvalues, eigenvectors;
  if (dim.size > Backend::kMaxPcaDim) {
    std::tie(eigenvalues, eigenvectors) = torch_pca(wide);
  } else {
    eigenvalues = torch::stable::new_empty(wide, {cov.size(0), dim.size});
    eigenvectors = torch::stable::empty_like(wide);
    BatchedPcaParams params{};
    params.cov = wide.const_data_ptr<double>();
    params.eigenvalues = eigenvalues.mutable_data_ptr<double>();
    params.eigenvectors = eigenvectors.mutable_data_ptr<double>();
    params.num_matrices = cov.size(0);
    params.dim = dim.size;
    Backend::launch(params, wide);
  }
  return {to_dtype(eigenvalues, cov.scalar_type()), to_dtype(eigenvectors, cov.scalar_type())};
}

}  // namespace transmla
