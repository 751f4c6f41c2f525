# SPDX-License-Identifier: Apache-2.0

"""A training run by given gradients, in either framework; a program, for processes of its own.

python rule_run.py OUT.npz keras NAME...   # steps compiled by XLA; weights and state after each
python rule_run.py OUT.npz torch NAME...
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

import pyupdate
from pyupdate.kernels.rules import RULES
from pyupdate.language import sign

STEPS = 7  # of which RAdam rectifies the last two
SIZES = ((33, 7), (5,))
NUMBERS = {
    "own": {"lr": 0.01, "beta": 0.9},
    "sgd_momentum": {
        "lr": 0.01,
        "momentum": 0.9,
        "dampening": 0.2,
        "weight_decay": 0.1,
        "nesterov": 0.0,
    },
    "adamw": {"lr": 0.01, "beta1": 0.8, "beta2": 0.95, "weight_decay": 0.1, "eps": 1e-3},
    "adadelta": {"lr": 0.5, "rho": 0.75, "weight_decay": 0.1, "eps": 1e-3},
}
"""Of the runs that both frameworks make."""


@pyupdate.rule(state={"exp_avg": 0.0})
def signum(param, grad, exp_avg, lr, beta):
    exp_avg = exp_avg * beta + grad * (1.0 - beta)
    param = param - lr * (sign(exp_avg) + param * 0.125)
    return param, exp_avg


def drawn(step: int) -> list[np.ndarray[Any, Any]]:
    """The gradients of a step; the weights before all of them are those of step 0."""
    random = np.random.default_rng(step)
    return [random.standard_normal(size).astype(np.float32) for size in SIZES]


def in_keras(name: str) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
    import keras
    import tensorflow as tf
    from test_keras_optim import numbers_of

    from pyupdate import keras_optim

    numbers = NUMBERS.get(name) or numbers_of(name)
    rule = signum if name == "own" else RULES[name]
    optimizer = keras_optim.from_rule(rule, **numbers)
    variables = [keras.Variable(value) for value in drawn(0)]
    optimizer.build(variables)
    apply = tf.function(
        lambda *grads: optimizer.apply(grads, variables), jit_compile=True, autograph=False
    )
    for step in range(1, STEPS + 1):
        apply(*map(tf.constant, drawn(step)))
        found = {f"param {i}": variable.numpy() for i, variable in enumerate(variables)}
        for key in rule.state:
            found |= {f"{key} {i}": v.numpy() for i, v in enumerate(optimizer._state[key])}
        for key in rule.scalars:  # one for all, or one a variable
            kept = optimizer._scalars[key] * (len(variables) if key in rule.counted else 1)
            found |= {f"{key} {i}": v.numpy() for i, v in enumerate(kept)}
        yield found


def in_torch(name: str) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
    import torch

    from pyupdate import optim

    params = [torch.nn.Parameter(torch.from_numpy(value)) for value in drawn(0)]
    numbers = dict(NUMBERS[name])
    numbers.pop("nesterov", None)
    if "beta1" in numbers:
        numbers["betas"] = (numbers.pop("beta1"), numbers.pop("beta2"))
    kinds = {"sgd_momentum": optim.SGD, "adamw": optim.AdamW, "adadelta": optim.Adadelta}
    made = optim.from_rule(signum) if name == "own" else kinds[name]
    optimizer = made(params, **numbers)
    for step in range(1, STEPS + 1):
        for param, grad in zip(params, drawn(step), strict=True):
            param.grad = torch.from_numpy(grad)
        optimizer.step()
        found = {f"param {i}": p.detach().numpy().copy() for i, p in enumerate(params)}
        for i, param in enumerate(params):
            state = optimizer.state[param]
            found |= {f"{k} {i}": v.numpy().copy() for k, v in state.items() if k != "step"}
        yield found


def main(out: str, framework: str, *names: str) -> None:
    run = {"keras": in_keras, "torch": in_torch}[framework]
    made = {
        f"{name} {step} {what}": value
        for name in names
        for step, found in enumerate(run(name), start=1)
        for what, value in found.items()
    }
    np.savez(out, **made)


if __name__ == "__main__":
    main(*sys.argv[1:])
