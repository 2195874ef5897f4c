"""Tests and times this package on a GPU, in one command: builds what is missing, compares every op with its meaning in
fp64, times mla_decode against torch, and against FlashMLA and FlashInfer where they are installed."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import model
import torch
from cases import mla_decode
from cases.mla_decode import Case
from compare import headings, line, time_case
from roofline import measure_roofline

ROOT = Path(__file__).parents[1]
GRID = "tests/ops/test_devices.py"
_EXAMPLES = """examples:
  python bench/gpu.py                                      # all of it; takes minutes and up to 20 GB
  python bench/gpu.py --batch 1 8 --context 8192 --heads 32 --json quick.json
  python bench/gpu.py --no-build --no-test                 # times what is installed
  python bench/gpu.py --dry-run                            # needs no GPU: cases, bytes, FLOPs, modelled floors
  python bench/gpu.py --model > bench/results/model.md     # needs no GPU: the whole model"""


class BenchError(Exception):
    """One line that says what is wrong and what to do."""


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if args.model:
        print(model.markdown(), end="")
        return 0
    cases = [c for c in model.cases() if c.batch_size in args.batch and c.seqlen in args.context]
    cases = [c for c in cases if c.num_heads in args.heads]
    if args.dry_run:
        print(*_dry_run(cases), sep="\n")
        return 0
    try:
        _run(cases, args)
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, choices, what in (
        ("batch", model.BATCH_SIZES, "sequences"),
        ("context", model.SEQLENS, "tokens of each"),
        ("heads", model.NUM_HEADS, "query heads"),
    ):
        listed = ", ".join(map(str, choices))
        parser.add_argument(
            f"--{name}", type=int, nargs="+", choices=choices, default=choices, metavar="N", help=f"{what}: {listed}"
        )
    parser.add_argument("--json", type=Path, help="results [default: bench/results/<name of the GPU>.json]")
    parser.add_argument("--no-build", action="store_true", help="fail where the package is missing or lacks the GPU")
    parser.add_argument("--no-test", action="store_true", help="time without comparing first")
    parser.add_argument("--dry-run", action="store_true", help="print what would be timed, and floors by the datasheet")
    parser.add_argument("--model", action="store_true", help="print bench/results/model.md")
    return parser


def _dry_run(cases: Iterable[Case]) -> list[str]:
    names = "".join(f"{device.name:>12}" for device in model.DEVICES)
    lines = [f"{'':<36} {'MB':>10} {'GFLOP':>9}  floor, us (model):{names}"]
    for case in cases:
        floors = "".join(f"{1e6 * device.seconds(case):>12,.2f}" for device in model.DEVICES)
        lines.append(f"{case!s:<36} {case.num_bytes / 1e6:>10,.2f} {case.flops / 1e9:>9,.2f}{'':>20}{floors}")
    return lines


def _run(cases: list[Case], args: argparse.Namespace) -> None:
    if not torch.cuda.is_available():
        raise BenchError(
            f"no CUDA device that torch {torch.__version__} can use. --dry-run and --model need none; with a GPU, "
            "install a torch built for CUDA and see that nvidia-smi lists the GPU"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise BenchError(f"the kernels need compute capability 8.0 or more, this GPU has {major}.{minor}")
    _ensure_built(major, minor, build=not args.no_build)
    results: dict[str, Any] = {"environment": _environment(device)}
    print(*(f"{name}: {value}" for name, value in results["environment"].items()), sep="\n")
    if not args.no_test:
        results["tests"] = _test()
    path = args.json or ROOT / "bench/results" / f"{_slug(torch.cuda.get_device_name(device))}.json"
    roofline = measure_roofline(device, torch.bfloat16)
    results["roofline"] = asdict(roofline)
    print(f"copy: {roofline.bandwidth / 1e9:,.0f} GB/s, GEMM: {roofline.flops / 1e12:,.0f} TFLOP/s, both measured now")
    print(headings(mla_decode))
    results["cases"] = []
    for case in cases:
        result = time_case(mla_decode, case, device, roofline)
        results["cases"].append(result)
        print(line(mla_decode, result), flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")  # each time: a run that is killed leaves what it has
    print(f"written to {path}")


def _ensure_built(major: int, minor: int, *, build: bool) -> None:
    if any(runs_on(arch, major, minor) for arch in _built_archs()):
        return
    arch = f"{major}{minor}{'a' if (major, minor) == (9, 0) else ''}-real"
    cmake_args = f"{os.environ.get('CMAKE_ARGS', '')} -DTRANSMLA_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES={arch}".strip()
    command = [sys.executable, "-m", "pip", "install", f"{ROOT}[dev]"]
    by_hand = f"CMAKE_ARGS={shlex.quote(cmake_args)} {shlex.join(command)}"
    if not build:
        raise BenchError(f"transmla_ext is not installed with kernels for sm_{major}{minor}. Build it: {by_hand}")
    print(f"building: {by_hand}", flush=True)
    if subprocess.run(command, env={**os.environ, "CMAKE_ARGS": cmake_args}).returncode:
        raise BenchError(f"the build failed, see above (it needs nvcc on PATH, or CUDACXX). Again: {by_hand}")


def _built_archs() -> list[str]:
    """What the installed package has kernels for. Asked in another process: a library is loaded only once."""
    code = "from transmla_ext import _lib; print(*_lib.core.build_info()['cuda_archs'] * _lib.has_cuda_kernels)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split()


def runs_on(arch: str, major: int, minor: int) -> bool:
    """Whether what CMake compiles for an entry of CMAKE_CUDA_ARCHITECTURES runs on a GPU of this compute capability."""
    match = re.fullmatch(r"(\d+)(\d)([af]?)(-real|-virtual)?", arch)
    if match is None:
        return arch == "native"
    built, kind = (int(match[1]), int(match[2])), match[4]
    if match[3]:
        return built == (major, minor)
    if kind == "-real":
        return built[0] == major and built[1] <= minor
    return built <= (major, minor)


def _test() -> dict[str, int]:
    """Runs the correctness grid in another process, which an illegal access of a kernel may take down."""
    print(f"comparing every op with its meaning in fp64: {GRID}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "--junitxml", str(report), GRID]
        if subprocess.run(command, cwd=ROOT).returncode:
            raise BenchError(
                "the comparison failed, see above: times of wrong results mean nothing. Please report it with the "
                f"output of `transmla env`. --no-test times all the same. Again: {shlex.join(command)}"
            )
        (suite,) = ElementTree.parse(report).getroot().iter("testsuite")
    counts = {name: int(suite.attrib[name]) for name in ("tests", "skipped")}
    if counts["tests"] == counts["skipped"]:
        raise BenchError(f"no comparison ran: does {sys.executable} see the GPU? --no-test times all the same")
    return counts


def _environment(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    query = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit")
    options = (f"--query-gpu={','.join(query)}", "--format=csv,noheader", f"--id=GPU-{properties.uuid}")
    clocks = _output("nvidia-smi", *options)
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "commit": _output("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
        "GPU": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}",
        "SMs": properties.multi_processor_count,
        "memory": properties.total_memory,
        "L2": properties.L2_cache_size,
        **dict(zip(query, clocks.split(", ") if clocks else [None] * len(query), strict=True)),
        "torch": torch.__version__,
        "CUDA of torch": torch.version.cuda,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: _version(name) for name in ("transmla_ext", "flash_mla", "flashinfer-python")},
        "kernels for": " ".join(_built_archs()),
    }


def _output(*command: str) -> str | None:
    if not shutil.which(command[0]):
        return None
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stdout.strip() if result.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


if __name__ == "__main__":
    sys.exit(main())
