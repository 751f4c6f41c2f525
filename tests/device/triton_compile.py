# SPDX-License-Identifier: Apache-2.0
"""Compile AdamW's rule text in a Triton kernel for three GPUs, with none at hand; read the PTX.

Run by ``make check-device``. Fails if a fused multiply-add or an approximate operation is in it.
"""

from __future__ import annotations

import re
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pyupdate.kernels.bind import bind
from pyupdate.kernels.rules import adamw

RULE = bind(adamw.stages[0].function.text, "triton")
FORBIDDEN = re.compile(r"\b(fma|mad)\.(rn\.)?f|\.approx|\.ftz|div\.full")


@triton.jit
def kernel(param, grad, exp_avg, exp_avg_sq, hyper, size, rule: tl.constexpr, block: tl.constexpr):
    """One block a program; hypers are read through memory."""
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < size
    p, m, v = rule(
        tl.load(param + at, inside),
        tl.load(grad + at, inside),
        tl.load(exp_avg + at, inside),
        tl.load(exp_avg_sq + at, inside),
        tl.load(hyper),
        tl.load(hyper + 1),
        tl.load(hyper + 2),
        tl.load(hyper + 3),
        tl.load(hyper + 4),
        tl.load(hyper + 5),
        tl.load(hyper + 6),
    )
    tl.store(param + at, p, inside)
    tl.store(exp_avg + at, m, inside)
    tl.store(exp_avg_sq + at, v, inside)


def main() -> int:
    """Compile for each architecture; the number of those that broke the contract."""
    failures = 0
    for dtype in ("fp32", "fp64"):
        signature = {
            **dict.fromkeys(("param", "grad", "exp_avg", "exp_avg_sq", "hyper"), f"*{dtype}"),
            "size": "i64",
            "rule": "constexpr",
            "block": "constexpr",
        }
        source = ASTSource(kernel, signature, constexprs={(6,): RULE, (7,): 1024})
        for capability in (80, 90, 100):
            target = GPUTarget("cuda", capability, 32)
            compiled = triton.compile(source, target=target, options={"enable_fp_fusion": False})
            found = sorted({match.group(0) for match in FORBIDDEN.finditer(compiled.asm["ptx"])})
            failures += bool(found)
            size = len(compiled.asm["cubin"])
            verdict = f"holds {found}" if found else "keeps the contract"
            sys.stdout.write(f"triton adamw {dtype} sm_{capability}: {size} bytes, {verdict}\n")
    return failures


if __name__ == "__main__":
    sys.exit(main())
