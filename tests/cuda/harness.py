"""Runs the CUDA launchers of csrc/cuda on the CPU: ``launch_<op>()`` is real, the runtime below it is cudart.cpp and
every kernel it launches runs in ptxvm, with its checks on.

    args = {"out_a": tensor, ..., "dtype": torch.bfloat16, "batch_size": 3, ...}  # the fields of MergeAttnStatesParams
    [(kernel, stats)] = harness.launch("merge_attn_states", "sm_80", args)

A tensor is registered for exactly the bytes it spans, read-only where the field is a pointer to const; a kernel that
touches anything else fails. The structs are read from the headers, so they cannot drift.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ptxvm
import torch
from torch import Tensor

__all__ = ["ARCHS", "function", "launch", "make_params", "params_type", "ptx_of", "random_order", "workspace_size"]

TESTS = Path(__file__).parents[1]
CSRC = TESTS.parent / "csrc"  # --csrc sets another

ARCHS = ["sm_80", "sm_90a"]
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # DType of types.h
MAX_SMEM_PER_BLOCK = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}
MAX_INSTRUCTIONS = 2_000_000_000  # of warps: a test runs for seconds, not for minutes
LAUNCH_FAILURE = 719  # cudaErrorLaunchFailure

_C_TYPES: dict[str, Any] = {
    "void*": ctypes.c_void_p,
    "DType": ctypes.c_uint8,
    "bool": ctypes.c_bool,
    "float": ctypes.c_float,
    "int": ctypes.c_int,
    "int32_t": ctypes.c_int32,
    "index_t": ctypes.c_int64,
    "int64_t": ctypes.c_int64,
    "size_t": ctypes.c_size_t,
}


_order = 0


@contextlib.contextmanager
def random_order(seed: int) -> Iterator[None]:
    """Within it warps take turns, and blocks run, in another order than that of their numbers."""
    global _order
    _order = seed
    try:
        yield
    finally:
        _order = 0


class _Device(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("num_sms", "major", "minor", "max_smem_per_block")]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("kernel", ctypes.c_char_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("smem", ctypes.c_size_t),
        ("max_dynamic_smem", ctypes.c_int),
        ("args", ctypes.POINTER(ctypes.c_void_p)),
    ]


_OnLaunch = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Launch))


@functools.cache
def params_type(name: str) -> type[ctypes.Structure]:
    """The ctypes twin of a Params struct of csrc/include; ``readonly`` names its pointers to const."""
    headers = "\n".join(path.read_text() for path in sorted((CSRC / "include/transmla").glob("*.h")))
    body = re.search(rf"^struct {name} \{{\n(.*?)^\}};", headers, flags=re.MULTILINE | re.DOTALL)
    assert body, f"no struct {name} in csrc/include"
    fields, readonly = [], set()
    for declaration in re.sub(r"//[^\n]*", "", body[1]).split(";"):
        if not declaration.split():
            continue
        match = re.fullmatch(r"\s*(const )?(\w+)\s*(\*?)\s*([\w\s,]+?)\s*", declaration)
        assert match, f"{name}: cannot read {declaration!r}"
        const, kind, pointer, members = match.groups()
        for member in re.split(r",\s*", members):
            fields.append((member, _C_TYPES["void*" if pointer else kind]))
            if const:
                readonly.add(member)
    return type(name, (ctypes.Structure,), {"_fields_": fields, "readonly": frozenset(readonly)})


def _run(*command: str | Path) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@functools.cache
def _build(op: str, arch: str) -> tuple[ctypes.CDLL, ptxvm.Module, tuple[str, ...]]:
    """The launchers of an op, the PTX of what they launch, both from one run of nvcc, and the launchers' symbols."""
    used = [CSRC / "cuda" / op, CSRC / "cuda/common", CSRC / "include"]
    files = sorted(path for room in used for path in room.rglob("*") if path.is_file())
    runtime = [TESTS / "cuda/cudart.cpp", TESTS / "ptxvm/src/tensormap.h"]
    content = [path.read_bytes() for path in [CSRC / "cuda/kernels.h", *files, *runtime, Path(__file__)]]
    key = hashlib.sha256(b"\0".join([*content, f"{op} {arch} {ptxvm.nvcc()}".encode()])).hexdigest()[:16]
    build = TESTS.parent / "build/test-cuda" / key
    if not build.exists():
        build.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=build.parent) as scratch:
            version = arch.removeprefix("sm_")
            # PTX only: ptxas has nothing to do here.
            _run(
                ptxvm.nvcc(), "-std=c++17", f"-gencode=arch=compute_{version},code=compute_{version}",
                f"-I{CSRC}", f"-I{CSRC / 'include'}", "--Werror=all-warnings",
                *(["-DTRANSMLA_SM90A"] if arch == "sm_90a" else []),  # as in CMakeLists.txt
                "-shared", "-Xcompiler=-fPIC", "--cudart=none", "--keep", f"--keep-dir={scratch}",
                "-o", Path(scratch, "launch.so"), CSRC / "cuda" / op / "launch.cu", runtime[0],
            )  # fmt: skip
            fresh = Path(scratch, "kept")
            fresh.mkdir()
            for name in ("launch.so", "launch.ptx"):
                Path(scratch, name).rename(fresh / name)
            with contextlib.suppress(OSError):  # somebody else was faster
                fresh.rename(build)
    symbols = _run("nm", "--dynamic", "--defined-only", build / "launch.so").split()
    return ctypes.CDLL(str(build / "launch.so")), ptxvm.load((build / "launch.ptx").read_text()), tuple(symbols)


