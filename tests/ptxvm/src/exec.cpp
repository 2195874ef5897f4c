// The scheduler: splits of a warp, warps of a block, blocks of a grid.
#include "exec.h"

#include <algorithm>
#include <chrono>
#include <random>
#include <thread>

#include "decode.h"

namespace ptxvm {

// ---------------------------------------------------------------- frames
Frame* Warp::newFrame(Code* c, Frame* parent) {
  Worker& W = *wk;
  Frame* f;
  if (!W.freeFrames.empty()) {
    f = W.freeFrames.back();
    W.freeFrames.pop_back();
  } else {
    W.frameStore.push_back(std::make_unique<Frame>());
    f = W.frameStore.back().get();
  }
  *f = Frame();
  f->code = c;
  f->parent = parent;
  f->depth = parent ? parent->depth + 1 : 0;
  if (f->depth > 1000) throw VmError("call stack deeper than 1000 frames");
  size_t pb = parent ? (size_t)c->paramBytes * 32 : 0, cb = (size_t)c->callParamBytes * 32;
  size_t bytes = c->regBytes + pb + cb + 128;
  void* q = nullptr;
  if (posix_memalign(&q, 64, bytes)) throw VmError("out of memory");
  memset(q, 0, bytes);
  f->regs = (uint8_t*)q;
  f->inParam = parent ? f->regs + c->regBytes : L->params;
  f->inStride = parent ? c->paramBytes : 0;
  f->callParam = f->regs + c->regBytes + pb;
  f->callStride = c->callParamBytes;
  f->localBase = parent ? (parent->localTop + 15) / 16 * 16 : 0;
  f->localTop = f->localBase + c->localBytes;
  ensureLocal(f->localTop);
  if (parent) parent->refs++;
  return f;
}
void Warp::release(Frame* f) {
  while (f && --f->refs == 0) {
    Frame* p = f->parent;
    free(f->regs);
    wk->freeFrames.push_back(f);
    f = p;
  }
}
void Warp::ensureLocal(uint32_t bytes) {
  if (bytes <= localStride) return;
  uint32_t ns = std::max<uint32_t>((bytes + 63) / 64 * 64, localStride * 2);
  if (ns > (512u << 10) + 65536)
    throw VmError(fmt("local memory of a thread exceeds 512 KB (%u bytes)", ns));
  std::vector<uint8_t> n((size_t)ns * 32, 0);
  for (int i = 0; i < 32 && localStride; i++)
    memcpy(&n[(size_t)i * ns], &local[(size_t)i * localStride], localStride);
  local.swap(n);
  localStride = ns;
}

// ---------------------------------------------------------------- warps
void Warp::init(Block* b, int wid) {
  blk = b;
  wk = b->wk;
  L = b->L;
  id = wid;
  uint32_t first = wid * 32, n = std::min(32u, b->threads - first);
  full = live = n == 32 ? ~0u : (1u << n) - 1;
  splits.clear();
  frame = nullptr;
  tick = 0;
  spinning = false;
  wgPending = false;
  proxyVc.clear();
  pendingCopies.clear();
  bulkOpen.clear();
  bulkGroups.clear();
  wgOpen.clear();
  wgGroups.clear();
  wgRegs.clear();
  wgRetired = 0;
  clockId = wid;
  asyncArrive.clear();
  groups.clear();
  vc.assign(b->nclocks, 0);
  vc[wid] = 1;
  auto slot = [&](int s) { return (uint32_t*)(special + s * 256); };
  uint32_t bx = L->block[0], by = L->block[1];
  for (uint32_t i = 0; i < 32; i++) {
    uint32_t t = first + i;
    slot(S_TIDX)[i] = t % bx;
    slot(S_TIDY)[i] = t / bx % by;
    slot(S_TIDZ)[i] = t / (bx * by);
    for (int k = 0; k < 3; k++) {
      slot(S_NTIDX + k)[i] = L->block[k];
      slot(S_CTAX + k)[i] = b->ctaid[k];
      slot(S_NCTAX + k)[i] = L->grid[k];
    }
    slot(S_LANE)[i] = i;
    slot(S_WARP)[i] = wid;
    slot(S_NWARP)[i] = b->nwarps;
    slot(S_SMID)[i] = (b->ctaid[0] + L->grid[0] * (b->ctaid[1] + L->grid[1] * b->ctaid[2])) % 132;
    slot(S_NSMID)[i] = 132;
    slot(S_GRIDID)[i] = 1;
    slot(S_LMEQ)[i] = 1u << i;
    slot(S_LMLT)[i] = (1u << i) - 1;
    slot(S_LMLE)[i] = slot(S_LMLT)[i] | 1u << i;
    slot(S_LMGE)[i] = ~slot(S_LMLT)[i];
    slot(S_LMGT)[i] = ~slot(S_LMLE)[i];
    slot(S_DYNSM)[i] = L->smemDyn;
    slot(S_TOTSM)[i] = L->smemTotal;
    slot(S_ZERO)[i] = 0;
    slot(S_ONE)[i] = 1;
    slot(S_DYN32)[i] = L->smemTotal - L->smemDyn;
    ((uint64_t*)(special + S_DYN64 * 256))[i] = L->smemTotal - L->smemDyn;
  }
  base[2] = special;
  base[3] = nullptr;
  Frame* f = newFrame(L->code, nullptr);
  f->refs = 1;
  splits.push_back({f, 0, full, Split::Run, 0, 0});
}

std::string Warp::where(int lane, const Inst& I) {
  uint32_t t = id * 32 + (lane < 0 ? 0 : lane), bx = L->block[0], by = L->block[1];
  std::string th = lane < 0 ? fmt("warp %d", id)
                            : fmt("thread (%u,%u,%u) [warp %d lane %d]", t % bx, t / bx % by,
                                  t / (bx * by), id, lane);
  std::string f = frame && frame->code != L->code ? " in function " + frame->code->fn->name : "";
  return fmt("kernel %s%s, PTX line %d '%s', block (%u,%u,%u), %s", L->code->fn->name.c_str(),
             f.c_str(), I.line, I.src->op.c_str(), blk->ctaid[0], blk->ctaid[1], blk->ctaid[2],
             th.c_str());
}
void Warp::fail(int lane, const std::string& m) {
  const Inst& I = frame->code->insts[pc];
  throw VmError(m + "\n  at " + where(lane, I));
}

void Warp::mergeSplits() {
  for (size_t i = 0; i < splits.size(); i++)
    for (size_t j = i + 1; j < splits.size();) {
      Split &a = splits[i], &b = splits[j];
      if (a.f == b.f && a.pc == b.pc && (a.st == Split::Run || a.st == Split::Conv) &&
          (b.st == Split::Run || b.st == Split::Conv)) {
        a.mask |= b.mask;
        a.st = Split::Run;
        a.lastRun = std::max(a.lastRun, b.lastRun);
        b.f->refs--;
        splits.erase(splits.begin() + j);
      } else
        j++;
    }
}

int Warp::pick(bool fair) {
  int best = -1;
  for (int i = 0; i < (int)splits.size(); i++) {
    Split& s = splits[i];
    if (s.st != Split::Run) continue;
    if (best < 0) {
      best = i;
      continue;
    }
    Split& b = splits[best];
    if (fair ? s.lastRun < b.lastRun
             : (s.f->depth != b.f->depth ? s.f->depth > b.f->depth : s.pc < b.pc))
      best = i;
  }
  return best;
}
void Warp::wakeConv() {
  for (auto& s : splits)
    if (s.st == Split::Conv) s.st = Split::Run;
}

bool wgDefer(Warp& w, const Inst& I);  // ops_hopper.cpp: accumulators in flight

int Warp::run(int quantum) {
  bool fair = false, did = false, spun = false;
  if (splits.empty()) return R_DONE;
  const int startQuantum = quantum;
  while (quantum > 0) {
    if (splits.size() > 1) mergeSplits();
    int cur = pick(fair);
    if (cur < 0) return did ? R_PROGRESS : R_BLOCKED;
    fair = false;
    did = true;
    frame = splits[cur].f;
    Code* code = frame->code;
    base[0] = frame->regs;
    base[1] = code->consts;
    pc = splits[cur].pc;
    uint32_t mask = splits[cur].mask;
    splits[cur].lastRun = ++tick;
    const Inst* insts = code->insts.data();
    uint64_t* cw = wk->cntW.data() + code->pcBase;
    uint64_t* ct = wk->cntT.data() + code->pcBase;
    int budget = std::min(quantum, splits.size() > 1 ? 2000 : quantum), start = budget;
    bool again = true;
    while (again) {
      const Inst& I = insts[pc];
      uint32_t m = mask;
      if (I.pred != ~0u) {
        uint32_t p = *(const uint32_t*)(frame->regs + I.pred);
        m &= I.predNeg ? ~p : p;
      }
      cw[pc]++;
      ct[pc] += __builtin_popcount(m);
      budget--;
      if (!m) {
        pc++;
      } else {
        curMask = mask;
        int r = wgPending && code->touchesAcc[pc] && wgDefer(*this, I) ? NEXT : I.fn(*this, I, m);
        if (r == NEXT) {
          pc++;
        } else if (r == JUMP && m == mask) {
          pc = jump;
        } else {
          // Anything else changes the set of splits. Lanes that did not take part go on behind this
          // instruction.
          uint32_t rest = mask & ~m;
          if (rest) {
            splits.push_back({frame, pc + 1, rest, Split::Run, 0, tick});
            frame->refs++;
            splits[cur].mask = mask = m;
          }
          Split& s = splits[cur];
          s.pc = pc + 1;
          again = false;
          switch (r) {
            case JUMP:
              s.pc = jump;
              wk->st.divergent++;
              break;
            case JUMPSOME:
              wk->st.divergent++;
              s.mask = m & ~jumpMask;
              s.pc = pc;
              splits.push_back({frame, jump, jumpMask, Split::Run, 0, tick});
              frame->refs++;
              break;
            case EXIT:
              live &= ~m;
              release(s.f);
              splits.erase(splits.begin() + cur);
              wakeConv();
              blk->progress++;
              if (splits.empty()) {
                quantum -= start - budget;
                wk->executed += startQuantum - quantum;
                return R_DONE;
              }
              break;
            case CALL: {
              Frame* nf = newFrame(callee, frame);
              nf->retPc = pc + 1;
              nf->callInst = &I;
              nf->refs = 1;
              frame->refs--;  // the split's own reference is now held through the child
              // arguments
              uint32_t na = I.nExt;
              for (uint32_t k = 0; k + 2 < na; k += 3) {
                uint32_t so = code->ext[I.ext + k], dof = code->ext[I.ext + k + 1],
                         n = code->ext[I.ext + k + 2];
                if (n & 0x80000000u) continue;
                for (uint32_t mm = m; mm; mm &= mm - 1) {
                  int l = __builtin_ctz(mm);
                  memcpy(nf->inParam + (size_t)l * nf->inStride + dof,
                         frame->callParam + (size_t)l * frame->callStride + so, n);
                }
              }
              s.f = nf;
              s.pc = 0;
              break;
            }
            case RET: {
              Frame* pf = frame->parent;
              if (!pf) {  // ret of a kernel
                live &= ~m;
                release(s.f);
                splits.erase(splits.begin() + cur);
                wakeConv();
                blk->progress++;
                if (splits.empty()) {
                  quantum -= start - budget;
                  wk->executed += startQuantum - quantum;
                  return R_DONE;
                }
                break;
              }
              const Inst& CI = *frame->callInst;
              const auto& ext = pf->code->ext;
              for (uint32_t k = 0; k + 2 < CI.nExt; k += 3) {
                uint32_t so = ext[CI.ext + k], dof = ext[CI.ext + k + 1], n = ext[CI.ext + k + 2];
                if (!(n & 0x80000000u)) continue;
                n &= 0x7fffffffu;
                for (uint32_t mm = m; mm; mm &= mm - 1) {
                  int l = __builtin_ctz(mm);
                  memcpy(pf->callParam + (size_t)l * pf->callStride + so,
                         frame->inParam + (size_t)l * frame->inStride + dof, n);
                }
              }
              s.pc = frame->retPc;
              s.f = pf;
              pf->refs++;
              release(frame);
              break;
            }
            case CONV:
              s.pc = pc;
              s.st = Split::Conv;
              break;
            case BAR:
              s.st = Split::Bar;
              s.bar = barId;
              blk->checkBarrier(barId);
              break;
            case YIELD:
              spun |= spinning;
              fair = true;
              break;
            case BLOCK:
              s.pc = pc;
              spun |= spinning;
              fair = true;
              break;
          }
          if (r == YIELD || r == BLOCK) {
            // other splits of the warp may run first; otherwise give the turn to other warps
            bool others = false;
            for (auto& o : splits) others |= o.st == Split::Run && &o != &splits[cur];
            if (!others) {
              quantum -= start - budget;
              wk->executed += startQuantum - quantum;
              return spun ? R_SPIN : R_PROGRESS;
            }
            quantum -= 200;
          }
          break;
        }
      }
      if (budget <= 0) {
        splits[cur].pc = pc;
        fair = true;
        break;
      }
      if (splits.size() > 1) {
        // reconverge with, or give way to, a split that is behind
        bool stop = false;
        for (int i = 0; i < (int)splits.size(); i++) {
          const Split& o = splits[i];
          if (i == cur || o.f != frame) continue;
          if (o.pc == pc && o.st != Split::Bar)
            stop = true;
          else if (o.pc < pc && o.st == Split::Run && splits[cur].pc <= o.pc)
            stop = true;
        }
        if (stop) {
          splits[cur].pc = pc;
          break;
        }
      }
    }
    quantum -= start - budget;
  }
  wk->executed += startQuantum - quantum;
  return spun ? R_SPIN : R_PROGRESS;
}

// ---------------------------------------------------------------- blocks
uint32_t Block::liveThreads() const {
  uint32_t n = 0;
  for (auto& w : warps)
    if (w->live) n += 32;
  return n;
}

void Block::checkBarrier(uint32_t id) {
  Barrier& b = bars[id];
  if (!b.arrived) return;
  uint32_t need = b.expected ? b.expected : liveThreads();
  if (b.arrived < need) return;
  for (auto& w : warps) {
    bool woke = false;
    for (auto& s : w->splits)
      if (s.st == Split::Bar && s.bar == id) {
        s.st = Split::Run;
        woke = true;
      }
    if (woke && shadow.race)
      for (size_t k = 0; k < w->vc.size(); k++) w->vc[k] = std::max(w->vc[k], b.vc[k]);
  }
  b.arrived = 0;
  b.expected = 0;
  b.vc.clear();
  progress++;
}

void Block::deadlock() {
  std::string s = fmt("deadlock in kernel %s, block (%u,%u,%u):", L->code->fn->name.c_str(),
                      ctaid[0], ctaid[1], ctaid[2]);
  int n = 0;
  for (auto& w : warps)
    for (auto& sp : w->splits) {
      if (++n > 24) continue;
      const Inst& I = sp.f->code->insts[sp.st == Split::Bar ? sp.pc - 1 : sp.pc];
      if (sp.st == Split::Bar) {
        uint32_t need = bars[sp.bar].expected ? bars[sp.bar].expected : liveThreads();
        s +=
            fmt("\n  warp %d lanes %08x wait at barrier %u (%u of %u threads arrived), PTX line %d",
                w->id, sp.mask, sp.bar, bars[sp.bar].arrived, need, I.line);
      } else if (sp.st == Split::Conv) {
        s +=
            fmt("\n  warp %d lanes %08x wait for other lanes of the warp (live %08x) at '%s', PTX "
                "line %d",
                w->id, sp.mask, w->live, I.src->op.c_str(), I.line);
      } else if (w->spinning && w->spinAt && w->spinBar == ~0u) {
        s +=
            fmt("\n  warp %d waits at PTX line %d for the other warps of its warpgroup to commit "
                "the wgmma-group",
                w->id, w->spinAt->line);
      } else if (w->spinning && w->spinAt) {
        s += fmt("\n  warp %d lanes %08x spin at PTX line %d on the mbarrier at shared offset %u",
                 w->id, sp.mask, w->spinAt->line, w->spinBar);
        if (w->spinBar + 8 <= smemBytes) {
          uint64_t v;
          memcpy(&v, smem + w->spinBar, 8);
          s += fmt(" (phase %u, %u of %u arrivals pending, %d tx bytes pending)",
                   (unsigned)(v >> 63), (unsigned)(v & 0xfffff), (unsigned)(v >> 20 & 0xfffff),
                   (int)((v >> 40 & 0x3fffff) << 10) >> 10);
        }
      } else {
        s += fmt("\n  warp %d lanes %08x runs at PTX line %d", w->id, sp.mask, I.line);
      }
    }
  throw VmError(s);
}

void Block::run(uint64_t linear) {
  ctaid[0] = linear % L->grid[0];
  ctaid[1] = linear / L->grid[0] % L->grid[1];
  ctaid[2] = linear / L->grid[0] / L->grid[1];
  threads = L->block[0] * L->block[1] * L->block[2];
  nwarps = (threads + 31) / 32;
  nclocks = nwarps + nwarps / 4;
  for (auto& c : wgClock) c = 0;
  smemBytes = L->smemTotal;
  if (smemBytes > smemCap || !smem) {
    free(smem);
    smemCap = std::max(1024u, smemBytes);
    void* q;
    if (posix_memalign(&q, 1024, smemCap + 64)) throw VmError("out of memory");
    smem = (uint8_t*)q;
  }
  memset(smem, 0xcd, smemBytes);  // a recognisable pattern: nothing is zero by luck
  shadow.reset(smemBytes, L->code->granule, L->checks);
  for (auto& b : bars) b = Barrier();
  mbars.clear();
  syncVars.clear();
  bulk.clear();
  progress = 0;
  while (warps.size() < nwarps) warps.push_back(std::make_unique<Warp>());
  warps.resize(nwarps);
  for (uint32_t i = 0; i < nwarps; i++) warps[i]->init(this, i);
  uint32_t alive = nwarps;
  int idle = 0;
  std::vector<Warp*> turns;
  for (auto& w : warps) turns.push_back(w.get());
  std::minstd_rand random(uint32_t(L->order + linear));
  while (alive) {
    bool any = false, spinOnly = true;
    uint64_t before = progress;
    if (L->order) std::shuffle(turns.begin(), turns.end(), random);
    for (Warp* w : turns) {
      if (w->done()) continue;
      int r = w->run(L->order ? 1 + random() % 2000 : 2000);
      if (r == R_DONE) {
        alive--;
        any = true;
        spinOnly = false;
        if (w->bulkOpen.size() || w->bulkGroups.size())
          L->warn("a warp exits with shared->global bulk copies it never waited for");
        for (int i = 0; i < 16; i++) checkBarrier(i);
      } else if (r == R_PROGRESS) {
        any = true;
        spinOnly = false;
      } else if (r == R_SPIN)
        any = true;
    }
    if (!any && alive) deadlock();
    idle = spinOnly && progress == before ? idle + 1 : 0;
    if (idle > 1000) deadlock();
    if (L->maxInsts && wk->executed > L->maxInsts)
      throw VmError(
          fmt("kernel %s: more than %llu warp instructions executed (max_insts); an endless loop?",
              L->code->fn->name.c_str(), (unsigned long long)L->maxInsts));
  }
  if (!bulk.empty()) L->warn(fmt("a block exits with bulk loads in flight that nobody waited for"));
}

// ---------------------------------------------------------------- launches
void Stats::add(const Stats& o) {
  auto* a = (uint64_t*)this;
  auto* b = (const uint64_t*)&o;
  for (size_t i = 0; i < sizeof(Stats) / 8; i++) a[i] += b[i];
}

void Launch::run() {
  uint64_t stat = mod->sharedCommon;
  auto it = mod->sharedStatic.find(code->fn->name);
  if (it != mod->sharedStatic.end()) stat = std::max(stat, it->second);
  smemStatic = (uint32_t)stat;
  if (smemDyn) stat = (stat + mod->dynAlign - 1) / mod->dynAlign * mod->dynAlign;
  smemTotal = (uint32_t)stat + smemDyn;
  uint64_t nb = (uint64_t)grid[0] * grid[1] * grid[2];
  uint64_t nt = (uint64_t)block[0] * block[1] * block[2];
  if (!nb || !nt || nt > 1024)
    throw VmError(fmt("bad launch: grid %ux%ux%u, block %ux%ux%u", grid[0], grid[1], grid[2],
                      block[0], block[1], block[2]));
  if (smemTotal > 227 * 1024)
    throw VmError(fmt("bad launch: %u bytes of shared memory (limit 232448)", smemTotal));
  const int* mx = code->fn->maxntid;
  if (mx[0] && nt > (uint64_t)mx[0] * mx[1] * mx[2])
    throw VmError(
        fmt("bad launch: %llu threads exceed the kernel's .maxntid", (unsigned long long)nt));
  auto t0 = std::chrono::steady_clock::now();
  std::atomic<uint64_t> nextBlock{0};
  std::atomic<bool> stop{false};
  std::mutex mx2;
  std::exception_ptr err;
  uint64_t errBlock = ~0ull;
  int nthr = std::max(1, std::min<int>(threads, (int)std::min<uint64_t>(nb, 256)));
  threads = nthr;
  cntW.assign(mod->totalInsts, 0);
  cntT.assign(mod->totalInsts, 0);
  auto work = [&] {
    Worker W;
    W.L = this;
    W.cntW.assign(mod->totalInsts, 0);
    W.cntT.assign(mod->totalInsts, 0);
    W.block.L = this;
    W.block.wk = &W;
    try {
      for (;;) {
        uint64_t b = nextBlock++;
        if (b >= nb || stop) break;
        try {
          W.block.run(order ? nb - 1 - b : b);
        } catch (...) {
          std::lock_guard<std::mutex> g(mx2);
          if (b < errBlock) {
            errBlock = b;
            err = std::current_exception();
          }
          stop = true;
          for (auto& w : W.block.warps) {
            for (auto& s : w->splits) w->release(s.f);
            w->splits.clear();
          }
        }
      }
    } catch (...) {
      std::lock_guard<std::mutex> g(mx2);
      if (!err) err = std::current_exception();
      stop = true;
    }
    std::lock_guard<std::mutex> g(mx2);
    st.add(W.st);
    for (size_t i = 0; i < cntW.size(); i++) {
      cntW[i] += W.cntW[i];
      cntT[i] += W.cntT[i];
    }
  };
  if (nthr == 1)
    work();
  else {
    std::vector<std::thread> ts;
    for (int i = 0; i < nthr; i++) ts.emplace_back(work);
    for (auto& t : ts) t.join();
  }
  seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - t0).count();
  if (err) std::rethrow_exception(err);
}

