# SPDX-License-Identifier: Apache-2.0
"""The table of rules under test: a new optimizer is tested by a row of CASES and one of HANDS."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import pyupdate
from pyupdate.kernels.language import Rule
from pyupdate.kernels.rules import RULES
from pyupdate.pytorch.rows import numbers_of


@dataclass(frozen=True, eq=False)
class Case:
    """A rule, the torch class that is its truth, and the options it is made with."""

    name: str
    torch_class: type[torch.optim.Optimizer]
    options: dict[str, Any]
    full: bool = False
    """Whether it stands for its rule where a test is too long for every row."""

    def __str__(self) -> str:
        said = (f"{k}={v}" for k, v in self.options.items() if k != "lr")
        return "-".join([self.name, *said]).replace(" ", "")

    @property
    def rule(self) -> Rule:
        return RULES[self.name]

    @property
    def step_is_counted(self) -> bool:
        """Whether torch keeps ``state[p]["step"]``."""
        return self.torch_class is not torch.optim.SGD

    def ours(self, params: Sequence[torch.Tensor], **more: Any) -> torch.optim.Optimizer:
        made: Any = getattr(pyupdate.optim, self.torch_class.__name__)
        return made(params, **self.options, **more)

    def truth(self, params: Sequence[torch.Tensor]) -> torch.optim.Optimizer:
        made: Any = self.torch_class
        return made(params, **self.options, foreach=False)

    def numbers(self) -> tuple[float, list[float]]:
        """The sign of the gradient, and what the rule's prepare takes after the step count."""
        group = self.ours([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]
        sign, *numbers = numbers_of(self.rule, group)
        return sign, numbers


def _sgd(name: str, *, full: bool = False, **options: Any) -> Case:
    return Case(name, torch.optim.SGD, {"lr": 0.01, **options}, full)


def _adam(name: str, *, full: bool = False, **options: Any) -> Case:
    return Case(name, torch.optim.Adam, {"lr": 0.003, **options}, full)


def _adamw(name: str, *, full: bool = False, **options: Any) -> Case:
    return Case(name, torch.optim.AdamW, {"lr": 0.003, **options}, full)


def _rprop(name: str, *, full: bool = False, **options: Any) -> Case:
    # Of lr, where step sizes begin, every dtype holds the same number.
    return Case(name, torch.optim.Rprop, {"lr": 2.0**-8, **options}, full)


def _nadam(name: str, *, full: bool = False, **options: Any) -> Case:
    return Case(name, torch.optim.NAdam, {"lr": 0.003, **options}, full)


def _asgd(name: str, *, full: bool = False, **options: Any) -> Case:
    return Case(name, torch.optim.ASGD, {"lr": 0.01, **options}, full)


CASES = (
    _sgd("sgd"),
    _sgd("sgd", weight_decay=0.1),
    _sgd("sgd", full=True, weight_decay=0.1, maximize=True),
    _sgd("sgd_momentum", momentum=0.9),
    _sgd("sgd_momentum", momentum=0.9, dampening=0.3),
    _sgd("sgd_momentum", momentum=0.9, nesterov=True, maximize=True),
    _sgd("sgd_momentum", full=True, momentum=0.7, dampening=0.2, weight_decay=0.1),
    _sgd("sgd_momentum", momentum=0.8, nesterov=True, weight_decay=0.1),
    _adam("adam"),
    _adam("adam", full=True, weight_decay=0.1, betas=(0.8, 0.95)),
    _adam("adam", weight_decay=0.1, maximize=True, eps=0.0),
    _adam("adam_amsgrad", amsgrad=True),
    _adam("adam_amsgrad", full=True, amsgrad=True, weight_decay=0.1, maximize=True),
    _adamw("adamw", full=True),
    _adamw("adamw", weight_decay=0.1, maximize=True, betas=(0.8, 0.95)),
    _adamw("adamw", weight_decay=0.0, eps=0.0),
    _adamw("adamw_amsgrad", full=True, amsgrad=True),
    _adamw("adamw_amsgrad", amsgrad=True, weight_decay=0.2, maximize=True),
    _nadam("nadam", full=True, weight_decay=0.1),
    _nadam("nadam", weight_decay=0.1, decoupled_weight_decay=True, maximize=True),
    _asgd("asgd", full=True, weight_decay=0.1, lambd=0.01),
    _asgd("asgd", t0=3.0, alpha=0.5, maximize=True),
    _rprop("rprop", full=True),
    _rprop("rprop", etas=(0.25, 2.0), step_sizes=(0.001, 0.01), maximize=True),
)
"""Every elementwise rule with its options; test_layerwise.py has the others."""

FULL = tuple(case for case in CASES if case.full)


@dataclass(frozen=True)
class Hand:
    """A few steps of one element, worked out by hand.

    Numbers are exact in binary, so the results are too, except where one is given as a quotient or
    root that has to be rounded.
    """

    case: Case
    param: float
    grads: tuple[float, ...]
    params: tuple[float, ...]
    """After each step."""
    state: dict[str, float] = field(default_factory=dict)
    """After the last step."""


_betas = {"betas": (0.5, 0.75), "eps": 2.0, "lr": 0.5}

HANDS = (
    # p <- p - lr g = 1 - 0.5 * 2 = 0, then 0 - 0.5 * -1 = 0.5
    Hand(_sgd("sgd", lr=0.5), 1.0, (2.0, -1.0), (0.0, 0.5)),
    # g <- -2 + 0.5 * 1 = -1.5 (maximize turns the gradient, not the decay); p <- 1 + 0.75
    Hand(_sgd("sgd", lr=0.5, weight_decay=0.5, maximize=True), 1.0, (2.0,), (1.75,)),
    # step 1: b = g = 2 (no dampening yet), p = 1 - 0.5 * 2 = 0
    # step 2: b = 0.5 * 2 + 0.75 * 4 = 4, p = 0 - 0.5 * 4 = -2
    Hand(
        _sgd("sgd_momentum", lr=0.5, momentum=0.5, dampening=0.25),
        1.0,
        (2.0, 4.0),
        (0.0, -2.0),
        {"momentum_buffer": 4.0},
    ),
    # step 1: g = 2 + 0.5 * 1 = 2.5, b = 2.5, p = 1 - 0.5 (2.5 + 0.5 * 2.5) = -0.875
    # step 2: g = 1 - 0.5 * 0.875 = 0.5625, b = 1.25 + 0.5625 = 1.8125,
    #         p = -0.875 - 0.5 (0.5625 + 0.90625) = -1.609375
    Hand(
        _sgd("sgd_momentum", lr=0.5, momentum=0.5, nesterov=True, weight_decay=0.5),
        1.0,
        (2.0, 1.0),
        (-0.875, -1.609375),
        {"momentum_buffer": 1.8125},
    ),
    # step 1: m = 0.5 * 2 = 1, v = 0.25 * 4 = 1; biases 0.5 and 0.25; sqrt(v) / sqrt(0.25) = 2
    #         p = 1 - (0.5 / 0.5) * 1 / (2 + 2) = 0.75
    # step 2: g = 0: m = 0.5, v = 0.75; biases 0.75 and 0.4375; sqrt(0.75 / 0.4375) = sqrt(12/7)
    #         p = 0.75 - (2/3) * 0.5 / (sqrt(12/7) + 2)
    Hand(
        _adam("adam", **_betas),
        1.0,
        (2.0, 0.0),
        (0.75, 0.75 - 1 / 3 / ((12 / 7) ** 0.5 + 2)),
        {"exp_avg": 0.5, "exp_avg_sq": 0.75},
    ),
    # g = 1.5 + 0.5 * 1 = 2, so the first step is the same
    Hand(
        _adam("adam", **_betas, weight_decay=0.5),
        1.0,
        (1.5,),
        (0.75,),
        {"exp_avg": 1.0, "exp_avg_sq": 1.0},
    ),
    # As adam, but step 2 divides by the larger v of step 1: sqrt(1 / 0.4375) = sqrt(16/7)
    Hand(
        _adam("adam_amsgrad", **_betas, amsgrad=True),
        1.0,
        (2.0, 0.0),
        (0.75, 0.75 - 1 / 3 / ((16 / 7) ** 0.5 + 2)),
        {"exp_avg": 0.5, "exp_avg_sq": 0.75, "max_exp_avg_sq": 1.0},
    ),
    # p <- 1 (1 - 0.5 * 0.5) = 0.75 before the move of 0.25: 0.5; maximize turns the move: 1.0
    Hand(
        _adamw("adamw", **_betas, weight_decay=0.5),
        1.0,
        (2.0,),
        (0.5,),
        {"exp_avg": 1.0, "exp_avg_sq": 1.0},
    ),
    Hand(
        _adamw("adamw", **_betas, weight_decay=0.5, maximize=True),
        1.0,
        (2.0,),
        (1.0,),
        {"exp_avg": -1.0, "exp_avg_sq": 1.0},
    ),
    # step 1 as adamw: 0.5; step 2 decays to 0.375 and moves as adam_amsgrad does
    Hand(
        _adamw("adamw_amsgrad", **_betas, amsgrad=True, weight_decay=0.5),
        1.0,
        (2.0, 0.0),
        (0.5, 0.375 - 1 / 3 / ((16 / 7) ** 0.5 + 2)),
        {"exp_avg": 0.5, "exp_avg_sq": 0.75, "max_exp_avg_sq": 1.0},
    ),
    # step 1: eta is still lr: p = 1 (1 - 2 * 0.5) - 0.5 * 2 = -1, and mu is 1: the average is p;
    #         eta = 0.5 / (1 + 2 * 0.5 * 1) = 0.25, mu = 1 / max(1, 1 + 1) = 0.5
    # step 2: p = -1 (1 - 0.5) - 0.25 * -1 = -0.25, ax = -1 + (-0.25 + 1) / 2
    Hand(
        _asgd("asgd", lr=0.5, lambd=2.0, alpha=1.0, t0=-1.0),
        1.0,
        (2.0, -1.0),
        (-1.0, -0.25),
        {"ax": -0.625},
    ),
    # step 1: mu_1 = 0.5 (1 - 0.5) = 0.25 with psi 0 (0.96^0 = 1), so M_1 = 0.25, M_2 = 0.0625
    #         m = 0.5 * 2 = 1, v = 0.25 * 4 = 1, sqrt(v / 0.25) + 2 = 4
    #         p = 1 - 0.5 (0.75 / 0.75 * 2 + 0.25 / 0.9375 * 1) / 4
    Hand(
        _nadam("nadam", **_betas, momentum_decay=0.0),
        1.0,
        (2.0,),
        (1.0 - 0.5 * (2.0 + 4 / 15) / 4.0,),
        {"exp_avg": 1.0, "exp_avg_sq": 1.0},
    ),
    # step 1: no sign before it, so the step size stays: 1 - 0.5; step 2: it agrees, so 2 * 0.5
    # step 3: it turned, so a quarter of that, and the element rests
    Hand(
        _rprop("rprop", lr=0.5, etas=(0.25, 2.0)),
        1.0,
        (3.0, 1.0, -1.0),
        (0.5, -0.5, -0.5),
        {"prev": 0.0, "step_size": 0.25},
    ),
)


# ----- storages ----------------------------------------------------------------------------------

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def name_of(value: Any) -> str:
    """Ids of parametrised tests."""
    return str(value).removeprefix("torch.")
