// ptxvm's own encoding of a CUtensorMap: 128 bytes, written by ptxvm.tensor_map() in Python.
#pragma once
#include <cstdint>

namespace ptxvm {

struct TensorMap {
  uint32_t magic;                     // kTensorMagic
  uint8_t elem, rank, swizzle, fill;  // element bytes, 1..5, 0 none 1 32B 2 64B 3 128B, reserved
  uint64_t base;
  uint32_t dim[5];  // innermost first
  uint32_t pad;
  uint64_t stride[4];  // bytes, of dimensions 1..4
  uint16_t box[5];
  uint8_t estride[5];
  uint8_t rest[41];
};
static_assert(sizeof(TensorMap) == 128, "layout");
constexpr uint32_t kTensorMagic = 0x5054584d;

// 16-byte chunks of an address are permuted by the swizzle; bo is the base offset of a wgmma
// descriptor.
inline uint32_t swizzle(uint32_t a, int mode, uint32_t bo = 0) {
  uint32_t row = ((a >> 7) - bo) & 7;
  switch (mode) {
    case 1:
      return a ^ ((row & 1) << 4);
    case 2:
      return a ^ ((row & 3) << 4);
    case 3:
      return a ^ (row << 4);
    default:
      return a;
  }
}

}  // namespace ptxvm
