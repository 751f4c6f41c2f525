# SPDX-License-Identifier: Apache-2.0
"""What is known of an optimizer of Keras 3, of tf-keras, and of tf-keras's legacy ones.

Which one it is shows in the modules of its bases, so a subclass of the user's is one of them. None
of this adds a variable to an optimizer: ``.keras`` files keep them by number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import tensorflow as tf

from ..remembered import Remembered

_SCALARS = (bool, int, float, str, type(None))
_homes: Remembered[str] = Remembered()  # of types: a step asks for 16, 2 us each
_scaling: Remembered[bool] = Remembered()


def home(value: object) -> str:
    """Whose it is: "keras", "tf_keras", or "" for neither."""
    kind = type(value)
    found = _homes.get(kind)
    if found is None:
        roots = (base.__module__.partition(".")[0] for base in kind.__mro__)
        found = next((root for root in roots if root in ("keras", "tf_keras")), "")
        _homes[kind] = found
    return found


def is_optimizer(value: object) -> bool:
    """Whether this is an optimizer of Keras's or tf-keras's."""
    return bool(home(value)) and not isinstance(value, type) and hasattr(value, "apply_gradients")


def is_legacy(optimizer: Any) -> bool:
    """Whether it is one of ``tf_keras.optimizers.legacy``."""
    return hasattr(optimizer, "_create_all_weights")


def scales_loss(optimizer: Any) -> bool:
    """Whether it is a ``LossScaleOptimizer`` of either package, by itself and not by a policy."""
    return scales_loss_by_type(type(optimizer))


def scales_loss_by_type(kind: type) -> bool:
    """Whether its instances scale the loss."""
    found = _scaling.get(kind)
    if found is None:
        found = any(base.__name__.startswith("LossScaleOptimizer") for base in kind.__mro__)
        _scaling[kind] = found
    return found


def stepped(optimizer: Any) -> Any:
    """The optimizer that makes the step: what a loss-scaling one wraps, else itself."""
    return optimizer.inner_optimizer if scales_loss(optimizer) else optimizer


def is_built(optimizer: Any) -> bool:
    """Whether it has its state."""
    if home(optimizer) == "keras":
        return bool(optimizer.built)
    inner = stepped(optimizer)
    return bool(getattr(inner, "_weights" if is_legacy(inner) else "_built", False))


def make_state(optimizer: Any, variables: Sequence[Any]) -> None:
    """Give it its state, outside of every trace: inside, it could be made only once."""
    with tf.init_scope():
        if is_legacy(stepped(optimizer)):
            stepped(optimizer)._create_all_weights(variables)
        else:
            optimizer.build(variables)


def tf_variable(variable: Any) -> Any:
    """The ``tf.Variable`` of one of Keras 3's, or of the model; itself where it is one."""
    return variable.value if home(variable) == "keras" else variable


def apply(
    optimizer: Any, grads: Sequence[Any], variables: Sequence[Any], *, reduced: bool = False
) -> None:
    """Let the user's optimizer make its step.

    Args:
        optimizer: one that does not scale the loss.
        grads: dense, unscaled gradients.
        variables: as the optimizer was built on them.
        reduced: whether the gradients are the sums over all replicas already.
    """
    pairs = list(zip(grads, variables, strict=True))
    if home(optimizer) == "keras":  # Keras 3 cannot be told: see `not_reducing`
        optimizer.apply(list(grads), list(variables))
    elif is_legacy(optimizer):
        optimizer.apply_gradients(pairs, experimental_aggregate_gradients=not reduced)
    else:
        optimizer.apply_gradients(pairs, skip_gradients_aggregation=reduced)


def not_reducing(optimizer: Any) -> dict[str, Any]:
    """What is `replaced` in an optimizer of Keras 3 that gets sums over all replicas."""
    return {"_all_reduce_sum_gradients": list} if home(optimizer) == "keras" else {}


@contextmanager
def replaced(optimizer: Any, **attributes: Any) -> Iterator[None]:
    """Attributes of an optimizer with other values, for as long as a trace takes."""
    own = vars(optimizer)
    before = {name: own[name] for name in attributes if name in own}
    own.update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            if name in before:
                own[name] = before[name]
            else:
                own.pop(name, None)


def fingerprint(value: Any) -> tuple[Any, ...]:
    """What a trace takes from Python: an optimizer's plain attributes, and those of its parts.

    A trace holds them as constants, so another value must be another trace: a beta, a clip, a
    schedule. Not ``get_config``: that would wait for the learning rate. 8 us for Adam.
    """
    found: list[Any] = []
    for name, part in vars(value).items():
        if isinstance(part, _SCALARS):
            found.append((name, part))
        elif (callable(part) and home(part)) or is_optimizer(part):
            found.append((name, part, fingerprint(part)))  # the part too: its number stays taken
        elif name == "_learning_rate" and callable(part) and not isinstance(part, tf.Variable):
            found.append((name, part, _called(part)))  # a plain function is read at the trace
        elif name == "optimizers" and isinstance(part, list | tuple):
            found.append((name, tuple(map(fingerprint, part))))
    return tuple(found)


def _called(function: Any) -> float | None:
    value = function()
    return float(value) if isinstance(value, int | float) else None
