#include "num.h"

namespace ptxvm {

uint32_t packFloat(double x, int eb, int mb, Rnd r, bool inf, bool sat) {
  uint32_t sign = std::signbit(x) ? 1u << (eb + mb) : 0;
  int bias = (1 << (eb - 1)) - 1;
  uint32_t expAll = (1u << eb) - 1;
  uint32_t infBits = expAll << mb, nanBits = (1u << (eb + mb)) - 1;
  uint32_t maxBits = inf ? infBits - 1 : nanBits - 1;
  if (std::isnan(x)) return nanBits;  // canonical NaN, positive
  auto overflow = [&]() -> uint32_t {
    if (sat) return sign | maxBits;
    bool toMax = r == Rnd::RZ || (r == Rnd::RM && !sign) || (r == Rnd::RP && sign);
    if (std::isinf(x)) toMax = false;
    if (toMax) return sign | maxBits;
    return inf ? sign | infBits : nanBits;
  };
  if (std::isinf(x)) return overflow();
  double ax = std::fabs(x);
  if (ax == 0) return sign;
  int e;
  std::frexp(ax, &e);
  e -= 1;  // ax in [2^e, 2^(e+1))
  int emin = 1 - bias;
  int q = (e < emin ? emin : e) - mb;  // exponent of the last place
  double scaled = std::ldexp(ax, -q);  // exact
  double fl = std::floor(scaled), fr = scaled - fl;
  uint64_t n = (uint64_t)fl;
  bool up = false;
  switch (r) {
    case Rnd::RN:
      up = fr > 0.5 || (fr == 0.5 && (n & 1));
      break;
    case Rnd::RNA:
      up = fr >= 0.5;
      break;
    case Rnd::RZ:
      break;
    case Rnd::RM:
      up = fr > 0 && sign;
      break;
    case Rnd::RP:
      up = fr > 0 && !sign;
      break;
  }
  n += up;
  // n carries the hidden bit when normal; adding the exponent field handles the carry
  uint64_t bits = e < emin ? n : ((uint64_t)(e + bias - 1) << mb) + n;
  if (bits > maxBits) return overflow();
  return sign | (uint32_t)bits;
}

static float small(uint32_t v, int eb, int mb) {
  int bias = (1 << (eb - 1)) - 1;
  uint32_t e = (v >> mb) & ((1u << eb) - 1), m = v & ((1u << mb) - 1);
  float f = e ? std::ldexp(1.0f + (float)m / (1 << mb), (int)e - bias)
              : std::ldexp((float)m / (1 << mb), 1 - bias);
  return (v >> (eb + mb)) & 1 ? -f : f;
}
float e4m3ToF(uint8_t v) { return (v & 0x7f) == 0x7f ? NAN : small(v, 4, 3); }
float e5m2ToF(uint8_t v) {
  if ((v & 0x7f) > 0x7c) return NAN;
  if ((v & 0x7f) == 0x7c) return v & 0x80 ? -INFINITY : INFINITY;
  return small(v, 5, 2);
}

}  // namespace ptxvm
