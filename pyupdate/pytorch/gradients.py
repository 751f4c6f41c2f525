# SPDX-License-Identifier: Apache-2.0
"""Gradients of a loss for a model's trainable parameters, and for nothing else.

`.grad` is set aside before the backward pass and what came out of it is added after, into new
tensors: a backward that raises in the middle, or a step that is refused, can be undone exactly.
Where something reads `.grad` during the backward pass, as the reduction over processes of
``DistributedDataParallel`` does, what was there stays there, and is copied to be put back.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from . import sharded

_CAUSES = (
    "it does not depend on this model, it was computed under torch.no_grad() or from detached "
    "values, or inside torch.utils.checkpoint with use_reentrant=True (use False)"
)

_CHANGED_BEFORE = (
    "the weights of a model that was updated first. Give defer=True (and a deferred dict) to the "
    "earlier update_model call, and call what it leaves in the dict after this one"
)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The model's parameters that require gradients, each once, in the model's order."""
    return [param for param in _every(model) if param.requires_grad]


def drop_frozen(model: nn.Module, held: Iterable[Tensor]) -> None:
    """Drop what waited for a step in parameters that were frozen since: none takes it.

    Of those that the optimizer holds: a frozen part of the model may wait for a step of another's.
    """
    waiting = [param for param in held if not param.requires_grad and param.grad is not None]
    if waiting:
        ours = set(map(id, _every(model)))
        drop([param for param in waiting if id(param) in ours])


def _every(model: nn.Module) -> Iterable[nn.Parameter]:
    """``model.parameters()``.

    ``parameters()`` builds every qualified name on its way. Without them the walk takes 0.22 ms
    instead of 0.73 for 750 modules and 1,000 parameters, and sees every change of the tree.
    """
    kind = type(model)
    if (
        kind.parameters is not nn.Module.parameters
        or kind.named_parameters is not nn.Module.named_parameters
        or kind.named_modules is not nn.Module.named_modules
    ):
        return model.parameters()
    found: list[nn.Parameter | None] = []
    seen: set[nn.Module] = set()
    _walk((model,), found, seen)
    each = {id(param): param for param in found}
    each.pop(id(None), None)  # a bias that is not there
    return cast("Iterable[nn.Parameter]", each.values())


def _walk(
    modules: Iterable[nn.Module | None], found: list[nn.Parameter | None], seen: set[nn.Module]
) -> None:
    for module in modules:
        if module is None or module in seen:
            continue
        seen.add(module)
        params = module._parameters
        if params:
            found.extend(params.values())
        children = module._modules
        if children:
            _walk(children.values(), found, seen)


@dataclass(frozen=True)
class Aside:
    """The gradients that were there before a backward pass.

    Attributes:
        grads: the tensors themselves, which go back if anything fails.
        values: what they held: copies of those that the backward pass may write to, else the
            tensors themselves.
        in_place: whether they stay in `.grad`, where autograd adds to them.
    """

    grads: Sequence[Tensor | None]
    values: Sequence[Tensor | None]
    in_place: bool = False


@torch.no_grad()
def prepare(params: Sequence[Tensor]) -> Aside:
    """What every `.grad` is, to be set aside; where that would be noticed, in place and copied."""
    grads = [param.grad for param in params]
    if _all_none(grads) or not _is_read_in_backward(params):
        return _aside(grads)
    # Nobody can write to a tensor of inference mode, not even put_back().
    values = [g if g is None or g.is_inference() else g.clone() for g in grads]
    return Aside(grads, values, in_place=True)


def _is_read_in_backward(params: Sequence[Tensor]) -> bool:
    """Whether something may look at `.grad` as soon as autograd has filled it.

    Of ``DistributedDataParallel`` nothing can be seen from a parameter.
    """
    return sharded.is_distributed() or any(param._post_accumulate_grad_hooks for param in params)


@torch.no_grad()
def to_set_aside(params: Sequence[Tensor]) -> Aside:
    """What every `.grad` is, to be set aside."""
    return _aside([param.grad for param in params])


def _aside(grads: Sequence[Tensor | None]) -> Aside:
    """Views of a buffer are copied, which the backward pass may fill anew.

    Tried on torch 2.13: ``DistributedDataParallel(gradient_as_bucket_view=True)`` does.
    """
    if _all_none(grads):
        return Aside(grads, grads)
    return Aside(grads, [g.clone() if g is not None and g._is_view() else g for g in grads])


def set_aside(params: Sequence[Tensor], aside: Aside) -> None:
    """Take every `.grad` away that does not stay in place, for `add_to` and `put_back`."""
    if not aside.in_place and not _all_none(aside.grads):
        drop(params)


def _all_none(values: Iterable[object]) -> bool:
    return all(map(operator.is_, values, itertools.repeat(None)))


@torch.no_grad()
def put_back(params: Sequence[Tensor], aside: Aside) -> None:
    """Undo `set_aside`, and what happened since."""
    for param, grad, value in zip(params, aside.grads, aside.values, strict=True):
        if grad is not None and value is not None and grad is not value:
            grad.copy_(value)
        param.grad = grad


def drop(params: Sequence[Tensor]) -> None:
    """Set every `.grad` to None."""
    for param in params:
        param.grad = None


