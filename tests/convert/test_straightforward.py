"""The oracle itself: exact where nothing is cut."""

from collections.abc import Callable
from pathlib import Path

import pytest
import straightforward
import torch
from models import Text, token_rows
from transformers import AutoModelForCausalLM


@pytest.mark.parametrize("q_lora_rank", [None, 64])
def test_one_kv_head_at_full_rank_is_exact(
    tiny_llama: Callable[..., Path], topics_text: Text, q_lora_rank: int | None
) -> None:
    path = tiny_llama(num_key_value_heads=1)
    model = AutoModelForCausalLM.from_pretrained(path)
    inputs = straightforward.attention_inputs(model, token_rows(path, topics_text.calibration, 4, 128))
    ranks = {"kv_lora_rank": 16, "qk_rope_head_dim": 16, "q_lora_rank": q_lora_rank}
    converted = straightforward.convert(model, inputs, freqfold=1, **ranks)
    tokens = token_rows(path, topics_text.held_out, 2, 128)
    torch.testing.assert_close(converted(tokens).logits, model(tokens).logits, atol=1e-4, rtol=0)
