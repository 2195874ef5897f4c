// Eigen-decomposition of many symmetric positive semi-definite matrices.
#pragma once

#include "transmla/types.h"

namespace transmla {

struct BatchedPcaParams {
  const double* cov;  // [num_matrices, dim, dim], contiguous, symmetric; the lower triangle is read
  double* eigenvalues;   // [num_matrices, dim], descending
  double* eigenvectors;  // [num_matrices, dim, dim], one a column, largest component positive

  index_t num_matrices, dim;

  void* workspace;  // batched_pca_cpu_workspace_size() bytes, 64-byte aligned
};

// A matrix that holds an infinity or a NaN gives NaN.
TRANSMLA_API size_t batched_pca_cpu_workspace_size(const BatchedPcaParams& params, int num_threads);
TRANSMLA_API void batched_pca_cpu(const BatchedPcaParams& params, const ParallelFor& parallel_for);

}  // namespace transmla
