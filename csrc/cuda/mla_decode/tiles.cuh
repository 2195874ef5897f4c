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
  // What the numbers of four tokens, from `column` of the tile on, have to be multiplied by.
  __device__ static float4 scales(int) { return {1, 1, 1, 1}; }
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

// By cp.async. A tile past the piece's end is an empty group of copies: `wait` counts groups.
class RingOfCopies : public Ring {
 public:
  using Ring::Ring;

  // For the copies of this thread from before start().
  __device__ void wait_for_older() const { wait_for_copies(plan_.num_stages - 1); }

  __device__ void wait(int) const { wait_for_copies(plan_.num_stages - 2); }

  __device__ void advance() { stage_ = stage(1); }

  // After other writes to a stage.
  __device__ void fence() const {}
};

// Sixteen bytes a lane and copy.
template <class T, int kWarps>
class TilesSm80 : public RingOfCopies {
 public:
  static constexpr int kStageBytes = splitkv_stage_bytes(kWarps), kWidenedBytes = 0;

  __device__ TilesSm80(const MlaDecodeParams& p, const MlaDecodePlan& plan, const char* shared,
                       int warp, int lane)
      : RingOfCopies(p, plan, kWarps, shared, warp, lane) {}

  __device__ void start(const Piece& piece) {
    piece_ = piece;
    pages_ = find_pages(piece.tiles.begin / kTilesOfPages);
    next_pages_ = find_pages(piece.tiles.begin / kTilesOfPages + 1);
    for (int i = 0; i < plan_.num_stages - 1; ++i) copy(piece.tiles.begin + i, stage(i));
  }

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

// A cache of fp8: a stage holds codes as they come, and after them their tokens' scales, which warp
// 0 copies. A warp widens its slice of the tile in work into a place that all stages share.
template <class T, int kWarps>
class TilesFp8 : public RingOfCopies {
 public:
  static constexpr int kStageBytes = splitkv_fp8_stage_bytes(kWarps);
  static constexpr int kWidenedBytes = splitkv_stage_bytes(kWarps);  // before the stages

  __device__ TilesFp8(const MlaDecodeParams& p, const MlaDecodePlan& plan, const char* shared,
                      int warp, int lane)
      : RingOfCopies(p, plan, kWarps, shared, warp, lane),
        codes_(shared_address(shared) + kWidenedBytes) {}

  __device__ void start(const Piece& piece) {
    piece_ = piece;
    find_pages(piece.tiles.begin / kTilesOfPages, &pages_, &scale_pages_);
    find_pages(piece.tiles.begin / kTilesOfPages + 1, &next_pages_, &next_scale_pages_);
    for (int i = 0; i < plan_.num_stages - 1; ++i) copy(piece.tiles.begin + i, stage(i));
  }

  __device__ void wait(int tile) const {
    RingOfCopies::wait(tile);
    // Also: every lane is done with the widened tile before.
    __syncwarp();
    const uint32_t codes = codes_ + stage_ * kStageBytes;
#pragma unroll
    for (int i = 0; i < kTileTokens / 4; ++i) {
      widen_chunk<kSliceBytes>(codes + slice_codes(), slices_, lane_ / 8 + 4 * i, lane_ % 8);
    }
    if (has_tail_) {
#pragma unroll
      for (int i = 0; i < kTileTokens / 16; ++i) {
        widen_chunk<kTailBytes>(codes + tail_codes(), tails_, lane_ / 2 + 16 * i, lane_ % 2);
      }
    }
  }

