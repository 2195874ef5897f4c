// The ring of tiles that a warp of splitkv copies for itself: nobody else writes or reads its slice
// of the cache's columns, so that waiting for a tile takes no barrier of the block.
#pragma once

#include "cuda/common/shared_memory.cuh"
#include "cuda/common/tma.cuh"
#include "cuda/mla_decode/parts.cuh"

namespace transmla {

constexpr int kSliceColumns = 64, kSliceBytes = kSliceColumns * 2;
constexpr int kTailColumns = 16, kTailBytes = kTailColumns * 2;
constexpr int kTailWarps = kSliceColumns / kTailColumns;

// What is common to both ways of copying. A stage holds 32 tokens: of each warp 64 columns, then of
// the first four warps 16 more, all swizzled.
class Ring {
 public:
  __device__ Ring(const MlaDecodeParams& p, const MlaDecodePlan& plan, int num_warps,
                  const char* shared, int warp, int lane)
      : p_(p),
        plan_(plan),
        stage_bytes_(kTileTokens * (num_warps * kSliceBytes + kTailWarps * kTailBytes)),
        warp_(warp),
        lane_(lane),
        has_tail_(warp < kTailWarps),
        slices_(shared_address(shared) + warp * kTileTokens * kSliceBytes),
        tails_(shared_address(shared) + num_warps * kTileTokens * kSliceBytes +
               warp * kTileTokens * kTailBytes) {}

  __device__ const Piece& piece() const { return piece_; }
  __device__ int stage(int ahead = 0) const {
    const int stage = stage_ + ahead;
    return stage >= plan_.num_stages ? stage - plan_.num_stages : stage;
  }
  __device__ uint32_t slice(int stage) const { return slices_ + stage * stage_bytes_; }
  __device__ uint32_t tail(int stage) const { return tails_ + stage * stage_bytes_; }

 protected:
  static constexpr int kTilesOfPages = 16;  // whose pages the lanes know

  // Lane i: the block that holds tokens 16 i .. 16 i + 15 of 512, and the first one's row of it.
  // False if `num_tokens` from there are not visible: the entry may be garbage then.
  __device__ bool find_page(int group, int num_tokens, index_t* block, int* row) const {
    const int token = (group * 32 + lane_) * 16;
    if (token + num_tokens <= piece_.tokens.begin || token >= piece_.tokens.end) return false;
    const int block_size = static_cast<int>(p_.block_size);
    *block = p_.block_table[piece_.batch * p_.block_table_stride + token / block_size];
    *row = token % block_size;
    return true;
  }

  __device__ bool is_visible(int token) const {
    return token >= piece_.tokens.begin && token < piece_.tokens.end;
  }

  const MlaDecodeParams& p_;
  const MlaDecodePlan& plan_;
  const int stage_bytes_;  // the compiler knows it: num_warps is a constant
  const int warp_, lane_;
  const bool has_tail_;
  const uint32_t slices_, tails_;  // of stage 0
  Piece piece_;
  int stage_ = 0;           // of the tile in work
  int pages_, next_pages_;  // of the tile that is copied next
};

// Sixteen bytes a lane and copy. A tile past the piece's end is an empty group of copies: `wait`
// counts groups.
template <class T, int kWarps>
class TilesSm80 : public Ring {
 public:
  __device__ TilesSm80(const MlaDecodeParams& p, const MlaDecodePlan& plan, const char* shared,
                       int warp, int lane)
      : Ring(p, plan, kWarps, shared, warp, lane) {}

  __device__ void start(const Piece& piece) {
    piece_ = piece;
    pages_ = find_pages(piece.tiles.begin / kTilesOfPages);
    next_pages_ = find_pages(piece.tiles.begin / kTilesOfPages + 1);
    for (int i = 0; i < plan_.num_stages - 1; ++i) copy(piece.tiles.begin + i, stage(i));
  }

  // For the copies of this thread from before start().
  __device__ void wait_for_older() const { wait_for_copies(plan_.num_stages - 1); }

  __device__ void wait(int) const { wait_for_copies(plan_.num_stages - 2); }

