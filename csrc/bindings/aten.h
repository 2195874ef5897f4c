// torch's own ops, through the stable ABI.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>

// MKL's thread limit of the calling thread alone, 0 for none; gives the one before. Not every torch
// has MKL, and not every one that has it lets others call this.
extern "C" __attribute__((weak)) int MKL_Set_Num_Threads_Local(int num_threads);

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

// While it lives, LAPACK takes one thread for what the calling thread asks of it.
class SerialLapack {
 public:
  SerialLapack() {
    torch::stable::get_num_threads();  // the first time in a thread, torch sets MKL's own limit
    before_ = MKL_Set_Num_Threads_Local(1);
  }
  ~SerialLapack() { MKL_Set_Num_Threads_Local(before_); }
  SerialLapack(const SerialLapack&) = delete;
  SerialLapack& operator=(const SerialLapack&) = delete;

 private:
  int before_;
};

// body(begin, end) for parts of a batch of matrices, each with one thread in LAPACK: several on one
// small matrix mostly wait for each other, a hundred times longer if the machine is busy. Only
// large ones that are fewer than the threads get them all. MKL has to be told: in a parallel region
// it counts on threads that it does not get, and is wrong from a dimension of 512 on; where it
// cannot be, the batch stays whole. The body must not change a tensor by an op of torch: torch's
// inference mode does not reach the workers.
template <class Body>
void split_batch(const Tensor& matrices, const Body& body) {
  constexpr int64_t kLargeDim = 512;
  constexpr int64_t kPartSize = 1 << 17;  // numbers: 1 MB
  const int64_t count = matrices.size(0), rows = matrices.size(1), cols = matrices.size(2);
  const int64_t part = std::max<int64_t>(1, kPartSize / std::max<int64_t>(1, rows * cols));
  const bool few_large_ones =
      std::min(rows, cols) >= kLargeDim && count < torch::stable::get_num_threads();
  if (!MKL_Set_Num_Threads_Local || few_large_ones) return body(0, count);
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    const SerialLapack serial;
    for (; begin < end; begin += part) body(begin, std::min(begin + part, end));
  });
}

// x[begin:end]
inline Tensor slice(Tensor x, int64_t begin, int64_t end) {
  return torch::stable::narrow(x, 0, begin, end - begin);
}

inline Tensor to_dtype(const Tensor& x, torch::headeronly::ScalarType dtype) {
  return x.scalar_type() == dtype ? x : torch::stable::to(x, dtype);
}

}  // namespace transmla
