// The parts alone, without torch and Python: paged latent cache, page allocator and kernels in a
// server that has its own model code, its own loop and its own threads.
//
//   cd examples/cpp
//   cmake -B build -Dtransmla_DIR=$(python -c "import transmla_ext as t; print(t.get_cmake_dir())")
//   cmake --build build && build/server
//
// Greedy continuous batching of a tiny random model of attention layers. A prompt goes in token by
// token, as one more row of the batch, so that the whole server is one decode step.
#include <transmla/transmla.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <deque>
#include <memory>
#include <utility>
#include <vector>

#include "thread_pool.h"

using transmla::index_t;
using Tensor = std::vector<float>;  // contiguous; the shapes are on the lines that make them

constexpr index_t kLayers = 2, kVocab = 64, kHidden = 64, kHeads = 4, kRank = 32, kRope = 16;
constexpr index_t kNope = 16, kValue = 16, kQuery = kNope + kRope, kCached = kRank + kRope;
constexpr index_t kNumBlocks = 10, kBlockSize = 4, kMaxLength = kNumBlocks * kBlockSize;
constexpr size_t kMaxBatch = 3;
constexpr float kNormEps = 1e-6f;

// Uniform numbers of variance 1 / fan_in that every platform makes alike.
Tensor random_tensor(uint32_t seed, index_t size, index_t fan_in) {
  Tensor numbers(size);
  const float scale = static_cast<float>(std::sqrt(12.0 / fan_in));
  for (index_t i = 0; i < size; ++i) {
    uint32_t x = static_cast<uint32_t>(i) * 0x9e3779b1u + seed;
    x = (x ^ (x >> 15)) * 0x85ebca77u;
    x ^= x >> 13;
    numbers[i] = ((x >> 8) * 0x1p-24f - 0.5f) * scale;
  }
  return numbers;
}

struct Layer {
  explicit Layer(uint32_t seed)
      : w_q(random_tensor(seed, kHeads * kQuery * kHidden, kHidden)),
        w_kv_a(random_tensor(seed + 1, kCached * kHidden, kHidden)),
        w_uk(random_tensor(seed + 2, kHeads * kNope * kRank, kNope)),
        w_uv(random_tensor(seed + 3, kHeads * kValue * kRank, kRank)),
        w_o(random_tensor(seed + 4, kHidden * kHeads * kValue, kHeads * kValue)),
        latent_cache(kNumBlocks * kBlockSize * kCached, NAN) {}

  Tensor w_q;           // [kHeads * (kNope + kRope), kHidden]
  Tensor w_kv_a;        // [kRank + kRope, kHidden]
  Tensor w_uk;          // [kHeads, kNope, kRank]
  Tensor w_uv;          // [kHeads, kValue, kRank]
  Tensor w_o;           // [kHidden, kHeads * kValue]
  Tensor latent_cache;  // [kNumBlocks, kBlockSize, kRank + kRope]
};

struct Request {
  int id;
  std::vector<index_t> tokens;  // the prompt, then what was generated
  size_t num_tokens;            // when it is finished
  std::vector<int32_t> blocks = {};
  index_t length = 0;  // tokens in the cache
  float logit = 0;     // of the last token generated
};

class Server {
 public:
  explicit Server(int num_threads) : threads_(num_threads), cos_sin_(kMaxLength * kRope) {
    for (uint32_t i = 0; i < kLayers; ++i) layers_.emplace_back(10 * i);
    for (index_t position = 0; position < kMaxLength; ++position) {
      for (index_t j = 0; j < kRope / 2; ++j) {
        const double angle = position * std::pow(1e4, -2.0 * j / kRope);
        cos_sin_[position * kRope + j] = static_cast<float>(std::cos(angle));
        cos_sin_[position * kRope + kRope / 2 + j] = static_cast<float>(std::sin(angle));
      }
    }
  }

