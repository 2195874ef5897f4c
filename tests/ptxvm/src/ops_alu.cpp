// Arithmetic, logic, comparison and move instructions.
#include <algorithm>
#include <chrono>
#include <climits>

#include "decode.h"

namespace ptxvm {
namespace {

// ---------------------------------------------------------------- loops over lanes
template <class D, class A, class F>
int un(Warp& w, const Inst& I, uint32_t m) {
  D* d = w.dst<D>(I.d);
  const A* a = w.src<A>(I.a);
  forLanes(m, [=](int i) { d[i] = F::f(a[i]); });
  return NEXT;
}
template <class D, class A, class B, class F>
int bin(Warp& w, const Inst& I, uint32_t m) {
  D* d = w.dst<D>(I.d);
  const A* a = w.src<A>(I.a);
  const B* b = w.src<B>(I.b);
  forLanes(m, [=](int i) { d[i] = F::f(a[i], b[i]); });
  return NEXT;
}
template <class D, class A, class B, class C, class F>
int tri(Warp& w, const Inst& I, uint32_t m) {
  D* d = w.dst<D>(I.d);
  const A* a = w.src<A>(I.a);
  const B* b = w.src<B>(I.b);
  const C* c = w.src<C>(I.c);
  forLanes(m, [=](int i) { d[i] = F::f(a[i], b[i], c[i]); });
  return NEXT;
}
// Directed rounding; volatile keeps the arithmetic between the changes of MXCSR.
template <class T, class F>
int unR(Warp& w, const Inst& I, uint32_t m) {
  RoundScope rs((Rnd)I.mode);
  T* d = w.dst<T>(I.d);
  const T* a = w.src<T>(I.a);
  for (; m; m &= m - 1) {
    int i = __builtin_ctz(m);
    volatile T x = a[i], r = F::f((T)x);
    d[i] = r;
  }
  return NEXT;
}
template <class T, class F>
int binR(Warp& w, const Inst& I, uint32_t m) {
  RoundScope rs((Rnd)I.mode);
  T* d = w.dst<T>(I.d);
  const T *a = w.src<T>(I.a), *b = w.src<T>(I.b);
  for (; m; m &= m - 1) {
    int i = __builtin_ctz(m);
    volatile T x = a[i], y = b[i], r = F::f((T)x, (T)y);
    d[i] = r;
  }
  return NEXT;
}
template <class T, class F>
int triR(Warp& w, const Inst& I, uint32_t m) {
  RoundScope rs((Rnd)I.mode);
  T* d = w.dst<T>(I.d);
  const T *a = w.src<T>(I.a), *b = w.src<T>(I.b), *c = w.src<T>(I.c);
  for (; m; m &= m - 1) {
    int i = __builtin_ctz(m);
    volatile T x = a[i], y = b[i], z = c[i], r = F::f((T)x, (T)y, (T)z);
    d[i] = r;
  }
  return NEXT;
}
// N halves per lane, computed by F on the 16-bit type H
template <class H, int N, class F>
int unH(Warp& w, const Inst& I, uint32_t m) {
  H* d = w.dst<H>(I.d);
  const H* a = w.src<H>(I.a);
  forLanes(m, [=](int i) {
    for (int k = 0; k < N; k++) d[i * N + k] = F::f(a[i * N + k]);
  });
  return NEXT;
}
template <class H, int N, class F>
int binH(Warp& w, const Inst& I, uint32_t m) {
  H* d = w.dst<H>(I.d);
  const H *a = w.src<H>(I.a), *b = w.src<H>(I.b);
  forLanes(m, [=](int i) {
    for (int k = 0; k < N; k++) d[i * N + k] = F::f(a[i * N + k], b[i * N + k]);
  });
  return NEXT;
}
template <class H, int N, class F>
int triH(Warp& w, const Inst& I, uint32_t m) {
  H* d = w.dst<H>(I.d);
  const H *a = w.src<H>(I.a), *b = w.src<H>(I.b), *c = w.src<H>(I.c);
  forLanes(m, [=](int i) {
    for (int k = 0; k < N; k++) d[i * N + k] = F::f(a[i * N + k], b[i * N + k], c[i * N + k]);
  });
  return NEXT;
}

// clang-format off
#define UN(name, ...) struct name { template <class T> static inline T f(T a) { return __VA_ARGS__; } };
#define BIN(name, ...) struct name { template <class T> static inline T f(T a, T b) { return __VA_ARGS__; } };
#define TRI(name, ...) struct name { template <class T> static inline T f(T a, T b, T c) { return __VA_ARGS__; } };

BIN(Add, T(a + b))
BIN(Sub, T(a - b))
BIN(Mul, T(a * b))
BIN(And, T(a & b))
BIN(Or, T(a | b))
BIN(Xor, T(a ^ b))
BIN(IMin, a < b ? a : b)
BIN(IMax, a > b ? a : b)
BIN(IDiv, b == 0 ? T(-1) : (std::is_signed<T>::value && b == T(-1)) ? T(0 - a) : T(a / b))
BIN(IRem, b == 0 ? a : (std::is_signed<T>::value && b == T(-1)) ? T(0) : T(a % b))
UN(Not, T(~a))
UN(CNot, T(a == 0))
UN(INeg, T(0 - a))
UN(IAbs, T(a < 0 ? 0 - a : a))
TRI(Mad, T(a * b + c))
TRI(Sad, T(c + (a > b ? a - b : b - a)))
// clang-format on

template <class T>
struct Wide;
template <>
struct Wide<uint16_t> {
  using t = uint32_t;
};
template <>
struct Wide<int16_t> {
  using t = int32_t;
};
template <>
struct Wide<uint32_t> {
  using t = uint64_t;
};
template <>
struct Wide<int32_t> {
  using t = int64_t;
};
template <>
struct Wide<uint64_t> {
  using t = unsigned __int128;
};
template <>
struct Wide<int64_t> {
  using t = __int128;
};
// clang-format off
BIN(MulHi, T((typename Wide<T>::t(a) * typename Wide<T>::t(b)) >> (8 * sizeof(T))))
TRI(MadHi, T(((typename Wide<T>::t(a) * typename Wide<T>::t(b)) >> (8 * sizeof(T))) + c))
TRI(MadHiSat, T(std::min<int64_t>(INT32_MAX, std::max<int64_t>(INT32_MIN, int64_t((typename Wide<T>::t(a) * typename Wide<T>::t(b)) >> (8 * sizeof(T))) + c))))
// clang-format on
struct MulWide {
  template <class T>
  static typename Wide<T>::t f(T a, T b) {
    return typename Wide<T>::t(a) * typename Wide<T>::t(b);
  }
};
struct MadWide {
  template <class T>
  static typename Wide<T>::t f(T a, T b, typename Wide<T>::t c) {
    return typename Wide<T>::t(a) * typename Wide<T>::t(b) + c;
  }
};
template <class T>
T sx24(T v) {
  return std::is_signed<T>::value ? T((int32_t)((uint32_t)v << 8) >> 8) : T(v & 0xffffff);
}
struct Mul24 {
  template <class T>
  static T f(T a, T b) {
    return T((int64_t)sx24(a) * (int64_t)sx24(b));
  }
};
struct Mul24Hi {
  template <class T>
  static T f(T a, T b) {
    return T(((int64_t)sx24(a) * (int64_t)sx24(b)) >> 16);
  }
};
struct Mad24 {
  template <class T>
  static T f(T a, T b, T c) {
    return T((int64_t)sx24(a) * (int64_t)sx24(b) + c);
  }
};
// clang-format off
BIN(AddSat, T(std::min<int64_t>(INT32_MAX, std::max<int64_t>(INT32_MIN, (int64_t)a + b))))
BIN(SubSat, T(std::min<int64_t>(INT32_MAX, std::max<int64_t>(INT32_MIN, (int64_t)a - b))))
// clang-format on

struct Shl {
  template <class T>
  static T f(T a, uint32_t b) {
    return b >= 8 * sizeof(T) ? T(0) : T(a << b);
  }
};
struct Shr {
  template <class T>
  static T f(T a, uint32_t b) {
    return b >= 8 * sizeof(T) ? (std::is_signed<T>::value && a < 0 ? T(-1) : T(0)) : T(a >> b);
  }
};
struct ShfLW {
  static uint32_t f(uint32_t a, uint32_t b, uint32_t c) {
    c &= 31;
    return c ? (b << c) | (a >> (32 - c)) : b;
  }
};
struct ShfLC {
  static uint32_t f(uint32_t a, uint32_t b, uint32_t c) {
    return c >= 32 ? a : c ? (b << c) | (a >> (32 - c)) : b;
  }
};
struct ShfRW {
  static uint32_t f(uint32_t a, uint32_t b, uint32_t c) {
    c &= 31;
    return c ? (a >> c) | (b << (32 - c)) : a;
  }
};
struct ShfRC {
  static uint32_t f(uint32_t a, uint32_t b, uint32_t c) {
    return c >= 32 ? b : c ? (a >> c) | (b << (32 - c)) : a;
  }
};
struct Popc {
  template <class T>
  static uint32_t f(T a) {
    return sizeof(T) == 8 ? __builtin_popcountll((uint64_t)a) : __builtin_popcount((uint32_t)a);
  }
};
struct Clz {
  template <class T>
  static uint32_t f(T a) {
    return a == 0           ? 8 * sizeof(T)
           : sizeof(T) == 8 ? __builtin_clzll((uint64_t)a)
                            : __builtin_clz((uint32_t)a);
  }
};
struct Brev {
  template <class T>
  static T f(T a) {
    T r = 0;
    for (unsigned i = 0; i < 8 * sizeof(T); i++) r |= T((a >> i) & 1) << (8 * sizeof(T) - 1 - i);
    return r;
  }
};
struct Bfind {
  template <class T>
  static uint32_t f(T a) {
    if (std::is_signed<T>::value && a < 0) a = T(~a);
    return a == 0 ? ~0u : 8 * sizeof(T) - 1 - Clz::f(a);
  }
};
struct BfindS {
  template <class T>
  static uint32_t f(T a) {
    uint32_t r = Bfind::f(a);
    return r == ~0u ? r : 8 * sizeof(T) - 1 - r;
  }
};
struct Bfe {
  template <class T>
  static T f(T a, uint32_t b, uint32_t c) {
    constexpr unsigned N = 8 * sizeof(T);
    unsigned pos = b & 255, len = c & 255;
    using U = typename std::make_unsigned<T>::type;
    if (len == 0) return 0;
    bool sgn = std::is_signed<T>::value && ((U)a >> std::min(pos + len - 1, N - 1)) & 1;
    U v = pos >= N ? 0 : (U)a >> pos;
    unsigned have = pos >= N ? 0 : std::min(len, N - pos);
    U mask = have >= N ? ~U(0) : (U(1) << have) - 1;
    v &= mask;
    if (sgn) v |= ~mask;
    return (T)v;
  }
};
struct Bmsk {
  static uint32_t f(uint32_t a, uint32_t b) {
    a &= 31;
    b = std::min(b & 63, 32u);
    uint64_t m = b >= 32 ? 0xffffffffull : (1ull << b) - 1;
    return (uint32_t)(m << a);
  }
};
template <class T>
int opBfi(Warp& w, const Inst& I, uint32_t m) {
  T* d = w.dst<T>(I.d);
  const T *a = w.src<T>(I.a), *b = w.src<T>(I.b);
  const uint32_t *c = w.src<uint32_t>(I.c), *e = w.src<uint32_t>(w.frame->code->ext[I.ext]);
  constexpr unsigned N = 8 * sizeof(T);
  forLanes(m, [=](int i) {
    unsigned pos = c[i] & 255, len = e[i] & 255;
    if (pos >= N || len == 0) {
      d[i] = b[i];
      return;
    }
    len = std::min(len, N - pos);
    T mask = (len >= N ? ~T(0) : (T(1) << len) - 1) << pos;
    d[i] = (b[i] & ~mask) | ((a[i] << pos) & mask);
  });
  return NEXT;
}

int opLop3(Warp& w, const Inst& I, uint32_t m) {
  uint32_t* d = w.dst<uint32_t>(I.d);
  const uint32_t *a = w.src<uint32_t>(I.a), *b = w.src<uint32_t>(I.b), *c = w.src<uint32_t>(I.c);
  uint32_t k[8];
  for (int i = 0; i < 8; i++) k[i] = (I.x >> i) & 1 ? ~0u : 0;
  forLanes(m, [=](int i) {
    uint32_t x = a[i], y = b[i], z = c[i];
    d[i] = (k[0] & ~x & ~y & ~z) | (k[1] & ~x & ~y & z) | (k[2] & ~x & y & ~z) |
           (k[3] & ~x & y & z) | (k[4] & x & ~y & ~z) | (k[5] & x & ~y & z) | (k[6] & x & y & ~z) |
           (k[7] & x & y & z);
  });
  return NEXT;
}

int opPrmt(Warp& w, const Inst& I, uint32_t m) {
  uint32_t* d = w.dst<uint32_t>(I.d);
  const uint32_t *a = w.src<uint32_t>(I.a), *b = w.src<uint32_t>(I.b), *c = w.src<uint32_t>(I.c);
  int mode = I.mode;
  forLanes(m, [=](int i) {
    uint64_t v = a[i] | (uint64_t)b[i] << 32;
    uint32_t sel = c[i], r = 0;
    for (int k = 0; k < 4; k++) {
      unsigned n;
      bool sg = false;
      unsigned s = sel & 3;
      switch (mode) {
        case 0:
          n = (sel >> (4 * k)) & 7;
          sg = (sel >> (4 * k)) & 8;
          break;
        case 1:
          n = (s + k) & 7;
          break;  // f4e
        case 2:
          n = (s - k) & 7;
          break;  // b4e
        case 3:
          n = s;
          break;  // rc8
        case 4:
          n = (unsigned)k < s ? s : k;
          break;  // ecl
        case 5:
          n = (unsigned)k > s ? s : k;
          break;  // ecr
        default:
          n = (s & 1) * 2 + (k & 1);
          break;  // rc16
      }
      uint8_t by = (uint8_t)(v >> (8 * n));
      if (sg) by = by & 0x80 ? 0xff : 0;
      r |= (uint32_t)by << (8 * k);
    }
    d[i] = r;
  });
  return NEXT;
}

// carry chains: mode bit 0 writes CC, bit 1 reads it
template <class T>
int opAddC(Warp& w, const Inst& I, uint32_t m) {
  T* d = w.dst<T>(I.d);
  const T *a = w.src<T>(I.a), *b = w.src<T>(I.b);
  for (; m; m &= m - 1) {
    int i = __builtin_ctz(m);
    unsigned __int128 r = (unsigned __int128)a[i] + b[i] + (I.mode & 2 ? (w.cc >> i) & 1 : 0);
    d[i] = (T)r;
    if (I.mode & 1) w.cc = (w.cc & ~(1u << i)) | (uint32_t)((r >> (8 * sizeof(T))) & 1) << i;
  }
  return NEXT;
}
template <class T>
int opSubC(Warp& w, const Inst& I, uint32_t m) {
  T* d = w.dst<T>(I.d);
  const T *a = w.src<T>(I.a), *b = w.src<T>(I.b);
  for (; m; m &= m - 1) {
    int i = __builtin_ctz(m);
    unsigned __int128 r = (unsigned __int128)a[i] - b[i] - (I.mode & 2 ? (w.cc >> i) & 1 : 0);
    d[i] = (T)r;
    if (I.mode & 1) w.cc = (w.cc & ~(1u << i)) | (uint32_t)((r >> (8 * sizeof(T))) & 1) << i;
  }
  return NEXT;
}
template <class T>
int opMadC(Warp& w, const Inst& I, uint32_t m) {  // flags bit: hi in I.x
  T* d = w.dst<T>(I.d);
  const T *a = w.src<T>(I.a), *b = w.src<T>(I.b), *c = w.src<T>(I.c);
  for (; m; m &= m - 1) {
    int i = __builtin_ctz(m);
    unsigned __int128 p = (unsigned __int128)a[i] * b[i];
    T part = I.x ? (T)(p >> (8 * sizeof(T))) : (T)p;
    unsigned __int128 r = (unsigned __int128)part + c[i] + (I.mode & 2 ? (w.cc >> i) & 1 : 0);
    d[i] = (T)r;
    if (I.mode & 1) w.cc = (w.cc & ~(1u << i)) | (uint32_t)((r >> (8 * sizeof(T))) & 1) << i;
  }
  return NEXT;
}

// ---------------------------------------------------------------- floating point
// clang-format off
BIN(FMin, (a != a) ? ((b != b) ? T(NAN) : b) : (b != b) ? a : (a == b ? (std::signbit(a) ? a : b) : (a < b ? a : b)))
BIN(FMax, (a != a) ? ((b != b) ? T(NAN) : b) : (b != b) ? a : (a == b ? (std::signbit(a) ? b : a) : (a > b ? a : b)))
BIN(FMinN, (a != a || b != b) ? T(NAN) : FMin::f(a, b))
BIN(FMaxN, (a != a || b != b) ? T(NAN) : FMax::f(a, b))
BIN(FDiv, a / b)
TRI(Fma, std::fma(a, b, c))
UN(FNeg, -a)
UN(FAbs, std::fabs(a))
UN(FSqrt, std::sqrt(a))
UN(FRcp, T(1) / a)
UN(FRsqrt, T(1.0 / std::sqrt((double)a)))
UN(FSin, std::sin(a))
UN(FCos, std::cos(a))
UN(FLg2, std::log2(a))
UN(FEx2, std::exp2(a))
UN(FTanh, std::tanh(a))
BIN(CopySign, std::copysign(b, a))
// clang-format on
template <class F>
struct XorSignAbs {
  template <class T>
  static T f(T a, T b) {
    T r = std::fabs(F::f(std::fabs(a), std::fabs(b)));
    return std::signbit(a) != std::signbit(b) ? -r : r;
  }
};

template <class F>
struct Ftz {
  template <class T>
  static T f(T a) {
    return ftz(F::f(ftz(a)));
  }
  template <class T>
  static T f(T a, T b) {
    return ftz(F::f(ftz(a), ftz(b)));
  }
  template <class T>
  static T f(T a, T b, T c) {
    return ftz(F::f(ftz(a), ftz(b), ftz(c)));
  }
};
template <class F>
struct Sat {
  template <class T>
  static T f(T a, T b) {
    return satf(F::f(a, b));
  }
  template <class T>
  static T f(T a, T b, T c) {
    return satf(F::f(a, b, c));
  }
};
template <class F>
struct SatFtz {
  template <class T>
  static T f(T a, T b) {
    return satf(Ftz<F>::f(a, b));
  }
  template <class T>
  static T f(T a, T b, T c) {
    return satf(Ftz<F>::f(a, b, c));
  }
};

// halves
inline f16_t mk(f16_t, float f) { return mkF16(f); }
inline bf16_t mk(bf16_t, float f) { return mkBf16(f); }
inline float oddF(double s) {
  float f = (float)s;
  double back = f;
  if (back != s && s == s) {
    uint32_t u = bitcast<uint32_t>(f);
    if (std::isinf(f)) return std::isinf(s) ? f : std::copysign(3.40282347e38f, f);
    if (!(u & 1)) {
      u += std::fabs(s) > std::fabs(back) ? 1 : -1;
      f = bitcast<float>(u);
    }
  }
  return f;
}
template <class F>
struct H2 {
  template <class H>
  static H f(H a, H b) {
    return mk(a, F::f(toF(a), toF(b)));
  }
};
template <class F>
struct H1 {
  template <class H>
  static H f(H a) {
    return mk(a, F::f(toF(a)));
  }
};
template <class F>
struct H2Sat {
  template <class H>
  static H f(H a, H b) {
    return mk(a, satf(F::f(toF(a), toF(b))));
  }
};
struct HFma {
  template <class H>
  static H f(H a, H b, H c) {
    return mk(a, oddF(fmaOdd(toF(a), toF(b), toF(c))));
  }
};
struct HFmaSat {
  template <class H>
  static H f(H a, H b, H c) {
    return mk(a, satf(oddF(fmaOdd(toF(a), toF(b), toF(c)))));
  }
};
struct HFmaRelu {
  template <class H>
  static H f(H a, H b, H c) {
    float v = oddF(fmaOdd(toF(a), toF(b), toF(c)));
    return mk(a, v > 0 || v != v ? v : 0.f);
  }
};
struct HNeg {
  template <class H>
  static H f(H a) {
    return H{(uint16_t)(a.v ^ 0x8000)};
  }
};
struct HAbs {
  template <class H>
  static H f(H a) {
    return H{(uint16_t)(a.v & 0x7fff)};
  }
};

// ---------------------------------------------------------------- comparisons
// clang-format off
#define CMP(name, ...) struct name { template <class T> static inline bool f(T a, T b) { return __VA_ARGS__; } };
CMP(Eq, a == b)
CMP(Ne, a < b || a > b)
CMP(INe, a != b)
CMP(Lt, a < b)
CMP(Le, a <= b)
CMP(Gt, a > b)
CMP(Ge, a >= b)
CMP(Equ, !(a < b || a > b))
CMP(Neu, !(a == b))
CMP(Ltu, !(a >= b))
CMP(Leu, !(a > b))
CMP(Gtu, !(a <= b))
CMP(Geu, !(a < b))
CMP(Num, a == a && b == b)
CMP(Nan, a != a || b != b)
// clang-format on
inline uint32_t boolOp(int op, uint32_t r, uint32_t c) {
  return op == 1 ? r & c : op == 2 ? r | c : op == 3 ? r ^ c : r;
}

template <class T, class F, bool Z>
uint32_t cmpAll(Warp& w, const Inst& I) {
  const T *a = w.src<T>(I.a), *b = w.src<T>(I.b);
  uint32_t r = 0;
  uint8_t t[32];
#pragma GCC ivdep
  for (int i = 0; i < 32; i++) {
    if constexpr (Z)
      t[i] = F::f(ftz(a[i]), ftz(b[i]));
    else
      t[i] = F::f(a[i], b[i]);
  }
  for (int i = 0; i < 4; i++) {
    uint64_t v;
    memcpy(&v, t + 8 * i, 8);
    r |= (uint32_t)((v * 0x0102040810204080ull) >> 56) << (8 * i);
  }
  return r;
}
// d|q = cmp boolop c;  I.mode: boolop, I.c: predicate
template <class T, class F, bool Z>
int opSetp(Warp& w, const Inst& I, uint32_t m) {
  uint32_t r = cmpAll<T, F, Z>(w, I), p = r, q = ~r;
  if (I.mode) {
    uint32_t c = *w.src<uint32_t>(I.c);
    if (I.flags & FL_NEGC) c = ~c;
    p = boolOp(I.mode, r, c);
    q = boolOp(I.mode, ~r, c);
  }
  if (I.d != kNone) {
    uint32_t& d = w.predReg(I.d);
    d = (d & ~m) | (p & m);
  }
  if (I.x != kNone) {
    uint32_t& d = w.predReg(I.x);
    d = (d & ~m) | (q & m);
  }
  return NEXT;
}
template <class T, class F, bool Z>
int opSet(Warp& w, const Inst& I, uint32_t m) {
  uint32_t r = cmpAll<T, F, Z>(w, I);
  if (I.mode) {
    uint32_t c = *w.src<uint32_t>(I.c);
    if (I.flags & FL_NEGC) c = ~c;
    r = boolOp(I.mode, r, c);
  }
  uint32_t* d = w.dst<uint32_t>(I.d);
  uint32_t one = I.y;
  forLanes(m, [=](int i) { d[i] = (r >> i) & 1 ? one : 0; });
  return NEXT;
}
// half comparisons; N = 2 writes d for the low and x for the high half
template <class H, int N, class F>
int opSetpH(Warp& w, const Inst& I, uint32_t m) {
  const H *a = w.src<H>(I.a), *b = w.src<H>(I.b);
  uint32_t r[2] = {0, 0};
  for (int i = 0; i < 32; i++)
    for (int k = 0; k < N; k++) r[k] |= (uint32_t)F::f(toF(a[i * N + k]), toF(b[i * N + k])) << i;
  uint32_t p = r[0], q = N == 2 ? r[1] : ~r[0];
  if (I.mode) {
    uint32_t c = *w.src<uint32_t>(I.c);
    if (I.flags & FL_NEGC) c = ~c;
    p = boolOp(I.mode, p, c);
    q = boolOp(I.mode, q, c);
  }
  if (I.d != kNone) {
    uint32_t& d = w.predReg(I.d);
    d = (d & ~m) | (p & m);
  }
  if (I.x != kNone) {
    uint32_t& d = w.predReg(I.x);
    d = (d & ~m) | (q & m);
  }
  return NEXT;
}
// set with half operands: y = 0: 0xffff.. / 1: 1.0 in the half type / 2: u32 all ones / 3: f32 one
template <class H, int N, class F>
int opSetH(Warp& w, const Inst& I, uint32_t m) {
  const H *a = w.src<H>(I.a), *b = w.src<H>(I.b);
  uint32_t c = 0;
  if (I.mode) {
    c = *w.src<uint32_t>(I.c);
    if (I.flags & FL_NEGC) c = ~c;
  }
  for (; m; m &= m - 1) {
    int i = __builtin_ctz(m);
    for (int k = 0; k < N; k++) {
      bool r = F::f(toF(a[i * N + k]), toF(b[i * N + k]));
      if (I.mode) r = boolOp(I.mode, r, (c >> i) & 1) & 1;
      if (I.y >= 2)
        w.dst<uint32_t>(I.d)[i] = r ? I.x : 0;
      else
        w.dst<uint16_t>(I.d)[i * N + k] = r ? (uint16_t)I.x : 0;
    }
  }
  return NEXT;
}

template <class T>
int opSelp(Warp& w, const Inst& I, uint32_t m) {
  T* d = w.dst<T>(I.d);
  const T *a = w.src<T>(I.a), *b = w.src<T>(I.b);
  uint32_t p = *w.src<uint32_t>(I.c);
  if (I.flags & FL_NEGC) p = ~p;
  forLanes(m, [=](int i) { d[i] = (p >> i) & 1 ? a[i] : b[i]; });
  return NEXT;
}
template <class T, class C>
int opSlct(Warp& w, const Inst& I, uint32_t m) {
  T* d = w.dst<T>(I.d);
  const T *a = w.src<T>(I.a), *b = w.src<T>(I.b);
  const C* c = w.src<C>(I.c);
  forLanes(m, [=](int i) { d[i] = c[i] >= 0 ? a[i] : b[i]; });
  return NEXT;
}

// ---------------------------------------------------------------- predicates
int opPredLogic(Warp& w, const Inst& I, uint32_t m) {
  uint32_t a = *w.src<uint32_t>(I.a), b = I.b != kNone ? *w.src<uint32_t>(I.b) : 0, r = 0;
  if (I.flags & FL_NEGB) b = ~b;
  if (I.flags & FL_NEGC) a = ~a;
  switch (I.mode) {
    case 0:
      r = a;
      break;
    case 1:
      r = a & b;
      break;
    case 2:
      r = a | b;
      break;
    case 3:
      r = a ^ b;
      break;
    default:
      r = ~a;
  }
  uint32_t& d = w.predReg(I.d);
  d = (d & ~m) | (r & m);
  return NEXT;
}

// ---------------------------------------------------------------- moves
template <class T>
int opMov(Warp& w, const Inst& I, uint32_t m) {
  T* d = w.dst<T>(I.d);
  const T* a = w.src<T>(I.a);
  if (m == ~0u) {
    memmove(d, a, 32 * sizeof(T));
    return NEXT;
  }
  forLanes(m, [=](int i) { d[i] = a[i]; });
  return NEXT;
}
struct B128 {
  uint64_t a, b;
};
int opMovWiden(Warp& w, const Inst& I, uint32_t m) {  // special registers into other widths
  const uint32_t* a = w.src<uint32_t>(I.a);
  forLanes(m, [&](int i) {
    if (I.dw == 8)
      w.dst<uint64_t>(I.d)[i] = a[i];
    else
      w.dst<uint16_t>(I.d)[i] = (uint16_t)a[i];
  });
  return NEXT;
}
int opMovLocal(Warp& w, const Inst& I, uint32_t m) {  // address of a .local variable
  uint64_t v = w.frame->localBase + (uint64_t)I.imm;
  forLanes(m, [&](int i) {
    if (I.dw == 8)
      w.dst<uint64_t>(I.d)[i] = v;
    else
      w.dst<uint32_t>(I.d)[i] = (uint32_t)v;
  });
  return NEXT;
}
int opMovDyn(Warp& w, const Inst& I, uint32_t m) {
  uint64_t v;
  if (I.mode <= D_CLOCKHI)
    v = (w.wk->executed + w.tick) * 4 + w.pc;
  else
    v = (uint64_t)std::chrono::duration_cast<std::chrono::nanoseconds>(
            std::chrono::steady_clock::now().time_since_epoch())
            .count();
  if (I.mode == D_CLOCKHI || I.mode == D_GTIMERHI) v >>= 32;
  if (I.mode <= D_CLOCKHI) w.tick++;
  forLanes(m, [&](int i) {
    if (I.dw == 8)
      w.dst<uint64_t>(I.d)[i] = v;
    else
      w.dst<uint32_t>(I.d)[i] = (uint32_t)v;
  });
  return NEXT;
}
// {a,b,..} -> d and a -> {d,..}: es bytes per element, vec elements
int opPack(Warp& w, const Inst& I, uint32_t m) {
  const Opnd* e = &w.frame->code->ext[I.ext];
  uint8_t* d = w.dst<uint8_t>(I.d);
  int n = I.vec, es = I.es;
  for (; m; m &= m - 1) {
    int i = __builtin_ctz(m);
    uint8_t t[16];
    for (int k = 0; k < n; k++) memcpy(t + k * es, w.src<uint8_t>(e[k]) + i * es, es);
    memcpy(d + i * n * es, t, n * es);
  }
  return NEXT;
}
template <class D, class E>
int opPack2(Warp& w, const Inst& I, uint32_t m) {
  const Opnd* e = &w.frame->code->ext[I.ext];
  D* d = w.dst<D>(I.d);
  const E *a = w.src<E>(e[0]), *b = w.src<E>(e[1]);
  forLanes(m, [=](int i) { d[i] = (D)a[i] | (D)b[i] << (8 * sizeof(E)); });
  return NEXT;
}
int opUnpack(Warp& w, const Inst& I, uint32_t m) {
  const Opnd* e = &w.frame->code->ext[I.ext];
  const uint8_t* a = w.src<uint8_t>(I.a);
  int n = I.vec, es = I.es;
  for (; m; m &= m - 1) {
    int i = __builtin_ctz(m);
    uint8_t t[16];
    memcpy(t, a + i * n * es, n * es);
    for (int k = 0; k < n; k++)
      if (e[k] != kNone) memcpy(w.dst<uint8_t>(e[k]) + i * es, t + k * es, es);
  }
  return NEXT;
}

int opDp4a(Warp& w, const Inst& I, uint32_t m) {  // mode bit 0: a signed, bit 1: b signed
  uint32_t* d = w.dst<uint32_t>(I.d);
  const uint32_t *a = w.src<uint32_t>(I.a), *b = w.src<uint32_t>(I.b), *c = w.src<uint32_t>(I.c);
  forLanes(m, [&](int i) {
    uint32_t s = c[i];
    for (int k = 0; k < 4; k++) {
      int x = (a[i] >> (8 * k)) & 255, y = (b[i] >> (8 * k)) & 255;
      if (I.mode & 1) x = (int8_t)x;
      if (I.mode & 2) y = (int8_t)y;
      s += (uint32_t)(x * y);
    }
    d[i] = s;
  });
  return NEXT;
}
int opDp2a(Warp& w, const Inst& I, uint32_t m) {  // x: 0 lo, 2 hi
  uint32_t* d = w.dst<uint32_t>(I.d);
  const uint32_t *a = w.src<uint32_t>(I.a), *b = w.src<uint32_t>(I.b), *c = w.src<uint32_t>(I.c);
  forLanes(m, [&](int i) {
    uint32_t s = c[i];
    for (int k = 0; k < 2; k++) {
      int x = (a[i] >> (16 * k)) & 65535, y = (b[i] >> (8 * (k + I.x))) & 255;
      if (I.mode & 1) x = (int16_t)x;
      if (I.mode & 2) y = (int8_t)y;
      s += (uint32_t)(x * y);
    }
    d[i] = s;
  });
  return NEXT;
}
template <class T>
int opTestp(Warp& w, const Inst& I, uint32_t m) {
  const T* a = w.src<T>(I.a);
  uint32_t r = 0;
  for (int i = 0; i < 32; i++) {
    int c = std::fpclassify(a[i]);
    bool v = false;
    switch (I.mode) {
      case 0:
        v = c != FP_NAN && c != FP_INFINITE;
        break;
      case 1:
        v = c == FP_INFINITE;
        break;
      case 2:
        v = c != FP_NAN;
        break;
      case 3:
        v = c == FP_NAN;
        break;
      case 4:
        v = c == FP_NORMAL;
        break;
      default:
        v = c == FP_SUBNORMAL;
        break;
    }
    r |= (uint32_t)v << i;
  }
  uint32_t& d = w.predReg(I.d);
  d = (d & ~m) | (r & m);
  return NEXT;
}

// ---------------------------------------------------------------- choosing instantiations
template <class F>
ExecFn unInt(const std::string& t) {
  if (t == "s16") return un<int16_t, int16_t, F>;
  if (t == "b16" || t == "u16") return un<uint16_t, uint16_t, F>;
  if (t == "s32") return un<int32_t, int32_t, F>;
  if (t == "b32" || t == "u32") return un<uint32_t, uint32_t, F>;
  if (t == "s64") return un<int64_t, int64_t, F>;
  if (t == "b64" || t == "u64") return un<uint64_t, uint64_t, F>;
  return nullptr;
}
template <class F>
ExecFn binInt(const std::string& t) {
  if (t == "s16") return bin<int16_t, int16_t, int16_t, F>;
  if (t == "b16" || t == "u16") return bin<uint16_t, uint16_t, uint16_t, F>;
  if (t == "s32") return bin<int32_t, int32_t, int32_t, F>;
  if (t == "b32" || t == "u32") return bin<uint32_t, uint32_t, uint32_t, F>;
  if (t == "s64") return bin<int64_t, int64_t, int64_t, F>;
  if (t == "b64" || t == "u64") return bin<uint64_t, uint64_t, uint64_t, F>;
  return nullptr;
}
template <class F>
ExecFn triInt(const std::string& t) {
  if (t == "s16") return tri<int16_t, int16_t, int16_t, int16_t, F>;
  if (t == "u16") return tri<uint16_t, uint16_t, uint16_t, uint16_t, F>;
  if (t == "s32") return tri<int32_t, int32_t, int32_t, int32_t, F>;
  if (t == "u32") return tri<uint32_t, uint32_t, uint32_t, uint32_t, F>;
  if (t == "s64") return tri<int64_t, int64_t, int64_t, int64_t, F>;
  if (t == "u64") return tri<uint64_t, uint64_t, uint64_t, uint64_t, F>;
  return nullptr;
}
template <class F>
ExecFn shiftInt(const std::string& t) {
  if (t == "s16") return bin<int16_t, int16_t, uint32_t, F>;
  if (t == "b16" || t == "u16") return bin<uint16_t, uint16_t, uint32_t, F>;
  if (t == "s32") return bin<int32_t, int32_t, uint32_t, F>;
  if (t == "b32" || t == "u32") return bin<uint32_t, uint32_t, uint32_t, F>;
  if (t == "s64") return bin<int64_t, int64_t, uint32_t, F>;
  if (t == "b64" || t == "u64") return bin<uint64_t, uint64_t, uint32_t, F>;
  return nullptr;
}
template <class F>
ExecFn binFloat(const std::string& t, bool z, bool sat, Rnd r) {
  if (t == "f32") {
    if (r != Rnd::RN)
      return z ? (sat ? binR<float, SatFtz<F>> : binR<float, Ftz<F>>)
               : (sat ? binR<float, Sat<F>> : binR<float, F>);
    return z ? (sat ? bin<float, float, float, SatFtz<F>> : bin<float, float, float, Ftz<F>>)
             : (sat ? bin<float, float, float, Sat<F>> : bin<float, float, float, F>);
  }
  if (t == "f64") return r != Rnd::RN ? binR<double, F> : bin<double, double, double, F>;
  return nullptr;
}
template <class F>
ExecFn unFloat(const std::string& t, bool z, Rnd r) {
  if (t == "f32")
    return r != Rnd::RN ? (z ? unR<float, Ftz<F>> : unR<float, F>)
                        : (z ? un<float, float, Ftz<F>> : un<float, float, F>);
  if (t == "f64") return r != Rnd::RN ? unR<double, F> : un<double, double, F>;
  return nullptr;
}
template <class F>
ExecFn binHalf(const std::string& t) {
  if (t == "f16") return binH<f16_t, 1, F>;
  if (t == "f16x2") return binH<f16_t, 2, F>;
  if (t == "bf16") return binH<bf16_t, 1, F>;
  if (t == "bf16x2") return binH<bf16_t, 2, F>;
  return nullptr;
}
template <class F>
ExecFn unHalf(const std::string& t) {
  if (t == "f16") return unH<f16_t, 1, F>;
  if (t == "f16x2") return unH<f16_t, 2, F>;
  if (t == "bf16") return unH<bf16_t, 1, F>;
  if (t == "bf16x2") return unH<bf16_t, 2, F>;
  return nullptr;
}
template <class F>
ExecFn triHalf(const std::string& t) {
  if (t == "f16") return triH<f16_t, 1, F>;
  if (t == "f16x2") return triH<f16_t, 2, F>;
  if (t == "bf16") return triH<bf16_t, 1, F>;
  if (t == "bf16x2") return triH<bf16_t, 2, F>;
  return nullptr;
}
bool isHalf(const std::string& t) {
  return t == "f16" || t == "f16x2" || t == "bf16" || t == "bf16x2";
}
bool isFloat(const std::string& t) { return t == "f32" || t == "f64"; }

enum class SetKind { Setp, Set };
template <class T, class F, bool Z>
ExecFn pickSet(SetKind k) {
  return k == SetKind::Setp ? (ExecFn)opSetp<T, F, Z> : (ExecFn)opSet<T, F, Z>;
}
template <class F>
ExecFn cmpHalf(SetKind k, const std::string& t) {
  if (t == "f16")
    return k == SetKind::Setp ? (ExecFn)opSetpH<f16_t, 1, F> : (ExecFn)opSetH<f16_t, 1, F>;
  if (t == "f16x2")
    return k == SetKind::Setp ? (ExecFn)opSetpH<f16_t, 2, F> : (ExecFn)opSetH<f16_t, 2, F>;
  if (t == "bf16")
    return k == SetKind::Setp ? (ExecFn)opSetpH<bf16_t, 1, F> : (ExecFn)opSetH<bf16_t, 1, F>;
  return k == SetKind::Setp ? (ExecFn)opSetpH<bf16_t, 2, F> : (ExecFn)opSetH<bf16_t, 2, F>;
}
template <class F, class FI>
ExecFn cmpFn(SetKind k, const std::string& t, bool z) {
  if (isHalf(t)) return cmpHalf<F>(k, t);
  if (t == "f32") return z ? pickSet<float, F, true>(k) : pickSet<float, F, false>(k);
  if (t == "f64") return pickSet<double, F, false>(k);
  if (t == "s16") return pickSet<int16_t, FI, false>(k);
  if (t == "u16" || t == "b16") return pickSet<uint16_t, FI, false>(k);
  if (t == "s32") return pickSet<int32_t, FI, false>(k);
  if (t == "u32" || t == "b32") return pickSet<uint32_t, FI, false>(k);
  if (t == "s64") return pickSet<int64_t, FI, false>(k);
  if (t == "u64" || t == "b64") return pickSet<uint64_t, FI, false>(k);
  return nullptr;
}
ExecFn compare(Decoder& D, SetKind k, const std::string& t, bool z) {
  if (D.has("eq")) return cmpFn<Eq, Eq>(k, t, z);
  if (D.has("ne")) return cmpFn<Ne, INe>(k, t, z);
  if (D.has("lt") || D.has("lo")) return cmpFn<Lt, Lt>(k, t, z);
  if (D.has("le") || D.has("ls")) return cmpFn<Le, Le>(k, t, z);
  if (D.has("gt") || D.has("hi")) return cmpFn<Gt, Gt>(k, t, z);
  if (D.has("ge") || D.has("hs")) return cmpFn<Ge, Ge>(k, t, z);
  if (D.has("equ")) return cmpFn<Equ, Eq>(k, t, z);
  if (D.has("neu")) return cmpFn<Neu, INe>(k, t, z);
  if (D.has("ltu")) return cmpFn<Ltu, Lt>(k, t, z);
  if (D.has("leu")) return cmpFn<Leu, Le>(k, t, z);
  if (D.has("gtu")) return cmpFn<Gtu, Gt>(k, t, z);
  if (D.has("geu")) return cmpFn<Geu, Ge>(k, t, z);
  if (D.has("num")) return cmpFn<Num, Num>(k, t, z);
  if (D.has("nan")) return cmpFn<Nan, Nan>(k, t, z);
  return nullptr;
}

bool decodeMov(Decoder& D, Inst& I) {
  const std::string& t = D.type();
  const Operand &d = D.op(0), &a = D.op(1);
  if (t == "pred") {
    bool neg;
    I.fn = opPredLogic;
    I.d = D.predDst(d);
    I.a = D.predSrc(a, &neg);
    if (neg) I.flags |= FL_NEGC;
    return true;
  }
  int bytes = typeBytes(t);
  if (a.kind == Operand::Vec || d.kind == Operand::Vec) {
    const Operand& v = a.kind == Operand::Vec ? a : d;
    if (a.kind == Operand::Vec && d.kind == Operand::Vec) D.fail("vector to vector");
    I.vec = (uint8_t)v.sub.size();
    if (!I.vec || bytes % I.vec) D.fail("vector size does not fit");
    I.es = (uint8_t)(bytes / I.vec);
    std::string et = "b" + std::to_string(8 * I.es);
    std::vector<Opnd> l;
    for (auto& s : v.sub) {
      if (&v == &a)
        l.push_back(D.src(s, et));
      else
        l.push_back(s.kind == Operand::Sink ? kNone : D.dst(s, I.es));
    }
    I.ext = D.list(l);
    if (&v == &a) {
      I.d = D.dst(d, bytes);
      bool two = I.vec == 2;
      I.fn = two && bytes == 4   ? opPack2<uint32_t, uint16_t>
             : two && bytes == 8 ? opPack2<uint64_t, uint32_t>
                                 : opPack;
    } else {
      I.a = D.src(a, t);
      I.fn = opUnpack;
    }
    return true;
  }
  I.d = D.dst(d, 0, &I.dw);
  if (I.dw != bytes) D.fail("register width differs from the type of");
  if (a.kind == Operand::Special && D.dynSpecial(a.sym) >= 0) {
    I.mode = (uint8_t)D.dynSpecial(a.sym);
    I.fn = opMovDyn;
    return true;
  }
  if (a.kind == Operand::Sym) {
    const Var* v = D.F.findVar(D.p->scope, a.sym);
    if (v && v->space == Space::Local) {
      I.fn = opMovLocal;
      I.imm = (int64_t)v->offset + a.off;
      return true;
    }
    if (v && v->space == Space::Param && !D.F.isEntry)
      D.fail("address of a device-function parameter");
  }
  I.a = D.src(a, t, &I.aw);
  if (I.aw != bytes) {
    I.fn = opMovWiden;
    return true;
  }
  if (a.kind == Operand::Reg) I.flags |= FL_MOV;
  I.fn = bytes == 2    ? opMov<uint16_t>
         : bytes == 4  ? opMov<uint32_t>
         : bytes == 8  ? opMov<uint64_t>
         : bytes == 16 ? opMov<B128>
                       : nullptr;
  return I.fn != nullptr;
}

void operands(Decoder& D, Inst& I, const std::string& dt, const std::string& at,
              const std::string& bt = "", const std::string& ct = "") {
  I.d = D.dst(D.op(0), typeBytes(dt));
  I.a = D.src(D.op(1), at);
  if (!bt.empty()) I.b = D.src(D.op(2), bt);
  if (!ct.empty()) I.c = D.src(D.op(3), ct);
}

}  // namespace

bool decodeAlu(Decoder& D, Inst& I) {
  const std::string& o = D.p->parts[0];
  auto T = [&]() -> const std::string& { return D.type(); };
  auto fp = [&](const std::string& t) { return t == "f64" ? C_FP64 : isHalf(t) ? C_FP16 : C_FP32; };
  auto perThread = [&](const std::string& t) {
    return t.size() > 2 && t.substr(t.size() - 2) == "x2" ? 2.0 : 1.0;
  };

  if (o == "mov") return decodeMov(D, I);

  if (o == "add" || o == "sub" || o == "mul") {
    if (D.types.size() == 2) D.fail("mixed-precision form is not supported:");
    const std::string& t = T();
    bool add = o == "add", mul = o == "mul";
    if (isFloat(t)) {
      Rnd r = D.rounding();
      bool z = D.has("ftz"), s = D.has("sat");
      I.mode = (uint8_t)r;
      operands(D, I, t, t, t);
      I.fn = add   ? binFloat<Add>(t, z, s, r)
             : mul ? binFloat<Mul>(t, z, s, r)
                   : binFloat<Sub>(t, z, s, r);
      I.cls = fp(t);
      I.flops = 1;
      return true;
    }
    if (isHalf(t)) {
      D.has("rn");
      D.has("ftz");
      bool s = D.has("sat");
      operands(D, I, t, t, t);
      I.fn = s ? (add   ? binHalf<H2Sat<Add>>(t)
                  : mul ? binHalf<H2Sat<Mul>>(t)
                        : binHalf<H2Sat<Sub>>(t))
               : (add   ? binHalf<H2<Add>>(t)
                  : mul ? binHalf<H2<Mul>>(t)
                        : binHalf<H2<Sub>>(t));
      I.cls = C_FP16;
      I.flops = perThread(t);
      return true;
    }
    if (mul) {
      if (D.has("wide")) {
        std::string wt = t.substr(0, 1) + (typeBytes(t) == 2 ? "32" : "64");
        operands(D, I, wt, t, t);
        I.fn = t == "u16"   ? bin<uint32_t, uint16_t, uint16_t, MulWide>
               : t == "s16" ? bin<int32_t, int16_t, int16_t, MulWide>
               : t == "u32" ? bin<uint64_t, uint32_t, uint32_t, MulWide>
               : t == "s32" ? bin<int64_t, int32_t, int32_t, MulWide>
                            : nullptr;
        return I.fn != nullptr;
      }
      operands(D, I, t, t, t);
      bool hi = D.has("hi");
      D.has("lo");
      I.fn = hi ? binInt<MulHi>(t) : binInt<Mul>(t);
      return I.fn != nullptr;
    }
    operands(D, I, t, t, t);
    if (D.has("cc")) {
      I.mode = 1;
      bool w8 = typeBytes(t) == 8;
      I.fn = add ? (w8 ? opAddC<uint64_t> : opAddC<uint32_t>)
                 : (w8 ? opSubC<uint64_t> : opSubC<uint32_t>);
      return true;
    }
    if (D.has("sat")) {
      if (t != "s32") return false;
      I.fn = add ? bin<int32_t, int32_t, int32_t, AddSat> : bin<int32_t, int32_t, int32_t, SubSat>;
      return true;
    }
    if (t == "s16x2" || t == "u16x2") {
      if (!add) return false;
      struct A2 {
        static uint32_t f(uint32_t a, uint32_t b) {
          return ((a + b) & 0xffff) | (((a >> 16) + (b >> 16)) << 16);
        }
      };
      I.fn = bin<uint32_t, uint32_t, uint32_t, A2>;
      return true;
    }
    I.fn = add ? binInt<Add>(t) : binInt<Sub>(t);
    return I.fn != nullptr;
  }
  if (o == "addc" || o == "subc") {
    const std::string& t = T();
    operands(D, I, t, t, t);
    I.mode = 2 | (D.has("cc") ? 1 : 0);
    bool w8 = typeBytes(t) == 8;
    I.fn = o == "addc" ? (w8 ? opAddC<uint64_t> : opAddC<uint32_t>)
                       : (w8 ? opSubC<uint64_t> : opSubC<uint32_t>);
    return true;
  }
  if (o == "mad" || o == "fma" || o == "madc") {
    const std::string& t = T();
    if (isFloat(t)) {
      Rnd r = D.rounding();
      bool z = D.has("ftz"), s = D.has("sat");
      I.mode = (uint8_t)r;
      operands(D, I, t, t, t, t);
      I.cls = t == "f64" ? C_FP64 : C_FMA;
      I.flops = 2;
      if (t == "f64")
        I.fn = r != Rnd::RN ? triR<double, Fma> : tri<double, double, double, double, Fma>;
      else if (r != Rnd::RN)
        I.fn = z ? (s ? triR<float, SatFtz<Fma>> : triR<float, Ftz<Fma>>)
                 : (s ? triR<float, Sat<Fma>> : triR<float, Fma>);
      else
        I.fn = z ? (s ? tri<float, float, float, float, SatFtz<Fma>>
                      : tri<float, float, float, float, Ftz<Fma>>)
                 : (s ? tri<float, float, float, float, Sat<Fma>>
                      : tri<float, float, float, float, Fma>);
      return true;
    }
    if (isHalf(t)) {
      D.has("rn");
      D.has("ftz");
      operands(D, I, t, t, t, t);
      I.fn = D.has("relu")  ? triHalf<HFmaRelu>(t)
             : D.has("sat") ? triHalf<HFmaSat>(t)
                            : triHalf<HFma>(t);
      I.cls = C_FP16;
      I.flops = 2 * perThread(t);
      return true;
    }
    if (D.has("wide")) {
      std::string wt = t.substr(0, 1) + (typeBytes(t) == 2 ? "32" : "64");
      operands(D, I, wt, t, t, wt);
      I.fn = t == "u16"   ? tri<uint32_t, uint16_t, uint16_t, uint32_t, MadWide>
             : t == "s16" ? tri<int32_t, int16_t, int16_t, int32_t, MadWide>
             : t == "u32" ? tri<uint64_t, uint32_t, uint32_t, uint64_t, MadWide>
             : t == "s32" ? tri<int64_t, int32_t, int32_t, int64_t, MadWide>
                          : nullptr;
      return I.fn != nullptr;
    }
    operands(D, I, t, t, t, t);
    bool hi = D.has("hi"), cc = D.has("cc");
    D.has("lo");
    if (cc || o == "madc") {
      I.mode = (cc ? 1 : 0) | (o == "madc" ? 2 : 0);
      I.x = hi;
      if (hi && t[0] == 's') D.fail("signed carry chain is not supported:");
      I.fn = typeBytes(t) == 8 ? opMadC<uint64_t> : opMadC<uint32_t>;
      return true;
    }
    if (D.has("sat")) {
      if (!hi || t != "s32") return false;
      I.fn = tri<int32_t, int32_t, int32_t, int32_t, MadHiSat>;
      return true;
    }
    I.fn = hi ? triInt<MadHi>(t) : triInt<Mad>(t);
    return I.fn != nullptr;
  }
  if (o == "mul24" || o == "mad24") {
    const std::string& t = T();
    bool hi = D.has("hi");
    D.has("lo");
    if (o == "mul24") {
      operands(D, I, t, t, t);
      I.fn = t == "u32" ? (hi ? bin<uint32_t, uint32_t, uint32_t, Mul24Hi>
                              : bin<uint32_t, uint32_t, uint32_t, Mul24>)
                        : (hi ? bin<int32_t, int32_t, int32_t, Mul24Hi>
                              : bin<int32_t, int32_t, int32_t, Mul24>);
      return true;
    }
    if (hi) D.fail("not supported:");
    operands(D, I, t, t, t, t);
    I.fn = t == "u32" ? tri<uint32_t, uint32_t, uint32_t, uint32_t, Mad24>
                      : tri<int32_t, int32_t, int32_t, int32_t, Mad24>;
    return true;
  }
  if (o == "sad") {
    operands(D, I, T(), T(), T(), T());
    I.fn = triInt<Sad>(T());
    return I.fn;
  }
  if (o == "div" || o == "rem") {
    const std::string& t = T();
    if (isFloat(t)) {
      bool ap = D.has("approx") | D.has("full");
      Rnd r = D.rounding();
      bool z = D.has("ftz");
      (void)ap;
      I.mode = (uint8_t)r;
      operands(D, I, t, t, t);
      I.fn = binFloat<FDiv>(t, z, false, r);
      I.cls = ap ? C_SFU : fp(t);
      I.flops = 1;
      return true;
    }
    operands(D, I, t, t, t);
    I.fn = o == "div" ? binInt<IDiv>(t) : binInt<IRem>(t);
    return I.fn;
  }
  if (o == "min" || o == "max") {
    const std::string& t = T();
    bool mn = o == "min";
    if (isFloat(t) || isHalf(t)) {
      if (D.nops() != 3) D.fail("three-input form is not supported:");
      bool z = D.has("ftz"), nan = D.has("NaN"), xs = D.has("xorsign");
      if (xs) D.has("abs");
      operands(D, I, t, t, t);
      I.cls = fp(t);
      I.flops = perThread(t);
      if (isHalf(t)) {
        if (xs)
          I.fn = mn ? binHalf<H2<XorSignAbs<FMin>>>(t) : binHalf<H2<XorSignAbs<FMax>>>(t);
        else
          I.fn = nan ? (mn ? binHalf<H2<FMinN>>(t) : binHalf<H2<FMaxN>>(t))
                     : (mn ? binHalf<H2<FMin>>(t) : binHalf<H2<FMax>>(t));
      } else if (xs)
        I.fn = mn ? binFloat<XorSignAbs<FMin>>(t, z, false, Rnd::RN)
                  : binFloat<XorSignAbs<FMax>>(t, z, false, Rnd::RN);
      else
        I.fn = nan ? (mn ? binFloat<FMinN>(t, z, false, Rnd::RN)
                         : binFloat<FMaxN>(t, z, false, Rnd::RN))
                   : (mn ? binFloat<FMin>(t, z, false, Rnd::RN)
                         : binFloat<FMax>(t, z, false, Rnd::RN));
      return true;
    }
    operands(D, I, t, t, t);
    if (t == "s16x2" || t == "u16x2") {
      bool s = t[0] == 's';
      I.fn = s ? (mn ? binH<int16_t, 2, IMin> : binH<int16_t, 2, IMax>)
               : (mn ? binH<uint16_t, 2, IMin> : binH<uint16_t, 2, IMax>);
      return true;
    }
    I.fn = mn ? binInt<IMin>(t) : binInt<IMax>(t);
    return I.fn;
  }
  if (o == "abs" || o == "neg") {
    const std::string& t = T();
    bool ab = o == "abs", z = D.has("ftz");
    operands(D, I, t, t);
    if (isHalf(t)) {
      I.fn = ab ? unHalf<HAbs>(t) : unHalf<HNeg>(t);
      I.cls = C_FP16;
    } else if (isFloat(t)) {
      I.fn = ab ? unFloat<FAbs>(t, z, Rnd::RN) : unFloat<FNeg>(t, z, Rnd::RN);
      I.cls = fp(t);
    } else
      I.fn = ab ? unInt<IAbs>(t) : unInt<INeg>(t);
    return I.fn;
  }
  if (o == "and" || o == "or" || o == "xor" || o == "not") {
    const std::string& t = T();
    if (t == "pred") {
      bool na, nb = false;
      I.d = D.predDst(D.op(0));
      I.a = D.predSrc(D.op(1), &na);
      if (o != "not") I.b = D.predSrc(D.op(2), &nb);
      if (na) I.flags |= FL_NEGC;
      if (nb) I.flags |= FL_NEGB;
      I.mode = o == "and" ? 1 : o == "or" ? 2 : o == "xor" ? 3 : 4;
      I.fn = opPredLogic;
      return true;
    }
    if (o == "not") {
      operands(D, I, t, t);
      I.fn = unInt<Not>(t);
      return I.fn;
    }
    operands(D, I, t, t, t);
    I.fn = o == "and" ? binInt<And>(t) : o == "or" ? binInt<Or>(t) : binInt<Xor>(t);
    return I.fn;
  }
  if (o == "cnot") {
    operands(D, I, T(), T());
    I.fn = unInt<CNot>(T());
    return I.fn;
  }
  if (o == "shl" || o == "shr") {
    operands(D, I, T(), T(), "u32");
    I.fn = o == "shl" ? shiftInt<Shl>(T()) : shiftInt<Shr>(T());
    return I.fn;
  }
  if (o == "shf") {
    operands(D, I, "b32", "b32", "b32", "u32");
    bool l = D.has("l"), wrap = D.has("wrap");
    D.has("r");
    D.has("clamp");
    using F = uint32_t;
    I.fn = l ? (wrap ? tri<F, F, F, F, ShfLW> : tri<F, F, F, F, ShfLC>)
             : (wrap ? tri<F, F, F, F, ShfRW> : tri<F, F, F, F, ShfRC>);
    return true;
  }
  if (o == "popc" || o == "clz" || o == "bfind") {
    const std::string& t = T();
    bool sh = D.has("shiftamt"), w8 = typeBytes(t) == 8, s = t[0] == 's';
    operands(D, I, "u32", t);
    using u = uint32_t;
    if (o == "popc")
      I.fn = w8 ? un<u, uint64_t, Popc> : un<u, uint32_t, Popc>;
    else if (o == "clz")
      I.fn = w8 ? un<u, uint64_t, Clz> : un<u, uint32_t, Clz>;
    else if (sh)
      I.fn = w8 ? (s ? un<u, int64_t, BfindS> : un<u, uint64_t, BfindS>)
                : (s ? un<u, int32_t, BfindS> : un<u, uint32_t, BfindS>);
    else
      I.fn = w8 ? (s ? un<u, int64_t, Bfind> : un<u, uint64_t, Bfind>)
                : (s ? un<u, int32_t, Bfind> : un<u, uint32_t, Bfind>);
    return true;
  }
  if (o == "brev") {
    operands(D, I, T(), T());
    I.fn = typeBytes(T()) == 8 ? un<uint64_t, uint64_t, Brev> : un<uint32_t, uint32_t, Brev>;
    return true;
  }
  if (o == "bfe") {
    const std::string& t = T();
    operands(D, I, t, t, "u32", "u32");
    using u = uint32_t;
    I.fn = t == "u32" || t == "b32"   ? tri<uint32_t, uint32_t, u, u, Bfe>
           : t == "s32"               ? tri<int32_t, int32_t, u, u, Bfe>
           : t == "u64" || t == "b64" ? tri<uint64_t, uint64_t, u, u, Bfe>
                                      : tri<int64_t, int64_t, u, u, Bfe>;
    return true;
  }
  if (o == "bfi") {
    const std::string& t = T();
    operands(D, I, t, t, t, "u32");
    I.ext = D.list({D.src(D.op(4), "u32")});
    I.fn = typeBytes(t) == 8 ? opBfi<uint64_t> : opBfi<uint32_t>;
    return true;
  }
  if (o == "bmsk") {
    D.has("clamp");
    if (D.has("wrap")) D.fail("not supported:");
    operands(D, I, "b32", "u32", "u32");
    I.fn = bin<uint32_t, uint32_t, uint32_t, Bmsk>;
    return true;
  }
  if (o == "prmt") {
    static const char* modes[] = {"", "f4e", "b4e", "rc8", "ecl", "ecr", "rc16"};
    for (int k = 1; k < 7; k++)
      if (D.has(modes[k])) I.mode = (uint8_t)k;
    operands(D, I, "b32", "b32", "b32", "b32");
    I.fn = opPrmt;
    return true;
  }
  if (o == "lop3") {
    operands(D, I, "b32", "b32", "b32", "b32");
    if (D.op(4).kind != Operand::Imm) D.fail("immediate LUT expected in");
    I.x = (uint32_t)D.op(4).bits & 255;
    I.fn = opLop3;
    return true;
  }
  if (o == "setp" || o == "set") {
    bool sp = o == "setp", z = D.has("ftz");
    const std::string t = D.type(sp ? 0 : 1);
    I.mode = D.has("and") ? 1 : D.has("or") ? 2 : D.has("xor") ? 3 : 0;
    I.fn = compare(D, sp ? SetKind::Setp : SetKind::Set, t, z);
    if (!I.fn) D.fail("unknown comparison");
    I.cls = isFloat(t) || isHalf(t) ? fp(t) : C_ALU;
    I.a = D.src(D.op(1), t);
    I.b = D.src(D.op(2), t);
    if (I.mode) {
      bool neg;
      I.c = D.predSrc(D.op(3), &neg);
      if (neg) I.flags |= FL_NEGC;
    }
    if (sp) {
      I.d = D.predDst(D.op(0));
      I.x = D.op(0).reg2 >= 0 ? D.C.regOff[D.op(0).reg2] : kNone;
    } else {
      const std::string dt = D.type(0);
      I.d = D.dst(D.op(0), typeBytes(dt));
      if (isHalf(t)) {
        if (dt == t) {
          I.y = 1;
          I.x = t[0] == 'b' ? 0x3f80 : 0x3c00;
        } else if (typeBytes(dt) == typeBytes(t)) {
          I.y = 0;
          I.x = 0xffff;
        } else {
          I.y = 2;
          I.x = dt == "f32" ? 0x3f800000u : ~0u;
        }
      } else {
        if (typeBytes(dt) != 4) D.fail("destination type is not supported:");
        I.y = dt == "f32" ? 0x3f800000u : ~0u;
      }
    }
    return true;
  }
  if (o == "selp") {
    const std::string& t = T();
    operands(D, I, t, t, t);
    bool neg;
    I.c = D.predSrc(D.op(3), &neg);
    if (neg) I.flags |= FL_NEGC;
    int b = typeBytes(t);
    I.fn = b == 2 ? opSelp<uint16_t> : b == 4 ? opSelp<uint32_t> : opSelp<uint64_t>;
    return true;
  }
  if (o == "slct") {
    const std::string &t = D.type(0), &c = D.type(1);
    D.has("ftz");
    operands(D, I, t, t, t, c);
    int b = typeBytes(t);
    if (c == "s32")
      I.fn = b == 2   ? opSlct<uint16_t, int32_t>
             : b == 4 ? opSlct<uint32_t, int32_t>
                      : opSlct<uint64_t, int32_t>;
    else
      I.fn = b == 2   ? opSlct<uint16_t, float>
             : b == 4 ? opSlct<uint32_t, float>
                      : opSlct<uint64_t, float>;
    return true;
  }
  if (o == "rcp" || o == "sqrt" || o == "rsqrt" || o == "sin" || o == "cos" || o == "lg2" ||
      o == "ex2" || o == "tanh") {
    const std::string& t = T();
    D.has("approx");
    Rnd r = D.rounding();
    bool z = D.has("ftz");
    I.mode = (uint8_t)r;
    operands(D, I, t, t);
    I.cls = C_SFU;
    I.flops = perThread(t);
    if (isHalf(t)) {
      I.fn = o == "ex2" ? unHalf<H1<FEx2>>(t) : o == "tanh" ? unHalf<H1<FTanh>>(t) : nullptr;
      return I.fn;
    }
    I.fn = o == "rcp"     ? unFloat<FRcp>(t, z, r)
           : o == "sqrt"  ? unFloat<FSqrt>(t, z, r)
           : o == "rsqrt" ? unFloat<FRsqrt>(t, z, r)
           : o == "sin"   ? unFloat<FSin>(t, z, r)
           : o == "cos"   ? unFloat<FCos>(t, z, r)
           : o == "lg2"   ? unFloat<FLg2>(t, z, r)
           : o == "ex2"   ? unFloat<FEx2>(t, z, r)
                          : unFloat<FTanh>(t, z, r);
    return true;
  }
  if (o == "copysign") {
    operands(D, I, T(), T(), T());
    I.fn = binFloat<CopySign>(T(), false, false, Rnd::RN);
    I.cls = fp(T());
    return I.fn;
  }
  if (o == "testp") {
    static const char* ms[] = {"finite", "infinite", "number", "notanumber", "normal", "subnormal"};
    for (int k = 0; k < 6; k++)
      if (D.has(ms[k])) I.mode = (uint8_t)k;
    I.d = D.predDst(D.op(0));
    I.a = D.src(D.op(1), T());
    I.fn = T() == "f64" ? opTestp<double> : opTestp<float>;
    return true;
  }
  if (o == "dp4a" || o == "dp2a") {
    I.mode = (D.type(0) == "s32" ? 1 : 0) | (D.type(1) == "s32" ? 2 : 0);
    operands(D, I, "b32", "b32", "b32", "b32");
    if (o == "dp2a") {
      I.x = D.has("hi") ? 2 : 0;
      D.has("lo");
      I.fn = opDp2a;
    } else
      I.fn = opDp4a;
    return true;
  }
  return false;
}

}  // namespace ptxvm
