import asyncio
import random
import threading
import time
from collections import Counter
from contextlib import closing, suppress
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from tiny import CONFIGS, EOS, VOCAB_SIZE, tokenizer
from transformers import AutoModelForCausalLM

from transmla_ext import Engine, ops
from transmla_ext.runtime import CacheFullError, MLAModel, PagedLatentCache, QueueFullError

BLOCK_SIZE = 4
PREFIX = random.Random(1).choices(range(EOS), k=40)
SAMPLED = {"temperature": 0.8, "top_k": 50, "top_p": 0.95}


@cache
def tiny_model(name="native", number=0):
    torch.manual_seed(0)
    return MLAModel(AutoModelForCausalLM.from_config(CONFIGS[name]), tokenizer=tokenizer(), block_size=BLOCK_SIZE)


def make_engine(max_tokens=400, *, model=None, **limits):
    """An engine with a cache that has seen nothing yet."""
    model = model or tiny_model()
    model.cache = PagedLatentCache(
        [layer.size(2) for layer in model.cache.layers],
        dtype=torch.float32,
        device=model.device,
        block_size=BLOCK_SIZE,
        max_tokens=max_tokens,
    )
    return Engine(model, **limits)


@cache
def _alone(prompt, options):
    return tiny_model(number=1).generate([prompt], **dict(options))[0]


def alone(prompt, **options):
    """What a request gives with a model to itself."""
    return _alone(prompt if isinstance(prompt, str) else tuple(prompt), tuple(options.items()))


def run(engine):
    """Tokens of each request, by id, after as many steps as it takes."""
    tokens = {}
    while engine.num_unfinished:
        for output in engine.step():
            tokens.setdefault(output.request_id, []).append(output.token)
    return tokens


def check_pages(engine):
    """Every page is free or owned, as often as there are requests that have it; None of a request that waits."""
    pool = engine.model.cache.pool
    owners = Counter(block for entry in engine._running for block in entry.sequence.blocks)
    assert all(pool.num_owners(block) == owners[block] for block in range(pool.num_blocks))
    assert pool.num_free + len(owners) == pool.num_blocks
    assert not [entry for entry in engine._waiting if entry.sequence.blocks]


def assert_all_free(engine):
    check_pages(engine)
    assert engine.model.cache.pool.num_free == engine.model.cache.pool.num_blocks
    assert (engine.num_running, engine.num_waiting, engine.num_unfinished) == (0, 0, 0)


def random_requests(num, seed=0):
    """Prompts that share beginnings with one another, and options."""
    rng = random.Random(seed)
    for i in range(num):
        prompt = PREFIX[: rng.randrange(41)] + rng.choices(range(EOS), k=rng.randrange(1, 20))
        sampling = SAMPLED if i % 2 else {}
        yield prompt, {"max_new_tokens": rng.randrange(1, 40), "seed": i, "eos": (), **sampling}


def test_64_random_requests_are_each_alone():
    engine = make_engine(max_tokens=160, max_batch_size=8, max_tokens_per_step=24)
    rng = random.Random(0)
    arrivals = list(random_requests(64))
    requests, tokens, aborted = {}, {}, set()
    while arrivals or engine.num_unfinished:
        for _ in range(min(rng.randrange(4), len(arrivals))):
            prompt, options = arrivals.pop()
            requests[engine.add_request(prompt, **options)] = (prompt, options)
        if requests and rng.random() < 0.05:
            unfinished = [entry.id for entry in (*engine._running, *engine._waiting)]
            aborted.update(rng.sample(unfinished, k=min(1, len(unfinished))))
            for request_id in aborted:
                engine.abort(request_id)
        for output in engine.step():
            assert output.request_id not in aborted
            tokens.setdefault(output.request_id, []).append(output.token)
        check_pages(engine)
    assert_all_free(engine)
    assert engine.stats.preemptions > 5
    assert engine.stats.shared_tokens > 500
    assert len(aborted) > 5
    for request_id, (prompt, options) in requests.items():
        expected, actual = alone(prompt, **options).tokens, tokens.get(request_id, [])
        assert actual == (expected[: len(actual)] if request_id in aborted else expected)


