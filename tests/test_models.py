"""The native format as a transformers model."""

import copy
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from transmla_ext import MLAConfig
from transmla_ext.errors import UnsupportedModelError
from transmla_ext.models import MLAAttention, native_config

pytestmark = pytest.mark.usefixtures("one_thread")

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 1e4},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64},
}


def llama(num_kv_heads=2, tied=False, rope="default", **fields):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        rope_parameters=ROPES[rope],
        initializer_range=0.15,  # scores of unit variance: a wrong weight shows
        pad_token_id=0,
        **fields,
    )
    return LlamaForCausalLM(config).eval()


def exact(original):
    """The native model that merges the KV heads of `original` and keeps every RoPE pair: the same function."""
    config = original.config
    num_heads, num_kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    pairs = head_dim // 2
    shape = MLAConfig(
        kv_lora_rank=num_kv_heads * head_dim,
        qk_rope_head_dim=num_kv_heads * head_dim,
        qk_nope_head_dim=0,
        v_head_dim=head_dim,
        rope_slots=tuple(range(pairs)) * num_kv_heads,
    )
    native = AutoModelForCausalLM.from_config(native_config(config, [shape] * config.num_hidden_layers)).eval()
    interleaved = torch.arange(head_dim).view(2, pairs).T.flatten()
    state = original.state_dict()
    for i in range(config.num_hidden_layers):
        name = f"model.layers.{i}.self_attn."
        w_q = state[name + "q_proj.weight"].view(num_heads, head_dim, -1)[:, interleaved]
        w_k = state.pop(name + "k_proj.weight").view(num_kv_heads, head_dim, -1)[:, interleaved]
        w_v = state.pop(name + "v_proj.weight")
        q = torch.zeros(num_heads, num_kv_heads, head_dim, config.hidden_size)
        kv_b = torch.zeros(num_heads, head_dim, num_kv_heads, head_dim)
        for head in range(num_heads):
            group = head * num_kv_heads // num_heads
            q[head, group] = w_q[head]
            kv_b[head, :, group] = torch.eye(head_dim)
        state[name + "q_proj.weight"] = q.view(-1, config.hidden_size)
        state[name + "kv_a_proj_with_mqa.weight"] = torch.cat((w_v, w_k.flatten(0, 1)))
        state[name + "kv_b_proj.weight"] = kv_b.view(num_heads * head_dim, -1)
    native.load_state_dict(state)
    return native


def random_native(**fields):
    """A native model that is no exact copy of anything, no two layers alike."""
    shape = MLAConfig(
        kv_lora_rank=32, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=24, rope_slots=(0, 2, 3, 7), **fields
    )
    wider = replace(shape, kv_lora_rank=40, qk_rope_head_dim=4, rope_slots=(1, 1))
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(native_config(llama().config, [shape, wider, shape])).eval()


def tokens(*shape, seed=2):
    return torch.randint(1, 97, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_the_full_rank_model_is_the_original(num_kv_heads, tied, rope):
    original = llama(num_kv_heads, tied, rope)
    native = exact(original)
    ids = tokens(2, 33)
    torch.testing.assert_close(native(ids).logits, original(ids).logits, atol=1e-4, rtol=0)
    assert (native.lm_head.weight is native.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_generate_with_left_padding_is_the_original_s(implementation):
    original = llama()
    native = exact(original)
    native.set_attn_implementation(implementation)
    ids = tokens(3, 12)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 5, 11)):
        ids[row, :padding] = mask[row, :padding] = 0
    expected, actual = (
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=20, do_sample=False, eos_token_id=None)
        for model in (original, native)
    )
    assert expected.shape == (3, 32)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("q_lora_rank", [None, 24])
