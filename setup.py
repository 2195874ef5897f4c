"""Builds the libraries with CMake; needs torch's headers, never imports torch."""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def torch_root() -> Path:
    """The directory of the installed torch package, found without importing it."""
    spec = importlib.util.find_spec("torch")
    candidates = [
        os.environ.get("TORCH_ROOT"),
        # Under pip's build isolation torch is not importable, but purelib still is the target environment's.
        Path(sysconfig.get_path("purelib")) / "torch",
        Path(spec.origin).parent if spec and spec.origin else None,
    ]
    for candidate in filter(None, candidates):
        if (Path(candidate) / "include/torch/csrc/stable/library.h").exists():
            return Path(candidate).resolve()
    raise SystemExit(
        "transmla_ext: found no torch >= 2.10 to build against. Install torch first (pip install torch), or set "
        "TORCH_ROOT to the directory of an installed torch package."
    )


class CMakeBuild(build_ext):
    def run(self) -> None:
        import pybind11

        # Not build_temp, which is a new directory for each editable install.
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        package = (ROOT / "python" if self.inplace else Path(self.build_lib).resolve()) / "transmla_ext"
        # Tools are named at every run: under build isolation their paths change, and a cached one would be stale.
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DTORCH_ROOT={torch_root()}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)
        # Installing writes over a file; unlinked first, the old one stays whole for a process that has it mapped.
        for library in package.glob("*.so"):
            library.unlink()
        subprocess.run(["cmake", "--install", str(build), "--prefix", str(package)], check=True)


setup(ext_modules=[Extension("transmla_ext._core", [])], cmdclass={"build_ext": CMakeBuild})
