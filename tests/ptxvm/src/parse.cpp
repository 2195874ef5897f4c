#include "parse.h"

#include <cctype>
#include <cstring>

namespace ptxvm {

int typeBytes(const std::string& t) {
  static const std::unordered_map<std::string, int> m = {
      {"b8", 1},   {"u8", 1},    {"s8", 1},    {"e4m3", 1}, {"e5m2", 1},   {"b16", 2},
      {"u16", 2},  {"s16", 2},   {"f16", 2},   {"bf16", 2}, {"e4m3x2", 2}, {"e5m2x2", 2},
      {"b32", 4},  {"u32", 4},   {"s32", 4},   {"f32", 4},  {"f16x2", 4},  {"bf16x2", 4},
      {"tf32", 4}, {"b64", 8},   {"u64", 8},   {"s64", 8},  {"f64", 8},    {"b128", 16},
      {"pred", 0}, {"f32x2", 8}, {"s16x2", 4}, {"u16x2", 4}};
  auto it = m.find(t);
  return it == m.end() ? -1 : it->second;
}

int Function::findLabel(int s, const std::string& n) const {
  for (; s >= 0; s = scopes[s].parent) {
    auto it = scopes[s].labels.find(n);
    if (it != scopes[s].labels.end()) return it->second;
  }
  return -1;
}
const std::vector<std::string>* Function::findTable(int s, const std::string& n) const {
  for (; s >= 0; s = scopes[s].parent) {
    auto it = scopes[s].tables.find(n);
    if (it != scopes[s].tables.end()) return &it->second;
  }
  return nullptr;
}
const Var* Function::findVar(int s, const std::string& n) const {
  for (; s >= 0; s = scopes[s].parent) {
    auto it = scopes[s].vars.find(n);
    if (it != scopes[s].vars.end())
      return it->second.first == Space::Local ? &locals[it->second.second]
                                              : &callParams[it->second.second];
  }
  for (auto& v : params)
    if (v.name == n) return &v;
  for (auto& v : rets)
    if (v.name == n) return &v;
  return nullptr;
}

namespace {

struct Tok {
  enum K { Id, Num, Punct, Str, End } k;
  std::string s;
  int line;
};

class Lexer {
 public:
  explicit Lexer(const std::string& t) {
    size_t i = 0, n = t.size();
    int line = 1;
    auto idc = [](char c) {
      return isalnum((unsigned char)c) || c == '_' || c == '$' || c == '%' || c == '.';
    };
    while (i < n) {
      char c = t[i];
      if (c == '\n') {
        line++;
        i++;
        continue;
      }
      if (isspace((unsigned char)c) || c == '\0') {
        i++;
        continue;
      }
      if (c == '/' && i + 1 < n && t[i + 1] == '/') {
        while (i < n && t[i] != '\n') i++;
        continue;
      }
      if (c == '/' && i + 1 < n && t[i + 1] == '*') {
        for (i += 2; i + 1 < n && !(t[i] == '*' && t[i + 1] == '/'); i++)
          if (t[i] == '\n') line++;
        i += 2;
        continue;
      }
      if (c == '"') {
        size_t j = i + 1;
        while (j < n && t[j] != '"') j++;
        toks.push_back({Tok::Str, t.substr(i + 1, j - i - 1), line});
        i = j + 1;
        continue;
      }
      if (isdigit((unsigned char)c)) {
        size_t j = i;
        bool hex = c == '0' && i + 1 < n &&
                   (t[i + 1] == 'x' || t[i + 1] == 'X' || t[i + 1] == 'f' || t[i + 1] == 'd' ||
                    t[i + 1] == 'F' || t[i + 1] == 'D');
        if (hex) {
          j += 2;
          while (j < n && isxdigit((unsigned char)t[j])) j++;
        } else
          while (j < n &&
                 (isdigit((unsigned char)t[j]) || t[j] == '.' || t[j] == 'e' || t[j] == 'E' ||
                  ((t[j] == '-' || t[j] == '+') && (t[j - 1] == 'e' || t[j - 1] == 'E'))))
            j++;
        std::string s = t.substr(i, j - i);
        while (j < n && (t[j] == 'U' || t[j] == 'u' || t[j] == 'L' || t[j] == 'l')) j++;
        toks.push_back({Tok::Num, s, line});
        i = j;
        continue;
      }
      if (idc(c)) {
        size_t j = i;
        while (j < n) {
          if (c == '.' && j > i && t[j] == '.') break;  // directives may touch: .reg.b16
          if (idc(t[j]))
            j++;
          else if (t[j] == ':' && j + 2 < n && t[j + 1] == ':' && isalnum((unsigned char)t[j + 2]))
            j += 2;
          else
            break;
        }
        std::string s = t.substr(i, j - i);
        if (s == ".loc" || s == ".file") {  // debug lines end at the newline
          while (j < n && t[j] != '\n') j++;
          i = j;
          continue;
        }
        toks.push_back({Tok::Id, s, line});
        i = j;
        continue;
      }
      toks.push_back({Tok::Punct, std::string(1, c), line});
      i++;
    }
    toks.push_back({Tok::End, "", line});
  }
  std::vector<Tok> toks;
};

uint64_t alignUp(uint64_t v, uint64_t a) { return (v + a - 1) / a * a; }

class Parser {
 public:
  explicit Parser(const std::string& text) : lex_(text), mod_(new Module) {}

