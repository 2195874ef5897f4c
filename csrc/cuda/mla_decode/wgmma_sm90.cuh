// Absorbed MLA decode for sm_90a: 64 query rows at a time, in twin warpgroups.
//
// A block takes up to 64 query rows (token, head) of one sequence and goes through its part of the
// tokens, 64 at a time. A warp of its own has TMA bring them into a ring of two tiles. Two groups
// of four warps both compute all scores, and each one half of the columns of the result:
//
//   scores        = q cache^T                          36 wgmma of 64 x 64 x 16
//   out[:, half] += softmax(scores) cache[:, half]      4 wgmma of 64 x 256 x 16
//
// Probabilities stay in the registers they are computed in, which is where the second product takes
// them from, and no group waits for the other: one has its softmax while the other multiplies.
// Scores that are computed twice keep an H100's tensor cores busy for 65 % of the time that its HBM
// takes for the tile, by arithmetic. Computed once it were 43 %, and an exchange with barriers.
#pragma once

#include "cuda/common/shared_memory.cuh"
#include "cuda/common/tma.cuh"
#include "cuda/common/wgmma.cuh"
#include "cuda/mla_decode/softmax.cuh"

namespace transmla {
namespace wgmma_sm90 {

constexpr int kGroupThreads = 128, kGroups = 2;
constexpr int kThreads = kWgmmaWarps * 32;
constexpr int kRank = 512, kSlices = kRank / 64 + 1;  // of 64 columns, the last is the RoPE key
constexpr int kColumns = kRank / kGroups;             // of the result, that a group has
constexpr int kTokens = 64, kBoxTokens = 16;          // of a tile; of one copy: no page has fewer
constexpr int kAcross = kAtomBytes, kDown = kSlices * kAtomBytes;  // from atom to atom of a tile

struct Tile {
  char atoms[kTokens / 8][kSlices][kAtomBytes];
};

struct Shared {
  Tile q;
  Tile ring[kWgmmaStages];
  char staging[kGroups * 4][kAtomBytes];  // of a warp
  uint64_t full[kWgmmaStages], empty[kWgmmaStages];
};
static_assert(sizeof(Shared) == kWgmmaSharedBytes);

// A tile in the ring, and the parity of the ring's current round.
struct Place {
  int stage = 0;
  int parity = 0;

  __device__ void advance() {
    if (++stage < kWgmmaStages) return;
    stage = 0;
    parity ^= 1;
  }
};

constexpr int kTileStep = kTokens / kTileTokens;  // a piece may begin or end with half a tile

// Tokens of the sequence that the piece has.
__device__ inline Range tokens_of(const Piece& piece) {
  return {max(piece.tokens.begin, piece.tiles.begin * kTileTokens),
          min(piece.tokens.end, piece.tiles.end * kTileTokens)};
}

// What the copying warp does: lanes 0..3 ask for 16 tokens each.
__device__ inline void copy_tiles(const MlaDecodeParams& p, const MlaDecodePlan& plan,
                                  const CUtensorMap& cache, Shared& shared) {
  const int lane = threadIdx.x % 32;
  const int block_size = static_cast<int>(p.block_size);
  Place place;
  Piece piece;
  for (Pieces pieces(p, plan); pieces.next(piece);) {
    const Range tokens = tokens_of(piece);
    const int32_t* table = p.block_table + piece.batch * p.block_table_stride;
    for (int tile = piece.tiles.begin; tile < piece.tiles.end; tile += kTileStep) {
      const int token = tile * kTileTokens + lane % 4 * kBoxTokens;
      const bool is_visible = token + kBoxTokens > tokens.begin && token < tokens.end;
      // Past the last block there are zeros, which cost no traffic.
      const int block = is_visible ? table[token / block_size] : static_cast<int>(p.num_blocks);
      const uint32_t full = shared_address(&shared.full[place.stage]);
      wait_for_phase(shared_address(&shared.empty[place.stage]), place.parity ^ 1);
      if (lane == 0) expect_bytes(full, sizeof(Tile));
      __syncwarp();
      if (lane < kTokens / kBoxTokens) {
        copy_box_of_five(shared_address(shared.ring[place.stage].atoms[lane * kBoxTokens / 8]),
                         &cache, block, token % block_size / 8, full);
      }
      place.advance();
    }
  }
}

// One of the two groups of warps that compute.
template <class T>
class Group {
 public:
  __device__ Group(const MlaDecodeParams& p, const MlaDecodePlan& plan, Shared& shared)
      : p_(p),
        plan_(plan),
        shared_(shared),
        // By a shuffle, the compiler sees that a warp does not diverge by it.
        warp_(__shfl_sync(kAllLanes, threadIdx.x / 32, 0)),
        lane_(threadIdx.x % 32),
        group_(warp_ / 4),
        first_row_(blockIdx.x % plan.num_row_blocks * kWgmmaRows),
        num_rows_(static_cast<int>(p.seqlen_q * p.num_heads)) {}

