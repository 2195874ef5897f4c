"""TransMLA (arXiv 2502.07864) read straight off the paper, for Llama-type models: the oracle of the conversion tests.

Every activation of every layer is in memory, the mathematics is in fp64, and no code is shared with the package. One
complex number stands for each RoPE pair, so that RoPE multiplies it by exp(i · position · frequency).
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM

__all__ = ["attention_inputs", "convert", "perplexity"]


@torch.no_grad()
def perplexity(model: nn.Module, token_ids: Tensor) -> float:
    """exp of the mean negative log-likelihood of all but the first token of each row of token_ids, [rows, length]."""
    nll = 0.0
    for row in token_ids.split(1):
        logits = model(row, use_cache=False).logits[0, :-1].float()
        nll += F.cross_entropy(logits, row[0, 1:], reduction="sum").item()
    return math.exp(nll / token_ids[:, 1:].numel())


@torch.no_grad()
def attention_inputs(model: LlamaForCausalLM, token_ids: Tensor) -> list[Tensor]:
    """What enters each layer's attention: [rows * length, hidden_size] a layer, for token_ids [rows, length]."""
    inputs: list[list[Tensor]] = [[] for _ in model.model.layers]

    def keep(attention: nn.Module, _args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        inputs[attention.layer_idx].append(kwargs["hidden_states"].flatten(0, 1))

    hooks = [layer.self_attn.register_forward_pre_hook(keep, with_kwargs=True) for layer in model.model.layers]
    for rows in token_ids.split(4):
        model.model(rows, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [torch.cat(parts) for parts in inputs]


@torch.no_grad()
def convert(
    model: LlamaForCausalLM,
    inputs: list[Tensor],
    *,
    kv_lora_rank: int,
    qk_rope_head_dim: int,
    freqfold: int,
    q_lora_rank: int | None = None,
) -> LlamaForCausalLM:
    """A copy of the model in which every attention is MLA.

    Args:
        model: without attention biases.
        inputs: attention_inputs(model, calibration tokens).
        kv_lora_rank: numbers of the latent.
        qk_rope_head_dim: numbers of the rotated key that all heads share; divides head_dim.
        freqfold: adjacent RoPE pairs that count as one frequency; a multiple of head_dim / qk_rope_head_dim.
        q_lora_rank: rank that the query projection is cut to; None leaves it whole.
    """
    converted = copy.deepcopy(model)
    freqs = model.model.rotary_emb.inv_freq.double()
    for layer, hidden in zip(converted.model.layers, inputs, strict=True):
        collapse = layer.self_attn.head_dim // qk_rope_head_dim
        layer.self_attn = _convert_attention(
            layer.self_attn, hidden.double(), freqs, collapse, freqfold, kv_lora_rank, q_lora_rank
        )
    return converted


def _convert_attention(
    attention: nn.Module,
    hidden: Tensor,
    freqs: Tensor,
    collapse: int,
    freqfold: int,
    kv_lora_rank: int,
    q_lora_rank: int | None,
) -> nn.Module:
    w_q, w_k, w_v = (p.weight.double() for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    if q_lora_rank:
        axes = _principal_axes(hidden @ w_q.T)[:, :q_lora_rank]
        w_q = axes @ axes.T @ w_q
    w_q, w_k = _complex_pairs(w_q, attention.head_dim), _complex_pairs(w_k, attention.head_dim)
    num_heads, num_pairs, _ = w_q.shape
    num_kv_heads = w_k.shape[0]
    queries_per_kv_head = num_heads // num_kv_heads

    # RoRoPE and FreqFold. In every fold one orthogonal matrix turns the freqfold pairs of all KV heads, real and
    # imaginary parts alike, to the principal axes of the keys. RoPE stays on the first freqfold / collapse of them.
    k_rope, k_nope, q_rope, q_nope = [], [], [], []
    for fold in torch.arange(num_pairs).split(freqfold):
        k = w_k[:, fold].flatten(0, 1)
        axes = _principal_axes(torch.cat([hidden @ k.real.T, hidden @ k.imag.T]))
        k = axes.T.to(k.dtype) @ k
        # A query meets the keys of its own KV head only: the rows of the matrix that turn that head's pairs.
        per_head = axes.unflatten(0, (num_kv_heads, freqfold)).repeat_interleave(queries_per_kv_head, dim=0)
        q = per_head.mT.to(k.dtype) @ w_q[:, fold]
        kept = freqfold // collapse
        k_rope.append(k[:kept]), k_nope.append(k[kept:]), q_rope.append(q[:, :kept]), q_nope.append(q[:, kept:])
    k_rope, q_rope = torch.cat(k_rope), torch.cat(q_rope, dim=1)
    # Without RoPE, Re(q · conj(k)) is the dot product of the real and the imaginary parts.
    k_nope, q_nope = torch.cat(k_nope), torch.cat(q_nope, dim=1)
    k_nope, q_nope = torch.cat([k_nope.real, k_nope.imag]), torch.cat([q_nope.real, q_nope.imag], dim=1)

    # BKV and the joint PCA.
    keys, values = hidden @ k_nope.T, hidden @ w_v.T
    alpha = keys.norm(dim=1).mean() / values.norm(dim=1).mean()
    axes = _principal_axes(torch.cat([keys / alpha, values], dim=1))[:, :kv_lora_rank]
    w_uk, w_uv = axes.split([len(k_nope), len(w_v)])
    w_uv = w_uv.unflatten(0, (num_kv_heads, -1)).repeat_interleave(queries_per_kv_head, dim=0)
    return _MLAttention(
        q_latent=(alpha * w_uk).T @ q_nope,
        q_rope=q_rope,
        w_dkv=axes.T @ torch.cat([k_nope / alpha, w_v]),
        k_rope=k_rope,
        w_uv=w_uv,
        o_proj=attention.o_proj,
        slot_freqs=freqs[::collapse],
        softmax_scale=attention.head_dim**-0.5,
    )


def _complex_pairs(weight: Tensor, head_dim: int) -> Tensor:
    """[heads, head_dim / 2, hidden_size]: Llama pairs row p of a head with row p + head_dim / 2."""
    return torch.complex(*weight.unflatten(0, (-1, 2, head_dim // 2)).unbind(1))


def _principal_axes(x: Tensor) -> Tensor:
    """Eigenvectors of the second moment of x, [tokens, dim], one a column, largest eigenvalue first."""
    moment = x.T @ x / len(x)
    damping = 0.01 * moment.diagonal().mean()
    return torch.linalg.eigh(moment + damping * torch.eye(len(moment), dtype=x.dtype)).eigenvectors.flip(1)


class _MLAttention(nn.Module):
    """Absorbed MLA of whole sequences that start at position 0; stands in for LlamaAttention.

    Args:
        q_latent: [heads, kv_lora_rank, hidden_size], W_UK absorbed.
        q_rope: [heads, slots, hidden_size], complex; k_rope: [slots, hidden_size], complex.
        w_dkv: [kv_lora_rank, hidden_size].
        w_uv: [heads, head_dim, kv_lora_rank].
        slot_freqs: [slots].
    """

    def __init__(self, *, o_proj: nn.Module, slot_freqs: Tensor, softmax_scale: float, **weights: Tensor) -> None:
        super().__init__()
        self.o_proj, self.slot_freqs, self.softmax_scale = o_proj, slot_freqs, softmax_scale
        for name, weight in weights.items():
            self.register_buffer(name, weight.to(torch.complex64 if weight.is_complex() else torch.float32))

    def forward(self, hidden_states: Tensor, **_: object) -> tuple[Tensor, None]:
        x = hidden_states[:, None]  # [batch, 1, tokens, hidden_size]
        angles = torch.arange(x.size(2))[:, None] * self.slot_freqs
        turn = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)

        def with_rope(latent: Tensor, rope: Tensor) -> Tensor:
            return torch.cat([latent, torch.view_as_real(rope * turn).flatten(-2)], dim=-1)

        c_kv = x @ self.w_dkv.T
        q = with_rope(x @ self.q_latent.mT, x.to(torch.complex64) @ self.q_rope.mT)
        k = with_rope(c_kv, x.to(torch.complex64) @ self.k_rope.mT)
        heads = q.size(1)
        latents = F.scaled_dot_product_attention(
            q, k.expand(-1, heads, -1, -1), c_kv.expand(-1, heads, -1, -1), is_causal=True, scale=self.softmax_scale
        )
        out = latents @ self.w_uv.mT  # [batch, heads, tokens, head_dim]
        return self.o_proj(out.transpose(1, 2).flatten(2)), None
