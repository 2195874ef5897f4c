// Shared-memory checks: bounds, uninitialised and in-flight bytes, data races between warps.
//
// Races: every warp has a vector clock, and so has the tensor core of each warpgroup, whose reads
// wgmma.wait_group orders before the waiting warp. A barrier, an mbarrier phase or an atomic joins
// clocks. Each granule of shared memory remembers its last write and the reads since; an access
// that is not ordered after them is a race.
#include <algorithm>

#include "decode.h"

namespace ptxvm {

constexpr uint32_t kMulti = 63;  // rd entries with this warp number index the arena

void Shadow::reset(uint64_t bytes, uint32_t granule, const Checks& c) {
  uninit = c.uninit;
  race = c.race;
  sh = granule >= 4 ? 2 : granule == 2 ? 1 : 0;
  uint64_t n = (bytes >> sh) + 8;
  if (uninit) state.assign(n, 0);
  if (race) {
    wr.assign(n, 0);
    rd.assign(n, 0);
    wrPc.assign(n, 0);
    rdPc.assign(n, 0);
    arena.clear();
  }
}

bool Warp::tracksRaces() const { return blk->shadow.race; }

uint8_t* Warp::sharedAt(uint64_t addr, uint32_t size, int lane) {
  if (addr + size > blk->smemBytes || addr > 0xffffffffu)
    fail(lane, fmt("shared-memory access out of bounds: offset %lld, %u bytes, the block has %u",
                   (long long)addr, size, blk->smemBytes));
  if (addr & (size - 1))
    fail(lane, fmt("misaligned shared-memory access: offset %llu, %u bytes",
                   (unsigned long long)addr, size));
  return blk->smem + addr;
}
uint8_t* Warp::localAt(uint64_t addr, uint32_t size, int lane) {
  if (addr + size > frame->localTop || addr > 0xffffffffu)
    fail(lane, fmt("local-memory access out of bounds: offset %lld, %u bytes, the thread has %u",
                   (long long)addr, size, frame->localTop));
  if (addr & (size - 1))
    fail(lane, fmt("misaligned local-memory access: offset %llu, %u bytes",
                   (unsigned long long)addr, size));
  return local.data() + (size_t)lane * localStride + addr;
}

static void race(Warp& w, int lane, const char* what, uint32_t off, uint32_t size, uint32_t other,
                 uint32_t otherPc) {
  int ln = 0;
  for (auto& c : w.L->mod->codes)
    if (c && otherPc >= c->pcBase && otherPc < c->pcBase + c->insts.size())
      ln = c->insts[otherPc - c->pcBase].line;
  std::string who = other < w.blk->nwarps
                        ? fmt("the access of warp %u", other)
                        : fmt("a wgmma of warps %u..%u", 4 * (other - w.blk->nwarps),
                              4 * (other - w.blk->nwarps) + 3);
  if (ln) who += fmt(" at PTX line %d", ln);
  w.fail(lane, fmt("shared-memory race (%s) at offset %u, %u bytes: not ordered after %s", what,
                   off, size, who.c_str()));
}

void Warp::sharedRead(uint32_t off, uint32_t size, int lane) {
  Shadow& S = blk->shadow;
  uint32_t g0 = off >> S.sh, g1 = (off + size - 1) >> S.sh;
  if (S.uninit) {
    uint8_t all = 1, any = 0;
    for (uint32_t g = g0; g <= g1; g++) {
      all &= S.state[g];
      any |= S.state[g];
    }
    if (any & 2)
      fail(lane, fmt("read of shared memory with an asynchronous copy still in flight (missing "
                     "wait?): offset %u, %u bytes",
                     off, size));
    if (!all)
      fail(lane, fmt("read of uninitialised shared memory: offset %u, %u bytes", off, size));
  }
  if (S.race) {
    const uint32_t by = (uint32_t)clockId, me = vc[by] << 6 | by;
    const uint32_t mypc = frame->code->pcBase + pc;
    for (uint32_t g = g0; g <= g1; g++) {
      uint32_t e = S.wr[g], ow = e & 63;
      if (e && ow != (uint32_t)id && (e >> 6) > vc[ow])
        race(*this, lane, "read after write", off, size, ow, S.wrPc[g]);
      uint32_t r = S.rd[g];
      if (r == me) continue;
      uint32_t rw = r & 63;
      if (rw == kMulti && r) {
        S.arena[(size_t)(r >> 6) * kClocks + by] = vc[by];
      } else if (r == 0 || rw == by || (by == (uint32_t)id && (r >> 6) <= vc[rw])) {
        // The earlier read is ordered before us: forget it. Not so a tensor core: to have waited
        // for it says nothing about what the other warps of its warpgroup read before.
        S.rd[g] = me;
        S.rdPc[g] = mypc;
      } else {
        uint32_t k = (uint32_t)(S.arena.size() / kClocks);
        S.arena.resize(S.arena.size() + kClocks, 0);
        S.arena[(size_t)k * kClocks + rw] = r >> 6;
        S.arena[(size_t)k * kClocks + by] = vc[by];
        S.rd[g] = k << 6 | kMulti;
      }
    }
  }
}

void Warp::sharedWrite(uint32_t off, uint32_t size, int lane, int async) {
  Shadow& S = blk->shadow;
  uint32_t g0 = off >> S.sh, g1 = (off + size - 1) >> S.sh;
  if (S.uninit) {
    for (uint32_t g = g0; g <= g1; g++) {
      if (S.state[g] & 2)
        fail(lane, fmt("write to shared memory with an asynchronous copy still in flight: offset "
                       "%u, %u bytes",
                       off, size));
      S.state[g] = async ? (S.state[g] & 1) | 2 | (async == 2 ? 4 : 0) : 1;
    }
  }
  if (S.race) {
    const uint32_t me = vc[id] << 6 | (uint32_t)id;
    const uint32_t mypc = frame->code->pcBase + pc;
    for (uint32_t g = g0; g <= g1; g++) {
      uint32_t e = S.wr[g], ow = e & 63;
      if (e && ow != (uint32_t)id && (e >> 6) > vc[ow])
        race(*this, lane, "write after write", off, size, ow, S.wrPc[g]);
      uint32_t r = S.rd[g];
      if (r) {
        uint32_t rw = r & 63;
        if (rw == kMulti) {
          const uint32_t* v = &S.arena[(size_t)(r >> 6) * kClocks];
          for (uint32_t k = 0; k < blk->nclocks; k++)
            if (k != (uint32_t)id && v[k] > vc[k])
              race(*this, lane, "write after read", off, size, k, ~0u);
        } else if (rw != (uint32_t)id && (r >> 6) > vc[rw])
          race(*this, lane, "write after read", off, size, rw, S.rdPc[g]);
        S.rd[g] = 0;
      }
      S.wr[g] = me;
      S.wrPc[g] = mypc;
    }
  }
}

// The same for all lanes of an access; the common case is one granule per lane, nothing wrong and
// nothing new.
void Warp::sharedReadLanes(const uint32_t* off, uint32_t mask, uint32_t size) {
  Shadow& S = blk->shadow;
  const bool single = size == 1u << S.sh;
  const uint32_t me = S.race ? vc[id] << 6 | (uint32_t)id : 0;
  const uint32_t mypc = frame->code->pcBase + pc;
  for (; mask; mask &= mask - 1) {
    int i = __builtin_ctz(mask);
    if (single) {
      uint32_t g = off[i] >> S.sh;
      bool ok = !S.uninit || (S.state[g] & 3) == 1;
      if (ok && S.race) {
        uint32_t e = S.wr[g], r = S.rd[g];
        ok = ((e & 63) == (uint32_t)id || (e >> 6) <= vc[e & 63]);
        if (ok && r != me) {
          if (r == 0 || (r & 63) == (uint32_t)id) {
            S.rd[g] = me;
            S.rdPc[g] = mypc;
          } else if ((r & 63) == kMulti)
            S.arena[(size_t)(r >> 6) * kClocks + id] = vc[id];
          else
            ok = false;
        }
      }
      if (ok) continue;
    }
    sharedRead(off[i], size, i);
  }
}
void Warp::sharedWriteLanes(const uint32_t* off, uint32_t mask, uint32_t size) {
  for (; mask; mask &= mask - 1) {
    int i = __builtin_ctz(mask);
    sharedWrite(off[i], size, i);
  }
}

// A read by the async proxy (wgmma, bulk copy): generic writes need a fence.proxy.async by the
// writer, or by the reader once it is ordered after them.
void Warp::asyncProxyRead(uint32_t off, uint32_t size, int lane) {
  sharedRead(off, size, lane);
  Shadow& S = blk->shadow;
  if (!S.race || !S.uninit) return;
  for (uint32_t g = off >> S.sh; g <= (off + size - 1) >> S.sh; g++) {
    uint32_t e = S.wr[g], ow = e & 63;
    if (!e || (S.state[g] & 4)) continue;
    const auto& pw = blk->warps[ow]->proxyVc;
    bool ok =
        (ow < pw.size() && pw[ow] >= (e >> 6)) || (ow < proxyVc.size() && proxyVc[ow] >= (e >> 6));
    if (!ok)
      fail(lane, fmt("the async proxy reads shared memory written by ordinary stores without "
                     "fence.proxy.async: offset %u, written by warp %u",
                     off, ow));
  }
}

// Atomics, volatile and acquire/release accesses order the warps that use the same address.
void Warp::sharedSync(uint32_t off) {
  if (!blk->shadow.race) return;
  auto& s = blk->syncVars[off];
  if (s.empty()) s.assign(blk->nclocks, 0);
  for (uint32_t k = 0; k < blk->nclocks; k++) s[k] = vc[k] = std::max(s[k], vc[k]);
  vc[id]++;
}

}  // namespace ptxvm
