// Which kernel a call gets, its grid, and how sequences are cut: decided from shapes alone, since
// cache_seqlens is on the device and a CUDA graph replays the same grid whatever it holds.
#pragma once

#include "transmla/mla_decode.h"

namespace transmla {

constexpr int kTileTokens = 32;  // tokens scored at a time; parts are whole tiles

struct DeviceLimits {
  int num_sms;
  int shared_memory;  // bytes a block can opt in to
  bool has_tma;       // copies boxes of tensors: sm_90 and up
  bool has_wgmma;     // sm_90a, and this library has code for it
};

struct MlaDecodePlan {
  int rows;                // of q in a block; 1: the general kernel, 64: wgmma_sm90
  int num_warps;           // of a block
  int num_stages;          // tiles that are in shared memory at a time
  int num_row_blocks;      // ceil(seqlen_q * num_heads / rows)
  int num_parts;           // the grid is num_row_blocks * num_parts blocks
  int parts_per_sequence;  // 0: parts take equal shares of all the sequences' tiles, end to end
  int num_slots;           // results of cut sequences that have to be merged, for each row
  int shared_memory;       // bytes
  bool use_tma;            // splitkv_sm90
  int box_tokens;          // of a TMA box: what a page is sure to hold in a row
  int rows_of_block;       // tokens from one block of the cache to the next
};

constexpr int kMaxStages = 5;  // more copies under way than any HBM needs

// Shared memory of splitkv: what does not depend on the number of stages, and a stage.
constexpr int kScorePitch = kTileTokens + 8;  // fp32; keeps 8-byte writes of a fragment apart
constexpr int splitkv_shared_bytes(int rows, int num_warps) {
  return num_warps * rows * kScorePitch * 4 + rows * 128 + rows * kTileTokens * 2 + rows * 16 +
         num_warps * kMaxStages * 8;
}
constexpr int splitkv_stage_bytes(int num_warps) { return kTileTokens * 2 * (num_warps * 64 + 64); }
// splitkv_fp8 has stages of codes and scales, and one of 16-bit numbers, for the tile in work.
constexpr int splitkv_fp8_stage_bytes(int num_warps) {
  return splitkv_stage_bytes(num_warps) / 2 + kTileTokens * 4;
}

// wgmma_sm90: the rows of q, two tiles of as many tokens, a kilobyte of results for each of eight
// warps, and the barriers of the tiles.
constexpr int kWgmmaRows = 64, kWgmmaStages = 2, kWgmmaWarps = 12;
constexpr int kWgmmaSharedBytes =
    (1 + kWgmmaStages) * kWgmmaRows * 576 * 2 + 8 * 1024 + kWgmmaStages * 16;

constexpr int kGeneralThreads = 128, kGeneralBlocksPerSm = 8;
constexpr index_t kSharedMemoryOfAll = 99 << 10;  // bytes of a block on every GPU since sm_80
constexpr index_t general_shared_bytes(const MlaDecodeParams& p) {
  return (2 * p.kv_lora_rank + p.qk_rope_head_dim + kTileTokens) * 4;
}

constexpr int kMinTilesOfPart = 8;  // where the device decides: less does not repay the merge

namespace plan_detail {

constexpr index_t ceil_div(index_t a, index_t b) { return (a + b - 1) / b; }

inline bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// A warp for every 64 columns, which lie in whole 16-byte chunks.
inline bool splitkv_takes(const MlaDecodeParams& p) {
  const index_t dim = p.kv_lora_rank + p.qk_rope_head_dim;
  const index_t q_strides = p.q_stride_batch | p.q_stride_token | p.q_stride_head;
  const index_t cache_strides = p.cache_stride_block | p.cache_stride_token;
  const index_t cached_chunk = p.cache_scales ? 16 : 8;
  // Offsets of pages are 32-bit numbers of chunks, and of scales, those within a page 32-bit
  // numbers of elements.
  const bool offsets_fit = p.num_blocks * p.cache_stride_block < index_t{1} << 35 &&
                           p.cache_stride_token < 1 << 26 &&
                           p.num_blocks * p.scales_stride_block < index_t{1} << 31;
  return p.dtype != DType::kFloat32 && (dim == 576 || dim == 320) && p.kv_lora_rank % 64 == 0 &&
         p.qk_rope_head_dim >= 64 && p.block_size % 16 == 0 && q_strides % 8 == 0 &&
         cache_strides % cached_chunk == 0 && is_aligned(p.q) && is_aligned(p.latent_cache) &&
         is_aligned(p.out) && offsets_fit;
}

// As few blocks as the shared memory allows: each reads its sequences' whole cache.
inline int splitkv_rows(index_t num_rows, int num_warps, int ring_bytes,
                        const DeviceLimits& device) {
  int best = 16;
  for (int rows : {32, 48}) {
    const bool fits = splitkv_shared_bytes(rows, num_warps) + ring_bytes <= device.shared_memory;
    if (fits && ceil_div(num_rows, rows) < ceil_div(num_rows, best)) best = rows;
  }
  return best;
}

// From where splitkv takes two blocks for the rows, which read the cache twice, on.
inline bool wgmma_takes(const MlaDecodeParams& p, const DeviceLimits& device) {
  return device.has_wgmma && !p.cache_scales && p.seqlen_q * p.num_heads > 48 &&
         p.kv_lora_rank == 512 && p.qk_rope_head_dim == 64 && p.num_blocks > 0 && splitkv_takes(p);
}

}  // namespace plan_detail

inline MlaDecodePlan make_mla_decode_plan(const MlaDecodeParams& p, const DeviceLimits& device) {
  using namespace plan_detail;
  const index_t num_rows = p.seqlen_q * p.num_heads;
  MlaDecodePlan plan{};
  int blocks_per_sm = 1;
  if (wgmma_takes(p, device)) {
    plan.num_warps = kWgmmaWarps;
    plan.rows = kWgmmaRows;
    plan.num_stages = kWgmmaStages;
    plan.shared_memory = kWgmmaSharedBytes;
  } else if (splitkv_takes(p)) {
    plan.num_warps = p.kv_lora_rank + p.qk_rope_head_dim == 576 ? 8 : 4;
    const int widened = p.cache_scales ? splitkv_stage_bytes(plan.num_warps) : 0;
    const int stage = p.cache_scales ? splitkv_fp8_stage_bytes(plan.num_warps)
                                     : splitkv_stage_bytes(plan.num_warps);
    plan.rows = splitkv_rows(num_rows, plan.num_warps, widened + 2 * stage, device);
    const int fixed = splitkv_shared_bytes(plan.rows, plan.num_warps) + widened;
    int budget = device.shared_memory;
    // Four warps are one for a scheduler: a second block works while it waits. 1 KB of an SM's
    // shared memory goes to the system for each block.
    const int half = (device.shared_memory + 1024) / 2 - 1024;
    if (plan.num_warps == 4 && fixed + 2 * stage <= half) {
      budget = half;
      blocks_per_sm = 2;
    }
    const int most = (budget - fixed) / stage;
    plan.num_stages = most < kMaxStages ? most : kMaxStages;
    plan.shared_memory = fixed + plan.num_stages * stage;
    plan.box_tokens = p.block_size % kTileTokens == 0 ? kTileTokens : 16;
    if (device.has_tma && !p.cache_scales && p.cache_stride_block % p.cache_stride_token == 0) {
      plan.rows_of_block = static_cast<int>(p.cache_stride_block / p.cache_stride_token);
      plan.use_tma = p.num_blocks * plan.rows_of_block < index_t{1} << 31;
    }
  } else {
    blocks_per_sm = kGeneralBlocksPerSm;
    plan.rows = 1;
    plan.num_warps = kGeneralThreads / 32;
    plan.shared_memory = static_cast<int>(general_shared_bytes(p));
  }
  plan.num_row_blocks = static_cast<int>(ceil_div(num_rows, plan.rows));

  if (p.split_size > 0) {
    plan.parts_per_sequence = static_cast<int>(ceil_div(p.max_blocks * p.block_size, p.split_size));
  } else {
    plan.parts_per_sequence = static_cast<int>(p.num_splits);
  }
  if (plan.parts_per_sequence > 0) {
    plan.num_parts = static_cast<int>(p.batch_size) * plan.parts_per_sequence;
    plan.num_slots = plan.parts_per_sequence > 1 ? plan.num_parts : 0;
  } else {
    const int share = device.num_sms * blocks_per_sm / plan.num_row_blocks;
    plan.num_parts = share > 1 ? share : 1;
    // A part may end one sequence, hold others whole and begin another.
    plan.num_slots = 2 * plan.num_parts;
  }
  return plan;
}

}  // namespace transmla
