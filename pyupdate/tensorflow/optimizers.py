# SPDX-License-Identifier: Apache-2.0
"""What is known of an optimizer of Keras 3, of tf-keras, and of tf-keras's legacy ones.

Which one it is shows in the modules of its bases, so a subclass of the user's is one of them. None
of this adds a variable to an optimizer: ``.keras`` files keep them by number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from numbers import Real
from typing import Any

import tensorflow as tf

from ..remembered import Remembered

_homes: Remembered[str] = Remembered()  # of types: a step asks for 16, 2 us each
_scaling: Remembered[bool] = Remembered()
_NUMBERS = ("beta_1", "beta_2", "epsilon", "momentum", "weight_decay")


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


def check_home(optimizer: Any, model: Any, what: str) -> None:
    """Refuse an optimizer of the other package: neither knows the other's variables.

    Raises:
        ValueError: says which to give.
    """
    own = home(model)
    if home(optimizer) != own:
        message = (
            f"the {what} is {home(optimizer)}'s {type(optimizer).__name__}, but the model is "
            f"{own}'s: give one of {own}.optimizers"
        )
        raise ValueError(message)


def check_known(optimizer: Any, variables: Sequence[Any], name: str) -> None:
    """Refuse variables that are none of those that an optimizer was built for.

    Raises:
        ValueError: names the first one.
    """
    inner = stepped(optimizer)
    if is_legacy(inner):  # makes state when it is asked for
        return
    keras = home(inner) == "keras"
    known = inner._trainable_variables_indices if keras else inner._index_dict
    for variable in variables:
        if known and inner._var_key(variable) not in known:  # one of the user's may have none
            message = (
                f"{getattr(variable, 'path', variable.name)} of '{name}' is none of the variables "
                f"that its {type(inner).__name__} was built for, as when its layer was frozen "
                "then: give pyupdate.build a new optimizer now, or build this one while all are "
                "trainable and freeze afterwards"
            )
            raise ValueError(message)


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


def parts(optimizer: Any) -> tuple[Any, ...]:
    """It, and where it is a `MultiOptimizer` those to which it hands its variables."""
    return (optimizer, *getattr(optimizer, "_inner_optimizers", ()))


def is_as_made(optimizer: Any) -> bool:
    """Whether its type and plain numbers say all of its step, which something else may then make.

    Not where a method was replaced on the object, or a number is a tensor or a variable.
    """
    kind = type(optimizer)
    own = vars(optimizer)
    if any(callable(value) and callable(getattr(kind, name, None)) for name, value in own.items()):
        return False
    given = [own.get(name) for name in _NUMBERS]
    return all(value is None or isinstance(value, Real) for value in given)


def is_built(optimizer: Any) -> bool:
    """Whether it has its state."""
    if home(optimizer) == "keras":
        return bool(optimizer.built)
    inner = stepped(optimizer)
    return bool(getattr(inner, "_weights" if is_legacy(inner) else "_built", False))


def counts_in_python(optimizer: Any) -> bool:
    """Whether a built optimizer counts its steps in Python: tf-keras's Nadam, once a variable."""
    return hasattr(optimizer, "_u_product_counter")


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


def is_mirrored(variable: Any) -> bool:
    """Whether a ``tf.Variable`` is on several replicas of this process."""
    return isinstance(variable, tf.distribute.DistributedValues) and len(variable.values) > 1


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
        known: dict[str, Any] = {}
        if len(parts(optimizer)) > 1:  # one of several asks for a gradient of each that it knows
            known["_trainable_variables_indices"] = dict.fromkeys(map(id, variables))
        with replaced(optimizer, **known):
            optimizer.apply(list(grads), list(variables))
    elif is_legacy(optimizer):
        optimizer.apply_gradients(pairs, experimental_aggregate_gradients=not reduced)
    else:
        optimizer.apply_gradients(pairs, skip_gradients_aggregation=reduced)


def not_reducing(optimizer: Any) -> dict[str, Any]:
    """What is `replaced` in an optimizer of Keras 3 that gets sums over all replicas."""
    return {"_all_reduce_sum_gradients": list} if home(optimizer) == "keras" else {}


@contextmanager
def as_given(optimizer: Any, clips: Mapping[str, Any], *, reduced: bool = False) -> Iterator[None]:
    """It takes gradients as they are: unscaled, clipped by `clips`, perhaps summed over replicas.

    A `MultiOptimizer` gives its loss scale factor to all that it has, and each divides by it.
    """
    with ExitStack() as stack:
        stack.enter_context(replaced(optimizer, **clips))
        for one in parts(optimizer):
            hidden = not_reducing(one) if reduced else {}
            if getattr(one, "loss_scale_factor", None) is not None:
                hidden["loss_scale_factor"] = None
            stack.enter_context(replaced(one, **hidden))
        yield


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
