#pragma once

#include <optional>

#include "check.h"
#include "transmla/covariance_add.h"

namespace transmla {

template <class Backend>
void covariance_add(const Tensor& acc, const Tensor& x, const std::optional<Tensor>& weight) {
  const Check check("covariance_add_", acc);
  const Dim dim = {"dim", acc.dim() == 3 ? acc.size(2) : -1};
  check.tensor("acc", acc, {ScalarType::Double}, {{"num_groups"}, dim, dim});
  check.tensor("x", x, kFloats, {{"num_tokens"}, {"num_groups", acc.size(0)}, dim},
               Strides::kDenseLastDim);
  if (weight) {
    check.tensor("weight", *weight, {ScalarType::Float}, {{"num_tokens", x.size(0)}});
  }

  CovarianceAddParams params{};
  params.x = x.const_data_ptr();
  params.weight = weight ? weight->const_data_ptr<float>() : nullptr;
  params.acc = acc.mutable_data_ptr<double>();
  params.dtype = dtype_of(x);
  params.num_tokens = x.size(0);
  params.num_groups = x.size(1);
  params.dim = x.size(2);
  params.x_stride_token = x.stride(0);
  params.x_stride_group = x.stride(1);
  Backend::launch(params, x);
}

}  // namespace transmla
