"""What clients do wrong, or too much of, is answered with a status that says so and harms nobody else."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from runtime.tiny import VOCAB_SIZE
from serving import Serving, tiny_model, wait_until

from transmla_ext import Engine
from transmla_ext.errors import CheckpointError
from transmla_ext.serve import create_app, serve

COMPLETION = {"model": "tiny", "prompt": "abc", "max_tokens": 4, "temperature": 0}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 4}
Start = Callable[..., Serving]
Gate = Callable[..., threading.Event]


def post(serving: Serving, body: Any, path: str = "completions", **options: Any) -> httpx.Response:
    return serving.http.post(f"/v1/{path}", **{"json": body, **options})


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    [(name, error)] = response.json().items()
    assert name == "error"
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"max_tokens": 4097}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"prompt": ["a"] * 1025}, "n"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "0.5"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": [""]}, "stop.0"),
        ({"stop": "x" * 257}, "stop"),
        ({"logprobs": 6}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"stream": 1}, "stream"),
        ({"stream_options": {"include_usage": True}}, None),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, None),
        ({"prompt": [[]]}, "prompt.0"),
        ({"prompt": ["a", 3]}, "prompt.1"),
        ({"prompt": [VOCAB_SIZE]}, None),
        ({"prompt": [-1]}, None),
        ({"prompt": "\ud800"}, "prompt"),
        ({"prompt": "a" * 129}, "prompt"),
        ({"model": None}, "model"),
        ({"best_of": 2}, "best_of"),
        ({"echo": True}, "echo"),
        ({"logit_bias": {"1": 5}}, "logit_bias"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"suffix": "end"}, "suffix"),
        ({"temprature": 0.5}, "temprature"),
    ],
)
def test_bad_parameters_of_completions(serving: Serving, fields: dict[str, Any], param: str | None) -> None:
    # httpx would not send half a surrogate pair, nor json refuse it.
    content = json.dumps({**COMPLETION, **fields})
    response = post(serving, None, content=content, headers={"Content-Type": "application/json"}, json=None)
    assert error_of(response, 400)["param"] == param
    assert serving.engine.num_unfinished == 0


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [{"id": "1"}]}]}, "messages.0.tool_calls"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type"),
        ({"messages": [{"role": "user", "content": "a" * 200}]}, "messages"),
        ({"messages": [{"role": "user", "content": "a" * 20_000}]}, "messages"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"top_logprobs": 2}, None),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ],
)
def test_bad_parameters_of_chats(serving: Serving, fields: dict[str, Any], param: str | None) -> None:
    assert error_of(post(serving, {**CHAT, **fields}, "chat/completions"), 400)["param"] == param


def test_values_that_ask_for_nothing_are_fine(serving: Serving) -> None:
    neutral = {"best_of": 1, "echo": False, "logit_bias": {}, "frequency_penalty": 0.0, "suffix": None, "user": "me"}
    assert post(serving, COMPLETION | neutral).json()["choices"] == post(serving, COMPLETION).json()["choices"]
    neutral = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "store": False, "seed": None}
    assert post(serving, CHAT | neutral, "chat/completions").status_code == 200


@pytest.mark.parametrize(
    "content", [b'{"model": "tiny",', b"", b"[1]", b"null", b"\xff", b"[" * 100_000, b'{"n": ' + b"9" * 5000 + b"}"]
)
def test_what_is_no_request_at_all(serving: Serving, content: bytes) -> None:
    error_of(post(serving, None, content=content, headers={"Content-Type": "application/json"}, json=None), 400)


def test_the_context_is_named_to_programs(serving: Serving) -> None:
    with pytest.raises(openai.BadRequestError, match=r"129 tokens.*128") as caught:
        serving.client.completions.create(**COMPLETION | {"prompt": "a" * 129})
    assert caught.value.code == "context_length_exceeded"


def test_unknown_models_and_paths(serving: Serving) -> None:
    with pytest.raises(openai.NotFoundError, match="only 'tiny'") as caught:
        serving.client.completions.create(**COMPLETION | {"model": "gpt-4"})
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        serving.client.models.retrieve("org/other")
    error_of(post(serving, {}, "embeddings"), 404)
    error_of(serving.http.get("/v1/completions"), 405)


def test_a_model_without_a_chat_template(serve: Start) -> None:
    serving = serve()
    serving.engine.model.tokenizer.chat_template = None
    assert "no chat template" in error_of(post(serving, CHAT, "chat/completions"), 400)["message"]
    serving.engine.model.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    assert "roles must alternate" in error_of(post(serving, CHAT, "chat/completions"), 400)["message"]


def test_large_bodies(serve: Start) -> None:
    serving = serve(max_body_bytes=1000)
    body = json.dumps({**COMPLETION, "user": "x" * 1000}).encode()
    headers = {"Content-Type": "application/json"}
    for content in (body, iter([body[:600], body[600:]])):  # the length in a header, and not
        assert error_of(post(serving, None, content=content, headers=headers, json=None), 413)["code"]
    assert post(serving, COMPLETION).status_code == 200


def test_api_keys(serve: Start) -> None:
    serving = serve(api_keys=["first", "sécond"])
    for key in ("first", "sécond".encode()):
        header = b"Bearer " + (key.encode() if isinstance(key, str) else key)
        assert post(serving, COMPLETION, headers={"Authorization": header}).status_code == 200
    for header in (None, "Bearer third", "Bearer", "first", "Basic first", "Bearer firstsecond"):
        response = post(serving, COMPLETION, headers={"Authorization": header} if header else {})
        assert error_of(response, 401)["code"] == "invalid_api_key"
    with pytest.raises(openai.AuthenticationError):
        serving.client.with_options(api_key="wrong").models.list()
    assert serving.http.get("/health").status_code == 200


def test_ten_times_more_requests_than_the_queue_holds(serve: Start, gate: Gate) -> None:
    serving = serve(limits={"max_batch_size": 2, "max_queue_length": 3})
    expected = post(serving, COMPLETION).json()["choices"]
    go_on = gate(serving.engine.model)
    with ThreadPoolExecutor(50) as pool:
        answers = [pool.submit(post, serving, {**COMPLETION, "prompt": "abc"}) for _ in range(2)]
        wait_until(lambda: serving.engine.num_running > 0)
        answers += [pool.submit(post, serving, COMPLETION) for _ in range(48)]
        wait_until(lambda: sum(answer.done() for answer in answers) >= 45)
        go_on.set()
        responses = [answer.result() for answer in answers]
    served = [response for response in responses if response.status_code == 200]
    assert 4 <= len(served) <= 5  # the second may run, or wait
    assert all(response.json()["choices"] == expected for response in served)
    for response in responses:
        if response.status_code != 200:
            assert error_of(response, 429)["code"] == "queue_full"
            assert int(response.headers["Retry-After"]) >= 1
    serving.wait_until_idle()
    assert post(serving, COMPLETION).json()["choices"] == expected


def test_choices_start_together_or_not_at_all(serve: Start, gate: Gate) -> None:
    serving = serve(limits={"max_batch_size": 1, "max_queue_length": 3})
    error_of(post(serving, {**COMPLETION, "n": 4}), 400)
    go_on = gate(serving.engine.model)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(post, serving, COMPLETION)
        wait_until(lambda: serving.engine.num_running == 1)
        waiting = pool.submit(post, serving, {**COMPLETION, "n": 2})
        wait_until(lambda: serving.engine.num_waiting == 2)
        error_of(post(serving, {**COMPLETION, "n": 2}), 429)
        assert serving.engine.num_unfinished == 3
        go_on.set()
        assert [len(answer.result().json()["choices"]) for answer in (first, waiting)] == [1, 2]
    serving.wait_until_idle()


def test_time_runs_out_before_the_first_token(serve: Start, gate: Gate) -> None:
    serving = serve(timeout=0.3)
    go_on = gate(serving.engine.model)
    for stream in (False, True):
        assert error_of(post(serving, {**COMPLETION, "stream": stream}), 504)["code"] == "timeout"
    go_on.set()
    serving.wait_until_idle()
    assert 'outcome="timeout"} 2.0' in serving.http.get("/metrics").text


def hold_decode(serving: Serving, monkeypatch: pytest.MonkeyPatch, after: int) -> threading.Event:
    """Every decode step after the first so many waits for the event."""
    event, decode, calls = threading.Event(), serving.engine.model.decode, []

    def held(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        assert len(calls) <= after or event.wait(20)
        return decode(*args, **kwargs)

    monkeypatch.setattr(serving.engine.model, "decode", held)
    return event


def test_time_runs_out_in_a_stream(serve: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    serving = serve(timeout=1)
    go_on = hold_decode(serving, monkeypatch, after=3)
    with serving.client.completions.create(**COMPLETION | {"max_tokens": 50}, stream=True) as stream:
        next(stream)
        with pytest.raises(openai.APIError, match="not finished within 1 s"):
            list(stream)
    go_on.set()
    serving.wait_until_idle()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_vanishes_takes_its_request_with_it(
    serve: Start, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    serving = serve()
    stays = {**COMPLETION, "prompt": "xyz", "max_tokens": 30}
    expected = post(serving, stays).json()["choices"][0]["text"]
    go_on = hold_decode(serving, monkeypatch, after=3)
    body = json.dumps({**COMPLETION, "max_tokens": 100, "stream": stream}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(post, serving, stays)
        with closing(socket.create_connection(("127.0.0.1", serving.port))) as connection:
            connection.sendall(head.encode() + b"\r\n\r\n" + body)
            wait_until(lambda: serving.engine.num_unfinished == 2)
            if stream:
                assert connection.recv(100).startswith(b"HTTP/1.1 200")
        wait_until(lambda: serving.engine.num_unfinished == 1)
        go_on.set()
        assert answer.result().json()["choices"][0]["text"] == expected
    serving.wait_until_idle()
    assert 'outcome="disconnected"} 1.0' in serving.http.get("/metrics").text


def test_a_client_that_does_not_read_holds_nobody_up() -> None:
    """Its buffers full from the beginning on, which no socket can promise."""
    engine = Engine(tiny_model())
    app = create_app(engine, model_name="tiny", timeout=2)
    body = json.dumps({**COMPLETION, "max_tokens": 60, "stream": True}).encode()
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "http_version": "1.1"}
    scope |= {"headers": [(b"content-type", b"application/json")], "server": ("x", 1), "scheme": "http"}

    async def call(reads: bool) -> list[bytes]:
        received, requests = [], [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            if requests:
                return requests.pop()
            return await asyncio.Event().wait()

        async def send(message: Any) -> None:
            if not reads:
                await asyncio.Event().wait()
            received.append(message.get("body", b""))

        await app(dict(scope), receive, send)
        return received

    async def both() -> None:
        stuck = asyncio.create_task(call(reads=False))
        assert (await call(reads=True))[-2] == b"data: [DONE]\n\n"
        while engine.num_unfinished:
            await asyncio.sleep(0.01)
        assert not stuck.done()
        assert engine.model.cache.pool.num_free == engine.model.cache.pool.num_blocks
        assert await stuck == []

    asyncio.run(both())


@pytest.mark.parametrize("name", ["prefill", "decode"])
def test_a_failing_engine_is_reported_and_goes_on(serve: Start, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    serving = serve()
    expected = post(serving, COMPLETION).json()["choices"]

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(serving.engine.model, name, fail)
        error_of(post(serving, COMPLETION), 500)
        assert serving.http.get("/health").status_code == 503
        if name == "decode":
            with pytest.raises(openai.APIError, match="engine failed"):
                list(serving.client.completions.create(**COMPLETION, stream=True))
        error_of(post(serving, {**COMPLETION, "n": 3}), 500)
    serving.wait_until_idle()
    assert post(serving, COMPLETION).json()["choices"] == expected
    assert serving.http.get("/health").json() == {"status": "ok"}


def test_metrics_count_what_happened(serve: Start) -> None:
    serving = serve()
    for _ in range(3):
        post(serving, COMPLETION)
    post(serving, {**COMPLETION, "n": 0})
    lines = serving.http.get("/metrics").text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert {name: float(values[f"transmla_{name}"]) for name in (
        'requests_total{outcome="completed"}',
        'requests_total{outcome="refused"}',
        "prompt_tokens_total",
        "generated_tokens_total",
        "time_to_first_token_seconds_count",
        "time_per_output_token_seconds_count",
        "requests_running",
        "requests_waiting",
        "preemptions_total",
    )} == {
        'requests_total{outcome="completed"}': 3,
        'requests_total{outcome="refused"}': 1,
        "prompt_tokens_total": 9,
        "generated_tokens_total": 12,
        "time_to_first_token_seconds_count": 3,
        "time_per_output_token_seconds_count": 9,
        "requests_running": 0,
        "requests_waiting": 0,
        "preemptions_total": 0,
    }  # fmt: skip
    assert float(values["transmla_cache_blocks_free"]) == float(values["transmla_cache_blocks"]) == 1024


def test_shutting_down_lets_running_answers_finish(serve: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    serving = serve(grace_period=20)
    expected = post(serving, {**COMPLETION, "max_tokens": 30}).json()["choices"][0]["text"]
    go_on = hold_decode(serving, monkeypatch, after=3)
    with serving.client.completions.create(**COMPLETION | {"max_tokens": 30}, stream=True) as stream:
        text = next(stream).choices[0].text
        serving.server.should_exit = True
        wait_until(lambda: serving.http.get("/health").status_code == 503)
        response = post(serving, COMPLETION)
        assert error_of(response, 503)["code"] == "shutting_down"
        assert response.headers["Connection"] == "close"
        go_on.set()
        text += "".join(chunk.choices[0].text for chunk in stream)
    assert text == expected


def test_shutting_down_ends_what_does_not_finish(serve: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    serving = serve(grace_period=0.2)
    go_on = hold_decode(serving, monkeypatch, after=3)
    with serving.client.completions.create(**COMPLETION | {"max_tokens": 30}, stream=True) as stream:
        next(stream)
        serving.server.should_exit = True
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
    go_on.set()
    serving.wait_until_idle()


def test_bad_options_are_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        serve(tmp_path, api_key_file=tmp_path / "absent")
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ValueError, match="has no API key"):
        serve(tmp_path, api_key_file=tmp_path / "empty")
    with pytest.raises(ValueError, match="grace_period"):
        serve(tmp_path, grace_period=-1)
    for limit in ("max_batch_size", "max_queue", "cache_tokens"):
        with pytest.raises(ValueError, match=limit):
            serve(tmp_path, **{limit: 0})
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"cannot listen at 127.0.0.1, port {port}"):
            serve(tmp_path, port=port)
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        serve(tmp_path, port=0)
    for limit in ("max_body_bytes", "max_tokens", "timeout"):
        with pytest.raises(ValueError, match=limit):
            create_app(Engine(tiny_model()), model_name="tiny", **{limit: 0})
    with pytest.raises(CheckpointError, match="no tokenizer"):
        create_app(Engine(tiny_model(tokenizer=None)), model_name="tiny")
