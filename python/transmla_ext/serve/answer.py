"""Answers in OpenAI's two forms, whole or as server-sent events."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import anyio
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from .generation import Generation, Piece, Token, TokenLogprob
from .protocol import GenerationRequest

__all__ = ["CHAT", "COMPLETION", "Answer", "Form"]

Json = dict[str, Any]
_EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect events
]


@dataclass(frozen=True)
class Form:
    """How an endpoint says what was generated."""

    id_prefix: str
    object: str
    chunk_object: str
    choice: Callable[[Piece], Json]
    chunk_choice: Callable[[Piece], Json]


class Answer(Response):
    """Sends what a generation gives; when the client goes away, the generation is aborted."""

    def __init__(self, form: Form, request: GenerationRequest, generation: Generation) -> None:
        super().__init__()
        self._form, self._request, self._generation = form, request, generation
        self._head: Json = {
            "id": f"{form.id_prefix}-{uuid4().hex}",
            "object": form.chunk_object if request.stream else form.object,
            "created": int(time.time()),
            "model": request.model,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with closing(self._generation), anyio.CancelScope() as sending:
            watch = asyncio.create_task(_cancel_when_gone(receive, sending))
            try:
                if self._request.stream:
                    await self._send_events(send)
                else:
                    await JSONResponse(await self._whole())(scope, receive, send)
            finally:
                watch.cancel()

    async def _send_events(self, send: Send) -> None:
        started = False
        async for event in self._events():
            # Not before there is something to say: until then an error can still have a status of its own.
            if not started:
                await send({"type": "http.response.start", "status": 200, "headers": _EVENT_STREAM})
                started = True
            await send({"type": "http.response.body", "body": b"data: " + event + b"\n\n", "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> AsyncIterator[bytes]:
        no_usage = {"usage": None} if self._request.includes_usage else {}
        async for piece in self._generation.pieces():
            if piece.is_first or piece.text or piece.logprobs or piece.finish_reason:
                yield _encode({**self._head, "choices": [self._form.chunk_choice(piece)], **no_usage})
        if self._request.includes_usage:
            yield _encode({**self._head, "choices": [], "usage": self._generation.usage})
        yield b"[DONE]"

    async def _whole(self) -> Json:
        choices: dict[int, Piece] = {}
        async for piece in self._generation.pieces():
            choices[piece.choice] = _joined(choices.get(piece.choice), piece)
        in_order = [self._form.choice(choices[i]) for i in sorted(choices)]
        return {**self._head, "choices": in_order, "usage": self._generation.usage}


async def _cancel_when_gone(receive: Receive, scope: anyio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


def _encode(event: Json) -> bytes:
    return json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode()


def _joined(before: Piece | None, piece: Piece) -> Piece:
    if before is None:
        return piece
    logprobs = None if before.logprobs is None else before.logprobs + (piece.logprobs or [])
    return piece._replace(text=before.text + piece.text, logprobs=logprobs)


def _text_choice(piece: Piece) -> Json:
    logprobs = None if piece.logprobs is None else _text_logprobs(piece.logprobs)
    return {"index": piece.choice, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish_reason}


def _text_logprobs(entries: Sequence[TokenLogprob]) -> Json:
    return {
        "tokens": [entry.token.text for entry in entries],
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": [{token.text: logprob for token, logprob in entry.top} for entry in entries],
        "text_offset": [entry.offset for entry in entries],
    }


def _message_choice(piece: Piece) -> Json:
    return _chat_choice(piece, "message", {"role": "assistant", "content": piece.text, "refusal": None})


def _delta_choice(piece: Piece) -> Json:
    role = {"role": "assistant"} if piece.is_first else {}
    return _chat_choice(piece, "delta", {**role, "content": piece.text})


def _chat_choice(piece: Piece, name: str, content: Json) -> Json:
    logprobs = None
    if piece.logprobs is not None:
        logprobs = {"content": [_chat_logprob(entry) for entry in piece.logprobs], "refusal": None}
    return {"index": piece.choice, name: content, "logprobs": logprobs, "finish_reason": piece.finish_reason}


def _chat_logprob(entry: TokenLogprob) -> Json:
    top = [_chat_token(token, logprob) for token, logprob in entry.top]
    return {**_chat_token(entry.token, entry.logprob), "top_logprobs": top}


def _chat_token(token: Token, logprob: float) -> Json:
    return {"token": token.text, "logprob": logprob, "bytes": list(token.bytes)}


COMPLETION = Form("cmpl", "text_completion", "text_completion", _text_choice, _text_choice)
CHAT = Form("chatcmpl", "chat.completion", "chat.completion.chunk", _message_choice, _delta_choice)
