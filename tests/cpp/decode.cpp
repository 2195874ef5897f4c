// Decodes a ragged batch on every instruction set and compares with a plain loop.
#include <transmla/transmla.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

int main() {
  constexpr int kBatch = 2, kHeads = 3, kRank = 32, kDim = kRank + 16, kBlockSize = 16;
  constexpr int32_t kUnused = 0x7fffffff;
  const std::vector<int32_t> block_table = {6, 1, 4, 0, 3, kUnused, kUnused, kUnused};
  const std::vector<int32_t> cache_seqlens = {53, 9};
  std::vector<float> q(kBatch * kHeads * kDim), cache(8 * kBlockSize * kDim, NAN);
  const auto token = [&](int b, int t) {
    return &cache[(block_table[b * 4 + t / kBlockSize] * kBlockSize + t % kBlockSize) * kDim];
  };
  std::mt19937 random(0);
  std::normal_distribution<float> normal;
  for (float& x : q) x = normal(random);
  for (int b = 0; b < kBatch; ++b) {
    for (int t = 0; t < cache_seqlens[b]; ++t) {
      for (int d = 0; d < kDim; ++d) token(b, t)[d] = normal(random);
    }
  }

  std::vector<float> out(kBatch * kHeads * kRank), lse(kBatch * kHeads);
  transmla::MlaDecodeParams params{};
  params.q = q.data();
  params.latent_cache = cache.data();
  params.block_table = block_table.data();
  params.cache_seqlens = cache_seqlens.data();
  params.out = out.data();
  params.lse = lse.data();
  params.dtype = transmla::DType::kFloat32;
  params.batch_size = kBatch;
  params.seqlen_q = 1;
  params.num_heads = kHeads;
  params.kv_lora_rank = kRank;
  params.qk_rope_head_dim = kDim - kRank;
  params.num_blocks = 8;
  params.block_size = kBlockSize;
  params.max_blocks = params.block_table_stride = 4;
  params.q_stride_batch = params.q_stride_token = kHeads * kDim;
  params.q_stride_head = params.cache_stride_token = kDim;
  params.cache_stride_block = kBlockSize * kDim;
  params.softmax_scale = 1 / std::sqrt(float{kDim});
  params.num_splits = 2;

  using transmla::Isa;
  for (Isa isa : {Isa::kScalar, Isa::kNeon, Isa::kAvx2, Isa::kAvx512}) {
    if (!transmla::force_isa(isa)) continue;
    const size_t size = transmla::mla_decode_cpu_workspace_size(params, 1);
    params.workspace = std::aligned_alloc(64, (size + 63) / 64 * 64);
    transmla::mla_decode_cpu(params, transmla::serial());
    std::free(params.workspace);

    int num_wrong = 0;
    const auto compare = [&](double expected, float actual) {
      num_wrong += !(std::fabs(expected - actual) < 2e-6);
    };
    for (int row = 0; row < kBatch * kHeads; ++row) {
      std::vector<double> expected(kRank);
      double total = 0;
      for (int t = 0; t < cache_seqlens[row / kHeads]; ++t) {
        const float* k = token(row / kHeads, t);
        double score = 0;
        for (int d = 0; d < kDim; ++d) score += double{q[row * kDim + d]} * k[d];
        const double weight = std::exp(score * params.softmax_scale);
        for (int r = 0; r < kRank; ++r) expected[r] += weight * k[r];
        total += weight;
      }
      compare(std::log(total), lse[row]);
      for (int r = 0; r < kRank; ++r) compare(expected[r] / total, out[row * kRank + r]);
    }
    std::printf("%s: %d wrong numbers\n", transmla::isa_name(isa), num_wrong);
    if (num_wrong > 0) return EXIT_FAILURE;
  }
}
