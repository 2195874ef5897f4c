"""Calibration: text to tokens, tokens through the original model one layer at a time, statistics of each layer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..architectures import Architecture
from ..checkpoint import Checkpoint, skeleton

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "BATCH_TOKENS",
    "AttentionIO",
    "CalibrationTokens",
    "LayerStatistics",
    "Original",
    "StatisticsCollector",
    "calibration_tokens",
    "run_layer",
]

Stream = list[Tensor]  # hidden states of all sequences, in batches [batch_size, sequence_length, hidden_size]
AttentionIO = tuple[Tensor, Tensor]  # an attention layer's input and output, [batch_size, sequence_length, hidden_size]

BATCH_TOKENS = 2048  # one batch's activations stay in tens of megabytes, and GEMMs are large enough


@dataclass(frozen=True)
class CalibrationTokens:
    """Sequences to calibrate on, and sequences of the same text, further on, to judge by."""

    train: Tensor  # [num_sequences, sequence_length], int64
    held_out: Tensor  # [num_held_out, sequence_length], int64

    def digest(self) -> str:
        parts = (self.train, self.held_out)
        return hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()


def calibration_tokens(
    source: str | Path | Sequence[str] | None,
    tokenizer: PreTrainedTokenizerBase,
    num_tokens: int,
    sequence_length: int,
) -> CalibrationTokens:
    """num_tokens tokens to calibrate on and a further eighth, at least one sequence, held out.

    Args:
        source: a text file, a list of texts, the name of a text dataset of the `datasets` library, or None for the text
            that comes with Python (`pydoc_data.topics`).
        num_tokens: a multiple of sequence_length is taken, rounding up.
    """
    num_train = -(-num_tokens // sequence_length)
    num_held_out = max(1, num_train // 8)
    prefix = list(tokenizer("").input_ids)  # a BOS token, for the models that start every sequence with one
    chunk = sequence_length - len(prefix)
    wanted = (num_train + num_held_out) * chunk
    ids: list[int] = []
    for text in _texts(source):
        ids += tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        if len(ids) >= wanted:
            break
    if len(ids) < wanted:
        raise ValueError(
            f"calibration text too short: {len(ids)} tokens, but {num_train} sequences to calibrate on and "
            f"{num_held_out} held out need {wanted}; give more text or lower calibration_tokens={num_tokens}"
        )
    sequences = torch.tensor(ids[:wanted]).view(-1, chunk)
    if prefix:
        sequences = torch.cat([torch.tensor(prefix).expand(len(sequences), -1), sequences], dim=1)
    return CalibrationTokens(sequences[:num_train].contiguous(), sequences[num_train:].contiguous())


def _texts(source: str | Path | Sequence[str] | None) -> Iterator[str]:
    if source is None:
        from pydoc_data.topics import topics

        yield "\n\n".join(topics[name] for name in sorted(topics))
    elif isinstance(source, (str, Path)):
        if Path(source).is_file():
            yield Path(source).read_text(encoding="utf-8", errors="replace")
        else:
            yield from _dataset_texts(str(source))
    else:
        yield from source


def _dataset_texts(name: str) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(
            f"calibration: '{name}' is no file; to calibrate on the dataset of that name, pip install datasets"
        ) from None
    for row in load_dataset(name, split="train", streaming=True):
        yield row["text"]


@dataclass
class LayerStatistics:
    """Second moments of one attention layer's projections over the calibration tokens."""

    kv: Tensor  # [2 * kv_dim, 2 * kv_dim], fp64, mean of [k; v][k; v]ᵀ, keys before RoPE
    q: Tensor | None  # [num_heads * head_dim, num_heads * head_dim], fp64, mean of q qᵀ before RoPE


