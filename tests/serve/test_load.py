"""The load of bench/serve.py, for seconds: a process of its own, many streams, no token lost, memory as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import serve
from runtime.tiny import CONFIGS, tokenizer
from transformers import AutoModelForCausalLM


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    AutoModelForCausalLM.from_config(CONFIGS["native"]).save_pretrained(tmp_path / "tiny")
    tokenizer().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.mark.slow
def test_many_streams_lose_no_token_and_no_memory(checkpoint: Path, tmp_path: Path, one_thread: None) -> None:
    sizes = ["--prompt-chars", "40", "--max-tokens", "80", "--cache-tokens", "4096"]
    figures = tmp_path / "figures.json"
    assert serve.main([str(checkpoint), "--seconds", "4", *sizes, "--json", str(figures)]) == 0
    result = json.loads(figures.read_text())
    assert (result["errors"], result["wrong"]) == ([], [])
    assert result["num_streams"] >= 64
    assert result["megabytes"][1] - result["megabytes"][0] < 30


def test_a_lost_token_would_be_noticed() -> None:
    text = b'data: {"choices": [{"text": "%b"}]}\n\n'
    usage = b'data: {"choices": [], "usage": {"completion_tokens": 2}}\n\n'
    head = b"HTTP/1.1 200 OK\r\n\r\n"
    whole = head + text % b"a" + text % b"b" + usage + b"data: [DONE]\n\n"
    assert serve._parse(whole) == serve.Answer("ab", 2)
    assert serve._parse(whole.replace(text % b"a", b"")) == serve.Answer("b", 2)
    assert "status 200" in serve._parse(whole.removesuffix(b"data: [DONE]\n\n"))
    assert "status 429" in serve._parse(b"HTTP/1.1 429 No\r\n\r\nfull")
    assert "RemoteDisconnected" in serve._parse(b"")
