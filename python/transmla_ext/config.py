"""What one MLA attention layer looks like, in DeepSeek's field names."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["MLAConfig"]


@dataclass(frozen=True, kw_only=True)
class MLAConfig:
    """Shape of one MLA attention layer.

    Args:
        kv_lora_rank: numbers of the latent, cached per token.
        qk_rope_head_dim: numbers of the rotated key shared by all heads, cached per token; pairs are interleaved.
        qk_nope_head_dim: query numbers per head that meet the latent; 0 if every key component keeps its RoPE.
        v_head_dim: value numbers per head.
        q_lora_rank: rank of the query projection; None if it is not factored.
        rope_slots: for each RoPE pair, the index of its frequency among the original model's.
    """

    kv_lora_rank: int
    qk_rope_head_dim: int
    qk_nope_head_dim: int
    v_head_dim: int
    rope_slots: tuple[int, ...]
    q_lora_rank: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "rope_slots", tuple(self.rope_slots))
        if 2 * len(self.rope_slots) != self.qk_rope_head_dim:
            raise ValueError(
                f"MLAConfig: rope_slots must name one frequency per pair of qk_rope_head_dim={self.qk_rope_head_dim}, "
                f"got {len(self.rope_slots)}"
            )

    @property
    def cache_dim(self) -> int:
        """Numbers cached per token and layer."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "rope_slots": list(self.rope_slots)}
