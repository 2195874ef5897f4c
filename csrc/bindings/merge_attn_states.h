#pragma once

#include <tuple>

#include "check.h"
#include "transmla/merge_attn_states.h"

namespace transmla {

template <class Backend>
std::tuple<Tensor, Tensor> merge_attn_states(const Tensor& out_a, const Tensor& lse_a,
                                             const Tensor& out_b, const Tensor& lse_b) {
  const Check check("merge_attn_states", out_a);
  check.tensor("out_a", out_a, kFloats,
               {{"batch_size"}, {"seqlen_q"}, {"num_heads"}, {"head_dim"}});

  MergeAttnStatesParams params{};
  params.dtype = dtype_of(out_a);
  params.batch_size = out_a.size(0);
  params.seqlen_q = out_a.size(1);
  params.num_heads = out_a.size(2);
  params.head_dim = out_a.size(3);
  const std::initializer_list<Dim> lse_dims = {{"batch_size", params.batch_size},
                                               {"num_heads", params.num_heads},
                                               {"seqlen_q", params.seqlen_q}};
  check.tensor("lse_a", lse_a, {ScalarType::Float}, lse_dims);
  check.tensor("out_b", out_b, {out_a.scalar_type()},
               {{"batch_size", params.batch_size},
                {"seqlen_q", params.seqlen_q},
                {"num_heads", params.num_heads},
                {"head_dim", params.head_dim}});
  check.tensor("lse_b", lse_b, {ScalarType::Float}, lse_dims);

  Tensor out = torch::stable::empty_like(out_a);
  Tensor lse = torch::stable::empty_like(lse_a);
  params.out_a = out_a.const_data_ptr();
  params.lse_a = lse_a.const_data_ptr<float>();
  params.out_b = out_b.const_data_ptr();
  params.lse_b = lse_b.const_data_ptr<float>();
  params.out = out.mutable_data_ptr();
  params.lse = lse.mutable_data_ptr<float>();
  Backend::launch(params, out_a);
  return {out, lse};
}

}  // namespace transmla
