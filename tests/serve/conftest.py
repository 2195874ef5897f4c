"""Servers for a module's tests or for one, and a gate that holds their engines up."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from serving import Serving, run_server

from transmla_ext.runtime import MLAModel


@pytest.fixture(scope="module")
def serving() -> Iterator[Serving]:
    """One server for all tests that leave it as it was; each has to leave every page free."""
    with run_server() as serving:
        yield serving
        serving.wait_until_idle()


@pytest.fixture
def serve(one_thread: None) -> Iterator[Callable[..., Serving]]:
    """serve(model, limits=of the engine, grace_period=, **options of create_app): a server for this test."""
    with ExitStack() as stack:
        yield lambda *args, **options: stack.enter_context(run_server(*args, **options))


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[MLAModel], threading.Event]]:
    """gate(model): no prompt is computed before the event is set."""
    events: list[threading.Event] = []

    def close(model: MLAModel) -> threading.Event:
        events.append(event := threading.Event())
        compute = model.prefill

        def prefill(*args: Any, **kwargs: Any) -> Any:
            assert event.wait(20)
            return compute(*args, **kwargs)

        monkeypatch.setattr(model, "prefill", prefill)
        return event

    yield close
    for event in events:
        event.set()
