// Barriers, shuffles, votes, fences and other warp-level instructions.
#include "decode.h"

namespace ptxvm {
namespace {

// Lanes named by a member mask must all be here (lanes that exited are forgiven).
inline bool waitFor(const Warp& w, uint32_t members, uint32_t m) {
  return (members & w.live & ~m) != 0;
}
inline uint32_t memberMask(Warp& w, Opnd o, uint32_t m) {
  return w.src<uint32_t>(o)[__builtin_ctz(m)];
}

void checkMember(Warp& w, uint32_t members, uint32_t m) {
  if (m & ~members)
    w.fail(__builtin_ctz(m & ~members), fmt("lane is not in the member mask %08x", members));
}

// Lanes may run one instruction with different member masks; handle the lanes of one mask at a
// time.
uint32_t sameMask(Warp& w, Opnd o, uint32_t m) {
  const uint32_t* mm = w.src<uint32_t>(o);
  uint32_t v = mm[__builtin_ctz(m)], s = 0;
  for (uint32_t k = m; k; k &= k - 1) {
    int i = __builtin_ctz(k);
    if (mm[i] == v) s |= 1u << i;
  }
  return s;
}

// ---------------------------------------------------------------- shuffles and votes
int opShfl(Warp& w, const Inst& I,
           uint32_t m) {  // mode: 0 up 1 down 2 bfly 3 idx; ext[0]: member mask; x: predicate
  Opnd mo = w.frame->code->ext[I.ext];
  for (uint32_t todo = m; todo;) {
    uint32_t g = sameMask(w, mo, todo);
    uint32_t members = memberMask(w, mo, g);
    checkMember(w, members, g);
    if (waitFor(w, members, g)) return CONV;
    todo &= ~g;
  }
  const uint32_t *a = w.src<uint32_t>(I.a), *b = w.src<uint32_t>(I.b), *c = w.src<uint32_t>(I.c);
  uint32_t* d = I.d == kNone ? nullptr : w.dst<uint32_t>(I.d);
  uint32_t in[32], out[32], p = 0;
  memcpy(in, a, sizeof in);
  for (uint32_t k = m; k; k &= k - 1) {
    int i = __builtin_ctz(k);
    uint32_t seg = (c[i] >> 8) & 31, bv = b[i] & 31, maxLane = (i & seg) | (c[i] & 31 & ~seg),
             minLane = i & seg;
    int j;
    bool ok;
    switch (I.mode) {
      case 0:
        j = i - (int)bv;
        ok = j >= (int)maxLane;
        break;
      case 1:
        j = i + (int)bv;
        ok = j <= (int)maxLane;
        break;
      case 2:
        j = i ^ (int)bv;
        ok = j <= (int)maxLane;
        break;
      default:
        j = (int)(minLane | (bv & ~seg));
        ok = j <= (int)maxLane;
    }
    if (!ok) j = i;
    out[i] = in[j & 31];
    p |= (uint32_t)ok << i;
  }
  if (d) forLanes(m, [&](int i) { d[i] = out[i]; });
  if (I.x != kNone) {
    uint32_t& q = w.predReg(I.x);
    q = (q & ~m) | (p & m);
  }
  return NEXT;
}
int opVote(Warp& w, const Inst& I, uint32_t m) {  // mode 0 all 1 any 2 uni 3 ballot; b: mask
  uint32_t p = *w.src<uint32_t>(I.a);
  if (I.flags & FL_NEGC) p = ~p;
  for (uint32_t todo = m; todo;) {
    uint32_t g = sameMask(w, I.b, todo);
    uint32_t members = memberMask(w, I.b, g);
    checkMember(w, members, g);
    if (waitFor(w, members, g)) return CONV;
    todo &= ~g;
  }
  uint32_t res = 0;
  for (uint32_t todo = m; todo;) {
    uint32_t g = sameMask(w, I.b, todo);
    uint32_t v = p & g;
    if (I.mode == 3) {
      uint32_t* d = w.dst<uint32_t>(I.d);
      forLanes(g, [=](int i) { d[i] = v; });
    } else {
      bool r = I.mode == 0 ? v == g : I.mode == 1 ? v != 0 : v == 0 || v == g;
      if (r) res |= g;
    }
    todo &= ~g;
  }
  if (I.mode != 3) {
    uint32_t& d = w.predReg(I.d);
    d = (d & ~m) | res;
  }
  return NEXT;
}
template <class T>
int opMatch(Warp& w, const Inst& I, uint32_t m) {  // mode 0 any, 1 all; b: mask; x: predicate
  uint32_t members = memberMask(w, I.b, m);
  checkMember(w, members, m);
  if (waitFor(w, members, m)) return CONV;
  const T* a = w.src<T>(I.a);
  uint32_t out[32] = {}, p = 0;
  for (uint32_t k = m; k; k &= k - 1) {
    int i = __builtin_ctz(k);
    uint32_t s = 0;
    for (uint32_t q = m; q; q &= q - 1) {
      int j = __builtin_ctz(q);
      if (a[j] == a[i]) s |= 1u << j;
    }
    if (I.mode) {
      bool all = s == m;
      out[i] = all ? m : 0;
      if (all) p |= 1u << i;
    } else
      out[i] = s;
  }
  uint32_t* d = w.dst<uint32_t>(I.d);
  forLanes(m, [&](int i) { d[i] = out[i]; });
  if (I.x != kNone) {
    uint32_t& q = w.predReg(I.x);
    q = (q & ~m) | p;
  }
  return NEXT;
}
int opRedux(Warp& w, const Inst& I,
            uint32_t m) {  // mode: 0 add 1 min 2 max 3 and 4 or 5 xor; x: signed
  uint32_t members = memberMask(w, I.b, m);
  checkMember(w, members, m);
  if (waitFor(w, members, m)) return CONV;
  const uint32_t* a = w.src<uint32_t>(I.a);
  uint32_t r = a[__builtin_ctz(m)];
  for (uint32_t k = m & (m - 1); k; k &= k - 1) {
    uint32_t v = a[__builtin_ctz(k)];
    switch (I.mode) {
      case 0:
        r += v;
        break;
      case 1:
        r = I.x ? (uint32_t)std::min((int32_t)r, (int32_t)v) : std::min(r, v);
        break;
      case 2:
        r = I.x ? (uint32_t)std::max((int32_t)r, (int32_t)v) : std::max(r, v);
        break;
      case 3:
        r &= v;
        break;
      case 4:
        r |= v;
        break;
      default:
        r ^= v;
    }
  }
  uint32_t* d = w.dst<uint32_t>(I.d);
  forLanes(m, [=](int i) { d[i] = r; });
  return NEXT;
}
int opActivemask(Warp& w, const Inst& I, uint32_t m) {
  uint32_t* d = w.dst<uint32_t>(I.d);
  uint32_t v = w.curMask;
  forLanes(m, [=](int i) { d[i] = v; });
  return NEXT;
}
int opElect(Warp& w, const Inst& I, uint32_t m) {
  uint32_t members = memberMask(w, I.a, m);
  checkMember(w, members, m);
  if (waitFor(w, members, m)) return CONV;
  uint32_t leader = (uint32_t)__builtin_ctz(m);
  if (I.d != kNone) {
    uint32_t* d = w.dst<uint32_t>(I.d);
    forLanes(m, [=](int i) { d[i] = leader; });
  }
  uint32_t& q = w.predReg(I.x);
  q = (q & ~m) | 1u << leader;
  return NEXT;
}

int opWarpSync(Warp& w, const Inst& I, uint32_t m) {
  uint32_t members = memberMask(w, I.a, m);
  checkMember(w, members, m);
  if (!waitFor(w, members, m)) return NEXT;
  // lanes may wait at different bar.warp.sync instructions
  uint32_t here = m;
  for (auto& s : w.splits)
    if (s.st == Split::Conv && s.f->code->insts[s.pc].fn == opWarpSync) here |= s.mask;
  if (waitFor(w, members, here)) return CONV;
  for (auto& s : w.splits)
    if (s.st == Split::Conv && s.f->code->insts[s.pc].fn == opWarpSync && (s.mask & members)) {
      s.st = Split::Run;
      s.pc++;
    }
  return NEXT;
}

// ---------------------------------------------------------------- block barriers
// mode bit 0: arrive only; bit 1: aligned; a: id, b: thread count or kNone; x: reduction (0 none 1
// popc 2 and 3 or), c: predicate
void arrive(Warp& w, Barrier& b, uint32_t id, uint32_t count, uint32_t m) {
  if (count && count % 32)
    w.fail(-1, fmt("barrier %u: thread count %u is not a multiple of 32", id, count));
  if (b.arrived && count && b.expected && b.expected != count)
    w.fail(-1,
           fmt("barrier %u used with different thread counts (%u and %u)", id, b.expected, count));
  if (count) b.expected = count;
  b.arrived += m == w.live ? 32 : (uint32_t)__builtin_popcount(m);
  if (b.expected && b.arrived > b.expected)
    w.fail(-1,
           fmt("barrier %u: %u threads arrived where %u were expected", id, b.arrived, b.expected));
  if (w.tracksRaces()) {
    if (b.vc.empty()) b.vc.assign(w.blk->nclocks, 0);
    for (uint32_t k = 0; k < w.blk->nclocks; k++) b.vc[k] = std::max(b.vc[k], w.vc[k]);
    w.vc[w.id]++;
  }
}
int opBar(Warp& w, const Inst& I, uint32_t m) {
  if ((I.mode & 2) && waitFor(w, ~0u, m)) return CONV;
  uint32_t id = w.src<uint32_t>(I.a)[__builtin_ctz(m)];
  if (id > 15) w.fail(__builtin_ctz(m), fmt("barrier id %u out of range", id));
  uint32_t cnt = I.b == kNone ? 0 : w.src<uint32_t>(I.b)[__builtin_ctz(m)];
  Barrier& b = w.blk->bars[id];
  arrive(w, b, id, cnt, m);
  if (I.mode & 1) {
    w.blk->checkBarrier(id);
    return NEXT;
  }
  w.barId = id;
  return BAR;
}
// bar.red: the first pass arrives and waits; when released the instruction behind it collects the
// result
int opBarRed(Warp& w, const Inst& I, uint32_t m) {
  if (waitFor(w, ~0u, m)) return CONV;
  uint32_t id = w.src<uint32_t>(I.a)[__builtin_ctz(m)];
  if (id > 15) w.fail(__builtin_ctz(m), fmt("barrier id %u out of range", id));
  uint32_t p = *w.src<uint32_t>(I.c);
  if (I.flags & FL_NEGC) p = ~p;
  Barrier& b = w.blk->bars[id];
  if (!b.arrived) {
    b.redCnt = 0;
    b.redAnd = 1;
    b.redOr = 0;
  }
  b.redCnt += __builtin_popcount(p & m);
  b.redAnd &= (p & m) == m;
  b.redOr |= (p & m) != 0;
  uint32_t cnt = I.b == kNone ? 0 : w.src<uint32_t>(I.b)[__builtin_ctz(m)];
  arrive(w, b, id, cnt, m);
  w.barId = id;
  return BAR;
}
int opBarRedResult(Warp& w, const Inst& I, uint32_t m) {
  Barrier& b = w.blk->bars[w.src<uint32_t>(I.a)[__builtin_ctz(m)]];
  if (I.x == 1) {
    uint32_t v = b.redCnt;
    uint32_t* d = w.dst<uint32_t>(I.d);
    forLanes(m, [=](int i) { d[i] = v; });
  } else {
    uint32_t v = (I.x == 2 ? b.redAnd : b.redOr) ? ~0u : 0;
    uint32_t& d = w.predReg(I.d);
    d = (d & ~m) | (v & m);
  }
  return NEXT;
}

int opNanosleep(Warp& w, const Inst&, uint32_t) {
  w.tick++;
  return YIELD;
}
int opFenceProxy(Warp& w, const Inst&, uint32_t) {
  w.proxyVc = w.vc;
  w.vc[w.id]++;
  return NEXT;
}

}  // namespace

bool decodeSync(Decoder& D, Inst& I) {
  const std::string& o = D.p->parts[0];
  auto part = [&](size_t k) -> std::string { return k < D.p->parts.size() ? D.p->parts[k] : ""; };
  if (o == "shfl") {
    D.has("sync");
    if (part(1) != "sync") D.fail("only the .sync form is supported:");
    I.mode = D.has("up") ? 0 : D.has("down") ? 1 : D.has("bfly") ? 2 : (D.has("idx"), 3);
    const Operand& d = D.op(0);
    if (d.kind != Operand::Sink) I.d = D.dst(d, 4);
    I.x = d.reg2 >= 0 ? D.C.regOff[d.reg2] : kNone;
    I.a = D.src(D.op(1), "b32");
    I.b = D.src(D.op(2), "b32");
    I.c = D.src(D.op(3), "b32");
    I.ext = D.list({D.src(D.op(4), "b32")});
    I.fn = opShfl;
    I.cls = C_SHFL;
    return true;
  }
  if (o == "vote") {
    D.has("sync");
    if (part(1) != "sync") D.fail("only the .sync form is supported:");
    I.mode = D.has("all") ? 0 : D.has("any") ? 1 : D.has("uni") ? 2 : (D.has("ballot"), 3);
    I.d = I.mode == 3 ? D.dst(D.op(0), 4) : D.predDst(D.op(0));
    bool neg;
    I.a = D.predSrc(D.op(1), &neg);
    if (neg) I.flags |= FL_NEGC;
    I.b = D.src(D.op(2), "b32");
    I.fn = opVote;
    I.cls = C_SHFL;
    return true;
  }
  if (o == "match") {
    D.has("sync");
    I.mode = D.has("all");
    D.has("any");
    const Operand& d = D.op(0);
    I.d = D.dst(d, 4);
    I.x = d.reg2 >= 0 ? D.C.regOff[d.reg2] : kNone;
    I.a = D.src(D.op(1), D.type());
    I.b = D.src(D.op(2), "b32");
    I.fn = typeBytes(D.type()) == 8 ? opMatch<uint64_t> : opMatch<uint32_t>;
    I.cls = C_SHFL;
    return true;
  }
  if (o == "redux") {
    D.has("sync");
    static const char* ops[] = {"add", "min", "max", "and", "or", "xor"};
    for (int k = 0; k < 6; k++)
      if (D.has(ops[k])) I.mode = (uint8_t)k;
    if (D.type() == "f32") D.fail("type is not supported:");
    I.x = D.type() == "s32";
    I.d = D.dst(D.op(0), 4);
    I.a = D.src(D.op(1), "b32");
    I.b = D.src(D.op(2), "b32");
    I.fn = opRedux;
    I.cls = C_SHFL;
    return true;
  }
  if (o == "activemask") {
    I.d = D.dst(D.op(0), 4);
    I.fn = opActivemask;
    return true;
  }
  if (o == "elect") {
    D.has("sync");
    const Operand& d = D.op(0);
    if (d.kind == Operand::Reg) I.d = D.dst(d, 4);
    if (d.reg2 < 0) D.fail("predicate destination expected in");
    I.x = D.C.regOff[d.reg2];
    I.a = D.src(D.op(1), "b32");
    I.fn = opElect;
    return true;
  }
  if (o == "bar" || o == "barrier") {
    if (part(1) == "warp") {
      D.ignore({"warp", "sync"});
      I.a = D.src(D.op(0), "b32");
      I.fn = opWarpSync;
      I.cls = C_BAR;
      return true;
    }
    I.cls = C_BAR;
    if (part(1) == "cluster") {
      // one block per cluster: arrive+wait is a block barrier on its own id
      bool arr = D.has("arrive"), wait = D.has("wait");
      D.ignore({"cluster", "aligned", "release", "acquire", "relaxed"});
      I.a = D.constant(15, 4);
      if (arr) {
        I.fn = opNop;
        return true;
      }
      if (wait) {
        I.mode = 2;
        I.fn = opBar;
        return true;
      }
      return false;
    }
    bool aligned = o == "bar" || D.has("aligned");
    D.ignore({"cta", "aligned"});
    bool arr = D.has("arrive"), red = D.has("red");
    D.has("sync");
    if (red) {
      I.x = D.has("popc") ? 1 : D.has("and") ? 2 : (D.has("or"), 3);
      I.d = I.x == 1 ? D.dst(D.op(0), 4) : D.predDst(D.op(0));
      I.a = D.src(D.op(1), "u32");
      bool neg;
      size_t pi = D.nops() - 1;
      if (pi == 3) I.b = D.src(D.op(2), "u32");
      I.c = D.predSrc(D.op(pi), &neg);
      if (neg) I.flags |= FL_NEGC;
      I.fn = opBarRed;
      D.C.insts.push_back(I);
      I.fn = opBarRedResult;
      I.cls = C_MISC;
      return true;
    }
    I.mode = (arr ? 1 : 0) | (aligned ? 2 : 0);
    I.a = D.nops() ? D.src(D.op(0), "u32") : D.constant(0, 4);
    if (D.nops() > 1) I.b = D.src(D.op(1), "u32");
    I.fn = opBar;
    return true;
  }
  if (o == "membar" || o == "fence") {
    bool proxy = D.has("proxy");
    D.ignore({"cta",
              "gl",
              "sys",
              "gpu",
              "cluster",
              "sc",
              "acq_rel",
              "acquire",
              "release",
              "async",
              "async::generic",
              "alias",
              "tensormap::generic",
              "mbarrier_init",
              "global",
              "shared::cta",
              "shared::cluster",
              "async.global",
              "async.shared::cta",
              "sync_restrict::shared::cta",
              "sync_restrict::shared::cluster",
              "generic"});
    D.ignorePrefix("sync_restrict");
    D.ignorePrefix("async");
    D.ignorePrefix("tensormap");
    I.fn = proxy ? opFenceProxy : opNop;
    I.cls = C_MISC;
    return true;
  }
  if (o == "nanosleep") {
    I.fn = opNanosleep;
    I.cls = C_MISC;
    return true;
  }
  if (o == "griddepcontrol") {
    D.ignore({"launch_dependents", "wait"});
    I.fn = opNop;
    I.cls = C_MISC;
    return true;
  }
  if (o == "setmaxnreg") {
    D.ignore({"inc", "dec", "sync", "aligned"});
    I.fn = opNop;
    I.cls = C_MISC;
    return true;
  }
  return false;
}

}  // namespace ptxvm
