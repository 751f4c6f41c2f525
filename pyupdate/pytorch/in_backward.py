# SPDX-License-Identifier: Apache-2.0
"""Update during backward: a bucket of parameters is stepped as soon as its gradients are there.

Autograd calls a hook when a parameter's gradient is complete: every use of the parameter has been
differentiated by then. So the parameter may be stepped and its gradient freed while the rest of the
model is still being differentiated, and only a small part of the gradients exists at any time. An
elementwise rule gives the same bits however the parameters are parted; what needs all gradients at
once (a global norm, a finite check) is refused.

Buckets are learnt: the first backward pass fills them in the order in which gradients arrive.
"""

from __future__ import annotations

import contextvars
import dataclasses
import threading
from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import Tensor, nn

from ..remembered import Remembered
from . import apply, engines, gradients, reentrant, step

# A bucket costs a plan's step, some 50 us on the CPU: that long takes AdamW for the fewest elements
# of a bucket. Between the two, a bucket is this part of the model.
_FEWEST = 2**16
_MOST = 2**18
_PART = 16

_WITHOUT: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_norm": (lambda value: value is not None, "clips by the norm of all gradients"),
    "skip_nonfinite": (bool, "looks at all gradients before the first is applied"),
    "error_if_nonfinite": (bool, "looks at all gradients before the first is applied"),
    "accumulation_steps": (lambda value: value is not None and value > 1, "keeps all gradients"),
}
"""The options that in_backward cannot have: when, and what they do."""

_WRAPPERS = frozenset({"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"})
"""Modules that reduce gradients over processes after autograd's hook was called."""

_CHANGED = (
    "a parameter that was stepped during this backward pass (in_backward=True) although its values "
    "are used once more where autograd takes no gradient, as in param.detach(). Build the model "
    "without in_backward"
)

_layouts: Remembered[_Layout] = Remembered()


def is_wanted(model: nn.Module) -> bool:
    """Whether the model was built with ``in_backward=True``."""
    return getattr(model, "update_in_backward", False) is True


def check_model(name: str, model: nn.Module, optimizer: Any) -> None:
    """Refuse a model or an optimizer that cannot be updated during backward.

    Raises:
        TypeError: the optimizer has no rule of pyupdate's.
        ValueError: an option that needs all gradients, tied weights, or a wrapper that reduces
            gradients over processes.
    """
    check_optimizer(name, optimizer)
    for module in model.modules():
        wrappers = _WRAPPERS.intersection(kind.__name__ for kind in type(module).__mro__)
        if wrappers:
            message = (
                f"in_backward=True cannot be had with '{name}': {min(wrappers)} reduces gradients "
                "over processes after they would have been applied; leave in_backward out"
            )
            raise ValueError(message)
    seen: dict[int, str] = {}
    for qualified, param in model.named_parameters(remove_duplicate=False):
        first = seen.setdefault(id(param), qualified)
        if first != qualified:
            message = (
                f"in_backward=True cannot be had with tied weights: '{first}' and '{qualified}' of "
                f"'{name}' are the same parameter; untie them, or leave in_backward out"
            )
            raise ValueError(message)


def check_optimizer(name: str, optimizer: Any) -> None:
    """Refuse an optimizer that cannot step a part of its parameters, or must see all gradients.

    Raises:
        TypeError, ValueError: says why, and the mend.
    """
    if not engines.has_rule(optimizer):
        message = (
            "in_backward=True needs an optimizer of pyupdate.optim, or one that "
            f"pyupdate.accelerate takes, but the one of '{name}' is a {type(optimizer).__name__}"
        )
        raise TypeError(message)
    if engines.has_own_step(optimizer):
        message = (
            f"in_backward=True steps piece by piece, which the step of {type(optimizer).__name__} "
            f"(the optimizer of '{name}') would not see: use the class of pyupdate.optim below it, "
            "or leave in_backward out"
        )
        raise TypeError(message)
    options = engines.options_of(optimizer)
    for field in dataclasses.fields(options):
        is_set, does = _WITHOUT.get(field.name, (None, ""))
        value = getattr(options, field.name)
        if is_set is not None and is_set(value):
            message = (
                f"in_backward=True cannot be had with {field.name}={value!r} (the optimizer of "
                f"'{name}'), which {does}: leave one of them out"
            )
            raise ValueError(message)


