# SPDX-License-Identifier: Apache-2.0
"""Whether XLA takes what was traced, known before it runs.

A step that is called eagerly can be made again without XLA where the compiler refuses it. Inside a
user's ``tf.function`` it cannot: that fails when it runs, in the user's call. So XLA is asked for
its own text of the trace (HLO), which it makes before it optimizes anything, and nothing is run.

For 60 variables under Adam that takes 0.9 s of CPU time, as long as the trace, so it is asked only
about operations that are not in `PLAIN`. Keras's optimizers and schedules, and the rules, have none
but these.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from . import passes

_PLAIN = """
    Abs AddN AddV2 AssignAddVariableOp AssignSubVariableOp AssignVariableOp Bitcast BitwiseOr Cast
    Ceil Const Cos
    Equal Exp Floor FloorDiv FloorMod Greater GreaterEqual Identity IdentityN If IsFinite Less
    LessEqual Log LogicalAnd LogicalNot LogicalOr MatMul Maximum Minimum Mul Neg NoOp NotEqual Pack
    PartitionedCall Placeholder Pow ReadVariableOp RealDiv RightShift Round Rsqrt Select SelectV2
    Sign Sin Sqrt Square StatefulPartitionedCall StatelessIf Sub Tanh
"""
PLAIN = frozenset(_PLAIN.split())
"""What XLA compiles for numbers of any shape and type that an optimizer has."""
CONSTANT = {
    **{"ExpandDims": (1,), "Fill": (0,), "Mean": (1,), "Reshape": (1,), "StridedSlice": (1, 2, 3)},
    **{"Sum": (1,), "Transpose": (1,)},
}
"""Likewise, if the inputs of these numbers, shapes or axes, are written in the program."""


def refused(made: Any, specs: list[Any], concrete: Any) -> str:
    """Why XLA does not take a function; empty where it does.

    Args:
        made: the ``tf.function``, to be compiled.
        specs: what it was traced for.
        concrete: its trace.
    """
    if all(map(_is_plain, *_nodes(concrete.graph))):
        return ""
    devices = [held.device for held in concrete.captured_inputs if held.dtype == tf.resource]
    if not devices:
        return ""  # no variable, so no optimizer
    return asked(made, specs, devices[0])


def asked(made: Any, specs: list[Any], device: str) -> str:
    """What XLA has against a function on a device; empty where nothing."""
    with warnings.catch_warnings():
        # By the platform's name it would draw a random number, which moves the user's generator.
        warnings.filterwarnings("ignore", message="device_name is being deprecated")
        try:
            made.experimental_get_compiler_ir(*specs)(stage="hlo_serialized", device_name=device)
        except (ValueError, TypeError, tf.errors.OpError) as error:  # its refusals are ValueErrors
            return _in_words(str(error))
    return ""


def _in_words(refusal: str) -> str:
    without = re.search(r"No registered '(\w+)'", refusal)
    if without:
        known = " of this type" if without[1] in PLAIN else ""
        return f"XLA does not run {without[1]}{known}"
    text = refusal.removeprefix("Failed getting HLO text: '").strip()
    return f"XLA refuses it ({text.splitlines()[0][:200]})"


def _nodes(graph: Any) -> tuple[list[Any], list[dict[str, str]]]:
    """All that is computed in a graph and in what it calls; and for each, the kinds beside it."""
    definition = graph.as_graph_def()
    nodes, beside = [], []
    for part in (definition.node, *(f.node_def for f in definition.library.function)):
        kinds = {node.name: node.op for node in part}
        nodes += part
        beside += [kinds] * len(part)
    return nodes, beside


def _is_plain(node: Any, beside: dict[str, str]) -> bool:
    if any(tf.string.as_datatype_enum in kinds for kinds in map(_dtypes, node.attr.values())):
        return False
    if node.op == "XlaCallModule":  # what it calls of ours, XLA runs
        return bool(node.attr["module"].s.startswith(passes.MARK))
    if (numbers := CONSTANT.get(node.op)) is not None:
        return all(beside.get(node.input[n].partition(":")[0]) == "Const" for n in numbers)
    return node.op in PLAIN


def _dtypes(attribute: Any) -> Iterator[int]:
    yield attribute.type
    yield from attribute.list.type