  std::unique_ptr<Module> run() {
    while (peek().k != Tok::End) topLevel();
    return std::move(mod_);
  }

 private:
  Lexer lex_;
  size_t p_ = 0;
  std::unique_ptr<Module> mod_;
  Function* fn_ = nullptr;
  int scope_ = -1;

  const Tok& peek(int k = 0) { return lex_.toks[std::min(p_ + k, lex_.toks.size() - 1)]; }
  Tok next() { return lex_.toks[p_ < lex_.toks.size() - 1 ? p_++ : p_]; }
  [[noreturn]] void fail(const std::string& m) {
    throw VmError("PTX line " + std::to_string(peek().line) + ": " + m + " (near '" + peek().s +
                  "')");
  }
  bool is(const char* s) { return peek().s == s && peek().k != Tok::Str; }
  bool accept(const char* s) {
    if (is(s)) {
      p_++;
      return true;
    }
    return false;
  }
  void expect(const char* s) {
    if (!accept(s)) fail(std::string("expected '") + s + "'");
  }
  std::string ident() {
    if (peek().k != Tok::Id) fail("expected an identifier");
    return next().s;
  }

  // ---- constants ----
  Operand number(bool neg) {
    Operand o;
    o.kind = Operand::Imm;
    std::string s = next().s;
    if (s.size() > 2 && s[0] == '0' && (s[1] == 'f' || s[1] == 'F')) {
      o.isFloat = true;
      o.fbits = 32;
      o.bits = strtoull(s.c_str() + 2, nullptr, 16);
      if (neg) o.bits ^= 0x80000000u;
    } else if (s.size() > 2 && s[0] == '0' && (s[1] == 'd' || s[1] == 'D')) {
      o.isFloat = true;
      o.fbits = 64;
      o.bits = strtoull(s.c_str() + 2, nullptr, 16);
      if (neg) o.bits ^= 1ull << 63;
    } else if (s.find_first_of(".") != std::string::npos ||
               (s.find_first_of("eE") != std::string::npos && s.compare(0, 2, "0x") &&
                s.compare(0, 2, "0X"))) {
      double d = strtod(s.c_str(), nullptr);
      if (neg) d = -d;
      o.isFloat = true;
      o.fbits = 64;
      memcpy(&o.bits, &d, 8);
    } else {
      o.bits = strtoull(s.c_str(), nullptr,
                        s.size() > 1 && s[0] == '0' && s[1] != 'x' && s[1] != 'X' ? 8 : 0);
      if (neg) o.bits = 0 - o.bits;
    }
    return o;
  }
  int64_t constPrimary() {
    if (accept("(")) {
      int64_t v = constExpr();
      expect(")");
      return v;
    }
    if (accept("-")) return -constPrimary();
    if (accept("+")) return constPrimary();
    if (accept("~")) return ~constPrimary();
    if (peek().k != Tok::Num) fail("expected a constant");
    return (int64_t)number(false).bits;
  }
  int64_t constMul() {
    int64_t v = constPrimary();
    for (;;) {
      if (accept("*"))
        v *= constPrimary();
      else if (accept("/")) {
        int64_t d = constPrimary();
        if (!d) fail("division by zero");
        v /= d;
      } else if (accept("%")) {
        int64_t d = constPrimary();
        if (!d) fail("division by zero");
        v %= d;
      } else
        return v;
    }
  }
  int64_t constExpr() {
    int64_t v = constMul();
    for (;;) {
      if (accept("+"))
        v += constMul();
      else if (accept("-"))
        v -= constMul();
      else if (is("<") && peek(1).s == "<") {
        p_ += 2;
        v <<= constMul();
      } else
        return v;
    }
  }