  __device__ void copy(int tile, int stage) {
    if (tile < piece_.tiles.end) {
      const int stride = static_cast<int>(p_.cache_stride_token);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const auto chunk = static_cast<uint32_t>(__shfl_sync(kAllLanes, pages_, tile * 2 + half));
        const T* rows = static_cast<const T*>(p_.latent_cache) + index_t{chunk} * 8;
        const int token = tile * kTileTokens + half * 16;
        // Rows of other tokens are zero: a page may hold NaN there, and 0 * NaN is NaN.
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = lane_ / 8 + 4 * i;
          copy_async(slice(stage) + swizzle<kSliceBytes>(half * 16 + row, lane_ % 8),
                     rows + row * stride + warp_ * kSliceColumns + lane_ % 8 * 8,
                     is_visible(token + row));
        }
        if (has_tail_) {
          const int row = lane_ / 2;
          copy_async(tail(stage) + swizzle<kTailBytes>(half * 16 + row, lane_ % 2),
                     rows + row * stride + kColumns + warp_ * kTailColumns + lane_ % 2 * 8,
                     is_visible(token + row));
        }
      }
      if (tile % kTilesOfPages == kTilesOfPages - 1) {
        pages_ = next_pages_;
        next_pages_ = find_pages(tile / kTilesOfPages + 2);
      }
    }
    commit_copies();
  }

  __device__ void advance() { stage_ = stage(1); }

  // After other writes to a stage.
  __device__ void fence() const {}

 private:
  static constexpr int kColumns = kWarps * kSliceColumns;  // the tail follows

  // In 16-byte chunks.
  __device__ int find_pages(int group) const {
    index_t block;
    int row;
    if (!find_page(group, 16, &block, &row)) return 0;
    return static_cast<int>((block * p_.cache_stride_block + row * p_.cache_stride_token) / 8);
  }
};

// Boxes of 16 or 32 tokens, as many as a page is sure to hold in a row; one lane asks for them.
template <int kWarps>
class TilesSm90 : public Ring {
 public:
  // `slices` and `tails` are the cache as a matrix of tokens, in boxes for slice() and tail().
  __device__ TilesSm90(const MlaDecodeParams& p, const MlaDecodePlan& plan, const char* shared,
                       int warp, int lane, uint64_t* barriers, const CUtensorMap* slices,
                       const CUtensorMap* tails)
      : Ring(p, plan, kWarps, shared, warp, lane),
        slice_boxes_(slices),
        tail_boxes_(tails),
        barriers_(shared_address(barriers + warp * kMaxStages)) {
    if (lane == 0) {
      for (int i = 0; i < plan.num_stages; ++i) init_barrier(barriers_ + 8 * i, 1);
      fence_async_proxy();
    }
    __syncwarp();
  }

  __device__ void start(const Piece& piece) {
    piece_ = piece;
    pages_ = find_pages(piece.tiles.begin / kTilesOfPages);
    next_pages_ = find_pages(piece.tiles.begin / kTilesOfPages + 1);
    for (int i = 0; i < plan_.num_stages - 1; ++i) copy(piece.tiles.begin + i, stage(i));
  }

  __device__ void wait_for_older() const { wait_for_copies<0>(); }

  __device__ void wait(int tile) const {
    wait_for_phase(barriers_ + 8 * stage_, phase_);
    const int token = tile * kTileTokens;
    if (token >= piece_.tokens.begin && token + kTileTokens <= piece_.tokens.end) return;
    // A box brings rows of other tokens as they are, NaN perhaps, and 0 * NaN is NaN. The tail
    // holds no values, and scores of other tokens are masked.
    for (int row = lane_ / 8; row < kTileTokens; row += 4) {
      if (is_visible(token + row)) continue;
      zero(slice(stage_) + row * kSliceBytes + lane_ % 8 * 16);
    }
    fence();
  }

  __device__ void copy(int tile, int stage) {
    if (tile >= piece_.tiles.end) return;
    const int rows[] = {__shfl_sync(kAllLanes, pages_, tile * 2),
                        __shfl_sync(kAllLanes, pages_, tile * 2 + 1)};
    if (lane_ == 0) {
      const uint32_t barrier = barriers_ + 8 * stage;
      expect_bytes(barrier, kTileTokens * (kSliceBytes + (has_tail_ ? kTailBytes : 0)));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (half == 1 && plan_.box_tokens == kTileTokens) break;
        copy_box(slice(stage) + half * 16 * kSliceBytes, slice_boxes_, rows[half],
                 warp_ * kSliceColumns, barrier);
        if (has_tail_) {
          copy_box(tail(stage) + half * 16 * kTailBytes, tail_boxes_, rows[half],
                   kColumns + warp_ * kTailColumns, barrier);
        }
      }
    }
    if (tile % kTilesOfPages == kTilesOfPages - 1) {
      pages_ = next_pages_;
      next_pages_ = find_pages(tile / kTilesOfPages + 2);
    }
  }

  __device__ void advance() {
    stage_ = stage(1);
    if (stage_ == 0) phase_ ^= 1;
  }

  __device__ void fence() const { fence_async_proxy(); }

 private:
  static constexpr int kColumns = kWarps * kSliceColumns;

  // In tokens of the cache. A box that holds no visible token lies before the first one: zeros.
  __device__ int find_pages(int group) const {
    index_t block;
    int row;
    if (!find_page(group, plan_.box_tokens, &block, &row)) return -kTileTokens;
    return static_cast<int>(block) * plan_.rows_of_block + row;
  }

  __device__ static void zero(uint32_t to) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(to), "r"(0) : "memory");
  }

  const CUtensorMap *const slice_boxes_, *const tail_boxes_;
  const uint32_t barriers_;  // of stage 0
  int phase_ = 0;            // parity, of the tile in work
};

}  // namespace transmla
