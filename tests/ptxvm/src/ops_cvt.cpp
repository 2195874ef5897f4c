// cvt in all its forms.
#include <algorithm>
#include <climits>

#include "decode.h"

namespace ptxvm {
namespace {

enum K : uint8_t {
  K_S8,
  K_U8,
  K_S16,
  K_U16,
  K_S32,
  K_U32,
  K_S64,
  K_U64,
  K_F16,
  K_BF16,
  K_F32,
  K_F64,
  K_TF32
};
enum F : uint8_t { CV_FTZ = 1, CV_SAT = 2, CV_RINT = 4, CV_RELU = 8 };

int kind(const std::string& t) {
  static const std::unordered_map<std::string, int> m = {
      {"s8", K_S8},   {"u8", K_U8},    {"b8", K_U8},   {"s16", K_S16},   {"u16", K_U16},
      {"b16", K_U16}, {"s32", K_S32},  {"u32", K_U32}, {"b32", K_U32},   {"s64", K_S64},
      {"u64", K_U64}, {"b64", K_U64},  {"f16", K_F16}, {"bf16", K_BF16}, {"f32", K_F32},
      {"f64", K_F64}, {"tf32", K_TF32}};
  auto it = m.find(t);
  return it == m.end() ? -1 : it->second;
}
bool isInt(int k) { return k <= K_U64; }

double rint_(double v, Rnd r) {
  switch (r) {
    case Rnd::RZ:
      return std::trunc(v);
    case Rnd::RM:
      return std::floor(v);
    case Rnd::RP:
      return std::ceil(v);
    default:
      return std::nearbyint(v);
  }
}

uint64_t floatToInt(double v, int dk, Rnd r) {
  if (v != v) return dk == K_S64 || dk == K_U64 ? 1ull << 63 : 0;
  v = rint_(v, r);
  static const double lo[] = {-128, 0, -32768, 0, -2147483648.0, 0, -9223372036854775808.0, 0};
  static const double hi[] = {127,
                              255,
                              32767,
                              65535,
                              2147483647.0,
                              4294967295.0,
                              9223372036854775808.0,
                              18446744073709551616.0};
  if (v <= lo[dk]) return dk == K_S64 ? (uint64_t)LLONG_MIN : (uint64_t)(int64_t)lo[dk];
  if (dk == K_S64) return v >= hi[dk] ? (uint64_t)LLONG_MAX : (uint64_t)(int64_t)v;
  if (dk == K_U64) return v >= hi[dk] ? ~0ull : (uint64_t)v;
  if (v >= hi[dk]) v = hi[dk];
  return (uint64_t)(int64_t)v;
}

float toFloatR(double v, Rnd r) {
  if (r == Rnd::RN) return (float)v;
  RoundScope rs(r);
  volatile double x = v;
  volatile float f = (float)x;
  return f;
}

// One element, any pair of kinds. mode: rounding; x: source kind; y: destination kind; sext: flags
int opCvt(Warp& w, const Inst& I, uint32_t m) {
  int sk = I.x, dk = I.y;
  Rnd r = (Rnd)I.mode;
  uint8_t fl = I.sext;
  const uint8_t* a = w.src<uint8_t>(I.a);
  uint8_t* d = w.dst<uint8_t>(I.d);
  for (; m; m &= m - 1) {
    int i = __builtin_ctz(m);
    uint64_t out = 0;
    const uint8_t* p = a + i * I.aw;
    if (isInt(sk)) {
      int64_t v = 0;
      switch (sk) {
        case K_S8:
          v = *(int8_t*)p;
          break;
        case K_U8:
          v = *p;
          break;
        case K_S16:
          v = *(int16_t*)p;
          break;
        case K_U16:
          v = *(uint16_t*)p;
          break;
        case K_S32:
          v = *(int32_t*)p;
          break;
        case K_U32:
          v = *(uint32_t*)p;
          break;
        default:
          v = *(int64_t*)p;
      }
      if (isInt(dk)) {
        if (fl & CV_SAT) {
          __int128 x = sk == K_U64 ? (__int128)(uint64_t)v : (__int128)v, lo, hi;
          int bits = 8 << (dk / 2);
          if (dk & 1) {
            lo = 0;
            hi = ((__int128)1 << bits) - 1;
          } else {
            lo = -((__int128)1 << (bits - 1));
            hi = -lo - 1;
          }
          v = (int64_t)(x < lo ? lo : x > hi ? hi : x);
        }
        out = (uint64_t)v;
      } else if (dk == K_F64) {
        RoundScope rs(r);
        volatile double t = sk == K_U64 ? (double)(uint64_t)v : (double)v;
        out = bitcast<uint64_t>((double)t);
      } else if (dk == K_F32) {
        RoundScope rs(r);
        volatile float t = sk == K_U64 ? (float)(uint64_t)v : (float)v;
        out = bitcast<uint32_t>((float)t);
      } else {
        double t = sk == K_U64 ? (double)(uint64_t)v : (double)v;
        out = packFloat(t, dk == K_F16 ? 5 : 8, dk == K_F16 ? 10 : 7, r, true, false);
      }
    } else {
      double v;
      switch (sk) {
        case K_F16:
          v = toF(*(f16_t*)p);
          break;
        case K_BF16:
          v = toF(*(bf16_t*)p);
          break;
        case K_F32: {
          float f = *(float*)p;
          if (fl & CV_FTZ) f = ftz(f);
          v = f;
          break;
        }
        default:
          v = *(double*)p;
      }
      if (isInt(dk))
        out = floatToInt(v, dk, r);
      else {
        if (fl & CV_RINT) {
          v = rint_(v, r);
        }
        if (fl & CV_SAT) v = satf(v);
        if ((fl & CV_RELU) && v < 0) v = 0;
        switch (dk) {
          case K_F64:
            out = bitcast<uint64_t>(v);
            break;
          case K_F32: {
            float f = toFloatR(v, fl & CV_RINT ? Rnd::RN : r);
            if (fl & CV_FTZ) f = ftz(f);
            if (v != v) f = bitcast<float>(sk == K_F32 ? *(uint32_t*)p : 0x7fffffffu);
            out = bitcast<uint32_t>(f);
            break;
          }
          case K_TF32: {
            uint32_t t = packFloat(v, 8, 10, r, true, false) << 13;
            out = t;
            break;
          }
          case K_F16:
            out = packFloat(v, 5, 10, r, true, false);
            break;
          default:
            out = packFloat(v, 8, 7, r, true, false);
        }
      }
    }
    // extend to the width of the destination register
    switch (dk) {
      case K_S8:
        out = (uint64_t)(int64_t)(int8_t)out;
        break;
      case K_U8:
        out = (uint8_t)out;
        break;
      case K_S16:
        out = (uint64_t)(int64_t)(int16_t)out;
        break;
      case K_U16:
        out = (uint16_t)out;
        break;
      case K_S32:
        out = (uint64_t)(int64_t)(int32_t)out;
        break;
      case K_U32:
        out = (uint32_t)out;
        break;
    }
    memcpy(d + i * I.dw, &out, I.dw);
  }
  return NEXT;
}

// the frequent pairs, register width equal to the type
template <class D, class S>
int fastInt(Warp& w, const Inst& I, uint32_t m) {
  D* d = w.dst<D>(I.d);
  const S* a = w.src<S>(I.a);
  forLanes(m, [=](int i) { d[i] = (D)a[i]; });
  return NEXT;
}
int fastHF(Warp& w, const Inst& I, uint32_t m) {
  float* d = w.dst<float>(I.d);
  const f16_t* a = w.src<f16_t>(I.a);
  forLanes(m, [=](int i) { d[i] = toF(a[i]); });
  return NEXT;
}
int fastBF(Warp& w, const Inst& I, uint32_t m) {
  float* d = w.dst<float>(I.d);
  const bf16_t* a = w.src<bf16_t>(I.a);
  forLanes(m, [=](int i) { d[i] = toF(a[i]); });
  return NEXT;
}
int fastFH(Warp& w, const Inst& I, uint32_t m) {
  f16_t* d = w.dst<f16_t>(I.d);
  const float* a = w.src<float>(I.a);
  forLanes(m, [=](int i) { d[i] = mkF16(a[i]); });
  return NEXT;
}
int fastFB(Warp& w, const Inst& I, uint32_t m) {
  bf16_t* d = w.dst<bf16_t>(I.d);
  const float* a = w.src<float>(I.a);
  forLanes(m, [=](int i) { d[i] = mkBf16(a[i]); });
  return NEXT;
}

// x2 destinations. mode rounding; x: 0 f16x2, 1 bf16x2, 2 e4m3x2, 3 e5m2x2; y: source (0 two f32, 1
// f16x2, 2 e4m3x2, 3 e5m2x2, 4 bf16x2); sext flags
int opCvt2(Warp& w, const Inst& I, uint32_t m) {
  for (; m; m &= m - 1) {
    int i = __builtin_ctz(m);
    float v[2];  // low, high
    switch (I.y) {
      case 0:
        v[1] = w.src<float>(I.a)[i];
        v[0] = w.src<float>(I.b)[i];
        break;
      case 1:
        for (int k = 0; k < 2; k++) v[k] = toF(w.src<f16_t>(I.a)[2 * i + k]);
        break;
      case 4:
        for (int k = 0; k < 2; k++) v[k] = toF(w.src<bf16_t>(I.a)[2 * i + k]);
        break;
      default: {
        uint16_t p = w.src<uint16_t>(I.a)[i];
        for (int k = 0; k < 2; k++)
          v[k] = I.y == 2 ? e4m3ToF((uint8_t)(p >> (8 * k))) : e5m2ToF((uint8_t)(p >> (8 * k)));
      }
    }
    uint32_t r[2];
    for (int k = 0; k < 2; k++) {
      if ((I.sext & CV_RELU) && v[k] < 0) v[k] = 0;
      bool sat = I.sext & CV_SAT;
      switch (I.x) {
        case 0:
          r[k] = packFloat(v[k], 5, 10, (Rnd)I.mode, true, sat);
          break;
        case 1:
          r[k] = packFloat(v[k], 8, 7, (Rnd)I.mode, true, sat);
          break;
        case 2:
          r[k] = packFloat(v[k], 4, 3, (Rnd)I.mode, false, sat);
          break;
        default:
          r[k] = packFloat(v[k], 5, 2, (Rnd)I.mode, true, sat);
      }
    }
    if (I.x < 2)
      w.dst<uint32_t>(I.d)[i] = r[0] | r[1] << 16;
    else
      w.dst<uint16_t>(I.d)[i] = (uint16_t)(r[0] | r[1] << 8);
  }
  return NEXT;
}

// cvt.pack.sat.{u8,s8,u16,s16}.s32[.b32]: a goes above b; 8-bit forms shift the pair in below c
int opCvtPack(Warp& w, const Inst& I, uint32_t m) {
  const int32_t *a = w.src<int32_t>(I.a), *b = w.src<int32_t>(I.b);
  for (; m; m &= m - 1) {
    int i = __builtin_ctz(m);
    auto sat = [&](int32_t v) -> uint32_t {
      static const int32_t lo[] = {-128, 0, -32768, 0}, hi[] = {127, 255, 32767, 65535};
      return (uint32_t)std::min(hi[I.x], std::max(lo[I.x], v));
    };
    uint32_t x = sat(a[i]), y = sat(b[i]);
    if (I.x >= 2)
      w.dst<uint32_t>(I.d)[i] = (x << 16) | (y & 0xffff);
    else {
      uint32_t c = I.c == kNone ? 0 : w.src<uint32_t>(I.c)[i];
      w.dst<uint32_t>(I.d)[i] = (c << 16) | ((x & 255) << 8) | (y & 255);
    }
  }
  return NEXT;
}

}  // namespace

bool decodeCvt(Decoder& D, Inst& I) {
  const std::string& o = D.p->parts[0];
  if (o != "cvt") return false;
  I.cls = C_CVT;
  const std::string &dt = D.type(0), &st = D.type(1);
  if (D.has("pack")) {
    D.has("sat");
    I.x = (uint32_t)kind(dt);
    if (I.x > K_U16) D.fail("type is not supported:");
    I.d = D.dst(D.op(0), 4);
    I.a = D.src(D.op(1), "s32");
    I.b = D.src(D.op(2), "s32");
    if (D.nops() > 3) I.c = D.src(D.op(3), "b32");
    I.fn = opCvtPack;
    return true;
  }
  bool rint = false;
  Rnd r = Rnd::RN;
  int dk = kind(dt), sk = kind(st);
  if (D.has("rni")) {
    rint = true;
    r = Rnd::RN;
  } else if (D.has("rzi")) {
    rint = true;
    r = Rnd::RZ;
  } else if (D.has("rmi")) {
    rint = true;
    r = Rnd::RM;
  } else if (D.has("rpi")) {
    rint = true;
    r = Rnd::RP;
  } else
    r = D.rounding();
  I.mode = (uint8_t)r;
  if (D.has("ftz")) I.sext |= CV_FTZ;
  if (D.has("relu")) I.sext |= CV_RELU;
  bool satfinite = D.has("satfinite");
  bool sat = D.has("sat");

  static const char* pk[] = {"f16x2", "bf16x2", "e4m3x2", "e5m2x2"};
  for (int k = 0; k < 4; k++)
    if (dt == pk[k]) {
      I.x = k;
      I.d = D.dst(D.op(0), k < 2 ? 4 : 2);
      if (satfinite) I.sext |= CV_SAT;
      if (st == "f32") {
        I.y = 0;
        I.a = D.src(D.op(1), "f32");
        I.b = D.src(D.op(2), "f32");
      } else if (st == "f16x2") {
        I.y = 1;
        I.a = D.src(D.op(1), "b32");
      } else if (st == "bf16x2") {
        I.y = 4;
        I.a = D.src(D.op(1), "b32");
      } else if (st == "e4m3x2") {
        I.y = 2;
        I.a = D.src(D.op(1), "b16");
      } else if (st == "e5m2x2") {
        I.y = 3;
        I.a = D.src(D.op(1), "b16");
      } else
        D.fail("types are not supported:");
      I.fn = opCvt2;
      return true;
    }
  if (dk < 0 || sk < 0) D.fail("types are not supported:");
  if (satfinite && dk != K_TF32) D.fail("satfinite is not supported:");
  if (sat) I.sext |= CV_SAT;
  if (rint && !isInt(dk)) I.sext |= CV_RINT;
  if (isInt(dk) && !isInt(sk) && !rint) D.fail("integer rounding modifier missing:");
  I.x = sk;
  I.y = dk;
  I.d = D.dst(D.op(0), 0, &I.dw);
  I.a = D.src(D.op(1), st == "tf32" ? "b32" : st, &I.aw, true);
  I.fn = opCvt;
  if (isInt(dk) && isInt(sk)) I.cls = C_ALU;
  bool tight = I.dw == typeBytes(dt) && I.aw == typeBytes(st);
  if (tight && !I.sext) {
    if (isInt(dk) && isInt(sk)) {
      bool s = !(sk & 1);
      if (dk / 2 == 3 && sk / 2 == 2)
        I.fn = s ? fastInt<int64_t, int32_t> : fastInt<uint64_t, uint32_t>;
      if (dk / 2 == 2 && sk / 2 == 3) I.fn = fastInt<uint32_t, uint64_t>;
      if (dk / 2 == 1 && sk / 2 == 2) I.fn = fastInt<uint16_t, uint32_t>;
      if (dk / 2 == 2 && sk / 2 == 1)
        I.fn = s ? fastInt<int32_t, int16_t> : fastInt<uint32_t, uint16_t>;
      if (dk / 2 == 3 && sk / 2 == 1)
        I.fn = s ? fastInt<int64_t, int16_t> : fastInt<uint64_t, uint16_t>;
      if (dk / 2 == 1 && sk / 2 == 3) I.fn = fastInt<uint16_t, uint64_t>;
    } else if (r == Rnd::RN && !rint) {
      if (dk == K_F32 && sk == K_S32) I.fn = fastInt<float, int32_t>;
      if (dk == K_F32 && sk == K_U32) I.fn = fastInt<float, uint32_t>;
      if (dk == K_F64 && sk == K_S32) I.fn = fastInt<double, int32_t>;
      if (dk == K_F64 && sk == K_F32) I.fn = fastInt<double, float>;
      if (dk == K_F32 && sk == K_F64) I.fn = fastInt<float, double>;
      if (dk == K_F32 && sk == K_F16) I.fn = fastHF;
      if (dk == K_F32 && sk == K_BF16) I.fn = fastBF;
      if (dk == K_F16 && sk == K_F32) I.fn = fastFH;
      if (dk == K_BF16 && sk == K_F32) I.fn = fastFB;
    }
  }
  return true;
}

}  // namespace ptxvm
