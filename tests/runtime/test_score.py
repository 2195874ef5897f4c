"""MLAModel.score: how likely continuations are, with what they share computed once."""

import pytest
import torch
from tiny import VOCAB_SIZE
from transformers import AutoModelForCausalLM

from transmla_ext import load
from transmla_ext.runtime import CacheFullError

# Contexts that end in the middle of a page of 4 and at its end; continuations of one token and of several.
LENGTHS = {1: (1,), 7: (3, 1, 5), 8: (1, 1), 9: (2, 2, 9), 30: (4,)}


def random_tokens(*lengths):
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


def questions():
    contexts = random_tokens(*LENGTHS)
    rest = iter(random_tokens(*(length for lengths in LENGTHS.values() for length in lengths)))
    return contexts, [[next(rest) for _ in lengths] for lengths in LENGTHS.values()]


@pytest.mark.parametrize("chunk_size", [5, 4096])
@pytest.mark.parametrize("name", ["native", "stock"])
def test_scores_are_those_of_transformers(checkpoints, name, chunk_size):
    reference = AutoModelForCausalLM.from_pretrained(checkpoints[name]).eval()
    model = load(checkpoints[name], block_size=4, max_tokens=256)
    contexts, continuations = questions()
    scores = model.score(contexts, continuations, chunk_size=chunk_size)
    assert [len(its) for its in scores] == [len(its) for its in continuations]
    for context, its, its_scores in zip(contexts, continuations, scores, strict=True):
        for tokens, score in zip(its, its_scores, strict=True):
            with torch.no_grad():
                logprobs = reference(torch.tensor([context + tokens])).logits[0, len(context) - 1 : -1].log_softmax(-1)
            expected = logprobs.gather(1, torch.tensor(tokens)[:, None])[:, 0]
            torch.testing.assert_close(score.logprobs, expected, atol=1e-4, rtol=0)
            assert torch.equal(score.likeliest, logprobs.argmax(-1))
    assert model.cache.num_free_tokens == 256


def test_a_context_is_computed_once(model, monkeypatch):
    num_tokens = 0
    forward = type(model)._forward

    def counting(self, prompts, *args, **kwargs):
        nonlocal num_tokens
        num_tokens += sum(map(len, prompts))
        return forward(self, prompts, *args, **kwargs)

    monkeypatch.setattr(type(model), "_forward", counting)
    contexts, continuations = questions()
    model.score(contexts, continuations)
    assert num_tokens == sum(map(len, contexts)) + sum(len(tokens) - 1 for its in continuations for tokens in its)


def test_a_fork_goes_its_own_way(model):
    [prompt] = random_tokens(11)
    _, [sequence] = model.prefill([prompt])
    for length in (6, 8):
        fork = model.cache.fork(sequence, length)
        logits, _ = model.prefill([[1, 2, 3]], sequences=[fork])
        alone, [other] = model.prefill([[*prompt[:length], 1, 2, 3]])
        torch.testing.assert_close(logits, alone, atol=1e-4, rtol=0)
        model.free([fork, other])
    expected, [alone] = model.prefill([[*prompt, 7]])
    torch.testing.assert_close(model.decode([sequence], [7]), expected, atol=1e-4, rtol=0)
    model.free([sequence, alone])
    assert model.cache.num_free_tokens == 256


@pytest.mark.parametrize(
    ("contexts", "continuations", "message"),
    [
        ([[]], [[[1, 2]]], "every context needs a token"),
        ([[1]], [[]], "and a continuation"),
        ([[1]], [[[2], []]], "every continuation a token"),
        ([[1] * 100], [[[2] * 30]], "129 tokens in a sequence"),
        ([[1]], [[[2, VOCAB_SIZE], [3]]], "token ids must be in"),
        ([[1]], [[[2, 3, 4], [VOCAB_SIZE]]], "token ids must be in"),
    ],
)
def test_what_cannot_be_scored_is_refused(model, contexts, continuations, message):
    with pytest.raises(ValueError, match=message):
        model.score(contexts, continuations)
    assert model.cache.num_free_tokens == 256


def test_a_cache_with_no_room_for_the_branches_is_left_as_it_was(model):
    with pytest.raises(CacheFullError):
        model.score(random_tokens(60, 60), [random_tokens(20, 60, 10)] * 2)
    assert model.cache.num_free_tokens == 256
