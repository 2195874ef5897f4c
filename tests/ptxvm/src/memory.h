// The registry of global memory. Addresses are real host addresses.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace ptxvm {

// One bit per byte touched, set by the launches that use the allocation.
struct Footprint {
  uint64_t* bits = nullptr;
  uint64_t words = 0;
  explicit Footprint(uint64_t bytes) : words((bytes + 63) / 64 + 1) {
    bits = (uint64_t*)calloc(words, 8);
  }
  ~Footprint() { free(bits); }
  Footprint(const Footprint&) = delete;
  void mark(uint64_t off, uint32_t n) {
    uint64_t w = off >> 6, s = off & 63;
    uint64_t m = (n >= 64 ? ~0ull : (1ull << n) - 1) << s;
    if ((bits[w] & m) != m) __atomic_fetch_or(&bits[w], m, __ATOMIC_RELAXED);
    if (s + n > 64) {
      uint64_t m2 = (1ull << (s + n - 64)) - 1;
      if ((bits[w + 1] & m2) != m2) __atomic_fetch_or(&bits[w + 1], m2, __ATOMIC_RELAXED);
    }
  }
  uint64_t count() const {
    uint64_t c = 0;
    for (uint64_t i = 0; i < words; i++) c += __builtin_popcountll(bits[i]);
    return c;
  }
};

struct Alloc {
  uint64_t base = 1, size = 0;
  uint64_t virt = 0;  // an address aligned like cudaMalloc's, for counting sectors
  bool readonly = false;
  std::string name;
  std::unique_ptr<Footprint> rd, wr;  // present while a launch counts
};

class Memory {
 public:
  void add(uint64_t base, uint64_t size, bool readonly, const std::string& name);
  void remove(uint64_t base);
  Alloc* find(uint64_t addr);           // the allocation holding addr, or null
  std::string describe(uint64_t addr);  // for error messages: nearest allocations
  std::map<uint64_t, std::unique_ptr<Alloc>> allocs;
  uint64_t nextVirt = 1ull << 20;
};

}  // namespace ptxvm
