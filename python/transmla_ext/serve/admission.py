"""Which requests are let in, how long they may take, and what is answered when they fail."""

from __future__ import annotations

import hmac
import json
import logging
from collections.abc import Collection

import anyio
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .metrics import Metrics
from .protocol import APIError, EngineFailedError

__all__ = ["Admission", "AdmissionMiddleware"]

_LAST_WORDS_SECONDS = 1.0  # for telling a client that does not read why its stream ends

logger = logging.getLogger(__name__)


class Admission:
    """The requests that run, and whether more may come.

    Args:
        api_keys: one of which a request must have; none: everybody is let in.
        max_body_bytes: of a request.
        timeout: seconds from a request's head to the last byte of its answer.
    """

    def __init__(self, *, api_keys: Collection[str], max_body_bytes: int, timeout: float, metrics: Metrics) -> None:
        self.max_body_bytes = max_body_bytes
        self.timeout = timeout
        self.metrics = metrics
        self.closed = False
        self.running: set[anyio.CancelScope] = set()
        self._api_keys = [key.encode() for key in api_keys]

    def check(self, scope: Scope) -> None:
        """Raises APIError for a request that is not let in."""
        if self.closed:
            message = "the server is shutting down"
            raise APIError(503, message, code="shutting_down", headers={"Connection": "close", "Retry-After": "1"})
        headers = dict(scope["headers"])
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        # All are compared, each in constant time.
        if self._api_keys and not (
            sum([hmac.compare_digest(key, given.strip()) for key in self._api_keys]) and scheme.lower() == b"bearer"
        ):
            message = "missing or wrong API key; send it as `Authorization: Bearer KEY`"
            raise APIError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        if int(headers.get(b"content-length", b"0")) > self.max_body_bytes:
            raise self.too_large

    @property
    def too_large(self) -> APIError:
        return APIError(413, f"the body is larger than {self.max_body_bytes} bytes", code="body_too_large")

    def cancel_all(self) -> None:
        """Ends what runs, each with an error that says why."""
        for request in list(self.running):
            request.cancel()


class AdmissionMiddleware:
    """ASGI middleware around /v1: lets requests in, bounds size and time, answers where the app cannot any more."""

    def __init__(self, app: ASGIApp, admission: Admission) -> None:
        self._app = app
        self._admission = admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/v1/"):
            await _Exchange(self._admission, scope, receive, send).run(self._app)
        else:
            await self._app(scope, receive, send)


class _Exchange:
    """A request and its response."""

    def __init__(self, admission: Admission, scope: Scope, receive: Receive, send: Send) -> None:
        self._admission, self._scope, self._receive, self._send = admission, scope, receive, send
        self._num_bytes = 0  # received
        self._status: int | None = None  # sent
        self._is_stream = False
        self._complete = False

    async def run(self, app: ASGIApp) -> None:
        error = await self._enter(app)
        if error is not None:
            with anyio.move_on_after(_LAST_WORDS_SECONDS):
                await self._explain(error)
        self._admission.metrics.requests.labels(self._outcome(error)).inc()

    async def _enter(self, app: ASGIApp) -> APIError | None:
        try:
            self._admission.check(self._scope)
            with anyio.move_on_after(self._admission.timeout) as request:
                self._admission.running.add(request)
                try:
                    await app(self._scope, self.receive, self.send)
                finally:
                    self._admission.running.discard(request)
        except APIError as error:
            return error
        except EngineFailedError:
            return APIError(500, "the engine failed; the server's log says how", code="engine_failed")
        except Exception:
            logger.exception("a request failed")
            return APIError(500, "internal error; the server's log says which", code="internal_error")
        if not request.cancelled_caught:
            return None
        if self._admission.closed:
            return APIError(503, "the server is shutting down", code="shutting_down", headers={"Connection": "close"})
        return APIError(504, f"not finished within {self._admission.timeout:g} s", code="timeout")

    async def receive(self) -> Message:
        message = await self._receive()
        self._num_bytes += len(message.get("body", b""))
        if self._num_bytes > self._admission.max_body_bytes:
            raise self._admission.too_large
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            self._is_stream = dict(message["headers"]).get(b"content-type", b"").startswith(b"text/event-stream")
        await self._send(message)
        self._complete = message["type"] == "http.response.body" and not message.get("more_body", False)

    async def _explain(self, error: APIError) -> None:
        if self._status is None:
            response = JSONResponse(error.body, error.status_code, error.headers)
            await response(self._scope, self._receive, self.send)
        elif self._is_stream:
            event = f"data: {json.dumps(error.body)}\n\n".encode()
            await self.send({"type": "http.response.body", "body": event, "more_body": False})

    def _outcome(self, error: APIError | None) -> str:
        if error is None and not self._complete:
            return "disconnected"
        status = (self._status or 200) if error is None else error.status_code
        return "completed" if status < 400 else "refused" if status < 500 else "timeout" if status == 504 else "failed"
