# SPDX-License-Identifier: Apache-2.0
"""The compiled CPU passes, called by XLA: a step moves parameters and state in place, once.

XLA makes three loops of an Adam step, which move 40 bytes a number, and TensorFlow's kernels take
no multiplier. The passes that step PyTorch models on a CPU move 28, unscaled and clipped. XLA calls
functions of others by its foreign function interface (``csrc/xla.cpp``), and gives them the memory
of the variables where a result is said to be in an operand's place.

What is called stands in the trace as a small module of StableHLO. So it is one compiled function
like any other: in a ``tf.function`` of the user's, compiled or not, and on a replica of its own.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import tensorflow as tf

from .. import backends
from . import optimizers

PATH = "pyupdate's compiled passes, called by XLA"
"""What `path_of` says of a step that they made."""

PREFIX = "pyupdate"
"""Of the names by which XLA knows the handlers."""

MARK = b"// pyupdate's compiled passes\n"
"""How the modules begin that are called here."""

GET_API = "_ZN3xla3ffi12GetXlaFfiApiEv"
"""``xla::ffi::GetXlaFfiApi()``, which takes nothing and returns the address of a C struct."""

_MODULE_VERSION = 9
"""Of ``XlaCallModule``: TensorFlow 2.21 takes up to 10."""

_TYPES = {tf.float32: "f32", tf.float64: "f64"}


def allowed() -> bool:
    """Whether the choice of a back end in force lets the compiled passes run on a CPU.

    Raises:
        ValueError: no back end has this name.
    """
    return backends.known_choice() in (backends.AUTO, "cpu")


@cache
def why_not() -> str:
    """Why XLA cannot call the passes here; empty where it can."""
    try:
        from .. import _C
    except ImportError as error:
        return f"pyupdate's compiled module does not load: {error}"
    library = Path(tf.sysconfig.get_lib()) / "libtensorflow_cc.so.2"
    try:
        get = getattr(ctypes.CDLL(str(library)), GET_API)
    except (OSError, AttributeError):
        return f"TensorFlow {tf.__version__} does not show XLA's foreign function interface"
    get.argtypes, get.restype = (), ctypes.c_void_p
    return _C.register_with_xla(get(), PREFIX)


Numbers = Callable[[Any, Any], list[Any]]
"""Of an optimizer and the step count that is made, what its rule's prepare takes besides: scalar
float64 tensors. Called while a step is traced."""


@dataclass(frozen=True)
class Group:
    """Variables that one rule steps by the same numbers.

    Attributes:
        rule: a compiled rule's name.
        places: which of the variables they are.
        numbers: of the step.
    """

    rule: str
    places: list[int]
    numbers: Numbers


@dataclass(frozen=True)
class Passes:
    """An optimizer's step by the passes. It does not hold the optimizer.

    Attributes:
        groups: every variable is in one of them.
        states: of an optimizer, its lists of state in the rules' order; asked while a step is
            traced, as a replica has variables of its own.
    """

    groups: Sequence[Group]
    states: Callable[[Any], list[Any]]

    def measure(self, grads: Sequence[Any], unscale: Any) -> tuple[Any, Any, Any]:
        """Norm and finiteness of dense gradients times `unscale`, and the norm of each.

        Returns:
            The norm, a bool, and a norm a gradient; norms in float64.
        """
        grads = [grad if grad.dtype in _TYPES else tf.cast(grad, tf.float32) for grad in grads]
        found = _called(
            f"{PREFIX}_measure",
            [tf.cast(unscale, tf.float64), *grads],
            [tf.TensorSpec([2 + len(grads)], tf.float64)],
        )[0]
        return found[0], tf.equal(found[1], 0.0), tf.sqrt(found[2:])

    def step(
        self,
        optimizer: Any,
        grads: Sequence[Any],
        targets: Sequence[Any],
        multiplier: Any,
        clip_value: float | None,
        skip: Any,
    ) -> None:
        """Move variables, state and ``iterations``.

        Args:
            optimizer: whose step it is.
            grads: one a target, dense; of its dtype or, by a gradient of the user's own, another.
            targets: what is stepped: ``tf.Variable``, or what Keras 3 wraps them in.
            multiplier: of the gradients, a scalar or one a gradient; None for 1.
            clip_value: the bound of every multiplied element; None for none.
            skip: a bool tensor: nothing moves where it is true; None for never.
        """
        one = tf.constant(1.0, tf.float64)
        given = one if multiplier is None else tf.cast(multiplier, tf.float64)
        bound = tf.constant(float("inf") if clip_value is None else clip_value, tf.float64)
        skipped = tf.constant(0.0, tf.float64) if skip is None else tf.cast(skip, tf.float64)
        step = tf.cast(tf.convert_to_tensor(optimizer.iterations), tf.float64) + one
        places = [optimizer._get_variable_index(target) for target in targets]
        kept = self.states(optimizer)
        for group in self.groups:
            control = tf.stack([skipped, bound, step, *group.numbers(optimizer, step)])
            own = given if given.shape.rank == 0 else tf.gather(given, group.places)
            written = [optimizers.tf_variable(targets[i]) for i in group.places]
            written += [state[places[i]].value for state in kept for i in group.places]
            before = [variable.read_value() for variable in written]
            moved_by = [tf.cast(grads[i], before[k].dtype) for k, i in enumerate(group.places)]
            after = _called(
                f"{PREFIX}_step",
                [control, tf.reshape(own, [-1]), *before, *moved_by],
                [tf.TensorSpec(value.shape, value.dtype) for value in before],
                in_place=2,
                rule=group.rule,
            )
            for variable, value in zip(written, after, strict=True):
                variable.assign(value)
        moved = 1 if skip is None else tf.where(skip, 0, 1)
        optimizer.iterations.assign_add(tf.cast(moved, optimizer.iterations.dtype))


def passes_of(optimizer: Any, targets: Sequence[Any]) -> Passes | None:
    """How the passes step an optimizer; None where they do not.

    Args:
        optimizer: with its state; one of Keras's own Adam and AdamW, or a rule's.
        targets: what it steps.
    """
    if not allowed() or optimizers.home(optimizer) != "keras" or why_not():
        return None
    if not optimizers.is_as_made(optimizer):
        return None
    import keras

    from .. import keras_optim

    extras = ("use_ema", "gradient_accumulation_steps", "clipvalue")
    if any(getattr(optimizer, name, None) for name in extras):
        return None
    held = optimizer._trainable_variables
    if any(v.constraint is not None or v.overwrite_with_gradient for v in held):
        return None
    kind = type(optimizer)  # a subclass may do anything
    if kind in (keras.optimizers.Adam, keras.optimizers.AdamW):
        found = _adam(optimizer, targets)
    elif kind is keras_optim.RuleOptimizer and _is_compiled(optimizer.rule):
        names = tuple(optimizer.rule.state)
        group = Group(optimizer.rule.name, list(range(len(targets))), _rule_numbers)
        found = Passes([group], lambda given: [given._state[name] for name in names])
    else:
        return None
    for target in targets:
        place = optimizer._get_variable_index(target)
        own = [target, *(kept[place] for kept in found.states(optimizer))]
        kinds = {tf.as_dtype(variable.dtype) for variable in own}
        if len(kinds) > 1 or not kinds <= _TYPES.keys():
            return None
    return found


def _adam(optimizer: Any, targets: Sequence[Any]) -> Passes:
    suffix = "_amsgrad" if optimizer.amsgrad else ""
    decays = [bool(optimizer.weight_decay and optimizer._use_weight_decay(t)) for t in targets]
    groups = []
    for name, decayed in (("adamw", True), ("adam", False)):
        places = [i for i, decay in enumerate(decays) if decay is decayed]
        if places:
            groups.append(Group(name + suffix, places, partial(_adam_numbers, decayed)))
    return Passes(groups, _adam_states)


def _adam_states(optimizer: Any) -> list[Any]:
    kept = [optimizer._momentums, optimizer._velocities]
    return [*kept, optimizer._velocity_hats] if optimizer.amsgrad else kept


def _adam_numbers(decayed: bool, optimizer: Any, step: Any) -> list[Any]:
    """Keras's epsilon is outside of the bias correction, the rule's is inside."""
    beta1, beta2, epsilon, decay = (
        tf.constant(float(value), tf.float64)
        for value in (
            optimizer.beta_1,
            optimizer.beta_2,
            optimizer.epsilon,
            optimizer.weight_decay if decayed else 0.0,
        )
    )
    rate = tf.cast(tf.convert_to_tensor(optimizer.learning_rate), tf.float64)
    return [rate, beta1, beta2, epsilon / tf.sqrt(1.0 - tf.pow(beta2, step)), decay]


def _rule_numbers(optimizer: Any, step: Any) -> list[Any]:
    del step
    numbers: list[Any] = optimizer.rule_numbers()
    return numbers


def _is_compiled(rule: Any) -> bool:
    """Whether the passes have this rule's text, and it has nothing but state to be kept."""
    from .. import _C

    return not rule.scalars and _C.digests().get(rule.name) == rule.digest


