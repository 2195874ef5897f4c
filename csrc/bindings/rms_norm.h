#pragma once

#include "check.h"
#include "transmla/mla_project.h"

namespace transmla {

template <class Backend>
Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  const Check check("rms_norm", x);
  if (x.dim() == 3) {
    check.tensor("x", x, kFloats, {{"batch_size"}, {"seqlen"}, {"dim"}});
  } else {
    check.tensor("x", x, kFloats, {{"num_rows"}, {"dim"}});
  }
  RmsNormParams params{};
  params.dim = x.size(x.dim() - 1);
  check.tensor("weight", weight, {x.scalar_type()}, {{"dim", params.dim}});
  Tensor out = torch::stable::empty_like(x);
  params.x = x.const_data_ptr();
  params.weight = weight.const_data_ptr();
  params.out = out.mutable_data_ptr();
  params.dtype = dtype_of(x);
  params.num_rows = params.dim > 0 ? x.numel() / params.dim : 0;
  params.eps = static_cast<float>(eps);
  Backend::launch(params, x);
  return out;
}

}  // namespace transmla
