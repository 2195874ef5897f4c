// The C interface used by the Python wrapper. Results travel as JSON text.
#include <algorithm>
#include <sstream>

#include "decode.h"

using namespace ptxvm;

namespace {

std::string quote(const std::string& s) {
  std::string r = "\"";
  for (unsigned char c : s) {
    if (c == '"' || c == '\\') {
      r += '\\';
      r += (char)c;
    } else if (c == '\n')
      r += "\\n";
    else if (c < 32 || c > 126)
      r += fmt("\\u%04x", c);
    else
      r += (char)c;
  }
  return r + "\"";
}

thread_local std::string result, lastError;

const char* ret(const std::string& s) {
  result = s;
  return result.c_str();
}

template <class F>
auto guarded(F f) -> decltype(f()) {
  lastError.clear();
  try {
    return f();
  } catch (const std::exception& e) {
    lastError = e.what();
  }
  return decltype(f())();
}

std::string statsJson(Launch& L, bool profile) {
  std::ostringstream o;
  o.precision(17);
  uint64_t clsW[C_COUNT] = {}, clsT[C_COUNT] = {}, totW = 0, totT = 0, branches = 0;
  std::map<std::string, double> flops;
  for (auto& c : L.mod->codes) {
    if (!c) continue;
    for (size_t i = 0; i < c->insts.size(); i++) {
      const Inst& I = c->insts[i];
      uint64_t w = L.cntW[c->pcBase + i], t = L.cntT[c->pcBase + i];
      if (!w) continue;
      clsW[I.cls] += w;
      clsT[I.cls] += t;
      totW += w;
      totT += t;
      if (I.cls == C_BRANCH && I.src->parts[0] == "bra") branches += w;
      if (I.flops > 0)
        flops[I.flopType       ? I.flopType
              : I.cls == C_FMA ? "fp32"
                               : kClsNames[I.cls]] += I.flops * (double)t;
    }
  }
  const Stats& s = L.st;
  auto u = [](uint64_t v) { return std::to_string(v); };
  o << "{\"warp_insts\":" << totW << ",\"thread_insts\":" << totT << ",\"seconds\":" << L.seconds
    << ",\"by_class\":{";
  bool first = true;
  for (int k = 0; k < C_COUNT; k++)
    if (clsW[k]) {
      o << (first ? "" : ",") << quote(kClsNames[k]) << ":" << clsW[k];
      first = false;
    }
  o << "},\"threads_by_class\":{";
  first = true;
  for (int k = 0; k < C_COUNT; k++)
    if (clsW[k]) {
      o << (first ? "" : ",") << quote(kClsNames[k]) << ":" << clsT[k];
      first = false;
    }
  o << "},\"flops\":{";
  first = true;
  for (auto& f : flops) {
    o << (first ? "" : ",") << quote(f.first) << ":" << f.second;
    first = false;
  }
  o << "},\"branches\":" << branches << ",\"divergent_branches\":" << s.divergent;
  auto tri = [&](const char* n, const uint64_t* v, const char* const* names, int cnt) {
    o << ",\"" << n << "\":{";
    for (int k = 0; k < cnt; k++) o << (k ? "," : "") << "\"" << names[k] << "\":" << u(v[k]);
    o << "}";
  };
  static const char* gk[] = {"load", "store", "atomic"};
  static const char* sk[] = {"load", "store", "ldmatrix", "stmatrix", "atomic"};
  tri("global_requests", s.gReq, gk, 3);
  tri("global_bytes", s.gBytes, gk, 3);
  tri("global_sectors", s.gSectors, gk, 3);
  tri("global_ideal_sectors", s.gIdealSectors, gk, 3);
  tri("shared_requests", s.sReq, sk, 5);
  tri("shared_bytes", s.sBytes, sk, 5);
  tri("shared_wavefronts", s.sWave, sk, 5);
  tri("shared_ideal_wavefronts", s.sIdeal, sk, 5);
  o << ",\"cp_async_bytes\":" << s.cpAsyncBytes << ",\"cp_async_sectors\":" << s.cpAsyncSectors
    << ",\"bulk_load_bytes\":" << s.bulkLoadBytes << ",\"bulk_store_bytes\":" << s.bulkStoreBytes;
  uint64_t rd = 0, wr = 0;
  o << ",\"footprint\":{";
  first = true;
  for (auto& a : L.mem->allocs) {
    if (!a.second->rd) continue;
    uint64_t r = a.second->rd->count(), w = a.second->wr->count();
    rd += r;
    wr += w;
    if (!r && !w) continue;
    o << (first ? "" : ",") << quote(a.second->name + fmt("@0x%llx", (unsigned long long)a.first))
      << ":[" << r << "," << w << "]";
    first = false;
  }
  o << "},\"unique_bytes_read\":" << rd << ",\"unique_bytes_written\":" << wr;
  o << ",\"static_smem\":" << L.smemStatic << ",\"smem\":" << L.smemTotal << ",\"warnings\":[";
  first = true;
  for (auto& w : L.warnings) {
    o << (first ? "" : ",")
      << quote(w.first + (w.second > 1 ? fmt(" (%llu times)", (unsigned long long)w.second) : ""));
    first = false;
  }
  o << "],\"output\":" << quote(L.output);
  if (profile) {
    o << ",\"profile\":[";
    first = true;
    for (auto& c : L.mod->codes) {
      if (!c) continue;
      for (size_t i = 0; i < c->insts.size(); i++) {
        uint64_t w = L.cntW[c->pcBase + i];
        if (!w) continue;
        o << (first ? "" : ",") << "[" << c->insts[i].line << "," << quote(c->insts[i].src->op)
          << "," << w << "," << L.cntT[c->pcBase + i] << "]";
        first = false;
      }
    }
    o << "]";
  }
  o << "}";
  return o.str();
}

}  // namespace

