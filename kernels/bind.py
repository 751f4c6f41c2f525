# SPDX-License-Identifier: Apache-2.0
"""Bind a rule's text to a library: the same code object, with that library's primitives as globals.

    step = bind(rule.stages[0].function.text, "torch")     # runs on tensors

A library is three functions, `divide`, `sqrt` and `where`, each rounding once (IEEE), and for
Triton a decorator. Hypers are 0-dim tensors or scalars of the compute type: with Python floats
94 % of the fp32 products differ in torch. Libraries are imported when they are first bound.
"""

from __future__ import annotations

import ast
import builtins
import hashlib
import inspect
from collections.abc import Callable
from functools import cache, partial
from types import CodeType, FunctionType
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
    import triton.language as tl
    from triton.language.core import builtin

    # Builtins, not jitted functions: they take literals, too.

    @builtin  # type: ignore[untyped-decorator]
    def divide(a: Any, b: Any, _semantic: Any = None) -> Any:
        wide = any(_is_tensor(x) and x.type.scalar == tl.float64 for x in (a, b))
        a, b = (_tensor(x, tl.float64 if wide else tl.float32, _semantic) for x in (a, b))
        return _semantic.truediv(a, b) if wide else tl.div_rn(a, b, _semantic=_semantic)

    @builtin  # type: ignore[untyped-decorator]
    def sqrt(x: Any, _semantic: Any = None) -> Any:
        x = _tensor(x, tl.float32, _semantic)
        root = tl.sqrt if x.type.scalar == tl.float64 else tl.sqrt_rn
        return root(x, _semantic=_semantic)

    @builtin  # type: ignore[untyped-decorator]
    def where(condition: Any, a: Any, b: Any, _semantic: Any = None) -> Any:
        return tl.where(condition, a, b, _semantic=_semantic)

    @builtin  # type: ignore[untyped-decorator]
    def wide(x: Any, _semantic: Any = None) -> Any:
        return _tensor(x, tl.float64, _semantic)

    def _is_tensor(x: Any) -> bool:
        return isinstance(x, tl.tensor)

    def _tensor(x: Any, dtype: Any, semantic: Any) -> Any:
        return x if _is_tensor(x) else semantic.scalar_constant(x.value, dtype)

    primitives = {"divide": divide, "sqrt": sqrt, "where": where, "wide": wide}
    return primitives | {"tl": tl, "range": tl.static_range}


def _triton_scalar() -> dict[str, Any]:
    # Of blocks a loop must be unrolled: what is a number before it is a block behind it. Of
    # numbers it may stay one, which compiles in a tenth of the time (log and exp: 1 s, not 10).
    return _primitives("triton") | {"range": range}


def _jitted(made: FunctionType, text: Text, is_wide: bool) -> Callable[..., Any]:
    """A function that Triton compiles, from the same text.

    A literal that has a name of its own is fp32 for Triton, whatever it meets later, so in fp64 the
    literals of the text are said to be wide. Triton keeps what it compiled under a hash of the
    text, in which its primitives are not: their digest is put there.
    """
    import triton

    made.__module__ = text.__module__
    jitted = triton.jit(made)
    tree = ast.parse(jitted.src)
    if is_wide:
        tree = ast.fix_missing_locations(_Widening().visit(tree))
    digest = hashlib.sha256(inspect.getsource(_triton).encode()).hexdigest()
    jitted._unsafe_update_src(f"{ast.unparse(tree)}\n# primitives {digest}\n")
    function: Callable[..., Any] = jitted
    return function


class _Widening(ast.NodeTransformer):
    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if not isinstance(node.value, float):
            return node
        return ast.Call(ast.Name("wide", ast.Load()), [node], [])


def _tensorflow(dtype: str) -> dict[str, Any]:
    import tensorflow as tf

    def tensor(value: Any) -> Any:
        # A literal by itself has no type; TensorFlow, unlike the others, never promotes.
        return tf.convert_to_tensor(value, dtype)

    def divide(a: Any, b: Any) -> Any:
        divisor = tensor(b)
        if not tf.executing_eagerly() and divisor.op.type == "Sqrt":
            # XLA would multiply by its rsqrt: in Adadelta 10 units in the last place.
            divisor = tf.where(divisor >= 0.0, divisor, tensor(float("nan")))
        return tf.math.divide(tensor(a), divisor)

    def sqrt(x: Any) -> Any:
        return tf.sqrt(tensor(x))

    def where(condition: Any, a: Any, b: Any) -> Any:
        return tf.where(condition, tensor(a), tensor(b))

    return {"divide": divide, "sqrt": sqrt, "where": where}


class _WholeNumbers:
    """What (x + this) - this rounds x by in TensorFlow, in the place of a large number.

    The rounding to a whole number that `scalar.py` writes as adding and taking away 2^52 is nothing
    to TensorFlow's and XLA's optimizers, which put constants together: they would leave x as it is.
    TensorFlow asks the right operand where it cannot make a tensor of it.
    """

    numbers = (4503599627370496.0, 6755399441055744.0)

    def __radd__(self, x: Any) -> Any:
        import tensorflow as tf

        return tf.round(x)  # to the nearest, ties to even, as the sum would be

    def __rsub__(self, x: Any) -> Any:
        return x


def _for_tensorflow(code: CodeType) -> CodeType:
    whole = _WholeNumbers()
    constants = (whole if c in _WholeNumbers.numbers else c for c in code.co_consts)
    return code.replace(co_consts=tuple(constants))


_LIBRARIES: dict[str, Callable[[], dict[str, Any]]] = {
    "numpy": _numpy,
    "torch": _torch,
    "triton": _triton,
    "triton fp64": _triton,
    "triton scalar": _triton_scalar,
    "tensorflow float32": partial(_tensorflow, "float32"),
    "tensorflow float64": partial(_tensorflow, "float64"),
}


@cache
def _primitives(library: str) -> dict[str, Any]:
    return _LIBRARIES[library]()


@cache
def bind(text: Text, library: str) -> Callable[..., Any]:
    """One function of the language, and all that it calls, bound to a library.

    Args:
        text: the function.
        library: "numpy", "torch", "triton"; of fp64, "triton fp64" for blocks and "triton scalar"
            for numbers; "tensorflow float32" or "tensorflow float64".

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
    code = _for_tensorflow(text.__code__) if library.startswith("tensorflow") else text.__code__
    made = FunctionType(code, bound, text.__name__)
    return _jitted(made, text, library != "triton") if "triton" in library else made