# ----- the call ----------------------------------------------------------------------------------


def _called(
    target: str,
    operands: Sequence[Any],
    results: Sequence[Any],
    *,
    in_place: int | None = None,
    **attributes: str,
) -> list[Any]:
    """A call of a handler, in the graph that is traced.

    Args:
        target: its name.
        operands: tensors.
        results: a ``tf.TensorSpec`` each.
        in_place: the results are in the places of the operands from this one on; None for none.
        **attributes: strings for the handler.
    """
    from tensorflow.compiler.tf2xla.python import xla

    takes = [_type(operand) for operand in operands]
    gives = [_type(result) for result in results]
    count = len(gives)
    aliases = (
        f"#stablehlo.output_operand_alias<output_tuple_indices = [{k if count > 1 else ''}], "
        f"operand_index = {in_place + k}, operand_tuple_indices = []>"
        for k in range(0 if in_place is None else count)
        if in_place is not None
    )
    settings = (
        "api_version = 4 : i32",
        "backend_config = {" + ", ".join(f'{k} = "{v}"' for k, v in attributes.items()) + "}",
        f"output_operand_aliases = [{', '.join(aliases)}]",
    )
    names = ", ".join(f"%a{k}" for k in range(len(takes)))
    declared = ", ".join(f"%a{k}: {kind}" for k, kind in enumerate(takes))
    returned = ", ".join(f"%r#{k}" for k in range(count))
    kinds = ", ".join(gives)
    module = (
        "module @pyupdate {\n"
        f"  func.func public @main({declared}) -> ({kinds}) {{\n"
        f"    %r:{count} = stablehlo.custom_call @{target}({names}) {{{', '.join(settings)}}}"
        f" : ({', '.join(takes)}) -> ({kinds})\n"
        f"    return {returned} : {kinds}\n"
        "  }\n"
        "}\n"
    )
    made = xla.call_module(
        list(operands),
        version=_MODULE_VERSION,
        module=MARK + module.encode(),
        Tout=[result.dtype for result in results],
        Sout=[result.shape for result in results],
        platforms=["CPU"],
    )
    return list(made)


def _type(tensor: Any) -> str:
    dims = "".join(f"{size}x" for size in tensor.shape.as_list())
    return f"tensor<{dims}{_TYPES[tensor.dtype]}>"
