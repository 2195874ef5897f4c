// The public CPU entry points: each runs the kernel of the active instruction set.
#include "kernels.h"

#if defined(__x86_64__)
#define TRANSMLA_DISPATCH(call) \
  switch (active_isa()) {       \
    case Isa::kAvx512:          \
      return avx512::call;      \
    case Isa::kAvx2:            \
      return avx2::call;        \
    default:                    \
      return scalar::call;      \
  }
#elif defined(__aarch64__)
#define TRANSMLA_DISPATCH(call) return neon::call
#else
#define TRANSMLA_DISPATCH(call) return scalar::call
#endif

namespace transmla {

ParallelFor serial() {
  return {[](void*, index_t begin, index_t end, index_t, ParallelFor::Body body, void* context) {
            if (begin < end) body(context, begin, end);
          },
          nullptr, 1};
}

void merge_attn_states_cpu(const MergeAttnStatesParams& params, const ParallelFor& parallel_for) {
  TRANSMLA_DISPATCH(merge_attn_states_cpu(params, parallel_for));
}

}  // namespace transmla
