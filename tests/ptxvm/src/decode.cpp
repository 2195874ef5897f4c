#include "decode.h"

#include <cstdarg>

namespace ptxvm {

const char* const kClsNames[C_COUNT] = {
    "misc",     "alu",         "fp32",        "fp64",      "fp16",      "fma",      "sfu",
    "cvt",      "ld_global",   "st_global",   "ld_shared", "st_shared", "ld_local", "st_local",
    "ld_const", "atom_global", "atom_shared", "ldmatrix",  "stmatrix",  "cp_async", "mma",
    "wgmma",    "barrier",     "mbarrier",    "shuffle",   "branch",    "bulk"};

std::string fmt(const char* f, ...) {
  char b[1024];
  va_list ap;
  va_start(ap, f);
  vsnprintf(b, sizeof b, f, ap);
  va_end(ap);
  return b;
}

int opNop(Warp&, const Inst&, uint32_t) { return NEXT; }

void Decoder::begin(const PInst& q) {
  p = &q;
  types.clear();
  used.assign(q.parts.size(), false);
  used[0] = true;
  for (size_t i = 1; i < q.parts.size(); i++)
    if (typeBytes(q.parts[i]) >= 0) {
      types.push_back(q.parts[i]);
      used[i] = true;
    }
}

void Decoder::fail(const std::string& m) const {
  throw VmError(fmt("PTX line %d, function %s: %s: '%s'", p ? p->line : 0, F.name.c_str(),
                    m.c_str(), p ? p->op.c_str() : ""));
}

bool Decoder::has(const char* m) {
  bool r = false;
  for (size_t i = 1; i < p->parts.size(); i++)
    if (p->parts[i] == m) {
      used[i] = true;
      r = true;
    }
  return r;
}
void Decoder::ignorePrefix(const char* pre) {
  for (size_t i = 1; i < p->parts.size(); i++)
    if (p->parts[i].rfind(pre, 0) == 0) used[i] = true;
}
Rnd Decoder::rounding(Rnd def) {
  if (has("rn")) return Rnd::RN;
  if (has("rz")) return Rnd::RZ;
  if (has("rm")) return Rnd::RM;
  if (has("rp")) return Rnd::RP;
  if (has("rna")) return Rnd::RNA;
  return def;
}
void Decoder::finish() {
  for (size_t i = 0; i < used.size(); i++)
    if (!used[i]) fail("modifier '." + p->parts[i] + "' is not supported in");
}

Opnd Decoder::dst(const Operand& o, int bytes, uint8_t* width) {
  if (o.kind != Operand::Reg) fail("destination must be a register in");
  int b = F.regs[o.reg].bytes;
  if (bytes && b != bytes)
    fail(fmt("register %s has the wrong width for", F.regs[o.reg].name.c_str()));
  if (width) *width = (uint8_t)b;
  return kRegs | C.regOff[o.reg];
}
Opnd Decoder::predDst(const Operand& o) {
  if (o.kind == Operand::Sink) return kNone;
  if (o.kind != Operand::Reg || F.regs[o.reg].type != "pred")
    fail("predicate destination expected in");
  return C.regOff[o.reg];
}
Opnd Decoder::predSrc(const Operand& o, bool* neg) {
  *neg = o.neg;
  if (o.kind == Operand::Imm) return constant((o.bits != 0) ? ~0ull : 0, 4);
  if (o.kind != Operand::Reg || F.regs[o.reg].type != "pred") fail("predicate operand expected in");
  return C.regOff[o.reg];
}

Opnd Decoder::constant(uint64_t bits, int width) {
  std::string key((char*)&bits, 8);
  key.push_back((char)width);
  auto it = poolIndex.find(key);
  if (it != poolIndex.end()) return it->second;
  Opnd o = kConst | (Opnd)pool.size();
  for (int i = 0; i < 32; i++)
    for (int k = 0; k < width; k++) pool.push_back(k < 8 ? (uint8_t)(bits >> (8 * k)) : 0);
  while (pool.size() % 64) pool.push_back(0);
  poolIndex[key] = o;
  return o;
}

uint64_t Decoder::convertImm(const Operand& o, const std::string& t) {
  if (!o.isFloat) {
    if (t == "f32") return bitcast<uint32_t>((float)(int64_t)o.bits);
    if (t == "f64") return bitcast<uint64_t>((double)(int64_t)o.bits);
    return o.bits;
  }
  if (t[0] == 'b' || t[0] == 'u' || t[0] == 's') {
    if (t != "bf16" && t != "bf16x2") return o.bits;
  }
  double d = o.fbits == 32 ? (double)bitcast<float>((uint32_t)o.bits) : bitcast<double>(o.bits);
  if (t == "f32") return o.fbits == 32 ? o.bits : bitcast<uint32_t>((float)d);
  if (t == "f64") return bitcast<uint64_t>(d);
  fail("float literal in an operand of type ." + t + " of");
}

uint64_t Decoder::symbol(const std::string& n, Space* sp, bool* found) {
  *found = true;
  auto g = L.mod->globalIndex.find(n);
  if (g != L.mod->globalIndex.end()) {
    *sp = Space::Global;
    return (uint64_t)L.globalMem[g->second];
  }
  auto s = L.mod->sharedIndex.find(n);
  if (s != L.mod->sharedIndex.end()) {
    *sp = Space::Shared;
    return L.mod->shared[s->second].offset;
  }
  auto f = L.mod->functionIndex.find(n);
  if (f != L.mod->functionIndex.end()) {
    *sp = Space::Generic;
    return kFuncWin + (uint64_t)f->second;
  }
  *found = false;
  return 0;
}

Opnd Decoder::special(const std::string& n) {
  static const std::unordered_map<std::string, int> m = {{"%tid.x", S_TIDX},
                                                         {"%tid.y", S_TIDY},
                                                         {"%tid.z", S_TIDZ},
                                                         {"%ntid.x", S_NTIDX},
                                                         {"%ntid.y", S_NTIDY},
                                                         {"%ntid.z", S_NTIDZ},
                                                         {"%ctaid.x", S_CTAX},
                                                         {"%ctaid.y", S_CTAY},
                                                         {"%ctaid.z", S_CTAZ},
                                                         {"%nctaid.x", S_NCTAX},
                                                         {"%nctaid.y", S_NCTAY},
                                                         {"%nctaid.z", S_NCTAZ},
                                                         {"%laneid", S_LANE},
                                                         {"%warpid", S_WARP},
                                                         {"%nwarpid", S_NWARP},
                                                         {"%smid", S_SMID},
                                                         {"%nsmid", S_NSMID},
                                                         {"%gridid", S_GRIDID},
                                                         {"%lanemask_eq", S_LMEQ},
                                                         {"%lanemask_le", S_LMLE},
                                                         {"%lanemask_lt", S_LMLT},
                                                         {"%lanemask_ge", S_LMGE},
                                                         {"%lanemask_gt", S_LMGT},
                                                         {"%dynamic_smem_size", S_DYNSM},
                                                         {"%total_smem_size", S_TOTSM},
                                                         {"%aggr_smem_size", S_TOTSM},
                                                         // a cluster is one block
                                                         {"%clusterid.x", S_CTAX},
                                                         {"%clusterid.y", S_CTAY},
                                                         {"%clusterid.z", S_CTAZ},
                                                         {"%nclusterid.x", S_NCTAX},
                                                         {"%nclusterid.y", S_NCTAY},
                                                         {"%nclusterid.z", S_NCTAZ},
                                                         {"%cluster_ctaid.x", S_ZERO},
                                                         {"%cluster_ctaid.y", S_ZERO},
                                                         {"%cluster_ctaid.z", S_ZERO},
                                                         {"%cluster_nctaid.x", S_ONE},
                                                         {"%cluster_nctaid.y", S_ONE},
                                                         {"%cluster_nctaid.z", S_ONE},
                                                         {"%cluster_ctarank", S_ZERO},
                                                         {"%cluster_nctarank", S_ONE},
                                                         {"%reserved_smem_offset_begin", S_ZERO}};
  auto it = m.find(n);
  if (it == m.end()) fail("unknown register or special register " + n + " in");
  return kSpecial | (Opnd)(it->second * 256);
}
int Decoder::dynSpecial(const std::string& n) {
  if (n == "%clock") return D_CLOCK;
  if (n == "%clock64") return D_CLOCK64;
  if (n == "%clock_hi") return D_CLOCKHI;
  if (n == "%globaltimer") return D_GTIMER;
  if (n == "%globaltimer_lo") return D_GTIMERLO;
  if (n == "%globaltimer_hi") return D_GTIMERHI;
  return -1;
}

Opnd Decoder::src(const Operand& o, const std::string& t, uint8_t* width, bool anyWidth) {
  int bytes = typeBytes(t);
  if (bytes < 0) fail("bad type ." + t + " in");
  switch (o.kind) {
    case Operand::Reg: {
      int b = F.regs[o.reg].bytes;
      if (!anyWidth && b != bytes)
        fail(fmt("register %s has the wrong width for", F.regs[o.reg].name.c_str()));
      if (width) *width = (uint8_t)b;
      return kRegs | C.regOff[o.reg];
    }
    case Operand::Imm:
      if (width) *width = (uint8_t)bytes;
      return constant(convertImm(o, t), bytes);
    case Operand::Special:
      if (bytes != 4) {
        if (!width) fail("special register in a non-32-bit operand of");
        *width = 4;
      } else if (width)
        *width = 4;
      return special(o.sym);
    case Operand::Sym: {
      Space sp;
      bool found;
      uint64_t v = symbol(o.sym, &sp, &found);
      if (found) {
        if (width) *width = (uint8_t)bytes;
        if (sp == Space::Shared && L.mod->shared[L.mod->sharedIndex[o.sym]].dynamic) {
          if (o.off) fail("dynamic shared symbol with an offset in");
          return kSpecial | (Opnd)((bytes == 8 ? S_DYN64 : S_DYN32) * 256);
        }
        return constant(v + (uint64_t)o.off, bytes);
      }
      const Var* var = F.findVar(p->scope, o.sym);
      if (var && var->space == Space::Param && F.isEntry) {
        if (width) *width = (uint8_t)bytes;
        return constant(var->offset + (uint64_t)o.off, bytes);
      }
      fail("symbol '" + o.sym + "' is unknown or not supported in");
    }
    default:
      fail("unexpected operand in");
  }
}

void Decoder::address(const Operand& o, Inst& I, Space sp) {
  if (o.kind != Operand::Addr) fail("address operand expected in");
  const Operand& b = o.sub[0];
  I.imm = o.off + b.off;
  if (b.kind == Operand::Reg) {
    I.a = kRegs | C.regOff[b.reg];
    I.aw = (uint8_t)F.regs[b.reg].bytes;
    if (I.aw != 4 && I.aw != 8) fail("address register must be 32 or 64 bits wide in");
    return;
  }
  I.aw = 8;
  if (b.kind == Operand::Imm) {
    I.a = constant(0, 8);
    I.imm += (int64_t)b.bits;
    return;
  }
  if (b.kind != Operand::Sym) fail("bad address in");
  if (const Var* v = F.findVar(p->scope, b.sym)) {
    if (v->space == Space::Local)
      I.flags |= FL_LOCALSYM;
    else if (sp != Space::Param)
      fail("parameter address in a non-param access");
    bool own = false;
    for (auto& q : F.params) own |= &q == v;
    for (auto& q : F.rets) own |= &q == v;
    if (v->space == Space::Param && !own) I.flags |= FL_CALLPARAM;
    I.a = constant(v->offset, 8);
    return;
  }
  Space s;
  bool found;
  uint64_t v = symbol(b.sym, &s, &found);
  if (!found) fail("unknown symbol '" + b.sym + "' in");
  if (s == Space::Shared && sp == Space::Generic) I.imm += (int64_t)kSharedWin;
  if (s == Space::Shared && L.mod->shared[L.mod->sharedIndex[b.sym]].dynamic) {
    I.a = kSpecial | (Opnd)(S_DYN64 * 256);
    return;
  }
  I.a = constant(v, 8);
}

int Decoder::label(const Operand& o) {
  if (o.kind != Operand::Sym) fail("label expected in");
  int l = F.findLabel(p->scope, o.sym);
  if (l < 0) fail("unknown label " + o.sym + " in");
  return l;
}

static void decodeFunction(Loaded& L, const Function& F, Code& C) {
  C.fn = &F;
  C.paramBytes = (uint32_t)F.paramBytes;
  C.callParamBytes = (uint32_t)F.callParamBytes;
  C.localBytes = (uint32_t)F.localBytes;
  uint32_t off = 0;
  for (auto& r : F.regs) {
    uint32_t sz = r.bytes ? r.bytes * 32 : 4;
    if (r.bytes) off = (off + 31) / 32 * 32;
    C.regOff.push_back(off);
    off += sz;
  }
  C.regBytes = (off + 63) / 64 * 64;
  Decoder D(L, F, C);
  C.insts.reserve(F.insts.size() + 1);
  std::vector<int32_t> at;  // parsed instruction -> decoded instruction
  for (auto& q : F.insts) {
    at.push_back((int32_t)C.insts.size());
    Inst I;
    I.line = q.line;
    I.src = &q;
    if (q.pred >= 0) {
      I.pred = C.regOff[q.pred];
      I.predNeg = q.predNeg;
    }
    D.begin(q);
    bool ok = decodeAlu(D, I) || decodeCvt(D, I) || decodeMem(D, I) || decodeControl(D, I) ||
              decodeSync(D, I) || decodeMma(D, I) || decodeHopper(D, I);
    if (!ok) D.fail("unknown instruction");
    D.finish();
    C.insts.push_back(I);
  }
  at.push_back((int32_t)C.insts.size());
  for (auto& I : C.insts)
    if (I.src->parts[0] == "bra") I.target = at[I.target];
  for (auto& t : C.tables)
    for (auto& l : t) l = at[l];
  // falling off the end is a return
  static const PInst retInst = [] {
    PInst r;
    r.op = "ret";
    r.parts = {"ret"};
    return r;
  }();
  Inst R;
  D.begin(retInst);
  R.src = &retInst;
  decodeControl(D, R);
  R.line = F.insts.empty() ? F.line : F.insts.back().line;
  C.insts.push_back(R);
  C.constBytes = (uint32_t)D.pool.size();
  if (posix_memalign((void**)&C.consts, 64, std::max<size_t>(64, D.pool.size())))
    throw VmError("out of memory");
  memcpy(C.consts, D.pool.data(), D.pool.size());

  // instructions that name a register of some wgmma accumulator, or of a plain copy of one
  std::vector<uint8_t> acc(F.regs.size(), 0);
  bool any = false;
  auto visit = [&](const Operand& o, auto&& self, auto&& f) -> void {
    if (o.kind == Operand::Reg) f(o.reg);
    for (auto& s : o.sub) self(s, self, f);
  };
  for (auto& I : C.insts)
    if (I.flags & FL_WGMMA) {
      any = true;
      visit(I.src->ops[0], visit, [&](int r) { acc[r] = 1; });
    }
  if (!any) return;
  for (bool grew = true; grew;) {
    grew = false;
    for (auto& I : C.insts) {
      if (!(I.flags & FL_MOV)) continue;
      int d = I.src->ops[0].reg, a = I.src->ops[1].reg;
      if (acc[a] && !acc[d]) {
        acc[d] = 1;
        grew = true;
      }
    }
  }
  C.touchesAcc.assign(C.insts.size(), 0);
  for (size_t i = 0; i < C.insts.size(); i++)
    for (auto& o : C.insts[i].src->ops)
      visit(o, visit, [&](int r) {
        if (acc[r]) C.touchesAcc[i] = 1;
      });
}

std::unique_ptr<Loaded> loadModule(const std::string& text) {
  auto L = std::make_unique<Loaded>();
  L->mod = parseModule(text);
  Module& M = *L->mod;
  for (auto& g : M.globals) {
    void* q = nullptr;
    if (posix_memalign(&q, 256, std::max<uint64_t>(g.size, 16))) throw VmError("out of memory");
    memset(q, 0, std::max<uint64_t>(g.size, 16));
    memcpy(q, g.init.data(), g.init.size());
    L->globalMem.push_back((uint8_t*)q);
  }
  // Module-level and device-function statics come first; the statics of kernels overlay each other
  // after them.
  uint64_t common = 0;
  auto place = [](Var& s, uint64_t& at) {
    at = (at + s.align - 1) / s.align * s.align;
    s.offset = at;
    at += s.size;
  };
  for (auto& s : M.shared) {
    if (s.dynamic)
      L->dynAlign = std::max<uint64_t>(L->dynAlign, s.align);
    else if (s.owner.empty())
      place(s, common);
  }
  for (auto& s : M.shared)
    if (!s.dynamic && !s.owner.empty()) {
      uint64_t& at = L->sharedStatic[s.owner];
      at = std::max(at, common);
      place(s, at);
    }
  L->sharedCommon = common;
  for (size_t i = 0; i < M.globals.size(); i++)
    for (auto& r : M.globals[i].relocs) {
      uint64_t v;
      auto g = M.globalIndex.find(r.sym);
      auto f = M.functionIndex.find(r.sym);
      if (g != M.globalIndex.end())
        v = (uint64_t)L->globalMem[g->second];
      else if (f != M.functionIndex.end())
        v = kFuncWin + f->second;
      else
        throw VmError("initialiser of '" + M.globals[i].name + "' names unknown symbol '" + r.sym +
                      "'");
      v += r.add;
      memcpy(L->globalMem[i] + r.off, &v, 8);
    }
  for (auto& f : M.functions) {
    if (f->isExtern) {
      L->codes.push_back(nullptr);
      continue;
    }
    L->codes.push_back(std::make_unique<Code>());
  }
  for (size_t i = 0; i < M.functions.size(); i++)
    if (L->codes[i]) {
      decodeFunction(*L, *M.functions[i], *L->codes[i]);
      L->codes[i]->pcBase = L->totalInsts;
      L->totalInsts += (uint32_t)L->codes[i]->insts.size();
    }
  return L;
}

}  // namespace ptxvm
