"""Refinement of layers: they learn what can be learned, never end worse than they began, and repeat themselves."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from transmla_ext.config import MLAConfig
from transmla_ext.convert.refine import HiddenStates, hidden_state_error, refine
from transmla_ext.models import MLAAttention

Layers = list[LlamaDecoderLayer]


@pytest.fixture
def teacher() -> Layers:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2, intermediate_size=48
    )
    config._attn_implementation = "sdpa"
    mla = MLAConfig(
        kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8, rope_slots=(0, 2), q_lora_rank=None
    )
    layers = [LlamaDecoderLayer(config, index) for index in range(2)]
    for index, layer in enumerate(layers):
        layer.self_attn = MLAAttention(config, mla, index)
        layer.requires_grad_(False)
    return layers


def disturbed(layers: Layers, share: float = 0.2) -> Layers:
    """The layers with noise of `share` of each attention weight's root mean square."""
    layers = copy.deepcopy(layers)
    for layer in layers:
        for weight in layer.self_attn.parameters():
            weight.data += share * weight.square().mean().sqrt() * torch.randn_like(weight)
    return layers


def layer_inputs(length: int = 32) -> dict[str, Any]:
    angles = torch.arange(length)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03])
    angles = torch.cat([angles, angles], dim=1)[None]
    return {"position_embeddings": (angles.cos(), angles.sin()), "attention_mask": None}


INPUTS = [layer_inputs()] * 2


def run(layers: Layers, hidden: Tensor) -> Tensor:
    for layer in layers:
        hidden = layer(hidden, **INPUTS[0])
    return hidden


def pairs(layers: Layers, batches: int, seed: int) -> list[HiddenStates]:
    generator = torch.Generator().manual_seed(seed)
    xs = [torch.randn(8, 32, 32, generator=generator) for _ in range(batches)]
    return [(x, run(layers, x)) for x in xs]


def error(layers: Layers, unseen: list[HiddenStates]) -> float:
    return hidden_state_error([run(layers, x) for x, _ in unseen], [y for _, y in unseen])


def test_error_knows_directions_and_not_lengths() -> None:
    torch.manual_seed(0)
    hidden, other = torch.randn(3, 5, 16), torch.randn(3, 5, 16)
    assert hidden_state_error([hidden], [7 * hidden]) < 1e-12
    assert hidden_state_error([hidden], [-hidden]) == pytest.approx(4)
    cosine = torch.nn.functional.cosine_similarity(hidden, other, dim=-1).double().mean()
    assert hidden_state_error([hidden], [other]) == pytest.approx(2 - 2 * float(cosine))


@pytest.mark.parametrize("num_layers", [1, 2])
def test_error_on_unseen_input_falls(teacher: Layers, num_layers: int) -> None:
    teacher = teacher[:num_layers]
    student = disturbed(teacher)
    others = {name: w.clone() for name, w in student[0].named_parameters() if "self_attn" not in name}
    train, unseen = pairs(teacher, 8, seed=1), pairs(teacher, 2, seed=2)
    before = error(student, unseen)
    refine(student, train, unseen, INPUTS[:num_layers], steps=100, seed=0)
    assert error(student, unseen) < 0.3 * before
    for layer in student:
        assert not any(weight.requires_grad for weight in layer.parameters())
    for name, weight in student[0].named_parameters():
        assert "self_attn" in name or torch.equal(weight, others[name])


def test_a_deviation_of_the_input_is_made_good(teacher: Layers) -> None:
    """Layers before this one lost something: behind the refined one is what the original has there."""
    shift = torch.linspace(-0.5, 0.5, 32)
    train, unseen = (
        [(x + shift + 0.1 * x.roll(1, dims=-1), y) for x, y in pairs(teacher, batches, seed)]
        for batches, seed in ((8, 1), (2, 2))
    )
    student = copy.deepcopy(teacher)
    before = error(student, unseen)
    refine(student, train, unseen, INPUTS, steps=200, seed=0)
    assert error(student, unseen) < 0.5 * before


def test_what_only_helps_on_the_text_trained_on_is_not_kept(teacher: Layers) -> None:
    unseen = pairs(teacher, 2, seed=2)
    nonsense = [(x, y.roll(1, dims=0)) for x, y in pairs(teacher, 2, seed=1)]
    student = copy.deepcopy(teacher)
    refine(student, nonsense, unseen, INPUTS, steps=60, seed=0)
    for layer, original in zip(student, teacher, strict=True):
        for weight, its_original in zip(layer.parameters(), original.parameters(), strict=True):
            assert torch.equal(weight, its_original)


def test_a_seed_gives_the_same_weights_again(teacher: Layers) -> None:
    start = disturbed(teacher)
    train, unseen = pairs(teacher, 4, seed=1), pairs(teacher, 1, seed=2)
    students = [copy.deepcopy(start) for _ in range(3)]
    for student, seed in zip(students, (3, 3, 4), strict=True):
        # A step takes 16 of these 96 sequences.
        refine(student, [(x[:3], y[:3]) for x, y in train] * 8, unseen, INPUTS, steps=5, seed=seed)
    once, again, other = (student[1].self_attn.kv_b_proj.weight for student in students)
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
