# SPDX-License-Identifier: Apache-2.0
"""Steps CPU tensors by the Triton kernels in Triton's own interpreter; a process of its own.

    TRITON_INTERPRET=1 python -m device.triton_interpreted adamw lamb

Prints each rule that has the bits of the back end `cpu`. A second opinion on what the kernels say:
nothing of device/ptx and nothing of Triton's compiler takes part. In fp32 alone: Triton 3.9's
interpreter rounds to bfloat16 by cutting.

The interpreter runs the kernels' Python, and where that differs from what is compiled, this file
stands between: a loop's counter and what `min` and `max` choose are tensors when compiled; the
rules' texts, whose source is made (kernels/bind.py), are plain functions here.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Iterator
from types import FunctionType
from typing import Any

import torch
import triton.language as tl
from triton.runtime import interpreter
from triton_training import assert_alike, gradients, trained

import pyupdate
from pyupdate import backends
from pyupdate.kernels import bind

from . import triton_backend
from .triton_on_cpu import Machine

SIZES = (0, 1, 70, 1025, 16_385)


def _tensor(x: Any, dtype: Any = tl.float32) -> Any:
    is_tensor = isinstance(x, tl.tensor)
    return x if is_tensor else interpreter.interpreter_semantic.scalar_constant(x, dtype)


def divide(a: Any, b: Any) -> Any:
    wide = any(isinstance(x, tl.tensor) and x.type.scalar == tl.float64 for x in (a, b))
    a, b = (_tensor(x, tl.float64 if wide else tl.float32) for x in (a, b))
    return a / b if wide else tl.div_rn(a, b)


def sqrt(x: Any) -> Any:
    return tl.sqrt(x) if x.type.scalar == tl.float64 else tl.sqrt_rn(x)


def where(condition: Any, a: Any, b: Any) -> Any:
    return tl.where(condition, a, b)


def counted(*bounds: Any) -> Iterator[Any]:
    return (interpreter._implicit_cvt(k) for k in range(*map(int, bounds)))


def smaller(a: Any, b: Any) -> Any:
    return tl.minimum(a, b) if isinstance(a, tl.tensor) else builtins.min(a, b)


def larger(*values: Any) -> Any:
    is_tensor = isinstance(values[0], tl.tensor)
    return tl.maximum(*values) if is_tensor else builtins.max(*values)


def primitives() -> dict[str, Any]:
    return {"divide": divide, "sqrt": sqrt, "where": where, "tl": tl}


def plain(made: FunctionType, *_: object) -> FunctionType:
    return made


def install() -> None:
    """Before the kernels are imported, for they bind texts."""
    bind._LIBRARIES |= dict.fromkeys(("triton", "triton fp64", "triton scalar"), primitives)
    bind._jitted = plain  # type: ignore[assignment]
    from pyupdate.kernels import triton_order, triton_passes, triton_reduce, triton_tail

    assert isinstance(triton_passes.apply_pass, interpreter.InterpretedFunction)
    for module in (triton_order, triton_passes, triton_reduce, triton_tail):
        vars(module).update(range=counted, min=smaller, max=larger)
    is_triton = {"triton": triton_backend.ROW}
    backends.BACKENDS = tuple(is_triton.get(row.name, row) for row in backends.BACKENDS)
    triton_backend._machine.append(Machine(90))
    triton_backend._compiled.append(True)


def main() -> None:
    install()
    for rule in sys.argv[1:]:
        grads = gradients(SIZES, [torch.float32], 3)
        made = []
        for name in ("triton", "cpu"):
            with pyupdate.use_backend(name):
                made.append(trained(rule, [torch.float32], grads, SIZES, max_norm=1.0))
        assert_alike(*made, rule)
        sys.stdout.write(f"{rule}\n")


if __name__ == "__main__":
    main()
