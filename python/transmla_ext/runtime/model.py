"""An MLA language model over a paged latent cache: load, prefill, decode, generate."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..architectures import Architecture, family
from ..checkpoint import load_transformers
from ..config import MLAConfig
from ..errors import CheckpointError, UnsupportedModelError
from ..models import base_model_type
from .attention import PagedAttention, Step, cut_pieces
from .cache import CachedSequence, PagedLatentCache
from .generate import Generation, Request, Sampling, TextStream, TokenScores, run
from .modules import replace_modules

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["MLAModel", "load"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_SCORED_ROWS = 256  # at once: logits of a vocabulary of 128k take 128 MB


def load(
    path: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device = "cpu",
    max_tokens: int | None = None,
    block_size: int = 64,
) -> MLAModel:
    """A converted checkpoint of either format, or any stock deepseek_v3 one, ready to generate.

    Args:
        path: local directory with config.json and safetensors files.
        dtype: bf16, fp16 or fp32, or the name of one; None takes the checkpoint's.
        device: where weights and cache live.
        max_tokens: limit of the cache, all sequences together; None allows half of the device's memory.
        block_size: tokens per page of the cache.
    Raises:
        TransMLAError: no MLA checkpoint, or not a whole one.
    """
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, dtype)
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, _DTYPES))}, got {dtype}")
    path = Path(path)
    _check_checkpoint(path)
    model: Any = load_transformers(path, dtype)
    return MLAModel(model.to(device), tokenizer=_load_tokenizer(path), max_tokens=max_tokens, block_size=block_size)


def _check_checkpoint(path: Path) -> None:
    if path.suffix == ".partial":
        raise CheckpointError(f"{path} is an unfinished conversion: run the same `transmla convert` again, it goes on")
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path} has no config.json: expected the directory of a finished conversion")
    model_type = json.loads((path / "config.json").read_text()).get("model_type")
    if model_type == "deepseek_v2":
        raise UnsupportedModelError(
            f"{path}: transformers routes deepseek_v2 experts without norm_topk_prob; serve it with vLLM or SGLang, or "
            "convert the original with format='transmla'"
        )
    if model_type != "deepseek_v3" and base_model_type(str(model_type)) is None:
        raise UnsupportedModelError(
            f"{path}: model type {model_type!r} has no latent attention; convert it first: transmla convert {path} OUT"
        )
    if not any(path.glob("*.safetensors")):
        raise CheckpointError(f"{path} has no safetensors files; pickles are not read")


def _load_tokenizer(path: Path) -> Any:
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)


class MLAModel:
    """A language model with latent attention over a paged cache; not thread-safe.

    Args:
        model: native, or transformers' DeepseekV3ForCausalLM; taken over: modules are replaced by faster ones.
        tokenizer: of transformers; without one prompts are token ids and generations have no text.
        max_tokens, block_size: of the cache, as in ``load``.
    """

    def __init__(
        self, model: PreTrainedModel, *, tokenizer: Any = None, max_tokens: int | None = None, block_size: int = 64
    ) -> None:
        if model.dtype not in _DTYPES:
            raise UnsupportedModelError(f"weights must be one of {', '.join(map(str, _DTYPES))}, got {model.dtype}")
        if model.dtype == torch.float16 and model.config.model_type == "deepseek_v3":
            # The stock format scales latents down until their norm is constant, out of what fp16 can hold.
            raise UnsupportedModelError("deepseek_v3 checkpoints run in bf16 or fp32, not in fp16")
        shapes = _layer_shapes(model.config)
        model.eval().requires_grad_(False)
        self.config = model.config
        self.tokenizer = tokenizer
        self.max_position_embeddings = int(model.config.max_position_embeddings)
        self.cache = PagedLatentCache(
            [shape.cache_dim for shape in shapes],
            dtype=model.dtype,
            device=model.device,
            block_size=block_size,
            max_tokens=max_tokens,
        )
        base = base_model_type(model.config.model_type)
        self._architecture = Architecture() if base is None else family(base)
        for layer_idx, (layer, shape) in enumerate(zip(model.model.layers, shapes, strict=True)):
            layer.self_attn = PagedAttention(layer.self_attn, shape, layer_idx)
        replace_modules(model)
        self._prefills_fused = model.device.type == "cpu"  # ops.mla_prefill has no kernel for another device
        self._windows = {layer.self_attn.sliding_window for layer in model.model.layers}
        self._decoder = model.model
        self._lm_head = model.lm_head
        self._rope_slots = [shape.rope_slots for shape in shapes]
        self._cos_sin: list[Tensor] = []
        eos = model.generation_config.eos_token_id
        self._eos = frozenset(() if eos is None else [eos] if isinstance(eos, int) else eos)

    @property
    def device(self) -> torch.device:
        """Of the weights and the cache."""
        device: torch.device = self._lm_head.weight.device
        return device

    @torch.inference_mode()
    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        sequences: Sequence[CachedSequence] | None = None,
        chunk_size: int = 4096,
    ) -> tuple[Tensor, list[CachedSequence]]:
        """Logits [batch_size, vocab_size] after the last token of each prompt, and the sequences' handles.

        Args:
            prompts: token ids, at least one each.
            sequences: handles of sequences that the prompts go on; None begins new ones.
            chunk_size: tokens per forward pass, which bounds memory; the logits do not depend on it.
        Raises:
            CacheFullError: more pages wanted than are free; nothing was changed.
        """
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
        handles = [CachedSequence() for _ in prompts] if sequences is None else list(sequences)
        self._check(prompts, handles)
        self.cache.reserve(handles, [len(prompt) for prompt in prompts])
        try:
            last_hidden = self._last_hidden(prompts, handles, [1] * len(prompts), chunk_size)
            return self._logits(torch.cat(last_hidden)), handles
        except BaseException:
            if sequences is None:
                self.free(handles)
            raise

    @torch.inference_mode()
    def score(
        self,
        contexts: Sequence[Sequence[int]],
        continuations: Sequence[Sequence[Sequence[int]]],
        *,
        chunk_size: int = 4096,
    ) -> list[list[TokenScores]]:
        """How likely the continuations of each context are; what they share is computed once.

        Args:
            contexts: token ids, at least one each.
            continuations: for each context one or more, of one token or more.
            chunk_size: tokens per forward pass, as of ``prefill``.
        Raises:
            CacheFullError: the cache cannot hold all of them at once; it is as before.
        """
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
        if not all(contexts) or not all(its and all(its) for its in continuations):
            raise ValueError("every context needs a token and a continuation, and every continuation a token")
        # A context goes through together with its longest continuation; the others branch off where it ends.
        longest = [max(its, key=len) for its in continuations]
        trunks = [[*context, *its[:-1]] for context, its in zip(contexts, longest, strict=True)]
        pairs = [(i, continuation) for i, its in enumerate(continuations) for continuation in its]
        branches = [(i, tokens[:-1]) for i, tokens in pairs if tokens is not longest[i] and len(tokens) > 1]
        sequences = [CachedSequence() for _ in trunks]
        self._check(trunks, sequences)
        for _, tokens in pairs:
            self._check_ids(tokens)
        try:
            trunk_hidden = self._last_hidden(trunks, sequences, list(map(len, longest)), chunk_size)
            forks = [self.cache.fork(sequences[i], len(contexts[i])) for i, _ in branches]
            sequences += forks
            prompts = [tokens for _, tokens in branches]
            branch_hidden = iter(self._last_hidden(prompts, forks, list(map(len, prompts)), chunk_size))
        finally:
            self.free(sequences)
        rows = []
        for i, tokens in pairs:
            if tokens is longest[i]:
                rows.append(trunk_hidden[i])
            else:
                rows += [trunk_hidden[i][:1], *([next(branch_hidden)] if len(tokens) > 1 else [])]
        scores = iter(self._token_scores(torch.cat(rows), [tokens for _, tokens in pairs]))
        return [[next(scores) for _ in its] for its in continuations]

    @torch.inference_mode()
    def decode(
        self, sequences: Sequence[CachedSequence], tokens: Sequence[int], *, batch_invariant: bool = False
    ) -> Tensor:
        """Logits [batch_size, vocab_size] after one more token of each sequence.

        Args:
            batch_invariant: as of ops.mla_decode; matrix products may still round another way in another batch.
        Raises:
            CacheFullError: more pages wanted than are free; nothing was changed.
        """
        prompts = [[token] for token in tokens]
        self._check(prompts, sequences)
        return self._logits(torch.cat(self._forward(prompts, sequences, batch_invariant=batch_invariant)))

    def free(self, sequences: Iterable[CachedSequence]) -> None:
        """Gives the pages of sequences back; their handles cannot be used again."""
        self.cache.free(sequences)

    def generate(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        eos: int | Collection[int] | None = None,
    ) -> list[Generation]:
        """Continuations of a ragged batch of prompts, each as if it were alone.

        Args:
            prompts: texts or token ids.
            max_new_tokens: at most so many each; fewer where the model runs out of positions.
            temperature: 0 is greedy.
            top_k: draw from the likeliest top_k tokens; 0 is off.
            top_p: draw from the likeliest tokens that reach this probability together; 1 is off.
            seed: prompt i is drawn with seed + i; None takes one from torch's global generator.
            stop: texts that end a generation, cut off with what follows; needs a tokenizer.
            eos: token ids that end a generation; None takes the checkpoint's, () has none.
        """
        if isinstance(prompts, str):
            raise ValueError("prompts must be a list; for one text: [text]")
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
        requests = [self.request(prompt, max_new_tokens=max_new_tokens, stop=stop, eos=eos) for prompt in prompts]
        for _ in run(self, requests, sampling, seed):
            pass
        return [
            Generation(
                tokens=request.tokens,
                text=None if request.text is None else request.text.text,
                finish_reason=request.finish_reason or "length",
            )
            for request in requests
        ]

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        eos: int | Collection[int] | None = None,
    ) -> Iterator[str]:
        """The text of ``generate([prompt], ...)`` in pieces, each as soon as it can no longer change."""
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
        request = self.request(prompt, max_new_tokens=max_new_tokens, stop=stop, eos=eos)
        text = request.text
        if text is None:
            raise ValueError("stream needs a tokenizer, and the checkpoint has none")

        def pieces() -> Iterator[str]:
            with closing(run(self, [request], sampling, seed)) as steps:
                for _ in steps:
                    if piece := text.take(final=request.finish_reason is not None):
                        yield piece

        return pieces()

    def chat_prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of {"role": ..., "content": ...} messages in the checkpoint's chat template, up to the answer."""
        if self.tokenizer is None or not self.tokenizer.chat_template:
            raise ValueError("the checkpoint has no chat template")
        encoded = self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=True)
        return list(encoded["input_ids"])

    def request(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int,
        stop: str | Sequence[str] = (),
        eos: int | Collection[int] | None = None,
    ) -> Request:
        """A checked, tokenised prompt that knows when to end, for a loop of one's own; arguments as of ``generate``."""
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        stop = [stop] if isinstance(stop, str) else list(stop)
        if not all(stop):
            raise ValueError("a stop string is empty")
        if self.tokenizer is None and (stop or isinstance(prompt, str)):
            raise ValueError("text prompts and stop strings need a tokenizer, and the checkpoint has none")
        tokens = list(self.tokenizer(prompt).input_ids if isinstance(prompt, str) else prompt)
        self._check([tokens], [CachedSequence()])
        return Request(
            prompt=tokens,
            text=None if self.tokenizer is None else TextStream(self.tokenizer, tokens, stop),
            eos=self._eos if eos is None else frozenset([eos] if isinstance(eos, int) else eos),
            # The last token needs no position: it is never fed back.
            limit=min(max_new_tokens, self.max_position_embeddings - len(tokens) + 1),
        )

    def _check(self, prompts: Sequence[Sequence[int]], sequences: Sequence[CachedSequence]) -> None:
        if not prompts or len(prompts) != len(sequences):
            raise ValueError(
                f"as many prompts or tokens as sequences, and at least one: got {len(prompts)}, {len(sequences)}"
            )
        for prompt, sequence in zip(prompts, sequences, strict=True):
            if not prompt:
                raise ValueError("a prompt is empty")
            self._check_ids(prompt)
            if sequence.length + len(prompt) > self.max_position_embeddings:
                raise ValueError(
                    f"{sequence.length + len(prompt)} tokens in a sequence, but the model has "
                    f"{self.max_position_embeddings} positions"
                )

    def _check_ids(self, tokens: Sequence[int]) -> None:
        if min(tokens) < 0 or max(tokens) >= self.config.vocab_size:
            raise ValueError(f"token ids must be in [0, {self.config.vocab_size}), got {min(tokens)} .. {max(tokens)}")

    def _last_hidden(
        self,
        prompts: Sequence[Sequence[int]],
        sequences: Sequence[CachedSequence],
        num_last: Sequence[int],
        chunk_size: int,
    ) -> list[Tensor]:
        """Hidden states of the last num_last[i] new tokens of each sequence, as of ``_forward``, chunk by chunk."""
        kept: list[list[Tensor]] = [[] for _ in prompts]
        for chunk in _chunks([len(prompt) for prompt in prompts], chunk_size):
            hidden = self._forward([prompts[i][span] for i, span in chunk], [sequences[i] for i, _ in chunk])
            for (i, span), piece in zip(chunk, hidden, strict=True):
                first = len(prompts[i]) - num_last[i]
                if span.stop > first:
                    kept[i].append(piece[max(first - span.start, 0) :])
        return [torch.cat(pieces) for pieces in kept]

    def _forward(
        self, prompts: Sequence[Sequence[int]], sequences: Sequence[CachedSequence], *, batch_invariant: bool = False
    ) -> list[Tensor]:
        """Hidden states of each sequence's new tokens, [num_new, hidden_size], before the final norm."""
        num_new = [len(prompt) for prompt in prompts]
        tables = self.cache.append(sequences, num_new)
        cos_sin = self._rope_tables(max(sequence.length for sequence in sequences))
        pieces = None
        if max(num_new) > 1:
            seqlens = [sequence.length for sequence in sequences]
            windows = None if self._prefills_fused else self._windows
            pieces = cut_pieces(num_new, seqlens, tables.block_table, self.cache.block_size, windows)
        step = Step(tables, pieces, self.cache.layers, cos_sin, batch_invariant)
        tokens = torch.tensor([token for prompt in prompts for token in prompt], device=self.device)
        hidden = self._decoder.embed_tokens(tokens).unsqueeze(0)
        hidden *= self._architecture.embedding_scale(self.config)
        for layer in self._decoder.layers:
            hidden = layer(hidden, step=step)
        return list(hidden[0].split(num_new))

    def _rope_tables(self, num_positions: int) -> list[Tensor]:
        """Cosines and sines of every layer's slots, for at least so many positions."""
        if not self._cos_sin or num_positions > self._cos_sin[0].size(0):
            rows = min(max(2 * num_positions, 4096), self.max_position_embeddings)
            fp32 = torch.zeros((), device=self.device)
            cos, sin = self._decoder.rotary_emb(fp32, torch.arange(rows, device=self.device).unsqueeze(0))
            tables = {slots: torch.cat((cos[0][:, slots], sin[0][:, slots]), dim=-1) for slots in set(self._rope_slots)}
            self._cos_sin = [tables[slots] for slots in self._rope_slots]
        return self._cos_sin

    def _logits(self, hidden: Tensor) -> Tensor:
        return self._architecture.logits(self.config, self._lm_head(self._decoder.norm(hidden)))

    def _token_scores(self, hidden: Tensor, continuations: Sequence[Sequence[int]]) -> list[TokenScores]:
        """Of the tokens of all continuations, from the hidden states before each: [num_tokens, hidden_size]."""
        tokens = torch.tensor([token for its in continuations for token in its], device=self.device)
        logprobs, likeliest = [], []
        for part, wanted in zip(hidden.split(_SCORED_ROWS), tokens.split(_SCORED_ROWS), strict=True):
            logits = self._logits(part).float()
            logprobs.append(logits.gather(-1, wanted.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1))
            likeliest.append(logits.argmax(-1))
        lengths = list(map(len, continuations))
        both = zip(torch.cat(logprobs).cpu().split(lengths), torch.cat(likeliest).cpu().split(lengths), strict=True)
        return [TokenScores(*its) for its in both]


