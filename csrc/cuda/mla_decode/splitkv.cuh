// Absorbed MLA decode for tensor cores of sm_80 and later, in latent-sliced warps.
//
// A block takes up to 48 query rows (token, head) of one sequence and goes through its part of the
// tokens, 32 at a time. Warp w owns columns [64 w, 64 w + 64) of the cache in both products:
//
//   scores = sum over warps of q[:, slice] cache[:, slice]^T      partial sums: in shared memory
//   out[:, slice] += softmax(scores) cache[:, slice]
//
// so every byte of the cache comes from HBM once, is written to shared memory once and is read
// there twice, by the warp that copied it: the ring of tiles needs no barrier, and the block has
// two per tile, around the softmax. The last 64 columns, RoPE key only, are shared out 16 each to
// warps 0..3: two warps of a scheduler then have 9 sixteenths between them, whichever scheduler it
// is.
#pragma once

#include <climits>

#include "cuda/common/mma.cuh"
#include "cuda/mla_decode/softmax.cuh"
#include "cuda/mla_decode/tiles.cuh"

namespace transmla {

// What a warp of a block does. `Tiles` says how its slice of the cache comes to shared memory.
template <class T, int kRowTiles, int kWarps, class Tiles>
class SplitKv {
 public:
  static constexpr int kRows = 16 * kRowTiles;
  static constexpr int kThreads = 32 * kWarps;

  // Follows the ring, whose slices have to be aligned more.
  struct Shared {
    float partial_scores[kWarps][kRows * kScorePitch];  // q's slices, until they are in registers
    char tail_queries[kTailWarps][kRows * kTailBytes];
    char probabilities[kRows * kTileTokens * 2];
    float correction[kRows];  // of what is in out_, for the new maximum
    float scale[kRows];       // of the result
    float top[kRows];         // the largest score so far
    int seen_end[kRows];      // the first token that a row does not see
    uint64_t barriers[kWarps * kMaxStages];
  };
  static_assert(sizeof(Shared) == splitkv_shared_bytes(kRows, kWarps));
  static_assert(sizeof(float) * kScorePitch >= kSliceBytes);

  __device__ static Shared& shared_after(char* ring, const MlaDecodePlan& plan) {
    return *reinterpret_cast<Shared*>(ring + Tiles::kWidenedBytes +
                                      plan.num_stages * Tiles::kStageBytes);
  }

  __device__ SplitKv(const MlaDecodeParams& p, const MlaDecodePlan& plan, Shared& shared,
                     int row_block, int warp, int lane, const Tiles& tiles)
      : p_(p),
        plan_(plan),
        shared_(shared),
        warp_(warp),
        lane_(lane),
        has_values_(warp * kSliceColumns < p.kv_lora_rank),
        has_tail_(warp < kTailWarps),
        first_row_(row_block * kRows),
        num_rows_(static_cast<int>(p.seqlen_q * p.num_heads)),
        partial_(shared_address(shared_.partial_scores[warp])),
        tail_queries_(shared_address(shared_.tail_queries[warp % kTailWarps])),
        tiles_(tiles) {}

  __device__ void run() {
    Pieces pieces(p_, plan_);
    Piece piece;
    bool more = pieces.next(piece);
    if (more) start(piece);
    while (more) {
      attend();
      const Piece done = piece;
      more = pieces.next(piece);
      // The next piece's first tiles are on their way while this one is written.
      if (more) start(piece);
      write(done);
    }
  }

 private:
  static constexpr int kColumns = kWarps * kSliceColumns;  // the tail follows
  static constexpr int kSteps = kSliceColumns / 16;        // of the depth of a product
  // Sums in registers at a time: all, except where that many would be spilled.
  static constexpr int kTokensAtOnce = kRowTiles == 3 ? 16 : 32;
  static constexpr int kRounds = (kRows * 8 + kThreads - 1) / kThreads;  // of the softmax

  // Starts the copies of the rows of q and of the first tiles.
  __device__ void start(const Piece& piece) {
    copy_queries(piece.batch);
    commit_copies();
    tiles_.start(piece);
  }

  __device__ void attend() {
    tiles_.wait_for_older();
    __syncwarp();
    load_queries();
    reset();
#pragma unroll 1
    for (int tile = tiles_.piece().tiles.begin; tile < tiles_.piece().tiles.end; ++tile) {
      tiles_.wait(tile);
      // Also: every lane is done with the stage that is filled next.
      __syncwarp();
      tiles_.copy(tile + plan_.num_stages - 1, tiles_.stage(plan_.num_stages - 1));
      score();
      __syncthreads();
      softmax(tile);
      __syncthreads();
      if (has_values_) accumulate();
      tiles_.advance();
    }
    finish_softmax();
    __syncthreads();
  }

