#pragma once

#include <optional>
#include <vector>

#include "aten.h"
#include "check.h"
#include "transmla/linear.h"

namespace transmla {

template <class Backend>
Tensor linear(const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias) {
  const Check check("linear", x);
  const int64_t dim = x.dim();
  const bool grouped = w.dim() == 3;
  if (grouped) {
    check.tensor("x", x, kFloats, {{"num_tokens"}, {"num_groups"}, {"in_features"}}, Strides::kAny);
    check.tensor("w", w, {x.scalar_type()},
                 {{"num_groups", x.size(1)}, {"out_features"}, {"in_features", x.size(2)}},
                 Strides::kAny);
    if (bias) check.fail("bias must be None where w has groups, got a tensor");
  } else {
    if (dim == 3) {
      check.tensor("x", x, kFloats, {{"batch_size"}, {"seqlen"}, {"in_features"}}, Strides::kAny);
    } else {
      check.tensor("x", x, kFloats, {{"num_tokens"}, {"in_features"}}, Strides::kAny);
    }
    check.tensor("w", w, {x.scalar_type()}, {{"out_features"}, {"in_features", x.size(dim - 1)}},
                 Strides::kAny);
    if (bias) check.tensor("bias", *bias, {x.scalar_type()}, {{"out_features", w.size(0)}});
  }

  const int64_t num_tokens = grouped || dim == 2 ? x.size(0) : x.size(0) * x.size(1);
  if constexpr (Backend::kMaxLinearTokens > 0) {
    const bool dense = x.stride(dim - 1) == 1 && w.stride(w.dim() - 1) == 1 &&
                       (grouped || dim == 2 || x.is_contiguous());
    if (dense && num_tokens <= Backend::kMaxLinearTokens) {
      std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
      sizes.back() = w.size(w.dim() - 2);
      Tensor out = torch::stable::new_empty(x, sizes);
      LinearParams params{};
      params.x = x.const_data_ptr();
      params.w = w.const_data_ptr();
      params.bias = bias ? bias->const_data_ptr() : nullptr;
      params.out = out.mutable_data_ptr();
      params.dtype = dtype_of(x);
      params.num_tokens = num_tokens;
      params.num_groups = grouped ? w.size(0) : 1;
      params.in_features = x.size(dim - 1);
      params.out_features = sizes.back();
      params.x_stride_token = grouped || dim == 2 ? x.stride(0) : params.in_features;
      params.x_stride_group = grouped ? x.stride(1) : 0;
      params.w_stride_group = grouped ? w.stride(0) : 0;
      params.w_stride_row = w.stride(w.dim() - 2);
      Backend::launch(params, x);
      return out;
    }
  }
  if (!grouped) return aten_linear(x, w, bias);
  using torch::stable::transpose;
  const Tensor out = call_aten<1>("aten::bmm", "", transpose(x, 0, 1), transpose(w, 1, 2))[0];
  return torch::stable::contiguous(transpose(out, 0, 1));
}

}  // namespace transmla
