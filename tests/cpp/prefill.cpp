// Prefills many shapes in buffers of exactly the size that the contract asks for: a sanitizer sees
// every byte too far.
#include "halves.h"

using namespace transmla;

namespace {

struct Shape {
  index_t num_heads, qk_nope_head_dim, qk_rope_head_dim, v_head_dim;
};
constexpr Shape kShapes[] = {{1, 16, 16, 16}, {3, 0, 10, 83}, {2, 37, 0, 1}};

struct Options {
  float softcap;
  index_t sliding_window;
  bool causal;
};
constexpr Options kOptions[] = {{0, 0, true}, {5, 0, false}, {0, 20, true}};

std::vector<char> halves(index_t count, DType dtype) {
  if (dtype == DType::kFloat32) {
    const std::vector<float> numbers(count, 0.5f);
    const char* bytes = reinterpret_cast<const char*>(numbers.data());
    return {bytes, bytes + count * sizeof(float)};
  }
  const std::vector<uint16_t> numbers(count, dtype == DType::kFloat16 ? 0x3800 : 0x3f00);
  const char* bytes = reinterpret_cast<const char*>(numbers.data());
  return {bytes, bytes + count * sizeof(uint16_t)};
}

int count_wrong(const Shape& shape, const Options& options, DType dtype) {
  const std::vector<int32_t> cu_seqlens_q = {0, 0, 1, 50, 180, 699};
  const std::vector<int32_t> cu_seqlens_k = {0, 3, 4, 204, 334, 900};
  const index_t num_tokens = cu_seqlens_q.back(), num_kv_tokens = cu_seqlens_k.back();
  const index_t qk_head_dim = shape.qk_nope_head_dim + shape.qk_rope_head_dim;
  const index_t kv_dim = shape.qk_nope_head_dim + shape.v_head_dim;
  const std::vector<char> q = halves(num_tokens * shape.num_heads * qk_head_dim, dtype);
  const std::vector<char> kv = halves(num_kv_tokens * shape.num_heads * kv_dim, dtype);
  const std::vector<char> k_pe = halves(num_kv_tokens * shape.qk_rope_head_dim, dtype);
  std::vector<char> out(num_tokens * shape.num_heads * shape.v_head_dim *
                        (dtype == DType::kFloat32 ? 4 : 2));
  std::vector<float> lse(num_tokens * shape.num_heads);

  MlaPrefillParams params{};
  params.q = q.data();
  params.kv = kv.data();
  params.k_pe = k_pe.data();
  params.cu_seqlens_q = cu_seqlens_q.data();
  params.cu_seqlens_k = cu_seqlens_k.data();
  params.out = out.data();
  params.lse = lse.data();
  params.dtype = dtype;
  params.batch_size = static_cast<index_t>(cu_seqlens_q.size()) - 1;
  params.num_tokens = num_tokens;
  params.num_heads = shape.num_heads;
  params.qk_nope_head_dim = shape.qk_nope_head_dim;
  params.qk_rope_head_dim = shape.qk_rope_head_dim;
  params.v_head_dim = shape.v_head_dim;
  params.q_stride_token = shape.num_heads * qk_head_dim;
  params.q_stride_head = qk_head_dim;
  params.kv_stride_token = shape.num_heads * kv_dim;
  params.kv_stride_head = kv_dim;
  params.k_pe_stride_token = shape.qk_rope_head_dim;
  params.softmax_scale = 0.125f;
  params.softcap = options.softcap;
  params.sliding_window = options.sliding_window;
  params.causal = options.causal;
  params.workspace = std::aligned_alloc(64, mla_prefill_cpu_workspace_size(params, 1));
  mla_prefill_cpu(params, serial());
  std::free(params.workspace);

  int num_wrong = 0;
  for (index_t i = 0; i < num_tokens * shape.num_heads * shape.v_head_dim; ++i) {
    num_wrong += !is_half(out, i, dtype);
  }
  for (float x : lse) num_wrong += !std::isfinite(x);
  return num_wrong;
}

}  // namespace

int main() { return sweep(kShapes, kOptions, count_wrong); }
