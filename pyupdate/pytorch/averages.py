# SPDX-License-Identifier: Apache-2.0
"""Averages of parameters, put into a model for a while: evaluation, a checkpoint, an export.

Values are swapped in place, not memory: a tied weight, a view, a bucket of gradients, a plan's
addresses and a compiled graph all see the averages, and autograd's version counters move, so that a
graph that was made outside cannot be differentiated with other weights inside.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..forks import one_thread_in_forked_child
from . import apply, engines
from .rows import AVERAGE


@contextmanager
def swapped_in(target: Any) -> Iterator[None]:
    """Do what `pyupdate.averaged_weights` says."""
    optimizer, params = _members(target)
    engine = engines.engine_of(optimizer)
    if engine.swapped:
        message = (
            "averaged_weights is in force already for this optimizer: the averages are in the "
            "model; leave the outer block first"
        )
        raise RuntimeError(message)
    averages = [_average_of(optimizer, param) for param in params]
    pairs = [(p, a) for p, a in zip(params, averages, strict=True) if a is not None]
    with one_thread_in_forked_child(), torch.no_grad():
        kept = [param.detach().clone() for param, _ in pairs]
    engine.swapped = True
    try:
        with one_thread_in_forked_child(), torch.no_grad():
            for param, average in pairs:
                param.copy_(average)
        yield
    finally:
        with one_thread_in_forked_child(), torch.no_grad():
            for (param, _), value in zip(pairs, kept, strict=True):
                param.copy_(value)
        engine.swapped = False


def _members(target: Any) -> tuple[Any, Sequence[torch.Tensor]]:
    """The optimizer, and those of its parameters that belong to what was given."""
    if not isinstance(target, nn.Module):
        optimizer = target
        held = list(apply.held(optimizer)) if apply.is_optimizer(optimizer) else []
    else:
        optimizer = apply.optimizer_of(target, getattr(target, "model_name", type(target).__name__))
        ours = {id(param) for param in target.parameters()}
        held = [param for param in apply.held(optimizer) if id(param) in ours]
    if not apply.is_optimizer(optimizer):
        message = (
            "averaged_weights takes a model with an optimizer attached (pyupdate.build) or an "
            f"optimizer, but got {type(target).__name__}"
        )
        raise ValueError(message)
    has_averages = any(_average_of(optimizer, param) is not None for param in held)
    if not has_averages and engines.options_of(optimizer).ema_decay is None:
        message = (
            f"the {type(optimizer).__name__} keeps no averages: make it, or build or accelerate "
            "it, with ema_decay=0.999"
        )
        raise ValueError(message)
    return optimizer, held


def _average_of(optimizer: Any, param: torch.Tensor) -> torch.Tensor | None:
    """None before a parameter's first step: its average is what it is."""
    found = optimizer.state.get(param, {}).get(AVERAGE)
    return found if isinstance(found, torch.Tensor) else None
