"""Runs the PTX that nvcc makes of CUDA kernels on the CPU, checks every access and counts what they do; see README.md.

import numpy as np, ptxvm
mod = ptxvm.compile("saxpy.cu", arch="sm_80")
stats = mod.launch("saxpy", grid=4, block=256, args=[np.float32(2), x, y, np.int32(n)])
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

__all__ = ["Memory", "Module", "PtxError", "Stats", "aligned", "compile", "load", "nvcc", "ptr", "tensor_map"]

_HERE = Path(__file__).parent
_BUILD = _HERE.parents[1] / "build" / "ptxvm"


class PtxError(RuntimeError):
    """A fault of the kernel (out of bounds, race, deadlock, ...) or of its PTX (unknown instruction)."""


def _run(command: Sequence[str | Path]) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{result.stdout}{result.stderr}")
    return result.stdout


def _library() -> Path:
    """The machine itself, built with CMake when a source is newer."""
    library = _BUILD / "libptxvm.so"
    _BUILD.mkdir(parents=True, exist_ok=True)
    with (_BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        sources = [_HERE / "CMakeLists.txt", *(_HERE / "src").iterdir()]
        if not library.exists() or any(path.stat().st_mtime > library.stat().st_mtime for path in sources):
            _run(["cmake", "-S", _HERE, "-B", _BUILD, "-DCMAKE_BUILD_TYPE=Release"])
            _run(["cmake", "--build", _BUILD, "--parallel"])
            library.touch()
    return library


_lib = ctypes.CDLL(str(_library()))
_u32, _u64, _vp, _cp = ctypes.c_uint32, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_char_p
_u32s, _u64s = ctypes.POINTER(_u32), ctypes.POINTER(_u64)
for _name, _result, _arguments in (
    ("error", _cp, []),
    ("load", _vp, [_cp]),
    ("unload", None, [_vp]),
    ("info", _cp, [_vp]),
    ("memory_new", _vp, []),
    ("memory_free", None, [_vp]),
    ("memory_add", ctypes.c_int, [_vp, _u64, _u64, ctypes.c_int, _cp]),
    ("memory_remove", None, [_vp, _u64]),
    ("launch", _cp, [_vp, _cp, _vp, _u32s, _u32s, _u32, _vp, _u64, _u64s]),
):
    _function = getattr(_lib, f"ptxvm_{_name}")
    _function.restype, _function.argtypes = _result, _arguments


def _fail() -> None:
    raise PtxError(_lib.ptxvm_error().decode())


def _is_tensor(a: Any) -> bool:
    return hasattr(a, "data_ptr") and hasattr(a, "element_size")


def _is_array(a: Any) -> bool:
    return isinstance(a, np.ndarray) and a.ndim > 0


def ptr(a: Any) -> int:
    """The device address of a numpy array or torch tensor (its host address)."""
    return a.data_ptr() if _is_tensor(a) else a.ctypes.data


def _extent(a: Any) -> tuple[int, int]:
    """(first byte, bytes) of the memory an array or tensor spans."""
    if _is_tensor(a):
        if a.numel() == 0:
            return a.data_ptr(), 0
        span = sum((n - 1) * s for n, s in zip(a.shape, a.stride(), strict=True)) + 1
        return a.data_ptr(), span * a.element_size()
    if a.size == 0:
        return a.ctypes.data, 0
    byte_bounds = np.lib.array_utils.byte_bounds if hasattr(np.lib, "array_utils") else np.byte_bounds  # noqa: NPY201
    low, high = byte_bounds(a)
    return low, high - low


class Memory:
    """The global memory a launch may touch: a set of registered arrays."""

    def __init__(self) -> None:
        self._handle = _lib.ptxvm_memory_new()
        self._arrays: dict[int, Any] = {}

    def register(self, a: Any, name: str | None = None, readonly: bool = False) -> int:
        """Register an array or tensor; returns its device address."""
        base, size = _extent(a)
        if size:
            name = name or f"{str(a.dtype).removeprefix('torch.')}{list(a.shape)}"
            if not _lib.ptxvm_memory_add(self._handle, base, size, int(readonly), name.encode()):
                _fail()
            self._arrays[base] = a
        return ptr(a)

    def unregister(self, a: Any) -> None:
        base, _ = _extent(a)
        _lib.ptxvm_memory_remove(self._handle, base)
        self._arrays.pop(base, None)

    def __contains__(self, a: Any) -> bool:
        return _extent(a)[0] in self._arrays

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            _lib.ptxvm_memory_free(self._handle)


def tensor_map(
    a: Any,
    box: Sequence[int],
    swizzle: int = 0,
    dims: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
    elem: int | None = None,
) -> bytes:
    """The 128 bytes of a tensor map (a CUtensorMap __grid_constant__ parameter) over a row-major array.

    Args:
        a: the array; it has to be registered with the launch's Memory.
        box: the tile, outermost dimension first, like a.shape.
        swizzle: 0, 32, 64 or 128 bytes.
        dims, strides (bytes), elem (bytes): override what the array says; outermost first as well.
    """
    if _is_tensor(a):
        item, shape, steps = a.element_size(), list(a.shape), [s * a.element_size() for s in a.stride()]
    else:
        item, shape, steps = a.itemsize, list(a.shape), list(a.strides)
    item, shape, steps, box = elem or item, list(dims or shape), list(strides or steps), list(box)
    rank = len(shape)
    if not 1 <= rank <= 5 or len(box) != rank or len(steps) != rank:
        raise ValueError("rank must be 1..5 and the same for shape, strides and box")
    if steps[-1] != item:
        raise ValueError("the innermost dimension must be contiguous")
    if any(b < 1 or b > 256 for b in box):
        raise ValueError("box sizes must be 1..256")
    if box[-1] * item % 16:
        raise ValueError("the innermost box must be a multiple of 16 bytes")
    if swizzle and box[-1] * item > swizzle:
        raise ValueError("the innermost box exceeds the swizzle width")
    if any(step % 16 for step in steps[:-1]) or ptr(a) % 16:
        raise ValueError("base address and strides must be multiples of 16 bytes")

    def innermost_first(values: Sequence[int], length: int, default: int) -> list[int]:
        return ([*reversed(values)] + [default] * length)[:length]

    return struct.pack(
        "<IBBBBQ5II4Q5H5B41x",
        0x5054584D, item, rank, {0: 0, 32: 1, 64: 2, 128: 3}[swizzle], 0, ptr(a),
        *innermost_first(shape, 5, 1), 0,
        *innermost_first(steps[:-1], 4, 0),
        *innermost_first(box, 5, 1),
        1, 1, 1, 1, 1,
    )  # fmt: skip


def aligned(shape: int | Sequence[int], dtype: DTypeLike, align: int = 1024) -> np.ndarray:
    """Uninitialised numpy array whose data is aligned like device memory."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + align, np.uint8)
    offset = -raw.ctypes.data % align
    return raw[offset : offset + size].view(dtype).reshape(shape)


