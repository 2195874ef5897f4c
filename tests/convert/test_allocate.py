"""Dealing out the cache: within the budget, and no way that spares a step of it has less error."""

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import token_rows
from test_convert import convert, logits

import transmla_ext
from transmla_ext.config import MLAConfig
from transmla_ext.convert.allocate import Candidate, allocate
from transmla_ext.convert.layer import MLALayer, truncated

LARGEST_STEP = 32


def random_layers(seed: int) -> list[list[Candidate]]:
    generator = random.Random(seed)
    return [
        [
            Candidate(8 * rank, 8 * rope, generator.random() / (rank + 2 * rope))
            for rank in range(1, 5)
            for rope in (1, 2)
        ]
        for _ in range(3)
    ]


@pytest.mark.parametrize("seed", range(20))
def test_no_choice_that_spares_a_step_has_less_error(seed: int) -> None:
    layers = random_layers(seed)
    for budget in range(48, 200, 8):
        chosen = allocate(layers, budget)
        assert sum(candidate.cache_dim for candidate in chosen) <= budget
        error = sum(candidate.error for candidate in chosen)
        for other in itertools.product(*layers):
            if sum(candidate.cache_dim for candidate in other) <= budget - LARGEST_STEP:
                assert sum(candidate.error for candidate in other) >= error - 1e-12


def test_a_layer_that_gains_more_gets_more() -> None:
    flat = [Candidate(rank, 8, 0.1) for rank in (8, 16, 24)]
    steep = [Candidate(rank, 8, 1 / rank) for rank in (8, 16, 24)]
    assert [c.kv_lora_rank for c in allocate([flat, steep], 48)] == [8, 24]


def test_a_budget_below_the_smallest_shapes_is_refused() -> None:
    with pytest.raises(ValueError, match="31 numbers a token is less than the 32"):
        allocate([[Candidate(8, 8, 1.0)]] * 2, 31)


def test_auto_stays_in_the_budget_and_runs_everywhere(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny_llama(num_hidden_layers=3)
    budget = 3 * 4 * 32
    report = convert(model, tmp_path / "out", kv_lora_rank="auto", qk_rope_head_dim=8, cache_bytes=budget)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    used = [layer["kv_lora_rank"] + layer["qk_rope_head_dim"] for layer in config["mla"]]
    assert budget - 4 * 8 < 4 * sum(used) <= budget
    assert report.plan.cache_bytes_after == budget
    assert "auto" in str(report.plan)
    tokens = token_rows(model, "while True: pass\n" * 60, 1, 20)
    expected = logits(tmp_path / "out", tokens)[0, -1].argmax().item()
    (generation,) = transmla_ext.load(tmp_path / "out").generate([tokens[0].tolist()], max_new_tokens=1)
    assert generation.tokens == [expected]


def test_a_truncated_layer_is_that_of_the_smaller_rank() -> None:
    """Keys without RoPE and values of the leading directions are the same; the RoPE rows stay."""
    config = MLAConfig(kv_lora_rank=24, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16, rope_slots=(0, 2, 4, 6))
    generator = torch.Generator().manual_seed(0)
    weights = {
        "kv_a_proj_with_mqa.weight": torch.randn(32, 64, generator=generator),
        "kv_a_proj_with_mqa.bias": torch.randn(32, generator=generator),
        "kv_b_proj.weight": torch.randn(128, 24, generator=generator),
        "o_proj.weight": torch.randn(64, 64, generator=generator),
    }
    small = truncated(MLALayer(config, weights), 16)
    assert small.config.kv_lora_rank == 16
    x = torch.randn(64, generator=generator)
    latent, whole = (
        w["kv_a_proj_with_mqa.weight"] @ x + w["kv_a_proj_with_mqa.bias"] for w in (small.weights, weights)
    )
    assert torch.equal(latent, torch.cat([whole[:16], whole[24:]]))
    zeroed = torch.cat([whole[:16], torch.zeros(8)])
    torch.testing.assert_close(
        small.weights["kv_b_proj.weight"] @ latent[:16], weights["kv_b_proj.weight"] @ zeroed, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kv_lora_rank": "auto"}, "go together"),
        ({"kv_lora_rank": 24, "cache_bytes": 1000}, "go together"),
        ({"kv_lora_rank": "auto", "cache_bytes": 1000, "format": "deepseek_v3"}, "native format"),
        ({"kv_lora_rank": "auto", "cache_bytes": 100}, "kv_lora_rank must be"),
    ],
)
def test_a_budget_that_cannot_be_is_refused(
    tiny_llama: Callable[..., Path], tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        convert(tiny_llama(), tmp_path / "out", qk_rope_head_dim=8, **options)
    assert not (tmp_path / "out").exists()
