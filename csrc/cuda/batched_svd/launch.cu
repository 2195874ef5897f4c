// One-sided Jacobi on the long columns of A, with the identity below them: turned along, it becomes
// the singular vectors of the short side. A wide matrix is decomposed as its transpose.
#include "cuda/common/jacobi.cuh"
#include "cuda/kernels.h"

namespace transmla {
namespace {

static_assert(kMaxSvdShortSide <= kMaxColumns);

// Makes a unit vector, orthogonal to all others, of a column of zeros; `dots` has room for them
// all.
__device__ void complete(const Columns& c, int zero, double* dots) {
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  double* x = column(c, zero);
  // The coordinate whose unit vector is farthest from the span of the columns.
  double uncovered = -1;
  for (int i = threadIdx.x; i < c.product_length; i += kJacobiThreads) {
    double rest = 1;
    for (int k = 0; k < c.count; ++k) rest -= column(c, k)[i] * column(c, k)[i];
    uncovered = fmax(uncovered, rest);
    x[i] = rest;
  }
  const double farthest = block_max(uncovered);
  __shared__ int at;
  if (threadIdx.x == 0) {
    at = 0;
    while (x[at] != farthest) ++at;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < c.product_length; i += kJacobiThreads) x[i] = i == at;
  for (int pass = 0; pass < 2; ++pass) {  // the second removes the rounding of the first
    __syncthreads();
    for (int k = warp; k < c.count; k += kJacobiWarps) {
      double dot = 0;
      for (int i = lane; i < c.product_length; i += 32) dot += x[i] * column(c, k)[i];
      dot = warp_sum(dot);
      if (lane == 0) dots[k] = k == zero ? 0 : dot;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < c.product_length; i += kJacobiThreads) {
      double rest = x[i];
      for (int k = 0; k < c.count; ++k) rest -= dots[k] * column(c, k)[i];
      x[i] = rest;
    }
  }
  __syncthreads();
  const double length = sqrt(squared_length(c, zero));
  __syncthreads();
  for (int i = threadIdx.x; i < c.product_length; i += kJacobiThreads) x[i] /= length;
  __syncthreads();
}

// One block decomposes one matrix.
__global__ void __launch_bounds__(kJacobiThreads, 1)
    batched_svd_kernel(const __grid_constant__ BatchedSvdParams p, int group) {
  extern __shared__ double smem[];
  __shared__ double lengths[kMaxColumns], dots[kMaxColumns];
  const bool tall = p.rows >= p.cols;
  const int m = static_cast<int>(tall ? p.rows : p.cols);
  const int n = static_cast<int>(tall ? p.cols : p.rows);
  const index_t matrix = blockIdx.x;
  const double* a = p.a + matrix * m * n;
  double* u = p.u + matrix * p.rows * n;
  double* s = p.s + matrix * n;
  double* vh = p.vh + matrix * n * p.cols;

  double largest = 0;
  for (int i = threadIdx.x; i < m * n; i += kJacobiThreads) {
    const double size = fabs(a[i]);
    largest = isfinite(size) ? fmax(largest, size) : NAN;
    if (isnan(largest)) break;
  }
  const double top = block_max(largest);
  if (isnan(top)) {
    for (int i = threadIdx.x; i < n; i += kJacobiThreads) s[i] = top;
    for (int i = threadIdx.x; i < p.rows * n; i += kJacobiThreads) u[i] = top;
    for (int i = threadIdx.x; i < n * p.cols; i += kJacobiThreads) vh[i] = top;
    return;
  }

  const double scale = balance(top);
  const Columns c = {static_cast<double*>(p.workspace) + matrix * n * (m + n), n, m + n, m};
  for (int i = threadIdx.x; i < n * (m + n); i += kJacobiThreads) {
    const int row = i % (m + n), col = i / (m + n);
    c.data[i] = row >= m ? row - m == col : scale * (tall ? a[row * n + col] : a[col * m + row]);
  }
  __syncthreads();
  orthogonalize(c, group, smem);

  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  for (int k = warp; k < n; k += kJacobiWarps) {
    const double squares = squared_length(c, k);
    const double length = squares < kNothing ? 0 : sqrt(squares);
    for (int i = lane; i < m; i += 32) column(c, k)[i] *= length > 0 ? 1 / length : 0;
    if (lane == 0) lengths[k] = length;
  }
  __syncthreads();
  for (int k = 0; k < n; ++k) {
    if (lengths[k] == 0) complete(c, k, dots);
  }
  for (int k = warp; k < n; k += kJacobiWarps) {
    const int rank = rank_of(lengths, k, n);
    const double* left = column(c, k);
    const double* right = left + m;
    if (lane == 0) s[rank] = lengths[k] / scale;
    for (int i = lane; i < m; i += 32) (tall ? u[i * n + rank] : vh[rank * m + i]) = left[i];
    for (int i = lane; i < n; i += 32) (tall ? vh[rank * n + i] : u[i * n + rank]) = right[i];
  }
}

}  // namespace

size_t batched_svd_cuda_workspace_size(const BatchedSvdParams& p) {
  const index_t k = p.rows < p.cols ? p.rows : p.cols;
  return p.num_matrices * k * (p.rows + p.cols) * sizeof(double);
}

int launch_batched_svd(const BatchedSvdParams& params, void* stream) {
  if (params.num_matrices * params.rows * params.cols == 0) return cudaSuccess;
  const index_t k = params.rows < params.cols ? params.rows : params.cols;
  if (k > kMaxSvdShortSide) return cudaErrorInvalidValue;
  return launch_jacobi(batched_svd_kernel, params, k, params.rows + params.cols, stream);
}

}  // namespace transmla