// ---------------------------------------------------------------- control flow
static int opBra(Warp& w, const Inst& I, uint32_t) {
  w.jump = I.target;
  return JUMP;
}
static int opExit(Warp&, const Inst&, uint32_t) { return EXIT; }
static int opRet(Warp&, const Inst&, uint32_t) { return RET; }
static int opTrap(Warp& w, const Inst&, uint32_t m) { w.fail(__builtin_ctz(m), "trap executed"); }

static int opBrx(Warp& w, const Inst& I, uint32_t m) {
  // lanes leave one target at a time; the rest re-execute the branch
  const uint32_t* idx = w.src<uint32_t>(I.a);
  const auto& t = w.frame->code->tables[I.x];
  int first = __builtin_ctz(m);
  uint32_t v = idx[first], same = 0;
  if (v >= t.size()) w.fail(first, fmt("brx.idx index %u outside its table of %zu", v, t.size()));
  for (uint32_t k = m; k; k &= k - 1) {
    int l = __builtin_ctz(k);
    if (idx[l] == v) same |= 1u << l;
  }
  w.jump = t[v];
  if (same == m) return JUMP;
  w.jumpMask = same;  // the scheduler sends these lanes off; the others come back here
  return JUMPSOME;
}

static std::string cstr(Warp& w, uint64_t addr, int lane) {
  std::string s;
  for (int i = 0; i < 4096; i++) {
    char c = (char)*w.global(addr + i, 1, lane, false);
    if (!c) break;
    s += c;
  }
  return s;
}

