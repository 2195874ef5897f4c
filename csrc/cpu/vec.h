// fp32 vectors of the instruction set that a kernel is compiled for, and their loads and stores
// from every DType.
//
// Everything here and in <op>.cpp lives in transmla::<isa>. Kernels include no header with inline
// functions of another namespace: the linker keeps one copy of those, perhaps the one with
// instructions that the machine lacks.
#pragma once

#include <math.h>
#include <string.h>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "kernels.h"

namespace transmla::TRANSMLA_ISA {

template <int... Lane>
struct Lanes {};

#if defined(__AVX512F__)
constexpr int kVecBytes = 64;
using AllLanes = Lanes<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>;
#elif defined(__AVX2__)
constexpr int kVecBytes = 32;
using AllLanes = Lanes<0, 1, 2, 3, 4, 5, 6, 7>;
#else
constexpr int kVecBytes = 16;
using AllLanes = Lanes<0, 1, 2, 3>;
#endif
constexpr int kVecSize = kVecBytes / sizeof(float);

// Vector extensions of GCC and Clang: + - * / and comparisons work lane by lane, also with a
// scalar, and comparisons give an IVec of 0 and -1.
typedef float Vec __attribute__((vector_size(kVecBytes)));
typedef int32_t IVec __attribute__((vector_size(kVecBytes)));
typedef uint32_t UVec __attribute__((vector_size(kVecBytes)));
typedef uint16_t HalfVec __attribute__((vector_size(kVecBytes / 2)));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline Vec broadcast(float x) { return x - Vec{}; }
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec select(IVec mask, Vec a, Vec b) { return mask ? a : b; }
// NaN in b comes through, NaN in a does not.
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
inline Vec min(Vec a, Vec b) { return a < b ? a : b; }
inline index_t min(index_t a, index_t b) { return a < b ? a : b; }
inline index_t max(index_t a, index_t b) { return a > b ? a : b; }
inline index_t ceil_div(index_t a, index_t b) { return (a + b - 1) / b; }

inline float sum(Vec v) {
  typedef float Quarter __attribute__((vector_size(16)));
  Quarter parts[kVecBytes / 16];
  memcpy(parts, &v, sizeof v);
  Quarter total = parts[0];
  for (int i = 1; i < kVecBytes / 16; ++i) total += parts[i];
  return (total[0] + total[1]) + (total[2] + total[3]);
}

// Lanes of a, then, from kVecSize on, of b.
template <int... Lane>
inline Vec shuffle(Vec a, Vec b, Lanes<Lane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, Lane...);
#else
  return __builtin_shuffle(a, b, IVec{Lane...});
#endif
}

// Row i of the square becomes its column i: blocks of `Step` lanes swap places across the diagonals
// of those of 2 Step.
template <int Step = 1, int... Lane>
inline void transpose(Vec (&rows)[kVecSize], Lanes<Lane...> lanes) {
#pragma GCC unroll 16
  for (int i = 0; i < kVecSize; ++i) {
    if (i & Step) continue;
    const Vec a = rows[i], b = rows[i + Step];
    rows[i] = shuffle(a, b, Lanes<(Lane & Step ? kVecSize + Lane - Step : Lane)...>{});
    rows[i + Step] = shuffle(a, b, Lanes<(Lane & Step ? kVecSize + Lane : Lane + Step)...>{});
  }
  if constexpr (2 * Step < kVecSize) transpose<2 * Step>(rows, lanes);
}

inline Vec load(const float* p) {
  Vec v;
  memcpy(&v, p, sizeof v);
  return v;
}

