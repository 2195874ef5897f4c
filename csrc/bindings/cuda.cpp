#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "batched_pca.h"
#include "batched_svd.h"
#include "covariance_add.h"
#include "cuda/kernels.h"
#include "linear.h"
#include "merge_attn_states.h"
#include "mla_decode.h"
#include "mla_prefill.h"
#include "mla_project.h"
#include "rms_norm.h"

// Weak: a CPU-only torch lacks it, and this library still loads there.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace transmla {
namespace {

using torch::stable::accelerator::DeviceGuard;

constexpr const char* kNoInt8 =
    "an int8 latent_cache is for the CPU, on CUDA it must be float8_e4m3fn, or of "
    "the dtype of the other tensors without cache_scales";

void check_device(const Check& check, const Tensor& t) {
  if (!t.is_cuda() || !aoti_torch_get_current_cuda_stream) {
    check.fail("the CUDA kernel needs tensors on a CUDA device, and a torch built with CUDA");
  }
}

template <class Params>
void launch_on(const Tensor& t, const char* op, int (*launch)(const Params&, void*),
               const Params& params) {
  const Check check(op, t);
  check_device(check, t);
  const DeviceGuard guard(t.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  if (const int error = launch(params, stream)) {
    check.fail(cudaGetErrorString(static_cast<cudaError_t>(error)));
  }
}

// The caching allocator gives the workspace to later work of the same stream only.
template <class Params>
void launch_in_workspace(const Tensor& t, const char* op, size_t (*workspace_size)(const Params&),
                         int (*launch)(const Params&, void*), Params params) {
  check_device(Check(op, t), t);
  const DeviceGuard guard(t.get_device_index());
  const auto size = static_cast<int64_t>(workspace_size(params));
  const Tensor workspace = torch::stable::new_empty(t, {size}, ScalarType::Byte);
  params.workspace = workspace.mutable_data_ptr();
  launch_on(t, op, launch, params);
}

struct Cuda {
  static constexpr bool kOnHost = false;
  static constexpr int64_t kMaxLinearTokens = 0;
  static constexpr int64_t kMaxPcaDim = transmla::kMaxPcaDim;
  static constexpr int64_t kMaxSvdShortSide = transmla::kMaxSvdShortSide;
  static constexpr int64_t kMaxSvdLongSide = transmla::kMaxSvdLongSide;

  static const char* unsupported(const MlaDecodeParams& params) {
    return params.is_cache_int8 ? kNoInt8 : mla_decode_cuda_unsupported(params);
  }

  static const char* unsupported(const MlaProjectParams& params) {
    return params.is_cache_int8 ? kNoInt8 : nullptr;
  }

  static void launch(const MlaDecodeParams& params, const Tensor& t) {
    launch_in_workspace(t, "mla_decode", mla_decode_cuda_workspace_size, launch_mla_decode, params);
  }

  static void launch(const MergeAttnStatesParams& params, const Tensor& t) {
    launch_on(t, "merge_attn_states", launch_merge_attn_states, params);
  }

  static void launch(const MlaProjectParams& params, const Tensor& t) {
    launch_on(t, "mla_project", launch_mla_project, params);
  }

  static void launch(const RmsNormParams& params, const Tensor& t) {
    launch_on(t, "rms_norm", launch_rms_norm, params);
  }

  static void launch(const CovarianceAddParams& params, const Tensor& t) {
    launch_on(t, "covariance_add_", launch_covariance_add, params);
  }

  static void launch(const BatchedPcaParams& params, const Tensor& t) {
    launch_in_workspace(t, "batched_pca", batched_pca_cuda_workspace_size, launch_batched_pca,
                        params);
  }

  static void launch(const BatchedSvdParams& params, const Tensor& t) {
    launch_in_workspace(t, "batched_svd", batched_svd_cuda_workspace_size, launch_batched_svd,
                        params);
  }
};

}  // namespace
}  // namespace transmla

STABLE_TORCH_LIBRARY_IMPL(transmla, CUDA, m) {
  using namespace transmla;
  m.impl("mla_project", TORCH_BOX(&mla_project<Cuda>));
  m.impl("mla_decode", TORCH_BOX(&mla_decode<Cuda>));
  m.impl("mla_prefill", TORCH_BOX(&mla_prefill<Cuda>));
  m.impl("linear", TORCH_BOX(&linear<Cuda>));
  m.impl("merge_attn_states", TORCH_BOX(&merge_attn_states<Cuda>));
  m.impl("rms_norm", TORCH_BOX(&rms_norm<Cuda>));
  m.impl("covariance_add_", TORCH_BOX(&covariance_add<Cuda>));
  m.impl("batched_pca", TORCH_BOX(&batched_pca<Cuda>));
  m.impl("batched_svd", TORCH_BOX(&batched_svd<Cuda>));
}
