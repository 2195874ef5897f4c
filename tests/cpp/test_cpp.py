"""The C++ API as somebody outside uses it: with CMake, without Python and without torch."""

import shutil
import subprocess
from pathlib import Path

import pytest

from transmla_ext import _lib

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(not shutil.which("cmake") or not shutil.which("ninja"), reason="needs cmake and ninja")


def decode(build: Path, *options: str) -> str:
    subprocess.run(["cmake", "-S", HERE, "-B", build, "-G", "Ninja", *options], check=True)
    subprocess.run(["cmake", "--build", build, "--target", "decode"], check=True)
    return subprocess.run([build / "decode"], check=True, capture_output=True, text=True).stdout


def test_a_program_finds_the_installed_package_and_decodes(tmp_path: Path) -> None:
    output = decode(tmp_path, f"-DCMAKE_PREFIX_PATH={_lib.get_cmake_dir()}")
    assert [line.split(":")[0] for line in output.splitlines()] == _lib.core.available_isas()


def test_decode_is_clean_under_address_and_undefined_behaviour_sanitizers(tmp_path: Path) -> None:
    output = decode(
        tmp_path,
        f"-DTRANSMLA_SOURCE={HERE.parent.parent}",
        "-DTRANSMLA_BINDINGS=OFF",
        "-DTRANSMLA_SANITIZE=address,undefined",
        "-DCMAKE_BUILD_TYPE=Debug",
        "-DCMAKE_CXX_FLAGS_DEBUG=-O1",
    )
    assert [line.split(":")[0] for line in output.splitlines()] == _lib.core.available_isas()