def ptx_of(op: str, arch: str) -> str:
    """The PTX of an op's kernels."""
    text: str = _build(op, arch)[1].text
    return text


def function(op: str, arch: str, name: str) -> Any:
    """transmla::name() of an op's launch.cu, to be called with ctypes."""
    library, _, symbols = _build(op, arch)
    (symbol,) = (symbol for symbol in symbols if symbol.startswith(f"_ZN8transmla{len(name)}{name}E"))
    return getattr(library, symbol)


def _pointers(args: dict[str, Any], readonly: frozenset[str]) -> ptxvm.Memory:
    """Registers every tensor once; one that any field may write is writable."""
    memory = ptxvm.Memory()
    tensors: dict[int, tuple[str, Tensor, bool]] = {}
    for name, value in args.items():
        if isinstance(value, Tensor):
            _, _, writable = tensors.get(value.data_ptr(), (name, value, False))
            tensors[value.data_ptr()] = (name, value, writable or name not in readonly)
    for name, tensor, writable in tensors.values():
        memory.register(tensor, name, readonly=not writable)
    return memory


def _c_value(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.data_ptr()
    return DTYPES[value] if isinstance(value, torch.dtype) else value


def make_params(op: str, args: dict[str, Any]) -> ctypes.Structure:
    """<Op>Params with every field set; tensors become addresses and dtypes numbers of DType."""
    kind = params_type("".join(part.capitalize() for part in op.split("_")) + "Params")
    names = {name for name, _ in kind._fields_}
    assert names == set(args), f"{op}: fields missing or unknown: {sorted(names ^ set(args))}"
    values = {
        name: DTYPES.get(value, value) if isinstance(value, torch.dtype) else value for name, value in args.items()
    }
    return kind(**{name: value.data_ptr() if isinstance(value, Tensor) else value for name, value in values.items()})


def _device(arch: str, num_sms: int, max_smem: int | None) -> _Device:
    compute_capability = int(re.sub(r"\D", "", arch))
    return _Device(num_sms, *divmod(compute_capability, 10), max_smem or MAX_SMEM_PER_BLOCK[compute_capability])


def workspace_size(op: str, arch: str, args: dict[str, Any], *, num_sms: int = 4, max_smem: int | None = None) -> int:
    """<op>_cuda_workspace_size() of the same arguments as launch()'s, in bytes."""
    library, _, _ = _build(op, arch)
    library.fake_cuda(ctypes.byref(_device(arch, num_sms, max_smem)), None)
    query = function(op, arch, f"{op}_cuda_workspace_size")
    query.restype = ctypes.c_size_t
    size: int = query(ctypes.byref(make_params(op, args)))
    return size


def launch(
    op: str,
    arch: str,
    args: dict[str, Any],
    *,
    directory: str | None = None,
    num_sms: int = 4,
    max_smem: int | None = None,
) -> list[tuple[str, ptxvm.Stats]]:
    """Calls launch_<op>() and returns what each of its kernel launches did.

    Args:
        args: the fields of <Op>Params, all of them; a tensor for a pointer, a torch.dtype for a DType.
        directory: of the launcher in csrc/cuda, if it is not that of the op.
        num_sms: what the launcher is told; few, so that short sequences meet every way to share the work.
        max_smem: bytes of shared memory of a block, if not those of `arch`: a smaller GPU that runs the same code.
    """
    library, module, _ = _build(directory or op, arch)
    params = make_params(op, args)
    memory = _pointers(args, params.readonly)
    done: list[tuple[str, ptxvm.Stats]] = []
    failures: list[BaseException] = []
    device = _device(arch, num_sms, max_smem)

    def on_launch(pointer: Any) -> int:
        call = pointer.contents
        try:
            kernel = call.kernel.decode()
            info = module.info(kernel)
            smem = call.smem + info["static_smem"]
            assert call.smem <= call.max_dynamic_smem, f"{kernel}: {call.smem} bytes of shared memory, not asked for"
            limit = device.max_smem_per_block
            assert smem <= limit, f"{kernel}: {smem} bytes of shared memory, {arch} has {limit}"
            assert all(0 < n < 1 << 16 for n in call.grid[1:]), f"{kernel}: grid {call.grid[:]}"
            parameters = [ctypes.string_at(call.args[i], size) for i, (_, size, _) in enumerate(info["params"])]
            stats = module.launch(
                kernel, call.grid[:], call.block[:], parameters, call.smem, memory,
                max_insts=MAX_INSTRUCTIONS, order=_order,
            )  # fmt: skip
            done.append((kernel, stats))
        except BaseException as failure:  # it must not pass through C
            failures.append(failure)
            return LAUNCH_FAILURE
        return 0

    callback = _OnLaunch(on_launch)
    library.fake_cuda(ctypes.byref(device), callback)
    error = function(directory or op, arch, f"launch_{op}")(ctypes.byref(params), None)
    if failures:
        raise failures[0]
    assert error == 0, f"launch_{op} returned CUDA error {error}"
    return done
