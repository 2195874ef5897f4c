"""Convert GQA/MHA language models to Multi-head Latent Attention and run them on fast kernels.

>>> import transmla_ext
>>> report = transmla_ext.convert("Llama-2-7b-hf", "llama-mla", kv_lora_rank=512, qk_rope_head_dim=64)
>>> model = transmla_ext.load("llama-mla")
>>> model.generate(["The capital of France is"], max_new_tokens=8)
"""

from . import errors, ops, reference
from ._lib import get_cmake_dir, get_include
from .capacity import plan
from .config import MLAConfig
from .convert import convert
from .evaluate import evaluate
from .heal import heal
from .models import register
from .runtime import Engine, load

__all__ = [
    "Engine",
    "MLAConfig",
    "convert",
    "errors",
    "evaluate",
    "get_cmake_dir",
    "get_include",
    "heal",
    "load",
    "ops",
    "plan",
    "reference",
]

register()
