# SPDX-License-Identifier: Apache-2.0
"""TensorFlow's own fused kernels, where XLA has nothing to fuse or moves more bytes than they do.

An XLA function costs by the argument: with 300 variables of 160 numbers Adam takes it 16 ms and
8 s to compile, TensorFlow's kernels 12 ms and 2 s. Of Adam XLA makes three loops a variable, which
move 40 bytes a number on a CPU, where the kernel moves 28: 9 % of a step of 60 variables of 4.94
million numbers, 25 % of one of 8 of 32 million, and an eighth of the first call. With numbers
fewer than `LARGE` a variable XLA is a fifth faster, and where gradients are multiplied as well,
which is a pass of its own before a kernel. SGD is one loop in XLA.

The compiled passes (passes.py) move no more than the kernels and need no products, but XLA calls
them, by the argument: of many small variables kernels take half to three quarters of their time.

The formulas are Keras's: its ``epsilon`` is outside of the bias correction, as the kernel's is.
Only one minus beta is taken in float32, of the beta that the bias correction has: 1.3e-5 of it at
0.999.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from . import optimizers

Kernels = Callable[[Any, Sequence[Any], Sequence[Any]], None]

MANY = 100
"""From so many variables on, whatever their size."""

LARGE = 2**16
"""From so many numbers a variable on, on average: 10 of 30,000 take a sixth longer, 10 of 100,000
as long as XLA, and 30 of 33,000 too."""


def kernels_of(
    optimizer: Any, variables: Sequence[Any], *, multiplied: bool, on_cpu: bool
) -> Kernels | None:
    """How an optimizer is stepped by kernels; None where XLA is better, or only it is right.

    Args:
        optimizer: whose step it is.
        variables: that have gradients.
        multiplied: whether gradients are multiplied or clipped before the step.
        on_cpu: whether all variables are on a CPU.
    """
    if optimizers.home(optimizer) != "keras":
        return None
    import keras

    known = {keras.optimizers.Adam: _adam, keras.optimizers.SGD: _sgd}
    found = known.get(type(optimizer))  # a subclass may do anything
    if found is None or any(variable.dtype != tf.float32 for variable in variables):
        return None
    if not optimizers.is_as_made(optimizer):
        return None
    large = on_cpu and found is _adam and not multiplied and _are_large(variables)
    if len(variables) < MANY and not large:
        return None
    extras = ("weight_decay", "use_ema", "gradient_accumulation_steps", "clipvalue")
    if any(getattr(optimizer, name, None) for name in (*extras, "amsgrad")):
        return None
    held = optimizer._trainable_variables
    special = any(v.constraint is not None or v.overwrite_with_gradient for v in held)
    return None if special else found


def are_best(variables: Sequence[Any]) -> bool:
    """Whether kernels, where there are some, are faster than the compiled passes."""
    return len(variables) >= MANY and not _are_large(variables)


def _are_large(variables: Sequence[Any]) -> bool:
    numbers = sum(variable.shape.num_elements() for variable in variables)
    return bool(numbers >= LARGE * len(variables))


def _narrow(grads: Sequence[Any]) -> list[Any]:
    """As the variables are: a gradient of the user's own may have another precision."""
    return [tf.cast(grad, tf.float32) for grad in grads]


def _adam(optimizer: Any, grads: Sequence[Any], variables: Sequence[Any]) -> None:
    rate = tf.cast(optimizer.learning_rate, tf.float32)
    step = tf.cast(optimizer.iterations.value + 1, tf.float32)
    beta1, beta2 = tf.constant(optimizer.beta_1), tf.constant(optimizer.beta_2)
    power1, power2 = tf.pow(beta1, step), tf.pow(beta2, step)
    epsilon = tf.constant(optimizer.epsilon)
    for grad, variable in zip(_narrow(grads), variables, strict=True):
        index = optimizer._get_variable_index(variable)
        tf.raw_ops.ResourceApplyAdam(
            var=optimizers.tf_variable(variable).handle,
            m=optimizer._momentums[index].value.handle,
            v=optimizer._velocities[index].value.handle,
            beta1_power=power1,
            beta2_power=power2,
            lr=rate,
            beta1=beta1,
            beta2=beta2,
            epsilon=epsilon,
            grad=grad,
        )
    with tf.control_dependencies([step, rate]):
        optimizer.iterations.assign_add(1)


def _sgd(optimizer: Any, grads: Sequence[Any], variables: Sequence[Any]) -> None:
    rate = tf.cast(optimizer.learning_rate, tf.float32)
    for grad, variable in zip(_narrow(grads), variables, strict=True):
        handle = optimizers.tf_variable(variable).handle
        if not optimizer.momentum:
            tf.raw_ops.ResourceApplyGradientDescent(var=handle, alpha=rate, delta=grad)
            continue
        buffer = optimizer.momentums[optimizer._get_variable_index(variable)]
        tf.raw_ops.ResourceApplyKerasMomentum(
            var=handle,
            accum=buffer.value.handle,
            lr=rate,
            grad=grad,
            momentum=tf.constant(optimizer.momentum, tf.float32),
            use_nesterov=optimizer.nesterov,
        )
    with tf.control_dependencies([rate]):
        optimizer.iterations.assign_add(1)
