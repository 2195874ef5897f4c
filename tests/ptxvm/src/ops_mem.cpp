// Loads, stores, atomics, ldmatrix/stmatrix, cp.async.
#include <algorithm>

#include "decode.h"

namespace ptxvm {

uint8_t* Warp::global(uint64_t addr, uint32_t size, int lane, bool write) {
  Alloc* a = wk->last;
  if (!a || addr < a->base || addr + size > a->base + a->size) {
    a = L->mem->find(addr);
    if (!a || addr + size > a->base + a->size)
      fail(lane, fmt("global-memory %s out of bounds: address 0x%llx, %u bytes (%s)",
                     write ? "write" : "read", (unsigned long long)addr, size,
                     L->mem->describe(addr).c_str()));
    wk->last = a;
  }
  if (size & (size - 1) ? addr & 3 : addr & (size - 1))
    fail(lane, fmt("misaligned global-memory access: address 0x%llx ('%s' offset %llu), %u bytes",
                   (unsigned long long)addr, a->name.c_str(), (unsigned long long)(addr - a->base),
                   size));
  if (write && a->readonly) fail(lane, fmt("write to read-only memory '%s'", a->name.c_str()));
  auto& fp = write ? a->wr : a->rd;
  if (fp) fp->mark(addr - a->base, size);
  return (uint8_t*)addr;
}

void Warp::countGlobal(const uint64_t* addr, uint32_t mask, uint32_t size, int kind) {
  Stats& s = wk->st;
  s.gReq[kind]++;
  int n = __builtin_popcount(mask);
  s.gBytes[kind] += (uint64_t)n * size;
  // distinct 32-byte sectors
  uint64_t lo = ~0ull, hi = 0;
  for (uint32_t k = mask; k; k &= k - 1) {
    uint64_t a = addr[__builtin_ctz(k)];
    lo = std::min(lo, a);
    hi = std::max(hi, a + size - 1);
  }
  uint64_t b = lo >> 5, cnt = 0;
  if ((hi >> 5) - b < 64) {
    uint64_t bits = 0;
    for (uint32_t k = mask; k; k &= k - 1) {
      uint64_t a = addr[__builtin_ctz(k)];
      bits |= 1ull << ((a >> 5) - b) | 1ull << (((a + size - 1) >> 5) - b);
    }
    cnt = __builtin_popcountll(bits);
  } else {
    uint64_t t[64];
    int c = 0;
    for (uint32_t k = mask; k; k &= k - 1) {
      uint64_t a = addr[__builtin_ctz(k)];
      t[c++] = a >> 5;
      if ((a + size - 1) >> 5 != a >> 5) t[c++] = (a + size - 1) >> 5;
    }
    std::sort(t, t + c);
    cnt = (uint64_t)(std::unique(t, t + c) - t);
  }
  s.gSectors[kind] += cnt;
  // lanes that name the same address need its bytes once: a broadcast is ideal, and must not make
  // up for scattered requests
  if (n > 1) {
    uint64_t t[32], prev = 0;
    int c = 0;
    bool sorted = true;
    for (uint32_t k = mask; k; k &= k - 1) {
      uint64_t a = addr[__builtin_ctz(k)];
      if (c && a == prev) continue;
      sorted &= !c || a > prev;
      t[c++] = prev = a;
    }
    if (!sorted) {
      std::sort(t, t + c);
      c = (int)(std::unique(t, t + c) - t);
    }
    n = c;
  }
  s.gIdealSectors[kind] += ((uint64_t)n * size + 31) / 32;
}

// Wavefronts: 32 banks of 4 bytes; 8-byte accesses go by half warps, 16-byte ones by quarter warps.
void Warp::countShared(const uint32_t* off, uint32_t mask, uint32_t size, int kind) {
  Stats& s = wk->st;
  s.sReq[kind]++;
  s.sBytes[kind] += (uint64_t)__builtin_popcount(mask) * size;
  if (size <= 4) {  // no conflict: every bank serves one word
    uint32_t banks = 0, word[32];
    bool clean = true;
    for (uint32_t k = mask; k && clean; k &= k - 1) {
      uint32_t wd = off[__builtin_ctz(k)] >> 2, b = wd & 31;
      if (!((banks >> b) & 1)) {
        banks |= 1u << b;
        word[b] = wd;
      } else
        clean = word[b] == wd;
    }
    if (clean) {
      s.sWave[kind]++;
      s.sIdeal[kind]++;
      return;
    }
  }
  int per = size <= 4 ? 32 : size == 8 ? 16 : 8;
  for (int g = 0; g < 32; g += per) {
    uint32_t gm = per == 32 ? mask : (mask >> g) & ((1u << per) - 1);
    if (!gm) continue;
    uint32_t words[32][4];
    uint8_t cnt[32] = {};
    uint32_t worst = 1;
    for (uint32_t k = gm; k; k &= k - 1) {
      uint32_t o = off[g + __builtin_ctz(k)];
      for (uint32_t b = 0; b < size || b == 0; b += 4) {
        uint32_t word = (o + b) >> 2, bank = word & 31;
        bool seen = false;
        uint32_t c = cnt[bank];
        for (uint32_t q = 0; q < c && q < 4; q++) seen |= words[bank][q] == word;
        if (!seen && c >= 4) {  // rare: look at all earlier lanes
          for (uint32_t j = gm & ((k & -k) - 1); j; j &= j - 1) {
            uint32_t oo = off[g + __builtin_ctz(j)];
            seen |= word >= oo >> 2 && word <= (oo + size - 1) >> 2;
          }
        }
        if (!seen) {
          if (c < 4) words[bank][c] = word;
          cnt[bank] = (uint8_t)(c + 1);
          worst = std::max(worst, c + 1);
        }
      }
    }
    s.sWave[kind] += worst;
    s.sIdeal[kind]++;
  }
}

void Warp::deliver(const AsyncCopy& c) {
  memcpy(blk->smem + c.dst, c.data, c.size);
  Shadow& S = blk->shadow;
  uint32_t g0 = c.dst >> S.sh, g1 = (c.dst + c.size - 1) >> S.sh;
  const uint32_t me = vc[id] << 6 | (uint32_t)id;
  for (uint32_t g = g0; g <= g1; g++) {
    if (S.uninit) S.state[g] = 1;
    if (S.race) S.wr[g] = me;
  }
}
void Warp::deliverLanes(uint32_t lanes) {
  for (auto& g : groups) {
    for (auto& c : g.copies)
      if ((lanes >> c.lane) & 1) deliver(c);
    if (g.lanes & ~lanes) {
      g.copies.erase(std::remove_if(g.copies.begin(), g.copies.end(),
                                    [&](const AsyncCopy& c) { return (lanes >> c.lane) & 1; }),
                     g.copies.end());
    } else
      g.copies.clear();
    g.lanes &= ~lanes;
  }
  while (!groups.empty() && !groups.front().lanes) groups.pop_front();
  std::vector<AsyncCopy> rest;
  for (auto& c : pendingCopies)
    if ((lanes >> c.lane) & 1)
      deliver(c);
    else
      rest.push_back(c);
  pendingCopies.swap(rest);
}

namespace {

struct Where {
  uint8_t* p;
  Space sp;
};

// Resolve one lane's access of `size` bytes in space I.space; shared offsets go to off[].
inline Where resolve(Warp& w, const Inst& I, int i, uint32_t size, bool write, uint64_t* gaddr,
                     uint32_t* off) {
  uint64_t a = laneAddr(w, I, i);
  Space sp = I.space;
  if (sp == Space::Generic) {
    uint64_t win = a & kWinMask;
    if (win == kSharedWin) {
      sp = Space::Shared;
      a &= ~kWinMask;
    } else if (win == kLocalWin) {
      sp = Space::Local;
      a &= ~kWinMask;
    } else
      sp = Space::Global;
  } else if (sp == Space::Local && (I.flags & FL_LOCALSYM))
    a += w.frame->localBase;
  if (sp == Space::Shared) {
    uint8_t* p = w.sharedAt(I.aw == 4 ? (uint32_t)a : a, size, i);
    off[i] = (uint32_t)a;
    return {p, sp};
  }
  if (sp == Space::Local) return {w.localAt(a, size, i), sp};
  uint8_t* p = w.global(a, size, i, write);
  gaddr[i] = w.wk->last->virt + (a - w.wk->last->base);
  return {p, Space::Global};
}

inline void put(uint8_t* d, int dw, const uint8_t* p, int es, bool sext) {
  if (dw == es) {
    memcpy(d, p, es);
    return;
  }
  uint64_t v = 0;
  memcpy(&v, p, std::min(es, dw));
  if (sext && es < 8) {
    int s = 64 - 8 * es;
    v = (uint64_t)((int64_t)(v << s) >> s);
  }
  memcpy(d, &v, dw);
}

// A full warp that accesses one contiguous piece of an allocation: the pointer to it, or null.
uint8_t* contiguous(Warp& w, const Inst& I, uint32_t size, bool write, int kind) {
  if (I.aw != 8 || (I.space != Space::Global && I.space != Space::Generic)) return nullptr;
  const uint64_t* a = w.src<uint64_t>(I.a);
  uint64_t lo = a[0] + (uint64_t)I.imm, bad = 0, a0 = a[0];
  for (int i = 0; i < 32; i++) bad |= a[i] - (a0 + (uint64_t)i * size);
  Alloc* al = w.wk->last;
  if (bad || !al || lo < al->base || lo + 32 * size > al->base + al->size || (lo & (size - 1)) ||
      (write && al->readonly))
    return nullptr;
  if (w.L->checks.stats && !(I.flags & FL_NOCOUNT)) {
    Stats& s = w.wk->st;
    uint64_t v = al->virt + (lo - al->base);
    s.gReq[kind]++;
    s.gBytes[kind] += 32 * size;
    s.gSectors[kind] += ((v + 32 * size - 1) >> 5) - (v >> 5) + 1;
    s.gIdealSectors[kind] += size;
  }
  if (auto& fp = write ? al->wr : al->rd)
    for (uint32_t q = 0; q < 32 * size; q += 32) fp->mark(lo - al->base + q, 32);
  return (uint8_t*)lo;
}
// Offsets of a shared access when all of them are in bounds and aligned.
bool sharedOffsets(Warp& w, const Inst& I, uint32_t m, uint32_t size, uint32_t* off) {
  uint32_t worst = 0, bits = 0, imm = (uint32_t)I.imm, hi = 0;
  const uint32_t limit = w.blk->smemBytes;
  if (limit < size) return false;
  if (I.aw == 4) {
    const uint32_t* a = w.src<uint32_t>(I.a);
    for (int i = 0; i < 32; i++) off[i] = a[i] + imm;
  } else {
    const uint64_t* a = w.src<uint64_t>(I.a);
    for (int i = 0; i < 32; i++) {
      off[i] = (uint32_t)(a[i] + (uint64_t)I.imm);
      hi |= (m >> i) & 1 ? (uint32_t)((a[i] + (uint64_t)I.imm) >> 32) : 0;
    }
  }
  for (int i = 0; i < 32; i++) {
    uint32_t o = (m >> i) & 1 ? off[i] : 0;
    worst = worst > o ? worst : o;
    bits |= o;
  }
  return !hi && worst <= limit - size && !(bits & (size - 1));
}
template <class T>
void gather(Warp& w, const Inst& I, uint32_t m, const uint32_t* off) {
  const uint8_t* sm = w.blk->smem;
  const Opnd* e = I.vec > 1 ? &w.frame->code->ext[I.ext] : &I.d;
  for (int v = 0; v < I.vec; v++) {
    if (e[v] == kNone) continue;
    T* d = w.dst<T>(e[v]);
    uint32_t plus = v * sizeof(T);
    if (m == ~0u)
      for (int i = 0; i < 32; i++) d[i] = *(const T*)(sm + off[i] + plus);
    else
      for (uint32_t k = m; k; k &= k - 1) {
        int i = __builtin_ctz(k);
        d[i] = *(const T*)(sm + off[i] + plus);
      }
  }
}

int opLd(Warp& w, const Inst& I, uint32_t m) {
  if (I.space == Space::Shared && I.dw == I.es && (I.es == 4 || I.es == 2 || I.es == 8) &&
      !(I.flags & FL_VOLATILE)) {
    uint32_t off[32];
    if (sharedOffsets(w, I, m, I.es * I.vec, off)) {
      if (w.blk->shadow.uninit || w.blk->shadow.race) w.sharedReadLanes(off, m, I.es * I.vec);
      if (I.es == 4)
        gather<uint32_t>(w, I, m, off);
      else if (I.es == 2)
        gather<uint16_t>(w, I, m, off);
      else
        gather<uint64_t>(w, I, m, off);
      if (w.L->checks.stats) w.countShared(off, m, I.es * I.vec, 0);
      return NEXT;
    }
  }
  if (m == ~0u && I.dw == I.es && I.es == 4) {
    if (const uint8_t* p = contiguous(w, I, 4 * I.vec, false, 0)) {
      const Opnd* e = I.vec > 1 ? &w.frame->code->ext[I.ext] : &I.d;
      const int n = I.vec;
      for (int v = 0; v < n; v++) {
        if (e[v] == kNone) continue;
        uint32_t* d = w.dst<uint32_t>(e[v]);
        for (int i = 0; i < 32; i++) d[i] = ((const uint32_t*)p)[i * n + v];
      }
      return NEXT;
    }
  }
  uint64_t ga[32];
  uint32_t so[32];
  uint32_t gm = 0, sm = 0;
  const uint32_t es = I.es, size = es * I.vec;
  const bool checkShared = w.blk->shadow.uninit || w.blk->shadow.race;
  const Opnd* e = I.vec > 1 ? &w.frame->code->ext[I.ext] : &I.d;
  uint8_t* d[8];
  for (int v = 0; v < I.vec; v++) d[v] = e[v] == kNone ? nullptr : w.dst<uint8_t>(e[v]);
  for (uint32_t k = m; k; k &= k - 1) {
    int i = __builtin_ctz(k);
    Where t = resolve(w, I, i, size, false, ga, so);
    if (t.sp == Space::Shared) {
      sm |= 1u << i;
      if (I.flags & FL_VOLATILE) w.sharedSync(so[i]);
      if (checkShared) w.sharedRead(so[i], size, i);
    } else if (t.sp == Space::Global)
      gm |= 1u << i;
    if (I.dw == es) {
      if (es == 4)
        for (int v = 0; v < I.vec; v++) {
          if (d[v]) memcpy(d[v] + i * 4, t.p + v * 4, 4);
        }
      else
        for (int v = 0; v < I.vec; v++) {
          if (d[v]) memcpy(d[v] + i * es, t.p + v * es, es);
        }
    } else {
      for (int v = 0; v < I.vec; v++)
        if (d[v]) put(d[v] + i * I.dw, I.dw, t.p + v * es, es, I.sext);
    }
  }
  if (w.L->checks.stats && !(I.flags & FL_NOCOUNT)) {
    if (gm) w.countGlobal(ga, gm, size, 0);
    if (sm) w.countShared(so, sm, size, 0);
  }
  return NEXT;
}

int opSt(Warp& w, const Inst& I, uint32_t m) {
  if (m == ~0u && I.es == 4 && (I.dw == 4 || I.dw == 0)) {  // dw 0: constants only
    if (uint8_t* p = contiguous(w, I, 4 * I.vec, true, 1)) {
      const Opnd* e = I.vec > 1 ? &w.frame->code->ext[I.ext] : &I.d;
      const int n = I.vec;
      for (int v = 0; v < n; v++) {
        const uint32_t* s = w.src<uint32_t>(e[v]);
        for (int i = 0; i < 32; i++) ((uint32_t*)p)[i * n + v] = s[i];
      }
      w.blk->progress++;
      return NEXT;
    }
  }
  if (I.space == Space::Shared && I.es == 4 && I.vec == 1 && !(I.flags & FL_VOLATILE) &&
      ((I.d >> 30) == 1 || I.dw == 4)) {
    uint32_t off[32];
    if (sharedOffsets(w, I, m, 4, off)) {
      if (w.blk->shadow.uninit || w.blk->shadow.race) w.sharedWriteLanes(off, m, 4);
      const uint32_t* s = w.src<uint32_t>(I.d);
      uint8_t* sm = w.blk->smem;
      for (uint32_t k = m; k; k &= k - 1) {
        int i = __builtin_ctz(k);
        memcpy(sm + off[i], &s[i], 4);
      }
      w.blk->progress++;
      if (w.L->checks.stats) w.countShared(off, m, 4, 1);
      return NEXT;
    }
  }
  uint64_t ga[32];
  uint32_t so[32];
  uint32_t gm = 0, sm = 0;
  const uint32_t es = I.es, size = es * I.vec;
  const bool checkShared = w.blk->shadow.uninit || w.blk->shadow.race;
  const Opnd* e = I.vec > 1 ? &w.frame->code->ext[I.ext] : &I.d;
  const uint8_t* s[8];
  uint8_t sw[8];
  for (int v = 0; v < I.vec; v++) {
    s[v] = w.src<uint8_t>(e[v]);
    sw[v] = (e[v] >> 30) == 1 ? I.es : I.dw;
  }
  for (uint32_t k = m; k; k &= k - 1) {
    int i = __builtin_ctz(k);
    Where t = resolve(w, I, i, size, true, ga, so);
    if (t.sp == Space::Shared) {
      sm |= 1u << i;
      if (I.flags & FL_VOLATILE) w.sharedSync(so[i]);
      if (checkShared) w.sharedWrite(so[i], size, i);
      if (I.flags & FL_VOLATILE) w.sharedSync(so[i]);
    } else if (t.sp == Space::Global)
      gm |= 1u << i;
    for (int v = 0; v < I.vec; v++) memcpy(t.p + v * es, s[v] + i * sw[v], es);
  }
  w.blk->progress++;
  if (w.L->checks.stats && !(I.flags & FL_NOCOUNT)) {
    if (gm) w.countGlobal(ga, gm, size, 1);
    if (sm) w.countShared(so, sm, size, 1);
  }
  return NEXT;
}

uint8_t* paramAt(Warp& w, const Inst& I, int i, uint32_t size) {
  uint64_t a = laneAddr(w, I, i);
  bool call = I.flags & FL_CALLPARAM;
  Frame* f = w.frame;
  uint32_t limit = call ? f->code->callParamBytes : f->code->paramBytes;
  if (a + size > limit)
    w.fail(i, fmt("parameter access out of bounds: offset %lld, %u bytes of %u", (long long)a, size,
                  limit));
  return call ? f->callParam + (size_t)i * f->callStride + a
              : f->inParam + (size_t)i * f->inStride + a;
}
int opLdParam(Warp& w, const Inst& I, uint32_t m) {
  const Opnd* e = I.vec > 1 ? &w.frame->code->ext[I.ext] : &I.d;
  for (uint32_t k = m; k; k &= k - 1) {
    int i = __builtin_ctz(k);
    uint8_t* p = paramAt(w, I, i, I.es * I.vec);
    for (int v = 0; v < I.vec; v++)
      if (e[v] != kNone) put(w.dst<uint8_t>(e[v]) + i * I.dw, I.dw, p + v * I.es, I.es, I.sext);
  }
  return NEXT;
}
int opStParam(Warp& w, const Inst& I, uint32_t m) {
  const Opnd* e = I.vec > 1 ? &w.frame->code->ext[I.ext] : &I.d;
  for (uint32_t k = m; k; k &= k - 1) {
    int i = __builtin_ctz(k);
    uint8_t* p = paramAt(w, I, i, I.es * I.vec);
    for (int v = 0; v < I.vec; v++)
      memcpy(p + v * I.es, w.src<uint8_t>(e[v]) + i * ((e[v] >> 30) == 1 ? I.es : I.dw), I.es);
  }
  return NEXT;
}

// ---------------------------------------------------------------- atomics
enum AOp { A_ADD, A_MIN, A_MAX, A_AND, A_OR, A_XOR, A_EXCH, A_CAS, A_INC, A_DEC };
enum AType { T_U32, T_S32, T_U64, T_S64, T_F32, T_F64, T_F16, T_F16X2, T_BF16, T_BF16X2, T_B16 };

template <class T>
T intOp(int op, T o, T b, T c) {
  switch (op) {
    case A_ADD:
      return o + b;
    case A_MIN:
      return std::min(o, b);
    case A_MAX:
      return std::max(o, b);
    case A_AND:
      return o & b;
    case A_OR:
      return o | b;
    case A_XOR:
      return o ^ b;
    case A_EXCH:
      return b;
    case A_CAS:
      return o == b ? c : o;
    case A_INC:
      return o >= b ? 0 : o + 1;
    default:
      return o == 0 || o > b ? b : o - 1;
  }
}
template <class H>
uint16_t halfOp(int op, uint16_t o, uint16_t b) {
  float x = toF(H{o}), y = toF(H{b}),
        r = op == A_ADD   ? x + y
            : x != x      ? y
            : y != y      ? x
            : op == A_MIN ? std::min(x, y)
                          : std::max(x, y);
  if constexpr (std::is_same<H, f16_t>::value)
    return mkF16(r).v;
  else
    return mkBf16(r).v;
}
}  // namespace
uint64_t applyAtomic(int op, int t, uint64_t o, uint64_t b, uint64_t c) {
  switch (t) {
    case T_U32:
      return intOp<uint32_t>(op, (uint32_t)o, (uint32_t)b, (uint32_t)c);
    case T_S32:
      return (uint32_t)intOp<int32_t>(op, (int32_t)o, (int32_t)b, (int32_t)c);
    case T_U64:
      return intOp<uint64_t>(op, o, b, c);
    case T_S64:
      return (uint64_t)intOp<int64_t>(op, (int64_t)o, (int64_t)b, (int64_t)c);
    case T_B16:
      return intOp<uint16_t>(op, (uint16_t)o, (uint16_t)b, (uint16_t)c);
    case T_F32:
      return bitcast<uint32_t>(bitcast<float>((uint32_t)o) + bitcast<float>((uint32_t)b));
    case T_F64:
      return bitcast<uint64_t>(bitcast<double>(o) + bitcast<double>(b));
    case T_F16:
      return halfOp<f16_t>(op, (uint16_t)o, (uint16_t)b);
    case T_BF16:
      return halfOp<bf16_t>(op, (uint16_t)o, (uint16_t)b);
    case T_F16X2:
      return halfOp<f16_t>(op, (uint16_t)o, (uint16_t)b) |
             (uint32_t)halfOp<f16_t>(op, (uint16_t)(o >> 16), (uint16_t)(b >> 16)) << 16;
    default:
      return halfOp<bf16_t>(op, (uint16_t)o, (uint16_t)b) |
             (uint32_t)halfOp<bf16_t>(op, (uint16_t)(o >> 16), (uint16_t)(b >> 16)) << 16;
  }
}

int atomicType(const std::string& t) {
  static const std::unordered_map<std::string, int> ts = {
      {"u32", T_U32},   {"b32", T_U32},       {"s32", T_S32}, {"u64", T_U64}, {"b64", T_U64},
      {"s64", T_S64},   {"f32", T_F32},       {"f64", T_F64}, {"f16", T_F16}, {"f16x2", T_F16X2},
      {"bf16", T_BF16}, {"bf16x2", T_BF16X2}, {"b16", T_B16}};
  auto it = ts.find(t);
  return it == ts.end() ? -1 : it->second;
}
namespace {
// I.d: result (kNone for red); ext: operand b elements then c; mode: op; x: type
int opAtom(Warp& w, const Inst& I, uint32_t m) {
  uint64_t ga[32];
  uint32_t so[32];
  uint32_t gm = 0, sm = 0;
  const Opnd* e = &w.frame->code->ext[I.ext];
  const int n = I.vec, es = I.es;
  bool lock = w.L->threads > 1;
  for (uint32_t k = m; k; k &= k - 1) {
    int i = __builtin_ctz(k);
    Where t = resolve(w, I, i, es * n, true, ga, so);
    if (t.sp == Space::Shared) {
      sm |= 1u << i;
      w.sharedSync(so[i]);
      w.sharedRead(so[i], es * n, i);
      w.sharedWrite(so[i], es * n, i);
      w.sharedSync(so[i]);
    } else {
      gm |= 1u << i;
      w.global((uint64_t)t.p, es * n, i, false);
    }
    if (lock && t.sp != Space::Shared) w.L->atomicMx.lock();
    for (int v = 0; v < n; v++) {
      uint64_t o = 0, b = 0, c = 0;
      memcpy(&o, t.p + v * es, es);
      memcpy(&b, w.src<uint8_t>(e[v]) + i * es, es);
      if (I.c != kNone) memcpy(&c, w.src<uint8_t>(I.c) + i * es, es);
      uint64_t r = applyAtomic(I.mode, I.x, o, b, c);
      memcpy(t.p + v * es, &r, es);
      Opnd d = n > 1 && I.nExt > (uint32_t)n ? e[n + v] : n == 1 ? I.d : kNone;
      if (d != kNone) memcpy(w.dst<uint8_t>(d) + i * es, &o, es);
    }
    if (lock && t.sp != Space::Shared) w.L->atomicMx.unlock();
  }
  w.blk->progress++;
  if (w.L->checks.stats) {
    if (gm) w.countGlobal(ga, gm, es * n, 2);
    if (sm) w.countShared(so, sm, es * n, 4);
  }
  return NEXT;
}

// ---------------------------------------------------------------- ldmatrix / stmatrix
inline bool unconverged(const Warp& w, uint32_t m) { return (w.live & ~m) != 0; }

uint32_t sharedOffset(Warp& w, const Inst& I, int lane, uint32_t size) {
  uint64_t a = laneAddr(w, I, lane);
  if ((a & kWinMask) == kSharedWin) a &= ~kWinMask;
  if (I.aw == 4) a = (uint32_t)a;
  w.sharedAt(a, size, lane);
  return (uint32_t)a;
}

int opLdmatrix(Warp& w, const Inst& I, uint32_t m) {
  if (unconverged(w, m)) return CONV;
  const Opnd* e = &w.frame->code->ext[I.ext];
  bool chk = w.blk->shadow.uninit || w.blk->shadow.race;
  uint32_t out[4][32];
  for (int q = 0; q < I.vec; q++) {
    uint32_t off[32] = {};
    uint16_t mat[8][8];
    for (int r = 0; r < 8; r++) {
      int lane = q * 8 + r;
      off[r] = sharedOffset(w, I, lane, 16);
      if (chk) w.sharedRead(off[r], 16, lane);
      memcpy(mat[r], w.blk->smem + off[r], 16);
    }
    for (int l = 0; l < 32; l++) {
      int r = l / 4, c = 2 * (l & 3);
      out[q][l] = I.mode ? mat[c][r] | (uint32_t)mat[c + 1][r] << 16
                         : mat[r][c] | (uint32_t)mat[r][c + 1] << 16;
    }
    if (w.L->checks.stats) {
      w.countShared(off, 0xff, 16, 2);
      if (q) w.wk->st.sReq[2]--;
    }
  }
  for (int q = 0; q < I.vec; q++) {
    uint32_t* d = w.dst<uint32_t>(e[q]);
    forLanes(m, [&](int l) { d[l] = out[q][l]; });
  }
  return NEXT;
}
int opStmatrix(Warp& w, const Inst& I, uint32_t m) {
  if (unconverged(w, m)) return CONV;
  const Opnd* e = &w.frame->code->ext[I.ext];
  bool chk = w.blk->shadow.uninit || w.blk->shadow.race;
  for (int q = 0; q < I.vec; q++) {
    uint32_t off[32] = {};
    uint16_t mat[8][8];
    const uint32_t* s = w.src<uint32_t>(e[q]);
    for (int l = 0; l < 32; l++) {
      int r = l / 4, c = 2 * (l & 3);
      uint16_t lo = (uint16_t)s[l], hi = (uint16_t)(s[l] >> 16);
      if (I.mode) {
        mat[c][r] = lo;
        mat[c + 1][r] = hi;
      } else {
        mat[r][c] = lo;
        mat[r][c + 1] = hi;
      }
    }
    for (int r = 0; r < 8; r++) {
      int lane = q * 8 + r;
      off[r] = sharedOffset(w, I, lane, 16);
      if (chk) w.sharedWrite(off[r], 16, lane);
      memcpy(w.blk->smem + off[r], mat[r], 16);
    }
    if (w.L->checks.stats) {
      w.countShared(off, 0xff, 16, 3);
      if (q) w.wk->st.sReq[3]--;
    }
  }
  w.blk->progress++;
  return NEXT;
}

// ---------------------------------------------------------------- cp.async
int opCpAsync(Warp& w, const Inst& I, uint32_t m) {
  // a: shared address; b: global address (imm in y/x pair); c: src-size register or kNone; es:
  // cp-size; mode 1: c is an ignore-src predicate
  const uint64_t* src = w.src<uint64_t>(I.b);
  int64_t soff = (int32_t)I.x;
  uint64_t ga[32];
  uint32_t gm = 0, gsz = I.es;
  for (uint32_t k = m; k; k &= k - 1) {
    int i = __builtin_ctz(k);
    uint32_t off = sharedOffset(w, I, i, I.es), n = I.es;
    if (I.c != kNone) {
      if (I.mode) {
        uint32_t p = *w.src<uint32_t>(I.c);
        if (I.flags & FL_NEGC) p = ~p;
        if ((p >> i) & 1) n = 0;
      } else
        n = std::min<uint32_t>(w.src<uint32_t>(I.c)[i], I.es);
    }
    uint64_t a = src[i] + (uint64_t)soff;
    AsyncCopy c;
    c.dst = off;
    c.size = I.es;
    c.lane = (uint8_t)i;
    memset(c.data, 0, 16);
    if (a & (I.es - 1))
      w.fail(i, fmt("misaligned cp.async source 0x%llx for %u bytes", (unsigned long long)a, I.es));
    if (n) {
      if (n == I.es)
        memcpy(c.data, w.global(a, n, i, false), n);
      else
        for (uint32_t q = 0; q < n; q++) c.data[q] = *w.global(a + q, 1, i, false);
      ga[i] = w.wk->last->virt + (a - w.wk->last->base);
      gm |= 1u << i;
    }
    w.sharedWrite(off, I.es, i, 1);
    w.pendingCopies.push_back(c);
    w.wk->st.cpAsyncBytes += n;
  }
  if (w.L->checks.stats && gm) {
    uint64_t before = w.wk->st.gSectors[0];
    w.countGlobal(ga, gm, gsz, 0);
    w.wk->st.cpAsyncSectors += w.wk->st.gSectors[0] - before;
  }
  return NEXT;
}
int opCpCommit(Warp& w, const Inst&, uint32_t m) {
  AsyncGroup g;
  g.lanes = m;
  std::vector<AsyncCopy> rest;
  for (auto& c : w.pendingCopies) ((m >> c.lane) & 1 ? g.copies : rest).push_back(c);
  w.pendingCopies.swap(rest);
  w.groups.push_back(std::move(g));
  return NEXT;
}
int opCpWait(Warp& w, const Inst& I, uint32_t m) {
  if (I.mode) {  // wait_all
    w.deliverLanes(m);
    return NEXT;
  }
  uint32_t keep = (uint32_t)I.imm;
  uint8_t cnt[32] = {};
  for (int g = (int)w.groups.size() - 1; g >= 0; g--) {
    AsyncGroup& G = w.groups[g];
    uint32_t now = 0;
    for (uint32_t k = m & G.lanes; k; k &= k - 1) {
      int l = __builtin_ctz(k);
      if (cnt[l] >= keep)
        now |= 1u << l;
      else
        cnt[l]++;
    }
    if (!now) continue;
    std::vector<AsyncCopy> rest;
    for (auto& c : G.copies)
      if ((now >> c.lane) & 1)
        w.deliver(c);
      else
        rest.push_back(c);
    G.copies.swap(rest);
    G.lanes &= ~now;
  }
  w.groups.erase(std::remove_if(w.groups.begin(), w.groups.end(),
                                [](const AsyncGroup& g) { return !g.lanes; }),
                 w.groups.end());
  return NEXT;
}

// ---------------------------------------------------------------- address conversion
int opCvta(Warp& w, const Inst& I,
           uint32_t m) {  // mode 0: to generic, 1: from generic; x: window high byte index
  uint64_t add = I.space == Space::Shared ? kSharedWin : I.space == Space::Local ? kLocalWin : 0;
  for (uint32_t k = m; k; k &= k - 1) {
    int i = __builtin_ctz(k);
    uint64_t a = I.aw == 8 ? w.src<uint64_t>(I.a)[i] : w.src<uint32_t>(I.a)[i];
    if (I.flags & FL_LOCALSYM) a += w.frame->localBase;
    if (I.space == Space::Param)
      a += (uint64_t)w.frame->inParam;
    else if (I.mode)
      a = add ? a & ~kWinMask : a;
    else
      a = (a & ~kWinMask) | (add ? add : a & kWinMask);
    if (I.dw == 8)
      w.dst<uint64_t>(I.d)[i] = a;
    else
      w.dst<uint32_t>(I.d)[i] = (uint32_t)a;
  }
  return NEXT;
}
int opIsspacep(Warp& w, const Inst& I, uint32_t m) {
  const uint64_t* a = w.src<uint64_t>(I.a);
  uint32_t r = 0;
  for (int i = 0; i < 32; i++) {
    uint64_t win = a[i] & kWinMask;
    bool v = I.space == Space::Shared  ? win == kSharedWin
             : I.space == Space::Local ? win == kLocalWin
                                       : win != kSharedWin && win != kLocalWin;
    r |= (uint32_t)v << i;
  }
  uint32_t& d = w.predReg(I.d);
  d = (d & ~m) | (r & m);
  return NEXT;
}

bool spaceOf(Decoder& D, Inst& I) {
  if (D.has("shared") | D.has("shared::cta") | D.has("shared::cluster"))
    I.space = Space::Shared;
  else if (D.has("global"))
    I.space = Space::Global;
  else if (D.has("local"))
    I.space = Space::Local;
  else if (D.has("const"))
    I.space = Space::Const;
  else if (D.has("param") | D.has("param::entry") | D.has("param::func"))
    I.space = Space::Param;
  else {
    I.space = Space::Generic;
    return false;
  }
  return true;
}
void cacheHints(Decoder& D) {
  D.ignore({"ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "weak", "relaxed", "cta", "gpu", "sys",
            "cluster", "mmio", "unified"});
  D.ignorePrefix("L1::");
  D.ignorePrefix("L2::");
}
// operands of an access: a register or a vector of them
void dataOperands(Decoder& D, Inst& I, const Operand& o, const std::string& t, bool dst) {
  auto one = [&](const Operand& s) -> Opnd {
    if (dst) {
      if (s.kind == Operand::Sink) return kNone;
      return D.dst(s, 0, &I.dw);
    }
    uint8_t wdt = 0;
    Opnd r = D.src(s, t, &wdt, true);
    if (s.kind == Operand::Reg) I.dw = wdt;
    return r;
  };
  if (o.kind == Operand::Vec) {
    if (o.sub.size() != I.vec) D.fail("vector operand has the wrong length in");
    std::vector<Opnd> l;
    for (auto& s : o.sub) l.push_back(one(s));
    I.ext = D.list(l);
    I.nExt = (uint32_t)l.size();
    if (I.vec == 1) I.d = l[0];
  } else {
    if (I.vec != 1) D.fail("vector operand expected in");
    I.d = one(o);
  }
}

}  // namespace

bool decodeMem(Decoder& D, Inst& I) {
  const std::string& o = D.p->parts[0];
  if (o == "ld" || o == "st" || o == "ldu") {
    bool ld = o != "st";
    bool sync = D.has("volatile") | D.has("acquire") | D.has("release");
    for (auto& q : D.p->parts)
      if (q == "relaxed") sync = true;
    if (sync) I.flags |= FL_VOLATILE;
    spaceOf(D, I);
    cacheHints(D);
    I.vec = D.has("v2") ? 2 : D.has("v4") ? 4 : D.has("v8") ? 8 : 1;
    const std::string& t = D.type();
    I.es = (uint8_t)typeBytes(t);
    I.sext = t[0] == 's';
    const Operand& ad = D.op(ld ? 1 : 0);
    Space sp = I.space;
    D.address(ad, I, sp);
    dataOperands(D, I, D.op(ld ? 0 : 1), t, ld);
    if (sp == Space::Param) {
      // kernel parameters reached through a register hold offsets as well
      I.fn = ld ? opLdParam : opStParam;
      I.cls = C_LDC;
      return true;
    }
    if (sp == Space::Const) {
      I.space = Space::Global;
      I.flags |= FL_NOCOUNT;
      I.cls = C_LDC;
    } else if (sp == Space::Shared)
      I.cls = ld ? C_LDS : C_STS;
    else if (sp == Space::Local)
      I.cls = ld ? C_LDL : C_STL;
    else
      I.cls = ld ? C_LDG : C_STG;
    I.fn = ld ? opLd : opSt;
    if (I.space == Space::Shared || I.space == Space::Generic)
      D.C.granule = std::min<uint32_t>(D.C.granule, I.es * I.vec);
    return true;
  }
  if (o == "atom" || o == "red") {
    if (D.p->parts.size() > 1 && D.p->parts[1] == "async") return false;
    bool red = o == "red";
    spaceOf(D, I);
    cacheHints(D);
    D.ignore({"acquire", "release", "acq_rel", "noftz"});
    static const char* ops[] = {"add", "min",  "max", "and", "or",
                                "xor", "exch", "cas", "inc", "dec"};
    int op = -1;
    for (int k = 0; k < 10; k++)
      if (D.has(ops[k])) op = k;
    if (op < 0) D.fail("unknown atomic operation");
    I.mode = (uint8_t)op;
    const std::string& t = D.type();
    if (atomicType(t) < 0) D.fail("type is not supported:");
    I.x = (uint32_t)atomicType(t);
    if ((I.x == T_F32 || I.x == T_F64) && op != A_ADD) D.fail("operation is not supported:");
    I.es = (uint8_t)typeBytes(t);
    I.vec = D.has("v2") ? 2 : D.has("v4") ? 4 : D.has("v8") ? 8 : 1;
    size_t k = red ? 0 : 1;
    D.address(D.op(k), I, I.space);
    std::vector<Opnd> l;
    const Operand& b = D.op(k + 1);
    if (I.vec > 1)
      for (auto& s : b.sub) l.push_back(D.src(s, t));
    else
      l.push_back(D.src(b, t));
    if (!red) {
      const Operand& d = D.op(0);
      if (I.vec > 1)
        for (auto& s : d.sub) l.push_back(s.kind == Operand::Sink ? kNone : D.dst(s, I.es));
      else if (d.kind != Operand::Sink)
        I.d = D.dst(d, I.es);
    }
    I.ext = D.list(l);
    I.nExt = (uint32_t)l.size();
    if (op == A_CAS) I.c = D.src(D.op(k + 2), t);
    I.fn = opAtom;
    I.cls = I.space == Space::Shared ? C_ATOMS : C_ATOMG;
    if (I.space != Space::Global) D.C.granule = std::min<uint32_t>(D.C.granule, I.es * I.vec);
    return true;
  }
  if (o == "ldmatrix" || o == "stmatrix") {
    bool ld = o == "ldmatrix";
    D.ignore({"sync", "aligned", "m8n8"});
    I.space = Space::Shared;
    D.ignore({"shared", "shared::cta"});
    I.vec = D.has("x4") ? 4 : D.has("x2") ? 2 : (D.has("x1"), 1);
    I.mode = D.has("trans");
    if (D.type() != "b16") D.fail("type is not supported:");
    D.address(D.op(ld ? 1 : 0), I, Space::Shared);
    const Operand& v = D.op(ld ? 0 : 1);
    std::vector<Opnd> l;
    auto one = [&](const Operand& s) { l.push_back(ld ? D.dst(s, 4) : D.src(s, "b32")); };
    if (v.kind == Operand::Vec)
      for (auto& s : v.sub) one(s);
    else
      one(v);
    if (l.size() != I.vec) D.fail("wrong number of registers in");
    I.ext = D.list(l);
    I.fn = ld ? opLdmatrix : opStmatrix;
    I.cls = ld ? C_LDMATRIX : C_STMATRIX;
    return true;
  }
  if (o == "cp" && D.p->parts.size() > 1 && D.p->parts[1] == "async") {
    D.has("async");
    if (D.has("bulk") || D.p->parts[2] == "mbarrier") return false;
    I.cls = C_CPASYNC;
    if (D.has("commit_group")) {
      I.fn = opCpCommit;
      return true;
    }
    if (D.has("wait_group")) {
      I.fn = opCpWait;
      I.imm = (int64_t)D.op(0).bits;
      return true;
    }
    if (D.has("wait_all")) {
      I.fn = opCpWait;
      I.mode = 1;
      return true;
    }
    D.ignore({"ca", "cg", "shared", "shared::cta", "global"});
    D.ignorePrefix("L2::");
    I.space = Space::Shared;
    D.address(D.op(1), I, Space::Global);
    Opnd b = I.a;
    if (I.aw != 8) D.fail("64-bit global address expected in");
    int64_t soff = I.imm;
    D.address(D.op(0), I, Space::Shared);
    I.b = b;
    I.x = (uint32_t)(int32_t)soff;
    I.es = (uint8_t)D.op(2).bits;
    size_t extra = D.nops();
    bool hint = false;
    for (auto& q : D.p->parts) hint |= q == "L2::cache_hint";
    if (hint) extra--;
    if (extra > 3) {
      const Operand& c = D.op(3);
      if (c.kind == Operand::Reg && D.F.regs[c.reg].type == "pred") {
        bool neg;
        I.c = D.predSrc(c, &neg);
        I.mode = 1;
        if (neg) I.flags |= FL_NEGC;
      } else
        I.c = D.src(c, "u32");
    }
    I.fn = opCpAsync;
    return true;
  }
  if (o == "cvta") {
    I.mode = D.has("to");
    spaceOf(D, I);
    const std::string& t = D.type();
    I.d = D.dst(D.op(0), 0, &I.dw);
    const Operand& a = D.op(1);
    if (a.kind == Operand::Sym) {
      const Var* v = D.F.findVar(D.p->scope, a.sym);
      if (v && v->space == Space::Local) {
        I.flags |= FL_LOCALSYM;
        I.a = D.constant(v->offset + (uint64_t)a.off, 8);
        I.aw = 8;
        I.fn = opCvta;
        return true;
      }
    }
    I.a = D.src(a, t, &I.aw);
    I.fn = opCvta;
    return true;
  }
  if (o == "isspacep") {
    spaceOf(D, I);
    I.d = D.predDst(D.op(0));
    I.a = D.src(D.op(1), "u64");
    I.fn = opIsspacep;
    return true;
  }
  if (o == "prefetch" || o == "prefetchu" || o == "discard" || o == "applypriority") {
    D.ignore({"global", "local", "L1", "L2", "tensormap", "param", "const"});
    D.ignorePrefix("L2::");
    I.fn = opNop;
    I.cls = C_MISC;
    return true;
  }
  if (o == "createpolicy") {
    for (size_t k = 1; k < D.used.size(); k++) D.used[k] = true;
    I.d = D.dst(D.op(0), 8);
    struct Zero {
      static int f(Warp& w, const Inst& I, uint32_t m) {
        uint64_t* d = w.dst<uint64_t>(I.d);
        forLanes(m, [=](int i) { d[i] = 0; });
        return NEXT;
      }
    };
    I.fn = Zero::f;
    I.cls = C_MISC;
    return true;
  }
  return false;
}

}  // namespace ptxvm
