// Bulk copies of sm_90: boxes of a tensor in global memory, counted in by a barrier in shared
// memory.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace transmla {

__device__ __forceinline__ void init_barrier(uint32_t barrier, int num_arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(num_arrivals)
               : "memory");
}

// TMA and wgmma see the barriers, and whatever else this thread wrote to shared memory, from here
// on.
__device__ __forceinline__ void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// This thread's arrival; the phase then ends when `num_bytes` have been copied.
__device__ __forceinline__ void expect_bytes(uint32_t barrier, int num_bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
               "r"(num_bytes)
               : "memory");
}

// Until the phase of this parity has ended. A new barrier is in phase 0, after one of parity 1.
__device__ __forceinline__ void wait_for_phase(uint32_t barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// The box at (row, column); rows that the matrix does not have are zero.
__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap* matrix, int row,
                                         int column, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(matrix), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}

// The box at (`outer`, `inner`, 0, 0, 0); what the tensor does not have is zero.
__device__ __forceinline__ void copy_box_of_five(uint32_t to, const CUtensorMap* tensor, int outer,
                                                 int inner, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cta.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %2, %2, %3, %4}], [%5];" ::"r"(to),
      "l"(tensor), "r"(0), "r"(inner), "r"(outer), "r"(barrier)
      : "memory");
}

// Of a tensor of 16-bit numbers, innermost dimension first and dense; the strides of the others in
// elements. False where there is no driver that can.
template <int kDims>
bool make_tensor_map(CUtensorMap* map, const void* data, const uint64_t (&sizes)[kDims],
                     const uint64_t (&strides)[kDims - 1], const uint32_t (&box)[kDims],
                     CUtensorMapSwizzle swizzle) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                       cudaEnableDefault, &found) != cudaSuccess ||
      found != cudaDriverEntryPointSuccess) {
    return false;
  }
  uint64_t num_bytes[kDims - 1];
  for (int i = 0; i < kDims - 1; ++i) num_bytes[i] = strides[i] * 2;
  uint32_t steps[kDims];
  for (uint32_t& step : steps) step = 1;
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function)(
             map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, kDims, const_cast<void*>(data), sizes,
             num_bytes, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
             CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// In boxes as wide as the swizzle.
inline bool make_tensor_map(CUtensorMap* map, const void* matrix, uint64_t rows, uint64_t columns,
                            uint64_t stride, uint32_t box_rows, uint32_t box_columns,
                            CUtensorMapSwizzle swizzle) {
  return make_tensor_map<2>(map, matrix, {columns, rows}, {stride}, {box_columns, box_rows},
                            swizzle);
}

}  // namespace transmla
