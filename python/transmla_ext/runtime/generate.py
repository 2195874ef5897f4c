"""From logits to tokens to text: sampling, incremental detokenisation and the loop over a ragged batch."""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .model import MLAModel

__all__ = ["Generation", "Request", "Sampling", "TextStream", "TokenScores", "run"]

_CONTEXT = 8  # prompt tokens that the first generated ones are decoded with, for the space between them
_REPLACEMENT = "\ufffd"  # what tokenizers print for bytes that are no character, or not yet one


@dataclass(frozen=True)
class Generation:
    """What a model made of one prompt.

    Args:
        tokens: generated ids; the end-of-sequence token, if any, included.
        text: of the tokens, without special ones and up to the stop string; None without a tokenizer.
        finish_reason: "eos", "stop" (a stop string) or "length".
    """

    tokens: list[int]
    text: str | None
    finish_reason: str


@dataclass(frozen=True, eq=False)
class TokenScores:
    """How likely a model takes each token of a continuation to be, given all tokens before it."""

    logprobs: Tensor  # [num_tokens], fp32, natural
    likeliest: Tensor  # [num_tokens], int64: the tokens that greedy decoding would have taken


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn: temperature, then the top_k likeliest, then the likeliest that reach top_p together."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be at least 0 and finite, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 0 (0 is off), got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")

    def __call__(self, logits: Tensor, generators: Sequence[torch.Generator]) -> list[int]:
        """One token for each row of logits [batch_size, vocab_size], row i drawn with generators[i]."""
        if self.temperature == 0:
            return logits.argmax(-1).tolist()
        logits = logits.float() / self.temperature
        ids = None
        if self.top_k or self.top_p < 1:
            logits, ids = logits.topk(min(self.top_k or logits.size(-1), logits.size(-1)))
        probs = logits.softmax(-1)
        if self.top_p < 1:
            probs = probs.where(probs.cumsum(-1) - probs < self.top_p, 0)
        cdf = probs.cumsum(-1)
        # In (0, 1], so that the first entry that reaches it has a probability.
        uniform = 1 - torch.cat([torch.rand(1, 1, generator=generator) for generator in generators])
        drawn = torch.searchsorted(cdf, uniform.to(cdf.device) * cdf[:, -1:])
        return (drawn if ids is None else ids.gather(-1, drawn)).flatten().tolist()


class TextStream:
    """Tokens in, text out as soon as it can no longer change: no broken characters, nothing of a stop string."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._tokens = list(prompt[-_CONTEXT:])
        self._start, self._read = 0, len(self._tokens)  # decoded together; up to where they are text already
        self._taken = 0
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> None:
        self._tokens.append(token)
        before = self._decode(self._tokens[self._start : self._read])
        after = self._decode(self._tokens[self._start :])
        if len(after) <= len(before) or after.endswith(_REPLACEMENT):
            return
        self._start, self._read = self._read, len(self._tokens)
        searched = max(0, len(self.text) - max(map(len, self._stop), default=0) + 1)
        self.text += after[len(before) :]
        ends = [end for end in (self.text.find(stop, searched) for stop in self._stop) if end >= 0]
        if ends:
            self.text = self.text[: min(ends)]
            self.stopped = True

    def take(self, *, final: bool) -> str:
        """The text since the last call, less what may be the start of a stop string unless it is final."""
        end = len(self.text)
        if not final:
            held = max((_overlap(self.text, stop) for stop in self._stop), default=0)
            end -= held
        piece, self._taken = self.text[self._taken : end], max(end, self._taken)
        return piece

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of text that stop starts with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


@dataclass(eq=False)
class Request:
    """One prompt on its way through the loop."""

    prompt: list[int]
    text: TextStream | None
    eos: Collection[int]
    limit: int  # of new tokens
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None

    def push(self, token: int) -> None:
        self.tokens.append(token)
        if self.text is not None:
            self.text.push(token)
        if token in self.eos:
            self.finish_reason = "eos"
        elif self.text is not None and self.text.stopped:
            self.finish_reason = "stop"
        elif len(self.tokens) == self.limit:
            self.finish_reason = "length"


def run(model: MLAModel, requests: Sequence[Request], sampling: Sampling, seed: int | None) -> Generator[None]:
    """Runs every request to its finish_reason; between two yields each unfinished one gets a token.

    A finished request's pages are free at once; all are when the iterator is closed or fails.
    """
    if seed is None:
        seed = int(torch.randint(2**31, ()))
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(requests))]
    logits, sequences = model.prefill([request.prompt for request in requests])
    try:
        live = list(range(len(requests)))
        while live:
            tokens = dict(zip(live, sampling(logits, [generators[i] for i in live]), strict=True))
            for i, token in tokens.items():
                requests[i].push(token)
                if requests[i].finish_reason is not None:
                    model.free([sequences[i]])
            yield
            live = [i for i in live if requests[i].finish_reason is None]
            if live:
                logits = model.decode([sequences[i] for i in live], [tokens[i] for i in live])
    finally:
        model.free(sequences)