  // Writes the slice of this warp, through the stage that no copy is under way to.
  __device__ void write(const Piece& piece) {
    if (!has_values_) return;
    if (piece.slot < 0) {
      write_out(piece.batch);
    } else {
      write_part(piece.slot);
    }
  }

  __device__ void copy_queries(int batch) const {
    const T* q = static_cast<const T*>(p_.q) + batch * p_.q_stride_batch;
    const auto row_of_q = [&](int row) {
      const int index = min(first_row_ + row, num_rows_ - 1);
      const int num_heads = static_cast<int>(p_.num_heads);
      return q + index / num_heads * p_.q_stride_token + index % num_heads * p_.q_stride_head;
    };
#pragma unroll
    for (int i = 0; i < kRows / 4; ++i) {
      const int row = lane_ / 8 + 4 * i;
      copy_async(partial_ + swizzle<kSliceBytes>(row, lane_ % 8),
                 row_of_q(row) + warp_ * kSliceColumns + lane_ % 8 * 8,
                 first_row_ + row < num_rows_);
    }
    if (has_tail_) {
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        const int row = lane_ / 2 + 16 * i;
        copy_async(tail_queries_ + swizzle<kTailBytes>(row, lane_ % 2),
                   row_of_q(row) + kColumns + warp_ * kTailColumns + lane_ % 2 * 8,
                   first_row_ + row < num_rows_);
      }
    }
  }

  __device__ void load_queries() {
    const int row = lane_ % 16, half = lane_ / 16;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        load_matrices(q_[step][i], partial_ + swizzle<kSliceBytes>(i * 16 + row, step * 2 + half));
      }
    }
    __syncwarp();
  }

  __device__ void reset() {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int j = 0; j < kSliceColumns / 8; ++j) {
#pragma unroll
        for (int k = 0; k < 4; ++k) out_[i][j][k] = 0;
      }
    }
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      const int row = softmax_row(i);
      if (row < kRows && threadIdx.x % 8 == 0) {
        shared_.top[row] = -INFINITY;
        shared_.seen_end[row] = end_of_seen(p_, tiles_.piece().tokens.end, first_row_ + row);
      }
      total_[i] = 0;
    }
  }

  // partial_scores [rows, 32] of this warp's columns.
  __device__ void score() {
    const uint32_t slice = tiles_.slice(tiles_.stage()), tail = tiles_.tail(tiles_.stage());
    const int token = lane_ / 16 * 8 + lane_ % 8, half = lane_ / 8 % 2;
#pragma unroll
    for (int first = 0; first < kTileTokens; first += kTokensAtOnce) {
      float sum[kRowTiles][kTokensAtOnce / 8][4] = {};
      const auto add_step = [&](const uint32_t (&q)[kRowTiles][4], auto key_address) {
#pragma unroll
        for (int j = 0; j < kTokensAtOnce / 8; j += 2) {
          uint32_t keys[4];
          load_matrices(keys, key_address(first + j * 8 + token));
#pragma unroll
          for (int i = 0; i < kRowTiles; ++i) {
            multiply_add<T>(sum[i][j], q[i], keys[0], keys[1]);
            multiply_add<T>(sum[i][j + 1], q[i], keys[2], keys[3]);
          }
        }
      };
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        add_step(q_[step],
                 [&](int row) { return slice + swizzle<kSliceBytes>(row, step * 2 + half); });
      }
      if (has_tail_) {
        uint32_t q[kRowTiles][4];
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          load_matrices(q[i], tail_queries_ + swizzle<kTailBytes>(i * 16 + lane_ % 16, lane_ / 16));
        }
        add_step(q, [&](int row) { return tail + swizzle<kTailBytes>(row, half); });
      }
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
        for (int j = 0; j < kTokensAtOnce / 8; ++j) {
          float* to = shared_.partial_scores[warp_] + (i * 16 + lane_ / 4) * kScorePitch + first +
                      j * 8 + lane_ % 4 * 2;
          *reinterpret_cast<float2*>(to) = make_float2(sum[i][j][0], sum[i][j][1]);
          to += 8 * kScorePitch;
          *reinterpret_cast<float2*>(to) = make_float2(sum[i][j][2], sum[i][j][3]);
        }
      }
    }
  }

  // Eight threads have a row, four tokens each; with fewer threads than that, in rounds.
  __device__ int softmax_row(int round) const { return threadIdx.x / 8 + round * kThreads / 8; }

  __device__ void softmax(int tile) {
    const int column = threadIdx.x % 8 * 4;
    const bool has_softcap = p_.softcap > 0;
    const int window = p_.sliding_window > 0 && p_.sliding_window < INT_MAX
                           ? static_cast<int>(p_.sliding_window)
                           : INT_MAX;
    const float scale = has_softcap ? p_.softmax_scale / p_.softcap : p_.softmax_scale * kLog2E;
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const int row = softmax_row(round);
      if (row >= kRows) break;
      float4 sum = {};
#pragma unroll
      for (int i = 0; i < kWarps; ++i) {
        const float4 part = *reinterpret_cast<const float4*>(shared_.partial_scores[i] +
                                                             row * kScorePitch + column);
        sum = {sum.x + part.x, sum.y + part.y, sum.z + part.z, sum.w + part.w};
      }
      const float4 tokens = tiles_.scales(column);
      float x[4] = {sum.x * tokens.x * scale, sum.y * tokens.y * scale, sum.z * tokens.z * scale,
                    sum.w * tokens.w * scale};
      if (has_softcap) {
#pragma unroll
        for (float& score : x) score = tanh_fast(score) * (p_.softcap * kLog2E);
      }
      const float old_top = shared_.top[row];
      float top = old_top;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = tile * kTileTokens + column + i;
        const int distance = shared_.seen_end[row] - token;
        x[i] = distance > 0 && distance <= window ? x[i] : -INFINITY;
        top = fmaxf(top, x[i]);
      }
