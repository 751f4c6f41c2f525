# SPDX-License-Identifier: Apache-2.0
"""``accelerate``: a stock torch optimizer steps through pyupdate from now on."""

from __future__ import annotations

from typing import Any, TypeVar

from torch.optim import Optimizer

from ..forks import one_thread_in_forked_child
from ..options import options_from, shows_options
from ..pytorch import accumulation, engines, state
from .planned import DROP_INS, Planned

_O = TypeVar("_O", bound=Optimizer)


@shows_options
def accelerate(optimizer: _O, **options: Any) -> _O:
    """Make a stock torch optimizer step through pyupdate; its state and groups stay in place.

    The object becomes an instance of the drop-in class (a subclass of its own), so that
    ``optimizer.step()``, ``scaler.step(optimizer)`` and learning-rate schedulers need no change.

    Args:
        optimizer: one of those of ``torch.optim`` that `pyupdate.optim` has too, or one of ours.
        **options: `pyupdate.options.Options` by name, those that it has from now on. With
            ``state_dtype``, state that is there already is converted here, once, without loss;
            without it, state stays in the dtype that it has.

    Returns:
        The same object.

    Raises:
        TypeError: it is none of those, it has ``differentiable=True``, or its ``step`` was replaced
            by somebody else; an option is unknown or of the wrong type.
        ValueError: an option's value cannot be had.

    Example:
        >>> import torch, pyupdate
        >>> optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
        >>> pyupdate.accelerate(optimizer, max_norm=1.0) is optimizer
        True
    """
    checked = options_from(options, "accelerate")
    if not isinstance(optimizer, Planned):
        drop_in = DROP_INS.get(type(optimizer))
        if drop_in is None or not engines.is_as_made(optimizer):
            names = ", ".join(f"torch.optim.{kind.__name__}" for kind in DROP_INS)
            found = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
            why = ""
            if drop_in is not None:
                differentiable = any(group["differentiable"] for group in optimizer.param_groups)
                why = " with differentiable=True" if differentiable else " whose step was replaced"
            message = f"cannot accelerate {found}{why}; accepted are {names} as torch made them"
            raise TypeError(message)
    engines.check_options(type(optimizer), checked)
    accumulation.check_new_length(optimizer, checked.accumulation_steps)
    with one_thread_in_forked_child():
        wide = state.converted(optimizer, checked.state_dtype)
    if not isinstance(optimizer, Planned):
        scheduled = optimizer.__dict__.pop("step", None)
        optimizer.__class__ = DROP_INS[type(optimizer)]  # type: ignore[assignment]
        if scheduled is not None:
            _watch_for_scheduler(optimizer)
    for inner, key, value in wide:
        inner[key] = value
    optimizer.__dict__["pyupdate_options"] = checked
    accumulation.keep_counts(optimizer)
    accumulation.close_without_gradients(optimizer)
    engines.engine_of(optimizer).plans.clear()
    return optimizer


def _watch_for_scheduler(optimizer: Optimizer) -> None:
    """Put back the mark that a learning-rate scheduler left on the step it wrapped."""
    from functools import wraps
    from weakref import ref

    reference = ref(optimizer)

    @wraps(type(optimizer).step)
    def step(*args: Any, **kwargs: Any) -> Any:
        stepped = reference()
        assert stepped is not None
        stepped._opt_called = True  # type: ignore[attr-defined]
        return type(stepped).step(stepped, *args, **kwargs)

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    optimizer.step = step  # type: ignore[method-assign]
