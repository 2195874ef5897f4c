// Attention over the whole of a sequence from attention over two disjoint parts of it.
#pragma once

#include "transmla/types.h"

namespace transmla {

struct MergeAttnStatesParams {
  const void* out_a;  // [batch_size, seqlen_q, num_heads, head_dim], contiguous; so is out_b
  const void* out_b;
  const float* lse_a;  // [batch_size, num_heads, seqlen_q], contiguous, natural log; so is lse_b
  const float* lse_b;  // -inf or +inf marks an empty part
  void* out;           // [batch_size, seqlen_q, num_heads, head_dim]
  float* lse;          // [batch_size, num_heads, seqlen_q]
  DType dtype;         // of out_a, out_b and out

  index_t batch_size, seqlen_q, num_heads, head_dim;
};

TRANSMLA_API void merge_attn_states_cpu(const MergeAttnStatesParams& params,
                                        const ParallelFor& parallel_for);

}  // namespace transmla
