# SPDX-License-Identifier: Apache-2.0
"""Drop-in optimizers: torch's constructors, state keys and checkpoints; pyupdate's step.

    optimizer = pyupdate.optim.AdamW(model.parameters(), lr=1e-3, max_norm=1.0)

A class is torch's own class with another ``step`` and one more keyword, ``max_norm``. The flags
``foreach`` and ``fused`` are checked as torch does and otherwise make no difference;
``differentiable=True`` runs torch's own step.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.optim import Optimizer

from . import amp
from .kernels import rules
from .kernels.language import Rule
from .options import LastUpdate, Options
from .pytorch import step as engine
from .pytorch.rows import Group, OptimizerRow

if TYPE_CHECKING:
    from torch.amp.grad_scaler import GradScaler

__all__ = ["SGD", "Adam", "AdamW", "accelerate"]

# Torch warns when a GradScaler hands itself to a step that asks for it, which is how ours learns of
# the scaler before torch's own pass over the gradients.
warnings.filterwarnings(
    "ignore",
    message="GradScaler is going to stop passing itself as a keyword argument",
    category=FutureWarning,
)


def _sgd(group: Group) -> Rule:
    return rules.sgd_momentum if group["momentum"] != 0 else rules.sgd


def _adam(group: Group) -> Rule:
    if group.get("decoupled_weight_decay", False):
        return _adamw(group)
    return rules.adam_amsgrad if group["amsgrad"] else rules.adam


def _adamw(group: Group) -> Rule:
    return rules.adamw_amsgrad if group["amsgrad"] else rules.adamw


engine.ROWS.update(
    {
        torch.optim.SGD: OptimizerRow(_sgd, counts_steps=False),
        torch.optim.Adam: OptimizerRow(_adam, counts_steps=True),
        torch.optim.AdamW: OptimizerRow(_adamw, counts_steps=True),
    }
)


class Planned(Optimizer):
    """What the drop-in classes share: a step through the plan, and the options."""

    _step_supports_amp_scaling = True
    pyupdate_options: Options

    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        grad_scaler: GradScaler | None = None,
    ) -> Any:
        """Make one step; see `pyupdate.pytorch.step.step`.

        Args:
            closure: re-evaluates the model and returns the loss.
            grad_scaler: the ``torch.amp.GradScaler`` that the gradients were scaled by:
                ``scaler.step(optimizer)`` passes itself here.

        Returns:
            What the closure returned, None without one.

        Raises:
            TypeError, ValueError: something is refused; nothing was written.
            RuntimeError: a second step before ``scaler.update()``.
        """
        if any(group.get("differentiable", False) for group in self.param_groups):
            return self._differentiable_step(closure, grad_scaler)
        return engine.step.__wrapped__(self, closure, grad_scaler=grad_scaler)  # type: ignore[attr-defined]

    def _differentiable_step(self, closure: Callable[[], Any] | None, scaler: Any) -> Any:
        if engine.options_of(self).max_norm is not None:
            message = (
                "max_norm cannot be had with differentiable=True, which runs torch's own step: "
                "clip with torch.nn.utils.clip_grad_norm_, or leave one of them out"
            )
            raise ValueError(message)
        engine.check_closure(closure, scaler)
        found = amp.unscale(scaler, self)
        loss = None if found else _stock_step(self)(self, closure)
        amp.tell(scaler, self, LastUpdate(None, skipped=found, multiplier=1.0))
        return loss

    step = Optimizer.profile_hook_step(step)
    step.hooked = True  # type: ignore[attr-defined]

    def __getstate__(self) -> dict[str, Any]:
        kept = super().__getstate__()
        return kept | {"pyupdate_options": engine.options_of(self)}


def _stock_step(optimizer: Optimizer) -> Callable[..., Any]:
    """The step of torch's own class, without the hooks that ours has run already."""
    for kind in type(optimizer).__mro__:
        if kind in engine.ROWS:
            found = kind.step
            inner = getattr(found, "__wrapped__", found)
            stock: Callable[..., Any] = inner if hasattr(found, "hooked") else found
            return stock
    message = f"{type(optimizer).__name__} is none of torch's optimizers"
    raise TypeError(message)