static int opExternCall(Warp& w, const Inst& I, uint32_t m) {
  // I.mode: 0 no-op (returns 0), 1 __assertfail, 2 vprintf, 3 malloc (null), 4 free
  int l = __builtin_ctz(m);
  const auto& ext = w.frame->code->ext;
  auto arg = [&](int k, int lane) {
    uint64_t v = 0;
    uint32_t so = ext[I.ext + 3 * k], n = ext[I.ext + 3 * k + 2] & 0x7fffffff;
    memcpy(&v, w.frame->callParam + (size_t)lane * w.frame->callStride + so, std::min(n, 8u));
    return v;
  };
  if (I.mode == 1) {
    std::string msg = cstr(w, arg(0, l), l), file = cstr(w, arg(1, l), l);
    w.fail(l, fmt("device assertion '%s' failed at %s:%u", msg.c_str(), file.c_str(),
                  (unsigned)arg(2, l)));
  }
  if (I.mode == 2) {
    for (uint32_t k = m; k; k &= k - 1) {
      int lane = __builtin_ctz(k);
      std::string f = cstr(w, arg(0, lane), lane), out;
      uint64_t args = arg(1, lane);
      uint64_t at = 0;
      auto fetch = [&](int n) -> uint64_t {
        at = (at + n - 1) / n * n;
        uint64_t a = args + at, v = 0;
        at += n;
        uint8_t* q = (a & kWinMask) == kLocalWin ? w.localAt(a & ~kWinMask, n, lane)
                                                 : w.global(a, n, lane, false);
        memcpy(&v, q, n);
        return v;
      };
      for (size_t i = 0; i < f.size(); i++) {
        if (f[i] != '%') {
          out += f[i];
          continue;
        }
        if (i + 1 < f.size() && f[i + 1] == '%') {
          out += '%';
          i++;
          continue;
        }
        size_t j = i + 1;
        while (j < f.size() && strchr("-+ #0123456789.hlzjt", f[j])) j++;
        if (j >= f.size()) break;
        std::string spec = f.substr(i, j - i + 1);
        char c = f[j];
        bool lng = spec.find('l') != std::string::npos || spec.find('z') != std::string::npos ||
                   spec.find('j') != std::string::npos;
        if (strchr("feEgGaA", c))
          out += fmt(spec.c_str(), bitcast<double>(fetch(8)));
        else if (c == 's')
          out += fmt(spec.c_str(), cstr(w, fetch(8), lane).c_str());
        else if (c == 'p')
          out += fmt("%p", (void*)fetch(8));
        else if (lng)
          out += fmt(spec.c_str(), fetch(8));
        else
          out += fmt(spec.c_str(), (unsigned)fetch(4));
        i = j;
      }
      std::lock_guard<std::mutex> g(w.L->warnMx);
      w.L->output += out;
    }
  }
  for (uint32_t k = 0; k + 2 < I.nExt; k += 3) {
    uint32_t so = ext[I.ext + k], n = ext[I.ext + k + 2];
    if (!(n & 0x80000000u)) continue;
    for (uint32_t mm = m; mm; mm &= mm - 1) {
      int lane = __builtin_ctz(mm);
      memset(w.frame->callParam + (size_t)lane * w.frame->callStride + so, 0, n & 0x7fffffffu);
    }
  }
  return NEXT;
}

