"""Calibration: text to tokens, tokens through the original model one layer at a time, statistics of each layer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..architectures import Architecture, AttentionShape, Projections
from ..checkpoint import Checkpoint, skeleton
from ..text import TextSource, token_sequences
from . import group

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "BATCH_TOKENS",
    "AttentionIO",
    "CalibrationTokens",
    "LayerInputs",
    "LayerStatistics",
    "Original",
    "Predictions",
    "StatisticsCollector",
    "Stream",
    "calibration_tokens",
    "run_layer",
]

Stream = list[Tensor]  # hidden states of all sequences, in batches [batch_size, sequence_length, hidden_size]
LayerInputs = dict[str, Any]
AttentionIO = tuple[Tensor, Tensor]  # an attention layer's input and output, [batch_size, sequence_length, hidden_size]

_TEST_TOKENS = 8192
BATCH_TOKENS = 2048  # one batch's activations stay in tens of megabytes, and GEMMs are large enough


@dataclass(frozen=True)
class CalibrationTokens:
    """Sequences to calibrate on, sequences of the same text, further on, to choose by, and those to judge by."""

    train: Tensor  # [num_sequences, sequence_length], int64
    held_out: Tensor  # [num_held_out, sequence_length], int64
    test: Tensor  # [num_test, sequence_length], int64; held_out if there is no other text

    def digest(self) -> str:
        lists = [tokens.tolist() for tokens in (self.train, self.held_out, self.test)]
        return hashlib.sha256(repr(lists).encode()).hexdigest()


def calibration_tokens(
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    num_tokens: int,
    sequence_length: int,
    test: TextSource = None,
) -> CalibrationTokens:
    """num_tokens tokens to calibrate on and a further eighth, at least one sequence, held out.

    Args:
        source: a text file, a list of texts, the name of a text dataset of the `datasets` library, or None for the text
            that comes with Python (`pydoc_data.topics`).
        num_tokens: a multiple of sequence_length is taken, rounding up.
        test: text to judge by, in the same forms, of which the first 8192 tokens are taken; None: what is held out.
    """
    num_train = -(-num_tokens // sequence_length)
    num_held_out = max(1, num_train // 8)
    sequences = token_sequences(source, tokenizer, num_train + num_held_out, sequence_length)
    if len(sequences) < num_train + num_held_out:
        raise ValueError(
            f"calibration text too short: {len(sequences)} sequences of {sequence_length} tokens, but {num_train} to "
            f"calibrate on and {num_held_out} held out are needed; give more text or lower "
            f"calibration_tokens={num_tokens}"
        )
    train, held_out = sequences.tensor_split([num_train])
    if test is None:
        return CalibrationTokens(train, held_out, held_out)
    judged = token_sequences(test, tokenizer, max(1, _TEST_TOKENS // sequence_length), sequence_length)
    if not len(judged):
        raise ValueError(f"test text too short: give at least one sequence of {sequence_length} tokens")
    return CalibrationTokens(train, held_out, judged)


@dataclass
class LayerStatistics:
    """Moments of one attention layer's keys, values and queries over the calibration tokens, before RoPE; fp64."""

    keys: Tensor  # [kv_dim, kv_dim], mean of k kᵀ, biases included: what RoPE turns
    kv: Tensor  # [2 * kv_dim, 2 * kv_dim], mean of [k; v][k; v]ᵀ as the latent carries them, so without biases
    queries: Tensor | None  # [num_kv_heads, head_dim, head_dim], sum over the heads of a KV head of mean q qᵀ
    q: Tensor | None  # [num_heads * head_dim, num_heads * head_dim], mean of q qᵀ before bias and norm


@dataclass(frozen=True)
class Predictions:
    """Of every token of some sequences but the first, from those before it."""

    nats: float  # mean negative log-likelihood of a token
    likeliest: Tensor  # [num_sequences, sequence_length - 1], int64


