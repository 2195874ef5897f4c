// Every CPU kernel: the same functions once per instruction set, each set in its own namespace.
#pragma once

#include "transmla/transmla.h"

#define TRANSMLA_CPU_KERNELS(isa)                                                               \
  namespace transmla::isa {                                                                     \
  size_t linear_cpu_workspace_size(const LinearParams& params, int num_threads);                \
  void linear_cpu(const LinearParams& params, const ParallelFor& parallel_for);                 \
  void rms_norm_cpu(const RmsNormParams& params, const ParallelFor& parallel_for);              \
  void mla_project_cpu(const MlaProjectParams& params, const ParallelFor& parallel_for);        \
  size_t mla_decode_cpu_workspace_size(const MlaDecodeParams& params, int num_threads);         \
  void mla_decode_cpu(const MlaDecodeParams& params, const ParallelFor& parallel_for);          \
  size_t mla_prefill_cpu_workspace_size(const MlaPrefillParams& params, int num_threads);       \
  void mla_prefill_cpu(const MlaPrefillParams& params, const ParallelFor& parallel_for);        \
  void merge_attn_states_cpu(const MergeAttnStatesParams& params,                               \
                             const ParallelFor& parallel_for);                                  \
  size_t covariance_add_cpu_workspace_size(const CovarianceAddParams& params, int num_threads); \
  void covariance_add_cpu(const CovarianceAddParams& params, const ParallelFor& parallel_for);  \
  size_t batched_pca_cpu_workspace_size(const BatchedPcaParams& params, int num_threads);       \
  void batched_pca_cpu(const BatchedPcaParams& params, const ParallelFor& parallel_for);        \
  size_t batched_svd_cpu_workspace_size(const BatchedSvdParams& params, int num_threads);       \
  void batched_svd_cpu(const BatchedSvdParams& params, const ParallelFor& parallel_for);        \
  }

#if defined(__x86_64__)
TRANSMLA_CPU_KERNELS(scalar)
TRANSMLA_CPU_KERNELS(avx2)
TRANSMLA_CPU_KERNELS(avx512)
#elif defined(__aarch64__)
TRANSMLA_CPU_KERNELS(neon)
#else
TRANSMLA_CPU_KERNELS(scalar)
#endif
