"""The C++ API as somebody outside uses it: with CMake, without Python and without torch."""

import shutil
import subprocess
from pathlib import Path

import pytest

from transmla_ext import _lib

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(not shutil.which("cmake") or not shutil.which("ninja"), reason="needs cmake and ninja")


def build_and_run(build: Path, *options: str, programs: tuple[str, ...]) -> None:
    subprocess.run(["cmake", "-S", HERE, "-B", build, "-G", "Ninja", *options], check=True)
    subprocess.run(["cmake", "--build", build, "--target", *programs], check=True)
    right = [f"{isa}: 0 wrong numbers" for isa in _lib.core.available_isas()]
    for program in programs:
        result = subprocess.run([build / program], capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        assert result.stdout.splitlines() == right


def test_a_program_finds_the_installed_package_and_decodes(tmp_path: Path) -> None:
    build_and_run(tmp_path, f"-DCMAKE_PREFIX_PATH={_lib.get_cmake_dir()}", programs=("decode",))


def test_kernels_are_clean_under_address_and_undefined_behaviour_sanitizers(tmp_path: Path) -> None:
    build_and_run(
        tmp_path,
        f"-DTRANSMLA_SOURCE={HERE.parent.parent}",
        "-DTRANSMLA_BINDINGS=OFF",
        "-DTRANSMLA_SANITIZE=address,undefined",
        "-DCMAKE_BUILD_TYPE=Debug",
        "-DCMAKE_CXX_FLAGS_DEBUG=-O0",
        programs=("decode", "linear", "prefill", "sweep"),
    )
