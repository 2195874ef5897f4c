// Eigenvectors of A are those of A + shift I = L Lᵀ, and they are the columns of L made orthogonal
// by turning: one matrix, no second one for the rotations, and few sweeps (Veselić & Hari, Numer.
// Math. 56, 1989).
#include "cuda/common/jacobi.cuh"
#include "cuda/kernels.h"

namespace transmla {
namespace {

static_assert(kMaxPcaDim <= kMaxColumns && kMaxPcaDim <= kJacobiThreads, "a thread has a row");

// Columns of L; false when a pivot is not positive. A thread has a row.
__device__ bool factor(const double* cov, int n, double scale, double shift, const Columns& l) {
  __shared__ double pivot;
  const int row = threadIdx.x;
  for (int k = 0; k < n; ++k) {
    double sum = 0;
    if (k <= row && row < n) {
      sum = scale * cov[row * n + k] + (row == k ? shift : 0);
      for (int j = 0; j < k; ++j) sum -= column(l, j)[row] * column(l, j)[k];
    }
    if (row == k) pivot = sum;
    __syncthreads();
    if (!(pivot > 0)) {
      __syncthreads();  // before another call writes the pivot
      return false;
    }
    if (row < n) column(l, k)[row] = row == k ? sqrt(pivot) : sum / sqrt(pivot);
    __syncthreads();
  }
  return true;
}

// One block decomposes one matrix.
__global__ void __launch_bounds__(kJacobiThreads, 1)
    batched_pca_kernel(const __grid_constant__ BatchedPcaParams p, int group) {
  extern __shared__ double smem[];
  __shared__ double eigenvalues[kMaxColumns];
  const int n = static_cast<int>(p.dim);
  const index_t offset = static_cast<index_t>(blockIdx.x) * n * n;
  const double* cov = p.cov + offset;
  double* vectors = p.eigenvectors + offset;
  double* values = p.eigenvalues + static_cast<index_t>(blockIdx.x) * n;

  double largest = 0;
  for (int i = threadIdx.x; i < n * n; i += kJacobiThreads) {
    if (i % n > i / n) continue;
    const double size = fabs(cov[i]);
    largest = isfinite(size) ? fmax(largest, size) : NAN;
    if (isnan(largest)) break;
  }
  const double top = block_max(largest);
  if (isnan(top) || top == 0) {
    for (int i = threadIdx.x; i < n; i += kJacobiThreads) values[i] = top;
    for (int i = threadIdx.x; i < n * n; i += kJacobiThreads) {
      vectors[i] = isnan(top) ? top : i % n == i / n;
    }
    return;
  }

  const double scale = balance(top);
  const Columns l = {static_cast<double*>(p.workspace) + offset, n, n, n};
  // Of a semi-definite matrix rounding may take this from a pivot; an indefinite one needs more.
  double shift = 4 * n * DBL_EPSILON * scale * top;
  while (!factor(cov, n, scale, shift, l)) shift = fmax(2 * shift, scale * top);
  orthogonalize(l, group, smem);

  const int lane = threadIdx.x % 32;
  for (int k = threadIdx.x / 32; k < n; k += kJacobiWarps) {
    const double squares = squared_length(l, k);
    if (lane == 0) eigenvalues[k] = squares;
  }
  __syncthreads();
  for (int k = threadIdx.x / 32; k < n; k += kJacobiWarps) {
    const int rank = rank_of(eigenvalues, k, n);
    double size = 0;
    int largest_at = n;
    for (int i = lane; i < n; i += 32) {
      if (fabs(column(l, k)[i]) > size) size = fabs(column(l, k)[i]), largest_at = i;
    }
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      const double other = __shfl_xor_sync(kAllLanes, size, lanes);
      const int other_at = __shfl_xor_sync(kAllLanes, largest_at, lanes);
      if (other > size || (other == size && other_at < largest_at)) {
        size = other;
        largest_at = other_at;
      }
    }
    const double unit = copysign(1 / sqrt(eigenvalues[k]), column(l, k)[largest_at]);
    for (int i = lane; i < n; i += 32) vectors[i * n + rank] = unit * column(l, k)[i];
    if (lane == 0) values[rank] = (eigenvalues[k] - shift) / scale;
  }
}

}  // namespace

size_t batched_pca_cuda_workspace_size(const BatchedPcaParams& p) {
  return p.num_matrices * p.dim * p.dim * sizeof(double);
}

int launch_batched_pca(const BatchedPcaParams& params, void* stream) {
  if (params.num_matrices * params.dim == 0) return cudaSuccess;
  if (params.dim > kMaxPcaDim) return cudaErrorInvalidValue;
  return launch_jacobi(batched_pca_kernel, params, params.dim, params.dim, stream);
}

}  // namespace transmla
