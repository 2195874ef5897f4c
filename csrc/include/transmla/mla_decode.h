// Absorbed MLA attention of new queries over a paged latent cache.
#pragma once

#include "transmla/types.h"

namespace transmla {

struct MlaDecodeParams {
  const void* q;               // [batch_size, seqlen_q, num_heads, kv_lora_rank + qk_rope_head_dim]
  const void* latent_cache;    // [num_blocks, block_size, kv_lora_rank + qk_rope_head_dim]
  const float* cache_scales;   // nullptr, or latent_cache is of one-byte numbers over their scales:
                               // float8_e4m3fn over [num_blocks, block_size], dense rows (CUDA), or
                               // int8 over [num_blocks, block_size, 2], latent and RoPE key (CPU)
  const int32_t* block_table;  // [batch_size, max_blocks]; entries past the end are never read
  const int32_t* cache_seqlens;  // [batch_size]; tokens in the cache, the seqlen_q new included
  void* out;                     // [batch_size, seqlen_q, num_heads, kv_lora_rank], contiguous
  float* lse;                    // [batch_size, num_heads, seqlen_q], contiguous, natural log
  DType dtype;                   // of q, out and, without cache_scales, latent_cache
  bool is_cache_int8;

  index_t batch_size, seqlen_q, num_heads, kv_lora_rank, qk_rope_head_dim;
  index_t num_blocks, block_size, max_blocks;
  // Strides in elements; the last dimension is dense.
  index_t q_stride_batch, q_stride_token, q_stride_head;
  index_t cache_stride_block, cache_stride_token, scales_stride_block;
  index_t scales_stride_token;  // of an int8 cache
  index_t block_table_stride;

  float softmax_scale;     // applied to q·k before the softmax
  float softcap;           // scores become softcap * tanh(score / softcap); 0 is off
  index_t sliding_window;  // a query sees itself and sliding_window - 1 tokens before it; 0 is off
  index_t num_splits;      // parts each sequence is cut into, at least 1: plan_splits() knows;
                           // CUDA takes 0, equal shares of the whole batch
  index_t split_size;      // > 0: parts of this many tokens instead, whatever the batch is

  void* workspace;  // mla_decode_{cpu,cuda}_workspace_size() bytes, 64-byte aligned
};

// Tokens a part of the batch-invariant mode has.
constexpr index_t kBatchInvariantSplitSize = 1024;

// Parts worth cutting each sequence into so that every worker has something to do.
TRANSMLA_API int plan_splits(index_t batch_size, index_t num_rows, index_t max_seqlen,
                             int num_workers);

// nullptr, or why the kernel cannot do this shape.
TRANSMLA_API const char* mla_decode_unsupported(const MlaDecodeParams& params);
// Reads cache_seqlens.
TRANSMLA_API size_t mla_decode_cpu_workspace_size(const MlaDecodeParams& params, int num_threads);
TRANSMLA_API void mla_decode_cpu(const MlaDecodeParams& params, const ParallelFor& parallel_for);

}  // namespace transmla
