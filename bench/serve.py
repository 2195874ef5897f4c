"""`transmla serve` under load: many streaming clients, and the Engine used directly, in tokens per second.

Every stream has to give the text, and the number of tokens, that the Engine gives for the same request. The Engine has
half of the time before the server and half of it after, since a machine's clock moves.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from http.client import HTTPException, HTTPResponse
from itertools import count, cycle
from pathlib import Path
from pydoc_data.topics import topics
from tempfile import NamedTemporaryFile
from typing import Any
from urllib.request import urlopen

__all__ = ["Answer", "Load", "main", "requests", "run_clients", "run_engine", "server"]

_TEXT = "\n\n".join(topics[name] for name in sorted(topics))  # the manual that every Python ships
_WARM_UP = 0.1  # of the time, before the clock is started and memory is looked at

Work = Iterator[tuple[int, str, dict[str, Any]]]


@dataclass(frozen=True)
class Answer:
    text: str
    num_tokens: int


@dataclass
class Load:
    """What clients saw."""

    num_streams: int = 0  # that ended while the clock ran, or were finished after it
    tokens_per_second: float = 0.0
    errors: list[str] = field(default_factory=list)
    wrong: list[int] = field(default_factory=list)  # requests whose answer is not the Engine's
    megabytes: tuple[float, float] = (0.0, 0.0)  # of the server's memory, at the beginning and at the end


def requests(num_chars: int, max_tokens: int, numbers: Iterable[int]) -> Work:
    """Number, prompt, and options that both the Engine and the API know."""
    for i in numbers:
        start = i * 997 % (len(_TEXT) - num_chars)
        limit = max_tokens // 2 + i * 7 % (max_tokens // 2)
        options = {"temperature": 0.8 if i % 2 else 0.0, "top_p": 0.95, "seed": i, "max_tokens": limit}
        yield i, _TEXT[start : start + num_chars], options


def run_engine(engine: Any, work: Work, *, num_clients: int, seconds: float) -> tuple[dict[int, Answer], float]:
    """Answers to so much of work as num_clients at a time get to in so many seconds, by its numbers, and tokens/s."""
    answers: dict[int, Answer] = {}
    texts: dict[int, list[str]] = {}
    numbers: dict[int, int] = {}  # of requests, by the Engine's

    def step(*, until: float) -> None:
        while time.perf_counter() < until:
            while len(numbers) < num_clients:
                i, prompt, options = next(work)
                limit = options.pop("max_tokens")
                numbers[request_id := engine.add_request(prompt, max_new_tokens=limit, **options)] = i
                texts[request_id] = []
            take(engine.step())

    def take(outputs: list[Any]) -> None:
        for output in outputs:
            texts[output.request_id].append(output.text)
            if output.finish_reason is not None:
                pieces = texts.pop(output.request_id)
                answers[numbers.pop(output.request_id)] = Answer("".join(pieces), len(pieces))

    end = time.perf_counter() + seconds
    step(until=end - (1 - _WARM_UP) * seconds)
    start, tokens = time.perf_counter(), engine.stats.generated_tokens
    step(until=end)
    speed = (engine.stats.generated_tokens - tokens) / (time.perf_counter() - start)
    while numbers:
        take(engine.step())
    return answers, speed


@contextmanager
def server(model: Path, *options: str) -> Iterator[tuple[int, int]]:
    """A `transmla serve` of its own: its port and process id."""
    command = [sys.executable, "-m", "transmla_ext", "serve", str(model), "--port", "0", *options]
    with NamedTemporaryFile() as log, subprocess.Popen(command, stderr=log, stdout=log) as process:
        try:
            while "startup complete" not in (text := Path(log.name).read_text()):
                if process.poll() is not None:
                    raise SystemExit(text)
                time.sleep(0.1)
            yield int(re.findall(r"http://[^ ]+:(\d+)/v1", text)[0]), process.pid
        finally:
            process.terminate()


def run_clients(
    port: int,
    pid: int,
    model: str,
    work: Work,
    expected: dict[int, Answer],
    *,
    num_clients: int,
    seconds: float,
) -> Load:
    """num_clients streams at any time for so many seconds; those that run then are read to their ends."""
    load = Load()
    raw: list[tuple[int, bytes]] = []

    async def client(end: float) -> None:
        while time.perf_counter() < end:
            i, prompt, options = next(work)
            body = {"model": model, "prompt": prompt, **options, "stream": True}
            body["stream_options"] = {"include_usage": True}
            raw.append((i, await _post(port, json.dumps(body).encode())))

    async def watch() -> None:
        await asyncio.sleep(_WARM_UP * seconds)
        memory, begin, tokens = _megabytes(pid), time.perf_counter(), _generated_tokens(port)
        await asyncio.sleep((1 - _WARM_UP) * seconds)
        load.tokens_per_second = (_generated_tokens(port) - tokens) / (time.perf_counter() - begin)
        load.megabytes = memory, _megabytes(pid)

    async def everything() -> None:
        end = time.perf_counter() + seconds
        await asyncio.gather(watch(), *(client(end) for _ in range(num_clients)))

    asyncio.run(everything())
    # Not before: two cores have enough to do.
    load.num_streams = len(raw)
    for i, response in raw:
        answer = _parse(response)
        if isinstance(answer, str):
            load.errors.append(answer)
        elif answer != expected[i]:
            load.wrong.append(i)
    return load


async def _post(port: int, body: bytes) -> bytes:
    """All that the server answers, as it came."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
    answer = await reader.read()
    writer.close()
    return answer


