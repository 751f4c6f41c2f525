# SPDX-License-Identifier: Apache-2.0
"""Which gradients a group's micro-batches are in, so that a window sees when one was lost.

A gradient is known by its tensor, not by its values: a backward pass adds to it in place, and what
takes its place holds fewer micro-batches than were counted.
"""

from __future__ import annotations

import itertools
import operator
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


class Gradients:
    """The parameters of a group and what is in their `.grad`; it keeps both alive."""

    def __init__(self, group: Mapping[str, Any]) -> None:
        self.params: list[torch.Tensor] = [*group["params"]]
        self.grads = [param.grad for param in self.params]
        self.same: Counted | None = None
        """What was found to be of these; it stays so while this keeps them alive."""

    def missing(self) -> int:
        """How many parameters have no gradient."""
        return sum(map(operator.is_, self.grads, itertools.repeat(None)))


@dataclass
class Changes:
    """What became of counted gradients: the parameters by what is the matter with them."""

    new: list[torch.Tensor] = field(default_factory=list)
    """They were not in the group when it was counted."""
    gone: list[torch.Tensor] = field(default_factory=list)
    """They have no gradient any more, and could get one."""
    replaced: list[torch.Tensor] = field(default_factory=list)
    """Their gradient is another tensor."""
    differentiable: bool = False
    """Whether a gradient has a graph of its own (``create_graph=True``): then autograd does not add
    in place, and puts new tensors there."""


class Counted:
    """The gradients that a group has counted or stepped last, without keeping them alive.

    Weak references that still hold are taken over from the micro-batch before: of 1,000 tensors
    making them and asking each for its kind took 0.5 ms, comparing takes 0.1. Ids will not do for
    gradients: what takes the place of one that was dropped may have its id.
    """

    def __init__(self, found: Gradients, before: Counted | None) -> None:
        self._params: list[weakref.ref[torch.Tensor]]
        self._ids: list[int]
        self._grads: list[Callable[[], torch.Tensor | None]]
        self._missing: int
        if before is not None and before._is_of(found):
            self._params, self._ids, self._grads = before._params, before._ids, before._grads
            self._missing = before._missing
        else:
            self._params = [weakref.ref(param) for param in found.params]
            self._ids = [id(param) for param in found.params]
            self._grads = [_reference(grad) for grad in found.grads]
            self._missing = found.missing()
        self._versions = [
            -1 if grad is None or reference is _nothing else grad._version
            for grad, reference in zip(found.grads, self._grads, strict=True)
        ]

    def _is_of(self, found: Gradients) -> bool:
        """Whether these are the same gradients of the same parameters, in place."""
        if found.same is self:
            return True
        # None is what a reference to a dropped gradient gives, too.
        if self._ids != [*map(id, found.params)] or self._missing != found.missing():
            return False
        if all(map(operator.is_, found.grads, [grad() for grad in self._grads])):
            found.same = self
        return found.same is self

    def compare(self, found: Gradients, changes: Changes) -> None:
        """Add what has changed to `changes`.

        What is frozen by now may lose its gradient, which is not stepped; what was taken out of the
        group is nobody's matter; a sparse gradient is not added to in place.

        Args:
            found: what the group has now.
            changes: of all groups of a window.
        """
        if self._is_of(found):
            return
        pairs = zip(self._params, self._grads, strict=True)
        known = {id(param()): grad for param, grad in pairs if param() is not None}
        for param, now in zip(found.params, found.grads, strict=True):
            grad = known.get(id(param))
            if grad is None:
                changes.new.append(param)
            elif grad is _nothing:
                continue
            elif now is None:
                if param.requires_grad:
                    changes.gone.append(param)
            else:
                changes.differentiable = changes.differentiable or now.grad_fn is not None
                if now is not grad() and not now.is_sparse:
                    changes.replaced.append(param)

    def are_all(self, params: Sequence[torch.Tensor]) -> bool:
        """Whether the gradients of these parameters are these, unchanged."""
        pairs = zip(self._grads, self._versions, strict=True)
        known = {id(grad()): version for grad, version in pairs if grad is not _nothing}
        grads = [param.grad for param in params if param.grad is not None]
        return all(known.get(id(grad)) == grad._version for grad in grads)


def _nothing() -> None:
    """In the place of a reference: no gradient, or one that has no version to tell it by."""


def _reference(grad: torch.Tensor | None) -> Callable[[], torch.Tensor | None]:
    return _nothing if grad is None or grad.is_inference() else weakref.ref(grad)