def test_text_stop_strings_and_eos_are_those_of_generate():
    free = alone("naïve café: ", max_new_tokens=40, eos=())
    stop = free.text[len(free.text) // 2 :][:3]
    requests = [
        {"max_new_tokens": 40, "eos": ()},
        {"max_new_tokens": 40, "eos": (), "stop": ("never to be seen", stop)},
        {"max_new_tokens": 40, "eos": free.tokens[7]},
        {"max_new_tokens": 40, "temperature": 1.0, "seed": 3},
        {"max_new_tokens": 500, "eos": ()},  # more than there are positions
    ]
    engine = make_engine()
    ids = [engine.add_request("naïve café: ", **options) for options in requests]
    texts, reasons = dict.fromkeys(ids, ""), {}
    while engine.num_unfinished:
        for output in engine.step():
            texts[output.request_id] += output.text
            reasons[output.request_id] = output.finish_reason
    for request_id, options in zip(ids, requests, strict=True):
        expected = alone("naïve café: ", **options)
        assert (texts[request_id], reasons[request_id]) == (expected.text, expected.finish_reason)
    assert [reasons[i] for i in ids[:3]] == ["length", "stop", "eos"]


@pytest.mark.parametrize("name", ["native-q-lora", "native-no-nope", "stock-q-lora", "stock-yarn"])
def test_every_kind_of_model_runs(name):
    engine = make_engine(model=tiny_model(name), max_batch_size=4, max_tokens_per_step=12)
    requests = list(random_requests(6))
    ids = [engine.add_request(prompt, **options) for prompt, options in requests]
    tokens = run(engine)
    for request_id, (prompt, options) in zip(ids, requests, strict=True):
        assert tokens[request_id] == engine.model.generate([prompt], **options)[0].tokens


def test_a_shared_prefix_is_computed_once():
    engine = make_engine()
    for i in range(5):
        engine.add_request([*PREFIX[:16], i, i, i], max_new_tokens=1)
    run(engine)
    assert (engine.stats.computed_tokens, engine.stats.shared_tokens) == (16 + 5 * 3, 4 * 16)


def test_a_prefix_is_computed_once_by_requests_that_come_while_it_is():
    engine = make_engine(max_tokens_per_step=64)
    engine.max_tokens_per_step = 6
    for i in range(3):
        engine.add_request([*PREFIX[:32], i], max_new_tokens=2, eos=())
        engine.step()
    run(engine)
    assert engine.stats.computed_tokens == 32 + 3 + 3


def test_what_was_generated_is_shared_too():
    engine = make_engine()
    [tokens] = [engine.add_request(PREFIX[:5], max_new_tokens=8, eos=())] and run(engine).values()
    engine.add_request([*PREFIX[:5], *tokens, 7], max_new_tokens=1)
    before = engine.stats.computed_tokens
    run(engine)
    assert engine.stats.computed_tokens - before == 14 - 12


def test_a_prefix_is_found_after_its_request_and_until_the_room_is_needed():
    engine = make_engine(max_tokens=48)

    def computed(prompt):
        before = engine.stats.computed_tokens
        engine.add_request(prompt, max_new_tokens=1)
        run(engine)
        return engine.stats.computed_tokens - before

    assert computed(PREFIX[:18]) == 18
    assert computed([3] * 10) == 10
    assert computed(PREFIX[:18]) == 2
    assert computed([4] * 32) == 32  # takes the place of what was not used for longest
    assert computed(PREFIX[:18]) == 2
    assert computed([3] * 10) == 10


def test_a_page_that_others_have_is_copied_before_it_is_written():
    engine = make_engine()
    first = engine.add_request(PREFIX[:8], max_new_tokens=20, eos=())
    engine.step()
    [a] = engine._running
    shared = [layer[a.sequence.blocks].clone() for layer in engine.model.cache.layers]
    second = engine.add_request(PREFIX[:8], max_new_tokens=20, eos=(), temperature=1.0, seed=1)
    tokens = {i: [] for i in (first, second)}
    tokens[first] += [output.token for output in engine.step() if output.request_id == first]
    b = engine._running[1]
    assert a.sequence.blocks[0] == b.sequence.blocks[0]
    assert a.sequence.blocks[1] != b.sequence.blocks[1]
    for layer, before in zip(engine.model.cache.layers, shared, strict=True):
        assert torch.equal(layer[a.sequence.blocks[:2]], before[:2])
    assert engine.stats.computed_tokens == 8 + 1 + 1  # all but the last token was there
    tokens = run(engine)
    assert [*a.tokens] == alone(PREFIX[:8], max_new_tokens=20, eos=()).tokens
    assert [*b.tokens] == alone(PREFIX[:8], max_new_tokens=20, eos=(), temperature=1.0, seed=1).tokens
    assert len(tokens[first]) == 18
    assert_all_free(engine)


def test_preemption_takes_from_the_youngest_and_changes_nothing():
    engine = make_engine(max_tokens=64, max_tokens_per_step=64)
    requests = [([i] * 10, {"max_new_tokens": 40, "eos": (), "seed": i, **SAMPLED}) for i in range(3)]
    ids = [engine.add_request(prompt, **options) for prompt, options in requests]
    progress, tokens, ended = Counter(), {i: [] for i in ids}, []
    while engine.num_unfinished:
        oldest = min(entry.id for entry in (*engine._running, *engine._waiting))
        for output in engine.step():
            progress[output.request_id] += 1
            tokens[output.request_id].append(output.token)
            ended += [output.request_id] if output.finish_reason else []
        assert engine._running == [] or engine._running[0].id >= oldest
    assert ended == ids
    assert engine.stats.preemptions >= 2
    assert engine.stats.generated_tokens == 120
    for request_id, (prompt, options) in zip(ids, requests, strict=True):
        assert tokens[request_id] == alone(prompt, **options).tokens


def test_a_preempted_request_finds_what_is_left_of_its_pages():
    engine = make_engine(max_tokens=64, max_tokens_per_step=64)
    for i in range(2):
        engine.add_request([i] * 16, max_new_tokens=24, eos=())
    run(engine)
    assert engine.stats.preemptions == 1
    assert engine.stats.shared_tokens > 0


def test_a_newcomer_waits_rather_than_be_sent_back_at_once():
    engine = make_engine(max_tokens=40)
    engine.add_request([1] * 16, max_new_tokens=6, eos=())
    engine.add_request([2] * 24, max_new_tokens=6, eos=())  # would fit now, and not after the first one's next page
    run(engine)
    assert engine.stats.preemptions == 0


def test_running_requests_do_not_wait_for_a_long_prompt(monkeypatch):
    engine = make_engine(max_batch_size=4, max_tokens_per_step=10)
    computed = []
    for name in ("prefill", "decode"):
        compute = getattr(engine.model, name)

        def counted(tokens, *args, compute=compute, name=name, **kwargs):
            computed.append(sum(map(len, tokens)) if name == "prefill" else len(tokens))
            return compute(tokens, *args, **kwargs)

        monkeypatch.setattr(engine.model, name, counted)
    short = [engine.add_request([i], max_new_tokens=40, eos=()) for i in range(3)]
    engine.step()
    long = engine.add_request(list(range(100)), max_new_tokens=2, eos=())
    for step in range(1, 16):
        computed.clear()
        outputs = {output.request_id for output in engine.step()}
        assert outputs >= {*short}
        assert sum(computed) <= 10
        assert (long in outputs) == (step == 15)  # 7 tokens a step


def test_a_request_that_fits_does_not_wait_for_memory_that_is_only_remembered():
    engine = make_engine(max_tokens=40)
    engine.add_request(PREFIX[:30], max_new_tokens=8, eos=())
    run(engine)
    engine.add_request([1] * 30, max_new_tokens=8, eos=())
    engine.step()
    assert engine.num_running == 1


def test_what_can_never_fit_is_refused_at_once():
    engine = make_engine(max_tokens=40)
    with pytest.raises(
        ValueError, match=r"30 tokens and 12 new ones take room for 41 of the 40 in the cache.*max_tokens"
    ):
        engine.add_request([1] * 30, max_new_tokens=12)
    engine.add_request([1] * 30, max_new_tokens=11, eos=())
    assert [len(tokens) for tokens in run(engine).values()] == [11]
    assert_all_free(engine)


def test_a_full_queue_refuses():
    engine = make_engine(max_batch_size=2, max_queue_length=3)
    for _ in range(3):
        engine.add_request([1], max_new_tokens=4, eos=())
    with pytest.raises(QueueFullError, match="3 requests wait"):
        engine.add_request([1], max_new_tokens=4)
    engine.step()
    assert (engine.num_running, engine.num_waiting) == (2, 1)
    engine.add_request([1], max_new_tokens=4, eos=())
    assert [len(tokens) for tokens in run(engine).values()] == [3, 3, 4, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 2.0}, "top_p"),
        ({"stop": ""}, "a stop string is empty"),
        ({"seed": 2**64}, "seed must fit"),
        ({"logprobs": -1}, "logprobs must be in"),
        ({"logprobs": VOCAB_SIZE + 1}, "logprobs must be in"),
    ],
)
def test_bad_requests_are_refused_and_leave_nothing(options, message):
    engine = make_engine()
    with pytest.raises(ValueError, match=message):
        engine.add_request([1], **{"max_new_tokens": 4, **options})
    for prompt in ([], [VOCAB_SIZE], [1] * 129):
        with pytest.raises(ValueError, match=r"prompt is empty|token ids|positions"):
            engine.add_request(prompt, max_new_tokens=4)
    assert engine.num_unfinished == 0
    assert engine.step() == []


