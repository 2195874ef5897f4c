"""From checked requests to the engine's streams, and from its outputs to pieces of text."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Sequence
from time import perf_counter
from typing import Any, NamedTuple

from transformers.convert_slow_tokenizer import bytes_to_unicode

from ..runtime import Engine, Output, QueueFullError, Stream
from .metrics import Metrics
from .protocol import APIError, EngineFailedError, GenerationRequest

__all__ = ["Backend", "Generation", "Piece", "Token", "TokenLogprob"]

_FINISH_REASONS = {"eos": "stop", "stop": "stop", "length": "length"}
_BYTE_OF = {char: byte for byte, char in bytes_to_unicode().items()}
_REPLACEMENT = "\ufffd"

logger = logging.getLogger(__name__)


class Token(NamedTuple):
    """A token as a client sees it."""

    text: str  # "bytes:\\xe2\\x82" for a part of a character
    bytes: bytes


class TokenLogprob(NamedTuple):
    """What was drawn, and what might have been."""

    token: Token
    logprob: float
    top: list[tuple[Token, float]]  # likeliest first
    offset: int  # characters of the choice's text before it


class Piece(NamedTuple):
    """What a step brought one choice of an answer."""

    choice: int
    is_first: bool
    text: str
    logprobs: list[TokenLogprob] | None  # None: not asked for
    finish_reason: str | None


class Backend:
    """An engine, and what a server has to know of it.

    Args:
        max_tokens: that an answer may have.
    """

    def __init__(self, engine: Engine, *, max_tokens: int, metrics: Metrics) -> None:
        self.engine = engine
        self.max_tokens = max_tokens
        self.metrics = metrics
        self.failure: Exception | None = None  # of the last step
        self.vocabulary = Vocabulary(engine.model.tokenizer)

    def start(self, request: GenerationRequest, prompts: Sequence[Sequence[int]]) -> Generation:
        """The answer to each prompt, request.n times: choice i draws with seed + i.

        Raises:
            APIError: 400 for what can never be done, 429 while the queue is full; nothing was started.
        """
        num_choices = len(prompts) * request.n
        if num_choices > self.engine.max_queue_length:
            message = f"{num_choices} choices in one request, more than the queue's {self.engine.max_queue_length}"
            raise APIError(400, message, param="n")
        if (request.limit or 0) > self.max_tokens:
            raise APIError(400, f"at most {self.max_tokens} tokens can be asked for", param="max_tokens")
        streams: list[Stream] = []
        try:
            for i in range(num_choices):
                prompt = prompts[i // request.n]
                room = self._room(len(prompt))
                stream = self.engine.stream(
                    prompt,
                    max_new_tokens=request.limit or min(request.default_limit or room, room),
                    temperature=request.temperature,
                    top_k=request.top_k,
                    top_p=request.top_p,
                    seed=None if request.seed is None else request.seed + i,
                    stop=request.stop,
                    logprobs=request.num_logprobs,
                )
                streams.append(stream)
        except (QueueFullError, ValueError) as error:
            for stream in streams:
                stream.close()
            if isinstance(error, QueueFullError):
                raise APIError(429, str(error), code="queue_full", headers={"Retry-After": "1"}) from error
            raise APIError(400, str(error)) from error
        num_prompt_tokens = sum(map(len, prompts))
        self.metrics.prompt_tokens.inc(num_prompt_tokens)
        return Generation(self, streams, num_prompt_tokens, with_logprobs=request.num_logprobs is not None)

    def _room(self, num_prompt_tokens: int) -> int:
        """The longest answer to such a prompt."""
        model = self.engine.model
        num_cached = min(model.max_position_embeddings, model.cache.pool.num_blocks * model.cache.block_size)
        return max(1, min(self.max_tokens, num_cached - num_prompt_tokens + 1))


class Generation:
    """The choices of one answer as they come."""

    def __init__(
        self, backend: Backend, streams: Sequence[Stream], num_prompt_tokens: int, *, with_logprobs: bool
    ) -> None:
        self._backend = backend
        self._streams = streams
        self._with_logprobs = with_logprobs
        self._num_prompt_tokens = num_prompt_tokens
        self._num_tokens = 0
        self._num_chars = [0] * len(streams)  # of each choice's tokens so far
        self._last_times: list[float | None] = [None] * len(streams)
        self._begin = perf_counter()

    @property
    def usage(self) -> dict[str, int]:
        prompt, completion = self._num_prompt_tokens, self._num_tokens
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    async def pieces(self) -> AsyncIterator[Piece]:
        """One for each token. EngineFailedError: a step raised something."""
        async for i, output in self._outputs():
            self._backend.failure = None
            self._num_tokens += 1
            is_first = self._last_times[i] is None
            self._observe(i)
            reason = None if output.finish_reason is None else _FINISH_REASONS[output.finish_reason]
            logprobs = self._logprobs(i, output) if self._with_logprobs else None
            yield Piece(i, is_first, output.text, logprobs, reason)

    def close(self) -> None:
        """Aborts what has not ended."""
        for stream in self._streams:
            stream.close()

    async def _outputs(self) -> AsyncIterator[tuple[int, Output]]:
        """Of all choices as they come, with the choice's number."""
        try:
            if len(self._streams) > 1:
                async for numbered in _merged(self._streams):
                    yield numbered
            else:
                async for output in self._streams[0]:
                    yield 0, output
        except Exception as error:
            if error is not self._backend.failure:  # it ends all streams, and is one failure
                logger.error("a step of the engine failed", exc_info=error)
                self._backend.failure = error
            raise EngineFailedError from error

    def _observe(self, i: int) -> None:
        now, last = perf_counter(), self._last_times[i]
        metrics = self._backend.metrics
        if last is None:
            metrics.first_token_seconds.observe(now - self._begin)
        else:
            metrics.token_seconds.observe(now - last)
        self._last_times[i] = now

    def _logprobs(self, i: int, output: Output) -> list[TokenLogprob]:
        if output.token is None or output.logprob is None or output.finish_reason == "eos":
            return []  # the end is no part of the text
        vocabulary = self._backend.vocabulary
        token = vocabulary[output.token]
        begins_inside = bool(token.bytes) and _continues(token.bytes[0])
        offset = self._num_chars[i] - (begins_inside and self._num_chars[i] > 0)
        self._num_chars[i] += sum(not _continues(byte) for byte in token.bytes)
        top = [(vocabulary[other], logprob) for other, logprob in output.top_logprobs.items()]
        return [TokenLogprob(token, output.logprob, top, offset)]