def _layer_shapes(config: PretrainedConfig) -> list[MLAConfig]:
    if (rope_type := config.rope_parameters.get("rope_type")) in ("dynamic", "longrope"):
        raise UnsupportedModelError(
            f"RoPE of type {rope_type} is not supported here: its frequencies change with the length of the text, and "
            "with them keys that are in the cache; run the model with transformers"
        )
    if config.model_type != "deepseek_v3":
        return [MLAConfig(**fields) for fields in config.mla]
    if config.attention_bias or not config.rope_interleave:
        raise UnsupportedModelError("deepseek_v3 with attention_bias or without rope_interleave is not supported")
    shape = MLAConfig(
        kv_lora_rank=config.kv_lora_rank,
        qk_rope_head_dim=config.qk_rope_head_dim,
        qk_nope_head_dim=config.qk_nope_head_dim,
        v_head_dim=config.v_head_dim,
        q_lora_rank=config.q_lora_rank,
        rope_slots=tuple(range(config.qk_rope_head_dim // 2)),
    )
    return [shape] * config.num_hidden_layers


def _chunks(lengths: Sequence[int], chunk_size: int) -> Iterator[list[tuple[int, slice]]]:
    """Prompts cut and packed, in order: (prompt, span of its tokens) of at most chunk_size tokens together."""
    chunk: list[tuple[int, slice]] = []
    room = chunk_size
    for i, length in enumerate(lengths):
        start = 0
        while start < length:
            stop = min(length, start + room)
            chunk.append((i, slice(start, stop)))
            room -= stop - start
            start = stop
            if not room:
                yield chunk
                chunk, room = [], chunk_size
    if chunk:
        yield chunk