def test_bad_limits_are_refused():
    for limits in ({"max_batch_size": 0}, {"max_queue_length": 0}, {"max_batch_size": 9, "max_tokens_per_step": 8}):
        with pytest.raises(ValueError, match="must be at least"):
            make_engine(**limits)


def test_abort_frees_at_once_whatever_the_request_does():
    engine = make_engine(max_batch_size=3, max_tokens_per_step=8)
    running, in_its_prompt, waiting = (
        engine.add_request([i] * num, max_new_tokens=9) for i, num in enumerate((2, 50, 9))
    )
    engine.step()
    for request_id in (waiting, in_its_prompt, running, running, 12345):
        engine.abort(request_id)
        check_pages(engine)
    assert_all_free(engine)
    assert engine.step() == []


def test_attention_runs_batch_invariant(monkeypatch):
    flags = []

    def decode(*args, mla_decode=ops.mla_decode, **kwargs):
        flags.append(kwargs["batch_invariant"])
        return mla_decode(*args, **kwargs)

    monkeypatch.setattr(ops, "mla_decode", decode)
    engine = make_engine()
    engine.add_request([1, 2], max_new_tokens=3, eos=())
    run(engine)
    assert flags == [True] * 2 * 3  # two decode steps of three layers


def test_logprobs_are_of_the_model_at_temperature_1():
    engine = make_engine()
    engine.add_request(PREFIX, max_new_tokens=4, eos=(), logprobs=3, temperature=0.5, seed=1)
    outputs = [output for _ in range(4) for output in engine.step()]
    ids = list(PREFIX)
    for output in outputs:
        logits, handles = engine.model.prefill([ids])
        engine.model.free(handles)
        expected = logits[0].log_softmax(-1)
        assert output.logprob == pytest.approx(float(expected[output.token]), abs=1e-4)
        likeliest = expected.topk(3)
        assert list(output.top_logprobs) == likeliest.indices.tolist()
        assert list(output.top_logprobs.values()) == pytest.approx(likeliest.values.tolist(), abs=1e-4)
        ids.append(output.token)
    engine.add_request(PREFIX, max_new_tokens=1, logprobs=0)
    [output] = engine.step()
    assert (output.logprob is None, output.top_logprobs) == (False, {})