class Stats(dict[str, Any]):
    """What one launch did; see README.md for the fields. Missing classes and types read as 0."""

    def cls(self, name: str) -> int:
        return self["by_class"].get(name, 0)

    def total_flops(self) -> int:
        return sum(self["flops"].values())

    def coalescing(self, kind: str = "load") -> float:
        """Ideal over actual 32-byte sectors, 1.0 for perfectly coalesced accesses."""
        sectors = self["global_sectors"][kind]
        return self["global_ideal_sectors"][kind] / sectors if sectors else 1.0

    def bank_conflicts(self, kind: str = "load") -> int:
        """Extra shared-memory wavefronts."""
        return self["shared_wavefronts"][kind] - self["shared_ideal_wavefronts"][kind]


def _triple(size: int | Sequence[int]) -> ctypes.Array[ctypes.c_uint32]:
    sizes = (size,) if isinstance(size, (int, np.integer)) else tuple(size)
    return (_u32 * 3)(*(*map(int, sizes), 1, 1, 1)[:3])


def _pack(value: Any, size: int, kind: str, memory: Memory, registered: list[Any]) -> bytes:
    """Bytes of one kernel parameter."""
    if value is None:
        return bytes(size)
    if _is_tensor(value) or _is_array(value):
        if size != 8:
            raise TypeError(f"an array was given for a parameter of {size} bytes")
        if _extent(value)[1]:
            if value not in memory:
                registered.append(value)
            memory.register(value)
        return ptr(value).to_bytes(8, "little")
    if isinstance(value, (bytes, bytearray, memoryview)):
        data = bytes(value)
        if len(data) != size:
            raise TypeError(f"{size} bytes were expected for a parameter, {len(data)} bytes were given")
        return data
    if isinstance(value, (ctypes.Structure, ctypes.Union, ctypes.Array, ctypes._SimpleCData)):
        data = bytes(value)
    elif isinstance(value, (np.generic, np.ndarray)):
        data = value.tobytes()
    elif isinstance(value, int) and kind in ("f32", "f64"):
        data = np.dtype(kind.replace("f32", "float32").replace("f64", "float64")).type(value).tobytes()
    elif isinstance(value, int):
        data = (value & ((1 << (8 * size)) - 1)).to_bytes(size, "little")
    elif isinstance(value, float):
        data = (np.float64 if size == 8 else np.float32)(value).tobytes()
    else:
        raise TypeError(f"cannot pass {type(value)} to a kernel")
    if len(data) != size:
        raise TypeError(f"a value of {len(data)} bytes was given for a parameter of {size} bytes")
    return data


