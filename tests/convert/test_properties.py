"""What holds for every shape: full rank is the original, any rank converts, the stock format equals the native."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import token_rows
from test_families import TEXT, convert, kl, load

from transmla_ext.architectures import lookup

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@st.composite
def cases(draw: Callable[..., Any]) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """A model type, fields of its config, and ranks for its conversion."""
    num_kv_heads, head_dim = draw(st.integers(1, 4)), draw(st.sampled_from([8, 16, 24, 32]))
    num_heads = num_kv_heads * draw(st.integers(1, 3))
    fields: dict[str, Any] = {
        "hidden_size": num_heads * draw(st.sampled_from([8, 10, 16])),
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "attention_bias": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5, 1e-3])),
        "rope_parameters": {"rope_type": "default", "rope_theta": draw(st.sampled_from([100.0, 1e4, 1e6]))},
    }
    rope = draw(st.sampled_from([dim for dim in (8, 16, 24, 32) if head_dim % dim == 0]))
    options = {
        "kv_lora_rank": 8 * draw(st.integers(1, (2 * num_kv_heads * head_dim - rope) // 8)),
        "qk_rope_head_dim": rope,
    }
    if draw(st.booleans()):
        options["q_lora_rank"] = draw(st.integers(8, min(fields["hidden_size"], num_heads * head_dim)))
    return draw(st.sampled_from(["llama", "qwen2", "qwen3", "phi3", "granite"])), fields, options


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(case=cases())
def test_the_equalities_hold_for_every_shape(
    tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory, case: tuple[str, Any, Any]
) -> None:
    model_type, fields, options = case
    path, out = tiny_model(model_type, **fields), tmp_path_factory.mktemp("out")
    tokens = token_rows(path, TEXT, 1, 90)

    def logits(model: Path) -> torch.Tensor:
        with torch.no_grad():
            return load(model)(tokens).logits

    def converted(name: str, **chosen: Any) -> torch.Tensor:
        convert(path, out / name, calibration=[TEXT * 4], **chosen)
        return logits(out / name)

    torch.testing.assert_close(converted("full", kv_lora_rank="full"), logits(path), atol=1e-4, rtol=0)
    native = converted("native", **options)
    assert native.isfinite().all()
    config = load(path).config
    all_keys_rotate = options["qk_rope_head_dim"] == fields["num_key_value_heads"] * fields["head_dim"]
    if lookup(config).no_stock_export(config) is None and not all_keys_rotate:
        assert kl(native, converted("stock", format="deepseek_v3", **options)) <= 1e-6