  // ---- declarations ----
  // After the state-space directive: [.align N] .type [.ptr ...] name [dims] [= init]
  Var varDecl(Space sp, bool single = false) {
    Var v;
    v.space = sp;
    int vec = 1;
    for (;;) {
      if (peek().k != Tok::Id || peek().s[0] != '.') break;
      std::string d = next().s;
      if (d == ".align")
        v.align = (uint32_t)constPrimary();
      else if (d == ".ptr") {
        while (is(".global") || is(".shared") || is(".const") || is(".local") || is(".generic"))
          p_++;
        if (accept(".align")) constPrimary();
      } else if (d == ".v2")
        vec = 2;
      else if (d == ".v4")
        vec = 4;
      else if (d == ".attribute") {
        expect("(");
        while (!accept(")")) p_++;
      } else {
        v.type = d.substr(1);
        if (typeBytes(v.type) < 0) fail("unknown type " + d);
      }
    }
    int eb = typeBytes(v.type) * vec;
    v.align = std::max<uint32_t>(v.align, eb);
    v.name = ident();
    uint64_t count = 1;
    bool unsized = false;
    while (accept("[")) {
      if (accept("]")) {
        unsized = true;
        continue;
      }
      count *= (uint64_t)constExpr();
      expect("]");
    }
    v.size = unsized ? 0 : count * eb;
    v.dynamic = unsized;
    if (!single && accept("=")) {
      initList(v, eb / vec);
      if (unsized) {
        v.size = v.init.size();
        v.dynamic = false;
      }
      v.init.resize(v.size);
    }
    return v;
  }
  void initItem(Var& v, int eb) {
    if (accept("{")) {
      while (!accept("}")) {
        initItem(v, eb);
        accept(",");
      }
      return;
    }
    uint64_t at = v.init.size();
    if (peek().k == Tok::Num || is("-") || is("(") || is("~")) {
      bool neg = false;
      size_t save = p_;
      if (accept("-")) neg = true;
      Operand o;
      if (peek().k == Tok::Num)
        o = number(neg);
      else {
        p_ = save;
        o.bits = (uint64_t)constExpr();
      }
      if (o.isFloat && o.fbits == 64 && eb == 4) {
        double d;
        memcpy(&d, &o.bits, 8);
        float f = (float)d;
        o.bits = 0;
        memcpy(&o.bits, &f, 4);
      }
      for (int i = 0; i < eb; i++) v.init.push_back(i < 8 ? (uint8_t)(o.bits >> (8 * i)) : 0);
    } else {
      std::string s = ident();
      if (s == "generic") {
        expect("(");
        s = ident();
        int64_t a = tail();
        expect(")");
        a += tail();
        v.relocs.push_back({at, s, a});
      } else
        v.relocs.push_back({at, s, tail()});
      if (eb != 8) fail("address initialiser in a type that is not 8 bytes wide is not supported");
      v.init.resize(at + 8);
    }
  }
  int64_t tail() {
    int64_t a = 0;
    while (is("+") || is("-")) {
      bool n = is("-");
      p_++;
      int64_t k = constPrimary();
      a += n ? -k : k;
    }
    return a;
  }
  void initList(Var& v, int eb) { initItem(v, eb); }

  void addModuleVar(Var v) {
    if (v.space == Space::Shared) {
      if (fn_ && fn_->isEntry) v.owner = fn_->name;
      mod_->sharedIndex[v.name] = (int)mod_->shared.size();
      mod_->shared.push_back(std::move(v));
    } else {
      mod_->globalIndex[v.name] = (int)mod_->globals.size();
      mod_->globals.push_back(std::move(v));
    }
  }