class SGD(Planned, torch.optim.SGD):
    """``torch.optim.SGD``, with momentum, dampening, Nesterov, weight decay and maximize.

    Args:
        *args, **kwargs: those of ``torch.optim.SGD``.
        max_norm: the bound of the gradients' global 2-norm, None for no clip.

    Example:
        >>> import torch, pyupdate
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = pyupdate.optim.SGD([p], lr=0.5)
        >>> p.grad = torch.tensor([1.0, 0.0])
        >>> optimizer.step()
        >>> p.tolist()
        [0.5, 1.0]
    """

    def __init__(self, *args: Any, max_norm: float | None = None, **kwargs: Any) -> None:
        self.pyupdate_options = Options(max_norm=max_norm)
        super().__init__(*args, **kwargs)


class Adam(Planned, torch.optim.Adam):
    """``torch.optim.Adam`` (Kingma and Ba 2015, arXiv:1412.6980), with amsgrad and maximize.

    Args:
        *args, **kwargs: those of ``torch.optim.Adam``.
        max_norm: the bound of the gradients' global 2-norm, None for no clip.

    Example:
        >>> import torch, pyupdate
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = pyupdate.optim.Adam([p], lr=0.5)
        >>> p.grad = torch.tensor([3.0, 0.0])
        >>> optimizer.step()
        >>> p.tolist()
        [0.5, 1.0]
    """

    def __init__(self, *args: Any, max_norm: float | None = None, **kwargs: Any) -> None:
        self.pyupdate_options = Options(max_norm=max_norm)
        super().__init__(*args, **kwargs)


class AdamW(Planned, torch.optim.AdamW):
    """``torch.optim.AdamW`` (Loshchilov and Hutter 2019, arXiv:1711.05101).

    Args:
        *args, **kwargs: those of ``torch.optim.AdamW``.
        max_norm: the bound of the gradients' global 2-norm, None for no clip.

    Example:
        >>> import torch, pyupdate
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = pyupdate.optim.AdamW([p], lr=0.5, weight_decay=0.0)
        >>> p.grad = torch.tensor([3.0, 0.0])
        >>> optimizer.step()
        >>> p.tolist()
        [0.5, 1.0]
    """

    def __init__(self, *args: Any, max_norm: float | None = None, **kwargs: Any) -> None:
        self.pyupdate_options = Options(max_norm=max_norm)
        super().__init__(*args, **kwargs)


_DROP_INS: dict[type[Optimizer], type[Planned]] = {
    torch.optim.SGD: SGD,
    torch.optim.Adam: Adam,
    torch.optim.AdamW: AdamW,
}

_O = TypeVar("_O", bound=Optimizer)


def accelerate(optimizer: _O, *, max_norm: float | None = None) -> _O:
    """Make a stock torch optimizer step through pyupdate; its state and groups stay in place.

    The object becomes an instance of the drop-in class (a subclass of its own), so that
    ``optimizer.step()``, ``scaler.step(optimizer)`` and learning-rate schedulers need no change.

    Args:
        optimizer: a ``torch.optim.SGD``, ``Adam`` or ``AdamW``, or one of ours.
        max_norm: the bound of the gradients' global 2-norm, None for no clip.

    Returns:
        The same object.

    Raises:
        TypeError: it is none of those, it has ``differentiable=True``, or its ``step`` was replaced
            by somebody else.

    Example:
        >>> import torch, pyupdate
        >>> optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
        >>> pyupdate.accelerate(optimizer) is optimizer
        True
    """
    options = Options(max_norm=max_norm)
    if not isinstance(optimizer, Planned):
        drop_in = _DROP_INS.get(type(optimizer))
        if drop_in is None or not engine.has_rule(optimizer):
            names = ", ".join(f"torch.optim.{kind.__name__}" for kind in _DROP_INS)
            found = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
            why = ""
            if drop_in is not None:
                differentiable = any(group["differentiable"] for group in optimizer.param_groups)
                why = " with differentiable=True" if differentiable else " whose step was replaced"
            message = f"cannot accelerate {found}{why}; accepted are {names} as torch made them"
            raise TypeError(message)
        scheduled = optimizer.__dict__.pop("step", None)
        optimizer.__class__ = drop_in  # type: ignore[assignment]
        if scheduled is not None:
            _watch_for_scheduler(optimizer)
    optimizer.__dict__["pyupdate_options"] = options
    engine.engine_of(optimizer).plans.clear()
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
