// What every op of the C++ API shares: index and data types, and the caller's thread pool.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__GNUC__)
#define TRANSMLA_API __attribute__((visibility("default")))
#else
#define TRANSMLA_API
#endif

namespace transmla {

using index_t = int64_t;

enum class DType : uint8_t { kFloat32, kBFloat16, kFloat16 };

// The largest number of float8_e4m3fn. A token's scale in a cache of it is the least power of two
// that is at least max |token| / kMaxFp8; 1 for zeros, NaN for what is not finite.
constexpr float kMaxFp8 = 448;
// The largest code of an int8 cache. A token has two scales there, of its latent and of its RoPE
// key, whose sizes may differ fiftyfold: max |numbers| / kMaxInt8; 1 for zeros, NaN for what is not
// finite.
constexpr float kMaxInt8 = 127;

// A parallel loop over [begin, end) in chunks of at least `grain`, lent by the caller: the library
// owns no threads. `body` may run on any thread and never throws.
struct ParallelFor {
  using Body = void (*)(void* context, index_t begin, index_t end);
  void (*run)(void* pool, index_t begin, index_t end, index_t grain, Body body, void* context);
  void* pool;
  int num_threads;  // workers `run` may use at once; sizes the workspaces
};

// Runs everything on the calling thread.
TRANSMLA_API ParallelFor serial();

}  // namespace transmla
