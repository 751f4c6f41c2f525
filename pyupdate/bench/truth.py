# SPDX-License-Identifier: Apache-2.0
"""Proof, before the clock starts, that a contestant computes what it says: the rule in fp64.

The norm is taken over everything; parameters are compared on the smallest tensors and on as many
others as come to `COMPARED` elements, so that the proof of 10^8 elements takes a second.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from ..kernels import oracle
from ..kernels.rules import multiplier as multiplier_rule
from ..pytorch import step as engine
from ..pytorch.rows import numbers_of
from .contestants import CLIPPED, DECAY, MAX_NORM, SCALE, Contestant

COMPARED = 1 << 20  # elements
STEPS = 3

Array = np.ndarray[Any, Any]


class WrongError(Exception):
    """A contestant does not do what the others do."""


@torch.no_grad()
def check(contestant: Contestant, like: Any) -> float:
    """Make three steps, which also make its state, and compare with the rule in fp64.

    A step may be 8 eps of the parameter's dtype off, relative to the larger of a parameter and the
    largest move; torch's norm of fp32 gradients is off by up to 1e-5, which scales a gradient by as
    much and moves an AdamW step by a quarter of it.

    Args:
        contestant: as it was made.
        like: an optimizer of ours over the same kind of parameters: says the rule and its numbers.

    Returns:
        How far off it was, in eps.

    Raises:
        WrongError: further than it may be.
    """
    row = engine.row_of(like)
    assert row is not None
    group = like.param_groups[0]
    rule, numbers = row.rule(group), numbers_of(row.rule(group), group)[1:]
    named = dict(zip(rule.numbers, numbers, strict=True))
    chosen = _chosen(contestant)
    params = [_wide(contestant.params[i]) for i in chosen]
    states = [_state(rule, named, param) for param in params]
    averages = [param.copy() for param in params]
    unscale = 1.0 / SCALE if contestant.scaled else 1.0
    clips = contestant.kind in CLIPPED
    norm = math.sqrt(sum(float(np.square(_wide(g)).sum()) for g in contestant.fresh)) * unscale
    factor = multiplier_rule(norm, unscale, MAX_NORM if clips else -1.0)
    moved = 0.0
    for count in range(1, STEPS + 1):
        contestant.prepare()
        contestant.run()
        for k, i in enumerate(chosen):
            before = params[k]
            params[k], states[k] = oracle.step(
                rule,
                before,
                _wide(contestant.fresh[i]),
                states[k],
                numbers,
                count=count,
                multiplier=factor,
            )
            averages[k] += (params[k] - averages[k]) * (1.0 - DECAY)
            moved = max(moved, float(np.abs(params[k] - before).max(initial=0.0)))
    of_norm = _error_of_torchs_norm(contestant, norm / unscale) if clips else 0.0
    most = 0.0
    for i, param in zip(chosen, params, strict=True):
        eps = torch.finfo(contestant.params[i].dtype).eps
        difference = np.abs(_wide(contestant.params[i]) - param)
        off = float((difference / np.maximum(np.abs(param), moved)).max(initial=0.0))
        if not off <= STEPS * (8.0 * eps + of_norm / 4.0):
            message = f"{contestant.name} is {off / eps:.1f} eps off after {STEPS} steps"
            raise WrongError(message)
        most = max(most, off / eps)
    for i, average in zip(chosen, averages, strict=True) if contestant.averages else ():
        eps = torch.finfo(contestant.params[i].dtype).eps
        # Each of the steps rounds it twice: the difference to the parameter, and the sum.
        bound = STEPS * 2.0 * eps * np.maximum(np.abs(average), moved)
        if not np.all(np.abs(_average(contestant, i) - average) <= bound):
            message = f"{contestant.name} keeps another average"
            raise WrongError(message)
    return most


def _chosen(contestant: Contestant) -> list[int]:
    sizes = [param.numel() for param in contestant.params]
    chosen: list[int] = []
    total = 0
    for i in sorted(range(len(sizes)), key=lambda i: sizes[i]):
        if not chosen or total + sizes[i] <= COMPARED:
            chosen.append(i)
            total += sizes[i]
    return chosen


def _wide(tensor: torch.Tensor) -> Array:
    return tensor.detach().double().numpy().copy()


def _state(rule: Any, named: dict[str, float], param: Array) -> dict[str, Array]:
    made: dict[str, Array] = {}
    for key, initial in rule.scalars.items():
        made[key] = np.array(named[initial] if isinstance(initial, str) else initial)
    for key, initial in rule.state.items():
        if initial == "param":
            made[key] = param.copy()
        else:
            made[key] = np.full_like(param, named[initial] if isinstance(initial, str) else initial)
    return made


def _average(contestant: Contestant, i: int) -> Array:
    kept = contestant.optimizer.state[contestant.params[i]].get("ema")
    return _wide(contestant.averages[i] if kept is None else kept)


def _error_of_torchs_norm(contestant: Contestant, exact: float) -> float:
    """Relative: 1.2e-5 for 48 tensors of 1024 x 1024 in fp32 (torch 2.13); ours is off by 2e-12."""
    found = float(torch.nn.utils.get_total_norm(contestant.fresh))
    return abs(found / exact - 1.0) if exact > 0.0 else 0.0