  void topLevel() {
    if (accept(";")) return;
    if (peek().k != Tok::Id) fail("unexpected token at top level");
    std::string d = next().s;
    if (d == ".version") {
      p_++;
      return;
    }
    if (d == ".target") {
      mod_->target = ident();
      while (accept(",")) p_++;
      return;
    }
    if (d == ".address_size") {
      p_++;
      return;
    }
    if (d == ".visible" || d == ".extern" || d == ".weak" || d == ".common") return;
    if (d == ".pragma") {
      while (!accept(";")) p_++;
      return;
    }
    if (d == ".section") {
      while (!accept("{")) p_++;
      int n = 1;
      while (n) {
        if (is("{")) n++;
        if (is("}")) n--;
        p_++;
      }
      return;
    }
    if (d == ".alias") {
      while (!accept(";")) p_++;
      return;
    }
    if (d == ".global") {
      addModuleVar(varDecl(Space::Global));
      while (accept(",")) fail("several variables in one declaration");
      expect(";");
      return;
    }
    if (d == ".const") {
      addModuleVar(varDecl(Space::Const));
      expect(";");
      return;
    }
    if (d == ".shared") {
      addModuleVar(varDecl(Space::Shared));
      expect(";");
      return;
    }
    if (d == ".entry" || d == ".func") {
      function(d == ".entry");
      return;
    }
    p_--;
    fail("unknown directive " + d);
  }

  std::vector<Var> paramList(uint64_t* bytes) {
    std::vector<Var> r;
    expect("(");
    uint64_t off = 0;
    while (!accept(")")) {
      if (accept(".reg")) fail("register parameters of .func are not supported");
      expect(".param");
      Var v = varDecl(Space::Param, true);
      off = alignUp(off, v.align);
      v.offset = off;
      off += v.size;
      r.push_back(v);
      accept(",");
    }
    if (bytes) *bytes = off;
    return r;
  }

  void function(bool entry) {
    auto f = std::make_unique<Function>();
    f->isEntry = entry;
    f->line = peek().line;
    uint64_t retBytes = 0;
    if (!entry && is("(")) f->rets = paramList(&retBytes);
    f->name = ident();
    if (is("(")) f->params = paramList(&f->paramBytes);
    // return values live behind the inputs in the callee's parameter block
    uint64_t base = alignUp(f->paramBytes, 16);
    for (auto& v : f->rets) v.offset += base;
    if (!f->rets.empty()) f->paramBytes = base + retBytes;
    for (;;) {
      if (accept(".maxntid") || is(".reqntid")) {
        accept(".reqntid");
        for (int i = 0; i < 3; i++) {
          f->maxntid[i] = (int)constPrimary();
          if (!accept(",")) {
            for (int j = i + 1; j < 3; j++) f->maxntid[j] = 1;
            break;
          }
        }
      } else if (accept(".minnctapersm") || accept(".maxnreg") || accept(".maxclusterrank") ||
                 accept(".maxnctapersm"))
        constPrimary();
      else if (accept(".reqnctapercluster")) {
        constPrimary();
        while (accept(",")) constPrimary();
      } else if (accept(".explicitcluster") || accept(".noreturn") ||
                 accept(".blocksareclusters")) {
      } else if (accept(".pragma")) {
        while (!accept(";")) p_++;
      } else if (accept(".abi_preserve") || accept(".abi_preserve_control"))
        constPrimary();
      else
        break;
    }
    auto it = mod_->functionIndex.find(f->name);
    Function* slot;
    if (accept(";")) {
      f->isExtern = true;
      if (it != mod_->functionIndex.end()) return;  // a second declaration
      mod_->functionIndex[f->name] = (int)mod_->functions.size();
      mod_->functions.push_back(std::move(f));
      return;
    }
    if (it != mod_->functionIndex.end()) {
      mod_->functions[it->second] = std::move(f);
      slot = mod_->functions[it->second].get();
    } else {
      mod_->functionIndex[f->name] = (int)mod_->functions.size();
      mod_->functions.push_back(std::move(f));
      slot = mod_->functions.back().get();
    }
    fn_ = slot;
    scope_ = -1;
    expect("{");
    block();
    fn_ = nullptr;
  }

