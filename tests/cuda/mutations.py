"""Takes a barrier, a wait or a mask out of a kernel, one at a time, and reports the test that fails for it.

    python tests/cuda/mutations.py [part of a name]

Ends with status 1 if an edit is survived: then a test is missing, or the line is.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import harness  # noqa: E402


@dataclass(frozen=True)
class Mutation:
    """An edit of one file of csrc/cuda: ``old``, which is there once, becomes ``new``."""

    name: str
    path: str
    old: str
    new: str
    test: str  # that should fail, relative to tests/cuda


MUTATIONS = [
    Mutation(
        "merge: an empty part by product",
        "merge_attn_states/launch.cu",
        "weight_a == 0 ? 0.0f : x[k] * weight_a",
        "x[k] * weight_a",
        "test_merge_attn_states.py::test_empty_part_leaves_the_other_as_it_is",
    ),
    Mutation(
        "merge: rows past the last",
        "merge_attn_states/launch.cu",
        "if (row >= p.batch_size * p.seqlen_q * p.num_heads) return;",
        "",
        "test_merge_attn_states.py::test_matches_the_reference",
    ),
    Mutation(
        "project: wait for the copies",
        "mla_project/project.cuh",
        "wait_for_copies<0>();",
        "",
        "test_mla_project.py::test_matches_the_reference",
    ),
    Mutation(
        "project: barrier before the products",
        "mla_project/project.cuh",
        "wait_for_copies<0>();\n      __syncthreads();",
        "wait_for_copies<0>();",
        "test_mla_project.py::test_matches_the_reference",
    ),
    Mutation(
        "project: barrier after the products",
        "mla_project/project.cuh",
        "      __syncthreads();\n    }\n    const index_t column",
        "    }\n    const index_t column",
        "test_mla_project.py::test_any_nope_dim_and_number_of_tokens",
    ),
    Mutation(
        "project: tokens past the last",
        "mla_project/project.cuh",
        "token + row < end && column < p.qk_nope_head_dim",
        "column < p.qk_nope_head_dim",
        "test_mla_project.py::test_any_nope_dim_and_number_of_tokens",
    ),
    Mutation(
        "project: rows of W_UK past the last",
        "mla_project/project.cuh",
        "depth + row < p.qk_nope_head_dim && column < p.kv_lora_rank",
        "column < p.kv_lora_rank",
        "test_mla_project.py::test_weights_and_cache_may_be_strided",
    ),
    Mutation(
        "project: columns past the last",
        "mla_project/project.cuh",
        "if (row < end && column < p.kv_lora_rank)",
        "if (row < end)",
        "test_mla_project.py::test_any_number_of_heads",
    ),
    Mutation(
        "project: tokens without a slot",
        "mla_project/project.cuh",
        "if (slot < 0) return;",
        "",
        "test_mla_project.py::test_tokens_without_a_slot_are_not_stored",
    ),
    Mutation(
        "decode: wait for a tile",
        "mla_decode/tiles.cuh",
        "{ wait_for_copies(plan_.num_stages - 2); }",
        "{}",
        "test_mla_decode.py::test_ragged_batch_matches_the_reference",
    ),
    Mutation(
        "decode: one more tile in flight",
        "mla_decode/tiles.cuh",
        "wait_for_copies(plan_.num_stages - 2);",
        "wait_for_copies(plan_.num_stages - 1);",
        "test_mla_decode.py::test_ragged_batch_matches_the_reference",
    ),
    Mutation(
        "decode: wait for the queries",
        "mla_decode/tiles.cuh",
        "{ wait_for_copies(plan_.num_stages - 1); }",
        "{}",
        "test_mla_decode.py::test_ragged_batch_matches_the_reference",
    ),
    Mutation(
        "decode: no group for a tile past the end",
        "mla_decode/tiles.cuh",
        "+ 2);\n      }\n    }\n    commit_copies();\n  }\n",
        "+ 2);\n      }\n      commit_copies();\n    }\n  }\n",
        "test_mla_decode.py::test_ragged_batch_matches_the_reference",
    ),
    Mutation(
        "decode: copies go to the tile in work",
        "mla_decode/splitkv.cuh",
        "tiles_.copy(tile + plan_.num_stages - 1, tiles_.stage(plan_.num_stages - 1));",
        "tiles_.copy(tile + plan_.num_stages - 1, tiles_.stage());",
        "test_mla_decode.py::test_ragged_batch_matches_the_reference",
    ),
    Mutation(
        "decode: barrier before the softmax",
        "mla_decode/splitkv.cuh",
        "      score();\n      __syncthreads();\n",
        "      score();\n",
        "test_mla_decode.py::test_ragged_batch_matches_the_reference",
    ),
    Mutation(
        "decode: barrier after the softmax",
        "mla_decode/splitkv.cuh",
        "      softmax(tile);\n      __syncthreads();\n",
        "      softmax(tile);\n",
        "test_mla_decode.py::test_ragged_batch_matches_the_reference",
    ),
    Mutation(
        "decode: barrier before results are written",
        "mla_decode/splitkv.cuh",
        "    finish_softmax();\n    __syncthreads();\n",
        "    finish_softmax();\n",
        "test_mla_decode.py::test_ragged_batch_matches_the_reference",
    ),
    Mutation(
        "decode: results go through the next tile's stage",
        "mla_decode/splitkv.cuh",
        "tiles_.slice(tiles_.stage(plan_.num_stages - 1));",
        "tiles_.slice(tiles_.stage());",
        "test_mla_decode.py::test_ragged_batch_matches_the_reference",
    ),
    Mutation(
        "decode: tokens past the end are copied",
        "mla_decode/tiles.cuh",
        "token >= piece_.tokens.begin && token < piece_.tokens.end;",
        "token >= piece_.tokens.begin;",
        "test_mla_decode.py::test_ragged_batch_matches_the_reference",
    ),
    Mutation(
        "decode: tokens before the window are copied",
        "mla_decode/tiles.cuh",
        "token >= piece_.tokens.begin && token < piece_.tokens.end;",
        "token < piece_.tokens.end;",
        "test_mla_decode.py::test_pages_before_the_window_are_never_read",
    ),
    Mutation(
        "decode: tokens past the end are scored",
        "mla_decode/splitkv.cuh",
        "distance > 0 && distance <= window",
        "distance <= window",
        "test_mla_decode.py::test_ragged_batch_matches_the_reference",
    ),
    Mutation(
        "decode: tokens before the window are scored",
        "mla_decode/splitkv.cuh",
        "distance > 0 && distance <= window",
        "distance > 0",
        "test_mla_decode.py::test_sliding_window",
    ),
    Mutation(
        "decode: pages past the end are looked up",
        "mla_decode/tiles.cuh",
        " || token >= piece_.tokens.end) return false;",
        ") return false;",
        "test_mla_decode.py::test_ragged_batch_matches_the_reference",
    ),
    Mutation(
        "decode: pages of the first 512 tokens for all",
        "mla_decode/tiles.cuh",
        "        pages_ = next_pages_;\n        next_pages_",
        "        next_pages_",
        "test_mla_decode.py::test_any_block_size_of_sixteens",
    ),
    Mutation(
        "decode: rows past the last are written",
        "mla_decode/splitkv.cuh",
        "        if (first_row_ + i * 16 + row >= num_rows_) continue;\n",
        "",
        "test_mla_decode.py::test_any_number_of_heads",
    ),
    Mutation(
        "decode: rows of parts past the last are written",
        "mla_decode/splitkv.cuh",
        "        if (first_row_ + row >= num_rows_) continue;\n",
        "",
        "test_mla_decode.py::test_any_number_of_splits",
    ),
    Mutation(
        "decode: a row that has seen nothing is shifted",
        "mla_decode/splitkv.cuh",
        "top == -INFINITY ? 0 : top;",
        "top;",
        "test_mla_decode.py::test_each_new_query_sees_no_later_token",
    ),
    Mutation(
        "decode: nobody writes that a sequence is empty",
        "mla_decode/parts.cuh",
        "max(first + 1, (tokens.end + kTileTokens - 1) / kTileTokens)",
        "(tokens.end + kTileTokens - 1) / kTileTokens",
        "test_mla_decode.py::test_ragged_batch_matches_the_reference",
    ),
    Mutation(
        "decode: a sequence of one part is merged",
        "mla_decode/combine.cuh",
        "  if (slots.count == 1) return;\n",
        "",
        "test_mla_decode.py::test_ragged_batch_matches_the_reference",
    ),
    Mutation(
        "tma decode: wait for a tile",
        "mla_decode/tiles.cuh",
        "    wait_for_phase(barriers_ + 8 * stage_, phase_);\n",
        "",
        "test_mla_decode.py::test_ragged_batch_matches_the_reference",
    ),
    Mutation(
        "tma decode: the phase never turns",
        "mla_decode/tiles.cuh",
        "    if (stage_ == 0) phase_ ^= 1;\n",
        "",
        "test_mla_decode.py::test_ragged_batch_matches_the_reference",
    ),
    Mutation(
        "tma decode: the tail's bytes are not waited for",
        "mla_decode/tiles.cuh",
        "kTileTokens * (kSliceBytes + (has_tail_ ? kTailBytes : 0))",
        "kTileTokens * kSliceBytes",
        "test_mla_decode.py::test_ragged_batch_matches_the_reference",
    ),
    Mutation(
        "tma decode: tokens past the end stay",
        "mla_decode/tiles.cuh",
        "      zero(slice(stage_) + row * kSliceBytes + lane_ % 8 * 16);\n",
        "",
        "test_mla_decode.py::test_ragged_batch_matches_the_reference",
    ),
    Mutation(
        "fp8 decode: wait for a tile",
        "mla_decode/tiles.cuh",
        "    RingOfCopies::wait(tile);\n",
        "",
        "test_fp8_cache.py::test_tensor_cores_match_the_reference",
    ),
    Mutation(
        "fp8 decode: no group for a tile past the end",
        "mla_decode/tiles.cuh",
        "&next_scale_pages_);\n      }\n    }\n    commit_copies();\n  }\n",
        "&next_scale_pages_);\n      }\n      commit_copies();\n    }\n  }\n",
        "test_fp8_cache.py::test_tensor_cores_match_the_reference",
    ),
    Mutation(
        "fp8 decode: codes past the end are copied",
        "mla_decode/tiles.cuh",
        "lane_ % 4 * 16, is_visible(token + row));",
        "lane_ % 4 * 16, true);",
        "test_fp8_cache.py::test_decode_moves_and_multiplies_no_more_than_it_has_to",
    ),
    Mutation(
        "fp8 decode: scales past the end are copied",
        "mla_decode/tiles.cuh",
        "first + lane_ % 16,\n                         is_visible(token + lane_));",
        "first + lane_ % 16,\n                         true);",
        "test_fp8_cache.py::test_tensor_cores_match_the_reference",
    ),
    Mutation(
        "fp8 decode: all scales of a tile from the page of its first half",
        "mla_decode/tiles.cuh",
        "scale_pages_, tile * 2 + lane_ / 16);",
        "scale_pages_, tile * 2);",
        "test_fp8_cache.py::test_any_block_size_of_sixteens",
    ),
    Mutation(
        "fp8 decode: scales of the first 512 tokens for all",
        "mla_decode/tiles.cuh",
        "        scale_pages_ = next_scale_pages_;\n",
        "",
        "test_fp8_cache.py::test_any_block_size_of_sixteens",
    ),
    Mutation(
        "fp8 decode: scores without scales",
        "mla_decode/splitkv.cuh",
        "sum.x * tokens.x * scale",
        "sum.x * scale",
        "test_fp8_cache.py::test_scales_of_each_token_reach_scores_and_values",
    ),
    Mutation(
        "fp8 decode: values without scales",
        "mla_decode/splitkv.cuh",
        "x[1] * tokens.y)",
        "x[1])",
        "test_fp8_cache.py::test_scales_of_each_token_reach_scores_and_values",
    ),
    Mutation(
        "fp8 decode: only the first two of four codes",
        "common/dtype.cuh",
        "pair(codes.y, 0x3424)",
        "pair(codes.y, 0x1404)",
        "test_fp8_cache.py::test_every_number_is_read_as_torch_reads_it",
    ),
    Mutation(
        "fp8 append: ties away from even",
        "common/dtype.cuh",
        "(bits + 0x7ffff + (bits >> 20 & 1))",
        "(bits + 0x80000)",
        "test_fp8_cache.py::test_numbers_are_rounded_as_torch_rounds_them",
    ),
    Mutation(
        "fp8 append: a scale that is too small",
        "common/dtype.cuh",
        "(__float_as_uint(least) + 0x7fffff)",
        "__float_as_uint(least)",
        "test_fp8_cache.py::test_scales_are_the_least_powers_of_two_that_do",
    ),
    Mutation(
        "fp8 append: a token that is not finite",
        "common/dtype.cuh",
        "  if (!isfinite(least)) return NAN;\n",
        "",
        "test_fp8_cache.py::test_a_token_that_is_not_finite_is_stored_as_nan",
    ),
    Mutation(
        "general decode: barrier before the queries are read",
        "mla_decode/general.cuh",
        "    __syncthreads();\n\n    const int seen_end",
        "\n    const int seen_end",
        "test_mla_decode.py::test_general_kernel_takes_any_shape",
    ),
    Mutation(
        "general decode: barrier after the scores",
        "mla_decode/general.cuh",
        "      __syncthreads();\n      float score = -INFINITY",
        "      float score = -INFINITY",
        "test_mla_decode.py::test_general_kernel_takes_any_shape",
    ),
    Mutation(
        "general decode: barrier before scores become probabilities",
        "mla_decode/general.cuh",
        "      __syncthreads();\n      if (warp == 0)",
        "      if (warp == 0)",
        "test_mla_decode.py::test_general_kernel_takes_any_shape",
    ),
    Mutation(
        "general decode: barrier after the probabilities",
        "mla_decode/general.cuh",
        "probability * token_scale;\n      __syncthreads();",
        "probability * token_scale;",
        "test_mla_decode.py::test_general_kernel_takes_any_shape",
    ),
    Mutation(
        "general decode: barrier after a tile",
        "mla_decode/general.cuh",
        "        sums[i] = sum;\n      }\n      __syncthreads();",
        "        sums[i] = sum;\n      }",
        "test_mla_decode.py::test_general_kernel_takes_any_shape",
    ),
    Mutation(
        "wgmma: wait for a tile",
        "mla_decode/wgmma_sm90.cuh",
        "      wait_for_phase(shared_address(&shared_.full[place_.stage]), place_.parity);\n",
        "",
        "test_mla_decode_wgmma.py::test_any_length",
    ),
    Mutation(
        "wgmma: wait for an empty stage",
        "mla_decode/wgmma_sm90.cuh",
        "      wait_for_phase(shared_address(&shared.empty[place.stage]), place.parity ^ 1);\n",
        "",
        "test_mla_decode_wgmma.py::test_any_length",
    ),
    Mutation(
        "wgmma: a stage is empty when one group is done",
        "mla_decode/wgmma_sm90.cuh",
        "init_barrier(shared_address(&shared.empty[stage]), kGroups);",
        "init_barrier(shared_address(&shared.empty[stage]), 1);",
        "test_mla_decode_wgmma.py::test_any_length",
    ),
    Mutation(
        "wgmma: a stage is empty before the values are read",
        "mla_decode/wgmma_sm90.cuh",
        "      accumulate(probabilities);\n      if (threadIdx.x % kGroupThreads == 0) "
        "arrive(shared_address(&shared_.empty[place_.stage]));\n",
        "      if (threadIdx.x % kGroupThreads == 0) arrive(shared_address(&shared_.empty[place_.stage]));\n"
        "      accumulate(probabilities);\n",
        "test_mla_decode_wgmma.py::test_any_length",
    ),
    Mutation(
        "wgmma: wait for the queries",
        "mla_decode/wgmma_sm90.cuh",
        "    wait_for_copies<0>();\n",
        "",
        "test_mla_decode_wgmma.py::test_any_length",
    ),
    Mutation(
        "wgmma: fence after the queries",
        "mla_decode/wgmma_sm90.cuh",
        "    wait_for_copies<0>();\n    fence_async_proxy();\n",
        "    wait_for_copies<0>();\n",
        "test_mla_decode_wgmma.py::test_any_length",
    ),
    Mutation(
        "wgmma: barrier after the queries",
        "mla_decode/wgmma_sm90.cuh",
        "    fence_async_proxy();\n    sync_groups();\n",
        "    fence_async_proxy();\n",
        "test_mla_decode_wgmma.py::test_any_length",
    ),
    Mutation(
        "wgmma: barrier before the next queries",
        "mla_decode/wgmma_sm90.cuh",
        "    sync_groups();  // the other group may still multiply by the q of the piece before\n",
        "",
        "test_mla_decode_wgmma.py::test_any_length",
    ),
    Mutation(
        "wgmma: tokens past the end keep their values",
        "mla_decode/wgmma_sm90.cuh",
        "token < tokens.begin || token + kTokens > tokens.end",
        "token < tokens.begin",
        "test_mla_decode_wgmma.py::test_any_length",
    ),
    Mutation(
        "wgmma: tokens before the window keep their values",
        "mla_decode/wgmma_sm90.cuh",
        "token < tokens.begin || token + kTokens > tokens.end",
        "token + kTokens > tokens.end",
        "test_mla_decode_wgmma.py::test_pages_before_the_window_are_never_read",
    ),
    Mutation(
        "wgmma: fence after tokens are cleared",
        "mla_decode/wgmma_sm90.cuh",
        "        fence_async_proxy();\n        sync_groups();",
        "        sync_groups();",
        "test_mla_decode_wgmma.py::test_any_length",
    ),
    Mutation(
        "wgmma: barrier after tokens are cleared",
        "mla_decode/wgmma_sm90.cuh",
        "        sync_groups();  // a group's columns are keys of the other\n",
        "",
        "test_mla_decode_wgmma.py::test_any_length",
    ),
    Mutation(
        "wgmma: tokens that a row does not see are scored",
        "mla_decode/wgmma_sm90.cuh",
        "x = distance < num_seen_[half] ? x",
        "x = distance < ~0u ? x",
        "test_mla_decode_wgmma.py::test_any_length",
    ),
    Mutation(
        "wgmma: tokens of the next part are scored",
        "mla_decode/wgmma_sm90.cuh",
        "min(end, tokens.end) - first_seen_[half]",
        "end - first_seen_[half]",
        "test_mla_decode_wgmma.py::test_any_number_of_splits",
    ),
    Mutation(
        "wgmma: pages past the end are looked up",
        "mla_decode/wgmma_sm90.cuh",
        "token + kBoxTokens > tokens.begin && token < tokens.end;",
        "token + kBoxTokens > tokens.begin;",
        "test_mla_decode_wgmma.py::test_moves_and_multiplies_no_more_than_it_has_to",
    ),
    Mutation(
        "wgmma: rows past the last are written",
        "mla_decode/wgmma_sm90.cuh",
        "          if (first + row >= num_rows_) continue;\n",
        "",
        "test_mla_decode_wgmma.py::test_any_number_of_rows_from_49_on",
    ),
    Mutation(
        "wgmma: rows of parts past the last are written",
        "mla_decode/wgmma_sm90.cuh",
        "      if (row >= num_rows_) continue;\n      float* out",
        "      float* out",
        "test_mla_decode_wgmma.py::test_any_number_of_splits",
    ),
    Mutation(
        "wgmma: products are not committed",
        "common/wgmma.cuh",
        '  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");\n',
        "",
        "test_mla_decode_wgmma.py::test_any_length",
    ),
    Mutation(
        "wgmma: products are not waited for",
        "common/wgmma.cuh",
        '  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");\n',
        "",
        "test_mla_decode_wgmma.py::test_any_length",
    ),
    Mutation(
        "wgmma: fence before products",
        "common/wgmma.cuh",
        '  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");\n',
        "",
        "test_mla_decode_wgmma.py::test_a_tile_costs_what_it_should",
    ),
    Mutation(
        "covariance: one more copy in flight",
        "covariance_add/accumulate.cuh",
        "wait_for_copies<kStages - 2>();",
        "wait_for_copies<kStages - 1>();",
        "test_covariance_add.py::test_any_number_of_tokens",
    ),
    Mutation(
        "covariance: barrier of the ring",
        "covariance_add/accumulate.cuh",
        "wait_for_copies<kStages - 2>();\n    __syncthreads();",
        "wait_for_copies<kStages - 2>();",
        "test_covariance_add.py::test_any_number_of_tokens",
    ),
    Mutation(
        "covariance: tokens past the last",
        "covariance_add/accumulate.cuh",
        "token + row < num_tokens && first + chunk * 8 < dim",
        "first + chunk * 8 < dim",
        "test_covariance_add.py::test_any_number_of_tokens",
    ),
    Mutation(
        "covariance: the last tokens are not folded",
        "covariance_add/accumulate.cuh",
        " || token + kStageTokens >= num_tokens",
        "",
        "test_covariance_add.py::test_any_number_of_tokens",
    ),
    Mutation(
        "covariance: everything in fp32",
        "covariance_add/accumulate.cuh",
        "constexpr int kFoldTokens = 256;",
        "constexpr int kFoldTokens = 1 << 20;",
        "test_covariance_add.py::test_rounding_does_not_pile_up",
    ),
    Mutation(
        "plain covariance: barrier before the sums",
        "covariance_add/accumulate.cuh",
        "    __syncthreads();\n    float chain",
        "    float chain",
        "test_covariance_add.py::test_weights_and_any_dim_are_exact_to_a_millionth",
    ),
    Mutation(
        "plain covariance: barrier after the sums",
        "covariance_add/accumulate.cuh",
        "    __syncthreads();\n    const bool fold",
        "    const bool fold",
        "test_covariance_add.py::test_weights_and_any_dim_are_exact_to_a_millionth",
    ),
    Mutation(
        "jacobi: barrier between rounds",
        "common/jacobi.cuh",
        "          __syncthreads();\n        }\n        move",
        "        }\n        move",
        "test_batched_pca.py::test_covariances_of_any_rank",
    ),
    Mutation(
        "jacobi: barrier between groups",
        "common/jacobi.cuh",
        "    __syncthreads();\n  };\n  for (int sweep",
        "  };\n  for (int sweep",
        "test_batched_pca.py::test_matrices_larger_than_shared_memory",
    ),
    Mutation(
        "jacobi: every thread ends when its own pairs are orthogonal",
        "common/jacobi.cuh",
        "if (!__syncthreads_or(turned)) break;",
        "if (!turned) break;",
        "test_batched_svd.py::test_singular_values_match_the_reference",
    ),
    Mutation(
        "jacobi: barrier of the maximum",
        "common/jacobi.cuh",
        "of_warps[threadIdx.x / 32] = x;\n  __syncthreads();",
        "of_warps[threadIdx.x / 32] = x;",
        "test_batched_svd.py::test_difficult_matrices",
    ),
    Mutation(
        "svd: barrier before the columns are turned",
        "batched_svd/launch.cu",
        "  __syncthreads();\n  orthogonalize",
        "  orthogonalize",
        "test_batched_svd.py::test_difficult_matrices",
    ),
    Mutation(
        "svd: barrier before the zeros are completed",
        "batched_svd/launch.cu",
        "  __syncthreads();\n  for (int k = 0; k < n; ++k)",
        "  for (int k = 0; k < n; ++k)",
        "test_batched_svd.py::test_difficult_matrices",
    ),
    Mutation(
        "svd: barrier between the products and what they take away",
        "batched_svd/launch.cu",
        "= k == zero ? 0 : dot;\n    }\n    __syncthreads();",
        "= k == zero ? 0 : dot;\n    }",
        "test_batched_svd.py::test_difficult_matrices",
    ),
    Mutation(
        "pca: barrier before the next factorization",
        "batched_pca/launch.cu",
        "      __syncthreads();  // before another call writes the pivot\n",
        "",
        "test_batched_pca.py::test_difficult_matrices",
    ),
    Mutation(
        "pca: barrier after a column",
        "batched_pca/launch.cu",
        "sum / sqrt(pivot);\n    __syncthreads();",
        "sum / sqrt(pivot);",
        "test_batched_pca.py::test_covariances_of_any_rank",
    ),
]


@dataclass
class FirstFailure:
    """A pytest plugin: which test failed, and why."""

    test: str = ""
    reason: str = ""
    count: int = field(default=0)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.count += report.when == "call"
        if report.failed and not self.test:
            self.test = report.nodeid.rpartition("/")[2]
            crash = getattr(report.longrepr, "reprcrash", None)
            self.reason = (crash.message if crash else str(report.longrepr)).splitlines()[0]


def run(mutation: Mutation, csrc: Path) -> FirstFailure:
    """Applies the edit to a copy of csrc, which lies in the folder ``csrc``, and runs the test on it."""
    shutil.copytree(harness.TESTS.parent / "csrc", csrc)
    path = csrc / "cuda" / mutation.path
    text = path.read_text()
    assert text.count(mutation.old) == 1, f"{mutation.name}: not there exactly once"
    path.write_text(text.replace(mutation.old, mutation.new))
    failure = FirstFailure()
    harness._build.cache_clear()
    with contextlib.redirect_stdout(io.StringIO()):
        pytest.main(["-x", "-p", "no:cacheprovider", f"--csrc={csrc}", str(HERE / mutation.test)], plugins=[failure])
    assert failure.test or failure.count, f"{mutation.name}: no test was run"
    assert "nvcc" not in failure.reason, f"{mutation.name}: does not compile: {failure.reason}"
    return failure


def main() -> int:
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    survived = 0
    for mutation in MUTATIONS:
        if wanted not in mutation.name:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            failure = run(mutation, Path(scratch, "csrc"))
        survived += not failure.test
        print(f"{mutation.name}\n  {failure.test or 'SURVIVED'}\n  {failure.reason[:160]}", flush=True)
    print(f"{survived} of the edits survived")
    return survived > 0


if __name__ == "__main__":
    sys.exit(main())
