#pragma once

#include <tuple>

#include "check.h"
#include "transmla/mla_prefill.h"

namespace transmla {

// For lengths that the host can read: batch_size + 1 of them.
inline void check_cu_seqlens(const Check& check, const std::string& name, const int32_t* cu_seqlens,
                             index_t batch_size, index_t num_tokens) {
  const auto require = [&](bool ok, index_t b, const std::string& expected) {
    if (ok) return;
    check.fail(name + '[' + std::to_string(b) + "] must be " + expected + ", got " +
               std::to_string(cu_seqlens[b]));
  };
  require(cu_seqlens[0] == 0, 0, "0");
  for (index_t b = 1; b <= batch_size; ++b) {
    const int32_t begin = cu_seqlens[b - 1];
    require(cu_seqlens[b] >= begin, b, "at least the number before it=" + std::to_string(begin));
  }
  require(cu_seqlens[batch_size] == num_tokens, batch_size,
          "the number of tokens=" + std::to_string(num_tokens));
}

template <class Backend>
std::tuple<Tensor, Tensor> mla_prefill(const Tensor& q, const Tensor& kv, const Tensor& k_pe,
                                       const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                       double softmax_scale, bool causal, double softcap,
                                       int64_t sliding_window) {
  const Check check("mla_prefill", q);
  check.tensor("q", q, kFloats,
               {{"num_tokens"}, {"num_heads"}, {"qk_nope_head_dim + qk_rope_head_dim"}},
               Strides::kDenseLastDim);
  const int64_t num_tokens = q.size(0), num_heads = q.size(1);
  check.tensor("k_pe", k_pe, {q.scalar_type()}, {{"num_kv_tokens"}, {"qk_rope_head_dim"}},
               Strides::kDenseLastDim);
  const int64_t qk_rope_head_dim = k_pe.size(1), qk_nope_head_dim = q.size(2) - qk_rope_head_dim;
  check.number(qk_nope_head_dim >= 0, "qk_rope_head_dim", "at most the last dimension of q",
               qk_rope_head_dim);
  check.tensor("kv", kv, {q.scalar_type()},
               {{"num_kv_tokens", k_pe.size(0)},
                {"num_heads", num_heads},
                {"qk_nope_head_dim + v_head_dim"}},
               Strides::kDenseLastDim);
  const int64_t v_head_dim = kv.size(2) - qk_nope_head_dim;
  check.number(v_head_dim > 0, "v_head_dim",
               "at least 1: the last dimension of kv less qk_nope_head_dim", v_head_dim);
  check.tensor("cu_seqlens_q", cu_seqlens_q, {ScalarType::Int}, {{"batch_size + 1"}});
  const int64_t batch_size = cu_seqlens_q.size(0) - 1;
  check.number(batch_size >= 0, "batch_size", "at least 0", batch_size);
  check.tensor("cu_seqlens_k", cu_seqlens_k, {ScalarType::Int},
               {{"batch_size + 1", cu_seqlens_q.size(0)}});
  check.number(softcap >= 0, "softcap", "at least 0", softcap);
  check.number(sliding_window >= 0, "sliding_window", "at least 0", sliding_window);
  check.number(causal || sliding_window == 0, "sliding_window", "0 without causal", sliding_window);

  if constexpr (Backend::kOnHost) {
    Tensor out = torch::stable::new_empty(q, {num_tokens, num_heads, v_head_dim});
    Tensor lse = torch::stable::new_empty(q, {num_heads, num_tokens}, ScalarType::Float);

    MlaPrefillParams params{};
    params.q = q.const_data_ptr();
    params.kv = kv.const_data_ptr();
    params.k_pe = k_pe.const_data_ptr();
    params.cu_seqlens_q = cu_seqlens_q.const_data_ptr<int32_t>();
    params.cu_seqlens_k = cu_seqlens_k.const_data_ptr<int32_t>();
    params.out = out.mutable_data_ptr();
    params.lse = lse.mutable_data_ptr<float>();
    params.dtype = dtype_of(q);
    params.batch_size = batch_size;
    params.num_tokens = num_tokens;
    params.num_heads = num_heads;
    params.qk_nope_head_dim = qk_nope_head_dim;
    params.qk_rope_head_dim = qk_rope_head_dim;
    params.v_head_dim = v_head_dim;
    params.q_stride_token = q.stride(0);
    params.q_stride_head = q.stride(1);
    params.kv_stride_token = kv.stride(0);
    params.kv_stride_head = kv.stride(1);
    params.k_pe_stride_token = k_pe.stride(0);
    params.softmax_scale = static_cast<float>(softmax_scale);
    params.softcap = static_cast<float>(softcap);
    params.sliding_window = sliding_window;
    params.causal = causal;
    check_cu_seqlens(check, "cu_seqlens_q", params.cu_seqlens_q, batch_size, num_tokens);
    check_cu_seqlens(check, "cu_seqlens_k", params.cu_seqlens_k, batch_size, kv.size(0));
    Backend::launch(params, q);
    return {out, lse};
  } else {
    check.fail("there is no CUDA kernel; use scaled_dot_product_attention, k_pe in every head");
  }
}

}  // namespace transmla
