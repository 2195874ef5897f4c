// Every number in use is 0.5, so that every output of attention, which is an average, is 0.5 too.
#pragma once

#include <transmla/transmla.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

inline bool is_half(const std::vector<char>& tensor, transmla::index_t i, transmla::DType dtype) {
  if (dtype == transmla::DType::kFloat32) {
    return std::fabs(reinterpret_cast<const float*>(tensor.data())[i] - 0.5f) < 1e-6f;
  }
  const int bits = reinterpret_cast<const uint16_t*>(tensor.data())[i];
  return std::abs(bits - (dtype == transmla::DType::kFloat16 ? 0x3800 : 0x3f00)) <= 1;
}

// Calls count_wrong(shape, options, dtype) for all of these on every instruction set: an exit code.
template <class Shapes, class Options, class CountWrong>
int sweep(const Shapes& shapes, const Options& options, const CountWrong& count_wrong) {
  using namespace transmla;
  int num_wrong = 0;
  for (Isa isa : {Isa::kScalar, Isa::kNeon, Isa::kAvx2, Isa::kAvx512}) {
    if (!force_isa(isa)) continue;
    for (const auto& shape : shapes) {
      for (const auto& option : options) {
        for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
          num_wrong += count_wrong(shape, option, dtype);
        }
      }
    }
    std::printf("%s: %d wrong numbers\n", isa_name(isa), num_wrong);
  }
  return num_wrong > 0 ? EXIT_FAILURE : EXIT_SUCCESS;
}