def test_generate_is_greedy_decode_without_cache(q_lora_rank):
    model = random_native(q_lora_rank=q_lora_rank)
    ids = tokens(2, 5)
    actual = model.generate(ids, max_new_tokens=16, do_sample=False, eos_token_id=None)
    for _ in range(16):
        with torch.no_grad():
            ids = torch.cat((ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(actual, ids)


def test_the_cache_holds_the_latent_and_the_shared_key():
    model = random_native()
    cache = model(tokens(2, 7), use_cache=True).past_key_values
    assert [tuple(layer.keys.shape) for layer in cache.layers] == [(2, 1, 7, 32), (2, 1, 7, 40), (2, 1, 7, 32)]
    assert [tuple(layer.values.shape) for layer in cache.layers] == [(2, 1, 7, 8), (2, 1, 7, 4), (2, 1, 7, 8)]


def test_save_and_load_round_trip(tmp_path):
    model = random_native(q_lora_rank=24)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.model_type == "transmla_llama"
    assert config.mla == model.config.mla
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    assert type(loaded).__name__ == "TransMLALlamaForCausalLM"
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded(tokens(2, 9)).logits, model(tokens(2, 9)).logits)
    in_bf16 = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in in_bf16.parameters()} == {torch.bfloat16}
    assert in_bf16(tokens(2, 9)).logits.isfinite().all()


def test_nothing_of_the_original_attention_remains():
    model = random_native()
    assert {name for name, _ in model.model.layers[0].self_attn.named_parameters()} == {
        "q_proj.weight", "kv_a_proj_with_mqa.weight", "kv_b_proj.weight", "o_proj.weight",
    }  # fmt: skip
    assert {name for name, _ in random_native(q_lora_rank=24).model.layers[0].self_attn.named_parameters()} == {
        "q_a_proj.weight", "q_b_proj.weight", "kv_a_proj_with_mqa.weight", "kv_b_proj.weight", "o_proj.weight",
    }  # fmt: skip


def test_a_new_model_is_initialised_like_the_original():
    for name, weight in random_native().named_parameters():
        if "norm" in name:
            assert (weight == 1).all(), name
        else:
            assert abs(weight.std().item() - 0.15) < 0.02, name


def test_gradient_checkpointing_changes_no_gradient():
    model = random_native(q_lora_rank=24).train()
    checkpointed = copy.deepcopy(model)
    checkpointed.gradient_checkpointing_enable()
    for m in (model, checkpointed):
        m(input_ids=tokens(2, 9), labels=tokens(2, 9)).loss.backward()
    for (name, weight), other in zip(model.named_parameters(), checkpointed.parameters(), strict=True):
        assert weight.grad is not None, name
        assert weight.grad.abs().max() > 0, name
        torch.testing.assert_close(weight.grad, other.grad)


def test_the_attention_compiles_without_graph_breaks():
    model = random_native()
    compiled = torch.compile(model.model.layers[0].self_attn, backend="aot_eager", fullgraph=True)
    hidden = torch.randn(2, 9, 64)
    rope = model.model.rotary_emb(hidden, torch.arange(9)[None])
    actual, _ = compiled(hidden, position_embeddings=rope)
    expected, _ = model.model.layers[0].self_attn(hidden, position_embeddings=rope)
    torch.testing.assert_close(actual, expected)


def test_a_layer_alone_is_causal():
    config = llama().config
    config._attn_implementation = None
    shape = MLAConfig(kv_lora_rank=32, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=24, rope_slots=(0, 2, 3, 7))
    layer = MLAAttention(config, shape, layer_idx=0)
    hidden = torch.randn(1, 9, 64)
    rope = (torch.ones(1, 9, 16), torch.zeros(1, 9, 16))
    whole, _ = layer(hidden, position_embeddings=rope)
    part, _ = layer(hidden[:, :5], position_embeddings=tuple(table[:, :5] for table in rope))
    torch.testing.assert_close(whole[:, :5], part)


def test_a_config_that_does_not_fit_says_so():
    shape = MLAConfig(kv_lora_rank=32, qk_rope_head_dim=4, qk_nope_head_dim=16, v_head_dim=24, rope_slots=(0, 1))
    with pytest.raises(ValueError, match="one entry for each of 3 layers, got 2"):
        AutoModelForCausalLM.from_config(native_config(llama().config, [shape] * 2))
    with pytest.raises(UnsupportedModelError, match=r"'gpt2' is not supported; supported: .*llama"):
        native_config(AutoConfig.for_model("gpt2"), [shape])
