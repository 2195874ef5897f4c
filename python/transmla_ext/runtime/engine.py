"""Continuous batching: requests come and go between steps, and a step is one token for each that runs."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from threading import Lock

import torch
from torch import Tensor
from typing_extensions import Required, Self, TypedDict, Unpack

from .cache import CachedSequence, CacheFullError
from .generate import Request, Sampling
from .model import MLAModel
from .prefix import extend_keys

__all__ = ["Engine", "EngineStats", "Output", "QueueFullError", "RequestOptions", "Stream"]


class QueueFullError(RuntimeError):
    """As many requests wait as may; nothing was added."""


class RequestOptions(TypedDict, total=False):
    """What a request can be told; ``Engine.add_request`` explains it."""

    max_new_tokens: Required[int]
    temperature: float
    top_k: int
    top_p: float
    seed: int | None
    stop: str | Sequence[str]
    eos: int | Collection[int] | None
    logprobs: int | None


@dataclass(frozen=True)
class Output:
    """What a step brought a request: a token, and the text that can no longer change."""

    request_id: int
    token: int | None  # None: it was aborted
    text: str  # "" without a tokenizer
    finish_reason: str | None  # "eos", "stop" (a stop string), "length" or "abort"; None: more is to come
    logprob: float | None  # of the token, natural, at temperature 1; None unless asked for
    top_logprobs: Mapping[int, float]  # by token, likeliest first


@dataclass
class EngineStats:
    """What an engine has done so far."""

    computed_tokens: int = 0  # that went through the model
    shared_tokens: int = 0  # that did not have to, since pages of the cache held them when their request began
    generated_tokens: int = 0
    preemptions: int = 0


@dataclass(eq=False, kw_only=True)
class _Entry(Request):
    """A request on its way through the engine."""

    id: int
    sampling: Sampling
    generator: torch.Generator
    num_logprobs: int | None
    block_size: int
    ids: list[int] = field(init=False)  # prompt and tokens
    keys: list[bytes] = field(default_factory=list)  # of the full pages of ids
    sequence: CachedSequence = field(default_factory=CachedSequence)  # empty while it waits

    def __post_init__(self) -> None:
        self.ids = list(self.prompt)
        extend_keys(self.keys, self.ids, self.block_size)

    @property
    def num_missing(self) -> int:
        """Tokens to compute before the next one can be drawn."""
        return len(self.ids) - self.sequence.length

    def push(self, token: int) -> None:
        super().push(token)
        self.ids.append(token)
        extend_keys(self.keys, self.ids, self.block_size)


@dataclass(frozen=True)
class _Work:
    """The next num tokens of a request, computed in this step."""

    entry: _Entry
    start: int
    num: int

    @property
    def tokens(self) -> list[int]:
        return self.entry.ids[self.start : self.start + self.num]

    @property
    def filled(self) -> range:
        """Pages that it fills."""
        return range(self.start // self.entry.block_size, (self.start + self.num) // self.entry.block_size)


class Engine:
    """Many requests at once through one model, each as if it were alone.

    Requests start in the order they came, as soon as the cache has room for their prompts. A step computes one token
    of each that runs and, with what is left of max_tokens_per_step, prompts piece by piece, so that nobody waits for
    a stranger's long prompt. Full pages, of prompts and of what was generated, are found by the tokens they hold and
    shared by all requests that begin with these; without an owner they stay until the room is needed. When pages run
    out, the youngest request gives up its own and is computed again later, from what the cache then still has.

    To the bit, what else is in the batch changes neither the token drawn from given logits, since each request has its
    own generator, nor attention of one new token, which runs batch-invariant. Matrix products may round another way for
    another number of rows, and so may a prompt that is cut elsewhere, shared, or computed again. The tokens are
    therefore those of ``MLAModel.generate`` with the same seed unless two candidates are closer together than this
    rounding: in fp32 that is rare, in bf16 it happens now and then.

    ``add_request``, ``abort`` and ``stream`` may be called while a step runs. With streams the engine steps by itself,
    in a thread of its own, while there is something to do; without them, call ``step``.

    Args:
        model: nobody else should use it, or its cache, meanwhile.
        max_batch_size: requests that run at once.
        max_tokens_per_step: at least max_batch_size; more makes prompts faster and steps slower.
        max_queue_length: requests that may wait.
    """

    def __init__(
        self,
        model: MLAModel,
        *,
        max_batch_size: int = 64,
        max_tokens_per_step: int = 512,
        max_queue_length: int = 1024,
    ) -> None:
        if max_batch_size < 1 or max_queue_length < 1:
            raise ValueError(
                f"max_batch_size and max_queue_length must be at least 1, got {max_batch_size} and {max_queue_length}"
            )
        if max_tokens_per_step < max_batch_size:
            raise ValueError(
                f"max_tokens_per_step must be at least max_batch_size={max_batch_size}, got {max_tokens_per_step}"
            )
        self.model = model
        self.max_batch_size = max_batch_size
        self.max_tokens_per_step = max_tokens_per_step
        self.max_queue_length = max_queue_length
        self.stats = EngineStats()
        self._cache = model.cache
        self._ids = count()
        self._entries: dict[int, _Entry] = {}
        self._waiting: deque[_Entry] = deque()  # oldest first, and all younger than those that run
        self._running: list[_Entry] = []  # oldest first
        self._aborted: deque[_Entry] = deque()
        self._lock = Lock()  # held by a step; requests and aborts that come meanwhile are for the next one
        self._streams: dict[int, asyncio.Queue[Output | BaseException]] = {}
        self._driver: asyncio.Task[None] | None = None
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="transmla-engine")

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_unfinished(self) -> int:
        """Running and waiting; while it is not 0, ``step`` has something to do."""
        return len(self._entries)

    def add_request(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        eos: int | Collection[int] | None = None,
        logprobs: int | None = None,
    ) -> int:
        """The id of a request, which waits for the next step.

        Args:
            prompt: text or token ids.
            max_new_tokens, temperature, top_k, top_p, seed, stop, eos: as of ``MLAModel.generate``.
            logprobs: log probabilities of each token and of so many of the likeliest; None gives none.
        Raises:
            ValueError: a bad argument, or a request that the cache could not hold if it had it to itself.
            QueueFullError: max_queue_length requests wait.
        """
        if len(self._waiting) >= self.max_queue_length:
            raise QueueFullError(f"{self.max_queue_length} requests wait already; try again later")
        if logprobs is not None and not 0 <= logprobs <= self.model.config.vocab_size:
            raise ValueError(f"logprobs must be in [0, {self.model.config.vocab_size}], got {logprobs}")
        if seed is not None and not -(2**63) <= seed < 2**64:
            raise ValueError(f"seed must fit into 64 bits, got {seed}")
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
        request = self.model.request(prompt, max_new_tokens=max_new_tokens, stop=stop, eos=eos)
        block_size, num_blocks = self._cache.block_size, self._cache.pool.num_blocks
        if (num_tokens := len(request.prompt) + request.limit - 1) > num_blocks * block_size:
            raise ValueError(
                f"a prompt of {len(request.prompt)} tokens and {request.limit} new ones take room for {num_tokens} of "
                f"the {num_blocks * block_size} in the cache; ask for less, or load the model with a larger max_tokens"
            )
        seed = int(torch.randint(2**31, ())) if seed is None else seed
        entry = _Entry(
            prompt=request.prompt,
            text=request.text,
            eos=request.eos,
            limit=request.limit,
            id=next(self._ids),
            sampling=sampling,
            generator=torch.Generator().manual_seed(seed),
            num_logprobs=logprobs,
            block_size=block_size,
        )
        self._entries[entry.id] = entry
        self._waiting.append(entry)
        return entry.id

    def abort(self, request_id: int) -> None:
        """Ends a request, at once or after the step that runs; nothing happens to one that has ended.

        ``step`` does not report it; a stream ends with an output of finish_reason "abort".
        """
        if (entry := self._entries.pop(request_id, None)) is None:
            return
        self._aborted.append(entry)
        if (queue := self._streams.pop(request_id, None)) is not None and self._driver is not None:
            aborted = Output(request_id, None, "", "abort", None, {})
            self._driver.get_loop().call_soon_threadsafe(queue.put_nowait, aborted)
        self._drop_aborted()

    def step(self) -> list[Output]:
        """One token for each running request that is through its prompt; [] if there is nothing to do.

        After an error every request waits, as it was before the step.

        Raises:
            CacheFullError: the only request that runs lacks pages, and they are not this engine's.
        """
        self._drop_aborted()
        try:
            with self._lock:
                return self._step()
        finally:
            self._drop_aborted()

    def stream(self, prompt: str | Sequence[int], **options: Unpack[RequestOptions]) -> Stream:
        """The outputs of a new request as they come: ``async for output in engine.stream(...)``.

        All streams of an engine belong to one event loop. An error in a step ends all of them with that error.

        Args:
            prompt, options, and what is raised, at once: as of ``add_request``.
        """
        loop = asyncio.get_running_loop()
        if self._driver is not None and self._driver.done():
            self._driver = None
        if self._driver is not None and self._driver.get_loop() is not loop:
            raise RuntimeError("the engine has streams in another event loop")
        request_id = self.add_request(prompt, **options)
        queue = self._streams[request_id] = asyncio.Queue()
        if self._driver is None:
            self._driver = loop.create_task(self._drive())
        return Stream(self, request_id, queue)

    async def _drive(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._entries:
                step = loop.run_in_executor(self._executor, self.step)
                for output in await asyncio.shield(step):
                    if (queue := self._streams.get(output.request_id)) is not None:
                        queue.put_nowait(output)
                        if output.finish_reason is not None:
                            del self._streams[output.request_id]
        except BaseException as error:
            for request_id in list(self._streams):
                self._streams.pop(request_id).put_nowait(error)
                self.abort(request_id)
            if not isinstance(error, Exception):
                await asyncio.wait([step])  # when the event loop is gone, no step runs any more
                raise

    def _drop_aborted(self) -> None:
        """Gives up what was aborted, unless a step runs, which does so at its end."""
        while self._aborted and self._lock.acquire(blocking=False):
            try:
                entry = self._aborted.popleft()
                queue = self._running if entry in self._running else self._waiting
                if entry in queue:
                    queue.remove(entry)
                self._release(entry)
            finally:
                self._lock.release()

    def _step(self) -> list[Output]:
        works = self._schedule()
        try:
            logits = self._compute(works)
        except BaseException:
            while self._running:
                self._set_back(self._running[-1])
            raise
        for work in works:
            for i in work.filled:
                self._cache.pool.publish(work.entry.sequence.blocks[i], work.entry.keys[i])
        self.stats.computed_tokens += sum(work.num for work in works)
        return self._draw(logits)

    def _schedule(self) -> list[_Work]:
        """What this step computes, its pages reserved."""
        works: list[_Work] = []
        room = self.max_tokens_per_step
        # Only the youngest can be in the middle of its prompt: the others leave it at least one token.
        for entry in self._running:  # preemption shortens it from the end
            if self._make_room(entry):
                works.append(_Work(entry, entry.sequence.length, min(entry.num_missing, room)))
                room -= works[-1].num
        while room and (admitted := self._admit(works)) is not None:
            works.append(_Work(admitted, admitted.sequence.length, min(admitted.num_missing, room)))
            room -= works[-1].num
        return works

    def _make_room(self, entry: _Entry) -> bool:
        """Reserves pages for what a running request lacks, at the cost of younger ones; False: it was the youngest."""
        cache = self._cache
        while (missing := cache.num_missing(entry.sequence, entry.num_missing)) > cache.pool.num_free:
            if len(self._running) == 1:
                break
            youngest = self._running[-1]
            self._set_back(youngest)
            self.stats.preemptions += 1
            if youngest is entry:
                return False
        if missing:
            cache.reserve([entry.sequence], [entry.num_missing])
        return True

    def _admit(self, works: Sequence[_Work]) -> _Entry | None:
        """The oldest waiting request, running now, with pages for all that it lacks; None if it has to wait."""
        if not self._waiting or len(self._running) == self.max_batch_size:
            return None
        entry, pool = self._waiting[0], self._cache.pool
        blocks = pool.find(entry.keys)
        # The last token is computed whatever is cached: somebody has to make its logits.
        length = min(len(blocks) * self._cache.block_size, len(entry.ids) - 1)
        entry.sequence = CachedSequence(length, blocks)
        # What somebody computes in this step can be shared in the next.
        next_key = entry.keys[len(blocks) : len(blocks) + 1]
        pending = any(work.entry.keys[i] in next_key for work in works for i in work.filled)
        # A page is left for each that runs: with less, the newcomer would soon have to go again.
        num_pages = self._cache.num_missing(entry.sequence, entry.num_missing) + len(self._running)
        if self._running and (pending or num_pages > pool.num_free):
            self._release(entry)
            return None
        try:
            self._cache.reserve([entry.sequence], [entry.num_missing])
        except CacheFullError:
            self._release(entry)
            raise
        self._running.append(self._waiting.popleft())
        self.stats.shared_tokens += length
        return entry

    def _set_back(self, entry: _Entry) -> None:
        self._running.remove(entry)
        self._release(entry)
        self._waiting.appendleft(entry)

    def _release(self, entry: _Entry) -> None:
        self._cache.free([entry.sequence])
        entry.sequence = CachedSequence()

    def _compute(self, works: Sequence[_Work]) -> list[tuple[_Entry, Tensor]]:
        """Logits [vocab_size] of each request that lacks nothing more, but for those aborted meanwhile."""
        singles = [work for work in works if work.num == 1]
        chunks = [work for work in works if work.num > 1]
        logits: list[Tensor] = []
        if singles:
            sequences, tokens = [work.entry.sequence for work in singles], [work.tokens[0] for work in singles]
            logits += self.model.decode(sequences, tokens, batch_invariant=True)
        if chunks:
            sequences, prompts = [work.entry.sequence for work in chunks], [work.tokens for work in chunks]
            logits += self.model.prefill(prompts, sequences=sequences, chunk_size=self.max_tokens_per_step)[0]
        pairs = zip(singles + chunks, logits, strict=True)
        return [
            (work.entry, row) for work, row in pairs if not work.entry.num_missing and work.entry.id in self._entries
        ]

    def _draw(self, logits: Sequence[tuple[_Entry, Tensor]]) -> list[Output]:
        groups: dict[Sampling, list[int]] = {}
        for i, (entry, _) in enumerate(logits):
            groups.setdefault(entry.sampling, []).append(i)
        tokens: dict[int, int] = {}
        for sampling, members in groups.items():
            rows = torch.stack([logits[i][1] for i in members])
            drawn = sampling(rows, [logits[i][0].generator for i in members])
            tokens.update(zip(members, drawn, strict=True))
        self.stats.generated_tokens += len(tokens)
        return [self._push(entry, tokens[i], row) for i, (entry, row) in enumerate(logits)]

    def _push(self, entry: _Entry, token: int, logits: Tensor) -> Output:
        entry.push(token)
        logprob, top = None, {}
        if entry.num_logprobs is not None:
            logprobs = logits.float().log_softmax(-1)
            logprob, likeliest = float(logprobs[token]), logprobs.topk(entry.num_logprobs)
            top = dict(zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True))
        finished = entry.finish_reason is not None
        if finished:
            self._entries.pop(entry.id, None)
            self._running.remove(entry)
            self._release(entry)
        text = "" if entry.text is None else entry.text.take(final=finished)
        return Output(entry.id, token, text, entry.finish_reason, logprob, top)


class Stream:
    """The outputs of a request, one for each token; closing or dropping it before the last aborts the request."""

    def __init__(self, engine: Engine, request_id: int, outputs: asyncio.Queue[Output | BaseException]) -> None:
        self.request_id = request_id
        self._engine = engine
        self._outputs = outputs
        self._ended = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Output:
        if self._ended:
            raise StopAsyncIteration
        try:
            output = await self._outputs.get()
            if isinstance(output, BaseException):
                raise output
        except BaseException:
            self.close()
            raise
        self._ended = output.finish_reason is not None
        return output

    def close(self) -> None:
        """Aborts the request, unless it has ended; for ``with contextlib.closing(engine.stream(...)) as outputs``."""
        self._ended = True
        self._engine._streams.pop(self.request_id, None)
        self._engine.abort(self.request_id)

    def __del__(self) -> None:
        self.close()
