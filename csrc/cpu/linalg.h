// fp64 rows: what the small dense decompositions are made of.
#pragma once

#include "vec.h"

namespace transmla::TRANSMLA_ISA {

typedef double DVec __attribute__((vector_size(kVecBytes)));
constexpr int kDVecSize = kVecBytes / sizeof(double);

inline DVec load(const double* p) {
  DVec v;
  memcpy(&v, p, sizeof v);
  return v;
}

inline void store(double* p, DVec v) { memcpy(p, &v, sizeof v); }

inline double dot(const double* a, const double* b, index_t n) {
  DVec even = {}, odd = {};
  index_t i = 0;
  for (; i + 2 * kDVecSize <= n; i += 2 * kDVecSize) {
    even += load(a + i) * load(b + i);
    odd += load(a + i + kDVecSize) * load(b + i + kDVecSize);
  }
  if (i + kDVecSize <= n) {
    even += load(a + i) * load(b + i);
    i += kDVecSize;
  }
  even += odd;
  double total = 0;
  for (int lane = 0; lane < kDVecSize; ++lane) total += even[lane];
  for (; i < n; ++i) total += a[i] * b[i];
  return total;
}

// y += factor * x
inline void add_scaled(double* y, double factor, const double* x, index_t n) {
  for (index_t i = 0; i < n; ++i) y[i] += factor * x[i];
}

inline void scale(double* x, double factor, index_t n) {
  for (index_t i = 0; i < n; ++i) x[i] *= factor;
}

// (x, y) = (cos * x - sin * y, sin * x + cos * y)
inline void rotate(double* x, double* y, double cos, double sin, index_t n) {
  for (index_t i = 0; i < n; ++i) {
    const double old = x[i];
    x[i] = cos * old - sin * y[i];
    y[i] = sin * old + cos * y[i];
  }
}

inline void swap(double* x, double* y, index_t n) {
  for (index_t i = 0; i < n; ++i) {
    const double old = x[i];
    x[i] = y[i];
    y[i] = old;
  }
}

// A squared length below this is zero: matrices are scaled to a largest entry near 1, and products
// of two such lengths are still normal numbers.
constexpr double kNothing = 1e-140;

// H = I - tau v vᵀ with H x = norm * e_pivot and v[pivot] = 1; x becomes v.
struct Reflection {
  double tau, norm;
};

inline Reflection reflect(double* x, index_t n, index_t pivot) {
  const double head = x[pivot];
  x[pivot] = 0;
  const double rest = dot(x, x, n);
  if (rest < kNothing) {
    x[pivot] = 1;
    return {0, head};
  }
  const double norm = -copysign(sqrt(head * head + rest), head);
  scale(x, 1 / (head - norm), n);
  x[pivot] = 1;
  return {(norm - head) / norm, norm};
}

// The largest magnitude of `top` and the n numbers; NaN if one of them is not finite.
inline double largest(double top, const double* x, index_t n) {
  for (index_t i = 0; i < n; ++i) {
    if (!(fabs(x[i]) <= __DBL_MAX__)) return NAN;
    if (!(fabs(x[i]) <= top)) top = fabs(x[i]);
  }
  return top;
}

// Power of two that brings `top` near 1: then squares neither overflow nor vanish.
inline double balance(double top) {
  int exponent = 0;
  frexp(top, &exponent);
  return ldexp(1.0, exponent < -1000 ? 1000 : -exponent);
}

// Indices of the n keys, largest key first; equal keys keep their order.
inline void sort_descending(const double* keys, index_t* order, index_t n) {
  for (index_t i = 0; i < n; ++i) {
    index_t slot = i;
    for (; slot > 0 && keys[order[slot - 1]] < keys[i]; --slot) order[slot] = order[slot - 1];
    order[slot] = i;
  }
}

}  // namespace transmla::TRANSMLA_ISA
