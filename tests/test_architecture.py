"""Which room may know which: include <- cpu, cuda <- bindings <- _lib <- ops <- models, convert, runtime <- cli."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
PACKAGE = ROOT / "python" / "transmla_ext"

CXX_ROOMS = {
    "include": set(),
    "cpu": {"include"},
    "cuda": {"include"},
    "bindings": {"include", "cpu", "cuda"},
}

PYTHON_ROOMS = {
    "errors": set(),
    "config": set(),
    "reference": set(),
    "architectures": {"config", "errors"},
    "checkpoint": {"architectures", "config", "errors"},
    "_lib": {"_core"},
    "ops": {"_lib"},
    "env": {"_lib"},
    "models": {"architectures", "checkpoint", "config", "errors", "ops"},
    "text": set(),
    "convert": {"architectures", "checkpoint", "config", "errors", "models", "ops", "text"},
    "heal": {"architectures", "checkpoint", "config", "convert", "errors", "models", "text"},
    "runtime": {"_lib", "architectures", "checkpoint", "config", "errors", "models", "ops"},
    "evaluate": {"checkpoint", "errors", "models", "runtime", "text"},
    "serve": {"errors", "runtime"},
    "plugins": {"architectures", "checkpoint", "config", "errors", "models", "runtime"},
    "capacity": {"architectures", "checkpoint", "config", "models"},
    "cli": {"architectures", "capacity", "convert", "env", "errors", "evaluate", "heal", "runtime", "serve"},
    "__main__": {"cli"},
}


def cxx_files(room: str) -> list[Path]:
    return [path for path in (CSRC / room).rglob("*") if path.suffix in {".h", ".cpp", ".cu", ".cuh"}]


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*([<"][^>"]+)[>"]', path.read_text(), flags=re.MULTILINE)


def room_of_header(path: Path, header: str) -> str:
    for base in (path.parent, CSRC / "include", CSRC):
        if (base / header).exists():
            return (base / header).resolve().relative_to(CSRC).parts[0]
    raise AssertionError(f"{path.relative_to(ROOT)} includes {header}, which is in no room")


def modules(room: str) -> list[Path]:
    return sorted((PACKAGE / room).rglob("*.py")) if (PACKAGE / room).is_dir() else [PACKAGE / f"{room}.py"]


def imported_rooms(path: Path) -> Iterator[str]:
    """First parts of the names of this package's modules that a file imports, anywhere in it."""
    package = ("transmla_ext", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            source = [*base, *(node.module.split(".") if node.module else [])]
            names = [[*source, alias.name] for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        else:
            continue
        yield from (name[1] for name in names if name[0] == "transmla_ext" and len(name) > 1)


@pytest.mark.parametrize("room", CXX_ROOMS)
def test_cxx_rooms_include_only_what_lies_below(room: str) -> None:
    assert cxx_files(room)
    for path in cxx_files(room):
        for header in includes(path):
            if header.startswith('"'):
                assert room_of_header(path, header[1:]) in {room, *CXX_ROOMS[room]}, (path, header)


def test_only_the_bindings_include_torch_or_python() -> None:
    for room in ("include", "cpu", "cuda"):
        for path in cxx_files(room):
            assert not [h for h in includes(path) if re.match(r"[<\"](torch|ATen|c10|pybind11|Python)", h)], path
    assert not [h for h in includes(CSRC / "bindings" / "core.cpp") if h.startswith("<torch")]


def test_the_public_headers_include_no_cuda() -> None:
    for path in cxx_files("include"):
        assert not [header for header in includes(path) if "cuda" in header], path


def test_kernels_include_c_headers_only() -> None:
    # Compiled once per instruction set: of an inline function of std:: the linker keeps any of the copies.
    once = {"dispatch.cpp", "isa.cpp", "plan_splits.cpp"}
    for path in cxx_files("cpu"):
        if path.name not in once:
            assert all(header.endswith(".h") for header in includes(path)), path


def test_every_python_module_has_a_room() -> None:
    rooms = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert rooms - {"__init__", "__pycache__", "include", "lib"} == set(PYTHON_ROOMS)


@pytest.mark.parametrize("room", PYTHON_ROOMS)
def test_python_rooms_import_only_what_lies_below(room: str) -> None:
    for path in modules(room):
        assert set(imported_rooms(path)) <= {room, *PYTHON_ROOMS[room]}, path


def test_only_lib_loads_libraries_and_only_ops_calls_them() -> None:
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        if path.name != "_lib.py":
            assert not re.search(r"load_library|ctypes|\bdlopen\b", text), path
        if path.name != "ops.py":
            assert "torch.ops.transmla" not in text, path
