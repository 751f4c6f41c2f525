# SPDX-License-Identifier: Apache-2.0
"""A plan: one optimizer with one set of gradients, traced once and compiled.

    norm, finite check, multiplier      TensorFlow's kernels      measure.py
    a decision on the check             outside of XLA
      the optimizer's step, unchanged   XLA                       `Plan._apply`
    the loss scale                      after the step

On a CPU the optimizers that the compiled passes know are one compiled function, which calls them
(passes.py): they take the decision as a number. What follows is about the others.

Called eagerly on a CPU, these are functions of their own and the decision is Python's. Anywhere
else they are one function and the decision a ``tf.cond``: whoever calls may be tracing, and a GPU
should not be waited for. With 60 variables the ``tf.cond`` and a function in a function cost 1 ms.

The optimizer is traced as it is, whichever subclass it is. A plan does not keep it alive. What XLA
does not take runs as a plain TensorFlow function, with one line in the log that says why.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from pyupdate.options import Options

from . import loss_scale, measure, native, optimizers, order, passes, rates, told, traced
from .halves import Halves
from .state import Kept
from .traced import Traced


class Plan:
    """One step of one optimizer on dense gradients of known dtypes.

    Args:
        optimizer: the one that makes the step, its state made.
        variables: the model's ``tf.Variable`` of each gradient.
        targets: what the optimizer steps: the same, or what Keras 3 wraps them in.
        options: of `pyupdate.build`.
        scale: how the gradients are scaled.
        state: the model's sums and averages; None where the options keep none.
        halves: float32 copies of variables in half precision.
        missed: the positions of the variables that this micro-batch of several does not reach.
        fed: the learning rates that are read from variables: see `rates.fed`.
    """

    def __init__(
        self,
        optimizer: Any,
        variables: Sequence[Any],
        targets: Sequence[Any],
        options: Options,
        scale: loss_scale.LossScale | None,
        state: Kept | None,
        halves: Halves,
        missed: Sequence[int] = (),
        fed: rates.Rates | None = None,
    ) -> None:
        self._optimizer = weakref.ref(optimizer)
        self.variables = list(variables)
        self.targets = list(targets)
        self.options = options
        self.scale = scale
        self._state = state
        self.halves = halves
        self.missed = missed
        self._rates = [(fed or {}).get(id(one)) for one in optimizers.parts(optimizer)]
        self.clips = measure.clips_of(optimizer)
        self.checks = options.skip_nonfinite or (scale is not None and scale.counter is not None)
        self.measures = self.checks or options.max_norm is not None or bool(self.clips.replaced)
        self.accumulates = options.accumulation_steps > 1
        on_cpu = traced.on_cpu(variables)
        self._traced: dict[str, Traced] = {}
        self._said: list[str] = []
        self._inner_refused = ""
        self._untraced = False
        why_not = traced.why_uncompiled(variables)
        if why_not:
            self._say(why_not)
        self.compiled = not why_not
        self._native: native.Kernels | None = None
        self._passes: passes.Passes | None = None
        plain = not halves.pairs and options.ema_decay is None
        if plain:
            multiplied = self.measures or scale is not None or options.clip_value is not None
            self._native = native.kernels_of(
                optimizer, variables, multiplied=multiplied, on_cpu=on_cpu
            )
        best = self._native is not None and native.are_best(variables)
        if plain and on_cpu and self.compiled and not best:
            self._passes = passes.passes_of(optimizer, targets)
        if self._passes is not None:
            self._native = None
        alone = self.measures and not self.accumulates
        self.in_parts = alone and on_cpu and self._passes is None

    # ----- running --------------------------------------------------------------------------------

    def __call__(self, grads: Sequence[Any], scale: Any) -> Any:
        """Make the step, or a micro-batch of one.

        Args:
            grads: dense, in the order of the variables.
            scale: what they are scaled by, a float32 tensor; None where they are not.

        Returns:
            Norm, skipped and multiplier, as scalar tensors; the empty tuple where nobody asked.
        """
        inputs = [*grads] if scale is None else [*grads, scale]
        eagerly = tf.config.functions_run_eagerly()
        if eagerly:
            self._say("tf.config.run_functions_eagerly is on: nothing is compiled")
        if eagerly or (self._untraced and tf.executing_eagerly()):
            return self._step(*inputs)
        if not tf.executing_eagerly():
            return self._whole_function(inputs)(inputs)
        if self.in_parts:
            return self._or_without_xla(lambda: self._run_in_parts(inputs))
        return self._or_without_xla(lambda: self._whole_function(inputs)(inputs))

    def _or_without_xla(self, run: Callable[[], Any]) -> Any:
        try:
            return run()
        except (tf.errors.InvalidArgumentError, tf.errors.UnimplementedError) as error:
            if not self.compiled or not any(text in str(error) for text in traced.REFUSALS):
                raise
            self._give_up_xla(f"XLA refuses it ({str(error).strip().splitlines()[0][:200]})")
            return run()

    def _run_in_parts(self, inputs: list[Any]) -> Any:
        grads = inputs[: len(self.variables)]
        measured = self._function("sum", self._measure_sum, inputs)
        norm, multiplier, smallest, sound = measured(inputs)
        # What it waits for is there: a CPU's functions return when they are done.
        if not sound:
            if self.checks and not self._function("look", self._look, grads)(grads):
                self._function("skip", self._skip, [])([])
                return norm, tf.constant(1.0), smallest
            if self.scale is not None:
                again = self._function("again", self._measure_slowly, inputs)
                norm, multiplier, smallest = again(inputs)
        moved = [*grads, multiplier]
        self._function("move", self._move, moved, jit=True)(moved)
        return norm, tf.constant(0.0), smallest

    def _whole_function(self, inputs: Sequence[Any]) -> Traced:
        if self.measures or self.accumulates or self.scale is not None:
            at_once = self._passes is not None and not self.accumulates
            return self._function("whole", self._step, inputs, jit=at_once)
        return self._function("whole", self._only_apply, inputs, jit=True)  # one function, not two

    def _function(
        self, name: str, text: Callable[..., Any], inputs: Sequence[Any], *, jit: bool = False
    ) -> Traced:
        """One of the plan's functions, traced when it is first called."""
        found = self._traced.get(name)
        if found is not None:
            return found
        specs, jits = traced.specs_of(self.variables, inputs), self._jits
        found = self._made(lambda: Traced(text, specs, jit=jit and jits))
        if jits and (refused := self._refused(found)):
            self._give_up_xla(refused)
            return self._function(name, text, inputs)
        self._traced[name] = found
        return found

    def _made(self, make: Callable[[], Traced]) -> Traced:
        """A trace, made outside of every other one."""
        with tf.init_scope():
            return make()

    def _refused(self, found: Traced) -> str:
        """Why XLA does not run a trace or the step in it; empty where it does."""
        return found.refused or self._inner_refused

    def _give_up_xla(self, why: str) -> None:
        self.leave_xla()
        self._say(why)

    def leave_traces(self) -> None:
        """Run the optimizer's own Python at every eager step from now on."""
        self._untraced = True
        self.leave_xla()
        self._say("its step changes its own Python attributes, which a trace would hold")

    def leave_xla(self) -> None:
        """Run as plain TensorFlow from now on."""
        if self.compiled:
            self.compiled = False
            self._inner_refused = ""
            self._traced.clear()

    @property
    def _jits(self) -> bool:
        return self.compiled and self._native is None

    @property
    def _by_passes(self) -> bool:
        """Whether what is traced now calls the compiled passes."""
        return self._passes is not None and self.compiled and not tf.executing_eagerly()

    @property
    def path(self) -> str:
        """What runs the step, in words."""
        eagerly = tf.config.functions_run_eagerly()
        if self._passes is not None and self.compiled and not eagerly:
            return passes.PATH
        if self._native is not None:
            return "TensorFlow's fused kernels"
        return f"TensorFlow without XLA: {self._said[-1]}" if self._said else "XLA"

    def _say(self, why: str) -> None:
        """Remember why a step runs without XLA, and log it once an optimizer."""
        if why not in self._said:
            self._said.append(why)
            told.without_xla(self._alive(), why)

    # ----- what is traced -------------------------------------------------------------------------

    def _only_apply(self, *grads: Any) -> tuple[Any, ...]:
        self._apply(list(grads), None)
        return ()

    def _measure(self, *inputs: Any) -> tuple[Any, ...]:
        grads, unscale = list(inputs[: len(self.variables)]), self._unscale(inputs)
        found = self._measured(grads, unscale, scaled=self.scale is not None)
        finite = tf.constant(True) if found.finite is None else found.finite
        return found.norm, found.multiplier, measure.smallest(found.multiplier), finite

    def _measure_sum(self, *inputs: Any) -> tuple[Any, ...]:
        """The same, but whether the sums of squares can be right: else `_look`, and once more.

        A cond in it costs a fifth of the whole, 0.3 ms with 60 variables, for what never runs.
        """
        grads, unscale = list(inputs[: len(self.variables)]), self._unscale(inputs)
        scaled = self.scale is not None
        found = measure.measured_fast(grads, unscale, self.options, self.clips, scaled=scaled)
        return found.norm, found.multiplier, measure.smallest(found.multiplier), found.finite

    def _measure_slowly(self, *inputs: Any) -> tuple[Any, ...]:
        grads, unscale = list(inputs[: len(self.variables)]), self._unscale(inputs)
        found = measure.measured_slowly(grads, unscale, self.options, self.clips)
        return found.norm, found.multiplier, measure.smallest(found.multiplier)

    def _look(self, *grads: Any) -> Any:
        return measure.all_finite(grads)

    def _move(self, *inputs: Any) -> None:
        """The step and what comes after it, where all is finite."""
        *grads, multiplier = inputs
        self._apply(grads, multiplier)
        if self.scale is not None:
            self.scale.move(tf.constant(True))

    def _skip(self) -> None:
        """What comes in the place of a step."""
        self._skipped()
        if self.scale is not None:
            self.scale.move(tf.constant(False))

    def _unscale(self, inputs: Sequence[Any]) -> Any:
        kind = measure.precision([grad.dtype for grad in inputs[: len(self.variables)]])
        one = tf.constant(1.0, kind)
        return one if self.scale is None else one / tf.cast(inputs[len(self.variables)], kind)

    def _measured(self, grads: list[Any], unscale: Any, *, scaled: bool) -> measure.Measured:
        asked = (self.options, self.clips)
        return measure.measured(grads, unscale, *asked, check=self.checks, scaled=scaled)

    def _step(self, *inputs: Any) -> tuple[Any, ...]:
        grads, unscale = list(inputs[: len(self.variables)]), self._unscale(inputs)
        if not self.accumulates:
            return self._whole(grads, unscale, scaled=self.scale is not None)
        ready = self._add(*inputs)
        if not self.measures:
            tf.cond(ready, self._flush, lambda: None)
            return ()
        return tuple(tf.cond(ready, self._flush, lambda: self.state.latest()))

    def _add(self, *inputs: Any) -> Any:
        """Whether this micro-batch was the last one of a step."""
        grads = list(inputs[: len(self.variables)])
        steps = self.options.accumulation_steps
        return self.state.add(self.variables, grads, self._unscale(inputs), steps, self.missed)

    def _flush(self) -> Any:
        """The step on the mean of the micro-batches; what was added up is gone, skipped or not."""
        means = self.state.means(self.variables)
        one = tf.constant(1.0, measure.precision([mean.dtype for mean in means]))
        found = self._whole(means, one, scaled=False)
        with tf.control_dependencies(list(found)):
            self.state.clear()
        if not found:
            return None
        self.state.keep(found)
        return self.state.latest()

    def _whole(self, grads: list[Any], unscale: Any, *, scaled: bool) -> tuple[Any, ...]:
        if self._by_passes and not self.accumulates:
            return self._at_once(grads, unscale)
        if not self.measures:
            multiplier = None if self.scale is None else unscale
            self._inner(grads, multiplier)
            return ()
        found = self._measured(grads, unscale, scaled=scaled)
        if found.finite is None:
            self._inner(grads, found.multiplier)
            skipped = tf.constant(0.0)
        else:
            tf.cond(
                found.finite,
                lambda: self._inner(grads, found.multiplier),
                self._skipped,
            )
            # Not moved before the step: a step that XLA refuses must leave it alone.
            if self.scale is not None:
                self.scale.move(found.finite)
            skipped = tf.where(found.finite, 0.0, 1.0)
        return found.norm, skipped, measure.smallest(found.multiplier)

    def _at_once(self, grads: list[Any], unscale: Any) -> tuple[Any, ...]:
        """Everything in one compiled function: the passes skip by themselves."""
        assert self._passes is not None  # `_by_passes`
        if not self.measures:
            self._apply(grads, None if self.scale is None else unscale)
            return ()
        norm, finite, each = self._passes.measure(grads, unscale)
        kind = measure.precision([grad.dtype for grad in grads])
        factor = measure.clip_factor(norm, each, self.options, self.clips)
        multiplier = tf.cast(tf.cast(unscale, norm.dtype) * factor, kind)
        self._apply(grads, multiplier, tf.logical_not(finite) if self.checks else None)
        skipped = tf.constant(0.0)
        if self.checks:
            if self.scale is not None:
                self.scale.move(finite)
            skipped = tf.where(finite, 0.0, 1.0)
        return tf.cast(norm, kind), skipped, measure.smallest(multiplier)

    def _inner(self, grads: list[Any], multiplier: Any) -> None:
        arguments = [*grads] if multiplier is None else [*grads, multiplier]

        def inner(*given: Any) -> None:
            several = list(given)
            self._apply(several[: len(grads)], None if multiplier is None else several[-1])

        if self._jits and not tf.config.functions_run_eagerly():
            specs = [tf.TensorSpec(given.shape, given.dtype) for given in arguments]
            run = self._made(lambda: Traced(inner, specs, jit=True))
            self._inner_refused = run.refused
            run(arguments)
        else:
            inner(*arguments)

    def _skipped(self) -> None:
        if self.scale is not None and self.scale.counts_skipped:
            self._alive().iterations.assign_add(1)

    def _apply(self, grads: list[Any], multiplier: Any, skip: Any = None) -> None:
        """The apply pass: everything that moves; `skip` is for the compiled passes alone."""
        optimizer = self._alive()
        value = self.options.clip_value
        by = self._passes if self._by_passes else None
        if by is None and (multiplier is not None or value is not None or self.halves.pairs):
            grads = measure.multiplied(grads, multiplier, value)
        self.halves.widen()
        if self.missed:
            back = self.state.put_back(optimizer, self.variables, self.targets, self.missed)
        with rates.read(optimizer, self._rates):
            if by is not None:
                by.step(optimizer, grads, self.targets, multiplier, value, skip)
            elif self._native is not None:
                self._native(optimizer, grads, self.targets)
            else:
                self._apply_as_it_is(optimizer, grads)
        if self.missed:
            back()

    def _apply_as_it_is(self, optimizer: Any, grads: list[Any]) -> None:
        given = optimizers.as_given(optimizer, self.clips.replaced)
        ordered = order.kept(optimizer, self._jits and traced.on_cpu(self.variables))
        with given, self.halves.as_excluded(optimizer), ordered:
            optimizers.apply(optimizer, grads, self.targets)
        self.halves.narrow()
        if self.options.ema_decay is not None:
            self.state.average(self.variables, 1.0 - self.options.ema_decay)

    @property
    def state(self) -> Kept:
        """What the options keep."""
        assert self._state is not None  # they keep something
        return self._state

    def _alive(self) -> Any:
        optimizer = self._optimizer()
        assert optimizer is not None  # who calls us holds it
        return optimizer
