// Pivoted Householder QR, then one-sided Jacobi on the rows of R (Drmač & Veselić, SIAM J. Matrix
// Anal. Appl. 29, 2008): after the pivoting they are nearly orthogonal, so few sweeps are needed.
// A wide matrix is decomposed as its transpose.
#include "linalg.h"

namespace transmla::TRANSMLA_ISA {
namespace {

struct Workspace {
  double* columns;  // [short, long], the tall matrix by columns; then the vectors of its QR
  double* left;     // [short, long], singular vectors of the long side, one a row
  double* right;    // [short, short], rows of R; then singular vectors of the short side
  double* tau;      // [short]
  double* lengths;  // [short], squared, of the rows of `right`; then the singular values
  index_t* pivots;  // [short], the matrix's column in each place
  index_t* order;   // [short]
};

// A P = Q R: Q as reflections in `columns`, R in `right`.
void factor_qr(const Workspace& w, index_t n, index_t m) {
  for (index_t k = 0; k < n; ++k) w.pivots[k] = k;
  memset(w.right, 0, n * n * sizeof(double));
  for (index_t k = 0; k < n; ++k) {
    index_t pivot = k;
    double longest = -1;
    for (index_t j = k; j < n; ++j) {
      const double length = dot(w.columns + j * m + k, w.columns + j * m + k, m - k);
      if (length > longest) longest = length, pivot = j;
    }
    if (pivot != k) {
      swap(w.columns + k * m, w.columns + pivot * m, m);
      const index_t moved = w.pivots[k];
      w.pivots[k] = w.pivots[pivot];
      w.pivots[pivot] = moved;
    }
    double* v = w.columns + k * m + k;
    const Reflection h = reflect(v, m - k, 0);
    w.tau[k] = h.tau;
    w.right[k * n + k] = h.norm;
    for (index_t j = k + 1; j < n; ++j) {
      double* column = w.columns + j * m + k;
      add_scaled(column, -h.tau * dot(column, v, m - k), v, m - k);
    }
  }
  for (index_t k = 0; k < n; ++k) {
    for (index_t j = k + 1; j < n; ++j) w.right[k * n + j] = w.columns[j * m + k];
  }
}

// Turns R = leftᵀ · right: `left` is the identity before, and after it the rows of `right` are
// orthogonal.
void orthogonalize(const Workspace& w, index_t n, index_t m) {
  constexpr int kMaxSweeps = 40;                                   // about six are usual
  const double tolerance = __DBL_EPSILON__ * __DBL_EPSILON__ * n;  // of squares
  double* lengths = w.lengths;
  bool rotated = true;
  for (int sweep = 0; rotated && sweep < kMaxSweeps; ++sweep) {
    rotated = false;
    for (index_t k = 0; k < n; ++k) lengths[k] = dot(w.right + k * n, w.right + k * n, n);
    for (index_t p = 0; p + 1 < n; ++p) {
      for (index_t q = p + 1; q < n; ++q) {
        if (lengths[p] < kNothing || lengths[q] < kNothing) continue;
        const double product = dot(w.right + p * n, w.right + q * n, n);
        if (product * product <= tolerance * lengths[p] * lengths[q]) continue;
        rotated = true;
        const double cotangent = (lengths[q] - lengths[p]) / (2 * product);  // of the double angle
        const double tangent =
            copysign(1.0, cotangent) / (fabs(cotangent) + sqrt(1 + cotangent * cotangent));
        const double cosine = 1 / sqrt(1 + tangent * tangent);
        rotate(w.right + p * n, w.right + q * n, cosine, tangent * cosine, n);
        rotate(w.left + p * m, w.left + q * m, cosine, tangent * cosine, n);
        lengths[p] -= tangent * product;
        lengths[q] += tangent * product;
      }
    }
  }
}

// Makes unit vectors of the rows of `right`; `lengths` become the singular values. A row of zeros
// becomes a unit vector orthogonal to all others.
void normalize(const Workspace& w, index_t n) {
  for (index_t k = 0; k < n; ++k) {
    double* row = w.right + k * n;
    const double length = dot(row, row, n);
    w.lengths[k] = length < kNothing ? 0 : sqrt(length);
    scale(row, length < kNothing ? 0 : 1 / w.lengths[k], n);
  }
  for (index_t k = 0; k < n; ++k) {
    if (w.lengths[k] > 0) continue;
    double* row = w.right + k * n;
    double* covered = w.tau;  // squared length of each unit vector within the span of the rows
    for (index_t i = 0; i < n; ++i) covered[i] = 0;
    for (index_t j = 0; j < n; ++j) {
      for (index_t i = 0; i < n; ++i) covered[i] += w.right[j * n + i] * w.right[j * n + i];
    }
    index_t farthest = 0;
    for (index_t i = 1; i < n; ++i) {
      if (covered[i] < covered[farthest]) farthest = i;
    }
    row[farthest] = 1;
    for (int pass = 0; pass < 2; ++pass) {  // the second removes the rounding of the first
      for (index_t j = 0; j < n; ++j) {
        const double* other = w.right + j * n;
        if (j != k) add_scaled(row, -dot(row, other, n), other, n);
      }
    }
    scale(row, 1 / sqrt(dot(row, row, n)), n);
  }
}

void decompose(const BatchedSvdParams& p, index_t matrix, const Workspace& w) {
  const bool tall = p.rows >= p.cols;
  const index_t m = max(p.rows, p.cols);
  const index_t n = min(p.rows, p.cols);
  const double* a = p.a + matrix * m * n;
  double* u = p.u + matrix * p.rows * n;
  double* s = p.s + matrix * n;
  double* vh = p.vh + matrix * n * p.cols;

  const double top = largest(0, a, m * n);
  if (isnan(top)) {
    for (index_t i = 0; i < n; ++i) s[i] = NAN;
    for (index_t i = 0; i < p.rows * n; ++i) u[i] = NAN;
    for (index_t i = 0; i < n * p.cols; ++i) vh[i] = NAN;
    return;
  }
  const double factor = balance(top);
  for (index_t j = 0; j < n; ++j) {
    for (index_t i = 0; i < m; ++i) {
      w.columns[j * m + i] = factor * (tall ? a[i * n + j] : a[j * m + i]);
    }
  }
  factor_qr(w, n, m);
  memset(w.left, 0, n * m * sizeof(double));
  for (index_t k = 0; k < n; ++k) w.left[k * m + k] = 1;
  orthogonalize(w, n, m);
  for (index_t k = n; k-- > 0;) {
    const double* v = w.columns + k * m + k;
    for (index_t j = 0; j < n; ++j) {
      double* row = w.left + j * m + k;
      add_scaled(row, -w.tau[k] * dot(row, v, m - k), v, m - k);
    }
  }
  normalize(w, n);
  sort_descending(w.lengths, w.order, n);
  for (index_t k = 0; k < n; ++k) {
    const double* left = w.left + w.order[k] * m;
    const double* right = w.right + w.order[k] * n;
    s[k] = w.lengths[w.order[k]] / factor;
    for (index_t i = 0; i < m; ++i) (tall ? u[i * n + k] : vh[k * m + i]) = left[i];
    for (index_t i = 0; i < n; ++i) {
      (tall ? vh[k * n + w.pivots[i]] : u[w.pivots[i] * n + k]) = right[i];
    }
  }
}

index_t doubles_per_worker(index_t n, index_t m) { return 2 * n * m + n * n + 4 * n; }

}  // namespace

size_t batched_svd_cpu_workspace_size(const BatchedSvdParams& p, int num_threads) {
  return num_threads * sizeof(double) *
         doubles_per_worker(min(p.rows, p.cols), max(p.rows, p.cols));
}

void batched_svd_cpu(const BatchedSvdParams& p, const ParallelFor& parallel_for) {
  const index_t n = min(p.rows, p.cols);
  const index_t m = max(p.rows, p.cols);
  if (n == 0) return;
  run_items(parallel_for, p.num_matrices, [&](index_t matrix, index_t worker) {
    double* columns = static_cast<double*>(p.workspace) + worker * doubles_per_worker(n, m);
    double* left = columns + n * m;
    double* right = left + n * m;
    double* tau = right + n * n;
    decompose(p, matrix,
              {columns, left, right, tau, tau + n, reinterpret_cast<index_t*>(tau + 2 * n),
               reinterpret_cast<index_t*>(tau + 3 * n)});
  });
}

}  // namespace transmla::TRANSMLA_ISA
