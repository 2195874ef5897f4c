// x wᵀ + bias for few tokens: each weight is read once, at memory bandwidth.
#pragma once

#include "transmla/types.h"

namespace transmla {

struct LinearParams {
  const void* x;     // [num_tokens, num_groups, in_features], last dimension dense
  const void* w;     // [num_groups, out_features, in_features], last dimension dense
  const void* bias;  // [num_groups, out_features], contiguous, or nullptr
  void* out;         // [num_tokens, num_groups, out_features], contiguous
  void* workspace;   // linear_cpu_workspace_size() bytes
  DType dtype;       // of x, w, bias and out

  index_t num_tokens, num_groups, in_features, out_features;
  // Strides in elements: a slice of kv_b_proj.weight is used in place.
  index_t x_stride_token, x_stride_group, w_stride_group, w_stride_row;
};

TRANSMLA_API size_t linear_cpu_workspace_size(const LinearParams& params, int num_threads);

// A token's bits depend neither on the other tokens nor on the number of threads.
TRANSMLA_API void linear_cpu(const LinearParams& params, const ParallelFor& parallel_for);

}  // namespace transmla
