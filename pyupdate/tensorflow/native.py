# SPDX-License-Identifier: Apache-2.0
"""TensorFlow's own fused kernels for many small variables, where XLA has nothing to fuse.

An XLA function costs by the argument: with 300 variables of 160 numbers Adam takes it 16 ms and
8 s to compile, TensorFlow's kernels 12 ms and 2 s. The formulas are Keras's: its ``epsilon`` is
outside of the bias correction, as the kernel's is. Only one minus beta is taken in float32 there
(1.3e-5 of it at 0.999). With few large variables they gain 10 % over XLA, too little for that, and
lose where gradients are multiplied, which is a pass of its own before a kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from . import optimizers

Kernels = Callable[[Any, Sequence[Any], Sequence[Any]], None]

MANY = 100
"""From so many variables on."""


def kernels_of(optimizer: Any, variables: Sequence[Any]) -> Kernels | None:
    """How an optimizer is stepped by kernels; None where XLA is better, or only it is right."""
    if len(variables) < MANY or optimizers.home(optimizer) != "keras":
        return None
    import keras

    known = {keras.optimizers.Adam: _adam, keras.optimizers.SGD: _sgd}
    found = known.get(type(optimizer))  # a subclass may do anything
    if found is None or any(variable.dtype != tf.float32 for variable in variables):
        return None
    extras = ("weight_decay", "use_ema", "gradient_accumulation_steps", "clipvalue")
    if any(getattr(optimizer, name, None) for name in (*extras, "amsgrad")):
        return None
    held = optimizer._trainable_variables
    special = any(v.constraint is not None or v.overwrite_with_gradient for v in held)
    return None if special else found


def _adam(optimizer: Any, grads: Sequence[Any], variables: Sequence[Any]) -> None:
    rate = tf.cast(optimizer.learning_rate, tf.float32)
    step = tf.cast(optimizer.iterations.value + 1, tf.float32)
    beta1, beta2 = tf.constant(optimizer.beta_1), tf.constant(optimizer.beta_2)
    power1, power2 = tf.pow(beta1, step), tf.pow(beta2, step)
    epsilon = tf.constant(optimizer.epsilon)
    for grad, variable in zip(grads, variables, strict=True):
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
    optimizer.iterations.assign_add(1)


def _sgd(optimizer: Any, grads: Sequence[Any], variables: Sequence[Any]) -> None:
    rate = tf.cast(optimizer.learning_rate, tf.float32)
    for grad, variable in zip(grads, variables, strict=True):
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
    optimizer.iterations.assign_add(1)