#pragma unroll
      for (int distance = 1; distance < 8; distance *= 2) {
        top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, distance));
      }
      // A row that has seen nothing yet is shifted by 0: -inf - -inf is NaN.
      const float shift = top == -INFINITY ? 0 : top;
      const float correction = exp2_fast(old_top - shift);
#pragma unroll
      for (float& score : x) score = exp2_fast(score - shift);
      total_[round] = total_[round] * correction + ((x[0] + x[1]) + (x[2] + x[3]));
      *reinterpret_cast<uint2*>(shared_.probabilities + swizzle<kTileTokens * 2>(row, column / 8) +
                                column % 8 * 2) =
          make_uint2(pack<T>(x[0] * tokens.x, x[1] * tokens.y),
                     pack<T>(x[2] * tokens.z, x[3] * tokens.w));
      if (column == 0) {
        shared_.correction[row] = correction;
        shared_.top[row] = top;
      }
    }
  }

  // out_ = out_ * correction + probabilities [rows, 32] cache [32, slice]
  __device__ void accumulate() {
    const uint32_t slice = tiles_.slice(tiles_.stage());
    const uint32_t probabilities = shared_address(shared_.probabilities);
    const int row = lane_ % 16, half = lane_ / 16;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      const float upper = shared_.correction[i * 16 + lane_ / 4];
      const float lower = shared_.correction[i * 16 + lane_ / 4 + 8];
#pragma unroll
      for (int j = 0; j < kSliceColumns / 8; ++j) {
        out_[i][j][0] *= upper;
        out_[i][j][1] *= upper;
        out_[i][j][2] *= lower;
        out_[i][j][3] *= lower;
      }
    }
#pragma unroll
    for (int step = 0; step < kTileTokens / 16; ++step) {
      uint32_t p[kRowTiles][4], values[4];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        load_matrices(p[i],
                      probabilities + swizzle<kTileTokens * 2>(i * 16 + row, step * 2 + half));
      }