class _Received:
    """What HTTPResponse reads from."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, _: str) -> io.BytesIO:
        return io.BytesIO(self._data)


def _parse(data: bytes) -> Answer | str:
    """The streamed answer, or what came instead."""
    response = HTTPResponse(_Received(data))  # type: ignore[arg-type]
    try:
        response.begin()
        body = response.read().decode()
    except (HTTPException, OSError) as error:  # cut off
        return repr(error)
    events = body.split("\n\n")
    if response.status != 200 or events[-2:] != ["data: [DONE]", ""]:
        return f"status {response.status}: {body[-500:]}"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    return Answer("".join(c["choices"][0]["text"] for c in chunks[:-1]), chunks[-1]["usage"]["completion_tokens"])


def _generated_tokens(port: int) -> float:
    with urlopen(f"http://127.0.0.1:{port}/metrics") as response:
        metrics = response.read().decode()
    return float(re.search(r"^transmla_generated_tokens_total (\S+)", metrics, flags=re.MULTILINE)[1])


def _megabytes(pid: int) -> float:
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    from transmla_ext import Engine, load

    limits = {"cache-tokens": args.cache_tokens, "max-batch-size": args.clients, "dtype": args.dtype}
    engine = Engine(load(args.model, dtype=args.dtype, max_tokens=args.cache_tokens), max_batch_size=args.clients)
    phase = {"num_clients": args.clients, "seconds": args.seconds}
    work = partial(requests, args.prompt_chars, args.max_tokens)

    expected, before = run_engine(engine, work(count()), **phase | {"seconds": args.seconds / 2})
    with server(args.model, *(word for name, value in limits.items() for word in (f"--{name}", str(value)))) as where:
        load_ = run_clients(*where, args.model.resolve().name, work(cycle(expected)), expected, **phase)
    _, after = run_engine(engine, work(cycle(expected)), **phase | {"seconds": args.seconds / 2})
    result = {**asdict(load_), "engine": [before, after], "ratio": 2 * load_.tokens_per_second / (before + after)}
    print(*_lines(args.clients, result), sep="\n")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if load_.errors or load_.wrong else 0


def _lines(num_clients: int, result: dict[str, Any]) -> Iterator[str]:
    yield (
        f"{num_clients} clients, {result['num_streams']} streams: {len(result['errors'])} errors, "
        f"{len(result['wrong'])} answers that are not the Engine's"
    )
    yield from result["errors"][:3]
    first, last = result["megabytes"]
    yield f"memory of the server: {first:.0f} MB at the beginning, {last:.0f} MB at the end"
    before, after = result["engine"]
    yield (
        f"server {result['tokens_per_second']:.1f} tokens/s, Engine {before:.1f} before and {after:.1f} after: "
        f"{result['ratio']:.3f} ×"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="directory that `transmla convert` made")
    parser.add_argument("--clients", type=int, default=32, metavar="N", help="[default: 32]")
    parser.add_argument("--seconds", type=float, default=60, metavar="S", help="[default: 60]")
    parser.add_argument("--max-tokens", type=int, default=128, metavar="N", help="of an answer [default: 128]")
    parser.add_argument("--prompt-chars", type=int, default=200, metavar="N", help="[default: 200]")
    parser.add_argument("--cache-tokens", type=int, default=8192, metavar="N", help="[default: 8192]")
    parser.add_argument("--dtype", default="float32", help="[default: float32, where ties are rare]")
    parser.add_argument("--json", type=Path, help="where the figures go, too")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