async def _merged(streams: Sequence[Stream]) -> AsyncIterator[tuple[int, Output]]:
    """Outputs of all as they come, with the stream's number."""
    waits = {asyncio.ensure_future(anext(stream)): i for i, stream in enumerate(streams)}
    try:
        while waits:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for future in done:
                output = future.result()
                i = waits.pop(future)
                if output.finish_reason is None:
                    waits[asyncio.ensure_future(anext(streams[i]))] = i
                yield i, output
    finally:
        for future in waits:
            future.cancel()
        await asyncio.gather(*waits, return_exceptions=True)


class Vocabulary(dict[int, Token]):
    """Tokens as text and bytes, each found out when it is first asked for."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # Decoders drop the space that a text begins with: a token is what it adds to another one.
        self._before = tokenizer("a", add_special_tokens=False).input_ids[-1:]

    def __missing__(self, token: int) -> Token:
        text = self._decode([*self._before, token])[len(self._decode(self._before)) :]
        raw = _raw_bytes(self._tokenizer.convert_ids_to_tokens(token) or "") if _REPLACEMENT in text else None
        self[token] = known = Token(text, text.encode()) if raw is None else _token_of_bytes(raw)
        return known

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text


def _raw_bytes(piece: str) -> bytes | None:
    """Of a vocabulary's piece: byte-level, or SentencePiece's byte fallback; None: neither."""
    if fallback := re.fullmatch("<0x([0-9A-F]{2})>", piece):
        return bytes.fromhex(fallback[1])
    return bytes(_BYTE_OF[char] for char in piece) if piece and all(char in _BYTE_OF for char in piece) else None


def _token_of_bytes(raw: bytes) -> Token:
    try:
        return Token(raw.decode(), raw)
    except UnicodeDecodeError:
        return Token("bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), raw)


def _continues(byte: int) -> bool:
    """Whether it goes on with a character of UTF-8 that an earlier byte began."""
    return byte & 0xC0 == 0x80