  // ---- bodies ----
  Function::Scope& sc() { return fn_->scopes[scope_]; }

  void block() {
    fn_->scopes.push_back({scope_, {}, {}, {}, {}, {}});
    int saved = scope_;
    scope_ = (int)fn_->scopes.size() - 1;
    while (!accept("}")) {
      if (peek().k == Tok::End) fail("end of file inside a function");
      statement();
    }
    scope_ = saved;
  }

  int addReg(const std::string& n, const std::string& t) {
    int b = typeBytes(t);
    if (b < 0) fail("unknown register type ." + t);
    fn_->regs.push_back({n, t, b});
    return (int)fn_->regs.size() - 1;
  }

  void regDecl() {
    std::string t = ident();
    if (t == ".v2" || t == ".v4") fail("vector registers are not supported");
    t = t.substr(1);
    do {
      std::string n = ident();
      if (accept("<")) {
        int cnt = (int)constExpr();
        expect(">");
        int first = (int)fn_->regs.size();
        for (int i = 0; i < cnt; i++) addReg(n + std::to_string(i), t);
        sc().families[n] = {first, cnt};
      } else {
        int i = addReg(n, t);
        sc().regs[n] = i;
      }
    } while (accept(","));
    expect(";");
  }

  int findReg(const std::string& n) {
    size_t d = n.size();
    while (d > 0 && isdigit((unsigned char)n[d - 1])) d--;
    for (int s = scope_; s >= 0; s = fn_->scopes[s].parent) {
      auto& S = fn_->scopes[s];
      auto it = S.regs.find(n);
      if (it != S.regs.end()) return it->second;
      if (d < n.size() && d > 0) {
        auto f = S.families.find(n.substr(0, d));
        if (f != S.families.end()) {
          long k = atol(n.c_str() + d);
          if (k < f->second.second) return f->second.first + (int)k;
        }
      }
    }
    return -1;
  }

  void statement() {
    if (accept(";")) return;
    if (accept("{")) {
      block();
      return;
    }
    const Tok& t = peek();
    if (t.k == Tok::Id) {
      if (t.s == ".reg") {
        p_++;
        regDecl();
        return;
      }
      if (t.s == ".local") {
        p_++;
        Var v = varDecl(Space::Local);
        fn_->localBytes = alignUp(fn_->localBytes, std::max<uint32_t>(v.align, 1));
        v.offset = fn_->localBytes;
        fn_->localBytes += v.size;
        sc().vars[v.name] = {Space::Local, (int)fn_->locals.size()};
        fn_->locals.push_back(v);
        expect(";");
        return;
      }
      if (t.s == ".param") {
        p_++;
        Var v = varDecl(Space::Param);
        fn_->callParamBytes = alignUp(fn_->callParamBytes, std::max<uint32_t>(v.align, 8));
        v.offset = fn_->callParamBytes;
        fn_->callParamBytes += v.size;
        sc().vars[v.name] = {Space::Param, (int)fn_->callParams.size()};
        fn_->callParams.push_back(v);
        expect(";");
        return;
      }
      if (t.s == ".shared" || t.s == ".global" || t.s == ".const") {
        Space sp = t.s == ".shared"   ? Space::Shared
                   : t.s == ".global" ? Space::Global
                                      : Space::Const;
        p_++;
        addModuleVar(varDecl(sp));
        expect(";");
        return;
      }
      if (t.s == ".pragma") {
        while (!accept(";")) p_++;
        return;
      }
      if (t.s[0] == '.') fail("unknown directive " + t.s);
      if (peek(1).s == ":" && peek(1).k == Tok::Punct) {
        std::string l = ident();
        p_++;
        if (accept(".branchtargets") || is(".calltargets")) {
          accept(".calltargets");
          std::vector<std::string> ls;
          do ls.push_back(ident());
          while (accept(","));
          expect(";");
          sc().tables[l] = ls;
        } else if (is(".callprototype")) {
          while (!accept(";")) p_++;
        } else {
          sc().labels[l] = (int)fn_->insts.size();
        }
        return;
      }
    }
    instruction();
  }

