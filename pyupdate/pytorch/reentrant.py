# SPDX-License-Identifier: Apache-2.0
"""Find the parameters that a reentrant checkpoint hides from ``backward(inputs=...)``.

``torch.utils.checkpoint(use_reentrant=True)`` runs a function without a graph; its parameters are
no inputs of its node. Where a gradient of the node's inputs is asked for, torch refuses; where none
is (tried on torch 2.13: ``head(checkpoint(block, x))`` with an x that requires gradients), the node
is left out and the block silently gets no gradients. So the graph is searched for such a node when
parameters were not reached, once for every new set of them.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Sequence
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from ..eagerly import level_of_caller
from ..remembered import Remembered

_NODE = "CheckpointFunctionBackward"
_MEND = "give checkpoint(..., use_reentrant=False)"
_DEPTH = 4  # lambda -> partial -> method -> module is the deepest that is met in the wild

_judged: Remembered[frozenset[int]] = Remembered()


def check_unreached(
    model: nn.Module, name: str, loss: Tensor, params: Sequence[Tensor], unreached: Sequence[int]
) -> None:
    """Refuse an update in which a reentrant checkpoint hid parameters of the model.

    Raises:
        ValueError: names one of them.
    """
    hidden = frozenset(id(params[index]) for index in unreached)
    if _judged.get(model) == hidden:
        return
    for function in _checkpointed(loss):
        modules = list(_modules(function, _DEPTH))
        if not modules:
            message = (
                f"the loss given to update '{name}' went through a checkpoint with "
                "use_reentrant=True, and some of the model's parameters were not reached: if they "
                f"are used in it they are not trained; {_MEND}"
            )
            warnings.warn(message, RuntimeWarning, stacklevel=level_of_caller())
        inside = {id(param) for module in modules for param in module.parameters()}
        for qualified, param in model.named_parameters():
            if id(param) in hidden and id(param) in inside:
                message = (
                    f"parameter '{qualified}' of '{name}' is used in a checkpoint with "
                    "use_reentrant=True, which hides it from gradients that are taken for the "
                    f"model's parameters alone: {_MEND}"
                )
                raise ValueError(message)
    _judged[model] = hidden


def _checkpointed(loss: Tensor) -> Iterator[Any]:
    """The functions of the reentrant checkpoints in a loss's graph."""
    stack: list[Any] = [loss.grad_fn]
    seen: set[Any] = set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == _NODE and hasattr(node, "run_function"):
            yield node.run_function
        stack.extend(before for before, _ in node.next_functions)


def _modules(value: object, depth: int) -> Iterator[nn.Module]:
    """The modules that a function runs, as far as they can be seen from outside."""
    if isinstance(value, nn.Module):
        yield value
        return
    if depth == 0:
        return
    inside: list[object] = []
    if isinstance(value, functools.partial):
        inside += [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, MethodType):
        inside += [value.__self__, value.__func__]
    elif isinstance(value, list | tuple):
        inside += value
    elif isinstance(value, FunctionType):
        inside += [cell.cell_contents for cell in value.__closure__ or () if _is_full(cell)]
        inside += value.__defaults__ or ()
        names = value.__code__.co_names
        inside += [value.__globals__[name] for name in names if name in value.__globals__]
    for item in inside:
        yield from _modules(item, depth - 1)


def _is_full(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a variable that was not assigned yet
        return False
