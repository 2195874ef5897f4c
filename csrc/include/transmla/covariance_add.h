// acc += Xᵀ diag(weight) X for a batch of groups, with an fp64 state.
#pragma once

#include "transmla/types.h"

namespace transmla {

struct CovarianceAddParams {
  const void* x;        // [num_tokens, num_groups, dim], last dimension dense
  const float* weight;  // [num_tokens], or nullptr for ones
  double* acc;          // [num_groups, dim, dim], contiguous; symmetric, and stays so
  DType dtype;          // of x

  index_t num_tokens, num_groups, dim;
  index_t x_stride_token, x_stride_group;

  void* workspace;  // covariance_add_cpu_workspace_size() bytes, 64-byte aligned
};

TRANSMLA_API size_t covariance_add_cpu_workspace_size(const CovarianceAddParams& params,
                                                      int num_threads);
TRANSMLA_API void covariance_add_cpu(const CovarianceAddParams& params,
                                     const ParallelFor& parallel_for);

}  // namespace transmla
