"""What the conversion has to know about a model family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["Architecture", "AttentionShape", "Projections"]


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """GQA/MHA attention of one model; head h reads KV head h // (num_heads // num_kv_heads)."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    softmax_scale: float

    @property
    def num_frequencies(self) -> int:
        """RoPE pairs of a head; pair p is rows p and p + num_frequencies (the rotate-half layout)."""
        return self.head_dim // 2

    @property
    def kv_dim(self) -> int:
        """Numbers of all KV heads' keys; as many values."""
        return self.num_kv_heads * self.head_dim

    @property
    def cache_dim(self) -> int:
        """Numbers cached per token and layer before the conversion."""
        return 2 * self.kv_dim


@dataclass(frozen=True)
class Projections:
    """Weights of one attention layer, rows grouped by head."""

    w_q: Tensor  # [num_heads * head_dim, hidden_size]
    w_k: Tensor  # [num_kv_heads * head_dim, hidden_size]
    w_v: Tensor  # [num_kv_heads * head_dim, hidden_size]
    w_o: Tensor  # [hidden_size, num_heads * head_dim]


class Architecture(ABC):
    """One family, over the modules that transformers has for it: `model.model.layers[i].self_attn`."""

    model_type: ClassVar[str]

    @abstractmethod
    def unsupported(self, config: PretrainedConfig) -> str | None:
        """Why this model cannot be converted at all, or None."""

    @abstractmethod
    def no_stock_export(self, config: PretrainedConfig) -> str | None:
        """Why a DeepSeek-V3 checkpoint cannot express this model, or None."""

    @abstractmethod
    def shape(self, config: PretrainedConfig) -> AttentionShape: ...

    @abstractmethod
    def projections(self, attention: nn.Module) -> Projections:
        """The weights of an attention module."""
