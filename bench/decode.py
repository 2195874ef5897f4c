"""Tokens per second of a converted model, beside its original and plain transformers, and what a step's time goes into.

The context is random numbers in the cache: how long a step takes does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["breakdown", "main", "time_steps"]

ORIGINAL, PLAIN, OURS = "original", "converted, transformers", "converted, transmla_ext"
_PARTS = ("attention", "projections", "MLP", "norms", "head", "overhead")
_WARM_UP = 2
_TOKEN = 5

Step = Callable[[], object]


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    results = []
    for num_threads in args.threads:
        torch.set_num_threads(num_threads)
        for dtype in args.dtype:
            result = _compare(args.original, args.converted, getattr(torch, dtype), args.context, args.steps)
            results.append({"threads": num_threads, "dtype": dtype, "context": args.context, **result})
            print(*_lines(results[-1]), sep="\n", flush=True)
        best = {
            name: max(result["tokens/s"][name] for result in results if result["threads"] == num_threads)
            for name in (ORIGINAL, PLAIN, OURS)
        }
        print(f"{num_threads} threads, best dtype of each: {_ratios(best)}\n")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def _compare(original: Path, converted: Path, dtype: torch.dtype, context: int, num_steps: int) -> dict[str, Any]:
    from transmla_ext import load

    length = context - num_steps - _WARM_UP  # so that the last step sees `context` tokens
    model = load(converted, dtype=dtype)
    steps = {
        ORIGINAL: _transformers_step(original, dtype, length),
        PLAIN: _transformers_step(converted, dtype, length),
        OURS: _our_step(model, length),
    }
    seconds = time_steps(steps, num_steps)
    parts, timed_step = breakdown(model, _our_step(model, length), num_steps)
    return {
        "tokens/s": {name: 1 / value for name, value in seconds.items()},
        "step_ms": 1e3 * seconds[OURS],
        "timed_step_ms": 1e3 * timed_step,
        "parts_ms": {part: 1e3 * value for part, value in parts.items()},
    }


def time_steps(steps: dict[str, Step], num_steps: int) -> dict[str, float]:
    """Median seconds of each; they take turns, so that all see the same machine."""
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(_WARM_UP + num_steps):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            samples[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values[_WARM_UP:]) for name, values in samples.items()}


def _our_step(model: Any, length: int) -> Step:
    from transmla_ext.runtime import CachedSequence

    sequence = CachedSequence()
    model.cache.append([sequence], [length])
    for layer in model.cache.layers:
        layer.normal_()
    return lambda: model.decode([sequence], [_TOKEN])


def _transformers_step(path: Path, dtype: torch.dtype, length: int) -> Step:
    """With a DynamicCache and SDPA, as generate() has them."""
    from transformers import AutoModelForCausalLM, DynamicCache

    import transmla_ext  # noqa: F401  (registers the native model classes)

    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa").eval()
    config, cache, token = model.config, DynamicCache(), torch.tensor([[_TOKEN]])
    for i in range(config.num_hidden_layers):
        cache.update(*(torch.randn(1, heads, length, dim, dtype=dtype) for heads, dim in _cached(config, i)), i)

    @torch.inference_mode()
    def step() -> Tensor:
        logits: Tensor = model(token, past_key_values=cache, use_cache=True).logits
        return logits

    return step


def _cached(config: Any, layer_idx: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Heads and numbers of each for what a layer caches as keys and as values."""
    if mla := getattr(config, "mla", None):
        return (1, mla[layer_idx]["kv_lora_rank"]), (1, mla[layer_idx]["qk_rope_head_dim"])
    if config.model_type == "deepseek_v3":
        return (1, config.kv_lora_rank), (1, config.qk_rope_head_dim)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return (config.num_key_value_heads, head_dim), (config.num_key_value_heads, head_dim)


def breakdown(model: Any, step: Step, num_steps: int) -> tuple[dict[str, float], float]:
    """Median seconds of each part of a step, and of the step while its parts are timed."""
    from transmla_ext import ops

    samples: dict[str, list[float]] = defaultdict(list)
    with _timed(model, ops) as seconds:
        for _ in range(_WARM_UP + num_steps):
            seconds.clear()
            begin = time.perf_counter()
            step()
            total = time.perf_counter() - begin
            parts = {"attention": seconds["mla_decode"], "projections": seconds["self_attn"] - seconds["mla_decode"]}
            parts |= {part: seconds[part] for part in ("MLP", "norms", "head")}
            parts["overhead"] = total - sum(parts.values())
            for part, value in {**parts, "step": total}.items():
                samples[part].append(value)
    medians = {part: statistics.median(values[_WARM_UP:]) for part, values in samples.items()}
    return {part: medians[part] for part in _PARTS}, medians["step"]


@contextmanager
def _timed(model: Any, ops: Any) -> Iterator[dict[str, float]]:
    """Adds up the seconds of a layer's modules, of the head and of mla_decode, by name."""
    seconds: dict[str, float] = defaultdict(float)

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed_call(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            result = call(*args, **kwargs)
            seconds[name] += time.perf_counter() - begin
            return result

        return timed_call

    modules: list[tuple[str, nn.Module]] = [("head", model._lm_head), ("norms", model._decoder.norm)]
    for layer in model._decoder.layers:
        for name, module in layer.named_children():
            modules.append((name if name == "self_attn" else "norms" if "norm" in name else "MLP", module))
    mla_decode = ops.mla_decode
    try:
        ops.mla_decode = timed("mla_decode", mla_decode)
        for name, module in modules:
            module.forward = timed(name, module.forward)  # type: ignore[method-assign]
        yield seconds
    finally:
        ops.mla_decode = mla_decode
        for _, module in modules:
            del module.forward


def _lines(result: dict[str, Any]) -> Iterator[str]:
    setting = f"{result['threads']} threads, {result['dtype']}, context {result['context']:,}"
    yield f"{setting}: {_ratios(result['tokens/s'])}"
    step, parts = result["timed_step_ms"], result["parts_ms"]
    shares = ", ".join(f"{part} {ms:.1f} ({ms / step:.0%})" for part, ms in parts.items())
    yield f"  a step of ours: {result['step_ms']:.1f} ms; by parts, with timers on, {step:.1f} ms: {shares}"


def _ratios(speeds: dict[str, float]) -> str:
    ours = speeds[OURS]
    others = (f"{name} {speeds[name]:.1f} ({ours / speeds[name]:.2f} ×)" for name in (ORIGINAL, PLAIN))
    return f"{OURS} {ours:.1f} tokens/s, {', '.join(others)}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("original", type=Path, help="directory of the model as it was")
    parser.add_argument("converted", type=Path, help="directory that `transmla convert` made of it")
    parser.add_argument("--context", type=int, default=8192, metavar="N", help="tokens in the cache [default: 8192]")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="[default: 20]")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], metavar="N", help="[default: 1 2]")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], metavar="NAME")
    parser.add_argument("--json", type=Path, help="where the figures go, too")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
