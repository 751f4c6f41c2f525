# SPDX-License-Identifier: Apache-2.0
"""Elementwise optimizers that torch has not: Lion, AdEMAMix, ADOPT, Adan."""

from __future__ import annotations

from typing import Any

from ..kernels import rules
from . import arguments
from .planned import Planned, planned


@planned(lambda _: rules.lion, counts_steps=True)
class Lion(Planned):
    """The sign of a mixture of gradient and average: one state an element, steps of one size.

    Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", arXiv:2302.06675. Every
    element moves by lr, so lr is 3 to 10 times smaller and weight_decay as much larger than
    AdamW's; it likes large batches.

    Args:
        params: parameters or groups of them.
        lr: learning rate, the size of every element's move.
        betas: of the mixture whose sign is taken, and of the average. The authors use (0.95, 0.98)
            where training is unstable.
        weight_decay: decoupled, in units of lr.
        maximize: ascend.
        **options: those of `pyupdate.options.Options`.

    Raises:
        TypeError, ValueError: an argument that is no number, or out of its range.

    Example:
        >>> import torch, pyupdate
        >>> p = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = pyupdate.optim.Lion([p], lr=0.25)
        >>> p.grad = torch.tensor([3.0, -0.001, 0.0])
        >>> optimizer.step()
        >>> p.tolist()
        [0.75, 1.25, 1.0]
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **options: Any,
    ) -> None:
        arguments.at_least_zero(lr=lr, weight_decay=weight_decay)
        arguments.decay_rates(betas)
        arguments.flags(maximize=maximize)
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults, **options)


@planned(lambda _: rules.ademamix, counts_steps=True)
class AdEMAMix(Planned):
    """AdamW with a second, slow average of the gradients, for long runs.

    Pagliardini, Ablin and Grangier 2024, "The AdEMAMix Optimizer", arXiv:2409.03137.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: decay rates of the fast average, of the squares and of the slow average. A longer run
            may have a larger third one; 0 as the first one saves nothing here.
        eps: added to the root of the second moment.
        weight_decay: decoupled.
        alpha: the weight of the slow average; the authors use 4 to 10.
        warmup: the number of steps over which alpha and the third beta grow to their values, mostly
            the length of the run. 0 for none: such a run can become unstable early.
        maximize: ascend.
        **options: those of `pyupdate.options.Options`.

    Raises:
        TypeError, ValueError: an argument that is no number, or out of its range; a
            warmup with a first or third beta of 0.

    Example:
        >>> import torch, pyupdate
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = pyupdate.optim.AdEMAMix([p], lr=0.5, alpha=0.0, weight_decay=0.0)
        >>> p.grad = torch.tensor([3.0, 0.0])  # without the slow average it is AdamW
        >>> optimizer.step()
        >>> p.tolist()
        [0.5, 1.0]
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        alpha: float = 5.0,
        warmup: int = 0,
        *,
        maximize: bool = False,
        **options: Any,
    ) -> None:
        arguments.at_least_zero(
            lr=lr, eps=eps, weight_decay=weight_decay, alpha=alpha, warmup=warmup
        )
        arguments.decay_rates(betas, 3)
        arguments.flags(maximize=maximize)
        if warmup > 0 and (betas[0] == 0.0 or betas[2] == 0.0):
            message = "warmup needs a first and a third beta above 0: the third grows between them"
            raise ValueError(message)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "alpha": alpha,
            "warmup": warmup,
            "maximize": maximize,
        }
        super().__init__(params, defaults, **options)


@planned(lambda _: rules.adopt, counts_steps=True)
class ADOPT(Planned):
    """Adam that converges for any second beta: a gradient is divided by the average before it.

    Taniguchi et al. 2024, "ADOPT: Modified Adam Can Converge with Any beta2 with the Optimal Rate",
    arXiv:2411.02853, with the clip of its second version. The first step moves nothing: it begins
    the second moment.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: decay rates of both averages.
        eps: the least that a gradient is divided by.
        weight_decay: decoupled.
        maximize: ascend.
        **options: those of `pyupdate.options.Options`.

    Raises:
        TypeError, ValueError: an argument that is no number, or out of its range.

    Example:
        >>> import torch, pyupdate
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = pyupdate.optim.ADOPT([p], lr=1.0, betas=(0.5, 0.9999))
        >>> p.grad = torch.tensor([4.0, -2.0])
        >>> for _ in range(2):
        ...     optimizer.step()
        >>> p.tolist()
        [0.5, 1.5]
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.9999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **options: Any,
    ) -> None:
        arguments.at_least_zero(lr=lr, eps=eps, weight_decay=weight_decay)
        arguments.decay_rates(betas)
        arguments.flags(maximize=maximize)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        super().__init__(params, defaults, **options)


@planned(lambda _: rules.adan, counts_steps=True)
class Adan(Planned):
    """Adam with Nesterov's momentum, estimated from the change of the gradient.

    Xie et al. 2022, "Adan: Adaptive Nesterov Momentum Algorithm", arXiv:2208.06677. Takes learning
    rates 5 to 10 times AdamW's. Four states an element: the averages and the previous gradient.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: decay rates (one minus the paper's betas) of the average of the gradients, of their
            changes and of the squares.
        eps: added to the root of the second moment.
        weight_decay: proximal: the parameter is divided by ``1 + lr * weight_decay`` last.
        maximize: ascend.
        **options: those of `pyupdate.options.Options`.

    Raises:
        TypeError, ValueError: an argument that is no number, or out of its range.

    Example:
        >>> import torch, pyupdate
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = pyupdate.optim.Adan([p], lr=0.5)
        >>> p.grad = torch.tensor([3.0, 0.0])
        >>> optimizer.step()
        >>> [round(x, 6) for x in p.tolist()]
        [0.5, 1.0]
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **options: Any,
    ) -> None:
        arguments.at_least_zero(lr=lr, eps=eps, weight_decay=weight_decay)
        arguments.decay_rates(betas, 3)
        arguments.flags(maximize=maximize)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        super().__init__(params, defaults, **options)
