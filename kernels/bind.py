# SPDX-License-Identifier: Apache-2.0
"""Bind a rule's text to a library: the same code object, with that library's primitives as globals.

    step = bind(rule.stages[0].function.text, "torch")     # runs on tensors

A library is three functions, `divide`, `sqrt` and `where`, each rounding once (IEEE), and for
Triton a decorator. Hypers are 0-dim tensors or scalars of the compute type: with Python floats
94 % of the fp32 products differ in torch. Libraries are imported when they are first bound.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Mapping
from functools import cache
from types import FunctionType
from typing import Any

from .language import PRIMITIVES, Text, analyse


def _numpy() -> dict[str, Any]:
    import numpy

    def where(condition: Any, a: Any, b: Any) -> Any:
        chosen = numpy.where(condition, a, b)
        return chosen.astype(numpy.float32) if _are_literals(a, b) else chosen

    return {"divide": numpy.divide, "sqrt": numpy.sqrt, "where": where}


def _torch() -> dict[str, Any]:
    import torch

    def sqrt(x: torch.Tensor) -> torch.Tensor:
        # Torch's own fp32 square root on the CPU is 1 ulp off for 17 % of its inputs. The fp64 one
        # is right where it is rounded to fp32, and hypers of fp64 take it as it is.
        if x.dtype == torch.float64:
            return torch.from_numpy(_ieee_sqrt(x)) if x.device.type == "cpu" else torch.sqrt(x)
        return torch.sqrt(x.double()).to(x.dtype)

    def _ieee_sqrt(x: torch.Tensor) -> Any:
        import numpy

        with numpy.errstate(invalid="ignore"):
            return numpy.asarray(numpy.sqrt(x.detach().numpy()))

    def where(condition: torch.Tensor, a: Any, b: Any) -> torch.Tensor:
        chosen = torch.where(condition, a, b)
        return chosen.float() if _are_literals(a, b) else chosen

    return {"divide": torch.div, "sqrt": sqrt, "where": where}


def _are_literals(a: object, b: object) -> bool:
    """Whether a choice between two literals is made, whose type the library cannot know.

    They would become fp64, and all that follows with them; as fp32, which holds every literal, the
    choice is exact and takes the compute type of what it meets.
    """
    return type(a) in (int, float) and type(b) in (int, float)


def _triton() -> dict[str, Any]:
    import triton
    import triton.language as tl

    @triton.jit
    def divide(a, b):  # type: ignore[no-untyped-def]
        if a.dtype == tl.float64 or b.dtype == tl.float64:
            return a / b
        else:
            return tl.div_rn(a, b)

    @triton.jit
    def sqrt(x):  # type: ignore[no-untyped-def]
        if x.dtype == tl.float64:
            return tl.sqrt(x)
        else:
            return tl.sqrt_rn(x)

    @triton.jit
    def where(condition, a, b):  # type: ignore[no-untyped-def]
        return tl.where(condition, a, b)

    return {"divide": divide, "sqrt": sqrt, "where": where, "tl": tl}


_LIBRARIES: dict[str, Callable[[], dict[str, Any]]] = {
    "numpy": _numpy,
    "torch": _torch,
    "triton": _triton,
}


@cache
def _primitives(library: str) -> Mapping[str, Any]:
    return _LIBRARIES[library]()


@cache
def bind(text: Text, library: str) -> Callable[..., Any]:
    """One function of the language, and all that it calls, bound to "numpy", "torch" or "triton".

    Raises:
        RuleError: the text is not in the language.
        ImportError: the library is not installed.
    """
    function = analyse(text)
    assert isinstance(text, FunctionType)
    bound = dict(_primitives(library))
    bound |= {call.name: bind(call.text, library) for call in function.calls}
    assert set(text.__code__.co_names) <= {*bound, *PRIMITIVES, "range"}
    bound["__name__"] = f"{text.__module__} bound to {library}"
    # An operator may import (torch's first comparison of a tensor with a number does), and an
    # import looks here for __import__: without it a process's first step raises a KeyError.
    bound["__builtins__"] = builtins
    made = FunctionType(text.__code__, bound, text.__name__)
    if library != "triton":
        return made
    import triton

    made.__module__ = text.__module__
    jitted: Callable[..., Any] = triton.jit(made)
    return jitted