  void serve(std::deque<Request> waiting) {
    std::vector<Request> running;
    while (!waiting.empty() || !running.empty()) {
      while (!waiting.empty() && running.size() < kMaxBatch) {
        // The room for all of it at once, so that nothing runs out later.
        const auto num_blocks =
            static_cast<int32_t>((waiting.front().num_tokens + kBlockSize - 2) / kBlockSize);
        if (num_blocks > pool_.num_free() && !running.empty()) break;
        waiting.front().blocks = pool_.allocate(num_blocks);  // throws if it would never fit
        running.push_back(std::move(waiting.front()));
        waiting.pop_front();
      }
      step(running);
      for (const Request& request : running) {
        if (request.tokens.size() < request.num_tokens) continue;
        std::printf("%d:", request.id);
        for (index_t token : request.tokens) std::printf(" %d", static_cast<int>(token));
        std::printf(" (%.4f)\n", request.logit);
        pool_.free(request.blocks);
      }
      running.erase(
          std::remove_if(running.begin(), running.end(),
                         [](const Request& r) { return r.tokens.size() == r.num_tokens; }),
          running.end());
    }
    std::printf("%d blocks free\n", pool_.num_free());
  }

 private:
  // Puts one more token of each request into the cache; one that is through its prompt gets a
  // token.
  void step(std::vector<Request>& batch) {
    const auto batch_size = static_cast<index_t>(batch.size());
    std::vector<int32_t> block_table(batch_size * kNumBlocks, -1), cache_seqlens;
    std::vector<index_t> positions, slot_mapping;
    Tensor hidden;  // [batch_size, kHidden]
    for (index_t b = 0; b < batch_size; ++b) {
      Request& request = batch[b];
      const index_t position = request.length++, token = request.tokens[position];
      positions.push_back(position);
      slot_mapping.push_back(request.blocks[position / kBlockSize] * kBlockSize +
                             position % kBlockSize);
      cache_seqlens.push_back(static_cast<int32_t>(request.length));
      std::copy(request.blocks.begin(), request.blocks.end(), &block_table[b * kNumBlocks]);
      const float* embedded = embedding_.data() + token * kHidden;
      hidden.insert(hidden.end(), embedded, embedded + kHidden);
    }

    for (Layer& layer : layers_) {
      const Tensor x = rms_norm(hidden);
      const Tensor q_proj = linear(x, layer.w_q, kHidden);
      Tensor kv_a_proj = linear(x, layer.w_kv_a, kHidden);
      Tensor q(batch_size * kHeads * kCached);  // [batch_size, kHeads, kRank + kRope]
      transmla::MlaProjectParams project{};
      project.q_proj = q_proj.data();
      project.kv_a_proj = kv_a_proj.data();
      project.w_uk = layer.w_uk.data();
      project.cos_sin = cos_sin_.data();
      project.positions = positions.data();
      project.slot_mapping = slot_mapping.data();
      project.q = q.data();
      project.latent_cache = layer.latent_cache.data();
      project.dtype = transmla::DType::kFloat32;
      project.num_tokens = batch_size;
      project.num_heads = kHeads;
      project.kv_lora_rank = kRank;
      project.qk_nope_head_dim = kNope;
      project.qk_rope_head_dim = kRope;
      project.num_blocks = kNumBlocks;
      project.block_size = kBlockSize;
      project.max_position = kMaxLength;
      project.w_uk_stride_head = kNope * kRank;
      project.w_uk_stride_row = kRank;
      project.cache_stride_block = kBlockSize * kCached;
      project.cache_stride_token = kCached;
      transmla::mla_project_cpu(project, threads_.parallel_for());

      Tensor out(batch_size * kHeads * kRank), lse(batch_size * kHeads);
      transmla::MlaDecodeParams decode{};
      decode.q = q.data();
      decode.latent_cache = layer.latent_cache.data();
      decode.block_table = block_table.data();
      decode.cache_seqlens = cache_seqlens.data();
      decode.out = out.data();
      decode.lse = lse.data();
      decode.dtype = transmla::DType::kFloat32;
      decode.batch_size = batch_size;
      decode.seqlen_q = 1;
      decode.num_heads = kHeads;
      decode.kv_lora_rank = kRank;
      decode.qk_rope_head_dim = kRope;
      decode.num_blocks = kNumBlocks;
      decode.block_size = kBlockSize;
      decode.max_blocks = decode.block_table_stride = kNumBlocks;
      decode.q_stride_batch = decode.q_stride_token = kHeads * kCached;
      decode.q_stride_head = decode.cache_stride_token = kCached;
      decode.cache_stride_block = kBlockSize * kCached;
      decode.softmax_scale = 1 / std::sqrt(float{kQuery});
      decode.num_splits = 1;
      decode.split_size = transmla::kBatchInvariantSplitSize;
      decode.workspace =
          workspace(transmla::mla_decode_cpu_workspace_size(decode, threads_.size()));
      transmla::mla_decode_cpu(decode, threads_.parallel_for());

      const Tensor added =
          linear(linear(out, layer.w_uv, kRank, kHeads), layer.w_o, kHeads * kValue);
      for (size_t i = 0; i < hidden.size(); ++i) hidden[i] += added[i];
    }

    const Tensor logits = linear(rms_norm(hidden), head_, kHidden);  // [batch_size, kVocab]
    for (index_t b = 0; b < batch_size; ++b) {
      if (batch[b].length < static_cast<index_t>(batch[b].tokens.size())) continue;
      const auto first = logits.begin() + b * kVocab;
      const auto likeliest = std::max_element(first, first + kVocab);
      batch[b].tokens.push_back(likeliest - first);
      batch[b].logit = *likeliest;
    }
  }