class Original:
    """The model to convert: one layer's weights in memory at a time, computing in fp32."""

    def __init__(self, checkpoint: Checkpoint, architecture: Architecture, device: torch.device) -> None:
        self.checkpoint, self.architecture, self.device = checkpoint, architecture, device
        self.config = checkpoint.config
        self.shape = architecture.shape(self.config)
        self._skeleton: Any = skeleton(self.config)  # transformers' module, typed by what the family has in common
        self._rotary_emb = type(self._skeleton.model.rotary_emb)(self.config).to(device)

    def stream(self, tokens: Tensor) -> Stream:
        """The embedded tokens [num_sequences, sequence_length] in batches."""
        embed = self._load(self._skeleton.model.embed_tokens, "model.embed_tokens")
        batch_size = max(1, BATCH_TOKENS // tokens.shape[1])
        with torch.inference_mode():
            stream = [embed(batch.to(self.device)) for batch in tokens.split(batch_size)]
        self._unload(embed)
        return stream

    def rope(self, sequence_length: int) -> tuple[Tensor, Tensor]:
        """The (cos, sin) that the decoder layers take, [1, sequence_length, head_dim] each."""
        positions = torch.arange(sequence_length, device=self.device)[None]
        cos_sin: tuple[Tensor, Tensor] = self._rotary_emb(torch.empty(0, device=self.device), positions)
        return cos_sin

    def layer(self, index: int) -> nn.Module:
        """Decoder layer `index` with its weights; call `unload` when done."""
        return self._load(self._skeleton.model.layers[index], f"model.layers.{index}")

    def unload(self, index: int) -> None:
        self._unload(self._skeleton.model.layers[index])

    def negative_log_likelihood(self, streams: Sequence[Stream], tokens: Tensor) -> list[float]:
        """Mean nats per token that the final norm and head give to `tokens`, for each stream."""
        norm = self._load(self._skeleton.model.norm, "model.norm")
        tied = self.config.tie_word_embeddings
        head = self.checkpoint.tensor("model.embed_tokens.weight" if tied else "lm_head.weight")
        head = head.to(self.device, torch.float32)
        means = []
        with torch.inference_mode():
            for stream in streams:
                total = 0.0
                rows = (row for batch in stream for row in batch)
                for hidden, row_tokens in zip(rows, tokens.to(self.device), strict=True):
                    logits = F.linear(norm(hidden[:-1]), head)
                    total += F.cross_entropy(logits, row_tokens[1:], reduction="sum").item()
                means.append(total / tokens[:, 1:].numel())
        self._unload(norm)
        return means

    def _load(self, module: nn.Module, prefix: str) -> nn.Module:
        names = [name for name, _ in module.named_parameters()]
        state = {name: self.checkpoint.tensor(f"{prefix}.{name}").to(self.device, torch.float32) for name in names}
        module.load_state_dict(state, assign=True)
        return module.requires_grad_(False).eval()

    def _unload(self, module: nn.Module) -> None:
        module.to("meta")


def run_layer(
    layer: nn.Module, stream: Stream, rope: tuple[Tensor, Tensor], observe: Callable[[AttentionIO], None] | None = None
) -> None:
    """Sends a stream through a decoder layer, in place; `observe` gets the attention's input and output, each batch."""

    def hook(_module: nn.Module, _args: Any, kwargs: dict[str, Tensor], output: tuple[Tensor, ...]) -> None:
        if observe is not None:
            observe((kwargs["hidden_states"], output[0]))

    handle = layer.get_submodule("self_attn").register_forward_hook(hook, with_kwargs=True)
    with torch.inference_mode():
        for i, hidden in enumerate(stream):
            stream[i] = layer(hidden, position_embeddings=rope)
    handle.remove()


class StatisticsCollector:
    """Observes an attention layer's inputs and accumulates LayerStatistics."""

    def __init__(self, architecture: Architecture, attention: nn.Module, *, queries: bool) -> None:
        weights = architecture.projections(attention)
        self._w_kv = torch.cat([weights.w_k, weights.w_v])
        self._w_q = weights.w_q if queries else None
        self._kv = _zero_covariance(self._w_kv)
        self._q = None if self._w_q is None else _zero_covariance(self._w_q)
        self._num_tokens = 0

    def __call__(self, io: AttentionIO) -> None:
        x = io[0].flatten(0, 1)
        self._num_tokens += len(x)
        ops.covariance_add_(self._kv, F.linear(x, self._w_kv)[:, None])
        if self._w_q is not None and self._q is not None:
            ops.covariance_add_(self._q, F.linear(x, self._w_q)[:, None])

    def statistics(self) -> LayerStatistics:
        q = None if self._q is None else self._q[0] / self._num_tokens
        return LayerStatistics(self._kv[0] / self._num_tokens, q)


def _zero_covariance(weight: Tensor) -> Tensor:
    return torch.zeros(1, len(weight), len(weight), dtype=torch.float64, device=weight.device)
