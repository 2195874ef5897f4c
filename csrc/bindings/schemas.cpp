#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(transmla, m) {
  m.def(
      "mla_project(Tensor hidden, Tensor w_q, Tensor w_kv_a, Tensor w_uk, Tensor cos_sin, "
      "Tensor positions, Tensor slot_mapping, Tensor(a!) latent_cache, Tensor? w_q_a, "
      "Tensor? q_a_norm, Tensor? kv_norm, Tensor? b_q, Tensor? b_kv_a, float norm_eps, "
      "Tensor(b!)? cache_scales=None) -> Tensor");
  m.def(
      "mla_decode(Tensor q, Tensor latent_cache, Tensor block_table, Tensor cache_seqlens, "
      "int kv_lora_rank, float softmax_scale, float softcap, int sliding_window, int num_splits, "
      "bool batch_invariant, Tensor? cache_scales=None) -> (Tensor, Tensor)");
  m.def("linear(Tensor x, Tensor w, Tensor? bias) -> Tensor");
  m.def(
      "mla_prefill(Tensor q, Tensor kv, Tensor k_pe, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
      "float softmax_scale, bool causal, float softcap, int sliding_window) -> (Tensor, Tensor)");
  m.def(
      "merge_attn_states(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> "
      "(Tensor, Tensor)");
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("covariance_add_(Tensor(a!) acc, Tensor x, Tensor? weight) -> ()");
  m.def("batched_pca(Tensor cov) -> (Tensor, Tensor)");
  m.def("batched_svd(Tensor a) -> (Tensor, Tensor, Tensor)");
}
