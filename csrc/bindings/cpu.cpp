#include <torch/csrc/stable/library.h>

#include "merge_attn_states.h"

namespace transmla {
namespace {

// The caller's pool is torch's own: one pool, and torch.set_num_threads() holds.
ParallelFor torch_pool() {
  return {
      [](void*, index_t begin, index_t end, index_t grain, ParallelFor::Body body, void* context) {
        torch::stable::parallel_for(begin, end, grain,
                                    [=](index_t b, index_t e) { body(context, b, e); });
      },
      nullptr, static_cast<int>(torch::stable::get_num_threads())};
}

struct Cpu {
  static void launch(const MergeAttnStatesParams& params, const Tensor&) {
    merge_attn_states_cpu(params, torch_pool());
  }
};

}  // namespace
}  // namespace transmla

STABLE_TORCH_LIBRARY_IMPL(transmla, CPU, m) {
  using namespace transmla;
  m.impl("merge_attn_states", TORCH_BOX(&merge_attn_states<Cpu>));
}
