"""Times every op on the CPU beside torch, in per cent of what this machine reads and multiplies at best."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import pkgutil
import platform
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import cases
import torch
from compare import OURS, Op, headings, line, time_case
from roofline import measure_flops, measure_roofline

ROOT = Path(__file__).parents[1]
OPS = sorted(module.name for module in pkgutil.iter_modules(cases.__path__))
_EXAMPLES = """examples:
  python bench/run.py --quick                                  # a few cases of each op, some minutes
  python bench/run.py --op mla_decode --threads 1 2            # all cases of one op
  python bench/run.py --json mine.json --plot mine.png"""


def load_op(name: str) -> Op:
    """The module of an op: its cases, and what they are compared with."""
    op: Any = importlib.import_module(f"cases.{name}")
    return op


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    results: dict[str, Any] = {"environment": _environment(), "cases": []}
    print(*(f"{name}: {value}" for name, value in results["environment"].items()), sep="\n")
    device = torch.device("cpu")
    flops = partial(measure_flops, device, torch.float32, budget=args.budget / 4)
    for threads in args.threads:
        torch.set_num_threads(threads)
        for name in args.op:
            op = load_op(name)
            # In fp32: few CPUs multiply bf16 faster, and the ops' sums are fp32 whatever their inputs.
            roofline = measure_roofline(device, torch.float32)
            print(
                f"\n{name}, {threads} threads; measured now: {roofline.bandwidth / 1e9:.1f} GB/s read, "
                f"sgemm {roofline.flops / 1e9:.0f} GFLOP/s\n{headings(op)}"
            )
            for case in op.QUICK if args.quick else op.CASES:
                result = time_case(op, case, device, roofline, budget=args.budget, measure_flops=flops)
                result.update(threads=threads)
                results["cases"].append(result)
                print(line(op, result), flush=True)
                args.json.write_text(json.dumps(results, indent=1) + "\n")  # a run that is killed leaves what it has
    print("", *summary(results["cases"]), sep="\n")
    plot(results["cases"], args.plot)
    print(f"\nwritten to {args.json} and {args.plot}")
    return 0


def summary(results: list[dict[str, Any]]) -> list[str]:
    """Of each op and number of threads, over its cases: per cent of the roofline, and the ratio to the best other."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        if OURS in result:
            groups[result["op"], result["threads"]].append(result)
    lines = [f"{'op':<20} {'threads':>7} {'cases':>6}  % of roofline: geometric mean, least   best other: mean, least"]
    for (op, threads), group in groups.items():
        percents = [result[OURS]["% of roofline"] for result in group]
        ratios = [ratio for ratio in map(best_ratio, group) if ratio is not None]
        compared = f"{statistics.geometric_mean(ratios):>10.2f} × {min(ratios):>8.2f} ×" if ratios else ""
        mean, least = statistics.geometric_mean(percents), min(percents)
        lines.append(f"{op:<20} {threads:>7} {len(group):>6}  {mean:>29.1f} {least:>7.1f} {compared}")
    return lines


def best_ratio(result: dict[str, Any]) -> float | None:
    """How many times longer the fastest of the others takes."""
    others = [
        value["us"] for name, value in result.items() if isinstance(value, dict) and "us" in value and name != OURS
    ]
    return min(others) / result[OURS]["us"] if others else None


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """A panel for each op: every case's speed-up over the fastest other, and its per cent of the roofline."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ops = sorted({result["op"] for result in results if OURS in result})
    figure, axes = pyplot.subplots(len(ops), 2, figsize=(11, 3 * len(ops)), squeeze=False, layout="constrained")
    for (left, right), op in zip(axes, ops, strict=True):
        for threads in sorted({result["threads"] for result in results}):
            group = [
                result for result in results if OURS in result and (result["op"], result["threads"]) == (op, threads)
            ]
            left.plot([result[OURS]["% of roofline"] for result in group], "o-", label=f"{threads} threads")
            right.plot([best_ratio(result) or math.nan for result in group], "o-", label=f"{threads} threads")
        left.set(title=op, ylabel="% of roofline", xlabel="case", ylim=(0, None))
        right.set(title=op, ylabel="speed, fastest other = 1", xlabel="case", ylim=(0, None))
        right.axhline(1, color="grey", linewidth=1)
        left.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--op", nargs="+", choices=OPS, default=OPS, metavar="NAME", help=f"of: {', '.join(OPS)}")
    parser.add_argument(
        "--threads",
        type=int,
        nargs="+",
        default=sorted({1, cores}),
        metavar="N",
        help="default: 1 and one for each core",
    )
    parser.add_argument("--quick", action="store_true", help="a few cases of each op")
    parser.add_argument("--budget", type=float, default=0.3, metavar="S", help="seconds for each figure [default: 0.3]")
    results = ROOT / "bench/results"
    parser.add_argument("--json", type=Path, default=results / "cpu.json", help="[default: bench/results/cpu.json]")
    parser.add_argument("--plot", type=Path, default=results / "cpu.png", help="[default: bench/results/cpu.png]")
    return parser


def _environment() -> dict[str, Any]:
    from transmla_ext import _lib

    cpu = next(
        (row for row in _lines(Path("/proc/cpuinfo")) if row.startswith("model name")), ": " + platform.processor()
    )
    commit = subprocess.run(
        ["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "commit": commit.stdout.strip() or None,
        "CPU": cpu.partition(":")[2].strip(),
        "instruction set": _lib.core.cpu_isa(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


if __name__ == "__main__":
    sys.exit(main())
