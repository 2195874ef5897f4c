// Number formats: half, bfloat16, fp8, tf32 and directed rounding.
#pragma once
#include <immintrin.h>

#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace ptxvm {

template <class To, class From>
inline To bitcast(From f) {
  static_assert(sizeof(To) == sizeof(From), "size");
  To t;
  memcpy(&t, &f, sizeof t);
  return t;
}

enum class Rnd : uint8_t { RN, RZ, RM, RP, RNA };

struct f16_t {
  uint16_t v;
};
struct bf16_t {
  uint16_t v;
};

inline float toF(f16_t h) { return _cvtsh_ss(h.v); }
inline float toF(bf16_t h) { return bitcast<float>((uint32_t)h.v << 16); }
inline float toF(float f) { return f; }

// Round a double to a format with `eb` exponent and `mb` mantissa bits; returns the bits.
// inf: the format has infinities; otherwise (e4m3) overflow gives NaN, or the maximum with sat.
uint32_t packFloat(double x, int eb, int mb, Rnd r, bool inf, bool sat);

inline uint16_t f32ToF16(float f) {
  return _cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline uint16_t f32ToBf16(float f) {
  uint32_t u = bitcast<uint32_t>(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}
inline f16_t mkF16(float f) {
  uint16_t v = f32ToF16(f);
  if ((v & 0x7fff) > 0x7c00) v = 0x7fff;  // canonical NaN
  return {v};
}
inline bf16_t mkBf16(float f) { return {f32ToBf16(f)}; }

float e4m3ToF(uint8_t v);
float e5m2ToF(uint8_t v);

// a*b+c rounded to odd in double: rounding the result once more to <= 24 bits is then exact.
inline double fmaOdd(double a, double b, double c) {
  double p = a * b;  // exact for operands of at most 26 bits
  double s = p + c;
  if (!std::isfinite(s)) return s;
  double bb = s - p, err = (p - (s - bb)) + (c - bb);
  if (err != 0 && !(bitcast<uint64_t>(s) & 1)) {
    bool up = (err > 0) == (s > 0);
    s = bitcast<double>(bitcast<uint64_t>(s) + (up ? 1 : -1));
  }
  return s;
}
// double -> half types without double rounding
inline f16_t f16FromD(double d) { return {(uint16_t)packFloat(d, 5, 10, Rnd::RN, true, false)}; }
inline bf16_t bf16FromD(double d) { return {(uint16_t)packFloat(d, 8, 7, Rnd::RN, true, false)}; }

inline float tf32Trunc(float f) { return bitcast<float>(bitcast<uint32_t>(f) & 0xffffe000u); }

inline float ftz(float f) { return std::fabs(f) < 1.17549435e-38f ? std::copysign(0.0f, f) : f; }
inline double ftz(double d) { return d; }
inline float satf(float f) { return !(f > 0.f) ? 0.f : f > 1.f ? 1.f : f; }  // NaN -> 0
inline double satf(double f) { return !(f > 0.) ? 0. : f > 1. ? 1. : f; }

// Run f under the x86 rounding mode r.
struct RoundScope {
  unsigned old;
  explicit RoundScope(Rnd r) : old(_mm_getcsr()) {
    static const unsigned m[] = {0x0000, 0x6000, 0x2000, 0x4000, 0x0000};
    _mm_setcsr((old & ~0x6000u) | m[(int)r]);
  }
  ~RoundScope() { _mm_setcsr(old); }
};

}  // namespace ptxvm