  void instruction() {
    PInst in;
    in.line = peek().line;
    in.scope = scope_;
    if (accept("@")) {
      if (accept("!")) in.predNeg = true;
      std::string n = ident();
      in.pred = findReg(n);
      if (in.pred < 0) fail("unknown predicate register " + n);
    }
    in.line = peek().line;
    in.op = ident();
    size_t b = 0;
    for (;;) {
      size_t e = in.op.find('.', b);
      in.parts.push_back(in.op.substr(b, e == std::string::npos ? e : e - b));
      if (e == std::string::npos) break;
      b = e + 1;
    }
    if (in.parts[0] == "call") {
      callOperands(in);
    } else if (!is(";")) {
      do in.ops.push_back(operand());
      while (accept(","));
    }
    expect(";");
    fn_->insts.push_back(std::move(in));
  }

  void callOperands(PInst& in) {
    auto list = [&](std::vector<Operand>& v) {
      expect("(");
      while (!accept(")")) {
        v.push_back(operand());
        accept(",");
      }
    };
    if (is("(")) {
      list(in.callRet);
      expect(",");
    }
    in.ops.push_back(operand());
    if (accept(",")) {
      if (is("(")) {
        list(in.callArgs);
        if (accept(",")) in.ops.push_back(operand());
      } else
        in.ops.push_back(operand());
    }
  }

  Operand operand() {
    Operand o;
    if (accept("{")) {
      o.kind = Operand::Vec;
      while (!accept("}")) {
        o.sub.push_back(operand());
        accept(",");
      }
      return o;
    }
    if (accept("[")) {
      o.kind = Operand::Addr;
      o.sub.push_back(operand());
      for (;;) {
        if (accept("+"))
          o.off += constMul();
        else if (accept("-"))
          o.off -= constMul();
        else
          break;
      }
      while (accept(",")) o.sub.push_back(operand());
      expect("]");
      return o;
    }
    if (accept("!")) {
      o = operand();
      o.neg = true;
      return o;
    }
    if (is("-") || is("~") || is("(")) {
      if (is("-") && peek(1).k == Tok::Num) {
        p_++;
        o = number(true);
        return finishInt(o);
      }
      o.kind = Operand::Imm;
      o.bits = (uint64_t)constExpr();
      return o;
    }
    if (peek().k == Tok::Num) {
      o = number(false);
      return finishInt(o);
    }
    std::string n = ident();
    if (n == "_") {
      o.kind = Operand::Sink;
      pairTail(o);
      return o;
    }
    if (n == "WARP_SZ") {
      o.kind = Operand::Imm;
      o.bits = 32;
      return o;
    }
    int r = findReg(n);
    if (r >= 0) {
      o.kind = Operand::Reg;
      o.reg = r;
      pairTail(o);
      return o;
    }
    if (n[0] == '%') {
      o.kind = Operand::Special;
      o.sym = n;
      return o;
    }
    o.kind = Operand::Sym;
    o.sym = n;
    // symbol+offset, e.g. mov.u64 %rd1, arr+16
    if ((is("+") || is("-")) && peek(1).k == Tok::Num) {
      bool neg = is("-");
      p_++;
      int64_t k = (int64_t)number(false).bits;
      o.off = neg ? -k : k;
    }
    return o;
  }
  Operand finishInt(Operand o) {
    if (o.isFloat) return o;
    for (;;) {  // integer constant expressions such as 4*16+8
      if (accept("*"))
        o.bits *= (uint64_t)constPrimary();
      else if (accept("+"))
        o.bits += (uint64_t)constMul();
      else if (is("-")) {
        p_++;
        o.bits -= (uint64_t)constMul();
      } else
        return o;
    }
  }
  void pairTail(Operand& o) {
    if (!accept("|")) return;
    std::string n = ident();
    if (n == "_") {
      o.reg2 = -1;
      return;
    }
    o.reg2 = findReg(n);
    if (o.reg2 < 0) fail("unknown register " + n);
  }
};

}  // namespace

std::unique_ptr<Module> parseModule(const std::string& text) { return Parser(text).run(); }

}  // namespace ptxvm
