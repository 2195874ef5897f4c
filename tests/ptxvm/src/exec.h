// Decoded instructions and the machine that runs them.
#pragma once
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "memory.h"
#include "parse.h"

namespace ptxvm {

struct Warp;
struct Block;
struct Worker;
struct Launch;
struct Code;
struct Inst;

// Where an operand's 32-lane array lives: top two bits choose the base, the rest is a byte offset.
using Opnd = uint32_t;
constexpr Opnd kRegs = 0u << 30, kConst = 1u << 30, kSpecial = 2u << 30, kNone = 3u << 30;

// What an instruction tells the scheduler.
enum Ctl : int {
  NEXT,      // go on at pc+1
  JUMP,      // active lanes go to Warp::jump
  JUMPSOME,  // lanes jumpMask go to Warp::jump, the other active lanes run this again
  EXIT,      // active lanes end
  CALL,      // active lanes enter Warp::callee
  RET,       // active lanes return
  CONV,      // active lanes wait here until more lanes of the warp arrive; then it runs again
  BAR,       // active lanes wait for barrier Warp::barId, then go on at pc+1
  YIELD,     // go on at pc+1, but let other warps run first
  BLOCK      // stay at this pc, let other warps run first
};
using ExecFn = int (*)(Warp&, const Inst&, uint32_t mask);

// Statistic classes of warp instructions.
enum Cls : uint8_t {
  C_MISC,
  C_ALU,
  C_FP32,
  C_FP64,
  C_FP16,
  C_FMA,
  C_SFU,
  C_CVT,
  C_LDG,
  C_STG,
  C_LDS,
  C_STS,
  C_LDL,
  C_STL,
  C_LDC,
  C_ATOMG,
  C_ATOMS,
  C_LDMATRIX,
  C_STMATRIX,
  C_CPASYNC,
  C_MMA,
  C_WGMMA,
  C_BAR,
  C_MBAR,
  C_SHFL,
  C_BRANCH,
  C_BULK,
  C_COUNT
};
extern const char* const kClsNames[C_COUNT];

struct Inst {
  ExecFn fn = nullptr;
  uint32_t pred = ~0u;  // register offset of the guard predicate
  bool predNeg = false;
  Cls cls = C_ALU;
  uint8_t dw = 0, aw = 0, bw = 0;  // register widths in bytes where they may differ from the type
  uint8_t es = 0, vec = 1;         // memory: element size, elements
  uint8_t sext = 0;                // memory/cvt: sign-extend
  Space space = Space::Generic;
  uint8_t mode = 0;  // small selector, meaning depends on fn
  uint8_t flags = 0;
  Opnd d = kNone, a = kNone, b = kNone, c = kNone;
  int64_t imm = 0;
  uint32_t ext = 0, nExt = 0;  // operand list in Code::ext
  int32_t target = -1;
  uint32_t x = 0, y = 0;           // further selectors
  double flops = 0;                // per active thread
  const char* flopType = nullptr;  // mma types; scalars go by class
  int line = 0;
  const PInst* src = nullptr;
};

struct Code {
  const Function* fn = nullptr;
  std::vector<Inst> insts;
  std::vector<Opnd> ext;
  std::vector<std::vector<int32_t>> tables;  // brx.idx
  uint8_t* consts = nullptr;
  uint32_t constBytes = 0, regBytes = 0;
  uint32_t granule = 16;  // smallest shared-memory access
  uint32_t callParamBytes = 0, paramBytes = 0, localBytes = 0;
  std::vector<uint32_t> regOff;
  uint32_t pcBase = 0;  // index of this function's first counter
  // wgmma accumulators in flight: per instruction, does it name any register of a wgmma
  // accumulator?
  std::vector<uint8_t> touchesAcc;
  ~Code() { free(consts); }
};

// A loaded module: parsed text, decoded code and module-level variables.
struct Loaded {
  std::unique_ptr<Module> mod;
  std::vector<std::unique_ptr<Code>> codes;      // by function index, null for externs
  std::map<std::string, uint64_t> sharedStatic;  // by kernel
  uint64_t sharedCommon = 0, dynAlign = 16;
  std::vector<uint8_t*> globalMem;  // by Module::globals index
  uint32_t totalInsts = 0;
  ~Loaded() {
    for (auto p : globalMem) free(p);
  }
  Code* codeOf(const std::string& n) const {
    auto it = mod->functionIndex.find(n);
    return it == mod->functionIndex.end() ? nullptr : codes[it->second].get();
  }
};
std::unique_ptr<Loaded> loadModule(const std::string& text);

constexpr uint64_t kSharedWin = 0x0100000000000000ull, kLocalWin = 0x0200000000000000ull,
                   kFuncWin = 0x0300000000000000ull;
constexpr uint64_t kWinMask = 0xff00000000000000ull;

struct Checks {
  bool race = true, uninit = true, stats = true;
};

struct Stats {
  uint64_t divergent = 0, branches = 0;
  // global traffic, [0] loads [1] stores [2] atomics
  uint64_t gReq[3] = {}, gBytes[3] = {}, gSectors[3] = {}, gIdealSectors[3] = {};
  // shared traffic, [0] ld [1] st [2] ldmatrix [3] stmatrix [4] atomics
  uint64_t sReq[5] = {}, sBytes[5] = {}, sWave[5] = {}, sIdeal[5] = {};
  uint64_t cpAsyncBytes = 0, cpAsyncSectors = 0, bulkLoadBytes = 0, bulkStoreBytes = 0;
  void add(const Stats& o);
};

struct Warning {
  std::string text;
  uint64_t count;
};

// ---- shared-memory shadow: uninitialised and in-flight bytes, races ----
constexpr uint32_t kClocks = 40;  // 32 warps and 8 warpgroups
struct Shadow {
  bool uninit = false, race = false;
  uint32_t sh = 0;  // log2 of the granule
  std::vector<uint8_t>
      state;  // 1 written, 2 asynchronous copy in flight, 4 written by the async proxy
  std::vector<uint32_t> wr,
      rd;  // last write / reads: clock<<6 | warp; rd with warp 63: index of a clock vector
  std::vector<uint32_t> wrPc, rdPc;
  std::vector<uint32_t> arena;  // kClocks clocks per multi-reader granule
  void reset(uint64_t bytes, uint32_t granule, const Checks& c);
};

struct Barrier {
  uint32_t expected = 0, arrived = 0;
  uint32_t redAnd = 1, redOr = 0, redCnt = 0;
  std::vector<uint32_t> vc;
};

struct MbarInfo {
  std::vector<uint32_t> cur, done;  // vector clocks of arrivals
  int line = 0;
};

struct Frame {
  Code* code = nullptr;
  Frame* parent = nullptr;
  uint32_t retPc = 0, depth = 0;
  uint8_t* regs = nullptr;
  uint8_t* inParam = nullptr;  // stride 0 for kernels
  uint8_t* callParam = nullptr;
  uint32_t inStride = 0, callStride = 0;
  uint32_t localBase = 0, localTop = 0;
  const Inst* callInst = nullptr;
  int refs = 0;  // splits and child frames
};

struct Split {
  enum St : uint8_t { Run, Conv, Bar, Sleep };
  Frame* f;
  uint32_t pc, mask;
  St st = Run;
  uint32_t bar = 0;
  uint64_t lastRun = 0;
};

struct AsyncCopy {  // cp.async: 16 bytes at most
  uint32_t dst;
  uint8_t size, lane;
  uint8_t data[16];
};
uint64_t applyAtomic(int op, int type, uint64_t old, uint64_t b, uint64_t c);
int atomicType(const std::string& t);

struct AsyncGroup {
  uint32_t lanes;
  std::vector<AsyncCopy> copies;
};
struct AsyncArrive {  // cp.async.mbarrier.arrive that has not happened yet
  uint32_t bar, lanes;
};
struct BulkCopy {  // TMA load in flight
  uint32_t dst, bar;
  uint32_t bytes;                                                 // transaction bytes
  std::vector<std::pair<uint32_t, std::vector<uint8_t>>> pieces;  // shared offset, data
  int warp;
  uint32_t clock;
  std::vector<uint32_t> vc;
};
struct BulkPiece {
  uint64_t global;
  uint32_t shared, bytes;
};
struct BulkStore {              // shared -> global, performed at the wait
  int lane, op = -1, type = 0;  // op: reduction, -1 for a plain store
  std::vector<BulkPiece> pieces;
};
struct BulkGroup {
  uint32_t lanes;
  std::vector<BulkStore> stores;
};
struct WgOp {  // a wgmma, or a move of an accumulator that is still in flight
  const Inst* inst;
  Frame* frame = nullptr;
  uint64_t descA = 0, descB = 0;
  bool scaleD = true;
  std::vector<uint32_t> aRegs;  // snapshot, 4 registers x 32 lanes
  std::vector<uint32_t> vc;     // vector clock at issue, for the race check of its reads
};
struct WgGroup {  // one warp's share of a wgmma-group; the group is complete when all four warps'
                  // shares are
  std::vector<WgOp> ops;
  bool done = false;
  uint32_t epoch = 0;  // clock of the warpgroup's tensor core at completion
};

struct Warp {
  Block* blk = nullptr;
  Worker* wk = nullptr;
  Launch* L = nullptr;
  int id = 0;
  uint32_t full = 0, live = 0;  // lanes that exist, lanes not yet exited
  std::vector<Split> splits;
  const uint8_t* base[4];  // operand bases of the running frame
  Frame* frame = nullptr;
  uint32_t pc = 0, jump = 0, jumpMask = 0, barId = 0;
  uint32_t cc = 0;       // carry flags of add.cc and friends
  uint32_t curMask = 0;  // lanes of the running split
  Code* callee = nullptr;
  uint64_t tick = 0;
  bool spinning = false;  // the last yield was a failed mbarrier wait
  const Inst* spinAt = nullptr;
  uint32_t spinBar = 0;
  std::vector<uint8_t> local;  // lane-major
  uint32_t localStride = 0;
  alignas(32) uint8_t special[64 * 256];
  // cp.async
  std::vector<AsyncCopy> pendingCopies;
  std::deque<AsyncGroup> groups;  // committed, oldest first
  std::vector<AsyncArrive> asyncArrive;
  // bulk stores per warp (issuing lanes share a queue)
  std::vector<BulkStore> bulkOpen;
  std::deque<BulkGroup> bulkGroups;
  // wgmma
  std::vector<WgOp> wgOpen;
  std::deque<WgGroup> wgGroups;  // committed and not yet waited for by this warp
  uint64_t wgRetired = 0;        // groups already waited for
  bool wgPending = false;
  std::vector<uint8_t> wgRegs;    // by register offset / 32: written by a pending op
  std::vector<uint32_t> vc;       // vector clock of this warp
  int clockId = 0;                // who reads: the warp, or its warpgroup's tensor core
  std::vector<uint32_t> proxyVc;  // clock at the last fence.proxy.async

