// Which kernel mla_decode gets on CUDA, for bf16 at 512 + 64: a line of plan.h's numbers for each
// line "num_heads num_sms shared_memory has_wgmma" of the input.
#include <iostream>

#include "cuda/mla_decode/plan.h"

int main() {
  transmla::MlaDecodeParams params{};
  params.dtype = transmla::DType::kBFloat16;
  params.seqlen_q = 1;
  params.kv_lora_rank = 512;
  params.qk_rope_head_dim = 64;
  params.block_size = 64;
  params.num_blocks = 1;
  transmla::DeviceLimits device{};
  while (std::cin >> params.num_heads >> device.num_sms >> device.shared_memory >>
         device.has_wgmma) {
    const auto plan = transmla::make_mla_decode_plan(params, device);
    std::cout << plan.rows << ' ' << plan.num_row_blocks << ' ' << plan.num_stages << ' '
              << plan.num_parts << ' ' << transmla::kMinTilesOfPart << '\n';
  }
}