extern "C" {

const char* ptxvm_error() { return lastError.c_str(); }

void* ptxvm_load(const char* text) {
  return guarded([&]() -> void* { return loadModule(text).release(); });
}
void ptxvm_unload(void* m) { delete (Loaded*)m; }

const char* ptxvm_info(void* mp) {
  Loaded& M = *(Loaded*)mp;
  std::ostringstream o;
  o << "{\"kernels\":{";
  bool first = true;
  for (size_t k = 0; k < M.mod->functions.size(); k++) {
    Function& f = *M.mod->functions[k];
    if (!f.isEntry) continue;
    uint64_t stat = M.sharedCommon;
    auto it = M.sharedStatic.find(f.name);
    if (it != M.sharedStatic.end()) stat = std::max(stat, it->second);
    o << (first ? "" : ",") << quote(f.name) << ":{\"static_smem\":" << stat
      << ",\"local_bytes\":" << f.localBytes << ",\"insts\":" << f.insts.size() << ",\"maxntid\":["
      << f.maxntid[0] << "," << f.maxntid[1] << "," << f.maxntid[2] << "],\"params\":[";
    for (size_t i = 0; i < f.params.size(); i++)
      o << (i ? "," : "") << "[" << f.params[i].offset << "," << f.params[i].size << ","
        << quote(f.params[i].type) << "]";
    o << "]}";
    first = false;
  }
  o << "},\"symbols\":{";
  for (size_t k = 0; k < M.mod->globals.size(); k++)
    o << (k ? "," : "") << quote(M.mod->globals[k].name) << ":[" << (uint64_t)M.globalMem[k] << ","
      << M.mod->globals[k].size << "]";
  o << "},\"target\":" << quote(M.mod->target) << "}";
  return ret(o.str());
}

void* ptxvm_memory_new() { return new Memory; }
void ptxvm_memory_free(void* m) { delete (Memory*)m; }
int ptxvm_memory_add(void* m, uint64_t base, uint64_t size, int readonly, const char* name) {
  return guarded([&] {
    ((Memory*)m)->add(base, size, readonly != 0, name);
    return 1;
  });
}
void ptxvm_memory_remove(void* m, uint64_t base) { ((Memory*)m)->remove(base); }

// opts: race, uninit, stats, threads, max_insts, profile
const char* ptxvm_launch(void* mp, const char* name, void* mem, const uint32_t* grid,
                         const uint32_t* block, uint32_t smem, const void* params,
                         uint64_t paramBytes, const uint64_t* opts) {
  return guarded([&]() -> const char* {
    Loaded& M = *(Loaded*)mp;
    Launch L;
    L.mod = &M;
    L.code = M.codeOf(name);
    if (!L.code || !L.code->fn->isEntry) throw VmError(std::string("no kernel named ") + name);
    L.mem = (Memory*)mem;
    memcpy(L.grid, grid, 12);
    memcpy(L.block, block, 12);
    L.smemDyn = smem;
    L.paramStore.assign(std::max<uint64_t>(paramBytes, L.code->paramBytes) + 512, 0);
    L.params = (uint8_t*)(((uint64_t)L.paramStore.data() + 255) & ~255ull);
    memcpy(L.params, params, paramBytes);
    L.checks.race = opts[0];
    L.checks.uninit = opts[1];
    L.checks.stats = opts[2];
    L.threads = (int)opts[3];
    L.maxInsts = opts[4];
    L.order = opts[6];
    // module variables and the parameter block are memory of this launch too
    std::vector<uint64_t> added;
    auto reg = [&](uint64_t b, uint64_t n, bool ro, const std::string& nm) {
      if (!L.mem->find(b)) {
        L.mem->add(b, n, ro, nm);
        added.push_back(b);
      }
    };
    for (size_t k = 0; k < M.mod->globals.size(); k++)
      if (M.mod->globals[k].size)
        reg((uint64_t)M.globalMem[k], M.mod->globals[k].size,
            M.mod->globals[k].space == Space::Const, M.mod->globals[k].name);
    struct Cleanup {
      Memory* m;
      std::vector<uint64_t>& a;
      ~Cleanup() {
        for (auto b : a) m->remove(b);
        for (auto& x : m->allocs) {
          x.second->rd.reset();
          x.second->wr.reset();
        }
      }
    } cleanup{L.mem, added};
    if (L.checks.stats)
      for (auto& a : L.mem->allocs) {
        a.second->rd = std::make_unique<Footprint>(a.second->size);
        a.second->wr = std::make_unique<Footprint>(a.second->size);
      }
    reg((uint64_t)L.params, L.code->paramBytes ? L.code->paramBytes : 1, true, "kernel parameters");
    L.run();
    return ret(statsJson(L, opts[5]));
  });
}

}  // extern "C"