  // Starts the copy of q. The tiles are the other warp's.
  __device__ void start(const Piece& piece) const {
    sync_groups();  // the other group may still multiply by the q of the piece before
    const T* q = static_cast<const T*>(p_.q) + piece.batch * p_.q_stride_batch;
    const int num_heads = static_cast<int>(p_.num_heads);
#pragma unroll
    for (int row = threadIdx.x / 8; row < kWgmmaRows; row += kGroups * kGroupThreads / 8) {
      const int index = min(first_row_ + row, num_rows_ - 1);
      const T* from = q + index / num_heads * p_.q_stride_token +
                      index % num_heads * p_.q_stride_head + lane_ % 8 * 8;
      const uint32_t to =
          shared_address(shared_.q.atoms[row / 8]) + swizzle<128>(row % 8, lane_ % 8);
#pragma unroll
      for (int slice = 0; slice < kSlices; ++slice) {
        copy_async(to + slice * kAcross, from + slice * 64, first_row_ + row < num_rows_);
      }
    }
    commit_copies();
  }

  // Attends to the piece that was started.
  __device__ void attend(const Piece& piece) {
    const Range tokens = tokens_of(piece);
    reset(tokens, piece.tokens.end);
    wait_for_copies<0>();
    fence_async_proxy();
    sync_groups();
#pragma unroll 1
    for (int tile = piece.tiles.begin; tile < piece.tiles.end; tile += kTileStep) {
      const int token = tile * kTileTokens;
      wait_for_phase(shared_address(&shared_.full[place_.stage]), place_.parity);
      if (token < tokens.begin || token + kTokens > tokens.end) {
        clear_others({tokens.begin - token, tokens.end - token});
        fence_async_proxy();
        sync_groups();  // a group's columns are keys of the other
      }
      float scores[kTokens / 2] = {};
      score(scores);
      uint32_t probabilities[kTokens / 16][4];
      softmax(scores, token, probabilities);
      accumulate(probabilities);
      if (threadIdx.x % kGroupThreads == 0) arrive(shared_address(&shared_.empty[place_.stage]));
      place_.advance();
    }
  }

  __device__ void write(const Piece& piece) {
    float scale[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float total = total_[half];
      total += __shfl_xor_sync(kAllLanes, total, 1);
      total += __shfl_xor_sync(kAllLanes, total, 2);
      scale[half] = total == 0 ? 0 : 1 / total;
      const int row = first_row_ + row_of(half);
      if (group_ > 0 || lane_ % 4 > 0 || row >= num_rows_) continue;
      const float lse = lse_of(top_[half], total);
      if (piece.slot < 0) {
        p_.lse[lse_index(p_, piece.batch, row)] = lse * kLn2;
      } else {
        PartResults(p_, plan_).lse[index_t{piece.slot} * num_rows_ + row] = lse;
      }
    }
    if (piece.slot < 0) {
      write_out(piece.batch, scale);
    } else {
      write_part(piece.slot, scale);
    }
  }

 private:
  __device__ void sync_groups() const {
    asm volatile("bar.sync 1, %0;" ::"n"(kGroups * kGroupThreads) : "memory");
  }

  // Each thread has two rows of every sum, half of the warp's sixteen apart.
  __device__ int row_of(int half) const { return warp_ % 4 * 16 + half * 8 + lane_ / 4; }

