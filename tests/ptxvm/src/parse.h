// PTX text -> Module. Purely syntactic: names are resolved to registers, variables and
// instruction indices, but opcodes are left as dotted strings for decode.cpp.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace ptxvm {

struct VmError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Space : uint8_t { Reg, Param, Shared, Local, Global, Const, Generic };

// Bytes of a fundamental type name ("u32", "f16x2", "pred", ...); 0 if unknown.
int typeBytes(const std::string& t);

struct Operand {
  enum Kind { Reg, Imm, Sym, Special, Addr, Vec, Sink } kind = Sink;
  int reg = -1;              // Reg: index into Function::regs
  int reg2 = -1;             // second half of p|q (-1: none)
  bool neg = false;          // !p
  bool isFloat = false;      // Imm written as a float literal
  int fbits = 0;             // 32 for 0f.., 64 for 0d.. and decimal floats
  uint64_t bits = 0;         // Imm payload
  std::string sym;           // Sym / Special name
  int64_t off = 0;           // Addr displacement
  std::vector<Operand> sub;  // Addr: [base] or [base, Vec of coordinates]; Vec: elements
};

struct PInst {
  std::vector<std::string> parts;  // opcode split at '.'
  std::string op;                  // the full opcode text
  int pred = -1;
  bool predNeg = false;
  std::vector<Operand> ops;
  int line = 0;
  int scope = 0;
  // call only
  std::vector<Operand> callRet, callArgs;
};

struct Reloc {
  uint64_t off;
  std::string sym;
  int64_t add;
};

struct Var {
  std::string name;
  Space space = Space::Global;
  std::string type;
  uint32_t align = 1;
  uint64_t size = 0;  // 0 with dynamic=true for extern []
  bool dynamic = false;
  std::string owner;    // .shared declared inside this kernel
  uint64_t offset = 0;  // in its space (shared/local/param), set by the parser or loader
  std::vector<uint8_t> init;
  std::vector<Reloc> relocs;
};

struct RegDecl {
  std::string name, type;
  int bytes;  // 0 for pred
};

struct Function {
  std::string name;
  bool isEntry = false, isExtern = false;
  std::vector<Var> params, rets;
  std::vector<RegDecl> regs;
  std::vector<Var> locals;      // .local, offsets assigned
  std::vector<Var> callParams;  // .param declared in the body (call sequences)
  std::vector<PInst> insts;
  // resolved later through scopes
  struct Scope {
    int parent;
    std::unordered_map<std::string, int> regs;                      // exact names
    std::unordered_map<std::string, std::pair<int, int>> families;  // prefix -> first, count
    std::unordered_map<std::string, int> labels;                    // -> instruction index
    std::unordered_map<std::string, std::vector<std::string>> tables;
    std::unordered_map<std::string, std::pair<Space, int>> vars;  // locals / callParams
  };
  std::vector<Scope> scopes;
  uint64_t paramBytes = 0;  // input parameter block
  uint64_t localBytes = 0, callParamBytes = 0;
  int maxntid[3] = {0, 0, 0};
  int line = 0;

  int findLabel(int scope, const std::string& n) const;
  const std::vector<std::string>* findTable(int scope, const std::string& n) const;
  const Var* findVar(int scope, const std::string& n) const;
};

struct Module {
  std::string target;
  std::vector<std::unique_ptr<Function>> functions;
  std::vector<Var> globals;  // .global and .const
  std::vector<Var> shared;   // every .shared of the module, function-scoped ones included
  std::map<std::string, int> sharedIndex, globalIndex, functionIndex;
};

std::unique_ptr<Module> parseModule(const std::string& text);

}  // namespace ptxvm
