# SPDX-License-Identifier: Apache-2.0
"""Optimizers that set every tensor's step by norms: LARS, LAMB, NovoGrad, StableAdamW.

All norms of a model are taken in one pass and all tensors move in another, whatever their number.
"""

from __future__ import annotations

from typing import Any

from ..kernels import rules
from ..kernels.language import Rule
from ..pytorch.rows import Group
from . import arguments
from .planned import Planned, planned


def _lars(group: Group) -> Rule:
    return rules.lars_momentum if group["momentum"] != 0 else rules.lars


@planned(_lars, counts_steps=False)
class LARS(Planned):
    """SGD whose step in each tensor is a part of the tensor's norm, for very large batches.

    You, Gitman and Ginsburg 2017, arXiv:1708.03888. The gradient with its decay is scaled by
    ``trust_coefficient * |p| / (|grad| + weight_decay * |p|)``, by 1 where a norm is zero.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        momentum: of the buffer; 0 keeps no state.
        dampening: of the gradient on its way into the buffer, in the first step too.
        weight_decay: L2, through the gradient.
        nesterov: Nesterov's momentum.
        trust_coefficient: the part of a tensor's norm that a step of lr 1 may move.
        adapt: whether to scale at all. Biases and normalisation weights are mostly left out: give
            them a group of their own with ``adapt=False``.
        maximize: ascend.
        **options: those of `pyupdate.options.Options`.

    Raises:
        TypeError, ValueError: an argument that is no number, or out of its range.

    Example:
        >>> import torch, pyupdate
        >>> p = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = pyupdate.optim.LARS([p], lr=1.0, momentum=0.0, trust_coefficient=0.5)
        >>> p.grad = torch.tensor([0.0, 2.0])  # |p| = 5, |grad| = 2: scaled by 0.5 * 5 / 2
        >>> optimizer.step()
        >>> p.tolist()
        [3.0, 1.5]
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.9,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        trust_coefficient: float = 1e-3,
        *,
        adapt: bool = True,
        maximize: bool = False,
        **options: Any,
    ) -> None:
        arguments.at_least_zero(
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            trust_coefficient=trust_coefficient,
        )
        arguments.not_nan(dampening=dampening)
        arguments.flags(nesterov=nesterov, adapt=adapt, maximize=maximize)
        if nesterov and (momentum <= 0.0 or dampening != 0.0):
            message = "nesterov needs a momentum and no dampening"
            raise ValueError(message)
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "trust_coefficient": trust_coefficient,
            "adapt": adapt,
            "maximize": maximize,
        }
        super().__init__(params, defaults, **options)


@planned(lambda _: rules.lamb, counts_steps=True)
class LAMB(Planned):
    """Adam whose step in each tensor is a part of the tensor's norm, for very large batches.

    You et al. 2020, arXiv:1904.00962, algorithm 2, with decoupled decay inside the direction.

    Args:
        params: parameters or groups of them.
        lr: learning rate, as a part of a tensor's norm.
        betas: decay rates of both averages.
        eps: added to the root of the second.
        weight_decay: of the direction, before its norm is taken.
        bias_correction: as in Adam. The paper's later versions leave it out and warm up instead.
        max_weight_norm: the largest norm that a tensor counts with (the paper's phi); common is 10.
        adapt: False makes the trust ratio 1 (plain AdamW in LAMB's form): for a group of biases and
            normalisation weights.
        maximize: ascend.
        **options: those of `pyupdate.options.Options`.

    Raises:
        TypeError, ValueError: an argument that is no number, or out of its range.

    Example:
        >>> import torch, pyupdate
        >>> p = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = pyupdate.optim.LAMB([p], lr=0.5, eps=0.0)
        >>> p.grad = torch.tensor([0.0, 2.0])  # Adam's direction is (0 / 0, 1) without eps
        >>> p.grad[0] = 2.0  # so let it be (1, 1): |p| / |direction| = 5 / sqrt(2)
        >>> optimizer.step()
        >>> [round(x, 4) for x in p.tolist()]
        [1.2322, 2.2322]
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        bias_correction: bool = True,
        max_weight_norm: float = float("inf"),
        adapt: bool = True,
        maximize: bool = False,
        **options: Any,
    ) -> None:
        arguments.at_least_zero(
            lr=lr, eps=eps, weight_decay=weight_decay, max_weight_norm=max_weight_norm
        )
        arguments.decay_rates(betas)
        arguments.flags(bias_correction=bias_correction, adapt=adapt, maximize=maximize)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "max_weight_norm": max_weight_norm,
            "adapt": adapt,
            "maximize": maximize,
        }
        super().__init__(params, defaults, **options)


@planned(lambda _: rules.novograd, counts_steps=True)
class NovoGrad(Planned):
    """Momentum over gradients that each tensor normalises by a running norm: one state an element.

    Ginsburg et al. 2019, arXiv:1905.11286. The second moment is one number a tensor,
    ``state[p]["second_moment"]``.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: decay rates of the average and of the squared norm.
        eps: added to the norm.
        weight_decay: joins the normalised gradient.
        grad_averaging: whether the average takes a gradient by ``1 - beta1``.
        maximize: ascend.
        **options: those of `pyupdate.options.Options`.

    Raises:
        TypeError, ValueError: an argument that is no number, or out of its range.

    Example:
        >>> import torch, pyupdate
        >>> p = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = pyupdate.optim.NovoGrad([p], lr=1.0, eps=0.0)
        >>> p.grad = torch.tensor([6.0, 8.0])  # of norm 10
        >>> optimizer.step()
        >>> [round(x, 6) for x in p.tolist()]
        [0.4, 0.2]
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.95, 0.98),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        grad_averaging: bool = False,
        maximize: bool = False,
        **options: Any,
    ) -> None:
        arguments.at_least_zero(lr=lr, eps=eps, weight_decay=weight_decay)
        arguments.decay_rates(betas)
        arguments.flags(grad_averaging=grad_averaging, maximize=maximize)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "grad_averaging": grad_averaging,
            "maximize": maximize,
        }
        super().__init__(params, defaults, **options)


@planned(lambda _: rules.stable_adamw, counts_steps=True)
class StableAdamW(Planned):
    """AdamW that slows a tensor down while its second moment lags behind its gradient.

    Wortsman et al. 2023, arXiv:2304.13013, algorithm 2. Takes the place of gradient clipping.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: decay rates of both averages, bias-corrected.
        eps: added to the root of the second; its square is the least that a gradient's square is
            compared with.
        weight_decay: decoupled, at the tensor's own rate.
        maximize: ascend.
        **options: those of `pyupdate.options.Options`.

    Raises:
        TypeError, ValueError: an argument that is no number, or out of its range.

    Example:
        >>> import torch, pyupdate
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = pyupdate.optim.StableAdamW([p], lr=0.5, eps=0.0, weight_decay=0.0)
        >>> p.grad = torch.tensor([3.0, -2.0])
        >>> optimizer.step()
        >>> p.tolist()
        [0.5, 1.5]
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
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