@pytest.mark.parametrize("name", ["prefill", "decode"])
def test_a_step_that_fails_leaves_every_request_as_it_was(monkeypatch, name):
    engine = make_engine(max_tokens_per_step=64)
    requests = list(random_requests(4))
    for prompt, options in requests[:3]:
        engine.add_request(prompt, **options)
    first = engine.step() + engine.step()
    engine.add_request(requests[3][0], **requests[3][1])

    def fail(*_, **__):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine.model, name, fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            engine.step()
    check_pages(engine)
    assert (engine.num_running, engine.num_unfinished) == (0, engine.num_waiting)
    tokens = {i: [output.token for output in first if output.request_id == i] for i in range(4)}
    for i, rest in run(engine).items():
        tokens[i] += rest
    assert list(tokens.values()) == [alone(prompt, **options).tokens for prompt, options in requests]
    assert_all_free(engine)


def test_pages_that_others_hold_are_an_error_and_no_endless_loop():
    engine = make_engine(max_tokens=40)
    _, handles = engine.model.prefill([[1] * 20])
    request_id = engine.add_request([2] * 30, max_new_tokens=4, eos=())
    with pytest.raises(CacheFullError, match="free sequences"):
        engine.step()
    engine.abort(request_id)
    engine.add_request([2] * 18, max_new_tokens=10, eos=())
    with pytest.raises(CacheFullError, match="free sequences"):
        run(engine)
    engine.model.free(handles)
    run(engine)
    assert_all_free(engine)