  __device__ void copy(int tile, int stage) {
    if (tile < piece_.tiles.end) {
      const int stride = static_cast<int>(p_.cache_stride_token);
      const uint32_t to = codes_ + stage * kStageBytes;
      const auto codes_of = [&](int row) {
        const auto chunk =
            static_cast<uint32_t>(__shfl_sync(kAllLanes, pages_, tile * 2 + row / 16));
        return static_cast<const char*>(p_.latent_cache) + index_t{chunk} * 16 + row % 16 * stride;
      };
      const int token = tile * kTileTokens;
#pragma unroll
      for (int i = 0; i < kTileTokens / 8; ++i) {
        const int row = lane_ / 4 + 8 * i;
        copy_async(to + slice_codes() + row * kSliceColumns + lane_ % 4 * 16,
                   codes_of(row) + warp_ * kSliceColumns + lane_ % 4 * 16, is_visible(token + row));
      }
      if (has_tail_) {
        copy_async(to + tail_codes() + lane_ * kTailColumns,
                   codes_of(lane_) + kColumns + warp_ * kTailColumns, is_visible(token + lane_));
      }
      if (warp_ == 0) {
        const int first = __shfl_sync(kAllLanes, scale_pages_, tile * 2 + lane_ / 16);
        copy_float_async(to + kCodeBytes + lane_ * 4, p_.cache_scales + first + lane_ % 16,
                         is_visible(token + lane_));
      }
      if (tile % kTilesOfPages == kTilesOfPages - 1) {
        pages_ = next_pages_;
        scale_pages_ = next_scale_pages_;
        find_pages(tile / kTilesOfPages + 2, &next_pages_, &next_scale_pages_);
      }
    }
    commit_copies();
  }

  // Of whichever tile is in work.
  __device__ uint32_t slice(int) const { return hidden(slices_); }
  __device__ uint32_t tail(int) const { return hidden(tails_); }

  // After a barrier since wait(). Times 2^8, which widen() has divided by.
  __device__ float4 scales(int column) const {
    const auto x = *static_cast<const float4*>(
        __cvta_shared_to_generic(codes_ + stage_ * kStageBytes + kCodeBytes + column * 4));
    return {x.x * 256, x.y * 256, x.z * 256, x.w * 256};
  }

 private:
  static constexpr int kColumns = kWarps * kSliceColumns;  // the tail follows
  static constexpr int kCodeBytes = kTileTokens * (kColumns + kTailWarps * kTailColumns);
  static_assert(kStageBytes == kCodeBytes + kTileTokens * sizeof(float));

  // Where this warp's codes lie in a stage.
  __device__ int slice_codes() const { return warp_ * kTileTokens * kSliceColumns; }
  __device__ int tail_codes() const { return kTileTokens * (kColumns + warp_ * kTailColumns); }

  // nvcc 13.0 does not come to an end where it sees that an address is the same for every tile.
  __device__ static uint32_t hidden(uint32_t address) {
    asm volatile("" : "+r"(address));
    return address;
  }

  template <int kRowBytes>
  __device__ static void widen_chunk(uint32_t codes, uint32_t to, int row, int chunk) {
    const auto from = *static_cast<const uint2*>(
        __cvta_shared_to_generic(codes + row * kRowBytes / 2 + chunk * 8));
    *static_cast<uint4*>(__cvta_shared_to_generic(to + swizzle<kRowBytes>(row, chunk))) =
        widen<T>(from);
  }

  // In 16-byte chunks of the cache, and in scales.
  __device__ void find_pages(int group, int* page, int* scale_page) const {
    index_t block;
    int row;
    *page = *scale_page = 0;
    if (!find_page(group, 16, &block, &row)) return;
    *page = static_cast<int>((block * p_.cache_stride_block + row * p_.cache_stride_token) / 16);
    *scale_page = static_cast<int>(block * p_.scales_stride_block + row);
  }

  const uint32_t codes_;                // of stage 0
  int scale_pages_, next_scale_pages_;  // as pages_, next_pages_
};

// Boxes of 16 or 32 tokens, as many as a page is sure to hold in a row; one lane asks for them.
template <int kWarps>
class TilesSm90 : public Ring {
 public:
  static constexpr int kStageBytes = splitkv_stage_bytes(kWarps), kWidenedBytes = 0;

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
