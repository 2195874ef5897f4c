// Every CUDA launcher. `stream` is a cudaStream_t; the result is a cudaError_t, 0 for success.
#pragma once

#include "transmla/transmla.h"

namespace transmla {

int launch_mla_decode(const MlaDecodeParams& params, void* stream);
// nullptr, or why no kernel can do this shape.
const char* mla_decode_cuda_unsupported(const MlaDecodeParams& params);
// Bytes, on the current device; depends on shapes alone.
size_t mla_decode_cuda_workspace_size(const MlaDecodeParams& params);
int launch_covariance_add(const CovarianceAddParams& params, void* stream);
int launch_merge_attn_states(const MergeAttnStatesParams& params, void* stream);
int launch_mla_project(const MlaProjectParams& params, void* stream);
int launch_rms_norm(const RmsNormParams& params, void* stream);

}  // namespace transmla