@pytest.fixture
def gate(monkeypatch):
    """Called: an engine whose next prompts are computed when the event is set."""

    def gated(**limits):
        engine, event = make_engine(**limits), threading.Event()

        def prefill(*args, prefill=engine.model.prefill, **kwargs):
            assert event.wait(10)
            return prefill(*args, **kwargs)

        monkeypatch.setattr(engine.model, "prefill", prefill)
        return engine, event

    return gated


def test_abort_does_not_wait_for_the_step_that_runs(gate):
    engine, go_on = gate()
    keep, drop = (engine.add_request([i] * 5, max_new_tokens=2, eos=()) for i in range(2))
    outputs = []
    thread = threading.Thread(target=lambda: outputs.extend(engine.step()))
    thread.start()
    while engine.num_running < 2:
        time.sleep(0.001)
    engine.abort(drop)
    late = engine.add_request([7], max_new_tokens=2, eos=())
    go_on.set()
    thread.join()
    assert [output.request_id for output in outputs] == [keep]
    check_pages(engine)
    assert set(run(engine)) == {keep, late}
    assert_all_free(engine)


async def collect(stream):
    return [output async for output in stream]


def test_many_streams_at_once_are_each_alone():
    engine = make_engine(max_tokens=160, max_batch_size=8, max_tokens_per_step=24)
    requests = list(random_requests(24, seed=5))

    async def main():
        return await asyncio.gather(*(collect(engine.stream(prompt, **options)) for prompt, options in requests))

    for _ in range(2):  # an event loop each
        for (prompt, options), outputs in zip(requests, asyncio.run(main()), strict=True):
            expected = alone(prompt, **options)
            assert [output.token for output in outputs] == expected.tokens
            assert "".join(output.text for output in outputs) == expected.text
            assert [output.finish_reason for output in outputs if output.finish_reason] == ["length"]
        assert_all_free(engine)


def test_the_event_loop_goes_on_while_a_step_runs(gate):
    engine, go_on = gate()

    async def main():
        collecting = asyncio.create_task(collect(engine.stream([1, 2], max_new_tokens=2, eos=())))
        while not engine.num_running:
            await asyncio.sleep(0.001)
        go_on.set()
        return await collecting

    assert len(asyncio.run(main())) == 2


@pytest.mark.parametrize("end", ["close", "drop", "cancel", "abort"])
def test_a_stream_that_ends_early_ends_its_request(end):
    engine = make_engine()

    async def main():
        other = asyncio.create_task(collect(engine.stream(PREFIX[:9], max_new_tokens=60, eos=())))
        stream = engine.stream(PREFIX[:6], max_new_tokens=100, eos=())
        assert (await anext(stream)).finish_reason is None
        if end == "close":
            with closing(stream):
                await anext(stream)
            assert await collect(stream) == []
        elif end == "drop":
            del stream
        elif end == "cancel":
            task = asyncio.create_task(collect(stream))
            await asyncio.sleep(0.02)
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        else:
            engine.abort(stream.request_id)
            *_, last = await collect(stream)
            assert (last.token, last.text, last.finish_reason) == (None, "", "abort")
        assert engine.num_unfinished == 1
        assert [output.token for output in await other] == alone(PREFIX[:9], max_new_tokens=60, eos=()).tokens

    asyncio.run(main())
    assert_all_free(engine)
    assert engine.stats.generated_tokens < 160


def test_a_stream_that_nobody_reads_is_no_leak(gate):
    engine, go_on = gate()

    async def main():
        engine.stream([1, 2], max_new_tokens=100, eos=())
        unread = engine.stream([3, 4], max_new_tokens=100, eos=())
        assert engine.num_unfinished == 1
        while not engine.num_running:
            await asyncio.sleep(0.001)
        unread.close()
        threading.Timer(0.05, go_on.set).start()

    asyncio.run(main())  # ends while a step runs, and waits for that
    assert go_on.is_set()
    assert_all_free(engine)
    assert engine._streams == {}


def test_an_error_in_a_step_ends_every_stream_and_not_the_engine(monkeypatch):
    engine = make_engine()

    async def main():
        def fail(*_, **__):
            raise RuntimeError("out of memory")

        with monkeypatch.context() as patch:
            patch.setattr(engine.model, "decode", fail)
            streams = [collect(engine.stream([i] * 3, max_new_tokens=5)) for i in range(3)]
            errors = await asyncio.gather(*streams, return_exceptions=True)
        assert [str(error) for error in errors] == ["out of memory"] * 3
        assert_all_free(engine)
        return await collect(engine.stream([1, 2], max_new_tokens=5, eos=()))

    assert len(asyncio.run(main())) == 5


