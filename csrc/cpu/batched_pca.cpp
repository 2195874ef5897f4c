// Householder tridiagonalisation and implicitly shifted QR (Golub & Van Loan, Matrix Computations,
// 8.3.1 and 8.3.3). Eigenvectors are kept as rows, so that every inner loop is contiguous.
#include "linalg.h"

namespace transmla::TRANSMLA_ISA {
namespace {

struct Workspace {
  double* a;         // [n, n], lower triangle; row i becomes the vector of the reflection of step i
  double* vectors;   // [n, n], one eigenvector a row
  double* diagonal;  // [n], in the end the eigenvalues
  double* off;       // [n], off[i] couples i and i + 1
  double* tau;       // [n]
  double* cosine;    // [n]
  double* sine;      // [n]
  index_t* order;    // [n]
};

constexpr index_t kVectors = 6;  // of n numbers: from diagonal to order

// A = Q T Qᵀ, T tridiagonal; Qᵀ goes to `vectors`. The last row goes first: what is left of the
// diagonal is contiguous, and so is the leading block that is still to be reduced.
void tridiagonalize(const Workspace& w, index_t n) {
  double* product = w.cosine;
  for (index_t i = n - 1; i > 0; --i) {
    double* v = w.a + i * n;
    const Reflection h = reflect(v, i, i - 1);
    w.tau[i] = h.tau;
    w.off[i - 1] = h.norm;
    if (h.tau == 0) continue;
    for (index_t r = 0; r < i; ++r) {
      const double* row = w.a + r * n;
      product[r] = dot(row, v, r + 1);
      add_scaled(product, v[r], row, r);
    }
    scale(product, h.tau, i);
    add_scaled(product, -0.5 * h.tau * dot(product, v, i), v, i);
    for (index_t r = 0; r < i; ++r) {
      double* row = w.a + r * n;
      for (index_t c = 0; c <= r; ++c) row[c] -= v[r] * product[c] + product[r] * v[c];
    }
  }
  memset(w.vectors, 0, n * n * sizeof(double));
  for (index_t i = 0; i < n; ++i) {
    w.diagonal[i] = w.a[i * n + i];
    w.vectors[i * n + i] = 1;
  }
  for (index_t i = 1; i < n; ++i) {
    const double* v = w.a + i * n;
    for (index_t r = 0; r < i; ++r) {
      double* row = w.vectors + r * n;
      add_scaled(row, -w.tau[i] * dot(row, v, i), v, i);
    }
  }
}

// The rotations (k, k + 1), k = lo .. hi - 1, in that order, on kVecs vectors V of columns; `row`
// is row lo. The row that two rotations share stays in registers.
template <class V, int kVecs>
void rotate_columns(const Workspace& w, index_t n, index_t lo, index_t hi, double* row) {
  constexpr int kSize = sizeof(V) / sizeof(double);
  V carry[kVecs];
#pragma GCC unroll 4
  for (int i = 0; i < kVecs; ++i) memcpy(&carry[i], row + i * kSize, sizeof(V));
  for (index_t k = lo; k < hi; ++k, row += n) {
#pragma GCC unroll 4
    for (int i = 0; i < kVecs; ++i) {
      V next;
      memcpy(&next, row + n + i * kSize, sizeof(V));
      const V done = w.cosine[k] * carry[i] + w.sine[k] * next;
      carry[i] = w.cosine[k] * next - w.sine[k] * carry[i];
      memcpy(row + i * kSize, &done, sizeof(V));
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kVecs; ++i) memcpy(row + i * kSize, &carry[i], sizeof(V));
}

void rotate_rows(const Workspace& w, index_t n, index_t lo, index_t hi) {
  double* row = w.vectors + lo * n;
  index_t i = 0;
  for (; i + 4 * kDVecSize <= n; i += 4 * kDVecSize) rotate_columns<DVec, 4>(w, n, lo, hi, row + i);
  for (; i + kDVecSize <= n; i += kDVecSize) rotate_columns<DVec, 1>(w, n, lo, hi, row + i);
  for (; i < n; ++i) rotate_columns<double, 1>(w, n, lo, hi, row + i);
}

// One QR step with Wilkinson's shift on the unreduced block lo .. hi of T.
void qr_step(const Workspace& w, index_t n, index_t lo, index_t hi) {
  double* d = w.diagonal;
  double* e = w.off;
  const double half_gap = 0.5 * (d[hi - 1] - d[hi]);
  const double root = sqrt(half_gap * half_gap + e[hi - 1] * e[hi - 1]);
  const double shift = d[hi] - e[hi - 1] * e[hi - 1] / (half_gap + copysign(root, half_gap));
  double x = d[lo] - shift;
  double bulge = e[lo];
  for (index_t k = lo; k < hi; ++k) {
    const double norm = sqrt(x * x + bulge * bulge);
    const double c = norm == 0 ? 1 : x / norm;
    const double s = norm == 0 ? 0 : bulge / norm;
    if (k > lo) e[k - 1] = norm;
    const double moved = s * (s * (d[k + 1] - d[k]) + 2 * c * e[k]);
    e[k] = c * s * (d[k + 1] - d[k]) + (c * c - s * s) * e[k];
    d[k] += moved;
    d[k + 1] -= moved;
    x = e[k];
    if (k + 1 < hi) {
      bulge = s * e[k + 1];
      e[k + 1] *= c;
    }
    w.cosine[k] = c;
    w.sine[k] = s;
  }
  rotate_rows(w, n, lo, hi);
}

void diagonalize(const Workspace& w, index_t n) {
  constexpr index_t kMaxSteps = 60;  // per eigenvalue; two are usual
  index_t hi = n - 1;
  for (index_t step = 0; hi > 0 && step < kMaxSteps * n; ++step) {
    const auto coupled = [&](index_t k) {
      return fabs(w.off[k]) >
             __DBL_EPSILON__ * (fabs(w.diagonal[k]) + fabs(w.diagonal[k + 1])) + sqrt(kNothing);
    };
    while (hi > 0 && !coupled(hi - 1)) --hi;
    index_t lo = hi;
    while (lo > 0 && coupled(lo - 1)) --lo;
    if (lo < hi) qr_step(w, n, lo, hi);
  }
}

void decompose(const BatchedPcaParams& p, index_t matrix, const Workspace& w) {
  const index_t n = p.dim;
  const double* cov = p.cov + matrix * n * n;
  double* eigenvalues = p.eigenvalues + matrix * n;
  double* eigenvectors = p.eigenvectors + matrix * n * n;
  double top = 0;
  for (index_t r = 0; r < n; ++r) top = largest(top, cov + r * n, r + 1);
  if (isnan(top)) {
    for (index_t i = 0; i < n; ++i) eigenvalues[i] = NAN;
    for (index_t i = 0; i < n * n; ++i) eigenvectors[i] = NAN;
    return;
  }
  const double factor = balance(top);
  for (index_t r = 0; r < n; ++r) {
    for (index_t c = 0; c <= r; ++c) w.a[r * n + c] = factor * cov[r * n + c];
  }
  tridiagonalize(w, n);
  diagonalize(w, n);
  sort_descending(w.diagonal, w.order, n);
  for (index_t k = 0; k < n; ++k) {
    const double* vector = w.vectors + w.order[k] * n;
    eigenvalues[k] = w.diagonal[w.order[k]] / factor;
    index_t largest_at = 0;
    for (index_t i = 1; i < n; ++i) {
      if (fabs(vector[i]) > fabs(vector[largest_at])) largest_at = i;
    }
    const double sign = copysign(1.0, vector[largest_at]);
    for (index_t i = 0; i < n; ++i) eigenvectors[i * n + k] = sign * vector[i];
  }
}

index_t doubles_per_worker(index_t n) { return 2 * n * n + kVectors * n; }

}  // namespace

size_t batched_pca_cpu_workspace_size(const BatchedPcaParams& p, int num_threads) {
  return num_threads * doubles_per_worker(p.dim) * sizeof(double);
}

void batched_pca_cpu(const BatchedPcaParams& p, const ParallelFor& parallel_for) {
  const index_t n = p.dim;
  if (n == 0) return;
  run_items(parallel_for, p.num_matrices, [&](index_t matrix, index_t worker) {
    double* a = static_cast<double*>(p.workspace) + worker * doubles_per_worker(n);
    double* vectors = a + n * n;
    double* rows = vectors + n * n;
    decompose(p, matrix,
              {a, vectors, rows, rows + n, rows + 2 * n, rows + 3 * n, rows + 4 * n,
               reinterpret_cast<index_t*>(rows + 5 * n)});
  });
}

}  // namespace transmla::TRANSMLA_ISA
