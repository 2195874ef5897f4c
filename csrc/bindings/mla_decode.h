#pragma once

#include <tuple>

#include "check.h"
#include "transmla/mla_decode.h"

namespace transmla {

// For a cache that the host can read: block_table entries that the kernel follows.
inline void check_pages(const Check& check, const MlaDecodeParams& p) {
  const index_t capacity = p.max_blocks * p.block_size;
  for (index_t b = 0; b < p.batch_size; ++b) {
    const index_t seqlen = p.cache_seqlens[b];
    if (seqlen < 0 || seqlen > capacity) {
      check.fail("cache_seqlens[" + std::to_string(b) + "] must be between 0 and max_blocks * " +
                 "block_size=" + std::to_string(capacity) + ", got " + std::to_string(seqlen));
    }
    const index_t out_of_window =
        p.sliding_window > 0 ? seqlen - p.seqlen_q + 1 - p.sliding_window : 0;
    for (index_t t = out_of_window > 0 ? out_of_window : 0; t < seqlen;
         t += p.block_size - t % p.block_size) {
      const index_t i = t / p.block_size;
      const int32_t block = p.block_table[b * p.block_table_stride + i];
      if (block < 0 || block >= p.num_blocks) {
        check.fail("block_table[" + std::to_string(b) + ", " + std::to_string(i) +
                   "] must be between 0 and num_blocks - 1=" + std::to_string(p.num_blocks - 1) +
                   ", got " + std::to_string(block));
      }
    }
  }
}

template <class Backend>
std::tuple<Tensor, Tensor> mla_decode(const Tensor& q, const Tensor& latent_cache,
                                      const Tensor& block_table, const Tensor& cache_seqlens,
                                      int64_t kv_lora_rank, double softmax_scale, double softcap,
                                      int64_t sliding_window, int64_t num_splits,
                                      bool batch_invariant,
                                      const std::optional<Tensor>& cache_scales) {
  const Check check("mla_decode", q);
  check.tensor("q", q, kFloats,
               {{"batch_size"}, {"seqlen_q"}, {"num_heads"}, {"kv_lora_rank + qk_rope_head_dim"}},
               Strides::kDenseLastDim);
  const int64_t batch_size = q.size(0), seqlen_q = q.size(1), num_heads = q.size(2);
  check_cache(check, latent_cache, cache_scales, q.scalar_type(), q.size(3));
  check.tensor("block_table", block_table, {ScalarType::Int},
               {{"batch_size", batch_size}, {"max_blocks"}}, Strides::kDenseLastDim);
  check.tensor("cache_seqlens", cache_seqlens, {ScalarType::Int}, {{"batch_size", batch_size}});
  check.number(kv_lora_rank > 0 && kv_lora_rank <= q.size(3), "kv_lora_rank",
               "between 1 and the last dimension of q", kv_lora_rank);
  check.number(softcap >= 0, "softcap", "at least 0", softcap);
  check.number(sliding_window >= 0, "sliding_window", "at least 0", sliding_window);
  check.number(num_splits >= 0, "num_splits", "at least 0", num_splits);
  check.number(latent_cache.size(1) > 0, "block_size", "at least 1", latent_cache.size(1));

  Tensor out = torch::stable::new_empty(q, {batch_size, seqlen_q, num_heads, kv_lora_rank});
  Tensor lse = torch::stable::new_empty(q, {batch_size, num_heads, seqlen_q}, ScalarType::Float);

  MlaDecodeParams params{};
  params.q = q.const_data_ptr();
  params.latent_cache = latent_cache.const_data_ptr();
  params.cache_scales = cache_scales ? cache_scales->const_data_ptr<float>() : nullptr;
  params.block_table = block_table.const_data_ptr<int32_t>();
  params.cache_seqlens = cache_seqlens.const_data_ptr<int32_t>();
  params.out = out.mutable_data_ptr();
  params.lse = lse.mutable_data_ptr<float>();
  params.dtype = dtype_of(q);
  params.is_cache_int8 = is_int8(latent_cache);
  params.batch_size = batch_size;
  params.seqlen_q = seqlen_q;
  params.num_heads = num_heads;
  params.kv_lora_rank = kv_lora_rank;
  params.qk_rope_head_dim = q.size(3) - kv_lora_rank;
  params.num_blocks = latent_cache.size(0);
  params.block_size = latent_cache.size(1);
  params.max_blocks = block_table.size(1);
  params.q_stride_batch = q.stride(0);
  params.q_stride_token = q.stride(1);
  params.q_stride_head = q.stride(2);
  params.cache_stride_block = latent_cache.stride(0);
  params.cache_stride_token = latent_cache.stride(1);
  params.scales_stride_block = cache_scales ? cache_scales->stride(0) : 0;
  params.scales_stride_token = cache_scales ? cache_scales->stride(1) : 0;
  params.block_table_stride = block_table.stride(0);
  params.softmax_scale = static_cast<float>(softmax_scale);
  params.softcap = static_cast<float>(softcap);
  params.sliding_window = sliding_window;
  params.num_splits = num_splits;
  if (batch_invariant && num_splits == 0) params.split_size = kBatchInvariantSplitSize;
  if constexpr (Backend::kOnHost) check_pages(check, params);
  if (const char* reason = Backend::unsupported(params)) check.fail(reason);
  Backend::launch(params, q);
  return {out, lse};
}

}  // namespace transmla
