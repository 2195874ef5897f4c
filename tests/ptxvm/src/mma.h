// Matrix helpers shared by mma.sync and wgmma.
#pragma once
#include <type_traits>

#include "decode.h"

namespace ptxvm {

enum Elem { E_F16, E_BF16, E_TF32, E_E4M3, E_E5M2, E_S8, E_U8, E_F64, E_F32, E_S32 };
int elemKind(const std::string& t);
int elemBytes(int k);
extern const struct Fp8Table {
  float e4[256], e5[256];
  Fp8Table();
} fp8Table;

template <int K>
inline double elemAt(const uint8_t* p) {
  if constexpr (K == E_F16)
    return toF(*(const f16_t*)p);
  else if constexpr (K == E_BF16)
    return toF(*(const bf16_t*)p);
  else if constexpr (K == E_TF32)
    return tf32Trunc(*(const float*)p);
  else if constexpr (K == E_E4M3)
    return fp8Table.e4[*p];
  else if constexpr (K == E_E5M2)
    return fp8Table.e5[*p];
  else if constexpr (K == E_S8)
    return (int8_t)*p;
  else if constexpr (K == E_U8)
    return *p;
  else if constexpr (K == E_F64)
    return *(const double*)p;
  else
    return *(const float*)p;
}
// Call f with the element kind as a compile-time constant.
template <class F>
inline void withKind(int k, F f) {
  switch (k) {
    case E_F16:
      f(std::integral_constant<int, E_F16>());
      break;
    case E_BF16:
      f(std::integral_constant<int, E_BF16>());
      break;
    case E_TF32:
      f(std::integral_constant<int, E_TF32>());
      break;
    case E_E4M3:
      f(std::integral_constant<int, E_E4M3>());
      break;
    case E_E5M2:
      f(std::integral_constant<int, E_E5M2>());
      break;
    case E_S8:
      f(std::integral_constant<int, E_S8>());
      break;
    case E_U8:
      f(std::integral_constant<int, E_U8>());
      break;
    case E_F64:
      f(std::integral_constant<int, E_F64>());
      break;
    default:
      f(std::integral_constant<int, E_F32>());
  }
}
void matmulAcc(double* acc, const double* a, const double* b, int M, int N, int K);

}  // namespace ptxvm
