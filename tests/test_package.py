"""What is installed: libraries that need no particular torch, headers, a CMake package, the core module."""

import importlib.util
import re
import shutil
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch

import transmla_ext
from transmla_ext import _lib

PACKAGE = Path(transmla_ext.__file__).parent
needs_nm = pytest.mark.skipif(not shutil.which("nm"), reason="needs nm")


def symbols(library: str, *options: str) -> list[tuple[str, str]]:
    """Type and name of every symbol that nm lists."""
    listing = subprocess.run(["nm", *options, PACKAGE / library], check=True, capture_output=True, text=True).stdout
    return [(kind, name) for kind, name in re.findall(r"^[0-9a-f ]{16} (\S) (.+)$", listing, re.MULTILINE)]


def needed_from_elsewhere(library: str) -> set[str]:
    """Undefined symbols that neither the C and C++ runtimes nor libtransmla provide."""
    names = {name for _, name in symbols(library, "-D", "--undefined-only")}
    runtime = re.compile(r".*@(GLIBC|GLIBCXX|CXXABI|GCC)_|_ITM_|__gmon_start__|_ZNK?8transmla")
    return {name for name in names if not runtime.match(name)}


@needs_nm
@pytest.mark.parametrize("library", sorted(path.name for path in PACKAGE.glob("libtransmla_torch_*.so")))
def test_torch_symbols_are_of_the_stable_abi(library: str) -> None:
    needed = needed_from_elsewhere(library)
    assert "aoti_torch_get_sizes" in needed
    # What is weak may be missing: MKL's is called where it exists.
    assert {name for name in needed if not re.match(r"aoti_torch_|torch_", name)} <= {"MKL_Set_Num_Threads_Local"}


@needs_nm
def test_the_kernel_library_needs_neither_torch_nor_python() -> None:
    assert needed_from_elsewhere("libtransmla.so") == set()


@needs_nm
def test_the_core_module_needs_no_torch() -> None:
    (core,) = PACKAGE.glob("_core.*.so")
    assert {name for name in needed_from_elsewhere(core.name) if not re.match(r"_?Py", name)} == set()


@needs_nm
def test_no_instruction_set_lends_its_inline_functions_to_another() -> None:
    # An inline function outside transmla::<isa> is kept once, perhaps in the copy compiled for AVX-512.
    startup = {"_init", "_fini", "frame_dummy", "register_tm_clones", "deregister_tm_clones", "__do_global_dtors_aux"}
    functions = [name for kind, name in symbols("libtransmla.so") if kind in "tTWuV"]
    ours = [name for name in functions if re.match(r"_Z+N[KVR]*8transmla", name)]
    assert any("6scalar" in name or "4neon" in name for name in ours)
    cpu_detection = re.compile(r"__cpu_indicator_init|(get_available_features|has_cpu_feature|set_cpu_feature)\b")
    assert {name for name in {*functions} - {*ours} - startup if not cpu_detection.match(name)} == set()


def test_headers_and_cmake_package_are_installed() -> None:
    assert (Path(_lib.get_include()) / "transmla" / "transmla.h").is_file()
    assert (Path(_lib.get_cmake_dir()) / "transmlaConfig.cmake").is_file()


@pytest.mark.skipif(not _lib.has_cuda_kernels, reason="needs a build with nvcc")
def test_cuda_kernels_are_registered_without_a_gpu() -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key("transmla::merge_attn_states", "CUDA")


def test_no_engine_is_imported_until_it_asks() -> None:
    show = "import sys, transmla_ext; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", show], check=True, capture_output=True, text=True)
    loaded = run.stdout.split()
    assert "transmla_ext.runtime" in loaded
    assert not [name for name in loaded if name.split(".")[0] == "vllm" or name.startswith("transmla_ext.plugins")]


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="needs an environment without vLLM")
def test_the_vllm_plugin_is_declared_and_named_without_vllm() -> None:
    (plugin,) = (plugin for plugin in entry_points(group="vllm.general_plugins") if plugin.name == "transmla_ext")
    register = plugin.load()
    with pytest.raises(ModuleNotFoundError, match="No module named 'vllm'"):
        register()


def test_build_info_names_what_was_built() -> None:
    info = _lib.core.build_info()
    assert re.fullmatch(r"\d+\.\d+\.\d+", info["version"])
    assert set(_lib.core.available_isas()) <= set(info["cpu_isas"])
    assert bool(info["cuda_archs"]) == _lib.has_cuda_kernels


def test_an_instruction_set_can_be_forced_and_reset() -> None:
    available = _lib.core.available_isas()
    try:
        _lib.core.force_isa(available[0])
        assert _lib.core.cpu_isa() == available[0]
        with pytest.raises(ValueError, match=f"isa must be one of {', '.join(available)}, got mmx"):
            _lib.core.force_isa("mmx")
        assert _lib.core.cpu_isa() == available[0]
    finally:
        _lib.core.reset_isa()
    assert _lib.core.cpu_isa() == available[-1]


def test_splits_feed_every_worker_and_stay_worth_their_merge() -> None:
    plan = _lib.core.plan_splits
    assert plan(batch_size=1, num_rows=32, max_seqlen=65536, num_workers=8) >= 8
    assert plan(batch_size=64, num_rows=32, max_seqlen=65536, num_workers=8) == 1
    assert plan(batch_size=1, num_rows=32, max_seqlen=100, num_workers=8) == 1
    assert plan(batch_size=0, num_rows=32, max_seqlen=0, num_workers=8) == 1


def test_block_pool_hands_out_every_block_once() -> None:
    pool = _lib.core.BlockPool(5)
    first, rest = pool.allocate(2), pool.allocate(3)
    assert sorted(first + rest) == list(range(5))
    assert (pool.num_free, pool.num_blocks) == (0, 5)
    pool.free(first)
    assert sorted(pool.allocate(2)) == sorted(first)


def test_block_pool_allocates_all_or_nothing() -> None:
    pool = _lib.core.BlockPool(3)
    pool.allocate(1)
    with pytest.raises(RuntimeError, match="out of cache blocks: 3 wanted, 2 of 3 free"):
        pool.allocate(3)
    assert pool.num_free == 2


@pytest.mark.parametrize("blocks", [[0, 0], [0, 7], [-1], [0, 2]])
def test_block_pool_frees_all_or_nothing(blocks: list[int]) -> None:
    pool = _lib.core.BlockPool(3)
    assert pool.allocate(2) == [0, 1]
    with pytest.raises(ValueError, match="is not in use"):
        pool.free(blocks)
    assert pool.num_free == 1
    pool.free([1, 0])
    assert pool.num_free == 3
