#include "memory.h"

#include <cstdio>

#include "parse.h"

namespace ptxvm {

void Memory::add(uint64_t base, uint64_t size, bool readonly, const std::string& name) {
  auto it = allocs.lower_bound(base);
  if (it != allocs.end() && it->first == base) {
    it->second->size = std::max(it->second->size, size);
    it->second->readonly = readonly;
    return;
  }
  if (it != allocs.end() && it->first < base + size)
    throw VmError("memory registration '" + name + "' overlaps '" + it->second->name + "'");
  if (it != allocs.begin()) {
    auto& p = std::prev(it)->second;
    if (p->base + p->size > base) {
      if (p->base + p->size >= base + size) return;  // a view of memory already registered
      throw VmError("memory registration '" + name + "' overlaps '" + p->name + "'");
    }
  }
  auto a = std::make_unique<Alloc>();
  a->base = base;
  a->size = size;
  a->readonly = readonly;
  a->name = name;
  a->virt = nextVirt;
  nextVirt += (size + 511) / 256 * 256;
  allocs[base] = std::move(a);
}

void Memory::remove(uint64_t base) { allocs.erase(base); }

Alloc* Memory::find(uint64_t addr) {
  auto it = allocs.upper_bound(addr);
  if (it == allocs.begin()) return nullptr;
  Alloc* a = std::prev(it)->second.get();
  return addr < a->base + a->size ? a : nullptr;
}

std::string Memory::describe(uint64_t addr) {
  auto it = allocs.upper_bound(addr);
  char b[256];
  std::string s;
  if (it != allocs.begin()) {
    Alloc* a = std::prev(it)->second.get();
    snprintf(b, sizeof b, "%llu bytes past the end of '%s' (%llu bytes at 0x%llx)",
             (unsigned long long)(addr - a->base - a->size), a->name.c_str(),
             (unsigned long long)a->size, (unsigned long long)a->base);
    if (addr >= a->base + a->size)
      s = b;
    else
      snprintf(b, sizeof b, "straddles the end of '%s' (%llu bytes at 0x%llx, offset %llu)",
               a->name.c_str(), (unsigned long long)a->size, (unsigned long long)a->base,
               (unsigned long long)(addr - a->base)),
          s = b;
  }
  if (it != allocs.end()) {
    Alloc* a = it->second.get();
    snprintf(b, sizeof b, "%s%llu bytes before '%s'", s.empty() ? "" : ", ",
             (unsigned long long)(a->base - addr), a->name.c_str());
    s += b;
  }
  return s.empty() ? "no memory is registered" : s;
}

}  // namespace ptxvm