  __device__ void reset(Range tokens, int seqlen) {
#pragma unroll
    for (float& x : out_) x = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int end = max(0, end_of_seen(p_, seqlen, first_row_ + row_of(half)));
      const bool all = p_.sliding_window == 0 || p_.sliding_window >= end;
      first_seen_[half] = all ? 0 : end - static_cast<int>(p_.sliding_window);
      num_seen_[half] = max(0, min(end, tokens.end) - first_seen_[half]);
      top_[half] = -INFINITY;
      total_[half] = 0;
    }
  }

  // A page may hold NaN where it has no token, and 0 * NaN is NaN.
  __device__ void clear_others(Range rows) {
#pragma unroll
    for (int row = threadIdx.x / 8; row < kTokens; row += kGroups * kGroupThreads / 8) {
      if (row >= rows.begin && row < rows.end) continue;
      char* to = shared_.ring[place_.stage].atoms[row / 8][0] + row % 8 * 128 + lane_ % 8 * 16;
#pragma unroll
      for (int slice = 0; slice < kRank / 64; ++slice) {
        *reinterpret_cast<uint4*>(to + slice * kAcross) = make_uint4(0, 0, 0, 0);
      }
    }
  }

  // scores [64, 64] = q cache^T
  __device__ void score(float (&scores)[kTokens / 2]) {
    const uint64_t q = describe(shared_address(&shared_.q), kAcross, kDown);
    const uint64_t keys = describe(shared_address(&shared_.ring[place_.stage]), kAcross, kDown);
    begin_products(scores);
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        const int offset = (slice * kAcross + step * 32) >> 4;
        multiply_add<T>(scores, q + offset, keys + offset);
      }
    }
    finish_products(scores);
  }

  __device__ void softmax(float (&scores)[kTokens / 2], int token,
                          uint32_t (&probabilities)[kTokens / 16][4]) {
    const bool has_softcap = p_.softcap > 0;
    const float scale = has_softcap ? p_.softmax_scale / p_.softcap : p_.softmax_scale * kLog2E;
#pragma unroll
    for (float& x : scores) x *= scale;
    if (has_softcap) {
#pragma unroll
      for (float& x : scores) x = tanh_fast(x) * (p_.softcap * kLog2E);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = top_[half];
      const int place = token + lane_ % 4 * 2 - first_seen_[half];
#pragma unroll
      for (int i = 0; i < kTokens / 4; ++i) {
        float& x = scores[i / 2 * 4 + half * 2 + i % 2];
        // Before the first it is below zero, which is a large number here.
        const unsigned distance = place + i / 2 * 8 + i % 2;
        x = distance < num_seen_[half] ? x : -INFINITY;
        top = fmaxf(top, x);
      }
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 1));
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 2));
      // A row that has seen nothing yet is shifted by 0: -inf - -inf is NaN.
      const float shift = top == -INFINITY ? 0 : top;
      const float correction = exp2_fast(top_[half] - shift);
      top_[half] = top;
      total_[half] *= correction;
#pragma unroll
      for (int i = 0; i < kTokens / 4; ++i) {
        float& x = scores[i / 2 * 4 + half * 2 + i % 2];
        x = exp2_fast(x - shift);
        total_[half] += x;
      }
#pragma unroll
      for (int i = 0; i < kColumns / 4; ++i) out_[i / 2 * 4 + half * 2 + i % 2] *= correction;
    }
