"""transmla serve: a model, an engine, the application, uvicorn around it, and the way out."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from ipaddress import ip_address
from pathlib import Path

import torch
import uvicorn

from ..runtime import Engine, load
from .admission import Admission
from .app import check_positive, create_app

__all__ = ["Server", "serve"]

_CLOSE_SECONDS = 5  # for connections whose answers have been sent, or given up

logger = logging.getLogger("uvicorn.error")  # which uvicorn has set up


class Server(uvicorn.Server):
    """uvicorn, which on a signal lets no request in any more and gives those inside time to finish.

    Args:
        config: of an application that ``create_app`` made.
        grace_period: seconds; what then still runs is ended with an error that says so.
    """

    def __init__(self, config: uvicorn.Config, *, grace_period: float) -> None:
        super().__init__(config)
        self._grace_period = grace_period

    async def main_loop(self) -> None:
        await super().main_loop()
        # The sockets still listen: whoever comes now is told, by status 503, to go elsewhere.
        admission: Admission = self.config.app.state.admission  # type: ignore[union-attr]
        admission.closed = True
        deadline = time.monotonic() + self._grace_period
        while admission.running and not self.force_exit and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        admission.cancel_all()


def serve(
    path: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    model_name: str | None = None,
    api_key_file: str | Path | None = None,
    max_body_bytes: int = 4 << 20,
    max_tokens: int = 4096,
    max_queue: int = 256,
    max_batch_size: int = 32,
    timeout: float = 600.0,
    grace_period: float = 30.0,
    cache_tokens: int | None = None,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device = "cpu",
) -> None:
    """Answers OpenAI's requests with a converted model until SIGINT or SIGTERM.

    Args:
        path, dtype, device: as of ``load``; cache_tokens is its max_tokens.
        port: 0 takes a free one.
        model_name: by which requests ask for the model; None: its directory's.
        api_key_file: one key a line, any of which requests must have. A file, since ``ps`` shows arguments.
        max_body_bytes, max_tokens, timeout: as of ``create_app``.
        max_queue, max_batch_size: requests that may wait, and run.
        grace_period: seconds that running requests have to finish after the signal.
    Raises:
        ValueError: a bad argument, or a port that is not free; TransMLAError: a bad model. Nothing was served.
    """
    path = Path(path)
    api_keys = () if api_key_file is None else _read_keys(Path(api_key_file))
    check_positive(
        max_body_bytes=max_body_bytes,
        max_tokens=max_tokens,
        max_queue=max_queue,
        max_batch_size=max_batch_size,
        timeout=timeout,
        cache_tokens=1 if cache_tokens is None else cache_tokens,
    )
    if not 0 <= grace_period < float("inf"):
        raise ValueError(f"grace_period must be at least 0, got {grace_period}")
    listener = _bind(host, port)
    with listener:
        # In a thread that ends: GNU's OpenMP keeps a pool for each thread that has computed. With this one's beside the
        # engine's it would have more threads than cores, and let them sleep and wake at every op instead of spinning.
        with ThreadPoolExecutor(1) as loader:
            model = loader.submit(load, path, dtype=dtype, device=device, max_tokens=cache_tokens).result()
        engine = Engine(
            model,
            max_batch_size=max_batch_size,
            max_tokens_per_step=max(512, max_batch_size),
            max_queue_length=max_queue,
        )
        app = create_app(
            engine,
            model_name=model_name or path.resolve().name,
            api_keys=api_keys,
            max_body_bytes=max_body_bytes,
            max_tokens=max_tokens,
            timeout=timeout,
        )
        config = uvicorn.Config(app, timeout_graceful_shutdown=_CLOSE_SECONDS)
        server = Server(config, grace_period=grace_period)
        address = f"[{host}]" if ":" in host else host
        logger.info("%s at http://%s:%d/v1", path, address, listener.getsockname()[1])
        if not _is_loopback(host) and not api_keys:
            logger.warning("whoever reaches %s may use this server; an API key would prevent that", host)
        with suppress(KeyboardInterrupt):  # which uvicorn raises again when all is done
            server.run(sockets=[listener])


def _read_keys(path: Path) -> list[str]:
    try:
        keys = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"API keys cannot be read: {error}") from error
    if not keys:
        raise ValueError(f"{path} has no API key: one a line is expected")
    return keys


def _bind(host: str, port: int) -> socket.socket:
    """A socket that does not listen yet: a port that is taken is found before a model is loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with ExitStack() as on_error:
            listener = on_error.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            on_error.pop_all()
    except (OSError, OverflowError) as error:
        raise ValueError(f"cannot listen at {host}, port {port}: {error}") from error
    return listener


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
