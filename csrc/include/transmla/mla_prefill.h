// Attention of new tokens over expanded keys and values, whose RoPE part all heads share.
#pragma once

#include "transmla/types.h"

namespace transmla {

struct MlaPrefillParams {
  const void* q;                // [num_tokens, num_heads, qk_nope_head_dim + qk_rope_head_dim]
  const void* kv;               // [num_kv_tokens, num_heads, qk_nope_head_dim + v_head_dim]
  const void* k_pe;             // [num_kv_tokens, qk_rope_head_dim]
  const int32_t* cu_seqlens_q;  // [batch_size + 1]: sequence b has tokens [b] up to [b + 1] of q,
  const int32_t* cu_seqlens_k;  // [batch_size + 1]: and of kv and k_pe
  void* out;                    // [num_tokens, num_heads, v_head_dim], contiguous
  float* lse;                   // [num_heads, num_tokens], contiguous, natural log
  DType dtype;                  // of q, kv, k_pe and out

  index_t batch_size, num_tokens, num_heads, qk_nope_head_dim, qk_rope_head_dim, v_head_dim;
  // Strides in elements; the last dimension is dense.
  index_t q_stride_token, q_stride_head, kv_stride_token, kv_stride_head, k_pe_stride_token;

  float softmax_scale;     // applied to q·k before the softmax
  float softcap;           // scores become softcap * tanh(score / softcap); 0 is off
  index_t sliding_window;  // a query sees itself and sliding_window - 1 tokens before it; 0 is off
  bool causal;             // the queries are the last tokens of kv; else each sees all of kv

  void* workspace;  // mla_prefill_cpu_workspace_size() bytes, 64-byte aligned
};

// It does not depend on the lengths of the sequences.
TRANSMLA_API size_t mla_prefill_cpu_workspace_size(const MlaPrefillParams& params, int num_threads);
TRANSMLA_API void mla_prefill_cpu(const MlaPrefillParams& params, const ParallelFor& parallel_for);

}  // namespace transmla