#pragma unroll
    for (int i = 0; i < kTokens / 4; ++i) {
      probabilities[i / 4][i % 4] = pack<T>(scores[2 * i], scores[2 * i + 1]);
    }
  }

  // out_ += probabilities [64, 64] cache [64, columns of the group]
  __device__ void accumulate(uint32_t (&probabilities)[kTokens / 16][4]) {
    const uint64_t values =
        describe(shared_address(shared_.ring[place_.stage].atoms[0][group_ * kColumns / 64]),
                 kAcross, kDown);
#pragma unroll
    for (auto& four : probabilities) pin(four);
    begin_products(out_);
#pragma unroll
    for (int step = 0; step < kTokens / 16; ++step) {
      multiply_add<T>(out_, probabilities[step], values + (step * 2 * kDown >> 4));
    }
    finish_products(out_);
  }

  __device__ void write_part(int slot, const float (&scale)[2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row_ + row_of(half);
      if (row >= num_rows_) continue;
      float* out = PartResults(p_, plan_).out + (index_t{slot} * num_rows_ + row) * kRank +
                   group_ * kColumns + lane_ % 4 * 2;
#pragma unroll
      for (int j = 0; j < kColumns / 8; ++j) {
        // By name: of plain stores the compiler splits a few.
        __stcg(reinterpret_cast<float2*>(out + j * 8),
               make_float2(out_[j * 4 + half * 2] * scale[half],
                           out_[j * 4 + half * 2 + 1] * scale[half]));
      }
    }
  }

  // Eight rows of 64 columns at a time through shared memory: stores are then of whole lines.
  __device__ void write_out(int batch, const float (&scale)[2]) const {
    char* staging = shared_.staging[warp_];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int first = first_row_ + warp_ % 4 * 16 + half * 8;
      T* out = static_cast<T*>(p_.out) + (index_t{batch} * num_rows_ + first) * kRank +
               group_ * kColumns + lane_ % 8 * 8;
#pragma unroll
      for (int slice = 0; slice < kColumns / 64; ++slice) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const float* x = out_ + (slice * 8 + j) * 4 + half * 2;
          *reinterpret_cast<uint32_t*>(staging + swizzle<128>(lane_ / 4, j) + lane_ % 4 * 4) =
              pack<T>(x[0] * scale[half], x[1] * scale[half]);
        }
        __syncwarp();
#pragma unroll
        for (int row = lane_ / 8; row < 8; row += 4) {
          if (first + row >= num_rows_) continue;
          *reinterpret_cast<uint4*>(out + row * kRank + slice * 64) =
              *reinterpret_cast<const uint4*>(staging + swizzle<128>(row, lane_ % 8));
        }
        __syncwarp();
      }
    }
  }

  const MlaDecodeParams& p_;
  const MlaDecodePlan& plan_;
  Shared& shared_;
  const int warp_, lane_, group_;
  const int first_row_, num_rows_;

  Place place_;
  // Of this thread's two rows: the tokens of the piece that they see, the largest score so far, and
  // this thread's share of the sum.
  int first_seen_[2];
  unsigned num_seen_[2];
  float top_[2], total_[2];
  float out_[kColumns / 2];
};

}  // namespace wgmma_sm90

// One block attends one block of rows to one part; see Pieces for what a part is. Empty on other
// architectures: the launcher takes it on compute capability 9.0 alone.
template <class T>
__global__ void __launch_bounds__(wgmma_sm90::kThreads, 1)
    mla_decode_wgmma_sm90_kernel(const __grid_constant__ MlaDecodeParams p,
                                 const __grid_constant__ MlaDecodePlan plan,
                                 const __grid_constant__ CUtensorMap cache) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using namespace wgmma_sm90;
  extern __shared__ __align__(1024) char atoms[];
  Shared& shared = *reinterpret_cast<Shared*>(atoms);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kWgmmaStages; ++stage) {
      init_barrier(shared_address(&shared.full[stage]), 1);
      init_barrier(shared_address(&shared.empty[stage]), kGroups);
    }
    fence_async_proxy();
  }
  __syncthreads();
  // 168 registers a thread to begin with; copying needs few, and what it gives up the others take.
  if (threadIdx.x >= kGroups * kGroupThreads) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x < kGroups * kGroupThreads + 32) copy_tiles(p, plan, cache, shared);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    Group<T> group(p, plan, shared);
    Pieces pieces(p, plan);
    Piece piece;
    bool more = pieces.next(piece);
    if (more) group.start(piece);
    while (more) {
      group.attend(piece);
      const Piece done = piece;
      more = pieces.next(piece);
      // The next piece's q is on its way while this one is written.
      if (more) group.start(piece);
      group.write(done);
    }
  }
#endif
}

}  // namespace transmla