def check_loss(name: str, loss: Tensor) -> None:
    """Refuse a loss that cannot have gradients.

    Raises:
        ValueError: names the model.
    """
    if not loss.requires_grad:
        message = f"the loss given to update '{name}' does not require gradients: {_CAUSES}"
        raise ValueError(message)
    if loss.is_complex():
        message = (
            f"the loss given to update '{name}' is complex ({loss.dtype}): a gradient is that of a "
            "real number; give loss.abs(), its .real, or torch.view_as_real(loss) summed up"
        )
        raise ValueError(message)
    if loss.numel() == 0:
        message = (
            f"the loss given to update '{name}' has no elements, so no mean: is a batch empty?"
        )
        raise ValueError(message)


def backward(
    name: str,
    loss: Tensor,
    params: Sequence[Tensor],
    scaler: torch.amp.GradScaler | None,
    retain_graph: bool,
    changed: str = _CHANGED_BEFORE,
) -> None:
    """Put the gradients of the loss's mean, times the scaler's scale, into `.grad` (which is None).

    Args:
        name: of the model.
        loss: of any shape.
        params: for which gradients are taken.
        scaler: an enabled one, or None.
        retain_graph: whether the graph can be used again.
        changed: the likely cause, and the mend, where values that the graph needs have changed.

    Raises:
        ValueError: a loss that cannot have gradients, named with the model.
        RuntimeError: weights that it needs were changed in place, or a compiled graph cannot be
            kept; else torch's own, as it is.
    """
    check_loss(name, loss)
    with torch.enable_grad():
        if loss.dim() > 0:
            loss = loss.mean()
        if scaler is not None:
            loss = scaler.scale(loss)
    try:
        torch.autograd.backward(loss, retain_graph=retain_graph, inputs=params)
    except RuntimeError as error:
        if "donated buffer" in str(error):
            message = (
                f"cannot keep the graph of the loss of '{name}', for torch.compile has let its "
                "backward pass reuse the memory of it: pass retain_graph=False, or set "
                "torch._functorch.config.donated_buffer = False before the model is compiled"
            )
            raise RuntimeError(message) from error
        if "modified by an inplace operation" not in str(error):
            raise
        message = (
            f"cannot differentiate the loss of '{name}': values that its graph needs were changed "
            f"in place after the forward pass, most likely {changed}"
        )
        raise RuntimeError(message) from error


def add_to(
    aside: Aside,
    name: str,
    loss: Tensor,
    params: Sequence[Tensor],
    scaler: torch.amp.GradScaler | None,
    retain_graph: bool,
) -> list[int]:
    """Differentiate, and add what comes out to the gradients that were there before.

    Returns:
        The positions of the parameters that the loss did not reach.

    Raises:
        As `backward`.
    """
    if aside.in_place:  # autograd adds
        with _reached(params) as reached:
            backward(name, loss, params, scaler, retain_graph)
        return [index for index, param in enumerate(params) if id(param) not in reached]
    backward(name, loss, params, scaler, retain_graph)
    unreached = [index for index, param in enumerate(params) if param.grad is None]
    if not _all_none(aside.values):
        with torch.no_grad():
            _add(params, aside.values)
    return unreached


@contextmanager
def _reached(params: Sequence[Tensor]) -> Iterator[set[int]]:
    """The ids of the parameters whose gradients are accumulated inside.

    Hooks tell that, for the version of a view in a bucket is that of all the bucket's views.
    """
    reached: set[int] = set()
    with on_gradients(params, lambda param: reached.add(id(param))):
        yield reached


@contextmanager
def on_gradients(params: Sequence[Tensor], hook: Callable[[Tensor], None]) -> Iterator[None]:
    """Inside, a hook is called with each parameter when autograd has accumulated its gradient."""
    handles = []
    try:
        for param in params:
            hooked: Any = param  # torch's method has no types
            hooks = hooked._post_accumulate_grad_hooks
            if hooks is not None:  # torch.utils.swap_tensors has left them with other values
                hooked._post_accumulate_grad_hooks = hooks
            handles.append(hooked.register_post_accumulate_grad_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_reached(name: str, count: int) -> None:
    """Refuse a loss that reaches no parameter.

    Raises:
        ValueError: names the model.
    """
    if count == 0:
        message = f"the loss given to update '{name}' reaches none of its parameters: {_CAUSES}"
        raise ValueError(message)


@torch.no_grad()
def add_value(param: Tensor, value: Tensor) -> None:
    """Add what one `.grad` held before to what it holds now, into a new tensor."""
    _add([param], [value])


def _add(params: Sequence[Tensor], values: Sequence[Tensor | None]) -> None:
    both: list[tuple[Tensor, Tensor, Tensor]] = []
    for param, old in zip(params, values, strict=True):
        if old is None:
            continue
        new = param.grad
        if new is None:
            param.grad = old
        elif old.layout is torch.strided and new.layout is torch.strided:
            both.append((param, old, new))
        else:  # torch adds a sparse tensor to a dense one, not the other way round
            param.grad = new + old if new.layout is torch.strided else old + new
    if both:
        targets, olds, news = zip(*both, strict=True)
        sums: Any = torch._foreach_add(olds, news)
        for param, grad in zip(targets, sums, strict=True):
            param.grad = grad
