import pytest
import torch
from tiny import EOS, tokenizer
from transformers import AutoModelForCausalLM

from transmla_ext import load
from transmla_ext.runtime.generate import Sampling, TextStream

PROMPTS = ["a", "The capital of France is", "naïve café: "]
SAMPLED = {"temperature": 0.8, "top_k": 50, "top_p": 0.95}


def test_greedy_is_transformers_generate(checkpoint, model):
    reference = AutoModelForCausalLM.from_pretrained(checkpoint)
    for prompt, generation in zip(PROMPTS, model.generate(PROMPTS, max_new_tokens=24), strict=True):
        ids = model.tokenizer(prompt, return_tensors="pt").input_ids
        expected = reference.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.size(1) :].tolist()
        assert generation.tokens == expected


@pytest.mark.parametrize("sampling", [{}, SAMPLED])
def test_a_ragged_batch_is_each_alone(model, sampling):
    eos = model.generate(PROMPTS[:1], max_new_tokens=6, seed=7, **sampling)[0].tokens[-1]
    together = model.generate(PROMPTS, max_new_tokens=20, seed=7, eos=eos, **sampling)
    assert together[0].finish_reason == "eos"
    assert together[0].tokens.index(eos) == len(together[0].tokens) - 1 <= 5
    for i, prompt in enumerate(PROMPTS):
        assert model.generate([prompt], max_new_tokens=20, seed=7 + i, eos=eos, **sampling) == [together[i]]
    assert model.cache.num_free_tokens == 256


def test_a_finished_sequence_frees_its_pages_at_once(checkpoint):
    model = load(checkpoint, block_size=4, max_tokens=44)
    prompts = [[5] * 16, [6]]
    [first, _] = model.generate(prompts, max_new_tokens=1)
    # 20 + 40 tokens do not fit together; the first stops after one.
    [stopped, long] = model.generate(prompts, max_new_tokens=40, eos=first.tokens)
    assert stopped.tokens == first.tokens
    assert len(long.tokens) == 40 or long.finish_reason == "eos"


def test_the_seed_decides(model):
    def draw(seed):
        return model.generate(PROMPTS, max_new_tokens=12, temperature=1.0, eos=(), seed=seed)

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    torch.manual_seed(0)
    unseeded = draw(None)
    torch.manual_seed(0)
    assert draw(None) == unseeded


def test_generation_ends_where_positions_do(model):
    [generation] = model.generate([[1] * 120], max_new_tokens=50, eos=())
    assert (len(generation.tokens), generation.finish_reason) == (9, "length")


@pytest.mark.parametrize("sampling", [{}, SAMPLED])
def test_stream_is_generate_in_pieces(model, sampling):
    for prompt in PROMPTS:
        [generation] = model.generate([prompt], max_new_tokens=40, seed=3, **sampling)
        assert "".join(model.stream(prompt, max_new_tokens=40, seed=3, **sampling)) == generation.text


def test_stop_strings_end_the_text(model):
    [free] = model.generate(["x"], max_new_tokens=40, eos=())
    stop = free.text[len(free.text) // 2 :][:3]
    [stopped] = model.generate(["x"], max_new_tokens=40, eos=(), stop=["never to be seen", stop])
    assert stopped.finish_reason == "stop"
    assert stopped.text == free.text[: free.text.index(stop)]
    assert stopped.tokens == free.tokens[: len(stopped.tokens)]
    assert "".join(model.stream("x", max_new_tokens=40, eos=(), stop=stop)) == stopped.text


def test_an_abandoned_stream_frees_its_pages(model):
    stream = model.stream("x", max_new_tokens=100, eos=())
    next(stream)
    assert model.cache.num_free_tokens < 256
    stream.close()
    assert model.cache.num_free_tokens == 256


def test_pieces_are_whole_characters():
    text = "naïve café 🌍 漢字 Zürich"
    stream = TextStream(tokenizer(), tokenizer()("prompt").input_ids, [])
    pieces = []
    for token in tokenizer()(text).input_ids:
        stream.push(token)
        pieces.append(stream.take(final=False))
    assert "".join(pieces) == text
    assert "🌍" in pieces
    assert "\ufffd" not in "".join(pieces)


def test_what_may_become_a_stop_string_is_held_back():
    stream = TextStream(tokenizer(), [], ["</s>", "END"])
    pieces = []
    for token in tokenizer()("a</b EN </s> more").input_ids:
        stream.push(token)
        pieces.append(stream.take(final=stream.stopped))
        if stream.stopped:
            break
    assert "".join(pieces) == "a</b EN "
    assert pieces[1:4] == ["", "", "</b"]


def test_sampling_draws_from_the_distribution_it_is_given():
    logits = torch.tensor([2.0, -torch.inf, 1.0, 0.0, 0.5, -3.0])
    generators = [torch.Generator().manual_seed(i) for i in range(20_000)]

    def frequencies(**kwargs):
        drawn = Sampling(**kwargs)(logits.expand(len(generators), -1), generators)
        return torch.bincount(torch.tensor(drawn), minlength=6) / len(generators)

    def expect(kept, temperature):
        scores = torch.full_like(logits, -torch.inf)
        scores[kept] = logits[kept] / temperature
        return scores.softmax(-1)

    for kwargs, kept in (
        ({"temperature": 1.0}, [0, 2, 3, 4, 5]),
        ({"temperature": 0.5}, [0, 2, 3, 4, 5]),
        ({"temperature": 1.0, "top_k": 3}, [0, 2, 4]),
        ({"temperature": 1.0, "top_p": 0.6}, [0, 2]),
        ({"temperature": 2.0, "top_k": 4, "top_p": 0.5}, [0, 2]),
        ({"temperature": 1.0, "top_p": 1e-9}, [0]),
        ({"temperature": 0.0}, [0]),
    ):
        expected = expect(kept, kwargs["temperature"] or 1.0)
        actual = frequencies(**kwargs)
        assert (actual[expected == 0] == 0).all(), kwargs
        torch.testing.assert_close(actual, expected, atol=0.015, rtol=0)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"stop": ["a", ""]}, "a stop string is empty"),
    ],
)
def test_bad_arguments_are_refused(model, kwargs, message):
    with pytest.raises(ValueError, match=message):
        model.generate(["x"], **{"max_new_tokens": 4, **kwargs})
    with pytest.raises(ValueError, match=message):
        model.stream("x", **{"max_new_tokens": 4, **kwargs})


def test_bad_prompts_are_refused(model):
    for prompts, message in (
        ("x", "must be a list"),
        (["x", ""], "a prompt is empty"),
        ([[1], [EOS + 1]], "token ids must be in"),
        ([[1] * 129], "129 tokens in a sequence, but the model has 128 positions"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(prompts, max_new_tokens=1)


def test_without_a_tokenizer_prompts_are_token_ids(model):
    expected = model.generate([[1, 2, 3]], max_new_tokens=4, eos=())[0].tokens
    model.tokenizer = None
    [generation] = model.generate([[1, 2, 3]], max_new_tokens=4, eos=())
    assert (generation.tokens, generation.text) == (expected, None)
    for prompts, stop in ((["x"], ()), ([[1]], "x")):
        with pytest.raises(ValueError, match="need a tokenizer"):
            model.generate(prompts, max_new_tokens=4, stop=stop)
    with pytest.raises(ValueError, match="needs a tokenizer"):
        model.stream([1], max_new_tokens=4)


def test_special_tokens_are_no_text():
    stream = TextStream(tokenizer(), [], [])
    for token in [*tokenizer()("ab").input_ids, EOS]:
        stream.push(token)
    assert stream.take(final=True) == "ab"
