#include "cuda/kernels.h"
#include "cuda/mla_project/project.cuh"

namespace transmla {
namespace {

index_t ceil_div(index_t a, index_t b) { return (a + b - 1) / b; }

// Whether rows of 16-bit numbers can be moved kChunk at a time.
template <class... Pointers>
bool aligned(Pointers... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

template <class... Sizes>
bool whole_chunks(Sizes... sizes) {
  return ((sizes % kChunk == 0) && ...);
}

bool fits_tensor_cores(const MlaProjectParams& p) {
  return aligned(p.q_proj, p.kv_a_proj, p.w_uk, p.kv_norm, p.cos_sin, p.q, p.latent_cache) &&
         whole_chunks(p.kv_lora_rank, p.qk_nope_head_dim, p.qk_rope_head_dim, p.w_uk_stride_head,
                      p.w_uk_stride_row, p.cache_stride_block, p.cache_stride_token);
}

ProjectGrid make_grid(const MlaProjectParams& p, index_t tokens_per_block, index_t pairs) {
  const index_t slices = ceil_div(p.kv_lora_rank, kColumns);
  const index_t steps = p.num_tokens * p.num_heads * p.qk_rope_head_dim / 2 / pairs;
  return {static_cast<unsigned>(slices * p.num_heads * ceil_div(p.num_tokens, tokens_per_block)),
          static_cast<unsigned>(ceil_div(steps, kThreads)),
          static_cast<unsigned>(ceil_div(p.num_tokens, kWarps))};
}

template <class T>
void project(const MlaProjectParams& p, cudaStream_t stream) {
  if constexpr (!std::is_same_v<T, float>) {
    if (fits_tensor_cores(p)) {
      // Enough for a block to earn its W_UK, few enough for many blocks.
      constexpr int kTokensPerBlock = 256;
      const ProjectGrid grid = make_grid(p, kTokensPerBlock, kPairs<T, kChunk>);
      const auto kernel =
          p.num_tokens <= 16 ? mla_project_kernel<T, 16> : mla_project_kernel<T, 64>;
      kernel<<<grid.absorb + grid.rotate + grid.append, kThreads, 0, stream>>>(p, grid,
                                                                               kTokensPerBlock);
      return;
    }
  }
  const ProjectGrid grid = make_grid(p, kPlainTokens, 1);
  mla_project_plain_kernel<T>
      <<<grid.absorb + grid.rotate + grid.append, kThreads, 0, stream>>>(p, grid);
}

template <class T>
void normalize_rows(const RmsNormParams& p, cudaStream_t stream) {
  constexpr int kSize = 16 / sizeof(T);
  const auto kernel = p.dim % kSize == 0 && aligned(p.x, p.weight, p.out)
                          ? rms_norm_kernel<T, kSize>
                          : rms_norm_kernel<T, 1>;
  kernel<<<static_cast<unsigned>(ceil_div(p.num_rows, kWarps)), kThreads, 0, stream>>>(p);
}

template <class Body>
int with_dtype(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32:
      body(float{});
      break;
    case DType::kBFloat16:
      body(bf16{});
      break;
    case DType::kFloat16:
      body(fp16{});
      break;
  }
  return cudaGetLastError();
}

}  // namespace

int launch_mla_project(const MlaProjectParams& params, void* stream) {
  if (params.num_tokens == 0) return cudaSuccess;
  return with_dtype(params.dtype, [&](auto zero) {
    project<decltype(zero)>(params, static_cast<cudaStream_t>(stream));
  });
}

int launch_rms_norm(const RmsNormParams& params, void* stream) {
  if (params.num_rows == 0) return cudaSuccess;
  return with_dtype(params.dtype, [&](auto zero) {
    normalize_rows<decltype(zero)>(params, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace transmla
