// Bulk copies of sm_90: boxes of a matrix in global memory, counted in by a
// barrier in shared memory.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace transmla {

__device__ __forceinline__ void init_barrier(uint32_t barrier, int num_arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(num_arrivals)
               : "memory");
}

// The copy engine sees the barriers, and whatever was written to shared memory,
// from here on.
__device__ __forceinline__ void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// This thread's arrival; the phase then ends when `num_bytes` have been copied.
__device__ __forceinline__ void expect_bytes(uint32_t barrier, int num_bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
               "r"(num_bytes)
               : "memory");
}

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
      "cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::"
      "complete_tx::bytes [%0], "
      "[%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(matrix), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}

// Of a matrix of 16-bit numbers, in boxes as wide as the swizzle; false where
// there is no driver that can.
inline bool make_tensor_map(CUtensorMap* map, const void* matrix, uint64_t rows, uint64_t columns,
                            uint64_t stride, uint32_t box_rows, uint32_t box_columns,
                            CUtensorMapSwizzle swizzle) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                       cudaEnableDefault, &found) != cudaSuccess ||
      found != cudaDriverEntryPointSuccess) {
    return false;
  }
  const uint64_t sizes[] = {columns, rows}, strides[] = {stride * 2};
  const uint32_t box[] = {box_columns, box_rows}, steps[] = {1, 1};
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function)(
             map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(matrix), sizes, strides,
             box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace transmla
