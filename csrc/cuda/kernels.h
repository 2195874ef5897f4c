// Every CUDA launcher. `stream` is a cudaStream_t; the result is a cudaError_t, 0 for success.
#pragma once

#include "transmla/transmla.h"

namespace transmla {

int launch_merge_attn_states(const MergeAttnStatesParams& params, void* stream);

}  // namespace transmla
