// Helpers shared by the decode functions of the ops_*.cpp files.
#pragma once
#include <string>
#include <unordered_map>
#include <vector>

#include "exec.h"
#include "num.h"

namespace ptxvm {

// Special registers that are constant for a warp live in 256-byte slots; these indices name them.
enum SpecialSlot {
  S_TIDX,
  S_TIDY,
  S_TIDZ,
  S_NTIDX,
  S_NTIDY,
  S_NTIDZ,
  S_CTAX,
  S_CTAY,
  S_CTAZ,
  S_NCTAX,
  S_NCTAY,
  S_NCTAZ,
  S_LANE,
  S_WARP,
  S_NWARP,
  S_SMID,
  S_NSMID,
  S_GRIDID,
  S_LMEQ,
  S_LMLE,
  S_LMLT,
  S_LMGE,
  S_LMGT,
  S_DYNSM,
  S_TOTSM,
  S_ZERO,
  S_ONE,
  S_DYN32,
  S_DYN64,
  S_COUNT
};
// Special registers read afresh at each use.
enum DynSpecial { D_CLOCK, D_CLOCK64, D_CLOCKHI, D_GTIMER, D_GTIMERLO, D_GTIMERHI };

class Decoder {
 public:
  Decoder(Loaded& l, const Function& f, Code& c) : L(l), F(f), C(c) {}
  Loaded& L;
  const Function& F;
  Code& C;
  const PInst* p = nullptr;
  std::vector<std::string> types;  // the type suffixes, in order
  std::vector<bool> used;

  void begin(const PInst& q);
  [[noreturn]] void fail(const std::string& m) const;
  bool has(const char* m);  // modifier present (marks it as understood)
  void ignore(std::initializer_list<const char*> ms) {
    for (auto m : ms) has(m);
  }
  void ignorePrefix(const char* pre);  // e.g. "L2::"
  Rnd rounding(Rnd def = Rnd::RN);
  void finish();  // every modifier must have been understood
  const std::string& type(size_t k = 0) const {
    if (k >= types.size()) fail("missing type suffix");
    return types[k];
  }
  size_t nops() const { return p->ops.size(); }
  const Operand& op(size_t k) const {
    if (k >= p->ops.size()) fail("too few operands");
    return p->ops[k];
  }

  // operand -> location; bytes = expected register width (0: any)
  Opnd dst(const Operand& o, int bytes, uint8_t* width = nullptr);
  Opnd src(const Operand& o, const std::string& type, uint8_t* width = nullptr,
           bool anyWidth = false);
  Opnd predDst(const Operand& o);
  Opnd predSrc(const Operand& o, bool* neg);
  Opnd constant(uint64_t bits, int width);
  uint64_t symbol(const std::string& n, Space* sp,
                  bool* found);  // address of a module-level symbol
  uint64_t convertImm(const Operand& o, const std::string& type);
  int dynSpecial(const std::string& n);
  Opnd special(const std::string& n);
  void address(const Operand& o, Inst& I, Space sp);  // fills a, aw, imm, flags
  uint32_t list(const std::vector<Opnd>& v) {
    uint32_t k = (uint32_t)C.ext.size();
    C.ext.insert(C.ext.end(), v.begin(), v.end());
    return k;
  }
  int label(const Operand& o);

  std::vector<uint8_t> pool;
  std::unordered_map<std::string, Opnd> poolIndex;
};

enum InstFlags : uint8_t {
  FL_LOCALSYM = 1,
  FL_VOLATILE = 2,
  FL_NEGB = 4,
  FL_NEGC = 8,
  FL_CALLPARAM = 16,
  FL_NOCOUNT = 32,
  FL_WGMMA = 64,
  FL_MOV = 128
};

// Each returns false when the opcode is not its own.
bool decodeAlu(Decoder& D, Inst& I);
bool decodeCvt(Decoder& D, Inst& I);
bool decodeMem(Decoder& D, Inst& I);
bool decodeSync(Decoder& D, Inst& I);
bool decodeMma(Decoder& D, Inst& I);
bool decodeHopper(Decoder& D, Inst& I);
bool decodeControl(Decoder& D, Inst& I);

inline uint64_t laneAddr(const Warp& w, const Inst& I, int i) {
  return (I.aw == 8 ? w.src<uint64_t>(I.a)[i] : (uint64_t)w.src<uint32_t>(I.a)[i]) +
         (uint64_t)I.imm;
}
int opNop(Warp&, const Inst&, uint32_t);

}  // namespace ptxvm
