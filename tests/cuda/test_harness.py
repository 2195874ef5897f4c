"""The harness itself: its structs are those of C++, and what a GPU would refuse is refused."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path
from typing import Any

import harness
import ptxvm
import pytest
import torch
from torch import Tensor

STRUCTS = re.findall(
    r"^struct (\w+Params) \{", "".join(p.read_text() for p in (harness.CSRC / "include").rglob("*.h")), re.MULTILINE
)


def test_every_params_struct_has_the_layout_of_cpp(tmp_path: Path) -> None:
    assert len(STRUCTS) >= 7
    lines = ["#include <cstddef>", '#include "transmla/transmla.h"', "using namespace transmla;"]
    for name in STRUCTS:
        twin = harness.params_type(name)
        lines.append(f"static_assert(sizeof({name}) == {ctypes.sizeof(twin)});")
        lines += [f"static_assert(offsetof({name}, {f}) == {getattr(twin, f).offset});" for f, _ in twin._fields_]
    source = tmp_path / "layout.cpp"
    source.write_text("\n".join(lines))
    subprocess.run(["c++", "-std=c++17", "-fsyntax-only", f"-I{harness.CSRC / 'include'}", source], check=True)


def merge_args() -> dict[str, Any]:
    out = {name: torch.zeros(1, 1, 2, 8) for name in ("out_a", "out_b", "out")}
    lse: dict[str, Tensor] = {name: torch.zeros(1, 2, 1) for name in ("lse_a", "lse_b", "lse")}
    return out | lse | {"dtype": torch.float32, "batch_size": 1, "seqlen_q": 1, "num_heads": 2, "head_dim": 8}


def test_a_missing_or_misspelt_field_is_refused() -> None:
    args = merge_args()
    args["heads"] = args.pop("num_heads")
    with pytest.raises(AssertionError, match=r"fields missing or unknown: \['heads', 'num_heads'\]"):
        harness.launch("merge_attn_states", "sm_80", args)


@pytest.mark.parametrize("name", ["out_a", "lse_b", "out", "lse"])
def test_a_tensor_that_is_too_short_is_found(arch: str, name: str) -> None:
    args = merge_args()
    args[name] = args[name].flatten()[:-1]
    with pytest.raises(ptxvm.PtxError, match=name):
        harness.launch("merge_attn_states", arch, args)


def test_pointers_to_const_are_registered_read_only() -> None:
    assert harness.params_type("MergeAttnStatesParams").readonly == {"out_a", "out_b", "lse_a", "lse_b"}