static int opCall(Warp& w, const Inst& I, uint32_t) {
  w.callee = w.L->mod->codes[I.target].get();
  return CALL;
}
static int opCallIndirect(Warp& w, const Inst& I, uint32_t m) {
  const uint64_t* a = w.src<uint64_t>(I.a);
  int f = __builtin_ctz(m);
  for (uint32_t k = m; k; k &= k - 1)
    if (a[__builtin_ctz(k)] != a[f])
      w.fail(f, "indirect call with different targets in one warp is not supported");
  uint64_t idx = a[f] - kFuncWin;
  if ((a[f] & kWinMask) != kFuncWin || idx >= w.L->mod->codes.size() || !w.L->mod->codes[idx])
    w.fail(f, fmt("indirect call of a bad function address 0x%llx", (unsigned long long)a[f]));
  w.callee = w.L->mod->codes[idx].get();
  return CALL;
}

bool decodeControl(Decoder& D, Inst& I) {
  const std::string& o = D.p->parts[0];
  if (o == "bra") {
    D.has("uni");
    I.fn = opBra;
    I.cls = C_BRANCH;
    I.target = D.label(D.op(0));
    return true;
  }
  if (o == "brx") {
    D.has("idx");
    D.has("uni");
    I.fn = opBrx;
    I.cls = C_BRANCH;
    I.a = D.src(D.op(0), "u32");
    auto* t = D.F.findTable(D.p->scope, D.op(1).sym);
    if (!t) D.fail("unknown .branchtargets in");
    std::vector<int32_t> v;
    for (auto& n : *t) {
      Operand l;
      l.kind = Operand::Sym;
      l.sym = n;
      v.push_back(D.label(l));
    }
    I.x = (uint32_t)D.C.tables.size();
    D.C.tables.push_back(v);
    return true;
  }
  if (o == "exit") {
    I.fn = opExit;
    I.cls = C_BRANCH;
    return true;
  }
  if (o == "ret") {
    D.has("uni");
    I.fn = opRet;
    I.cls = C_BRANCH;
    return true;
  }
  if (o == "trap" || o == "brkpt") {
    I.fn = opTrap;
    I.cls = C_MISC;
    return true;
  }
  if (o == "call") {
    D.has("uni");
    I.cls = C_BRANCH;
    const Operand& callee = D.op(0);
    const Function* f = nullptr;
    if (callee.kind == Operand::Sym) {
      auto it = D.L.mod->functionIndex.find(callee.sym);
      if (it == D.L.mod->functionIndex.end()) D.fail("unknown function " + callee.sym + " in");
      I.target = it->second;
      f = D.L.mod->functions[it->second].get();
    } else if (callee.kind == Operand::Reg) {
      I.fn = opCallIndirect;
      I.a = D.src(callee, "u64");
    } else
      D.fail("bad callee in");
    std::vector<Opnd> v;
    auto add = [&](const std::vector<Operand>& os, const std::vector<Var>* vs, uint32_t flag) {
      uint64_t off = 0;
      for (size_t k = 0; k < os.size(); k++) {
        if (os[k].kind != Operand::Sym) D.fail("call operands must be .param variables in");
        const Var* s = D.F.findVar(D.p->scope, os[k].sym);
        if (!s) D.fail("unknown parameter " + os[k].sym + " in");
        uint64_t at;
        if (vs) {
          if (k >= vs->size()) D.fail("wrong number of arguments in");
          at = (*vs)[k].offset;
        } else {
          off = (off + s->align - 1) / s->align * s->align;
          at = off;
          off += s->size;
        }
        v.push_back((Opnd)s->offset);
        v.push_back((Opnd)at);
        v.push_back((Opnd)s->size | flag);
      }
      return off;
    };
    if (!f) {
      uint64_t end = add(D.p->callArgs, nullptr, 0);
      if (!D.p->callRet.empty()) {
        const Var* s = D.F.findVar(D.p->scope, D.p->callRet[0].sym);
        if (!s) D.fail("unknown return parameter in");
        v.push_back((Opnd)s->offset);
        v.push_back((Opnd)((end + 15) / 16 * 16));
        v.push_back((Opnd)s->size | 0x80000000u);
      }
    } else {
      add(D.p->callArgs, &f->params, 0);
      add(D.p->callRet, &f->rets, 0x80000000u);
    }
    I.ext = D.list(v);
    I.nExt = (uint32_t)v.size();
    if (f && f->isExtern) {
      I.fn = opExternCall;
      if (f->name == "__assertfail")
        I.mode = 1;
      else if (f->name == "vprintf")
        I.mode = 2;
      else if (f->name == "malloc")
        I.mode = 3;
      else if (f->name == "free")
        I.mode = 4;
      else
        D.fail("call of undefined function " + f->name + " in");
    } else if (f)
      I.fn = opCall;
    return true;
  }
  if (o == "pmevent") {
    I.fn = opNop;
    I.cls = C_MISC;
    return true;
  }
  return false;
}

}  // namespace ptxvm
