// Every CUDA launcher. `stream` is a cudaStream_t; the result is a cudaError_t, 0 for success.
#pragma once

#include "transmla/transmla.h"

namespace transmla {

int launch_batched_pca(const BatchedPcaParams& params, void* stream);
int launch_batched_svd(const BatchedSvdParams& params, void* stream);
int launch_covariance_add(const CovarianceAddParams& params, void* stream);
int launch_merge_attn_states(const MergeAttnStatesParams& params, void* stream);
int launch_mla_decode(const MlaDecodeParams& params, void* stream);
int launch_mla_project(const MlaProjectParams& params, void* stream);
int launch_rms_norm(const RmsNormParams& params, void* stream);

// Bytes of workspace, on the current device; they depend on shapes alone.
size_t batched_pca_cuda_workspace_size(const BatchedPcaParams& params);
size_t batched_svd_cuda_workspace_size(const BatchedSvdParams& params);
size_t mla_decode_cuda_workspace_size(const MlaDecodeParams& params);

// nullptr, or why no kernel can do this shape.
const char* mla_decode_cuda_unsupported(const MlaDecodeParams& params);

// The largest dim, the largest short side and the largest long side that the kernels take.
constexpr index_t kMaxPcaDim = 256, kMaxSvdShortSide = 128, kMaxSvdLongSide = 512;

}  // namespace transmla
