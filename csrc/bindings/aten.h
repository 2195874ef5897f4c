// torch's own ops, through the stable ABI.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>

namespace transmla {

using torch::stable::Tensor;

// What aten::<op>.<overload> puts on the stack. `kOutputs` is the number of its results; no
// argument may be left out, not even one with a default.
template <size_t kOutputs, class... Args>
std::array<Tensor, kOutputs> call_aten(const char* op, const char* overload, const Args&... args) {
  std::array<StableIValue, std::max(kOutputs, sizeof...(Args))> stack{
      torch::stable::detail::from(args)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, overload, stack.data(), TORCH_ABI_VERSION));
  std::array<Tensor, kOutputs> outputs;
  for (size_t i = 0; i < kOutputs; ++i) outputs[i] = torch::stable::detail::to<Tensor>(stack[i]);
  return outputs;
}

// x wᵀ + bias
inline Tensor aten_linear(const Tensor& x, const Tensor& w,
                          const std::optional<Tensor>& bias = std::nullopt) {
  return call_aten<1>("aten::linear", "", x, w, bias)[0];
}

inline Tensor to_dtype(const Tensor& x, torch::headeronly::ScalarType dtype) {
  return x.scalar_type() == dtype ? x : torch::stable::to(x, dtype);
}

}  // namespace transmla
