"""What a bug report has to say about the machine and the build."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from ._lib import core

__all__ = ["report"]

_PACKAGES = ("transmla_ext", "torch", "transformers", "safetensors", "gguf", "numpy")


def report() -> str:
    """One `name: value` a line."""
    rows = {name: _version(name) for name in _PACKAGES}
    rows["python"] = platform.python_version()
    rows["platform"] = platform.platform()
    rows["cpu kernels"] = f"{core.cpu_isa()} (of {', '.join(core.available_isas())})"
    rows["threads"] = str(torch.get_num_threads())
    rows["cuda device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    rows |= {f"build {key}": str(value) for key, value in core.build_info().items()}
    width = max(map(len, rows))
    return "\n".join(f"{key:<{width}}  {value}" for key, value in rows.items())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
