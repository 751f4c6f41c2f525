# SPDX-License-Identifier: Apache-2.0
"""ScheduleFree AdamW, whose parameters are one point in training and another in evaluation."""

from __future__ import annotations

from typing import Any

import torch

from ..eagerly import eagerly
from ..kernels import rules
from ..kernels.language import Rule
from ..pytorch import checks
from ..pytorch.engines import check_not_swapped, engine_of
from ..pytorch.rows import NO_NUMBER, Group, name_of, number_of, require
from . import arguments
from .planned import Planned, planned


def _schedulefree(group: Group) -> Rule:
    if not group["train_mode"]:
        message = (
            "ScheduleFreeAdamW is in evaluation mode, in which its parameters are the average: "
            "call optimizer.train() before the forward pass whose gradients it is to step on"
        )
        raise RuntimeError(message)
    return rules.schedulefree_adamw


@planned(_schedulefree, counts_steps=True)
class ScheduleFreeAdamW(Planned):
    """AdamW without a learning-rate schedule: the average of the path takes its place.

    Defazio et al. 2024, arXiv:2405.15682. In training the parameters are the paper's y, where
    gradients are taken; in evaluation they are x, the average. Call `eval` before evaluating or
    saving the model and `train` before going on.

    Args:
        params: parameters or groups of them.
        lr: learning rate after the warm-up; larger than AdamW's, 2.5e-3 is a start.
        betas: how much of y is the average (above 0, since `eval` divides by it), and the decay
            rate of the second moment.
        eps: added to its root.
        weight_decay: taken at y.
        warmup_steps: steps in which the learning rate rises linearly.
        r: exponent of the step in a step's weight; larger forgets the beginning faster.
        weight_lr_power: exponent of the largest learning rate so far in a step's weight.
        maximize: ascend.
        **options: those of `pyupdate.options.Options`.

    Raises:
        TypeError, ValueError: an argument that is no number, or out of its range.

    Example:
        >>> import torch, pyupdate
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = pyupdate.optim.ScheduleFreeAdamW([p], lr=0.5, eps=0.0)
        >>> p.grad = torch.tensor([3.0, -2.0])
        >>> optimizer.step()
        >>> p.tolist()  # the first average is z, and so is y
        [0.5, 1.5]
        >>> optimizer.eval()
        >>> p.tolist()
        [0.5, 1.5]
    """

    def __init__(
        self,
        params: Any,
        lr: float = 2.5e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        *,
        maximize: bool = False,
        **options: Any,
    ) -> None:
        arguments.at_least_zero(
            lr=lr,
            eps=eps,
            weight_decay=weight_decay,
            warmup_steps=warmup_steps,
            r=r,
            weight_lr_power=weight_lr_power,
        )
        arguments.decay_rates(betas)
        arguments.flags(maximize=maximize)
        if betas[0] == 0.0:
            message = "betas[0] must be above 0, but is 0: eval() could not find the average"
            raise ValueError(message)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "warmup_steps": warmup_steps,
            "r": r,
            "weight_lr_power": weight_lr_power,
            "maximize": maximize,
            "train_mode": True,
        }
        super().__init__(params, defaults, **options)

    @eagerly
    @torch.no_grad()
    def eval(self) -> None:
        """Make the parameters the average: x = y + (z - y)(1 - 1/b1)."""
        self._move(to_training=False)

    @eagerly
    @torch.no_grad()
    def train(self) -> None:
        """Make the parameters the point of training again: y = x + (z - x)(1 - b1)."""
        self._move(to_training=True)

    def _move(self, *, to_training: bool) -> None:
        check_not_swapped(engine_of(self))  # leaving the block would undo the move, not the mode
        moves: list[tuple[torch.Tensor, torch.Tensor, float]] = []
        for index, group in enumerate(self.param_groups):
            require(group, index, ("train_mode", "betas"))
            if bool(group["train_mode"]) is to_training:
                continue
            beta1 = _first_beta(group, index)
            weight = 1.0 - beta1 if to_training else 1.0 - 1.0 / beta1
            for position, param in enumerate(group["params"]):
                z = self._z_of(param, name_of(group, index, position, engine_of(self).names))
                if z is not None:
                    moves.append((param, z, weight))
        for param, z, weight in moves:  # all is looked at before the first moves
            param.lerp_(z.to(param.dtype), weight)
        for group in self.param_groups:
            group["train_mode"] = to_training

    def _z_of(self, param: torch.Tensor, place: str) -> torch.Tensor | None:
        inner = self.state.get(param)
        if inner is None:
            return None
        name = engine_of(self).names.get(id(param), place)
        checks.check_entry(inner, name)
        z: object = inner.get("z")
        if z is None:
            return None
        found = repr(z)
        if isinstance(z, torch.Tensor):
            if (z.shape, z.device) == (param.shape, param.device):
                return z
            found = f"{tuple(z.shape)} on {z.device}"
        message = (
            f"state 'z' of '{name}' is {found}, but the parameter {tuple(param.shape)} on "
            f"{param.device}: load a state dict that fits this model"
        )
        raise ValueError(message)


def _first_beta(group: Group, index: int) -> float:
    cause: Exception | None = None
    try:
        beta1 = number_of(group["betas"][0])
        if beta1 > 0.0:
            return beta1
    except (LookupError, *NO_NUMBER) as error:
        cause = error
    message = (
        f"'betas' of parameter group {index} is {group['betas']!r}, but its first must be a number "
        "above 0, by which eval() divides: set it to what the optimizer's constructor takes"
    )
    raise ValueError(message) from cause