def check_call(name: str, optimizer: Any, scaler: object, retain_graph: bool, defer: bool) -> None:
    """Refuse an ``update_model`` call that cannot be made during backward.

    Raises:
        TypeError, ValueError: names the argument and the mend.
    """
    check_optimizer(name, optimizer)
    without = f"'{name}' was built with in_backward=True, which cannot be had with"
    message = ""
    if scaler is not None:
        message = (
            f"{without} a scaler: the step is skipped if any gradient is inf or nan, which is only "
            "known when all are there. Give scaler=None, or build the model without in_backward"
        )
    elif defer:
        message = (
            f"{without} defer=True, which keeps all gradients: update this model last, with "
            "defer=False, or build it without in_backward"
        )
    elif retain_graph:
        message = (
            f"{without} retain_graph=True (the default): the weights that the graph needs change "
            "while it is differentiated. Give retain_graph=False"
        )
    if message:
        raise ValueError(message)


def update(
    model: nn.Module, name: str, optimizer: Any, params: Sequence[nn.Parameter], loss: Tensor
) -> None:
    """Differentiate a loss and step the optimizer meanwhile; `.grad` is None afterwards.

    Raises:
        What `update_model` does. Parameters that were stepped until then stay stepped, with their
        gradient None; of the others everything is as it was.
    """
    gradients.check_loss(name, loss)
    layout = _layouts.get(model)
    if layout is None or layout.trainable != list(map(id, params)):
        check_model(name, model, optimizer)
        layout = _layouts[model] = _Layout(params)
    apply.ensure_named(model, optimizer, params)
    aside = gradients.to_set_aside(params)
    running = _Running(model, name, layout, params, aside, _ids_held(optimizer))
    try:
        gradients.set_aside(params, aside)
        step.step_in_pieces(optimizer, lambda piece: running.run(loss, piece))
    except BaseException:
        running.put_back()
        raise
    finally:
        # Plans of the buckets, and as many others as there would have been without.
        engine = engines.engine_of(optimizer)
        engine.kept = max(engine.kept, engines.PLANS_KEPT + len(layout.buckets))


def _ids_held(optimizer: Any) -> frozenset[int]:
    return frozenset(map(id, apply.held(optimizer)))


