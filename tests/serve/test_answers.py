"""The openai client gets what MLAModel.generate gives."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
from runtime.tiny import EOS
from serving import Serving, run_server, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from transmla_ext import MLAConfig
from transmla_ext.models import native_config
from transmla_ext.runtime import Generation, MLAModel

QUESTION = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "naïve café?"}]
SAMPLED = {"temperature": 0.9, "top_p": 0.95, "seed": 5}


@cache
def model() -> MLAModel:
    return tiny_model()


def alone(prompt: Any, **options: Any) -> Generation:
    return model().generate([prompt], **options)[0]


def chat(**options: Any) -> Generation:
    return alone(model().chat_prompt(QUESTION), **options)


def test_chat(serving: Serving) -> None:
    options = {"model": "tiny", "messages": QUESTION, "max_tokens": 20, **SAMPLED}
    answer = serving.client.chat.completions.create(**options, extra_body={"top_k": 7})
    expected = chat(max_new_tokens=20, top_k=7, **SAMPLED)
    assert expected.text != chat(max_new_tokens=20, **SAMPLED).text
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", expected.text)
    assert choice.finish_reason == {"eos": "stop", "length": "length"}[expected.finish_reason]
    num_prompt = len(model().chat_prompt(QUESTION))
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (num_prompt, len(expected.tokens))
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert answer.object == "chat.completion"


def test_an_answer_sent_back_is_part_of_the_next_question(serving: Serving) -> None:
    client, options = serving.client, {"model": "tiny", "max_completion_tokens": 4, "temperature": 0}
    first = client.chat.completions.create(messages=[{"role": "user", "content": "a"}], **options).choices[0].message
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        first,
        {"role": "user", "content": "b", "name": "Bob"},
    ]
    answer = client.chat.completions.create(messages=messages, tools=[], **options)
    plain = [{"role": "user", "content": "a"}, {"role": "assistant", "content": first.content}]
    prompt = model().chat_prompt([*plain, {"role": "user", "content": "b"}])
    assert answer.choices[0].message.content == alone(prompt, max_new_tokens=4).text


def test_chat_as_a_stream(serving: Serving) -> None:
    options = {"model": "tiny", "messages": QUESTION, "max_completion_tokens": 30, **SAMPLED}
    with_usage = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = serving.client.chat.completions.create(**options, **with_usage)
    expected = chat(max_new_tokens=30, **SAMPLED)
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == expected.text
    assert [chunk.choices[0].delta.role for chunk in chunks] == ["assistant"] + [None] * (len(chunks) - 1)
    assert [chunk.choices[0].finish_reason for chunk in chunks][-2:] == [None, "length"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert (last.choices, last.usage.completion_tokens) == ([], 30)
    chunks = list(serving.client.chat.completions.create(**options, stream=True))
    assert not [chunk for chunk in chunks if chunk.usage]


def test_without_a_limit_an_answer_may_fill_the_context(serving: Serving) -> None:
    answer = serving.client.chat.completions.create(model="tiny", messages=QUESTION, temperature=0)
    assert answer.choices[0].message.content == chat(max_new_tokens=1000).text
    answer = serving.client.completions.create(model="tiny", prompt="abc", temperature=0)
    assert answer.usage.completion_tokens == 16  # as OpenAI has it


def test_stop_strings(serving: Serving) -> None:
    free = alone("Once upon", max_new_tokens=60)
    stop = next(free.text[i : i + 2] for i in range(20, 60) if "\ufffd" not in free.text[i : i + 2])
    options = {"model": "tiny", "prompt": "Once upon", "max_tokens": 60, "temperature": 0}
    answer = serving.client.completions.create(**options, stop=["never to be seen", stop, "\0\0", "\1\1"])
    [choice] = answer.choices
    assert (choice.text, choice.finish_reason) == (free.text[: free.text.index(stop)], "stop")
    chunks = list(serving.client.completions.create(**options, stop=stop, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == choice.text
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_prompts_of_every_kind_and_several_choices(serving: Serving) -> None:
    tokens = [list(b"ab"), list(b"xyz")]
    for prompt, prompts in (
        ("abc", ["abc"]),
        (["abc", "d"], ["abc", "d"]),
        (tokens[0], tokens[:1]),
        (tokens, tokens),
    ):
        options = {"model": "tiny", "prompt": prompt, "max_tokens": 9, "n": 2, **SAMPLED}
        expected = [
            alone(prompt, max_new_tokens=9, **{**SAMPLED, "seed": SAMPLED["seed"] + i}).text
            for i, prompt in enumerate(prompt for prompt in prompts for _ in range(2))
        ]
        choices = serving.client.completions.create(**options).choices
        assert [choice.index for choice in choices] == list(range(2 * len(prompts)))
        assert [choice.text for choice in choices] == expected
        texts = [""] * len(expected)
        for chunk in serving.client.completions.create(**options, stream=True):
            texts[chunk.choices[0].index] += chunk.choices[0].text
        assert texts == expected


def expected_logprobs(prompt: list[int], tokens: list[int]) -> list[float]:
    """Of each token after those before it, from the logits."""
    values = []
    for i, token in enumerate(tokens):
        logits, handles = model().prefill([prompt + tokens[:i]])
        model().free(handles)
        values.append(float(logits[0].log_softmax(-1)[token]))
    return values


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_completions(serving: Serving, stream: bool) -> None:
    prompt = list(model().tokenizer("é naïve").input_ids)
    options = {"model": "tiny", "prompt": prompt, "max_tokens": 40, "logprobs": 2, "stream": stream, **SAMPLED}
    answer = serving.client.completions.create(**options)
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    parts = [choice.logprobs for choice in choices]
    tokens, logprobs, top, offsets = (
        [value for part in parts for value in getattr(part, name)]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    )
    expected = alone(prompt, max_new_tokens=40, **SAMPLED)
    text = "".join(choice.text for choice in choices)
    assert text == expected.text
    drawn = [token for token in expected.tokens if token != EOS]
    assert logprobs == pytest.approx(expected_logprobs(prompt, drawn), abs=1e-4)
    for token, logprob, alternatives in zip(tokens, logprobs, top, strict=True):
        assert len(alternatives) == 2
        assert logprob <= max(alternatives.values()) + 1e-6
        assert alternatives.get(token, logprob) == logprob
    assert offsets == sorted(offsets)
    whole = [(token, offset) for token, offset in zip(tokens, offsets, strict=True) if not token.startswith("bytes:")]
    before_garbage = [(token, offset) for token, offset in whole if "\ufffd" not in text[: offset + 1]]
    assert len(before_garbage) >= 1
    assert all(text[offset : offset + len(token)] == token for token, offset in before_garbage)


def test_bytes_of_tokens_are_those_of_the_text(serving: Serving) -> None:
    """The bytes of half a character are told, though it has no text."""
    options = {"model": "tiny", "messages": QUESTION, "max_tokens": 40, "logprobs": True, "top_logprobs": 3, **SAMPLED}
    answer = serving.client.chat.completions.create(**options)
    entries = answer.choices[0].logprobs.content
    together = b"".join(bytes(entry.bytes) for entry in entries)
    expected = chat(max_new_tokens=40, **SAMPLED)
    assert together.decode(errors="replace").startswith(expected.text.rstrip("\ufffd"))
    assert any(entry.token.startswith("bytes:\\x") for entry in entries)
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob <= entry.top_logprobs[0].logprob + 1e-6
        assert not math.isinf(entry.logprob)
    [without] = serving.client.chat.completions.create(**options | {"logprobs": False, "top_logprobs": 0}).choices
    assert without.logprobs is None


def test_models(serving: Serving) -> None:
    [listed] = serving.client.models.list().data
    assert (listed.id, listed.max_model_len) == ("tiny", 128)
    assert serving.client.models.retrieve("tiny") == listed


def test_the_chat_template_of_a_real_model(smollm2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    words = AutoTokenizer.from_pretrained(smollm2)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = LlamaConfig(vocab_size=len(words), **sizes)
    shape = {"kv_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
    config = native_config(base, [MLAConfig(rope_slots=range(8), **shape)])
    with run_server(MLAModel(AutoModelForCausalLM.from_config(config), tokenizer=words)) as serving:
        prompts = []
        add_request = serving.engine.add_request
        monkeypatch.setattr(
            serving.engine, "add_request", lambda p, **options: prompts.append(p) or add_request(p, **options)
        )
        answer = serving.client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=5)
    text = "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nnaïve café?<|im_end|>\n<|im_start|>assistant\n"
    assert prompts == [words(text).input_ids]
    assert answer.usage.prompt_tokens == len(prompts[0])
