#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "cuda/kernels.h"
#include "merge_attn_states.h"
#include "mla_project.h"

// Weak: a CPU-only torch lacks it, and this library still loads there.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace transmla {
namespace {

template <class Params>
void launch_on(const Tensor& t, const char* op, int (*launch)(const Params&, void*),
               const Params& params) {
  const Check check(op, t);
  if (!t.is_cuda() || !aoti_torch_get_current_cuda_stream) {
    check.fail("the CUDA kernel needs tensors on a CUDA device, and a torch built with CUDA");
  }
  const torch::stable::accelerator::DeviceGuard guard(t.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  if (const int error = launch(params, stream)) {
    check.fail(cudaGetErrorString(static_cast<cudaError_t>(error)));
  }
}

struct Cuda {
  static constexpr bool kOnHost = false;

  static void launch(const MergeAttnStatesParams& params, const Tensor& t) {
    launch_on(t, "merge_attn_states", launch_merge_attn_states, params);
  }

  static void launch(const MlaProjectParams& params, const Tensor& t) {
    launch_on(t, "mla_project", launch_mla_project, params);
  }

  static void launch(const RmsNormParams& params, const Tensor& t) {
    launch_on(t, "mla_project", launch_rms_norm, params);
  }
};

}  // namespace
}  // namespace transmla

STABLE_TORCH_LIBRARY_IMPL(transmla, CUDA, m) {
  using namespace transmla;
  m.impl("mla_project", TORCH_BOX(&mla_project<Cuda>));
  m.impl("merge_attn_states", TORCH_BOX(&merge_attn_states<Cuda>));
}
