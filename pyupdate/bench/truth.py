# SPDX-License-Identifier: Apache-2.0
"""Proof, before the clock starts, that a contestant computes what it says: the rule in fp64.

The norm is taken over everything. Of the parameters, `COMPARED` elements that lie all over every
tensor are compared, so that the proof of 2 x 10^8 elements takes seconds; where a rule needs whole
tensors, the smallest tensors, and as many others as come to that number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..kernels import oracle
from ..kernels.language import Rule
from ..kernels.rules import multiplier as multiplier_rule
from ..pytorch import engines
from ..pytorch.rows import numbers_of
from .contestants import CLIPPED, DECAY, MAX_NORM, SCALE, Contestant

COMPARED = 1 << 20  # elements
ENDS = 16  # of these at either end of a tensor: where loops peel
STEPS = 3

CORRECTED = frozenset(("adam", "adamw"))
"""Rules whose move is proportional to 1 / (1 - beta1**t), and to sqrt(1 - beta2**t) at most."""

Array = np.ndarray[Any, Any]
Part = list[tuple[int, torch.Tensor | None]]
"""What one call of the oracle steps: parameters of one dtype by number, and which of their
elements; None means the whole tensor in its shape."""


class WrongError(Exception):
    """A contestant does not do what the others do."""


@torch.no_grad()
def check(contestant: Contestant, like: Any, *, corrections: torch.dtype = torch.float64) -> float:
    """Make three steps, which also make its state, and compare with the rule in fp64.

    A step may be 8 eps of the parameter's dtype off, relative to the larger of a parameter and the
    largest move; torch's norm of fp32 gradients is off by up to 1e-5, which scales a gradient by as
    much and moves an AdamW step by a quarter of it. Who makes bias corrections in fp32 may also be
    off by `error_of_corrections`, relative to each element's own move.

    Args:
        contestant: as it was made.
        like: an optimizer of ours over the same kind of parameters: says the rule and its numbers.
        corrections: in which dtype the contestant is known to make its bias corrections.

    Returns:
        How far off it was, in eps.

    Raises:
        WrongError: further than it may be.
    """
    row = engines.row_of(like)
    assert row is not None
    group = like.param_groups[0]
    rule, numbers = row.rule(group), numbers_of(row.rule(group), group)[1:]
    named = dict(zip(rule.numbers, numbers, strict=True))
    parts = _parts(contestant, rule)
    params = [_read(contestant.params, part) for part in parts]
    grads = [_read(contestant.fresh, part) for part in parts]
    states = [_state(rule, named, param) for param in params]
    averages = [param.copy() for param in params]
    allowed = [np.zeros_like(param) for param in params]
    unscale = 1.0 / SCALE if contestant.scaled else 1.0
    clips = contestant.kind in CLIPPED
    norm = _norm(contestant.fresh) * unscale
    factor = multiplier_rule(norm, unscale, MAX_NORM if clips else -1.0)
    moved = 0.0
    for count in range(1, STEPS + 1):
        contestant.prepare()
        contestant.run()
        of_move = error_of_corrections(rule, named, count, corrections)
        for k, before in enumerate(params):
            params[k], states[k] = oracle.step(
                rule, before, grads[k], states[k], numbers, count=count, multiplier=factor
            )
            averages[k] += (params[k] - averages[k]) * (1.0 - DECAY)
            move = np.abs(params[k] - before)
            moved = max(moved, float(move.max(initial=0.0)))
            # The decay of AdamW, which has no correction, may have hidden a part of the move.
            decayed = named.get("lr", 0.0) * named.get("weight_decay", 0.0) * np.abs(before)
            allowed[k] += of_move * (move + decayed)
    of_norm = _error_of_torchs_norm(contestant, norm / unscale) if clips else 0.0
    most = 0.0
    for part, param, more in zip(parts, params, allowed, strict=True):
        eps = _eps(contestant, part)
        size = np.maximum(np.abs(param), moved)
        wrong = np.abs(_read(contestant.params, part) - param)
        off = float((wrong / size).max(initial=0.0)) / eps
        # A nan is larger than any bound.
        if not np.all(wrong <= STEPS * (8.0 * eps + of_norm / 4.0) * size + more):
            message = f"{contestant.name} is {off:.1f} eps off after {STEPS} steps"
            raise WrongError(message)
        most = max(most, off)
    for part, average in zip(parts, averages, strict=True) if contestant.averages else ():
        # Each of the steps rounds it twice: the difference to the parameter, and the sum.
        bound = STEPS * 2.0 * _eps(contestant, part) * np.maximum(np.abs(average), moved)
        if not np.all(np.abs(_read(_averages(contestant), part) - average) <= bound):
            message = f"{contestant.name} keeps another average"
            raise WrongError(message)
    return most


def error_of_corrections(
    rule: Rule, named: dict[str, float], count: int, dtype: torch.dtype
) -> float:
    """What a bias correction made in `dtype` costs: relative to the move of step `count`.

    With u half of the dtype's eps: beta is rounded, by d, which is known; its t-th power is off by
    t d and at most 2 u for each of the t - 1 products that make it (a `pow` of one ulp is better);
    1 - beta**t is off by as much of beta**t, which the cancellation divides by 1 - beta**t, and by
    the u of its own rounding. The second moment's correction stands under a root, which halves it.
    For AdamW's 0.9 and 0.999 in fp32: 7e-6, 4e-5 and 5e-5 for the first three steps.
    """
    if dtype == torch.float64 or rule.name not in CORRECTED:
        return 0.0
    unit = torch.finfo(dtype).eps / 2.0
    total = 0.0
    for beta, share in ((named["beta1"], 1.0), (named["beta2"], 0.5)):
        rounded = torch.tensor(beta, dtype=dtype, device="cpu").double().item()
        of_power = count * abs(rounded / beta - 1.0) + (count - 1) * 2.0 * unit
        power = beta**count
        total += share * (power * of_power / (1.0 - power) + unit)
    return total


def _norm(grads: Sequence[torch.Tensor]) -> float:
    """In fp64, a piece at a time: a whole tensor of 2 x 10^8 elements would take gigabytes."""
    pieces = (piece for grad in grads for piece in torch.split(grad.reshape(-1), 1 << 22))
    return math.sqrt(sum(float(piece.double().square().sum()) for piece in pieces))


def _parts(contestant: Contestant, rule: Rule) -> list[Part]:
    sizes = [param.numel() for param in contestant.params]
    if len(rule.stages) == 1 and not rule.stages[0].sums:
        # No element knows of another, so those of all tensors of a dtype make one call.
        each = max(2 * ENDS, COMPARED // len(sizes))
        random = torch.Generator().manual_seed(2)
        of_dtype: dict[torch.dtype, Part] = {}
        for i, param in enumerate(contestant.params):
            some = _some(sizes[i], each, random)
            of_dtype.setdefault(param.dtype, []).append((i, some))
        return list(of_dtype.values())
    chosen: list[Part] = []
    total = 0
    for i in sorted(range(len(sizes)), key=lambda i: sizes[i]):
        if not chosen or total + sizes[i] <= COMPARED:
            chosen.append([(i, None)])
            total += sizes[i]
    return chosen


def _some(size: int, most: int, random: torch.Generator) -> torch.Tensor:
    """Both ends, and what chance picks between: a loop may leave out one lane of eight."""
    if size <= most:
        return torch.arange(size, device="cpu")
    ends = torch.arange(ENDS, device="cpu")
    between = torch.randint(size, (most - 2 * ENDS,), generator=random, device="cpu")
    return torch.cat([ends, between, size - 1 - ends])


def _eps(contestant: Contestant, part: Part) -> float:
    return torch.finfo(contestant.params[part[0][0]].dtype).eps


def _read(tensors: Sequence[torch.Tensor], part: Part) -> Array:
    """In fp64, a copy."""
    pieces = [
        tensors[i].detach() if at is None else tensors[i].detach().reshape(-1)[at] for i, at in part
    ]
    return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).double().numpy().copy()


def _state(rule: Rule, named: dict[str, float], param: Array) -> dict[str, Array]:
    made: dict[str, Array] = {}
    for key, initial in rule.scalars.items():
        made[key] = np.array(named[initial] if isinstance(initial, str) else initial)
    for key, initial in rule.state.items():
        if initial == "param":
            made[key] = param.copy()
        else:
            made[key] = np.full_like(param, named[initial] if isinstance(initial, str) else initial)
    return made


def _averages(contestant: Contestant) -> list[torch.Tensor]:
    """Ours keeps them in its state, any other contestant beside its optimizer."""
    state = contestant.optimizer.state
    pairs = zip(contestant.params, contestant.averages, strict=True)
    return [state.get(param, {}).get("ema", average) for param, average in pairs]


def _error_of_torchs_norm(contestant: Contestant, exact: float) -> float:
    """Relative: 1.2e-5 for 48 tensors of 1024 x 1024 in fp32 (torch 2.13); ours is off by 2e-12."""
    found = float(torch.nn.utils.get_total_norm(contestant.fresh))
    return abs(found / exact - 1.0) if exact > 0.0 else 0.0
