"""The routes: /v1/completions, /v1/chat/completions, /v1/models, /health, /metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import Any

import anyio
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from jinja2 import TemplateError
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from ..errors import CheckpointError
from ..runtime import Engine
from .admission import Admission, AdmissionMiddleware
from .answer import CHAT, COMPLETION, Answer
from .generation import Backend, Generation
from .metrics import Metrics
from .protocol import APIError, ChatRequest, CompletionRequest, GenerationRequest

__all__ = ["check_positive", "create_app"]

_LONG_TEXT = 8192  # characters; what takes longer than some milliseconds to tokenise does not keep the others waiting

Prompts = list[list[int]]


def check_positive(**limits: float) -> None:
    """Raises ValueError for the first limit that is not, or infinite."""
    for name, value in limits.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"{name} must be positive, got {value}")


def create_app(
    engine: Engine,
    *,
    model_name: str,
    api_keys: Collection[str] = (),
    max_body_bytes: int = 4 << 20,
    max_tokens: int = 4096,
    timeout: float = 600.0,
) -> FastAPI:
    """An ASGI application that answers OpenAI's requests with an engine, which is its own from then on.

    Args:
        model_name: by which requests ask for the model.
        api_keys: one of which a request to /v1 must have; none: everybody is answered.
        max_body_bytes: of a request.
        max_tokens: that an answer may have.
        timeout: seconds from a request to the end of its answer.
    Raises:
        ValueError: a bad limit; CheckpointError: a model without a tokenizer.
    """
    check_positive(max_body_bytes=max_body_bytes, max_tokens=max_tokens, timeout=timeout)
    if engine.model.tokenizer is None:
        raise CheckpointError("the checkpoint has no tokenizer, and clients send text: add its tokenizer.json")
    metrics = Metrics(engine)
    backend = Backend(engine, max_tokens=max_tokens, metrics=metrics)
    admission = Admission(api_keys=api_keys, max_body_bytes=max_body_bytes, timeout=timeout, metrics=metrics)
    app = FastAPI(title="transmla serve")
    app.state.admission = admission
    app.add_middleware(AdmissionMiddleware, admission=admission)
    app.add_exception_handler(HTTPException, _answer_error)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    model = {
        "id": model_name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "transmla_ext",
        "max_model_len": engine.model.max_position_embeddings,
    }

    def check_model(name: str) -> None:
        if name != model_name:
            message = f"there is no model '{name}' here, only '{model_name}'"
            raise APIError(404, message, param="model", code="model_not_found")

    def start(request: GenerationRequest, prompts: Prompts, param: str) -> Generation:
        positions = engine.model.max_position_embeddings
        if (longest := max(map(len, prompts))) > positions:
            message = f"the prompt has {longest} tokens, and the model's context is {positions}"
            raise APIError(400, message, param=param, code="context_length_exceeded")
        return backend.start(request, prompts)

    @app.post("/v1/completions", response_model=None)
    async def completions(request: CompletionRequest) -> Answer:
        check_model(request.model)

        def tokenize() -> Prompts:
            prompts = request.prompts
            return [engine.model.tokenizer(p).input_ids if isinstance(p, str) else p for p in prompts]

        num_chars = sum(len(prompt) for prompt in request.prompts if isinstance(prompt, str))
        prompts = await _call(tokenize, num_chars)
        return Answer(COMPLETION, request, start(request, prompts, "prompt"))

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(request: ChatRequest) -> Answer:
        check_model(request.model)
        messages = [message.template_fields() for message in request.messages]

        def tokenize() -> Prompts:
            return [engine.model.chat_prompt(messages)]

        num_chars = sum(len(message["content"]) for message in messages)
        try:
            prompts = await _call(tokenize, num_chars)
        except (ValueError, TemplateError) as error:
            raise APIError(400, f"chat template: {error}", param="messages") from error
        return Answer(CHAT, request, start(request, prompts, "messages"))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        check_model(name)
        return model

    @app.get("/health")
    async def health() -> JSONResponse:
        if admission.closed:
            return JSONResponse({"status": "shutting down"}, 503)
        if backend.failure is not None:
            return JSONResponse({"status": "the engine's last step failed"}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


async def _call(tokenize: Callable[[], Prompts], num_chars: int) -> Prompts:
    return await anyio.to_thread.run_sync(tokenize) if num_chars > _LONG_TEXT else tokenize()


async def _answer_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if not isinstance(error, APIError):
        error = APIError(error.status_code, error.detail, headers=dict(error.headers or {}))
    return JSONResponse(error.body, error.status_code, error.headers)


async def _answer_invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    # Of the alternatives that a field has, the one that fits best fails deepest.
    problem = max(error.errors(), key=lambda problem: len(problem["loc"]))
    # The alternatives' names are no parameters: "str", "list[int]".
    path = [str(part) for part in problem["loc"][1:] if part != "str" and "[" not in str(part)]
    where = ".".join(path) or None
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "json_invalid":
        where, message = None, f"the body is no JSON: {problem['ctx']['error']} at character {problem['loc'][-1]}"
    elif problem["type"] == "extra_forbidden":
        message = f"{where} is not supported here, or not with this value"
    elif where is not None:
        message = f"{where}: {message}"
    return await _answer_error(request, APIError(400, message, param=where))
