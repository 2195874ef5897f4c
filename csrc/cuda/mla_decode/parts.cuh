// Which tokens a block attends to, and where the results of a sequence's parts are.
#pragma once

#include "cuda/common/warp.cuh"
#include "cuda/mla_decode/plan.h"

namespace transmla {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

struct Range {
  int begin, end;

  __device__ int size() const { return end - begin; }
};

// Tokens that any of a sequence's new queries sees.
__device__ inline Range visible_tokens(const MlaDecodeParams& p, int batch) {
  const int end = p.cache_seqlens[batch];
  const index_t begin = end - p.seqlen_q + 1 - p.sliding_window;
  return {p.sliding_window > 0 && begin > 0 ? static_cast<int>(begin) : 0, end};
}

// An empty sequence has a tile too: a block has to write that it is empty.
__device__ inline Range tiles_of(Range tokens) {
  const int first = tokens.begin / kTileTokens;
  return {first, max(first + 1, (tokens.end + kTileTokens - 1) / kTileTokens)};
}

__device__ inline int num_tiles(const MlaDecodeParams& p, int batch) {
  return tiles_of(visible_tokens(p, batch)).size();
}

// Past the last token that a row (token, head) of q sees.
__device__ inline int end_of_seen(const MlaDecodeParams& p, int seqlen, int row) {
  return seqlen - static_cast<int>(p.seqlen_q) + 1 + row / static_cast<int>(p.num_heads);
}

// What a block has to do for one sequence.
struct Piece {
  int batch;
  Range tokens;  // of the sequence
  Range tiles;   // of the piece
  int slot;      // of the workspace; -1: the piece is the whole sequence
};

// Tiles of a part where each sequence is cut for itself.
__device__ inline int part_size(const MlaDecodeParams& p, int num_tiles) {
  if (p.split_size > 0) return static_cast<int>(p.split_size) / kTileTokens;
  return (num_tiles + static_cast<int>(p.num_splits) - 1) / static_cast<int>(p.num_splits);
}

// The other cut: all sequences end to end, cut into equal parts. Every warp works it out anew; that
// is less than a kernel's launch.
struct EndToEnd {
  int part_size;
  int tiles_before;  // of the sequences before `batch`

  __device__ EndToEnd(const MlaDecodeParams& p, const MlaDecodePlan& plan, int batch) {
    int total = 0, before = 0;
    for (int b = threadIdx.x % 32; b < p.batch_size; b += 32) {
      const int count = num_tiles(p, b);
      total += count;
      before += b < batch ? count : 0;
    }
    total = __reduce_add_sync(kAllLanes, total);
    tiles_before = __reduce_add_sync(kAllLanes, before);
    part_size = max(kMinTilesOfPart, (total + plan.num_parts - 1) / plan.num_parts);
  }
};

// Hands a block its pieces, one after the other. Called by whole warps.
class Pieces {
 public:
  __device__ Pieces(const MlaDecodeParams& p, const MlaDecodePlan& plan)
      : p_(p), plan_(plan), part_size_(0), batch_(0), before_(0) {
    if (plan.parts_per_sequence > 0) {
      batch_ = part() / plan.parts_per_sequence;
    } else {
      part_size_ = EndToEnd(p, plan, 0).part_size;
      find(part() * part_size_);
    }
  }

  __device__ bool next(Piece& piece) {
    if (batch_ >= p_.batch_size) return false;
    piece.batch = batch_;
    piece.tokens = visible_tokens(p_, batch_);
    const Range all = tiles_of(piece.tokens);
    if (plan_.parts_per_sequence > 0) {
      const int size = part_size(p_, all.size());
      const int begin = all.begin + part() % plan_.parts_per_sequence * size;
      piece.tiles = {begin, min(begin + size, all.end)};
      piece.slot = part();
      batch_ = static_cast<int>(p_.batch_size);
    } else {
      const Range line = {part() * part_size_, (part() + 1) * part_size_};
      if (before_ >= line.end) return false;
      piece.tiles = {all.begin + max(0, line.begin - before_),
                     all.begin + min(all.size(), line.end - before_)};
      piece.slot = 2 * part() + (before_ > line.begin ? 1 : 0);
      before_ += all.size();
      ++batch_;
    }
    if (piece.tiles.size() == all.size()) piece.slot = -1;
    return piece.tiles.begin < piece.tiles.end;
  }

 private:
  __device__ int part() const { return blockIdx.x / plan_.num_row_blocks; }

  // The sequence that tile `tile` of all belongs to, and the tiles before that sequence.
  __device__ void find(int tile) {
    const int lane = threadIdx.x % 32;
    for (; batch_ < p_.batch_size; batch_ += 32) {
      const int count = batch_ + lane < p_.batch_size ? num_tiles(p_, batch_ + lane) : 0;
      int sum = count;
      for (int distance = 1; distance < 32; distance *= 2) {
        const int below = __shfl_up_sync(kAllLanes, sum, distance);
        sum += lane >= distance ? below : 0;
      }
      const unsigned found = __ballot_sync(kAllLanes, before_ + sum > tile);
      if (found != 0) {
        const int source = __ffs(found) - 1;
        batch_ += source;
        before_ += __shfl_sync(kAllLanes, sum - count, source);
        return;
      }
      before_ += __shfl_sync(kAllLanes, sum, 31);
    }
  }

  const MlaDecodeParams& p_;
  const MlaDecodePlan& plan_;
  int part_size_;  // where all sequences are cut end to end
  int batch_;      // the next sequence
  int before_;     // tiles of all sequences before it
};

// Where the results of a sequence's parts are. Called by whole warps.
struct Slots {
  int count;  // 1: the sequence is not cut
  int first, second, stride;

  __device__ Slots(const MlaDecodeParams& p, const MlaDecodePlan& plan, int batch) {
    const int tiles = num_tiles(p, batch);
    if (plan.parts_per_sequence > 0) {
      const int size = part_size(p, tiles);
      count = (tiles + size - 1) / size;
      first = batch * plan.parts_per_sequence;
      second = first + 1;
      stride = 1;
    } else {
      const EndToEnd line(p, plan, batch);
      const int first_part = line.tiles_before / line.part_size;
      const int last_part = (line.tiles_before + tiles - 1) / line.part_size;
      count = last_part - first_part + 1;
      first = 2 * first_part + (line.tiles_before % line.part_size > 0 ? 1 : 0);
      second = 2 * first_part + 2;
      stride = 2;
    }
  }

  __device__ int operator[](int part) const {
    return part == 0 ? first : second + (part - 1) * stride;
  }
};

// Results of parts: numbers [num_slots, num_rows, kv_lora_rank], then their lse [num_slots,
// num_rows] to base 2.
struct PartResults {
  float *out, *lse;

  __device__ PartResults(const MlaDecodeParams& p, const MlaDecodePlan& plan)
      : out(static_cast<float*>(p.workspace)),
        lse(out + plan.num_slots * p.seqlen_q * p.num_heads * p.kv_lora_rank) {}
};

__device__ inline index_t lse_index(const MlaDecodeParams& p, int batch, int row) {
  const int num_heads = static_cast<int>(p.num_heads);
  return (index_t{batch} * num_heads + row % num_heads) * p.seqlen_q + row / num_heads;
}

// To base 2. A row that sees no token has no sum, and one that sees NaN keeps it.
__device__ inline float lse_of(float top, float total) {
  return total == 0 ? -INFINITY : top + log2f(total);
}

}  // namespace transmla
