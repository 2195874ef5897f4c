// Page allocator of a paged cache: hands out block ids, never touches the memory behind them.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace transmla {

class BlockPool {
 public:
  explicit BlockPool(int32_t num_blocks) : in_use_(check_size(num_blocks), false) {
    free_.reserve(num_blocks);
    for (int32_t block = num_blocks; block-- > 0;) free_.push_back(block);
  }

  int32_t num_blocks() const { return static_cast<int32_t>(in_use_.size()); }
  int32_t num_free() const { return static_cast<int32_t>(free_.size()); }

  // All `count` blocks or none: throws std::runtime_error when fewer are free.
  std::vector<int32_t> allocate(int32_t count) {
    if (count < 0)
      throw std::invalid_argument("BlockPool: count must be >= 0, got " + std::to_string(count));
    if (count > num_free()) {
      throw std::runtime_error("BlockPool: out of cache blocks: " + std::to_string(count) +
                               " wanted, " + std::to_string(num_free()) + " of " +
                               std::to_string(num_blocks()) + " free");
    }
    std::vector<int32_t> blocks(free_.rbegin(), free_.rbegin() + count);
    free_.resize(free_.size() - count);
    for (int32_t block : blocks) in_use_[block] = true;
    return blocks;
  }

  // Throws std::invalid_argument, and frees nothing, when a block is not in use or named twice.
  void free(const std::vector<int32_t>& blocks) {
    for (size_t i = 0; i < blocks.size(); ++i) {
      const int32_t block = blocks[i];
      if (block < 0 || block >= num_blocks() || !in_use_[block]) {
        for (size_t j = 0; j < i; ++j) in_use_[blocks[j]] = true;
        throw std::invalid_argument("BlockPool: block " + std::to_string(block) + " is not in use");
      }
      in_use_[block] = false;
    }
    free_.insert(free_.end(), blocks.rbegin(), blocks.rend());
  }

 private:
  static size_t check_size(int32_t num_blocks) {
    if (num_blocks < 0) {
      throw std::invalid_argument("BlockPool: num_blocks must be >= 0, got " +
                                  std::to_string(num_blocks));
    }
    return static_cast<size_t>(num_blocks);
  }

  std::vector<bool> in_use_;
  std::vector<int32_t> free_;  // a stack: the block freed last is used first, while it is cached
};

}  // namespace transmla
