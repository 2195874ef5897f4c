// Products of the tensor cores of sm_90a: four warps issue one together, and it runs on its own.
//
// Operands in shared memory are atoms of 8 rows of 128 bytes, swizzled as swizzle<128>() and TMA
// do.
#pragma once

#include "cuda/common/dtype.cuh"

namespace transmla {

constexpr int kAtomBytes = 8 * 128;

// Operand at `address`; `across` and `down` are the bytes to the atom of the next 64 columns and to
// that of the next 8 rows. (PTX ISA, "Matrix descriptor": these are its leading and stride offsets
// where the sum's dimension lies along the rows. Where the depth does, one atom is as deep as it
// goes, and `across` is not used.)
__device__ __forceinline__ uint64_t describe(uint32_t address, int across, int down) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  const auto field = [](int bytes) { return static_cast<uint64_t>((bytes & 0x3ffff) >> 4); };
  return kSwizzle128 | field(down) << 32 | field(across) << 16 | field(address);
}

// The compiler moves no use of these registers past this place.
template <int kSize>
__device__ __forceinline__ void pin(float (&registers)[kSize]) {
#pragma unroll
  for (float& x : registers) asm volatile("" : "+f"(x)::"memory");
}

template <int kSize>
__device__ __forceinline__ void pin(uint32_t (&registers)[kSize]) {
#pragma unroll
  for (uint32_t& x : registers) asm volatile("" : "+r"(x)::"memory");
}

// Before products that add to `sum`; what else they take from registers has to be pinned already.
template <int kSize>
__device__ __forceinline__ void begin_products(float (&sum)[kSize]) {
  pin(sum);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// Until the products that were issued since begin_products() are in `sum`.
template <int kSize>
__device__ __forceinline__ void finish_products(float (&sum)[kSize]) {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  pin(sum);
}

#define TRANSMLA_8(x, i)                                                                      \
  "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3]), "+f"(x[i + 4]), "+f"(x[i + 5]), \
      "+f"(x[i + 6]), "+f"(x[i + 7])
#define TRANSMLA_32(x, i) \
  TRANSMLA_8(x, i), TRANSMLA_8(x, i + 8), TRANSMLA_8(x, i + 16), TRANSMLA_8(x, i + 24)

// The last four: add to the sum, negate neither operand, depth of b along its columns.
#define TRANSMLA_WGMMA_64(type)                                                              \
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                   \
               "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "     \
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, " \
               "%31}, %32, %33, 1, 1, 1, 0, 0;"                                              \
               : TRANSMLA_32(sum, 0)                                                         \
               : "l"(a), "l"(b))

// sum [64, 64] += a [64, 16] b [64, 16]^T. Lane 4 g + i of warp w holds of `sum`, in fours, the
// columns 8 j + 2 i, + 1 of rows 16 w + g and 16 w + g + 8.
template <class T>
__device__ __forceinline__ void multiply_add(float (&sum)[32], uint64_t a, uint64_t b) {
  if constexpr (std::is_same_v<T, bf16>) {
    TRANSMLA_WGMMA_64("bf16");
  } else {
    TRANSMLA_WGMMA_64("f16");
  }
}

#define TRANSMLA_WGMMA_256(type)                                                             \
  asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type                  \
               "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "     \
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, " \
               "%31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, " \
               "%46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, " \
               "%61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, " \
               "%76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, " \
               "%91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, " \
               "%105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, "    \
               "%117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "         \
               "{%128, %129, %130, %131}, %132, 1, 1, 1, 1;"                                 \
               : TRANSMLA_32(sum, 0), TRANSMLA_32(sum, 32), TRANSMLA_32(sum, 64),            \
                 TRANSMLA_32(sum, 96)                                                        \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

// sum [64, 256] += a [64, 16] b [16, 256]; of `a`, lanes hold what they hold of a sum's 16 columns.
template <class T>
__device__ __forceinline__ void multiply_add(float (&sum)[128], const uint32_t (&a)[4],
                                             uint64_t b) {
  if constexpr (std::is_same_v<T, bf16>) {
    TRANSMLA_WGMMA_256("bf16");
  } else {
    TRANSMLA_WGMMA_256("f16");
  }
}

#undef TRANSMLA_8
#undef TRANSMLA_32
#undef TRANSMLA_WGMMA_64
#undef TRANSMLA_WGMMA_256

}  // namespace transmla
