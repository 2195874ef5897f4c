"""The parts alone: transmla_ext's paged cache and ops in a server that has its own model code and its own loop.

python examples/embed.py llama-mla "The capital of France is" "Once upon a time"
python examples/embed.py                                                           # a tiny random model

Greedy continuous batching for native checkpoints of the llama family. A prompt goes in token by token, as one more row
of the batch, so that the whole server is one decode step.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from transmla_ext import MLAConfig, ops
from transmla_ext.models import native_config
from transmla_ext.runtime import CachedSequence, CacheFullError, PagedLatentCache


@dataclass(eq=False)
class Request:
    prompt: Sequence[int]
    max_new_tokens: int
    tokens: list[int] = field(default_factory=list)
    sequence: CachedSequence = field(default_factory=CachedSequence)

    def next_input(self) -> int:
        position = self.sequence.length
        return self.prompt[position] if position < len(self.prompt) else self.tokens[-1]


class Server:
    """Decodes up to max_batch_size requests at once; the model lends its weights and its MLP."""

    def __init__(self, model: Any, *, max_tokens: int, max_batch_size: int = 8) -> None:
        self.model = model.eval().requires_grad_(False)
        self.max_batch_size = max_batch_size
        self.shapes = [MLAConfig(**fields) for fields in model.config.mla]
        if model.config.model_type != "transmla_llama" or any(mla.q_lora_rank for mla in self.shapes):
            raise ValueError("this example has the model code of native llama checkpoints with whole query projections")
        self.cache = PagedLatentCache(
            [mla.cache_dim for mla in self.shapes], dtype=model.dtype, device=model.device, max_tokens=max_tokens
        )
        positions = torch.arange(model.config.max_position_embeddings, device=model.device)
        cos, sin = model.model.rotary_emb(torch.zeros((), device=model.device), positions.unsqueeze(0))
        self.cos_sin = [torch.cat((cos[0][:, mla.rope_slots], sin[0][:, mla.rope_slots]), -1) for mla in self.shapes]

    def serve(self, requests: Iterable[Request]) -> Iterator[Request]:
        """Requests in the order they finish."""
        waiting, running = deque(requests), list[Request]()
        while waiting or running:
            while waiting and len(running) < self.max_batch_size:
                request = waiting[0]
                try:  # the room for all of it at once, so that nothing runs out later
                    self.cache.reserve([request.sequence], [len(request.prompt) + request.max_new_tokens - 1])
                except CacheFullError:
                    if not running:
                        raise
                    break
                running.append(waiting.popleft())
            likeliest = self.step([r.sequence for r in running], [r.next_input() for r in running]).argmax(-1).tolist()
            for request, token in zip(list(running), likeliest, strict=True):
                if request.sequence.length >= len(request.prompt):  # before that, it is the prompt that goes on
                    request.tokens.append(token)
                if len(request.tokens) == request.max_new_tokens:
                    running.remove(request)
                    self.cache.free([request.sequence])
                    yield request

    def step(self, sequences: Sequence[CachedSequence], tokens: Sequence[int]) -> Tensor:
        """Logits [batch_size, vocab_size] after one more token of each sequence."""
        tables = self.cache.append(sequences, [1] * len(sequences))
        hidden = self.model.model.embed_tokens(torch.tensor(tokens, device=self.model.device))
        for i, (layer, mla) in enumerate(zip(self.model.model.layers, self.shapes, strict=True)):
            attention, latent_cache = layer.self_attn, self.cache.layers[i]
            w_kv_b = attention.kv_b_proj.weight.unflatten(0, (attention.num_heads, -1))
            w_uk, w_uv = w_kv_b.split((mla.qk_nope_head_dim, mla.v_head_dim), dim=1)
            q_proj, kv_a = attention.q_proj, attention.kv_a_proj_with_mqa
            q = ops.mla_project(
                layer.input_layernorm(hidden), q_proj.weight, kv_a.weight, w_uk, self.cos_sin[i],
                tables.positions, tables.slot_mapping, latent_cache, b_q=q_proj.bias, b_kv_a=kv_a.bias,
            )  # fmt: skip
            out, _ = ops.mla_decode(
                q.unsqueeze(1), latent_cache, tables.block_table, tables.cache_seqlens, mla.kv_lora_rank,
                attention.scaling, batch_invariant=True,
            )  # fmt: skip
            hidden = hidden + attention.o_proj(torch.einsum("bhr,hvr->bhv", out[:, 0], w_uv).flatten(1))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        logits: Tensor = self.model.lm_head(self.model.model.norm(hidden))
        return logits


def tiny_model() -> Any:
    shape = MLAConfig(kv_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16, rope_slots=range(8))
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    return AutoModelForCausalLM.from_config(native_config(LlamaConfig(**sizes, num_hidden_layers=2), [shape] * 2))


def main(path: str | None = None, *texts: str) -> None:
    if path is None:
        model, prompts, show = tiny_model(), [[1, 2, 3], [4], [5, 6, 7, 8, 9]], str
    else:
        model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
        prompts, show = [tokenizer(text).input_ids for text in texts], tokenizer.decode
    for request in Server(model, max_tokens=4096).serve([Request(prompt, 24) for prompt in prompts]):
        print(f"{show(request.prompt)} -> {show(request.tokens)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
