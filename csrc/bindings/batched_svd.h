#pragma once

#include <algorithm>
#include <optional>
#include <tuple>

#include "aten.h"
#include "check.h"
#include "transmla/batched_svd.h"

namespace transmla {

template <class Backend>
std::tuple<Tensor, Tensor, Tensor> batched_svd(const Tensor& a) {
  const Check check("batched_svd", a);
  check.tensor("a", a, {ScalarType::Float, ScalarType::Double},
               {{"num_matrices"}, {"rows"}, {"cols"}}, Strides::kAny);
  const int64_t num_matrices = a.size(0), rows = a.size(1), cols = a.size(2);
  const int64_t k = std::min(rows, cols);

  const Tensor wide = torch::stable::contiguous(to_dtype(a, ScalarType::Double));
  if constexpr (Backend::kOnHost) check.finite("a", wide.const_data_ptr<double>(), wide.numel());
  Tensor u, s, vh;
  if (k > Backend::kMaxSvdShortSide || std::max(rows, cols) > Backend::kMaxSvdLongSide) {
    const std::optional<std::string> driver;
    const auto usv = call_aten<3>("aten::linalg_svd", "", wide, false, driver);
    u = torch::stable::contiguous(usv[0]);
    s = usv[1];
    vh = torch::stable::contiguous(usv[2]);
  } else {
    u = torch::stable::new_empty(wide, {num_matrices, rows, k});
    s = torch::stable::new_empty(wide, {num_matrices, k});
    vh = torch::stable::new_empty(wide, {num_matrices, k, cols});
    BatchedSvdParams params{};
    params.a = wide.const_data_ptr<double>();
    params.u = u.mutable_data_ptr<double>();
    params.s = s.mutable_data_ptr<double>();
    params.vh = vh.mutable_data_ptr<double>();
    params.num_matrices = num_matrices;
    params.rows = rows;
    params.cols = cols;
    Backend::launch(params, wide);
  }
  const ScalarType dtype = a.scalar_type();
  return {to_dtype(u, dtype), to_dtype(s, dtype), to_dtype(vh, dtype)};
}

}  // namespace transmla