inline Vec load(const BFloat16* p) {
  // One instruction: GCC 12 makes five of __builtin_convertvector.
#if defined(__AVX512F__)
  const UVec bits = (UVec)_mm512_maskz_cvtepu16_epi32(-1, _mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
  const UVec bits = (UVec)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
#else
  HalfVec h;
  memcpy(&h, p, sizeof h);
  const UVec bits = __builtin_convertvector(h, UVec);
#endif
  return (Vec)(bits << 16);
}

inline Vec load(const Float16* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_cvtph_ps(-1, _mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  HalfVec h;
  memcpy(&h, p, sizeof h);
  const UVec bits = __builtin_convertvector(h, UVec);
  // The exponent bias of fp16 is 15 and of fp32 127; the product also normalises subnormals.
  const Vec magnitude = (Vec)((bits & 0x7fff) << 13) * 0x1p112f;
  const UVec special = (UVec)((bits & 0x7c00) == 0x7c00) & 0x7f800000;
  return (Vec)((UVec)magnitude | special | (bits & 0x8000) << 16);
#endif
}

inline Vec load(const int8_t* p) {
#if defined(__AVX512F__)
  const IVec integers = (IVec)_mm512_maskz_cvtepi8_epi32(-1, _mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX2__)
  const IVec integers = (IVec)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
  IVec integers;
  for (int i = 0; i < kVecSize; ++i) integers[i] = p[i];
#endif
  return __builtin_convertvector(integers, Vec);
}

inline void store(float* p, Vec v) { memcpy(p, &v, sizeof v); }

inline void store(BFloat16* p, Vec v) {
  const UVec bits = (UVec)v;
  const UVec rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const UVec quiet_nan = bits >> 16 | 0x40;
  const HalfVec h =
      __builtin_convertvector((UVec)select(v == v, (Vec)rounded, (Vec)quiet_nan), HalfVec);
  memcpy(p, &h, sizeof h);
}

inline void store(Float16* p, Vec v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_maskz_cvtps_ph(-1, (__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  const UVec sign = (UVec)v & 0x80000000;
  const UVec magnitude = (UVec)v ^ sign;
  const UVec rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
  const UVec normal = (rounded - (112u << 23)) >> 13;
  // Adding 0.5 lets the adder round at 2^-24, the last place of an fp16 subnormal.
  const UVec subnormal = (UVec)((Vec)magnitude + 0.5f) - 0x3f000000;
  const UVec infinite = UVec{} + 0x7c00;
  const UVec nan = UVec{} + 0x7e00;
  UVec bits = magnitude < 0x38800000 ? subnormal : normal;
  bits = rounded >= 0x47800000 ? infinite : bits;
  bits = magnitude > 0x7f800000 ? nan : bits;
  const HalfVec h = __builtin_convertvector(bits | sign >> 16, HalfVec);
  memcpy(p, &h, sizeof h);
#endif
}

// Of numbers between -128 and 127, rounded to nearest even.
inline void store(int8_t* p, Vec v) {
  const UVec bits = (UVec)(v + 0x1.8p23f);  // the sum's last bits are the nearest integer
  for (int i = 0; i < kVecSize; ++i) p[i] = static_cast<int8_t>(bits[i]);
}

// The first `n` numbers, n < kVecSize; the rest is zero.
#if defined(__AVX512F__)
inline Vec load_first(const float* p, index_t n) {
  return (Vec)_mm512_maskz_loadu_ps((1 << n) - 1, p);
}

inline Vec load_first(const int8_t* p, index_t n) {
  int8_t padded[kVecSize];
  _mm_storeu_si128((__m128i*)padded, _mm_maskz_loadu_epi8((1 << n) - 1, p));
  return load(padded);
}

template <class T>
inline Vec load_first(const T* p, index_t n) {
  T padded[kVecSize];
  _mm256_storeu_si256((__m256i*)padded, _mm256_maskz_loadu_epi16((1 << n) - 1, p));
  return load(padded);
}

inline void store_first(float* p, Vec v, index_t n) {
  _mm512_mask_storeu_ps(p, (1 << n) - 1, (__m512)v);
}

inline void store_first(int8_t* p, Vec v, index_t n) {
  int8_t padded[kVecSize];
  store(padded, v);
  _mm_mask_storeu_epi8(p, (1 << n) - 1, _mm_loadu_si128((const __m128i*)padded));
}

template <class T>
inline void store_first(T* p, Vec v, index_t n) {
  T padded[kVecSize];
  store(padded, v);
  _mm256_mask_storeu_epi16(p, (1 << n) - 1, _mm256_loadu_si256((const __m256i*)padded));
}
#else
// In moves of a size that the compiler knows: a call of memcpy takes longer.
template <class T>
inline void copy_first(T* to, const T* from, index_t n) {
#pragma GCC unroll 4
  for (int size = kVecSize / 2; size > 0; size /= 2) {
    if (!(n & size)) continue;
    memcpy(to, from, size * sizeof(T));
    to += size;
    from += size;
  }
}

template <class T>
inline Vec load_first(const T* p, index_t n) {
  T padded[kVecSize] = {};
  copy_first(padded, p, n);
  return load(padded);
}

template <class T>
inline void store_first(T* p, Vec v, index_t n) {
  T padded[kVecSize];
  store(padded, v);
  copy_first(p, padded, n);
}
#endif

// The first `n` numbers, or a vector if there are more.
template <class T>
inline Vec load_up_to(const T* p, index_t n) {
  return n < kVecSize ? load_first(p, n) : load(p);
}

template <class T>
inline void store_up_to(T* p, Vec v, index_t n) {
  if (n < kVecSize) return store_first(p, v, n);
  store(p, v);
}

// 2^x: relative error below 1e-7; 0 below -126, and for -inf.
inline Vec exp2(Vec x) {
  // The sum's last bits are the nearest integer. Where it is below -127, the rest is thrown away.
  const Vec shifted = min(x + 0x1.8p23f, broadcast(0x1.8p23f + 127));
  const Vec integer = shifted - 0x1.8p23f;
  const Vec f = x - integer;
  Vec p = broadcast(1.535336188319500e-4f);
  p = fma(p, f, broadcast(1.339887440266574e-3f));
  p = fma(p, f, broadcast(9.618437357674640e-3f));
  p = fma(p, f, broadcast(5.550332471162809e-2f));
  p = fma(p, f, broadcast(2.402264791363012e-1f));
  p = fma(p, f, broadcast(6.931472028550421e-1f));
  p = fma(p, f, broadcast(1.0f));
#if defined(__AVX512F__)
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return (Vec)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)integer);
#else
  const Vec scale = (Vec)(((UVec)shifted + 127) << 23);
  return select(x < -126.0f, Vec{}, p * scale);
#endif
}

// Relative error below 3e-7.
inline Vec tanh(Vec x) {
  const Vec magnitude = (Vec)((UVec)x & 0x7fffffff);
  const Vec large = 1.0f - 2.0f / (exp2(magnitude * 2.885390081777927f) + 1.0f);
  const Vec z = x * x;
  Vec p = broadcast(-5.70498872745e-3f);
  p = fma(p, z, broadcast(2.06390887954e-2f));
  p = fma(p, z, broadcast(-5.37397155531e-2f));
  p = fma(p, z, broadcast(1.33314422036e-1f));
  p = fma(p, z, broadcast(-3.33332819422e-1f));
  const Vec small = fma(p * z, x, x);
  return select(magnitude < 0.625f, small, (Vec)((UVec)large | ((UVec)x & 0x80000000)));
}

// The kernel's body for the dtype of its tensors: call(T{}) with T float, BFloat16 or Float16.
template <class Call>
inline void with_dtype(DType dtype, const Call& call) {
  switch (dtype) {
    case DType::kFloat32:
      return call(float{});
    case DType::kBFloat16:
      return call(BFloat16{});
    case DType::kFloat16:
      return call(Float16{});
  }
}

// parallel_for over a lambda (begin, end).
template <class Body>
inline void run(const ParallelFor& parallel_for, index_t begin, index_t end, index_t grain,
                const Body& body) {
  parallel_for.run(
      parallel_for.pool, begin, end, grain,
      [](void* context, index_t b, index_t e) { (*static_cast<const Body*>(context))(b, e); },
      const_cast<Body*>(&body));
}

// body(item, worker) once for every item below `num_items`. A worker takes the next item when it is
// done with one; calls with the same worker, below num_threads, never overlap.
template <class Body>
inline void run_items(const ParallelFor& parallel_for, index_t num_items, const Body& body) {
  index_t next = 0;
  const auto work = [&](index_t begin, index_t end) {
    for (index_t worker = begin; worker < end; ++worker) {
      for (index_t item; (item = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < num_items;) {
        body(item, worker);
      }
    }
  };
  run(parallel_for, 0, min(num_items, parallel_for.num_threads), 1, work);
}

}  // namespace transmla::TRANSMLA_ISA
