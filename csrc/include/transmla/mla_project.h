// What follows the projection GEMMs of an MLA layer: split, RMSNorm, RoPE, absorb, cache append.
#pragma once

#include "transmla/types.h"

namespace transmla {

struct MlaProjectParams {
  const void* q_proj;  // [num_tokens, num_heads, qk_nope_head_dim + qk_rope_head_dim], contiguous
  void* kv_a_proj;  // [num_tokens, kv_lora_rank + qk_rope_head_dim], contiguous; overwritten if the
                    // cache is int8
  const void* w_uk;             // [num_heads, qk_nope_head_dim, kv_lora_rank], last dimension dense
  const void* kv_norm;          // [kv_lora_rank] RMSNorm weight of the latent, or nullptr
  const float* cos_sin;         // [max_position, qk_rope_head_dim], contiguous: cosines, then sines
  const int64_t* positions;     // [num_tokens], rows of cos_sin
  const int64_t* slot_mapping;  // [num_tokens], block * block_size + offset; negative: not stored
  void* q;              // [num_tokens, num_heads, kv_lora_rank + qk_rope_head_dim], contiguous
  void* latent_cache;   // [num_blocks, block_size, kv_lora_rank + qk_rope_head_dim]
  float* cache_scales;  // nullptr, or latent_cache is of one-byte numbers over their scales:
                        // float8_e4m3fn over [num_blocks, block_size], dense rows (CUDA), or
                        // int8 over [num_blocks, block_size, 2], latent and RoPE key (CPU)
  DType dtype;          // of every tensor whose type is void, but for such a cache
  bool is_cache_int8;

  index_t num_tokens, num_heads, kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim;
  index_t num_blocks, block_size, max_position;
  // Strides in elements: a slice of kv_b_proj.weight is used in place.
  index_t w_uk_stride_head, w_uk_stride_row;
  index_t cache_stride_block, cache_stride_token, scales_stride_block;
  index_t scales_stride_token;  // of an int8 cache

  float norm_eps;  // added to the mean square of the latent
};

// Rounded to dtype before the weight, as Llama, DeepSeek and their kin do; also the norm between
// the two factors of a query projection, where there are two.
struct RmsNormParams {
  const void* x;       // [num_rows, dim], contiguous
  const void* weight;  // [dim]
  void* out;           // [num_rows, dim], contiguous; may be x
  DType dtype;         // of all three

  index_t num_rows, dim;
  float eps;  // added to the mean square
};

TRANSMLA_API void rms_norm_cpu(const RmsNormParams& params, const ParallelFor& parallel_for);

// nullptr, or why the kernel cannot do this.
TRANSMLA_API const char* mla_project_unsupported(const MlaProjectParams& params);

// RoPE pairs are interleaved, as in DeepSeek's checkpoints and vLLM: (2j, 2j + 1) turns by position
// * frequency j.
TRANSMLA_API void mla_project_cpu(const MlaProjectParams& params, const ParallelFor& parallel_for);

}  // namespace transmla
