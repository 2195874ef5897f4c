"""Converts a real model to MLA and shows what it costs and gains: a table, a picture, a paragraph of each.

The same model is also converted by the method of the TransMLA paper, from the same text to the same cache.

python examples/demo.py SmolLM2-135M-Instruct.Q4_1.gguf demo/
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import transmla_ext

PROMPT = "In Python, a list is"
CONTEXTS = (128, 4096)
TIMED_TOKENS = 16


@dataclass
class Measured:
    cache_bytes: int  # per token
    perplexity: float
    tokens_per_second: list[float]  # decode, one per context
    paragraph: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="GGUF file")
    parser.add_argument("out", type=Path, help="directory for the converted model and the picture")
    parser.add_argument("--kv-lora-rank", type=int, default=88)
    parser.add_argument("--qk-rope-head-dim", type=int, default=32)
    parser.add_argument("--refine-steps", type=int, default=80, help="fewer than convert()'s default, to be quick")
    arguments = parser.parse_args()

    console = Console()
    text = "\n\n".join(topics[name] for name in sorted(topics))  # the manual that every Python ships
    calibration, test = text[: len(text) * 3 // 4], text[len(text) * 3 // 4 :]

    def convert(name: str, **options: Any) -> Any:
        return transmla_ext.convert(
            arguments.model,
            arguments.out / name,
            kv_lora_rank=arguments.kv_lora_rank,
            qk_rope_head_dim=arguments.qk_rope_head_dim,
            calibration=[calibration],
            overwrite=True,
            **options,
        )

    report = convert("mla", refine_steps=arguments.refine_steps)
    console.print(report.table())
    console.print("Again, by the method of the TransMLA paper, for comparison")
    convert("transmla", method="transmla")

    tokenizer = AutoTokenizer.from_pretrained(arguments.out / "mla")
    tokens = tokenizer(test, return_tensors="pt", verbose=False).input_ids[0]
    with console.status("Measuring the original, in transformers"):
        before = measure_original(arguments.model, tokenizer, tokens, report.plan.cache_bytes_before)
    with console.status("Measuring the converted model, on this package's kernels"):
        after = measure_converted(arguments.out / "mla", tokenizer, tokens, report.plan.cache_bytes_after)
        transmla = converted_perplexity(arguments.out / "transmla", tokens)
    console.print(comparison(before, after, transmla))
    for title, measured in (("original", before), ("converted", after)):
        console.print(Panel(PROMPT + measured.paragraph, title=title))
    picture = arguments.out / "demo.png"
    draw(before, after, transmla, report, picture)
    console.print(f"picture: {picture}   model: {arguments.out / 'mla'}", highlight=False)
    console.print(f"more: transmla generate {arguments.out / 'mla'} 'Once upon a time'", highlight=False)


@torch.inference_mode()
def measure_original(path: Path, tokenizer: Any, tokens: Tensor, cache_bytes: int) -> Measured:
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()

    def decoder(context: Tensor) -> Callable[[int], None]:
        cache = DynamicCache(config=model.config)
        model(context[None], past_key_values=cache, logits_to_keep=1)
        return lambda token: model(torch.tensor([[token]]), past_key_values=cache)

    prompt = tokenizer(PROMPT, return_tensors="pt")
    generated = model.generate(**prompt, max_new_tokens=80, do_sample=False)[0, prompt.input_ids.shape[1] :]
    speeds = [decode_speed(decoder(tokens[:length]), tokens) for length in CONTEXTS]
    return Measured(cache_bytes, perplexity(model, tokens), speeds, tokenizer.decode(generated))


@torch.inference_mode()
def converted_perplexity(path: Path, tokens: Tensor) -> float:
    """Through transformers' own classes: the same code path as the original's."""
    return perplexity(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), tokens)


@torch.inference_mode()
def measure_converted(path: Path, tokenizer: Any, tokens: Tensor, cache_bytes: int) -> Measured:
    model = transmla_ext.load(path)
    speeds = []
    for length in CONTEXTS:
        _, sequences = model.prefill([tokens[:length].tolist()])
        speeds.append(decode_speed(lambda token, sequences=sequences: model.decode(sequences, [token]), tokens))
        model.free(sequences)
    (generation,) = model.generate([PROMPT], max_new_tokens=80)
    return Measured(cache_bytes, converted_perplexity(path, tokens), speeds, generation.text)


def perplexity(model: Any, tokens: Tensor, rows: int = 8, length: int = 512) -> float:
    """Of the first rows * length tokens, in rows."""
    nll = 0.0
    for row in tokens[: rows * length].view(rows, length):
        logits = model(row[None]).logits[0, :-1]
        nll += F.cross_entropy(logits, row[1:], reduction="sum").item()
    return math.exp(nll / (rows * (length - 1)))


def decode_speed(step: Callable[[int], object], tokens: Tensor) -> float:
    """Median tokens per second of single-token steps."""
    seconds = []
    for token in tokens[: TIMED_TOKENS + 2].tolist():
        started = time.perf_counter()
        step(token)
        seconds.append(time.perf_counter() - started)
    return 1 / statistics.median(seconds[2:])


def comparison(before: Measured, after: Measured, transmla: float) -> Table:
    table = Table(title="SmolLM2-135M, fp32, on this CPU")
    for column in ("", "original", "MLA", "ratio"):
        table.add_column(column, justify="left" if not column else "right")

    def row(name: str, a: float, b: float, form: str) -> None:
        table.add_row(name, format(a, form), format(b, form), f"{b / a:.2f}×")

    row("cache bytes per token", before.cache_bytes, after.cache_bytes, ",")
    row("perplexity, text not calibrated on", before.perplexity, after.perplexity, ".2f")
    row("the same, by the TransMLA paper's method", before.perplexity, transmla, ".2f")
    for context, a, b in zip(CONTEXTS, before.tokens_per_second, after.tokens_per_second, strict=True):
        row(f"decode tokens/s at context {context:,}", a, b, ".1f")
    return table


def draw(before: Measured, after: Measured, transmla: float, report: Any, path: Path) -> None:
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    cache, ppl, speed, layers = figure.subplots(1, 4, width_ratios=[1, 1.4, 1.6, 1.8])
    for axes, title, values in (
        (cache, "cache, bytes per token", {"original": before.cache_bytes, "MLA": after.cache_bytes}),
        (ppl, "perplexity", {"original": before.perplexity, "MLA": after.perplexity, "TransMLA": transmla}),
    ):
        colors = {"original": "tab:gray", "MLA": "tab:blue", "TransMLA": "tab:olive"}
        bars = axes.bar(values.keys(), values.values(), color=[colors[name] for name in values])
        axes.bar_label(bars, fmt="{:,.5g}")
        axes.set_title(title)
        axes.margins(y=0.1)
    for offset, color, values in (
        (-0.2, "tab:gray", before.tokens_per_second),
        (0.2, "tab:blue", after.tokens_per_second),
    ):
        bars = speed.bar([i + offset for i in range(len(CONTEXTS))], values, width=0.4, color=color)
        speed.bar_label(bars, fmt="{:.1f}")
    speed.set_xticks(range(len(CONTEXTS)), [f"context {context:,}" for context in CONTEXTS])
    speed.set_title("decode tokens/s")
    speed.margins(y=0.1)
    layers.bar(range(len(report.layers)), [layer.attention_error for layer in report.layers], color="tab:red")
    layers.set(title="attention-output error", xlabel="layer")
    figure.suptitle("SmolLM2-135M, before (gray) and after (blue) conversion to MLA")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