#pragma unroll
      for (int j = 0; j < kSliceColumns / 8; j += 2) {
        load_matrices_transposed(values, slice + swizzle<kSliceBytes>(step * 16 + row, j + half));
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          multiply_add<T>(out_[i][j], p[i], values[0], values[1]);
          multiply_add<T>(out_[i][j + 1], p[i], values[2], values[3]);
        }
      }
    }
  }

  // The scale of each row of out_, and its lse.
  __device__ void finish_softmax() {
    const PartResults parts(p_, plan_);
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const int row = softmax_row(round);
      if (row >= kRows) break;
      float total = total_[round];
#pragma unroll
      for (int distance = 1; distance < 8; distance *= 2) {
        total += __shfl_xor_sync(kAllLanes, total, distance);
      }
      if (threadIdx.x % 8 != 0) continue;
      shared_.scale[row] = total == 0 ? 0 : 1 / total;
      const int index = first_row_ + row;
      if (index >= num_rows_) continue;
      const float lse = lse_of(shared_.top[row], total);
      if (tiles_.piece().slot < 0) {
        p_.lse[lse_index(p_, tiles_.piece().batch, index)] = lse * kLn2;
      } else {
        parts.lse[index_t{tiles_.piece().slot} * num_rows_ + index] = lse;
      }
    }
  }

  __device__ void write_part(int slot) const {
    float* out = PartResults(p_, plan_).out +
                 (index_t{slot} * num_rows_ + first_row_) * p_.kv_lora_rank + warp_ * kSliceColumns;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = i * 16 + half * 8 + lane_ / 4;
        if (first_row_ + row >= num_rows_) continue;
        const float scale = shared_.scale[row];
#pragma unroll
        for (int j = 0; j < kSliceColumns / 8; ++j) {
          // By name: of plain stores the compiler splits a few.
          __stcg(reinterpret_cast<float2*>(out + row * p_.kv_lora_rank + j * 8 + lane_ % 4 * 2),
                 make_float2(out_[i][j][half * 2] * scale, out_[i][j][half * 2 + 1] * scale));
        }
      }
    }
  }

  // Sixteen rows at a time through shared memory: stores are then of whole 128-byte lines.
  __device__ void write_out(int batch) const {
    T* out = static_cast<T*>(p_.out) + (index_t{batch} * num_rows_ + first_row_) * p_.kv_lora_rank +
             warp_ * kSliceColumns;
    const uint32_t slice = tiles_.slice(tiles_.stage(plan_.num_stages - 1));
    char* staging = static_cast<char*>(__cvta_shared_to_generic(slice));
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = half * 8 + lane_ / 4;
        const float scale = shared_.scale[i * 16 + row];
#pragma unroll
        for (int j = 0; j < kSliceColumns / 8; ++j) {
          *reinterpret_cast<uint32_t*>(staging + swizzle<kSliceBytes>(row, j) + lane_ % 4 * 4) =
              pack<T>(out_[i][j][half * 2] * scale, out_[i][j][half * 2 + 1] * scale);
        }
      }
      __syncwarp();
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int row = lane_ / 8 + 4 * j;
        if (first_row_ + i * 16 + row >= num_rows_) continue;
        *reinterpret_cast<uint4*>(out + (i * 16 + row) * p_.kv_lora_rank + lane_ % 8 * 8) =
            *reinterpret_cast<const uint4*>(staging + swizzle<kSliceBytes>(row, lane_ % 8));
      }
      __syncwarp();
    }
    tiles_.fence();
  }

  const MlaDecodeParams& p_;
  const MlaDecodePlan& plan_;
  Shared& shared_;
  const int warp_, lane_;
  const bool has_values_, has_tail_;
  const int first_row_, num_rows_;
  const uint32_t partial_, tail_queries_;

  Tiles tiles_;
  uint32_t q_[kSteps][kRowTiles][4];  // the tail's would be too many for 48 rows
  float out_[kRowTiles][kSliceColumns / 8][4];
  float total_[kRounds];  // this thread's share of the sum of each round's row
};

// One block attends one block of rows to one part; see Pieces for what a part is.
template <class T, int kRowTiles, int kWarps, class Tiles>
__device__ __forceinline__ void attend_by_cp_async(const MlaDecodeParams& p,
                                                   const MlaDecodePlan& plan) {
  using Block = SplitKv<T, kRowTiles, kWarps, Tiles>;
  extern __shared__ __align__(1024) char ring[];
  auto& shared = Block::shared_after(ring, plan);
  // By a shuffle, the compiler sees that a warp does not diverge by it.
  const int warp = __shfl_sync(kAllLanes, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  Block(p, plan, shared, blockIdx.x % plan.num_row_blocks, warp, lane,
        Tiles(p, plan, ring, warp, lane))
      .run();
}

template <class T, int kRowTiles, int kWarps>
__global__ void __launch_bounds__(kWarps * 32, 8 / kWarps)
    mla_decode_splitkv_sm80_kernel(const __grid_constant__ MlaDecodeParams p,
                                   const __grid_constant__ MlaDecodePlan plan) {
  attend_by_cp_async<T, kRowTiles, kWarps, TilesSm80<T, kWarps>>(p, plan);
}

template <class T, int kRowTiles, int kWarps>
__global__ void __launch_bounds__(kWarps * 32, 8 / kWarps)
    mla_decode_splitkv_fp8_kernel(const __grid_constant__ MlaDecodeParams p,
                                  const __grid_constant__ MlaDecodePlan plan) {
  attend_by_cp_async<T, kRowTiles, kWarps, TilesFp8<T, kWarps>>(p, plan);
}

template <class T, int kRowTiles, int kWarps>
__global__ void __launch_bounds__(kWarps * 32, 8 / kWarps)
    mla_decode_splitkv_sm90_kernel(const __grid_constant__ MlaDecodeParams p,
                                   const __grid_constant__ MlaDecodePlan plan,
                                   const __grid_constant__ CUtensorMap slices,
                                   const __grid_constant__ CUtensorMap tails) {
#if __CUDA_ARCH__ >= 900
  using Tiles = TilesSm90<kWarps>;
  using Block = SplitKv<T, kRowTiles, kWarps, Tiles>;
  extern __shared__ __align__(1024) char ring[];
  auto& shared = Block::shared_after(ring, plan);
  const int warp = __shfl_sync(kAllLanes, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  Block(p, plan, shared, blockIdx.x % plan.num_row_blocks, warp, lane,
        Tiles(p, plan, ring, warp, lane, shared.barriers, &slices, &tails))
      .run();
#endif
}

}  // namespace transmla
