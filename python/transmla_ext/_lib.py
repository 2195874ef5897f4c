"""Loads the compiled libraries, once; the only module that knows their file names."""

from __future__ import annotations

from pathlib import Path

import torch

__all__ = ["core", "get_cmake_dir", "get_include", "has_cuda_kernels"]

_HERE = Path(__file__).parent
_NOT_BUILT = (
    "transmla_ext: the compiled libraries are missing from {}. Install the package (pip install .), or build it in "
    "place (pip install -e . --no-build-isolation)."
)

try:
    from . import _core as core
except ImportError as error:
    raise ImportError(_NOT_BUILT.format(_HERE)) from error


def _load(name: str, *, required: bool) -> bool:
    path = _HERE / f"libtransmla_torch_{name}.so"
    if path.exists():
        torch.ops.load_library(path)
    elif required:
        raise ImportError(_NOT_BUILT.format(_HERE))
    return path.exists()


_load("cpu", required=True)
has_cuda_kernels = _load("cuda", required=False)


def get_include() -> str:
    """Directory of the C++ headers: ``#include <transmla/transmla.h>``."""
    return str(_HERE / "include")


def get_cmake_dir() -> str:
    """Directory for CMAKE_PREFIX_PATH, or ``-Dtransmla_DIR``: ``find_package(transmla)``."""
    return str(_HERE / "lib" / "cmake" / "transmla")