class _Layout:
    """Which parameters are stepped together, by their ids: it must not keep a model alive."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.trainable = list(map(id, params))
        elements = sum(param.numel() for param in params)
        self.size = min(max(elements // _PART, _FEWEST), _MOST)
        self.buckets: list[list[int]] = []
        self._of: dict[int, int] = {}
        self._filled = self.size  # elements in the last bucket, which takes more up to `size`

    def bucket_of(self, param: Tensor) -> int:
        """The bucket of a parameter; one that is not known yet joins the last."""
        index = self._of.get(id(param))
        if index is None:
            if not self.is_open(len(self.buckets) - 1):
                self.buckets.append([])
                self._filled = 0
            index = self._of[id(param)] = len(self.buckets) - 1
            self.buckets[index].append(id(param))
            self._filled += param.numel()
        return index

    def is_open(self, index: int) -> bool:
        """Whether more parameters may come to a bucket."""
        return index == len(self.buckets) - 1 and self._filled < self.size

    def close(self) -> None:
        """Put what comes next into a bucket of its own."""
        self._filled = self.size


class _Running:
    """One backward pass during which parameters are stepped."""

    def __init__(
        self,
        model: nn.Module,
        name: str,
        layout: _Layout,
        params: Sequence[nn.Parameter],
        aside: gradients.Aside,
        held: Collection[int],
    ) -> None:
        self._model = model
        self._name = name
        self._layout = layout
        self._params = params
        self._aside = aside
        self._held = held
        self._by_id = {id(param): param for param in params}
        self._before = {
            id(param): value
            for param, value in zip(params, aside.values, strict=True)
            if value is not None
        }
        self._arrived: set[int] = set()
        self._stepped: set[int] = set()
        self._missing: dict[int, int] = {}
        self._waiting: dict[int, int] = {}  # bucket -> elements whose gradients wait
        self._elements = 0  # their sum
        self._piece: Callable[[Collection[Tensor]], None] | None = None
        # Autograd differentiates for each GPU in a thread of its own, where no `use_backend` holds.
        self._lock = threading.Lock()
        self._context = contextvars.copy_context()

    def run(self, loss: Tensor, piece: Callable[[Collection[Tensor]], None]) -> None:
        """Differentiate; `piece` steps the parameters that it is given."""
        self._piece = piece
        self._layout.close()
        with gradients.on_gradients(self._params, self._on_gradient):
            gradients.backward(
                self._name, loss, self._params, None, retain_graph=False, changed=_CHANGED
            )
        gradients.check_reached(self._name, len(self._arrived))
        unreached = [i for i, p in enumerate(self._params) if id(p) not in self._arrived]
        if unreached:
            reentrant.check_unreached(self._model, self._name, loss, self._params, unreached)
        for index in unreached:  # the user's own gradients are part of the step
            if id(self._params[index]) in self._before:
                self._take(self._params[index])
        self._step_all()

    def put_back(self) -> None:
        """Give the gradients back of all that was not stepped."""
        kept = [i for i, param in enumerate(self._params) if id(param) not in self._stepped]
        aside = gradients.Aside(
            [self._aside.grads[i] for i in kept], [self._aside.values[i] for i in kept]
        )
        gradients.put_back([self._params[i] for i in kept], aside)

    def _on_gradient(self, param: Tensor) -> None:
        with self._lock:
            if id(param) in self._arrived:
                message = (
                    f"parameter '{self._qualified(param)}' of '{self._name}' got its gradient "
                    "twice in one backward pass, and in_backward=True may have applied the first "
                    "already: build the model without in_backward"
                )
                raise RuntimeError(message)
            self._arrived.add(id(param))
            self._context.run(self._take, param)

    def _take(self, param: Tensor) -> None:
        """Step the bucket of a parameter whose gradient has come, if it was the last one."""
        key = id(param)
        if key in self._before:
            gradients.add_value(param, self._before[key])
        if key not in self._held:
            param.grad = None
            return
        layout = self._layout
        bucket = layout.bucket_of(param)
        elements = param.numel()
        self._elements += elements
        self._waiting[bucket] = self._waiting.get(bucket, 0) + elements
        missing = self._missing.get(bucket)
        if missing is None:
            missing = len(layout.buckets[bucket])
        self._missing[bucket] = missing - 1
        if layout.is_open(bucket):
            return
        if missing <= 1:
            self._step(bucket)
        elif self._elements > 2 * layout.size:
            self._step_all()  # they arrive in another order than was learnt

    def _step_all(self) -> None:
        for bucket in list(self._waiting):
            self._step(bucket)

    def _step(self, bucket: int) -> None:
        """Step what has come of a bucket: the plan passes over parameters without a gradient."""
        members = [self._by_id[key] for key in self._layout.buckets[bucket]]
        assert self._piece is not None
        self._piece(members)
        self._elements -= self._waiting.pop(bucket)
        for param in members:
            if param.grad is not None:
                self._stepped.add(id(param))
                param.grad = None

    def _qualified(self, param: Tensor) -> str:
        names = (name for name, other in self._model.named_parameters() if other is param)
        return next(names, "?")
