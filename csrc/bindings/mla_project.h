#pragma once

#include <optional>

#include "check.h"
#include "linear.h"
#include "transmla/mla_project.h"

namespace transmla {

// For indices that the host can read.
inline void check_indices(const Check& check, const char* name, const char* expected,
                          const int64_t* indices, index_t count, index_t first, index_t end) {
  for (index_t i = 0; i < count; ++i) {
    if (indices[i] >= end || indices[i] < first) {
      check.fail(std::string(name) + "[" + std::to_string(i) + "] must be " + expected + "=" +
                 std::to_string(end) + ", got " + std::to_string(indices[i]));
    }
  }
}

template <class Backend>
Tensor mla_project(const Tensor& hidden, const Tensor& w_q, const Tensor& w_kv_a,
                   const Tensor& w_uk, const Tensor& cos_sin, const Tensor& positions,
                   const Tensor& slot_mapping, const Tensor& latent_cache,
                   const std::optional<Tensor>& w_q_a, const std::optional<Tensor>& q_a_norm,
                   const std::optional<Tensor>& kv_norm, const std::optional<Tensor>& b_q,
                   const std::optional<Tensor>& b_kv_a, double norm_eps,
                   const std::optional<Tensor>& cache_scales) {
  const Check check("mla_project", hidden);
  check.tensor("hidden", hidden, kFloats, {{"num_tokens"}, {"hidden_size"}}, Strides::kAny);
  const DTypes dtype = {hidden.scalar_type()};
  const int64_t num_tokens = hidden.size(0), hidden_size = hidden.size(1);
  check.tensor("w_uk", w_uk, dtype, {{"num_heads"}, {"qk_nope_head_dim"}, {"kv_lora_rank"}},
               Strides::kDenseLastDim);
  const int64_t num_heads = w_uk.size(0), qk_nope_head_dim = w_uk.size(1);
  const int64_t kv_lora_rank = w_uk.size(2);
  check_cache(check, latent_cache, cache_scales, hidden.scalar_type(), -1);
  const int64_t cache_dim = latent_cache.size(2), qk_rope_head_dim = cache_dim - kv_lora_rank;
  check.number(qk_rope_head_dim >= 0 && qk_rope_head_dim % 2 == 0, "qk_rope_head_dim",
               "even and at least 0: the last dimension of latent_cache less kv_lora_rank",
               qk_rope_head_dim);
  check.number(latent_cache.size(1) > 0, "block_size", "at least 1", latent_cache.size(1));

  Dim q_in = {"hidden_size", hidden_size};
  if (w_q_a) {
    check.tensor("w_q_a", *w_q_a, dtype, {{"q_lora_rank"}, {"hidden_size", hidden_size}},
                 Strides::kAny);
    q_in = {"q_lora_rank", w_q_a->size(0)};
  }
  if (q_a_norm) {
    if (!w_q_a) check.fail("q_a_norm must be None without w_q_a, got a tensor");
    check.tensor("q_a_norm", *q_a_norm, dtype, {q_in});
  }
  if (kv_norm) check.tensor("kv_norm", *kv_norm, dtype, {{"kv_lora_rank", kv_lora_rank}});
  const Dim q_out = {"num_heads * (qk_nope_head_dim + qk_rope_head_dim)",
                     num_heads * (qk_nope_head_dim + qk_rope_head_dim)};
  const Dim kv_a_out = {"kv_lora_rank + qk_rope_head_dim", cache_dim};
  check.tensor("w_q", w_q, dtype, {q_out, q_in}, Strides::kAny);
  check.tensor("w_kv_a", w_kv_a, dtype, {kv_a_out, {"hidden_size", hidden_size}}, Strides::kAny);
  if (b_q) check.tensor("b_q", *b_q, dtype, {q_out});
  if (b_kv_a) check.tensor("b_kv_a", *b_kv_a, dtype, {kv_a_out});
  check.tensor("cos_sin", cos_sin, {ScalarType::Float},
               {{"max_position"}, {"qk_rope_head_dim", qk_rope_head_dim}});
  check.tensor("positions", positions, {ScalarType::Long}, {{"num_tokens", num_tokens}});
  check.tensor("slot_mapping", slot_mapping, {ScalarType::Long}, {{"num_tokens", num_tokens}});

  MlaProjectParams params{};
  params.w_uk = w_uk.const_data_ptr();
  params.kv_norm = kv_norm ? kv_norm->const_data_ptr() : nullptr;
  params.cos_sin = cos_sin.const_data_ptr<float>();
  params.positions = positions.const_data_ptr<int64_t>();
  params.slot_mapping = slot_mapping.const_data_ptr<int64_t>();
  params.latent_cache = latent_cache.mutable_data_ptr();
  params.cache_scales = cache_scales ? cache_scales->mutable_data_ptr<float>() : nullptr;
  params.dtype = dtype_of(hidden);
  params.is_cache_int8 = is_int8(latent_cache);
  params.num_tokens = num_tokens;
  params.num_heads = num_heads;
  params.kv_lora_rank = kv_lora_rank;
  params.qk_nope_head_dim = qk_nope_head_dim;
  params.qk_rope_head_dim = qk_rope_head_dim;
  params.num_blocks = latent_cache.size(0);
  params.block_size = latent_cache.size(1);
  params.max_position = cos_sin.size(0);
  params.w_uk_stride_head = w_uk.stride(0);
  params.w_uk_stride_row = w_uk.stride(1);
  params.cache_stride_block = latent_cache.stride(0);
  params.cache_stride_token = latent_cache.stride(1);
  params.scales_stride_block = cache_scales ? cache_scales->stride(0) : 0;
  params.scales_stride_token = cache_scales ? cache_scales->stride(1) : 0;
  params.norm_eps = static_cast<float>(norm_eps);
  if constexpr (Backend::kOnHost) {
    check_indices(check, "positions", "at least 0 and below max_position", params.positions,
                  num_tokens, 0, params.max_position);
    check_indices(check, "slot_mapping", "below num_blocks * block_size", params.slot_mapping,
                  num_tokens, INT64_MIN, params.num_blocks * params.block_size);
  }
  if (const char* reason = Backend::unsupported(params)) check.fail(reason);

  const Tensor q_a = w_q_a ? linear<Backend>(hidden, *w_q_a, std::nullopt) : hidden;
  if (q_a_norm) {
    RmsNormParams norm{};
    norm.x = norm.out = q_a.mutable_data_ptr();
    norm.weight = q_a_norm->const_data_ptr();
    norm.dtype = params.dtype;
    norm.num_rows = num_tokens;
    norm.dim = q_a.size(1);
    norm.eps = params.norm_eps;
    Backend::launch(norm, q_a);
  }
  const Tensor q_proj = linear<Backend>(q_a, w_q, b_q);
  const Tensor kv_a_proj = linear<Backend>(hidden, w_kv_a, b_kv_a);
  Tensor q = torch::stable::new_empty(hidden, {num_tokens, num_heads, cache_dim});
  params.q_proj = q_proj.const_data_ptr();
  params.kv_a_proj = kv_a_proj.mutable_data_ptr();
  params.q = q.mutable_data_ptr();
  Backend::launch(params, hidden);
  return q;
}

}  // namespace transmla
