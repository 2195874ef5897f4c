// Decodes many shapes in buffers of exactly the size that the contract asks for: a sanitizer sees
// every byte too far. Cache slots that no sequence owns hold NaN, which must not reach the output.
#include "halves.h"

using namespace transmla;

namespace {

struct Shape {
  index_t seqlen_q, num_heads, kv_lora_rank, qk_rope_head_dim, block_size;
};
constexpr Shape kShapes[] = {{1, 1, 16, 16, 1}, {2, 17, 48, 0, 7}, {3, 11, 83, 10, 16}};

struct Options {
  float softcap;
  index_t sliding_window, num_splits, split_size;
};
constexpr Options kOptions[] = {{0, 0, 1, 0}, {5, 0, 3, 0}, {0, 20, 2, 0}, {0, 0, 0, 64}};

constexpr uint16_t kHalfNaN = 0x7fff;  // in bf16 as in fp16

size_t bytes_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

void set(std::vector<char>& tensor, index_t i, DType dtype, bool nan) {
  const float number = nan ? NAN : 0.5f;
  const uint16_t half = nan ? kHalfNaN : dtype == DType::kFloat16 ? 0x3800 : 0x3f00;
  if (dtype == DType::kFloat32) {
    reinterpret_cast<float*>(tensor.data())[i] = number;
  } else {
    reinterpret_cast<uint16_t*>(tensor.data())[i] = half;
  }
}

int count_wrong(const Shape& shape, const Options& options, DType dtype) {
  const std::vector<int32_t> cache_seqlens = {0, 131, static_cast<int32_t>(shape.seqlen_q), 97};
  const index_t batch_size = cache_seqlens.size();
  const index_t dim = shape.kv_lora_rank + shape.qk_rope_head_dim;
  const index_t max_blocks = (131 + shape.block_size - 1) / shape.block_size;
  const index_t num_blocks = batch_size * max_blocks;
  const index_t num_rows = batch_size * shape.seqlen_q * shape.num_heads;

  std::vector<char> q(num_rows * dim * bytes_of(dtype));
  for (index_t i = 0; i < num_rows * dim; ++i) set(q, i, dtype, false);
  std::vector<char> cache(num_blocks * shape.block_size * dim * bytes_of(dtype));
  std::vector<int32_t> block_table(num_blocks, 0x7fffffff);
  for (index_t b = 0; b < batch_size; ++b) {
    for (index_t t = 0; t < max_blocks * shape.block_size; ++t) {
      const index_t block = num_blocks - 1 - (b * max_blocks + t / shape.block_size);
      const bool used = t < cache_seqlens[b];
      if (used) block_table[b * max_blocks + t / shape.block_size] = static_cast<int32_t>(block);
      const index_t slot = block * shape.block_size + t % shape.block_size;
      for (index_t d = 0; d < dim; ++d) set(cache, slot * dim + d, dtype, !used);
    }
  }
  std::vector<char> out(num_rows * shape.kv_lora_rank * bytes_of(dtype));
  std::vector<float> lse(num_rows);

  MlaDecodeParams params{};
  params.q = q.data();
  params.latent_cache = cache.data();
  params.block_table = block_table.data();
  params.cache_seqlens = cache_seqlens.data();
  params.out = out.data();
  params.lse = lse.data();
  params.dtype = dtype;
  params.batch_size = batch_size;
  params.seqlen_q = shape.seqlen_q;
  params.num_heads = shape.num_heads;
  params.kv_lora_rank = shape.kv_lora_rank;
  params.qk_rope_head_dim = shape.qk_rope_head_dim;
  params.num_blocks = num_blocks;
  params.block_size = shape.block_size;
  params.max_blocks = params.block_table_stride = max_blocks;
  params.q_stride_head = params.cache_stride_token = dim;
  params.q_stride_token = shape.num_heads * dim;
  params.q_stride_batch = shape.seqlen_q * params.q_stride_token;
  params.cache_stride_block = shape.block_size * dim;
  params.softmax_scale = 0.125f;
  params.softcap = options.softcap;
  params.sliding_window = options.sliding_window;
  params.num_splits = options.num_splits;
  params.split_size = options.split_size;
  params.workspace = std::aligned_alloc(64, mla_decode_cpu_workspace_size(params, 1));
  mla_decode_cpu(params, serial());
  std::free(params.workspace);

  int num_wrong = 0;
  for (index_t i = 0; i < num_rows * shape.kv_lora_rank; ++i) {
    const bool empty = i < num_rows * shape.kv_lora_rank / batch_size;
    num_wrong += !empty && !is_half(out, i, dtype);
  }
  for (index_t i = 0; i < num_rows; ++i) {
    num_wrong += std::isnan(lse[i]) || (lse[i] == -INFINITY) != (i < num_rows / batch_size);
  }
  return num_wrong;
}

}  // namespace

int main() { return sweep(kShapes, kOptions, count_wrong); }