  template <class T>
  const T* src(Opnd o) const {
    return (const T*)(base[o >> 30] + (o & 0x3fffffffu));
  }
  template <class T>
  T* dst(Opnd o) {
    return (T*)(base[0] + o);
  }
  uint32_t& predReg(Opnd o) { return *(uint32_t*)(base[0] + o); }

  void init(Block* b, int id);
  int run(int quantum);  // returns a RunResult
  bool done() const { return splits.empty(); }
  int pick(bool fair);
  void mergeSplits();
  void enter(int idx);
  void wakeConv();
  Frame* newFrame(Code* c, Frame* parent);
  void release(Frame* f);
  void ensureLocal(uint32_t bytes);
  [[noreturn]] void fail(int lane, const std::string& m);
  std::string where(int lane, const Inst& I);

  // memory access, all bounds-, alignment- and (shared) shadow-checked
  uint8_t* global(uint64_t addr, uint32_t size, int lane, bool write);
  uint8_t* sharedAt(uint64_t addr, uint32_t size, int lane);
  uint8_t* localAt(uint64_t addr, uint32_t size, int lane);
  void sharedRead(uint32_t off, uint32_t size, int lane);
  void sharedWrite(uint32_t off, uint32_t size, int lane,
                   int async = 0);  // 1 cp.async, 2 bulk copy
  void sharedReadLanes(const uint32_t* off, uint32_t mask, uint32_t size);
  void sharedWriteLanes(const uint32_t* off, uint32_t mask, uint32_t size);
  void asyncProxyRead(uint32_t off, uint32_t size, int lane);
  void deliver(const AsyncCopy& c);
  void deliverLanes(uint32_t lanes);  // every cp.async of these lanes
  void sharedSync(uint32_t off);      // an atomic on this address orders its users
  bool tracksRaces() const;
  void countGlobal(const uint64_t* addr, uint32_t mask, uint32_t size, int kind);
  void countShared(const uint32_t* off, uint32_t mask, uint32_t size, int kind);
};
enum RunResult { R_PROGRESS, R_BLOCKED, R_SPIN, R_DONE };

struct Block {
  Launch* L = nullptr;
  Worker* wk = nullptr;
  uint32_t ctaid[3] = {}, threads = 0, nwarps = 0;
  uint32_t nclocks = 0;  // components of a vector clock: warps, then one tensor core per warpgroup
  uint32_t wgClock[8] = {};
  uint8_t* smem = nullptr;
  uint32_t smemBytes = 0, smemCap = 0;
  Shadow shadow;
  std::vector<std::unique_ptr<Warp>> warps;
  Barrier bars[16];
  std::unordered_map<uint32_t, MbarInfo> mbars;
  std::unordered_map<uint32_t, std::vector<uint32_t>> syncVars;
  std::vector<BulkCopy> bulk;
  uint64_t progress = 0;
  ~Block() { free(smem); }
  void run(uint64_t linear);
  void checkBarrier(uint32_t id);
  uint32_t liveThreads() const;
  [[noreturn]] void deadlock();
};

struct Worker {
  Launch* L = nullptr;
  Alloc* last = nullptr;
  Stats st;
  std::vector<uint64_t> cntW, cntT;  // per decoded instruction
  std::vector<double> flopsW;
  std::vector<std::unique_ptr<Frame>> frameStore;
  std::vector<Frame*> freeFrames;
  Block block;
  uint64_t executed = 0;
};

struct Launch {
  Loaded* mod = nullptr;
  Code* code = nullptr;
  Memory* mem = nullptr;
  uint32_t grid[3], block[3];
  uint32_t smemDyn = 0, smemTotal = 0, smemStatic = 0;
  std::vector<uint8_t> paramStore;
  uint8_t* params = nullptr;  // 256-byte aligned, inside paramStore
  Checks checks;
  int threads = 1;
  uint64_t maxInsts = 0;
  uint64_t order = 0;  // > 0: seed of a random order of warps
  Stats st;
  std::vector<uint64_t> cntW, cntT;
  std::mutex atomicMx;
  std::map<std::string, uint64_t> warnings;
  std::mutex warnMx;
  std::string output;  // printf text
  double seconds = 0;
  void warn(const std::string& s) {
    std::lock_guard<std::mutex> g(warnMx);
    warnings[s]++;
  }
  void run();
};

template <class F>
inline __attribute__((always_inline)) void forLanes(uint32_t m, F&& f) {
  if (m == ~0u) {
#pragma GCC ivdep
    for (int i = 0; i < 32; i++) f(i);
  } else {
    while (m) {
      int i = __builtin_ctz(m);
      m &= m - 1;
      f(i);
    }
  }
}

std::string fmt(const char* f, ...) __attribute__((format(printf, 1, 2)));

}  // namespace ptxvm