class Module:
    """The kernels and variables of one PTX text."""

    def __init__(self, text: str, path: Path | None = None) -> None:
        self.text, self.path = text, path
        self._handle = _lib.ptxvm_load(text.encode())
        if not self._handle:
            _fail()
        self._info = json.loads(_lib.ptxvm_info(self._handle).decode())

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            _lib.ptxvm_unload(self._handle)

    def kernels(self) -> list[str]:
        """Names of the kernels."""
        return list(self._info["kernels"])

    def find(self, name: str) -> str:
        """The kernel whose (mangled) name is, or uniquely contains, `name`."""
        kernels = self.kernels()
        if name in kernels:
            return name
        hits = [kernel for kernel in kernels if name in kernel]
        if len(hits) > 1:  # prefer the exact source name: _Z<len><name>...
            hits = [kernel for kernel in hits if kernel.startswith(f"_Z{len(name)}{name}")] or hits
        if len(hits) != 1:
            raise KeyError(f"{name!r} matches {len(hits)} kernels: {', '.join(hits or kernels)}")
        return hits[0]

    def info(self, name: str) -> dict[str, Any]:
        """Parameters (offset, bytes, type), static shared memory, local bytes of a kernel."""
        return self._info["kernels"][self.find(name)]

    def symbol(self, name: str, dtype: DTypeLike = np.uint8) -> np.ndarray:
        """A writable numpy view of a __device__ or __constant__ variable."""
        symbols = self._info["symbols"]
        hits = [name] if name in symbols else [symbol for symbol in symbols if name in symbol]
        if len(hits) != 1:
            raise KeyError(f"{name!r} matches {len(hits)} symbols")
        address, size = symbols[hits[0]]
        return np.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=dtype)

    def launch(
        self,
        name: str,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        args: Sequence[Any] = (),
        smem: int = 0,
        mem: Memory | None = None,
        checks: dict[str, bool] | None = None,
        threads: int = 1,
        max_insts: int = 0,
        profile: bool = False,
        order: int = 0,
    ) -> Stats:
        """Run a kernel to its end and return its Stats; raises PtxError when it misbehaves.

        Args:
            args: arrays and tensors (registered for this launch), scalars, bytes or ctypes structures.
            mem: a Memory with further arrays, e.g. those that structures point to.
            order: seed of a random order and length of the warps' turns, and blocks last to first; 0 for the order of
                their numbers.
            checks: {"race": bool, "uninit": bool, "stats": bool}, all on by default.
        """
        kernel = self.find(name)
        parameters = self._info["kernels"][kernel]["params"]
        if len(args) != len(parameters):
            raise TypeError(f"{kernel} takes {len(parameters)} arguments, {len(args)} given")
        memory = mem if mem is not None else Memory()
        registered: list[Any] = []
        data = bytearray(max([offset + size for offset, size, _ in parameters] + [1]))
        try:
            for value, (offset, size, kind) in zip(args, parameters, strict=True):
                data[offset : offset + size] = _pack(value, size, kind, memory, registered)
            on = {"race": True, "uninit": True, "stats": True} | (checks or {})
            options = (_u64 * 7)(on["race"], on["uninit"], on["stats"], threads, max_insts, profile, order)
            buffer = (ctypes.c_uint8 * len(data)).from_buffer(data)
            result = _lib.ptxvm_launch(
                self._handle, kernel.encode(), memory._handle, _triple(grid), _triple(block), smem,
                ctypes.addressof(buffer), len(data) if parameters else 0, options,
            )  # fmt: skip
            if result is None:
                _fail()
            return Stats(json.loads(result.decode()))
        finally:
            for array in registered:
                memory.unregister(array)


def load(text: str, path: Path | None = None) -> Module:
    """A Module from PTX text."""
    return Module(text, path)


def nvcc() -> str:
    """The CUDA compiler: CUDACXX, nvcc on PATH, or that of the wheels."""
    wheels = Path(sysconfig.get_path("purelib"), "nvidia")
    compiler = os.environ.get("CUDACXX") or shutil.which("nvcc") or next(map(str, wheels.glob("*/bin/nvcc")), None)
    if not compiler:
        raise RuntimeError(
            "There is no nvcc. No GPU is needed, and the compiler comes from PyPI: pip install nvidia-cuda-nvcc "
            "nvidia-cuda-crt nvidia-nvvm nvidia-cuda-runtime nvidia-cuda-cccl"
        )
    return compiler


def compile(source: str | Path, arch: str = "sm_80", flags: Sequence[str] = ()) -> Module:
    """Compile a .cu file (or CUDA source text) with nvcc -ptx and load it. Results are cached by content."""
    cache = _BUILD / "ptx"
    cache.mkdir(exist_ok=True)
    version = arch.removeprefix("sm_")
    flags = [f"-gencode=arch=compute_{version},code=compute_{version}", *flags]
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        path = Path(source) if "\n" not in str(source) else Path(scratch, "k.cu")
        if path.parent == Path(scratch):
            path.write_text(str(source))
        # Headers count too: the key is the preprocessed source.
        lines = _run([nvcc(), "-E", *flags, path]).split("\n")
        body = "\n".join(line for line in lines if not line.startswith("#"))
        out = cache / (hashlib.sha256(repr((body, flags)).encode()).hexdigest()[:24] + ".ptx")
        if not out.exists():
            fresh = Path(scratch, "k.ptx")
            _run([nvcc(), "-ptx", *flags, "-o", fresh, path])
            fresh.replace(out)
    return Module(out.read_text(), out)
