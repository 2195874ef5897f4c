"""A server around a tiny random model, on a port of its own, in a thread of its own."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import httpx
import openai
import torch
import uvicorn
from runtime.tiny import CONFIGS, tokenizer
from transformers import AutoModelForCausalLM

from transmla_ext import Engine
from transmla_ext.runtime import MLAModel
from transmla_ext.serve import Server, create_app

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


def tiny_model(**options: Any) -> MLAModel:
    """Bytes for tokens, 128 positions; the same weights each time."""
    torch.manual_seed(0)
    words = tokenizer()
    words.chat_template = TEMPLATE
    options = {"tokenizer": words, "block_size": 4, "max_tokens": 4096, **options}
    return MLAModel(AutoModelForCausalLM.from_config(CONFIGS["native"]), **options)


@dataclass
class Serving:
    engine: Engine
    server: Server
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @cached_property
    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=20)

    @cached_property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def wait_until_idle(self) -> None:
        """Until nothing runs or waits, and then every page has to be free."""
        wait_until(lambda: self.engine.num_unfinished == 0)
        pool = self.engine.model.cache.pool
        wait_until(lambda: pool.num_free == pool.num_blocks)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@contextmanager
def run_server(
    model: MLAModel | None = None, *, limits: dict[str, int] | None = None, grace_period: float = 0.0, **options: Any
) -> Iterator[Serving]:
    engine = Engine(model or tiny_model(), **(limits or {}))
    config = uvicorn.Config(create_app(engine, model_name="tiny", **options), log_level="warning")
    server = Server(config, grace_period=grace_period)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            wait_until(lambda: server.started)
            yield Serving(engine, server, listener.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()
