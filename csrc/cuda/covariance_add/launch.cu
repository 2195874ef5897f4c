#include "cuda/covariance_add/accumulate.cuh"
#include "cuda/kernels.h"

namespace transmla {
namespace {

unsigned num_blocks(const CovarianceAddParams& p, index_t tile) {
  const index_t num_tiles = (p.dim + tile - 1) / tile;
  return static_cast<unsigned>(p.num_groups * num_tiles * (num_tiles + 1) / 2);
}

template <class T>
cudaError_t accumulate(const CovarianceAddParams& p, cudaStream_t stream) {
  if constexpr (!std::is_same_v<T, float>) {
    const bool whole_chunks =
        (p.dim | p.x_stride_token | p.x_stride_group | reinterpret_cast<uintptr_t>(p.x) / 2) % 8 ==
        0;
    if (whole_chunks && !p.weight) {
      const cudaError_t error = cudaFuncSetAttribute(
          covariance_add_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, kTensorCoreSmem);
      if (error != cudaSuccess) return error;
      covariance_add_kernel<T><<<num_blocks(p, kTile), kThreads, kTensorCoreSmem, stream>>>(p);
      return cudaGetLastError();
    }
  }
  covariance_add_plain_kernel<T><<<num_blocks(p, kPlainTile), kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

int launch_covariance_add(const CovarianceAddParams& params, void* stream) {
  if (params.num_tokens * params.num_groups * params.dim == 0) return cudaSuccess;
  const auto on = static_cast<cudaStream_t>(stream);
  switch (params.dtype) {
    case DType::kFloat32:
      return accumulate<float>(params, on);
    case DType::kBFloat16:
      return accumulate<bf16>(params, on);
    case DType::kFloat16:
      return accumulate<fp16>(params, on);
  }
  return cudaErrorInvalidValue;
}

}  // namespace transmla