class Original:
    """The model to convert: one layer's weights in memory at a time, computing in fp32."""

    def __init__(self, checkpoint: Checkpoint, architecture: Architecture, device: torch.device) -> None:
        self.checkpoint, self.architecture, self.device = checkpoint, architecture, device
        self._skeleton: Any = skeleton(checkpoint.config)  # transformers' module, typed by what the families share
        self._skeleton.model.rotary_emb.to(device)
        self.config = self._skeleton.config  # knows the attention implementation that the family gets
        self.rope_scale = float(self._skeleton.model.rotary_emb.attention_scaling)  # of cosines and sines

    def stream(self, tokens: Tensor) -> Stream:
        """The embedded tokens [num_sequences, sequence_length] in batches."""
        embed = self._load(self._skeleton.model.embed_tokens, "model.embed_tokens")
        scale = self.architecture.embedding_scale(self.config)
        batch_size = max(1, BATCH_TOKENS // tokens.shape[1])
        with torch.inference_mode():
            stream = [embed(batch.to(self.device)) * scale for batch in tokens.split(batch_size)]
        self._unload(embed)
        return stream

    def layer_inputs(self, index: int, sequence_length: int) -> LayerInputs:
        """What decoder layer `index` takes besides the hidden states: RoPE's (cos, sin) and the mask."""
        from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

        positions = torch.arange(sequence_length, device=self.device)[None]
        hidden = torch.empty(1, sequence_length, 1, device=self.device)
        windowed = self.architecture.shape(self.config, index).sliding_window > 0
        create_mask = create_sliding_window_causal_mask if windowed else create_causal_mask
        return {
            "position_embeddings": self._skeleton.model.rotary_emb(hidden, positions),
            "attention_mask": create_mask(self.config, hidden, None, past_key_values=None, position_ids=positions),
        }

    def layer(self, index: int) -> nn.Module:
        """Decoder layer `index` with its weights; call `unload` when done."""
        return self._load(self._skeleton.model.layers[index], f"model.layers.{index}")

    def unload(self, index: int) -> None:
        self._unload(self._skeleton.model.layers[index])

    def predictions(self, texts: Sequence[tuple[Stream, Tensor]]) -> list[Predictions]:
        """What the final norm and head make of streams of tokens, [num_sequences, sequence_length] each."""
        norm = self._load(self._skeleton.model.norm, "model.norm")
        tied = self.config.tie_word_embeddings
        head = self.checkpoint.tensor("model.embed_tokens.weight" if tied else "lm_head.weight")
        head = head.to(self.device, torch.float32)
        results = []
        for stream, tokens in texts:
            total, likeliest = 0.0, []
            with torch.inference_mode():
                rows = (row for batch in stream for row in batch)
                for hidden, row_tokens in zip(rows, tokens.to(self.device), strict=True):
                    # A large vocabulary's logits of a long sequence would be the most memory that a conversion takes.
                    for part, wanted in zip(hidden[:-1].split(512), row_tokens[1:].split(512), strict=True):
                        logits = self.architecture.logits(self.config, F.linear(norm(part), head))
                        total += F.cross_entropy(logits, wanted, reduction="sum").item()
                        likeliest.append(logits.argmax(-1).cpu())
            results.append(Predictions(total / tokens[:, 1:].numel(), torch.cat(likeliest).view(len(tokens), -1)))
        self._unload(norm)
        return results

    def _load(self, module: nn.Module, prefix: str) -> nn.Module:
        names = [name for name, _ in module.named_parameters()]
        state = {name: self.checkpoint.tensor(f"{prefix}.{name}").to(self.device, torch.float32) for name in names}
        module.load_state_dict(state, assign=True)
        return module.to(self.device).requires_grad_(False).eval()

    def _unload(self, module: nn.Module) -> None:
        module.load_state_dict({name: w.to("meta") for name, w in module.named_parameters()}, assign=True)


def run_layer(
    layer: nn.Module, stream: Stream, inputs: LayerInputs, observe: Callable[[AttentionIO], None] | None = None
) -> None:
    """Sends a stream through a decoder layer, in place; `observe` gets the attention's input and output, each batch."""

    def hook(_module: nn.Module, _args: Any, kwargs: dict[str, Tensor], output: tuple[Tensor, ...]) -> None:
        if observe is not None:
            observe((kwargs["hidden_states"], output[0]))

    handle = layer.get_submodule("self_attn").register_forward_hook(hook, with_kwargs=True)
    with torch.inference_mode():
        for i, hidden in enumerate(stream):
            stream[i] = layer(hidden, **inputs)
    handle.remove()


class StatisticsCollector:
    """Observes an attention layer's inputs and accumulates LayerStatistics.

    Args:
        queries: LayerStatistics.queries is wanted.
        factor_queries: LayerStatistics.q is wanted, for factoring the query projection.
    """

    def __init__(self, weights: Projections, shape: AttentionShape, *, queries: bool, factor_queries: bool) -> None:
        self._weights, self._shape = weights, shape
        self._w_kv = torch.cat([weights.w_k, weights.w_v])
        self._kv = _zero_covariance(1, self._w_kv)
        self._queries = _zero_covariance(shape.num_heads, weights.w_q) if queries else None
        self._q = _zero_covariance(1, weights.w_q) if factor_queries else None
        self._sum = torch.zeros(len(self._w_kv), dtype=torch.float64, device=self._w_kv.device)
        self._num_tokens = 0

    def __call__(self, io: AttentionIO) -> None:
        x = io[0].flatten(0, 1)
        self._num_tokens += len(x)
        k, v = F.linear(x, self._w_kv).tensor_split(2, dim=-1)
        if self._q is not None or self._queries is not None:
            q = F.linear(x, self._weights.w_q)
            if self._q is not None:
                ops.covariance_add_(self._q, q[:, None])
            if self._queries is not None:
                ops.covariance_add_(self._queries, self._normed(q, self._weights.b_q, self._weights.q_norm))
        if self._weights.k_norm is not None:
            k = self._normed(k, self._weights.b_k, self._weights.k_norm).flatten(1)
            v = v if self._weights.b_v is None else v + self._weights.b_v
        kv = torch.cat([k, v], dim=-1)
        self._sum += kv.sum(0, dtype=torch.float64)
        ops.covariance_add_(self._kv, kv[:, None])

    def _normed(self, x: Tensor, bias: Tensor | None, norm: Tensor | None) -> Tensor:
        """[num_tokens, heads, head_dim]: what RoPE turns."""
        heads = (x if bias is None else x + bias).unflatten(-1, (-1, self._shape.head_dim))
        return heads if norm is None else F.rms_norm(heads, heads.shape[-1:], norm, self._shape.qk_norm_eps)

    def statistics(self) -> LayerStatistics:
        """Over the tokens of all processes."""
        shape, weights = self._shape, self._weights
        count = torch.tensor(self._num_tokens, device=self._sum.device)
        group.add_up_(self._kv, self._queries, self._q, self._sum, count)
        num_tokens = int(count)
        kv, mean = self._kv[0] / num_tokens, self._sum / num_tokens
        keys = kv[: shape.kv_dim, : shape.kv_dim]
        if weights.b_k is not None and weights.k_norm is None:
            bias, mean = weights.b_k.double(), mean[: shape.kv_dim]
            keys = keys + torch.outer(bias, mean) + torch.outer(mean, bias) + torch.outer(bias, bias)
        queries = self._queries
        if queries is not None:
            queries = queries.unflatten(0, (shape.num_kv_heads, -1)).sum(1) / num_tokens
        return LayerStatistics(keys, kv, queries, None if self._q is None else self._q[0] / num_tokens)


def _zero_covariance(groups: int, weight: Tensor) -> Tensor:
    n = len(weight) // groups
    return torch.zeros(groups, n, n, dtype=torch.float64, device=weight.device)
