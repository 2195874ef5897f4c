#include "cuda/kernels.h"
#include "cuda/mla_decode/combine.cuh"
#include "cuda/mla_decode/general.cuh"
#include "cuda/mla_decode/splitkv.cuh"
#include "cuda/mla_decode/wgmma_sm90.cuh"

namespace transmla {
namespace {

DeviceLimits current_device() {
  DeviceLimits device{1, 0, false, false};
  int ordinal = 0, major = 0, minor = 0;
  cudaGetDevice(&ordinal);
  cudaDeviceGetAttribute(&device.num_sms, cudaDevAttrMultiProcessorCount, ordinal);
  cudaDeviceGetAttribute(&device.shared_memory, cudaDevAttrMaxSharedMemoryPerBlockOptin, ordinal);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, ordinal);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, ordinal);
  device.has_tma = major >= 9;
#ifdef TRANSMLA_SM90A  // otherwise the kernel is empty
  device.has_wgmma = major == 9 && minor == 0;
#endif
  return device;
}

template <class... Args>
void launch(void (*kernel)(MlaDecodeParams, MlaDecodePlan, Args...), const MlaDecodeParams& p,
            const MlaDecodePlan& plan, cudaStream_t stream, const Args&... args) {
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_memory);
  kernel<<<plan.num_row_blocks * plan.num_parts, plan.num_warps * 32, plan.shared_memory, stream>>>(
      p, plan, args...);
}

// False where the kernel is empty: this library may have been compiled for less than the device is.
template <class Kernel>
bool is_compiled_for_sm90(Kernel kernel) {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90;
}

template <class T, int kRowTiles, int kWarps>
void launch_splitkv(const MlaDecodeParams& p, const MlaDecodePlan& plan, cudaStream_t stream) {
  if (p.cache_scales != nullptr) {
    return launch(mla_decode_splitkv_fp8_kernel<T, kRowTiles, kWarps>, p, plan, stream);
  }
  const auto sm90 = mla_decode_splitkv_sm90_kernel<T, kRowTiles, kWarps>;
  const index_t rows = (p.num_blocks - 1) * plan.rows_of_block + p.block_size;
  const index_t columns = p.kv_lora_rank + p.qk_rope_head_dim;
  CUtensorMap slices, tails;
  const auto make_map = [&](CUtensorMap* map, int box_columns, CUtensorMapSwizzle swizzle) {
    return make_tensor_map(map, p.latent_cache, rows, columns, p.cache_stride_token,
                           plan.box_tokens, box_columns, swizzle);
  };
  if (plan.use_tma && is_compiled_for_sm90(sm90) &&
      make_map(&slices, kSliceColumns, CU_TENSOR_MAP_SWIZZLE_128B) &&
      make_map(&tails, kTailColumns, CU_TENSOR_MAP_SWIZZLE_32B)) {
    launch(sm90, p, plan, stream, slices, tails);
  } else {
    launch(mla_decode_splitkv_sm80_kernel<T, kRowTiles, kWarps>, p, plan, stream);
  }
}

template <class T, int kWarps>
void launch_splitkv(const MlaDecodeParams& p, const MlaDecodePlan& plan, cudaStream_t stream) {
  switch (plan.rows) {
    case 16:
      return launch_splitkv<T, 1, kWarps>(p, plan, stream);
    case 32:
      return launch_splitkv<T, 2, kWarps>(p, plan, stream);
    default:
      return launch_splitkv<T, 3, kWarps>(p, plan, stream);
  }
}

// The cache as [num_blocks, block_size / 8, 9, 8, 64]: a box of 16 tokens is two rows of atoms.
template <class T>
bool launch_wgmma(const MlaDecodeParams& p, const MlaDecodePlan& plan, cudaStream_t stream) {
  const uint64_t groups = p.block_size / 8, blocks = p.num_blocks;
  const uint64_t token = p.cache_stride_token, block = p.cache_stride_block;
  CUtensorMap cache;
  const bool is_made = make_tensor_map<5>(&cache, p.latent_cache, {64, 8, 9, groups, blocks},
                                          {token, 64, 8 * token, block}, {64, 8, 9, 2, 1},
                                          CU_TENSOR_MAP_SWIZZLE_128B);
  if (is_made) launch(mla_decode_wgmma_sm90_kernel<T>, p, plan, stream, cache);
  return is_made;
}

template <class T>
cudaError_t launch_kernels(const MlaDecodeParams& p, const MlaDecodePlan& plan,
                           cudaStream_t stream) {
  if (plan.rows == 1 && p.cache_scales != nullptr) {
    launch(mla_decode_general_kernel<T, fp8>, p, plan, stream);
  } else if constexpr (std::is_same_v<T, float>) {
    launch(mla_decode_general_kernel<T, T>, p, plan, stream);
  } else if (plan.rows == 1) {
    launch(mla_decode_general_kernel<T, T>, p, plan, stream);
  } else if (plan.rows == kWgmmaRows) {
    if (!launch_wgmma<T>(p, plan, stream)) return cudaErrorInsufficientDriver;
  } else if (plan.num_warps == 8) {
    launch_splitkv<T, 8>(p, plan, stream);
  } else {
    launch_splitkv<T, 4>(p, plan, stream);
  }
  if (plan.num_slots == 0) return cudaGetLastError();
  const auto combine =
      p.kv_lora_rank % 4 == 0 ? mla_decode_combine_kernel<T, 4> : mla_decode_combine_kernel<T, 1>;
  combine<<<p.batch_size * p.seqlen_q * p.num_heads, kCombineThreads, 0, stream>>>(p, plan);
  return cudaGetLastError();
}

}  // namespace

const char* mla_decode_cuda_unsupported(const MlaDecodeParams& p) {
  if (p.max_blocks * p.block_size > INT_MAX) return "max_blocks * block_size must be below 2^31";
  if (p.split_size % kTileTokens != 0) return "split_size must be a multiple of 32";
  if (general_shared_bytes(p) > kSharedMemoryOfAll) {
    return "2 * kv_lora_rank + qk_rope_head_dim must be at most 25312";
  }
  return nullptr;
}

size_t mla_decode_cuda_workspace_size(const MlaDecodeParams& p) {
  if (p.batch_size * p.seqlen_q * p.num_heads == 0) return 0;
  const MlaDecodePlan plan = make_mla_decode_plan(p, current_device());
  return plan.num_slots * p.seqlen_q * p.num_heads * (p.kv_lora_rank + 1) * sizeof(float);
}

int launch_mla_decode(const MlaDecodeParams& p, void* stream) {
  if (p.batch_size * p.seqlen_q * p.num_heads == 0) return cudaSuccess;
  const MlaDecodePlan plan = make_mla_decode_plan(p, current_device());
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  switch (p.dtype) {
    case DType::kFloat32:
      return launch_kernels<float>(p, plan, cuda_stream);
    case DType::kBFloat16:
      return launch_kernels<bf16>(p, plan, cuda_stream);
    case DType::kFloat16:
      return launch_kernels<fp16>(p, plan, cuda_stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace transmla
