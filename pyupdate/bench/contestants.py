# SPDX-License-Identifier: Apache-2.0
"""Who is timed: parameters with gradients and an optimizer, and what each has to do in a step.

The kinds of a step: ``step`` is the optimizer's alone; ``scaler`` unscales, checks for inf and nan,
steps and updates the scaler; ``clip`` clips by the global norm and steps; ``full`` is both;
``average`` is that and a moving average of the parameters. A peer does by torch's own functions
what its optimizer does not do, unless its optimizer has a ``whole_step(contestant)``, which is how
its users make such a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from .. import optim
from ..traffic import bytes_per_parameter

SCALE = 2.0**16  # where torch's GradScaler starts
MAX_NORM = 1.0
DECAY = 0.999
KINDS = ("step", "scaler", "clip", "full", "average")
SCALED = frozenset(("scaler", "full", "average"))
CLIPPED = frozenset(("clip", "full", "average"))

OURS = "pyupdate"
BASELINE = "torch fused"
FUSED_SGD_OF_HALVES = (
    "torch 2.13's fused SGD skips whole SIMD blocks of half-precision parameters: it does less"
)

Shape = tuple[int, ...]
Optimizer = Callable[[list[nn.Parameter]], Any]


@dataclass(frozen=True)
class Workload:
    """Shapes of parameters, and their dtypes.

    Attributes:
        name: what tables call it.
        shapes: one a parameter.
        targets: by kind, the ratio to the baseline that is to be reached, where there is one.
        dtype: of the parameters and gradients.
        of_vectors: the dtype of those with less than two dimensions, where it is another: models
            that keep their matrices in bfloat16 often leave norms and biases in float32.
    """

    name: str
    shapes: tuple[Shape, ...]
    targets: dict[str, float] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    of_vectors: torch.dtype | None = None

    @property
    def elements(self) -> int:
        """Of all parameters."""
        return sum(torch.Size(shape).numel() for shape in self.shapes)


def options_of(kind: str) -> dict[str, Any]:
    """The options of an optimizer of ours that does all of a kind itself, but for the scaler."""
    options: dict[str, Any] = {"max_norm": MAX_NORM} if kind in CLIPPED else {}
    return options | ({"ema_decay": DECAY} if kind == "average" else {})


def of_torch(kind: str, rule: str = "AdamW") -> dict[str, Optimizer]:
    """Torch's ways to step a rule, and ours last.

    Args:
        kind: one of `KINDS`.
        rule: the name of the optimizer's class.
    """
    found: dict[str, Optimizer] = {}
    stock = getattr(torch.optim, rule, None)
    if stock is not None:
        for name, given in (
            ("torch loop", {"foreach": False}),
            ("torch foreach", {"foreach": True}),
        ):
            found[name] = _made(stock, given)
        if rule in ("SGD", "Adam", "AdamW", "Adagrad"):
            found[BASELINE] = _fused(stock)
    found[OURS] = _made(getattr(optim, rule), options_of(kind))
    return found


def _made(kind: Any, given: dict[str, Any]) -> Optimizer:
    return lambda params: kind(params, **given)


def _fused(stock: Any) -> Optimizer:
    def make(params: list[nn.Parameter]) -> Any:
        refuse_halves(stock, params)
        return stock(params, fused=True)

    return make


def refuse_halves(stock: Any, params: Sequence[nn.Parameter]) -> None:
    """Refuse a baseline that is fast because it does less.

    Raises:
        ValueError: it is fused SGD of half-precision parameters.
    """
    halves = (torch.bfloat16, torch.float16)
    if stock is torch.optim.SGD and any(param.dtype in halves for param in params):
        raise ValueError(FUSED_SGD_OF_HALVES)


class Contestant:
    """Parameters, gradients and an optimizer; the same numbers for every contestant.

    Args:
        name: what begins with `OURS` does all by its optimizer's own options; any other does it by
            torch's functions.
        workload: what is stepped.
        kind: one of `KINDS`.
        make: its optimizer.
        like: one of the same workload and kind that has not stepped: its numbers are copied, and
            the gradients that a step spoils are kept once for both.
    """

    def __init__(
        self,
        name: str,
        workload: Workload,
        kind: str,
        make: Optimizer,
        like: Contestant | None = None,
    ) -> None:
        self.name = name
        self.kind = kind
        self.workload = workload
        self.scaled = kind in SCALED
        random = torch.Generator().manual_seed(1)

        def numbers(shape: Shape, scale: float) -> torch.Tensor:
            narrow = workload.of_vectors if len(shape) < 2 else None
            return (torch.randn(shape, generator=random, device="cpu") * scale).to(
                narrow or workload.dtype
            )

        # A backward pass leaves gradients that carry the scale; torch unscales and clips them where
        # they are, so each such step starts from a fresh copy, which is made off the clock.
        scale = 0.01 * (SCALE if self.scaled else 1.0)
        spoils = kind != "step"
        if like is None:
            self.params = [nn.Parameter(numbers(shape, 1.0)) for shape in workload.shapes]
            self.fresh = [numbers(shape, scale) for shape in workload.shapes]
        else:
            self.params = [nn.Parameter(param.detach().clone()) for param in like.params]
            self.fresh = [g if spoils else g.clone() for g in like.fresh]
        self.optimizer: Any = make(self.params)
        self._spoilt = spoils or bool(getattr(self.optimizer, "consume_grad", False))
        for param, grad in zip(self.params, self.fresh, strict=True):
            param.grad = grad.clone() if self._spoilt else grad
        self.averages = [param.detach().clone() for param in self.params if kind == "average"]
        self.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=1_000_000)
        self.scaler.scale(
            torch.ones((), device="cpu")
        )  # makes the scale's tensor, as the first loss does
        whole = getattr(self.optimizer, "whole_step", None)
        self.run: Callable[[], None] = self._ours if name.split()[0] == OURS else self._theirs
        if whole is not None:
            self.run = partial(whole, self)

    @torch.no_grad()
    def prepare(self) -> None:
        """Put the gradients back, as a backward pass would."""
        if self._spoilt:
            for param, fresh in zip(self.params, self.fresh, strict=True):
                if param.grad is None:
                    param.grad = fresh.clone()
                else:
                    param.grad.copy_(fresh)

    def _ours(self) -> None:
        if self.scaled:
            self.optimizer.step(grad_scaler=self.scaler)
            self.scaler.update()
        else:
            self.optimizer.step()

    def _theirs(self) -> None:
        if self.scaled:
            self.scaler.unscale_(self.optimizer)
        if self.kind in CLIPPED:
            nn.utils.clip_grad_norm_(self.params, MAX_NORM)
        if self.scaled:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        self.average()

    @torch.no_grad()
    def average(self) -> None:
        """Move the averages, where the kind has them, in torch's fastest way."""
        if self.averages:
            torch._foreach_lerp_(self.averages, list[torch.Tensor](self.params), 1.0 - DECAY)

    @property
    def bytes(self) -> float:
        """The least that a step of ours moves an element, by what the rule reads and writes."""
        return bytes_per_parameter(self.optimizer, scaled=self.scaled)


def contestants(
    workload: Workload, kind: str, makers: dict[str, Optimizer], names: Sequence[str] | None = None
) -> list[Contestant]:
    """One for each maker, or for those that are named."""
    made: list[Contestant] = []
    for name in list(makers) if names is None else names:
        made.append(Contestant(name, workload, kind, makers[name], made[0] if made else None))
    return made
