// Thin singular value decomposition of many matrices.
#pragma once

#include "transmla/types.h"

namespace transmla {

struct BatchedSvdParams {
  const double* a;  // [num_matrices, rows, cols], contiguous
  double* u;        // [num_matrices, rows, k], k = min(rows, cols)
  double* s;        // [num_matrices, k], descending
  double* vh;       // [num_matrices, k, cols]

  index_t num_matrices, rows, cols;

  void* workspace;  // batched_svd_cpu_workspace_size() bytes, 64-byte aligned
};

// A matrix that holds an infinity or a NaN gives NaN.
TRANSMLA_API size_t batched_svd_cpu_workspace_size(const BatchedSvdParams& params, int num_threads);
TRANSMLA_API void batched_svd_cpu(const BatchedSvdParams& params, const ParallelFor& parallel_for);

}  // namespace transmla
