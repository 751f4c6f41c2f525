# SPDX-License-Identifier: Apache-2.0
"""A function of a plan, traced once, and what keeps XLA from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from . import optimizers, xla

REFUSALS = ("unsupported operations", "Trying to access resource", "XLA", "compile-time constant")
"""What XLA says when it refuses, before anything was written."""


class Traced:
    """A function, traced once for these inputs.

    Attributes:
        refused: why XLA does not take it; empty where it does, or is not to compile it.

    With 300 variables the public call takes 14 ms and this 10: it packs no arguments.
    """

    def __init__(self, text: Callable[..., Any], specs: Sequence[Any], *, jit: bool) -> None:
        made = tf.function(text, jit_compile=jit or None, autograph=False)
        self._concrete = made.get_concrete_function(*specs)
        self.captured = list(self._concrete.captured_inputs)
        self.refused = xla.refused(made, list(specs), self._concrete) if jit else ""

    def __call__(self, inputs: list[Any]) -> Any:
        """Call it, or have it called where somebody traces."""
        if tf.executing_eagerly():
            return self._concrete._call_flat(inputs, self.captured)
        return self._concrete(*inputs)


def specs_of(variables: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
    """For what a plan's function is traced: gradients in their variables' shapes, and the rest."""
    shapes = [variable.shape for variable in variables]
    shapes += [given.shape for given in inputs[len(shapes) :]]
    return [tf.TensorSpec(shape, given.dtype) for shape, given in zip(shapes, inputs, strict=False)]


def on_cpu(variables: Sequence[Any]) -> bool:
    """Whether a CPU holds all of them."""
    return all("CPU" in variable.device for variable in variables)


def why_uncompiled(variables: Sequence[Any]) -> str:
    """Why XLA cannot step these variables, in words; empty where it can."""
    if any(variable.dtype == tf.string for variable in variables):
        return "a variable holds strings"
    if any(map(optimizers.is_mirrored, variables)):
        return "its variables are on several replicas, and this is outside of strategy.run"
    devices = {variable.device for variable in variables}
    if len(devices) > 1:
        return f"its variables are on several devices ({', '.join(sorted(devices))})"
    return ""
