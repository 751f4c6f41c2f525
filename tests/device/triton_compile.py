# SPDX-License-Identifier: Apache-2.0
"""Compile the Triton kernels for NVIDIA's and AMD's GPUs, with none at hand; read what comes out.

Run by ``make check-device`` for two rules; a slow test takes every rule (`examined`). Fails if a
fused multiply-add or an approximate operation is in it, or if an elementwise kernel moves values
between threads.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pyupdate.kernels import triton_passes, triton_reduce
from pyupdate.kernels.rules import RULES
from pyupdate.kernels.triton_forms import RuleForm, form_of

TARGETS = {
    **{f"sm_{c}": GPUTarget("cuda", c, 32) for c in (80, 90, 100, 120)},
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx1100": GPUTarget("hip", "gfx1100", 32),
}
STORAGES = {
    "fp32": (tl.float32, tl.float32),
    "bf16": (tl.bfloat16, tl.bfloat16),
    "bf16 with fp32 state": (tl.bfloat16, tl.float32),
    "fp64": (tl.float64, tl.float64),
    "fp16": (tl.float16, tl.float16),
    "fp16 with fp32 state": (tl.float16, tl.float32),
}
# Halves differ in how they are widened and rounded alone; the slow test has all.
SOME_STORAGES = ("fp32", "bf16", "bf16 with fp32 state", "fp64")
# Each target for a rule of one stage or one with sums; test_triton.py runs both on all of NVIDIA's.
SOME_TARGETS = {
    "adamw": ("sm_90", "gfx1100"),
    "lamb": ("gfx942",),
}
FORBIDDEN = {
    "ptx": re.compile(r"\b(fma|mad)\.(rn\.)?f|\.approx|\.ftz|div\.full"),
    # AMD's division is made of fused operations, so what LLVM was asked for is looked at.
    "llir": re.compile(r"llvm\.fma\.f(32|64)|llvm\.fmuladd|\b(f\w+) (fast|contract|arcp|afn)\b"),
}
MOVED = {
    "ptx": re.compile(r"bar\.sync|ldmatrix|st\.shared"),
    "amdgcn": re.compile(r"\bds_(write|store)_"),
}
TYPES = {
    **dict.fromkeys(("rows", "work", "chunk_of", "row_of", "class_table"), "*i64"),
    **dict.fromkeys(("first_chunks", "first_rows"), "*i64"),
    **dict.fromkeys(("scale", "found", "flags"), "*fp32"),
    **dict.fromkeys(("classes", "request", "result", "sums", "row_sums", "per_tensor"), "*fp64"),
    **dict.fromkeys(("ticket", "tickets"), "*i32"),
    **dict.fromkeys(("total_chunks", "total_rows", "member_count", "class_count"), "i32"),
    "numbers": "*fp64",
}


def compiled(kernel: Any, target: GPUTarget, warps: int, **constants: Any) -> Any:
    """A kernel compiled as the back end does, all pointers aligned."""
    names = [parameter.name for parameter in kernel.params]
    signature = {name: TYPES.get(name, "constexpr") for name in names}
    assert [n for n in names if signature[n] == "constexpr"] == list(constants)
    attributes = {
        (k,): [["tt.divisibility", 16]] for k, n in enumerate(names) if signature[n][0] == "*"
    }
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs=values, attrs=attributes)
    options = {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": False}
    return triton.compile(source, target=target, options=options)


def kernels(
    form: RuleForm, target: GPUTarget, storages: Iterable[str]
) -> Iterator[tuple[str, Any]]:
    """Every kernel of a rule's step."""
    preparing = {
        "prepare": form.prepare,
        "number_count": form.numbers,
        "counted": form.counted,
        "results": form.results,
        "class_width": form.class_width,
    }
    yield (
        "prepare",
        compiled(
            triton_reduce.prepare_pass,
            target,
            1,
            **preparing,
            is_scaled=True,
            is_found=False,
            decides=True,
        ),
    )
    for name in storages:
        param, state = STORAGES[name]
        yield (
            f"reduce {name}",
            compiled(
                triton_reduce.reduce_pass,
                target,
                8,
                **preparing,
                grad=param,
                aligned=True,
                is_inf_norm=False,
                is_scaled=True,
                is_found=False,
                decides=True,
            ),
        )
        for s, stage in enumerate(form.stages):
            sizes = [(param if r < 2 else state).primitive_bitwidth // 8 for r in stage.roles]
            block, warps = triton_passes.block_of(tuple(sizes), bool(stage.sums))
            yield (
                f"{'stage with sums' if stage.sums else 'apply'} {name}",
                compiled(
                    triton_passes.apply_pass,
                    target,
                    warps,
                    text=stage.wide_text if param == tl.float64 else stage.text,
                    takes=stage.takes,
                    gives=stage.gives,
                    sum_indices=stage.sums,
                    turn_text=stage.turn,
                    turn_takes=stage.turn_takes,
                    turn_gives=stage.turn_gives,
                    ends=bool(stage.sums) or stage.turn is not None,
                    counted=form.counted,
                    class_width=form.class_width,
                    per_tensor_width=form.per_tensor,
                    stage=s,
                    block=block,
                    param=param,
                    state=state,
                    aligned=True,
                    clips=True,
                    is_by_chance=False,
                    averages=False,
                    is_joint=False,
                ),
            )


def examined(rule: str, target: str, storages: Iterable[str]) -> tuple[int, list[str]]:
    """How many kernels were compiled, and what breaks the contract in them."""
    count, faults = 0, []
    for what, kernel in kernels(form_of(RULES[rule]), TARGETS[target], storages):
        text = kernel.asm.get("ptx", kernel.asm["llir"])
        pattern = FORBIDDEN["ptx" if "ptx" in kernel.asm else "llir"]
        found = {match.group(0) for match in pattern.finditer(text)}
        if what.startswith("apply"):
            machine = "ptx" if "ptx" in kernel.asm else "amdgcn"
            moves = MOVED[machine].finditer(kernel.asm[machine])
            found |= {match.group(0) for match in moves}
        count += 1
        if found:
            faults.append(f"{rule} {target} {what}: holds {sorted(found)}")
    return count, faults


def main() -> int:
    """Compile two rules; the number of kernels that broke the contract."""
    failures = 0
    for rule, targets in SOME_TARGETS.items():
        for target in targets:
            count, faults = examined(rule, target, SOME_STORAGES)
            failures += len(faults)
            for fault in faults:
                sys.stdout.write(f"triton {fault}\n")
            sys.stdout.write(f"triton {rule} {target}: {count} kernels\n")
    return failures


if __name__ == "__main__":
    sys.exit(main())
