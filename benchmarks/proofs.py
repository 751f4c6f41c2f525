# SPDX-License-Identifier: Apache-2.0
"""The truth of Muon and Adafactor, which no rule says whole: torch's own classes, in fp64.

What is compared is what is compared of rules (`pyupdate.bench.truth`). Muon's matrix products are
made in bfloat16, whatever the parameters are, and are ordered as the processor likes: two right
answers lie as far apart as those products round, which moves a step by some percent of itself.
"""

from __future__ import annotations

from typing import Any

import torch

from pyupdate.bench.contestants import Contestant
from pyupdate.bench.truth import STEPS, WrongError

COMPOSITE = {"Muon": 0.05, "Adafactor": 1e-4}
"""How far off a step may be, as a part of the largest move."""


def check_composite(contestant: Contestant, like: Any) -> float:
    """Make three plain steps, and compare with torch's class on the same numbers in fp64.

    Args:
        contestant: as it was made, of kind ``step``.
        like: an optimizer of ours: says which class, and its numbers.

    Returns:
        How far off it was, in eps.

    Raises:
        WrongError: further than it may be.
        ValueError: the kind is another.
    """
    if contestant.kind != "step":
        message = f"only plain steps of {type(like).__name__} are proven, not {contestant.kind!r}"
        raise ValueError(message)
    name = type(like).__name__
    kind: Any = getattr(torch.optim, name)
    true = [torch.nn.Parameter(param.detach().double()) for param in contestant.params]
    for param, fresh in zip(true, contestant.fresh, strict=True):
        param.grad = fresh.double()
    group = like.param_groups[0]
    numbers = {key: group[key] for key in kind([torch.nn.Parameter(torch.ones(1, 1))]).defaults}
    if name == "Adafactor":  # its first is that of the parameters' dtype
        eps1 = torch.finfo(contestant.params[0].dtype).eps
        numbers |= {"eps": (eps1, group["eps"][1]), "foreach": False}
    optimizer = kind(true, **{k: v for k, v in numbers.items() if k != "initial_lr"})
    before = [param.detach().clone() for param in true]
    for _ in range(STEPS):
        contestant.prepare()
        contestant.run()
        optimizer.step()
    moved = max(float((p.detach() - b).abs().max()) for p, b in zip(true, before, strict=True))
    off = max(
        float((one.detach().double() - param.detach()).abs().max())
        for one, param in zip(contestant.params, true, strict=True)
    )
    eps = float(torch.finfo(contestant.params[0].dtype).eps)
    largest = max(float(param.detach().abs().max()) for param in true)
    if not off <= COMPOSITE[name] * moved + STEPS * 8.0 * eps * largest:
        message = f"{contestant.name} is {off / moved:.1%} of a move off after {STEPS} steps"
        raise WrongError(message)
    return off / eps
