# SPDX-License-Identifier: Apache-2.0
"""Which gradients a group's micro-batches are in, so that a window sees when one was lost.

A gradient is known by its tensor, not by its values: a backward pass adds to it in place, and what
takes its place holds fewer micro-batches than were counted.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .sharded import is_distributed

_MARK = operator.attrgetter("__dict__")
"""What tells a tensor from one that takes its place, without keeping its memory alive: as long as
somebody holds its dict, no other tensor has that. A weak reference, Python's or torch's, keeps
torch.utils.swap_tensors from swapping it, and with that Module.to under
torch.__future__.set_swap_module_params_on_conversion."""

_UNTOLD = -1
"""In the place of a version: there was no gradient, or one that has none to tell it by."""


class Gradients:
    """The parameters of a group and what is in their `.grad`; it keeps both alive."""

    def __init__(self, group: Mapping[str, Any]) -> None:
        self.params: list[torch.Tensor] = [*group["params"]]
        self.grads = [param.grad for param in self.params]
        self.same: Counted | None = None
        """What was found to be of these; it stays so while this keeps them alive."""

    def marks(self) -> list[dict[str, Any]]:
        """Of each parameter, what tells its gradient from others; its own where there is none."""
        pairs = zip(self.params, self.grads, strict=True)
        return [*map(_MARK, [param if grad is None else grad for param, grad in pairs])]

    def missing(self) -> int:
        """How many parameters have no gradient."""
        return sum(map(operator.is_, self.grads, itertools.repeat(None)))


@dataclass
class Changes:
    """What became of counted gradients: the parameters by what is the matter with them."""

    new: list[torch.Tensor] = field(default_factory=list)
    """They were not in the group when it was counted, or were swapped before they had one."""
    gone: list[torch.Tensor] = field(default_factory=list)
    """They have no gradient any more, and could get one."""
    replaced: list[torch.Tensor] = field(default_factory=list)
    """Their gradient is another tensor."""
    differentiable: bool = False
    """Whether a gradient has a graph of its own (``create_graph=True``): then autograd does not add
    in place, and puts new tensors there."""


class Counted:
    """The gradients that a group has counted or stepped last, without keeping them alive.

    What is known is taken over where it still holds a micro-batch later: of 1,000 tensors comparing
    takes 0.1 ms. Ids will not do for gradients: what takes the place of one that was dropped may
    have its id. Parameters are known by theirs, which last through a swap; where one may have died
    unseen, because it had no gradient, it is told by itself.
    """

    def __init__(self, found: Gradients, before: Counted | None) -> None:
        self._ids: list[int]
        self._marks: list[dict[str, Any]]
        self._missing: int
        self._versions: list[int]
        if before is not None and before._is_of(found):
            self._ids, self._marks, self._missing = before._ids, before._marks, before._missing
            told = before._versions
        else:
            told = [_UNTOLD if g is None or g.is_inference() else 0 for g in found.grads]
            self._ids = [*map(id, found.params)]
            self._marks = found.marks()
            for index, version in enumerate(told):
                if version == _UNTOLD:
                    self._marks[index] = _MARK(found.params[index])
            self._missing = found.missing()
        self._versions = [
            _UNTOLD if grad is None or version == _UNTOLD else grad._version
            for grad, version in zip(found.grads, told, strict=True)
        ]

    def _is_of(self, found: Gradients) -> bool:
        """Whether these are the same gradients of the same parameters, in place."""
        if found.same is self:
            return True
        if self._missing != found.missing() or self._ids != [*map(id, found.params)]:
            return False
        if all(map(operator.is_, self._marks, found.marks())):
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
        known = dict(zip(self._ids, zip(self._marks, self._versions, strict=True), strict=True))
        for param, now in zip(found.params, found.grads, strict=True):
            if id(param) not in known:
                changes.new.append(param)
                continue
            mark, version = known[id(param)]
            if version == _UNTOLD:
                if now is not None and mark is not _MARK(param):
                    changes.new.append(param)
            elif now is None:
                if param.requires_grad:
                    changes.gone.append(param)
            else:
                changes.differentiable = changes.differentiable or now.grad_fn is not None
                if mark is not _MARK(now) and not now.is_sparse and not _was_moved(now):
                    changes.replaced.append(param)

    def are_all(self, params: Sequence[torch.Tensor]) -> bool:
        """Whether the gradients of these parameters are these, unchanged."""
        known = dict(zip(map(id, self._marks), self._versions, strict=True))
        grads = [param.grad for param in params if param.grad is not None]
        return all(
            not grad.is_inference() and known.get(id(_MARK(grad))) == grad._version
            for grad in grads
        )


def _was_moved(grad: torch.Tensor) -> bool:
    """Whether ``DistributedDataParallel(gradient_as_bucket_view=True)`` may have put it there.

    It moves what is in `.grad` into its bucket, in a forward pass (when it makes its buckets anew)
    or a backward pass, and puts a view there (tried on torch 2.13).
    """
    return grad._is_view() and is_distributed()
