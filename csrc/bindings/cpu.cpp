#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "batched_pca.h"
#include "batched_svd.h"
#include "covariance_add.h"
#include "linear.h"
#include "merge_attn_states.h"
#include "mla_decode.h"
#include "mla_prefill.h"
#include "mla_project.h"
#include "rms_norm.h"

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

template <class Params>
void run_in_workspace(Params params, size_t (*workspace_size)(const Params&, int),
                      void (*kernel)(const Params&, const ParallelFor&)) {
  const ParallelFor pool = torch_pool();
  const auto size = static_cast<int64_t>(workspace_size(params, pool.num_threads));
  const Tensor workspace = torch::stable::empty({size}, ScalarType::Byte);
  params.workspace = workspace.mutable_data_ptr();
  kernel(params, pool);
}

struct Cpu {
  static constexpr bool kOnHost = true;
  // Larger ones go to LAPACK, whose blocked algorithms then win.
  static constexpr int64_t kMaxPcaDim = 64, kMaxSvdShortSide = 16, kMaxSvdLongSide = 512;
  static constexpr int64_t kMaxLinearTokens = 8;  // from 16 on, torch's GEMM wins with AVX2

  static const char* unsupported(const MlaDecodeParams& params) {
    return mla_decode_unsupported(params);
  }

  static const char* unsupported(const MlaProjectParams& params) {
    return mla_project_unsupported(params);
  }

  static void launch(MlaDecodeParams params, const Tensor&) {
    if (params.num_splits == 0) {
      index_t max_seqlen = 0;
      for (index_t b = 0; b < params.batch_size; ++b) {
        max_seqlen = std::max<index_t>(max_seqlen, params.cache_seqlens[b]);
      }
      params.num_splits =
          plan_splits(params.batch_size, params.seqlen_q * params.num_heads, max_seqlen,
                      static_cast<int>(torch::stable::get_num_threads()));
    }
    run_in_workspace(params, mla_decode_cpu_workspace_size, mla_decode_cpu);
  }

  static void launch(const MlaPrefillParams& params, const Tensor&) {
    run_in_workspace(params, mla_prefill_cpu_workspace_size, mla_prefill_cpu);
  }

  static void launch(const MergeAttnStatesParams& params, const Tensor&) {
    merge_attn_states_cpu(params, torch_pool());
  }

  static void launch(const LinearParams& params, const Tensor&) {
    run_in_workspace(params, linear_cpu_workspace_size, linear_cpu);
  }

  static void launch(const MlaProjectParams& params, const Tensor&) {
    mla_project_cpu(params, torch_pool());
  }

  static void launch(const RmsNormParams& params, const Tensor&) {
    rms_norm_cpu(params, torch_pool());
  }

  static void launch(const CovarianceAddParams& params, const Tensor&) {
    run_in_workspace(params, covariance_add_cpu_workspace_size, covariance_add_cpu);
  }

  static void launch(const BatchedPcaParams& params, const Tensor&) {
    run_in_workspace(params, batched_pca_cpu_workspace_size, batched_pca_cpu);
  }

  static void launch(const BatchedSvdParams& params, const Tensor&) {
    run_in_workspace(params, batched_svd_cpu_workspace_size, batched_svd_cpu);
  }
};

}  // namespace
}  // namespace transmla

STABLE_TORCH_LIBRARY_IMPL(transmla, CPU, m) {
  using namespace transmla;
  m.impl("mla_project", TORCH_BOX(&mla_project<Cpu>));
  m.impl("mla_decode", TORCH_BOX(&mla_decode<Cpu>));
  m.impl("mla_prefill", TORCH_BOX(&mla_prefill<Cpu>));
  m.impl("linear", TORCH_BOX(&linear<Cpu>));
  m.impl("merge_attn_states", TORCH_BOX(&merge_attn_states<Cpu>));
  m.impl("rms_norm", TORCH_BOX(&rms_norm<Cpu>));
  m.impl("covariance_add_", TORCH_BOX(&covariance_add<Cpu>));
  m.impl("batched_pca", TORCH_BOX(&batched_pca<Cpu>));
  m.impl("batched_svd", TORCH_BOX(&batched_svd<Cpu>));
}
