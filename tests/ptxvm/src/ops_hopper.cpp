// sm_90: mbarriers, bulk and tensor copies, wgmma, cluster instructions for clusters of one block.
#include <algorithm>

#include "mma.h"
#include "tensormap.h"

namespace ptxvm {
namespace {

// ---------------------------------------------------------------- mbarriers
// An mbarrier object is 8 bytes of shared memory: pending arrivals [0,20), expected arrivals
// [20,40), pending transaction bytes [40,62) signed, a mark in bit 62, the parity of the current
// phase in bit 63.
struct Mbar {
  uint32_t pending, expected;
  int32_t tx;
  bool phase, valid;
};
constexpr uint32_t kMax = (1u << 20) - 1;

Mbar unpack(uint64_t v) {
  return {(uint32_t)v & kMax, (uint32_t)(v >> 20) & kMax,
          (int32_t)((uint32_t)(v >> 40) << 10) >> 10, (bool)(v >> 63), (bool)(v >> 62 & 1)};
}
uint64_t pack(const Mbar& b) {
  return (uint64_t)b.pending | (uint64_t)b.expected << 20 |
         (uint64_t)((uint32_t)b.tx & 0x3fffff) << 40 | 1ull << 62 | (uint64_t)b.phase << 63;
}

uint32_t shOff(Warp& w, const Inst& I, int lane, uint32_t size) {
  uint64_t a = laneAddr(w, I, lane);
  if ((a & kWinMask) == kSharedWin) a &= ~kWinMask;
  if (I.aw == 4) a = (uint32_t)a;
  w.sharedAt(a, size, lane);
  return (uint32_t)a;
}
uint32_t shOffOf(Warp& w, uint64_t a, int lane, uint32_t align) {
  if ((a & kWinMask) == kSharedWin) a &= ~kWinMask;
  w.sharedAt(a, align, lane);
  return (uint32_t)a;
}

Mbar loadBar(Warp& w, uint32_t off, int lane, bool check = true) {
  if (check && (w.blk->shadow.race || w.blk->shadow.uninit)) w.sharedRead(off, 8, lane);
  Mbar b = unpack(*(uint64_t*)(w.blk->smem + off));
  if (!b.valid || !w.blk->mbars.count(off))
    w.fail(lane, fmt("no mbarrier was initialised at shared offset %u", off));
  return b;
}
void join(std::vector<uint32_t>& a, const std::vector<uint32_t>& b) {
  if (a.size() < b.size()) a.resize(b.size(), 0);
  for (size_t k = 0; k < b.size(); k++) a[k] = std::max(a[k], b[k]);
}
void storeBar(Block& B, uint32_t off, Mbar b) {
  if (b.pending == 0 && b.tx == 0) {
    b.phase = !b.phase;
    b.pending = b.expected;
    MbarInfo& info = B.mbars[off];
    info.done = info.cur;
    info.cur.clear();
  }
  *(uint64_t*)(B.smem + off) = pack(b);
  B.progress++;
}
void arriveOn(Warp& w, uint32_t off, uint32_t n, int32_t tx, int lane, bool drop = false) {
  Mbar b = loadBar(w, off, lane);
  if (n > b.pending)
    w.fail(
        lane,
        fmt("mbarrier at shared offset %u: %u arrivals where %u are pending (initialised for %u)",
            off, n, b.pending, b.expected));
  if (w.tracksRaces()) {
    join(w.blk->mbars[off].cur, w.vc);
    w.vc[w.id]++;
  }
  b.tx += tx;
  b.pending -= n;
  if (drop) b.expected -= n;
  storeBar(*w.blk, off, b);
}

// Asynchronous work that completes on this mbarrier lands now: it has been waited for.
void settle(Warp& w, uint32_t off) {
  Block& B = *w.blk;
  for (auto& ow : B.warps) {
    for (size_t k = 0; k < ow->asyncArrive.size();) {
      AsyncArrive a = ow->asyncArrive[k];
      if (a.bar != off) {
        k++;
        continue;
      }
      ow->asyncArrive.erase(ow->asyncArrive.begin() + k);
      ow->deliverLanes(a.lanes);
      Mbar b = unpack(*(uint64_t*)(B.smem + off));
      uint32_t n = (uint32_t)__builtin_popcount(a.lanes);
      if (n > b.pending)
        w.fail(-1, fmt("mbarrier at shared offset %u: %u cp.async arrivals where %u are pending",
                       off, n, b.pending));
      if (w.tracksRaces()) {
        join(B.mbars[off].cur, ow->vc);
        ow->vc[ow->id]++;
      }
      b.pending -= n;
      storeBar(B, off, b);
    }
  }
  for (size_t k = 0; k < B.bulk.size();) {
    if (B.bulk[k].bar != off) {
      k++;
      continue;
    }
    BulkCopy c = std::move(B.bulk[k]);
    B.bulk.erase(B.bulk.begin() + k);
    Shadow& S = B.shadow;
    for (auto& p : c.pieces) {
      memcpy(B.smem + p.first, p.second.data(), p.second.size());
      if (S.uninit)
        for (uint32_t g = p.first >> S.sh; g <= (p.first + p.second.size() - 1) >> S.sh; g++)
          S.state[g] = 1 | 4;
    }
    Mbar b = unpack(*(uint64_t*)(B.smem + off));
    b.tx -= (int32_t)c.bytes;
    if (w.tracksRaces()) join(B.mbars[off].cur, c.vc);
    storeBar(B, off, b);
  }
}

int opMbarInit(Warp& w, const Inst& I, uint32_t m) {
  const uint32_t* cnt = w.src<uint32_t>(I.b);
  for (uint32_t k = m; k; k &= k - 1) {
    int i = __builtin_ctz(k);
    uint32_t off = shOff(w, I, i, 8);
    if (cnt[i] == 0 || cnt[i] > kMax) w.fail(i, fmt("mbarrier.init with count %u", cnt[i]));
    w.sharedWrite(off, 8, i);
    w.blk->mbars[off] = MbarInfo();
    *(uint64_t*)(w.blk->smem + off) = pack({cnt[i], cnt[i], 0, false, true});
  }
  return NEXT;
}
int opMbarInval(Warp& w, const Inst& I, uint32_t m) {
  for (uint32_t k = m; k; k &= k - 1) {
    int i = __builtin_ctz(k);
    uint32_t off = shOff(w, I, i, 8);
    loadBar(w, off, i);
    w.sharedWrite(off, 8, i);
    w.blk->mbars.erase(off);
    *(uint64_t*)(w.blk->smem + off) = 0;
  }
  return NEXT;
}
// mode: 0 arrive, 1 arrive.expect_tx, 2 expect_tx, 3 complete_tx, 4 arrive_drop; b: count or bytes
// (kNone: 1)
int opMbarArrive(Warp& w, const Inst& I, uint32_t m) {
  for (uint32_t k = m; k; k &= k - 1) {
    int i = __builtin_ctz(k);
    uint32_t off = shOff(w, I, i, 8);
    uint32_t v = I.b == kNone ? 1 : w.src<uint32_t>(I.b)[i];
    Mbar b = loadBar(w, off, i);
    if (I.d != kNone) w.dst<uint64_t>(I.d)[i] = pack(b);
    switch (I.mode) {
      case 0:
        arriveOn(w, off, v, 0, i);
        break;
      case 1:
        arriveOn(w, off, 1, (int32_t)v, i);
        break;
      case 2:
        b.tx += (int32_t)v;
        *(uint64_t*)(w.blk->smem + off) = pack(b);
        break;
      case 3:
        b.tx -= (int32_t)v;
        storeBar(*w.blk, off, b);
        break;
      default:
        arriveOn(w, off, v, 0, i, true);
    }
  }
  return NEXT;
}
// mode bit 0: parity form; d: predicate; b: state or parity
int opMbarWait(Warp& w, const Inst& I, uint32_t m) {
  uint32_t r = 0;
  for (uint32_t k = m; k; k &= k - 1) {
    int i = __builtin_ctz(k);
    uint32_t off = shOff(w, I, i, 8);
    loadBar(w, off, i);
    settle(w, off);
    Mbar b = loadBar(w, off, i, false);
    bool want = I.mode & 1 ? w.src<uint32_t>(I.b)[i] & 1 : w.src<uint64_t>(I.b)[i] >> 63;
    if (b.phase != want) {
      r |= 1u << i;
      if (w.tracksRaces()) join(w.vc, w.blk->mbars[off].done);
    } else
      w.spinBar = off;
  }
  uint32_t& d = w.predReg(I.d);
  d = (d & ~m) | r;
  if (r == m) {
    w.spinning = false;
    return NEXT;
  }
  w.spinning = true;
  w.spinAt = &I;
  return YIELD;
}
int opCpAsyncArrive(Warp& w, const Inst& I, uint32_t m) {  // mode 1: noinc
  for (uint32_t k = m; k; k &= k - 1) {
    int i = __builtin_ctz(k);
    uint32_t off = shOff(w, I, i, 8);
    Mbar b = loadBar(w, off, i);
    if (!I.mode) {
      b.pending++;
      *(uint64_t*)(w.blk->smem + off) = pack(b);
    }
    bool merged = false;
    for (auto& a : w.asyncArrive)
      if (a.bar == off && !((a.lanes >> i) & 1)) {
        a.lanes |= 1u << i;
        merged = true;
        break;
      }
    if (!merged) w.asyncArrive.push_back({off, 1u << i});
  }
  w.blk->progress++;
  return NEXT;
}

// ---------------------------------------------------------------- bulk copies
void issueLoad(Warp& w, BulkCopy& c, int lane) {
  loadBar(w, c.bar, lane);
  for (auto& p : c.pieces) w.sharedWrite(p.first, (uint32_t)p.second.size(), lane, 2);
  c.vc = w.vc;
  if (w.tracksRaces()) w.vc[w.id]++;
  w.wk->st.bulkLoadBytes += c.bytes;
  w.blk->bulk.push_back(std::move(c));
  w.blk->progress++;
}

// a: shared destination; b: global source; c: size; ext[0]: mbarrier
int opBulkLoad(Warp& w, const Inst& I, uint32_t m) {
  const Opnd* e = &w.frame->code->ext[I.ext];
  for (uint32_t k = m; k; k &= k - 1) {
    int i = __builtin_ctz(k);
    uint32_t dst = shOff(w, I, i, 16), n = w.src<uint32_t>(I.c)[i];
    uint64_t src = w.src<uint64_t>(I.b)[i] + (uint64_t)(int64_t)(int32_t)I.x;
    uint64_t bar = I.bw == 8 ? w.src<uint64_t>(e[0])[i] : w.src<uint32_t>(e[0])[i];
    if (n % 16 || src % 16)
      w.fail(i, fmt("cp.async.bulk: size %u and source 0x%llx must be multiples of 16", n,
                    (unsigned long long)src));
    BulkCopy c;
    c.bar = shOffOf(w, bar + I.y, i, 8);
    c.bytes = n;
    for (uint32_t q = 0; q < n; q += 16) w.sharedAt(dst + q, 16, i);
    std::vector<uint8_t> data(n);
    for (uint32_t q = 0; q < n; q += 16) memcpy(&data[q], w.global(src + q, 16, i, false), 16);
    if (n) c.pieces.push_back({dst, std::move(data)});
    issueLoad(w, c, i);
  }
  return NEXT;
}
// a: shared source; b: global destination; c: size; mode: reduction op + 1 (0: none), y: type, es
int opBulkStore(Warp& w, const Inst& I, uint32_t m) {
  for (uint32_t k = m; k; k &= k - 1) {
    int i = __builtin_ctz(k);
    uint32_t src = shOff(w, I, i, 16), n = w.src<uint32_t>(I.c)[i];
    uint64_t dst = w.src<uint64_t>(I.b)[i] + (uint64_t)(int64_t)(int32_t)I.x;
    if (n % 16 || dst % 16)
      w.fail(i, fmt("cp.async.bulk: size %u and destination 0x%llx must be multiples of 16", n,
                    (unsigned long long)dst));
    BulkStore s;
    s.lane = i;
    s.op = (int)I.mode - 1;
    s.type = (int)I.y;
    for (uint32_t q = 0; q < n; q += 16) {
      w.sharedAt(src + q, 16, i);
      w.global(dst + q, 16, i, true);
      w.asyncProxyRead(src + q, 16, i);
      s.pieces.push_back({dst + q, src + q, 16});
    }
    w.wk->st.bulkStoreBytes += n;
    w.bulkOpen.push_back(std::move(s));
  }
  w.blk->progress++;
  return NEXT;
}

const TensorMap& tensorMap(Warp& w, uint64_t addr, int lane) {
  const TensorMap& t = *(const TensorMap*)(w.global(addr, 64, lane, false));
  if (t.magic != kTensorMagic) w.fail(lane, "the tensor map was not made by ptxvm.tensor_map()");
  return t;
}

// Visit every 16-byte (or smaller, for the global side) run of a box: f(shared offset before
// swizzle, global address or 0, bytes)
template <class F>
void walkBox(const TensorMap& t, const int32_t* c, F f) {
  uint32_t n[5] = {1, 1, 1, 1, 1};
  for (int d = 0; d < t.rank; d++) n[d] = t.box[d];
  uint32_t row = n[0] * t.elem, lin = 0;
  for (uint32_t e4 = 0; e4 < n[4]; e4++)
    for (uint32_t e3 = 0; e3 < n[3]; e3++)
      for (uint32_t e2 = 0; e2 < n[2]; e2++)
        for (uint32_t e1 = 0; e1 < n[1]; e1++, lin += row) {
          uint32_t e[5] = {0, e1, e2, e3, e4};
          bool in = true;
          uint64_t g = t.base;
          for (int d = 1; d < t.rank; d++) {
            int64_t x = (int64_t)c[d] + e[d];
            in &= x >= 0 && x < (int64_t)t.dim[d];
            g += (uint64_t)(x * (int64_t)t.stride[d - 1]);
          }
          for (uint32_t b = 0; b < row; b += 16) {
            uint32_t len = std::min(16u, row - b);
            for (uint32_t q = 0; q < len; q += t.elem) {
              int64_t x = (int64_t)c[0] + (b + q) / t.elem;
              bool ok = in && x >= 0 && x < (int64_t)t.dim[0];
              f(lin + b, q, ok ? g + (uint64_t)(x * t.elem) : 0, (uint32_t)t.elem);
            }
          }
        }
}

// ext: coordinates (rank), then the mbarrier for loads; a: shared address; b: tensor map; x: rank;
// mode as for bulk
int opTensorLoad(Warp& w, const Inst& I, uint32_t m) {
  const Opnd* e = &w.frame->code->ext[I.ext];
  for (uint32_t k = m; k; k &= k - 1) {
    int i = __builtin_ctz(k);
    const TensorMap& t = tensorMap(w, w.src<uint64_t>(I.b)[i], i);
    if (t.rank != I.x) w.fail(i, fmt("tensor map of rank %u used with a %ud copy", t.rank, I.x));
    int32_t c[5] = {};
    for (uint32_t d = 0; d < I.x; d++) c[d] = w.src<int32_t>(e[d])[i];
    uint32_t dst = shOff(w, I, i, 128);
    BulkCopy bc;
    uint64_t bar = I.bw == 8 ? w.src<uint64_t>(e[I.x])[i] : w.src<uint32_t>(e[I.x])[i];
    bc.bar = shOffOf(w, bar + I.y, i, 8);
    bc.bytes = t.elem;
    for (int d = 0; d < t.rank; d++) bc.bytes *= t.box[d];
    if ((uint64_t)dst + bc.bytes > w.blk->smemBytes)
      w.fail(i, fmt("tensor copy of %u bytes to shared offset %u leaves shared memory (%u bytes)",
                    bc.bytes, dst, w.blk->smemBytes));
    walkBox(t, c, [&](uint32_t lin, uint32_t q, uint64_t g, uint32_t n) {
      if (q == 0) bc.pieces.push_back({swizzle(dst + lin, t.swizzle), std::vector<uint8_t>()});
      auto& v = bc.pieces.back().second;
      size_t at = v.size();
      v.resize(at + n, 0);
      if (g) memcpy(&v[at], w.global(g, n, i, false), n);
    });
    issueLoad(w, bc, i);
  }
  return NEXT;
}
int opTensorStore(Warp& w, const Inst& I, uint32_t m) {
  const Opnd* e = &w.frame->code->ext[I.ext];
  for (uint32_t k = m; k; k &= k - 1) {
    int i = __builtin_ctz(k);
    const TensorMap& t = tensorMap(w, w.src<uint64_t>(I.b)[i], i);
    if (t.rank != I.x) w.fail(i, fmt("tensor map of rank %u used with a %ud copy", t.rank, I.x));
    int32_t c[5] = {};
    for (uint32_t d = 0; d < I.x; d++) c[d] = w.src<int32_t>(e[d])[i];
    uint32_t src = shOff(w, I, i, 128), bytes = t.elem;
    for (int d = 0; d < t.rank; d++) bytes *= t.box[d];
    if ((uint64_t)src + bytes > w.blk->smemBytes)
      w.fail(i, fmt("tensor copy of %u bytes from shared offset %u leaves shared memory (%u bytes)",
                    bytes, src, w.blk->smemBytes));
    BulkStore s;
    s.lane = i;
    s.op = (int)I.mode - 1;
    s.type = (int)I.y;
    walkBox(t, c, [&](uint32_t lin, uint32_t q, uint64_t g, uint32_t n) {
      uint32_t so = swizzle(src + lin, t.swizzle);
      if (q == 0)
        w.asyncProxyRead(so, std::min(16u, (uint32_t)t.box[0] * t.elem - lin % (t.box[0] * t.elem)),
                         i);
      if (!g) return;
      w.global(g, n, i, true);
      s.pieces.push_back({g, so + q, n});
    });
    w.wk->st.bulkStoreBytes += bytes;
    w.bulkOpen.push_back(std::move(s));
  }
  w.blk->progress++;
  return NEXT;
}
int opBulkCommit(Warp& w, const Inst&, uint32_t m) {
  BulkGroup g;
  g.lanes = m;
  std::vector<BulkStore> rest;
  for (auto& s : w.bulkOpen) ((m >> s.lane) & 1 ? g.stores : rest).push_back(std::move(s));
  w.bulkOpen.swap(rest);
  w.bulkGroups.push_back(std::move(g));
  return NEXT;
}
int typeSize(int t) {
  static const int n[] = {4, 4, 8, 8, 4, 8, 2, 4, 2, 4, 2};
  return n[t];
}
void perform(Warp& w, const BulkStore& s) {
  for (auto& p : s.pieces) {
    uint8_t* sp = w.blk->smem + p.shared;
    w.sharedRead(p.shared, p.bytes, s.lane);  // the copy reads until now
    if (s.op < 0) {
      memcpy((void*)p.global, sp, p.bytes);
      continue;
    }
    std::lock_guard<std::mutex> g(w.L->atomicMx);
    int n = typeSize(s.type);
    for (uint32_t q = 0; q < p.bytes; q += n) {
      uint64_t o = 0, b = 0;
      memcpy(&o, (void*)(p.global + q), n);
      memcpy(&b, sp + q, n);
      uint64_t r = applyAtomic(s.op, s.type, o, b, 0);
      memcpy((void*)(p.global + q), &r, n);
    }
  }
}
int opBulkWait(Warp& w, const Inst& I, uint32_t m) {
  uint32_t keep = (uint32_t)I.imm;
  uint8_t cnt[32] = {};
  std::vector<const BulkStore*> todo;
  std::vector<uint32_t> now(w.bulkGroups.size(), 0);
  for (int g = (int)w.bulkGroups.size() - 1; g >= 0; g--)
    for (uint32_t k = m & w.bulkGroups[g].lanes; k; k &= k - 1) {
      int l = __builtin_ctz(k);
      if (cnt[l] >= keep)
        now[g] |= 1u << l;
      else
        cnt[l]++;
    }
  for (size_t g = 0; g < now.size(); g++) {
    BulkGroup& G = w.bulkGroups[g];
    std::vector<BulkStore> rest;
    for (auto& s : G.stores)
      if ((now[g] >> s.lane) & 1)
        perform(w, s);
      else
        rest.push_back(std::move(s));
    G.stores.swap(rest);
    G.lanes &= ~now[g];
  }
  w.bulkGroups.erase(std::remove_if(w.bulkGroups.begin(), w.bulkGroups.end(),
                                    [](const BulkGroup& g) { return !g.lanes; }),
                     w.bulkGroups.end());
  return NEXT;
}

// ---------------------------------------------------------------- wgmma
// Each warp of a warpgroup computes its own 16 rows. The instruction is queued at issue and
// performed at the first wgmma.wait_group of the warpgroup that covers it, so that a missing wait
// shows: registers still in flight must not be used. x: kinds a | b<<8 | d<<16; y: n<<8 | k; mode
// bits: 1 A in registers, 2 negate A, 4 negate B, 8 trans A, 16 trans B ext: D registers, [A
// registers], a: descriptor A, b: descriptor B, c: scale-d predicate

void markRegs(Warp& w, const Inst& I, uint8_t v) {
  const auto& off = w.frame->code->regOff;
  if (w.wgRegs.size() < w.frame->code->regBytes / 32 + 1)
    w.wgRegs.assign(w.frame->code->regBytes / 32 + 1, 0);
  auto one = [&](const Operand& o) {
    if (o.kind == Operand::Reg) w.wgRegs[off[o.reg] / 32] = v;
  };
  const Operand& d = I.src->ops[0];
  if (d.kind == Operand::Vec)
    for (auto& s : d.sub) one(s);
  else
    one(d);
}

int opWgmma(Warp& w, const Inst& I, uint32_t m) {
  if (w.live & ~m) return CONV;
  if ((w.id & 3) == 0 && w.id + 4 > (int)w.blk->nwarps)
    w.fail(-1, "wgmma needs a full warpgroup of 4 warps");
  int l = __builtin_ctz(m);
  WgOp op;
  op.inst = &I;
  op.frame = w.frame;
  op.descB = w.src<uint64_t>(I.b)[l];
  if (I.mode & 1) {
    const Opnd* A = &w.frame->code->ext[I.ext] + (I.nExt - 4);
    op.aRegs.resize(128);
    for (int r = 0; r < 4; r++) memcpy(&op.aRegs[r * 32], w.src<uint32_t>(A[r]), 128);
  } else
    op.descA = w.src<uint64_t>(I.a)[l];
  if (I.c != kNone) {
    uint32_t p = *w.src<uint32_t>(I.c);
    if (I.flags & FL_NEGC) p = ~p;
    op.scaleD = (p >> l) & 1;
  }
  op.vc = w.vc;
  w.wgOpen.push_back(std::move(op));
  w.wgPending = true;
  markRegs(w, I, 1);
  return NEXT;
}

struct Desc {
  uint32_t start, lbo, sbo, bo;
  int swz;
};
Desc decodeDesc(uint64_t d) {
  static const int mode[] = {0, 3, 2, 1};
  return {(uint32_t)(d & 0x3fff) << 4, (uint32_t)(d >> 16 & 0x3fff) << 4,
          (uint32_t)(d >> 32 & 0x3fff) << 4, (uint32_t)(d >> 49 & 7), mode[d >> 62]};
}

// Read a rows x K operand (row = M or N index) from shared memory into out[row * rs + k * ks].
void readOperand(Warp& w, uint64_t desc, int kind, int row0, int rows, int K, bool mnMajor,
                 double* out, int rs, int ks) {
  Desc d = decodeDesc(desc);
  int eb = elemBytes(kind), T = 16 / eb;    // elements per 16-byte chunk
  static const int width[] = {1, 2, 4, 8};  // chunks per swizzle row
  int W = width[d.swz];
  auto chunk = [&](uint32_t off, auto put) {
    uint32_t a = swizzle((d.start + off) & 0x3ffff, d.swz, d.bo);
    w.sharedAt(a, 16, 0);
    w.asyncProxyRead(a, 16, 0);
    const uint8_t* p = w.blk->smem + a;
    withKind(kind, [&](auto k) {
      constexpr int E = decltype(k)::value;
      for (int t = 0; t < T; t++) put(t, elemAt<E>(p + t * eb));
    });
  };
  if (!mnMajor) {
    for (int r = row0; r < row0 + rows; r++)
      for (int c = 0; c < K / T; c++) {
        uint32_t off = (uint32_t)(r % 8) * 16 * W + (uint32_t)(r / 8) * d.sbo +
                       (d.swz ? 16u * c : (uint32_t)c * d.lbo);
        chunk(off, [&](int t, double v) { out[(r - row0) * rs + (c * T + t) * ks] = v; });
      }
  } else {
    for (int k = 0; k < K; k++)
      for (int q = row0 / T; q * T < row0 + rows; q++) {
        uint32_t off =
            d.swz ? 16u * (q % W) + (uint32_t)(q / W) * d.lbo + (uint32_t)(k % 8) * 16 * W +
                        (uint32_t)(k / 8) * d.sbo
                  : (uint32_t)q * d.sbo + (uint32_t)(k % 8) * 16 + (uint32_t)(k / 8) * d.lbo;
        chunk(off, [&](int t, double v) {
          int r = q * T + t;
          if (r >= row0 && r < row0 + rows) out[(r - row0) * rs + k * ks] = v;
        });
      }
  }
}

void wgExecute(Warp& w, WgOp& op) {
  const Inst& I = *op.inst;
  if (I.flags & FL_MOV) {
    I.fn(w, I, w.live);
    return;
  }
  const int ka = I.x & 255, kb = (I.x >> 8) & 255, kd = I.x >> 16;
  const int N = I.y >> 8, K = I.y & 255;
  static thread_local std::vector<double> a, b, c;
  a.assign(16 * K, 0);
  b.assign(K * N, 0);
  c.assign(16 * N, 0);
  // the reads happen now, but only what was ordered before the issue is ordered before them
  std::swap(w.vc, op.vc);
  w.clockId = (int)(w.blk->nwarps + w.id / 4);
  w.vc[w.clockId] = w.blk->wgClock[w.id / 4];
  if (I.mode & 1) {
    int eb = elemBytes(ka), per = 4 / eb;
    withKind(ka, [&](auto k) {
      constexpr int E = decltype(k)::value;
      for (int r = 0; r < 4; r++)
        for (int l = 0; l < 32; l++)
          for (int q = 0; q < per; q++)
            a[((l >> 2) + 8 * (r & 1)) * K + (l & 3) * per + q + (r >> 1) * 4 * per] =
                elemAt<E>((uint8_t*)&op.aRegs[r * 32 + l] + q * eb);
    });
  } else
    readOperand(w, op.descA, ka, 16 * (w.id & 3), 16, K, I.mode & 8, a.data(), K, 1);
  readOperand(w, op.descB, kb, 0, N, K, I.mode & 16, b.data(), 1, N);
  std::swap(w.vc, op.vc);
  w.clockId = w.id;
  if (I.mode & 2)
    for (auto& v : a) v = -v;
  if (I.mode & 4)
    for (auto& v : b) v = -v;
  const Opnd* D = &w.frame->code->ext[I.ext];
  int nd = kd == E_F16 ? N / 4 : N / 2;
  if (op.scaleD)
    for (int r = 0; r < nd; r++)
      for (int l = 0; l < 32; l++) {
        int g = l >> 2, t = l & 3;
        if (kd == E_F16)
          for (int q = 0; q < 2; q++)
            c[(g + 8 * (r & 1)) * N + 8 * (r >> 1) + 2 * t + q] =
                toF(w.src<f16_t>(D[r])[2 * l + q]);
        else {
          double& x = c[(g + 8 * (r >> 1 & 1)) * N + 8 * (r >> 2) + 2 * t + (r & 1)];
          x = kd == E_S32 ? (double)w.src<int32_t>(D[r])[l] : (double)w.src<float>(D[r])[l];
        }
      }
  matmulAcc(c.data(), a.data(), b.data(), 16, N, K);
  for (int r = 0; r < nd; r++)
    for (int l = 0; l < 32; l++) {
      int g = l >> 2, t = l & 3;
      if (kd == E_F16)
        for (int q = 0; q < 2; q++)
          w.dst<f16_t>(D[r])[2 * l + q] =
              f16FromD(c[(g + 8 * (r & 1)) * N + 8 * (r >> 1) + 2 * t + q]);
      else {
        double x = c[(g + 8 * (r >> 1 & 1)) * N + 8 * (r >> 2) + 2 * t + (r & 1)];
        if (kd == E_S32)
          w.dst<uint32_t>(D[r])[l] = (uint32_t)(int64_t)x;
        else
          w.dst<float>(D[r])[l] = (float)x;
      }
    }
}

// Run a warp's operation out of its turn: another warp of the warpgroup waits for the whole group.
void wgExecuteFor(Warp& v, WgOp& op) {
  auto *frame = v.frame, *f = frame;
  const uint8_t *b0 = v.base[0], *b1 = v.base[1];
  const uint32_t pc = v.pc;
  while (f && f != op.frame) f = f->parent;
  if (!f) v.fail(-1, "the function returned with a wgmma in flight");
  v.frame = f;
  v.base[0] = f->regs;
  v.base[1] = f->code->consts;
  v.pc = (uint32_t)(op.inst - f->code->insts.data());
  wgExecute(v, op);
  v.frame = frame;
  v.base[0] = b0;
  v.base[1] = b1;
  v.pc = pc;
}

int opWgCommit(Warp& w, const Inst&, uint32_t m) {
  if (w.live & ~m) return CONV;
  w.wgGroups.emplace_back();
  w.wgGroups.back().ops = std::move(w.wgOpen);
  w.wgOpen.clear();
  return NEXT;
}
// A wgmma-group belongs to the warpgroup: it completes once all four warps have committed it, for
// all of them, so one warp that has waited may release the operands' memory.
int opWgWait(Warp& w, const Inst& I, uint32_t m) {
  if (w.live & ~m) return CONV;
  Block& B = *w.blk;
  const size_t keep = (size_t)I.imm;
  const uint32_t first = (uint32_t)w.id & ~3u, g = (uint32_t)w.id / 4;
  if (w.wgGroups.size() > keep) {
    const uint64_t upTo = w.wgRetired + w.wgGroups.size() - keep;
    for (uint32_t k = first; k < first + 4; k++) {
      Warp& v = *B.warps[k];
      if (v.wgRetired + v.wgGroups.size() >= upTo) continue;
      if (v.done())
        w.fail(-1, fmt("warp %u of the warpgroup exited without committing this wgmma-group", k));
      w.wk->cntW[w.frame->code->pcBase + w.pc]--;  // counted when it gets through
      w.wk->cntT[w.frame->code->pcBase + w.pc] -= __builtin_popcount(m);
      w.spinning = true;
      w.spinAt = &I;
      w.spinBar = ~0u;
      return BLOCK;
    }
    w.spinning = false;
    B.progress++;
    for (uint64_t seq = w.wgRetired; seq < upTo; seq++) {
      WgGroup& own = w.wgGroups.front();
      if (!own.done) {
        const uint32_t epoch = ++B.wgClock[g];
        for (uint32_t k = first; k < first + 4; k++) {
          Warp& v = *B.warps[k];
          WgGroup& vg = v.wgGroups[seq - v.wgRetired];
          for (auto& op : vg.ops) wgExecuteFor(v, op);
          vg.done = true;
          vg.epoch = epoch;
        }
      }
      if (w.tracksRaces()) w.vc[B.nwarps + g] = std::max(w.vc[B.nwarps + g], own.epoch);
      w.wgGroups.pop_front();
      w.wgRetired++;
    }
  }
  std::fill(w.wgRegs.begin(), w.wgRegs.end(), 0);
  w.wgPending = false;
  auto mark = [&](const std::vector<WgOp>& ops) {
    for (auto& op : ops) {
      markRegs(w, *op.inst, 1);
      w.wgPending = true;
    }
  };
  for (auto& q : w.wgGroups) mark(q.ops);
  mark(w.wgOpen);
  return NEXT;
}
int opWgFence(Warp& w, const Inst&, uint32_t m) { return w.live & ~m ? CONV : NEXT; }

// ---------------------------------------------------------------- clusters of one block
int opMapa(Warp& w, const Inst& I, uint32_t m) {
  forLanes(m, [&](int i) {
    if (I.dw == 8)
      w.dst<uint64_t>(I.d)[i] = w.src<uint64_t>(I.a)[i];
    else
      w.dst<uint32_t>(I.d)[i] = w.src<uint32_t>(I.a)[i];
  });
  const uint32_t* r = w.src<uint32_t>(I.b);
  for (uint32_t k = m; k; k &= k - 1)
    if (r[__builtin_ctz(k)])
      w.fail(__builtin_ctz(k), "mapa to another block: clusters have one block here");
  return NEXT;
}
int opZero32(Warp& w, const Inst& I, uint32_t m) {
  uint32_t* d = w.dst<uint32_t>(I.d);
  forLanes(m, [=](int i) { d[i] = 0; });
  return NEXT;
}

bool decodeMbarrier(Decoder& D, Inst& I) {
  auto& P = D.p->parts;
  I.cls = C_MBAR;
  D.ignore({"shared", "shared::cta", "shared::cluster", "b64", "release", "acquire", "relaxed",
            "cta", "cluster", "noComplete"});
  const std::string& k = P[1];
  D.has(k.c_str());
  if (k == "init") {
    D.address(D.op(0), I, Space::Shared);
    I.b = D.src(D.op(1), "u32");
    I.fn = opMbarInit;
    return true;
  }
  if (k == "inval") {
    D.address(D.op(0), I, Space::Shared);
    I.fn = opMbarInval;
    return true;
  }
  if (k == "arrive" || k == "arrive_drop") {
    bool tx = D.has("expect_tx");
    if (tx && k == "arrive_drop") D.fail("not supported:");
    size_t a = D.op(0).kind == Operand::Addr ? 0 : 1;
    if (a == 1 && D.op(0).kind == Operand::Reg) I.d = D.dst(D.op(0), 8);
    D.address(D.op(a), I, Space::Shared);
    if (D.nops() > a + 1) I.b = D.src(D.op(a + 1), "u32");
    I.mode = tx ? 1 : k == "arrive" ? 0 : 4;
    I.fn = opMbarArrive;
    return true;
  }
  if (k == "expect_tx" || k == "complete_tx") {
    D.address(D.op(0), I, Space::Shared);
    I.b = D.src(D.op(1), "u32");
    I.mode = k == "expect_tx" ? 2 : 3;
    I.fn = opMbarArrive;
    return true;
  }
  if (k == "try_wait" || k == "test_wait") {
    I.mode = D.has("parity");
    I.d = D.predDst(D.op(0));
    D.address(D.op(1), I, Space::Shared);
    I.b = D.src(D.op(2), I.mode ? "b32" : "b64");
    I.fn = opMbarWait;
    return true;
  }
  return false;
}

bool decodeBulk(Decoder& D, Inst& I) {
  auto& P = D.p->parts;
  auto part = [&](const char* s) {
    for (auto& q : P)
      if (q == s) return true;
    return false;
  };
  bool reduce = P[1] == "reduce";
  I.cls = C_BULK;
  D.ignore({"async", "bulk", "reduce", "mbarrier::complete_tx::bytes", "bulk_group", "tile"});
  D.ignorePrefix("L2::");
  if (D.has("commit_group")) {
    I.fn = opBulkCommit;
    return true;
  }
  if (D.has("wait_group")) {
    D.has("read");
    I.imm = (int64_t)D.op(0).bits;
    I.fn = opBulkWait;
    return true;
  }
  if (D.has("prefetch")) {
    D.ignore({"tensor", "global", "1d", "2d", "3d", "4d", "5d"});
    I.fn = opNop;
    return true;
  }
  if (D.has("multicast::cluster")) D.fail("multicast is not supported:");
  if (reduce) {
    static const char* ops[] = {"add", "min", "max", "and", "or", "xor"};
    for (int k = 0; k < 6; k++)
      if (D.has(ops[k])) I.mode = (uint8_t)(k + 1);
    if (!I.mode) D.fail("reduction is not supported:");
    D.has("noftz");
    if (!part("tensor")) {
      I.y = (uint32_t)atomicType(D.type());
      if (atomicType(D.type()) < 0) D.fail("type is not supported:");
    } else
      D.fail("tensor reductions are not supported:");
  }
  bool store = part("bulk_group");
  D.ignore({"shared::cluster", "shared::cta", "global"});
  auto barrierOf = [&](const Operand& o, std::vector<Opnd>& l) {
    Inst t;
    D.address(o, t, Space::Shared);
    l.push_back(t.a);
    I.bw = t.aw;
    I.y = (uint32_t)t.imm;
  };
  if (D.has("tensor")) {
    static const char* ds[] = {"1d", "2d", "3d", "4d", "5d"};
    for (int k = 0; k < 5; k++)
      if (D.has(ds[k])) I.x = k + 1;
    if (!I.x) D.fail("rank missing in");
    const Operand& tm = D.op(store ? 0 : 1);
    if (tm.kind != Operand::Addr || tm.sub.size() != 2)
      D.fail("[tensorMap, {coordinates}] expected in");
    Operand base;
    base.kind = Operand::Addr;
    base.sub = {tm.sub[0]};
    base.off = tm.off;
    D.address(base, I, Space::Generic);
    if (I.imm || I.aw != 8) D.fail("tensor map address must be a 64-bit register in");
    Opnd map = I.a;
    std::vector<Opnd> l;
    const Operand& cs = tm.sub[1];
    if (cs.kind == Operand::Vec)
      for (auto& s : cs.sub) l.push_back(D.src(s, "b32"));
    else
      l.push_back(D.src(cs, "b32"));
    if (l.size() != I.x) D.fail("wrong number of coordinates in");
    if (!store) barrierOf(D.op(2), l);
    D.address(D.op(store ? 1 : 0), I, Space::Shared);
    I.b = map;
    I.ext = D.list(l);
    I.fn = store ? opTensorStore : opTensorLoad;
    return true;
  }
  D.address(D.op(store ? 0 : 1), I, Space::Global);
  Opnd g = I.a;
  if (I.aw != 8) D.fail("64-bit global address expected in");
  I.x = (uint32_t)(int32_t)I.imm;
  D.address(D.op(store ? 1 : 0), I, Space::Shared);
  I.b = g;
  I.c = D.src(D.op(2), "u32");
  if (!store) {
    std::vector<Opnd> l;
    barrierOf(D.op(3), l);
    I.ext = D.list(l);
    I.fn = opBulkLoad;
  } else
    I.fn = opBulkStore;
  return true;
}

bool decodeWgmma(Decoder& D, Inst& I) {
  D.ignore({"sync", "aligned"});
  I.cls = C_MISC;
  if (D.has("fence")) {
    I.fn = opWgFence;
    return true;
  }
  if (D.has("commit_group")) {
    I.fn = opWgCommit;
    return true;
  }
  if (D.has("wait_group")) {
    I.imm = (int64_t)D.op(0).bits;
    I.fn = opWgWait;
    return true;
  }
  if (!D.has("mma_async")) return false;
  int M = 0, N = 0, K = 0;
  for (size_t k = 1; k < D.p->parts.size(); k++)
    if (sscanf(D.p->parts[k].c_str(), "m%dn%dk%d", &M, &N, &K) == 3) {
      D.used[k] = true;
      break;
    }
  int kd = elemKind(D.type(0)), ka = elemKind(D.type(1)), kb = elemKind(D.type(2));
  if (M != 64 || N % 8 || N > 256 || kd < 0 || ka < 0 || kb < 0 || K * elemBytes(ka) != 32)
    D.fail("shape or types are not supported:");
  std::vector<Opnd> l;
  size_t nd = kd == E_F16 ? N / 4 : N / 2;
  if (D.op(0).sub.size() != nd) D.fail(fmt("%zu accumulator registers expected in", nd));
  for (auto& s : D.op(0).sub) l.push_back(D.dst(s, 4));
  I.mode = 0;
  if (D.op(1).kind == Operand::Vec) {
    if (D.op(1).sub.size() != 4) D.fail("4 registers expected for A in");
    I.mode |= 1;
    for (auto& s : D.op(1).sub) l.push_back(D.src(s, "b32"));
  } else
    I.a = D.src(D.op(1), "b64");
  I.b = D.src(D.op(2), "b64");
  auto imm = [&](size_t k) -> int64_t {
    if (D.op(k).kind != Operand::Imm) D.fail("immediate expected in");
    return (int64_t)D.op(k).bits;
  };
  size_t k = 3;
  if (D.nops() > k) {
    bool neg;
    I.c = D.predSrc(D.op(k), &neg);
    if (neg) I.flags |= FL_NEGC;
    k++;
  }
  if (ka != E_S8 && ka != E_U8) {
    if (D.nops() > k && imm(k++) == -1) I.mode |= 2;
    if (D.nops() > k && imm(k++) == -1) I.mode |= 4;
    if (!(I.mode & 1) && D.nops() > k && imm(k++)) I.mode |= 8;
    if (D.nops() > k && imm(k++)) I.mode |= 16;
  }
  D.has("satfinite");
  I.ext = D.list(l);
  I.nExt = (uint32_t)l.size();
  I.x = (uint32_t)(ka | kb << 8 | kd << 16);
  I.y = (uint32_t)(N << 8 | K);
  I.fn = opWgmma;
  I.cls = C_WGMMA;
  I.flags |= FL_WGMMA;
  I.flops = 2.0 * 16 * N * K / 32;
  static const char* names[] = {"wgmma.f16", "wgmma.bf16", "wgmma.tf32", "wgmma.fp8",
                                "wgmma.fp8", "wgmma.int8", "wgmma.int8"};
  I.flopType = names[ka];
  return true;
}

}  // namespace

// Called for instructions that name accumulator registers while wgmmas are in flight. Plain copies
// of an accumulator (the compiler makes them between chained wgmmas) join the queue; any other use
// is an error. True: do not execute.
bool wgDefer(Warp& w, const Inst& I) {
  if (I.flags & FL_WGMMA) return false;
  const auto& off = w.frame->code->regOff;
  auto pending = [&](const Operand& o) {
    return o.kind == Operand::Reg && w.wgRegs[off[o.reg] / 32];
  };
  if (I.flags & FL_MOV) {
    bool s = pending(I.src->ops[1]), d = pending(I.src->ops[0]);
    if (s && !d) {
      WgOp op;
      op.inst = &I;
      op.frame = w.frame;
      const bool committed = w.wgOpen.empty() && !w.wgGroups.empty();
      if (committed && w.wgGroups.back().done)
        I.fn(w, I, w.live);  // the other warps have waited already, this one has not
      (committed ? w.wgGroups.back().ops : w.wgOpen).push_back(std::move(op));
      markRegs(w, I, 1);
      return true;
    }
    if (!s && !d) return false;
  } else {
    bool any = false;
    for (auto& o : I.src->ops) {
      any |= pending(o);
      for (auto& s : o.sub) any |= pending(s);
    }
    if (!any) return false;
  }
  w.fail(-1, "a wgmma accumulator register is used before wgmma.wait_group");
}

bool decodeHopper(Decoder& D, Inst& I) {
  auto& P = D.p->parts;
  const std::string& o = P[0];
  if (o == "mbarrier" && P.size() > 1) return decodeMbarrier(D, I);
  if (o == "cp" && P.size() > 2 && P[1] == "async" && P[2] == "mbarrier") {
    D.ignore({"async", "mbarrier", "arrive", "shared", "shared::cta", "b64"});
    I.mode = D.has("noinc");
    D.address(D.op(0), I, Space::Shared);
    I.fn = opCpAsyncArrive;
    I.cls = C_MBAR;
    return true;
  }
  if (o == "cp") return decodeBulk(D, I);
  if (o == "wgmma") return decodeWgmma(D, I);
  if (o == "mapa") {
    D.ignore({"shared::cluster"});
    int b = typeBytes(D.type());
    I.d = D.dst(D.op(0), b, &I.dw);
    I.a = D.src(D.op(1), D.type());
    I.b = D.src(D.op(2), "u32");
    I.fn = opMapa;
    return true;
  }
  if (o == "getctarank") {
    D.ignore({"shared::cluster"});
    I.d = D.dst(D.op(0), 4);
    I.fn = opZero32;
    return true;
  }
  return false;
}

}  // namespace ptxvm