def test_streams_refuse_at_once(gate):
    engine, go_on = gate(max_queue_length=2)

    async def main():
        with pytest.raises(ValueError, match="prompt is empty"):
            engine.stream([], max_new_tokens=1)
        streams = [engine.stream([1, 2], max_new_tokens=1) for _ in range(2)]
        with pytest.raises(QueueFullError):
            engine.stream([1], max_new_tokens=1)
        while not engine.num_running:
            await asyncio.sleep(0.001)
        with pytest.raises(RuntimeError, match="another event loop"):
            await asyncio.to_thread(asyncio.run, elsewhere())
        go_on.set()
        for stream in streams:
            assert len(await collect(stream)) == 1

    async def elsewhere():
        engine.stream([1], max_new_tokens=1)

    asyncio.run(main())
    assert_all_free(engine)


class EngineMachine(RuleBasedStateMachine):
    """Requests come, run and go in any order, through a cache that holds hardly two of them."""

    def __init__(self):
        super().__init__()
        self.engine = make_engine(max_tokens=64, max_batch_size=4, max_tokens_per_step=9, max_queue_length=6)
        self.requests, self.tokens = {}, {}

    def unfinished(self):
        return sorted(entry.id for entry in (*self.engine._running, *self.engine._waiting))

    @precondition(lambda self: self.engine.num_waiting < 6)
    @rule(shared=st.integers(0, 32), own=st.integers(0, 3), new=st.integers(1, 24), greedy=st.booleans())
    def add(self, shared, own, new, greedy):
        prompt = tuple(PREFIX[:shared] + [own] * own) or (9,)
        options = {"max_new_tokens": new, "eos": (), "seed": own, **({} if greedy else SAMPLED)}
        request_id = self.engine.add_request(prompt, **options)
        self.requests[request_id], self.tokens[request_id] = (prompt, options), []

    @precondition(unfinished)
    @rule(data=st.data())
    def abort(self, data):
        request_id = data.draw(st.sampled_from(self.unfinished()))
        self.engine.abort(request_id)
        del self.requests[request_id]

    @precondition(unfinished)
    @rule(times=st.integers(1, 8))
    def step(self, times):
        for _ in range(times):
            if not (unfinished := self.unfinished()):
                return
            computed = {entry.id: entry.sequence.length for entry in self.engine._running}
            for output in self.engine.step():
                self.tokens[output.request_id].append(output.token)
            check_pages(self.engine)
            # The oldest gets on with every step, so that everyone's turn comes.
            [oldest] = [e for e in self.engine._running if e.id == unfinished[0]] or [None]
            assert (oldest is None) == (unfinished[0] not in self.unfinished())
            assert oldest is None or oldest.sequence.length > computed.get(oldest.id, 0)

    @invariant()
    def pages_are_free_or_owned(self):
        check_pages(self.engine)

    @invariant()
    def limits_hold(self):
        assert self.engine.num_running <= 4
        assert self.engine.num_unfinished == self.engine.num_running + self.engine.num_waiting

    def teardown(self):
        while self.engine.num_unfinished:
            self.step(1)
        assert_all_free(self.engine)
        for request_id, (prompt, options) in self.requests.items():
            assert self.tokens[request_id] == alone(prompt, **options).tokens


def test_any_order_of_requests_steps_and_aborts():
    run_state_machine_as_test(
        EngineMachine, settings=settings(max_examples=25, stateful_step_count=30, deadline=None, derandomize=True)
    )


def test_the_embedding_example_is_generate(monkeypatch, capsys):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
    embed = import_module("embed")
    torch.manual_seed(0)
    embed.main()
    assert capsys.readouterr().out.count("->") == 3

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["native"]).eval()
    server = embed.Server(model, max_tokens=256, max_batch_size=2)
    requests = [embed.Request(prompt, options["max_new_tokens"]) for prompt, options in random_requests(5)]
    assert len(list(server.serve(requests))) == 5
    for request in requests:
        assert request.tokens == alone(request.prompt, max_new_tokens=request.max_new_tokens, eos=()).tokens
    assert server.cache.num_free_tokens == 256
