// Absorbed MLA decode for whatever splitkv does not take: fp32, any kv_lora_rank,
// qk_rope_head_dim, block_size and strides, of fp8 too. Simple first.
#pragma once

#include "cuda/common/dtype.cuh"
#include "cuda/mla_decode/parts.cuh"

namespace transmla {

// One block attends one row (token, head) to one part, a tile of tokens at a time.
template <class T, class Cached>
__global__ void __launch_bounds__(kGeneralThreads, kGeneralBlocksPerSm)
    mla_decode_general_kernel(const __grid_constant__ MlaDecodeParams p,
                              const __grid_constant__ MlaDecodePlan plan) {
  extern __shared__ float shared_floats[];
  const int rank = static_cast<int>(p.kv_lora_rank);
  const int dim = rank + static_cast<int>(p.qk_rope_head_dim);
  const int num_heads = static_cast<int>(p.num_heads);
  const int block_size = static_cast<int>(p.block_size);
  float* q = shared_floats;            // [dim]
  float* sums = q + dim;               // [rank]
  float* probabilities = sums + rank;  // [kTileTokens], scores at first
  const float scale = p.softcap > 0 ? p.softmax_scale / p.softcap : p.softmax_scale * kLog2E;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row = blockIdx.x % plan.num_row_blocks;

  Pieces pieces(p, plan);
  Piece piece;
  while (pieces.next(piece)) {
    const T* q_row = static_cast<const T*>(p.q) + piece.batch * p.q_stride_batch +
                     row / num_heads * p.q_stride_token + row % num_heads * p.q_stride_head;
    const int32_t* blocks = p.block_table + piece.batch * p.block_table_stride;
    const auto cached = [&](int token) {
      return static_cast<const Cached*>(p.latent_cache) +
             blocks[token / block_size] * p.cache_stride_block +
             token % block_size * p.cache_stride_token;
    };
    const auto scale_of = [&](int token) {
      if constexpr (std::is_same_v<Cached, T>) {
        return 1.f;
      } else {
        const index_t block = blocks[token / block_size];
        return p.cache_scales[block * p.scales_stride_block + token % block_size];
      }
    };
    for (int i = threadIdx.x; i < dim; i += kGeneralThreads) q[i] = to_float(q_row[i]);
    for (int i = threadIdx.x; i < rank; i += kGeneralThreads) sums[i] = 0;
    __syncthreads();

    const int seen_end = end_of_seen(p, piece.tokens.end, row);
    const index_t seen_begin = p.sliding_window > 0 ? seen_end - p.sliding_window : 0;
    float top = -INFINITY, total = 0;
    for (int tile = piece.tiles.begin; tile < piece.tiles.end; ++tile) {
      const int begin = static_cast<int>(max(seen_begin, index_t{tile} * kTileTokens));
      const int end = min(seen_end, (tile + 1) * kTileTokens);
      if (begin >= end) continue;
      for (int token = begin + warp; token < end; token += kGeneralThreads / 32) {
        const Cached* key = cached(token);
        float score = 0;
        for (int i = lane; i < dim; i += 32) score += q[i] * to_float(key[i]);
        score = warp_sum(score);
        if (lane == 0) probabilities[token - begin] = score;
      }
      __syncthreads();
      float score = -INFINITY, token_scale = 0;
      if (lane < end - begin) {
        token_scale = scale_of(begin + lane);
        score = probabilities[lane] * token_scale * scale;
        if (p.softcap > 0) score = tanhf(score) * (p.softcap * kLog2E);
      }
      const float old_top = top;
      top = fmaxf(top, warp_max(score));
      // All scores may be -inf: then nothing is shifted, as -inf - -inf is NaN.
      const float shift = top == -INFINITY ? 0 : top;
      const float probability = exp2f(score - shift);
      const float correction = exp2f(old_top - shift);
      total = total * correction + warp_sum(probability);
      __syncthreads();
      if (warp == 0) probabilities[lane] = probability * token_scale;
      __syncthreads();
      for (int i = threadIdx.x; i < rank; i += kGeneralThreads) {
        float sum = sums[i] * correction;
        for (int token = begin; token < end; ++token) {
          sum += probabilities[token - begin] * to_float(cached(token)[i]);
        }
        sums[i] = sum;
      }
      __syncthreads();
    }

    const float inverse = total == 0 ? 0 : 1 / total;
    const index_t num_rows = p.seqlen_q * p.num_heads;
    const float lse = lse_of(top, total);
    if (piece.slot < 0) {
      T* out = static_cast<T*>(p.out) + (piece.batch * num_rows + row) * rank;
      for (int i = threadIdx.x; i < rank; i += kGeneralThreads) assign(out[i], sums[i] * inverse);
      if (threadIdx.x == 0) p.lse[lse_index(p, piece.batch, row)] = lse * kLn2;
    } else {
      const PartResults parts(p, plan);
      const index_t index = piece.slot * num_rows + row;
      for (int i = threadIdx.x; i < rank; i += kGeneralThreads) {
        parts.out[index * rank + i] = sums[i] * inverse;
      }
      if (threadIdx.x == 0) parts.lse[index] = lse;
    }
  }
}

}  // namespace transmla