  Tensor rms_norm(const Tensor& x) {
    const Tensor ones(kHidden, 1.0f);
    Tensor out(x.size());
    transmla::RmsNormParams params{};
    params.x = x.data();
    params.weight = ones.data();
    params.out = out.data();
    params.dtype = transmla::DType::kFloat32;
    params.num_rows = static_cast<index_t>(x.size()) / kHidden;
    params.dim = kHidden;
    params.eps = kNormEps;
    transmla::rms_norm_cpu(params, threads_.parallel_for());
    return out;
  }

  // [num_tokens, num_groups, out_features] of x [num_tokens, num_groups, in_features] and
  // w [num_groups, out_features, in_features].
  Tensor linear(const Tensor& x, const Tensor& w, index_t in_features, index_t num_groups = 1) {
    transmla::LinearParams params{};
    params.dtype = transmla::DType::kFloat32;
    params.num_tokens = static_cast<index_t>(x.size()) / (num_groups * in_features);
    params.num_groups = num_groups;
    params.in_features = in_features;
    params.out_features = static_cast<index_t>(w.size()) / (num_groups * in_features);
    params.x_stride_token = num_groups * in_features;
    params.x_stride_group = params.w_stride_row = in_features;
    params.w_stride_group = params.out_features * in_features;
    Tensor out(params.num_tokens * num_groups * params.out_features);
    params.x = x.data();
    params.w = w.data();
    params.out = out.data();
    params.workspace = workspace(transmla::linear_cpu_workspace_size(params, threads_.size()));
    transmla::linear_cpu(params, threads_.parallel_for());
    return out;
  }

  // Grows to what the largest step needs; nothing is allocated by the kernels.
  void* workspace(size_t size) {
    if (workspace_.size() < size + 63) workspace_.resize(size + 63);
    void* aligned = workspace_.data();
    size_t space = workspace_.size();
    return std::align(64, size, aligned, space);
  }

  ThreadPool threads_;
  transmla::BlockPool pool_{kNumBlocks};
  const Tensor embedding_ = random_tensor(1000, kVocab* kHidden, 1);   // [kVocab, kHidden]
  const Tensor head_ = random_tensor(2000, kVocab* kHidden, kHidden);  // [kVocab, kHidden]
  std::vector<Layer> layers_;
  Tensor cos_sin_;  // [kMaxLength, kRope], cosines first
  std::vector<std::byte> workspace_;
};

int main() {
  Server server(2);
  server.serve({{0, {3, 1, 4, 1, 5}, 12},
                {1, {9}, 14},
                {2, {2, 6, 5}, 6},
                {3, {35, 8}, 17},
                {4, {9, 7, 9, 3}, 9}});
}
