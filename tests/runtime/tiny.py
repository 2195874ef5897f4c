"""Tiny models of both formats and a tokenizer of bytes."""

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import DeepseekV3Config, LlamaConfig, PreTrainedTokenizerFast

from transmla_ext import MLAConfig
from transmla_ext.models import native_config

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
EOS = len(BYTES)
VOCAB_SIZE = len(BYTES) + 1

# Scores of unit variance, so that a wrong weight shows.
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": EOS,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
    "original_max_position_embeddings": 32,
}


def native(**fields):
    shape = {"qk_nope_head_dim": 16, "v_head_dim": 24, **fields}
    base = LlamaConfig(**SIZES, num_hidden_layers=3, num_key_value_heads=2)
    layers = [
        MLAConfig(kv_lora_rank=32, qk_rope_head_dim=16, rope_slots=range(8), **shape),
        MLAConfig(kv_lora_rank=40, qk_rope_head_dim=4, rope_slots=(1, 1), **shape),  # no multiples of 16
        MLAConfig(kv_lora_rank=16, qk_rope_head_dim=32, rope_slots=(0, 2, 4, 6) * 4, **shape),
    ]
    return native_config(base, layers)


def stock(**fields):
    dense = {"num_hidden_layers": 2, "first_k_dense_replace": 2, "n_routed_experts": 1, "n_group": 1, "topk_group": 1}
    ranks = {"kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 24, "v_head_dim": 40, "q_lora_rank": None}
    return DeepseekV3Config(**SIZES, **dense, num_key_value_heads=4, **ranks | fields)


CONFIGS = {
    "native": native(),
    "native-q-lora": native(q_lora_rank=24),
    "native-no-nope": native(qk_nope_head_dim=0),
    "stock": stock(),
    "stock-q-lora": stock(q_lora_rank=24),
    "stock-yarn": stock(rope_parameters=YARN),
}


def tokenizer():
    bytes_to_text = Tokenizer(BPE(vocab={char: i for i, char in enumerate(BYTES)}, merges=[]))
    bytes_to_text.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_to_text.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bytes_to_text, eos_token="<eos>")
