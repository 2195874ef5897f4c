// The public CPU entry points: each runs the kernel of the active instruction set.
#include "kernels.h"

#if defined(__x86_64__)
#define TRANSMLA_DISPATCH(call) \
  switch (active_isa()) {       \
    case Isa::kAvx512:          \
      return avx512::call;      \
    case Isa::kAvx2:            \
      return avx2::call;        \
    default:                    \
      return scalar::call;      \
  }
#elif defined(__aarch64__)
#define TRANSMLA_DISPATCH(call) return neon::call
#else
#define TRANSMLA_DISPATCH(call) return scalar::call
#endif

namespace transmla {
namespace {

constexpr const char* kNoFp8 =
    "a float8_e4m3fn latent_cache is for CUDA, on the CPU it must be int8, or of "
    "the dtype of the other tensors without cache_scales";

}  // namespace

ParallelFor serial() {
  return {[](void*, index_t begin, index_t end, index_t, ParallelFor::Body body, void* context) {
            if (begin < end) body(context, begin, end);
          },
          nullptr, 1};
}

const char* mla_decode_unsupported(const MlaDecodeParams& params) {
  if (params.kv_lora_rank < 1) return "kv_lora_rank must be at least 1";
  if (params.qk_rope_head_dim < 0) return "qk_rope_head_dim must be at least 0";
  return params.cache_scales && !params.is_cache_int8 ? kNoFp8 : nullptr;
}

const char* mla_project_unsupported(const MlaProjectParams& params) {
  return params.cache_scales && !params.is_cache_int8 ? kNoFp8 : nullptr;
}

size_t mla_decode_cpu_workspace_size(const MlaDecodeParams& params, int num_threads) {
  TRANSMLA_DISPATCH(mla_decode_cpu_workspace_size(params, num_threads));
}

void mla_decode_cpu(const MlaDecodeParams& params, const ParallelFor& parallel_for) {
  TRANSMLA_DISPATCH(mla_decode_cpu(params, parallel_for));
}

size_t mla_prefill_cpu_workspace_size(const MlaPrefillParams& params, int num_threads) {
  TRANSMLA_DISPATCH(mla_prefill_cpu_workspace_size(params, num_threads));
}

void mla_prefill_cpu(const MlaPrefillParams& params, const ParallelFor& parallel_for) {
  TRANSMLA_DISPATCH(mla_prefill_cpu(params, parallel_for));
}

void merge_attn_states_cpu(const MergeAttnStatesParams& params, const ParallelFor& parallel_for) {
  TRANSMLA_DISPATCH(merge_attn_states_cpu(params, parallel_for));
}

size_t linear_cpu_workspace_size(const LinearParams& params, int num_threads) {
  TRANSMLA_DISPATCH(linear_cpu_workspace_size(params, num_threads));
}

void linear_cpu(const LinearParams& params, const ParallelFor& parallel_for) {
  TRANSMLA_DISPATCH(linear_cpu(params, parallel_for));
}

void rms_norm_cpu(const RmsNormParams& params, const ParallelFor& parallel_for) {
  TRANSMLA_DISPATCH(rms_norm_cpu(params, parallel_for));
}

void mla_project_cpu(const MlaProjectParams& params, const ParallelFor& parallel_for) {
  TRANSMLA_DISPATCH(mla_project_cpu(params, parallel_for));
}

size_t covariance_add_cpu_workspace_size(const CovarianceAddParams& params, int num_threads) {
  TRANSMLA_DISPATCH(covariance_add_cpu_workspace_size(params, num_threads));
}

void covariance_add_cpu(const CovarianceAddParams& params, const ParallelFor& parallel_for) {
  TRANSMLA_DISPATCH(covariance_add_cpu(params, parallel_for));
}

size_t batched_pca_cpu_workspace_size(const BatchedPcaParams& params, int num_threads) {
  TRANSMLA_DISPATCH(batched_pca_cpu_workspace_size(params, num_threads));
}

void batched_pca_cpu(const BatchedPcaParams& params, const ParallelFor& parallel_for) {
  TRANSMLA_DISPATCH(batched_pca_cpu(params, parallel_for));
}

size_t batched_svd_cpu_workspace_size(const BatchedSvdParams& params, int num_threads) {
  TRANSMLA_DISPATCH(batched_svd_cpu_workspace_size(params, num_threads));
}

void batched_svd_cpu(const BatchedSvdParams& params, const ParallelFor& parallel_for) {
  TRANSMLA_DISPATCH(batched_svd_cpu(params, parallel_for));
}

}  // namespace transmla
