// mma.sync. Products and sums are formed in double and rounded once per instruction.
#include <algorithm>
#include <climits>

#include "mma.h"

namespace ptxvm {

int elemKind(const std::string& t) {
  static const std::unordered_map<std::string, int> m = {
      {"f16", E_F16}, {"bf16", E_BF16}, {"tf32", E_TF32}, {"e4m3", E_E4M3}, {"e5m2", E_E5M2},
      {"s8", E_S8},   {"u8", E_U8},     {"f64", E_F64},   {"f32", E_F32},   {"s32", E_S32}};
  auto it = m.find(t);
  return it == m.end() ? -1 : it->second;
}
int elemBytes(int k) {
  switch (k) {
    case E_F16:
    case E_BF16:
      return 2;
    case E_E4M3:
    case E_E5M2:
    case E_S8:
    case E_U8:
      return 1;
    case E_F64:
      return 8;
    default:
      return 4;
  }
}
Fp8Table::Fp8Table() {
  for (int i = 0; i < 256; i++) {
    e4[i] = e4m3ToF((uint8_t)i);
    e5[i] = e5m2ToF((uint8_t)i);
  }
}
const Fp8Table fp8Table;

// acc[M][N] += a[M][K] * b[K][N]; rows of b have stride ldb
void matmulAcc(double* acc, const double* a, const double* b, int M, int N, int K) {
  for (int j0 = 0; j0 < N; j0 += 8)
    for (int i = 0; i < M; i++) {
      double s[8];
      double* c = acc + i * N + j0;
      for (int j = 0; j < 8; j++) s[j] = c[j];
      for (int k = 0; k < K; k++) {
        double x = a[i * K + k];
        const double* r = b + k * N + j0;
        for (int j = 0; j < 8; j++) s[j] += x * r[j];
      }
      for (int j = 0; j < 8; j++) c[j] = s[j];
    }
}

namespace {

// ext: D registers, A registers, B registers, C registers; x: element kinds a | b<<8 | c<<16 |
// d<<24; y: m<<16|n<<8|k
int opMma(Warp& w, const Inst& I, uint32_t m) {
  if (w.live & ~m) return CONV;
  const int M = I.y >> 16, N = (I.y >> 8) & 255, K = I.y & 255;
  const int ka = I.x & 255, kb = (I.x >> 8) & 255, kc = (I.x >> 16) & 255, kd = I.x >> 24;
  const int ea = elemBytes(ka), eb = elemBytes(kb);
  const int wa = ka == E_F64 ? 8 : 4;
  const int na = M * K * ea / (32 * wa), nb = N * K * eb / (32 * wa);
  const int nc = kc == E_F16 ? M * N / 64 : M * N / 32, nd = kd == E_F16 ? M * N / 64 : M * N / 32;
  const Opnd* e = &w.frame->code->ext[I.ext];
  const Opnd *D = e, *A = e + nd, *B = A + na, *C = B + nb;
  double a[16 * 64], b[64 * 8], c[16 * 8];
  withKind(ka, [&](auto kind) {
    constexpr int E = decltype(kind)::value, W = E == E_F64 ? 8 : 4,
                  Z = E == E_F64                  ? 8
                      : E == E_TF32 || E == E_F32 ? 4
                      : E <= E_BF16               ? 2
                                                  : 1,
                  P = W / Z;
    for (int r = 0; r < na; r++) {
      const uint8_t* s = w.src<uint8_t>(A[r]);
      int rg = M == 16 ? r & 1 : 0, kg = M == 16 ? r >> 1 : r;
      for (int l = 0; l < 32; l++)
        for (int q = 0; q < P; q++)
          a[((l >> 2) + 8 * rg) * K + (l & 3) * P + q + kg * 4 * P] = elemAt<E>(s + l * W + q * Z);
    }
  });
  withKind(kb, [&](auto kind) {
    constexpr int E = decltype(kind)::value, W = E == E_F64 ? 8 : 4,
                  Z = E == E_F64                  ? 8
                      : E == E_TF32 || E == E_F32 ? 4
                      : E <= E_BF16               ? 2
                                                  : 1,
                  P = W / Z;
    for (int r = 0; r < nb; r++) {
      const uint8_t* s = w.src<uint8_t>(B[r]);
      for (int l = 0; l < 32; l++)
        for (int q = 0; q < P; q++)
          b[((l & 3) * P + q + r * 4 * P) * N + (l >> 2)] = elemAt<E>(s + l * W + q * Z);
    }
  });
  for (int r = 0; r < nc; r++) {
    const uint8_t* s = w.src<uint8_t>(C[r]);
    for (int l = 0; l < 32; l++) {
      int g = l >> 2, t = l & 3;
      if (kc == E_F16)
        for (int q = 0; q < 2; q++)
          c[(g + 8 * r) * N + 2 * t + q] = toF(((const f16_t*)s)[2 * l + q]);
      else {
        double v = kc == E_F64   ? ((const double*)s)[l]
                   : kc == E_S32 ? (double)((const int32_t*)s)[l]
                                 : (double)((const float*)s)[l];
        c[(g + 8 * (r >> 1)) * N + 2 * t + (r & 1)] = v;
      }
    }
  }
  matmulAcc(c, a, b, M, N, K);
  for (int r = 0; r < nd; r++) {
    uint8_t* d = w.dst<uint8_t>(D[r]);
    for (int l = 0; l < 32; l++) {
      if (!((m >> l) & 1)) continue;
      int g = l >> 2, t = l & 3;
      if (kd == E_F16) {
        for (int q = 0; q < 2; q++)
          ((f16_t*)d)[2 * l + q] = f16FromD(c[(g + 8 * r) * N + 2 * t + q]);
        continue;
      }
      double v = c[(g + 8 * (r >> 1)) * N + 2 * t + (r & 1)];
      if (kd == E_F64)
        ((double*)d)[l] = v;
      else if (kd == E_S32) {
        if (I.mode) v = std::min(2147483647.0, std::max(-2147483648.0, v));
        ((uint32_t*)d)[l] = (uint32_t)(int64_t)v;
      } else
        ((float*)d)[l] = (float)v;
    }
  }
  return NEXT;
}

}  // namespace

bool decodeMma(Decoder& D, Inst& I) {
  const std::string& o = D.p->parts[0];
  if (o != "mma") return false;
  D.ignore({"sync", "aligned", "row", "col"});
  if (D.has("sp") || D.has("block_scale"))
    D.fail("sparse and block-scaled forms are not supported:");
  I.mode = D.has("satfinite");
  int M = 0, N = 0, K = 0;
  for (size_t k = 1; k < D.p->parts.size(); k++)
    if (sscanf(D.p->parts[k].c_str(), "m%dn%dk%d", &M, &N, &K) == 3) {
      D.used[k] = true;
      break;
    }
  if (!((M == 16 || M == 8) && N == 8)) D.fail("shape is not supported:");
  int kd = elemKind(D.type(0)), ka = elemKind(D.type(1)), kb = elemKind(D.type(2)),
      kc = elemKind(D.type(3));
  if (kd < 0 || ka < 0 || kb < 0 || kc < 0) D.fail("types are not supported:");
  if (M == 8 && ka == E_F16) D.fail("m8n8k4 with f16 is not supported:");
  int wa = ka == E_F64 ? 8 : 4;
  size_t na = M * K * elemBytes(ka) / (32 * wa), nb = N * K * elemBytes(kb) / (32 * wa);
  size_t nc = kc == E_F16 ? M * N / 64 : M * N / 32, nd = kd == E_F16 ? M * N / 64 : M * N / 32;
  std::vector<Opnd> l;
  auto regs = [&](const Operand& v, size_t n, int bytes, bool dst) {
    std::vector<Operand> one{v};
    const auto& s = v.kind == Operand::Vec ? v.sub : one;
    if (s.size() != n) D.fail(fmt("%zu registers expected where %zu are given in", n, s.size()));
    for (auto& q : s)
      l.push_back(dst ? D.dst(q, bytes)
                      : D.src(q, bytes == 8                            ? "f64"
                                 : q.kind == Operand::Imm && q.isFloat ? "f32"
                                                                       : "b32"));
  };
  regs(D.op(0), nd, kd == E_F64 ? 8 : 4, true);
  regs(D.op(1), na, wa, false);
  regs(D.op(2), nb, wa, false);
  regs(D.op(3), nc, kc == E_F64 ? 8 : 4, false);
  I.ext = D.list(l);
  I.x = (uint32_t)(ka | kb << 8 | kc << 16 | kd << 24);
  I.y = (uint32_t)(M << 16 | N << 8 | K);
  I.fn = opMma;
  I.cls = C_MMA;
  I.flops = 2.0 * M * N * K / 32;
  static const char* names[] = {"mma.f16",  "mma.bf16", "mma.tf32", "mma.fp8", "mma.fp8",
                                "mma.int8", "mma.int8", "mma.f64",  "mma.f32", "mma.s32"};
  I.flopType = names[ka];
  return true;
}

}  // namespace ptxvm
