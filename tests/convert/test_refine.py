"""Refinement of one layer: it learns what can be learned, never ends worse than it began, and repeats itself."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from transmla_ext.config import MLAConfig
from transmla_ext.convert.refine import output_error, refine
from transmla_ext.models import MLAAttention

Pairs = list[tuple[Tensor, Tensor]]


@pytest.fixture
def teacher() -> MLAAttention:
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1)
    mla = MLAConfig(
        kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8, rope_slots=(0, 2), q_lora_rank=None
    )
    return MLAAttention(config, mla, layer_idx=0).requires_grad_(False)


def disturbed(attention: MLAAttention, share: float = 0.2) -> MLAAttention:
    """The layer with noise of `share` of each weight matrix' root mean square."""
    attention = copy.deepcopy(attention)
    for weight in attention.parameters():
        weight.data += share * weight.square().mean().sqrt() * torch.randn_like(weight)
    return attention


def layer_inputs(length: int = 32) -> dict[str, Any]:
    angles = torch.arange(length)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03])
    angles = torch.cat([angles, angles], dim=1)[None]
    return {"position_embeddings": (angles.cos(), angles.sin()), "attention_mask": None}


def pairs(attention: MLAAttention, batches: int, seed: int) -> Pairs:
    generator = torch.Generator().manual_seed(seed)
    xs = [torch.randn(8, 32, 32, generator=generator) for _ in range(batches)]
    return [(x, attention(hidden_states=x, **layer_inputs())[0]) for x in xs]


def test_error_on_unseen_input_falls(teacher: MLAAttention) -> None:
    student = disturbed(teacher)
    train, unseen = pairs(teacher, 8, seed=1), pairs(teacher, 2, seed=2)
    start = output_error(student, unseen, layer_inputs())
    before, after = refine(student, train, unseen, layer_inputs(), steps=60, seed=0)
    assert before == start
    assert after == output_error(student, unseen, layer_inputs())
    assert after < 0.3 * before
    assert not any(weight.requires_grad for weight in student.parameters())


def test_a_deviation_of_the_input_is_made_good(teacher: MLAAttention) -> None:
    """Layers before this one lost something: the refined layer gives what the original gives for the true input."""
    shift = torch.linspace(-0.5, 0.5, 32)
    train, unseen = (
        [(x + shift + 0.1 * x.roll(1, dims=-1), y) for x, y in pairs(teacher, batches, seed)]
        for batches, seed in ((8, 1), (2, 2))
    )
    student = copy.deepcopy(teacher)
    before, after = refine(student, train, unseen, layer_inputs(), steps=60, seed=0)
    assert after < 0.5 * before


def test_what_only_helps_on_the_text_trained_on_is_not_kept(teacher: MLAAttention) -> None:
    unseen = pairs(teacher, 2, seed=2)
    nonsense = [(x, y.roll(1, dims=0)) for x, y in pairs(teacher, 2, seed=1)]
    student = copy.deepcopy(teacher)
    before, after = refine(student, nonsense, unseen, layer_inputs(), steps=60, seed=0)
    assert before == after
    for weight, original in zip(student.parameters(), teacher.parameters(), strict=True):
        assert torch.equal(weight, original)


def test_a_seed_gives_the_same_weights_again(teacher: MLAAttention) -> None:
    start = disturbed(teacher)
    train, unseen = pairs(teacher, 4, seed=1), pairs(teacher, 1, seed=2)
    students = [copy.deepcopy(start) for _ in range(3)]
    for student, seed in zip(students, (3, 3, 4), strict=True):
        # A step takes 16 of these 96 sequences.
        refine(student, [(x[:3], y[:3]) for x, y in train] * 8, unseen, layer_inputs(), steps=5, seed=seed)
    once, again, other = (student.kv_b_proj.weight for student in students)
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
