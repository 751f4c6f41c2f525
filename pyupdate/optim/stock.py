# SPDX-License-Identifier: Apache-2.0
"""The drop-in classes of torch's optimizers, and which rule a group of theirs means."""

from __future__ import annotations

import torch

from ..kernels import rules
from ..kernels.language import Rule
from ..pytorch.rows import Group
from .planned import Planned, planned


def _sgd(group: Group) -> Rule:
    return rules.sgd_momentum if group["momentum"] != 0 else rules.sgd


def _adam(group: Group) -> Rule:
    if group.get("decoupled_weight_decay", False):
        return _adamw(group)
    return rules.adam_amsgrad if group["amsgrad"] else rules.adam


def _adamw(group: Group) -> Rule:
    return rules.adamw_amsgrad if group["amsgrad"] else rules.adamw


@planned(_sgd, counts_steps=False)
class SGD(Planned, torch.optim.SGD):
    """``torch.optim.SGD``, with momentum, dampening, Nesterov, weight decay and maximize.

    Args:
        *args, **kwargs: those of ``torch.optim.SGD``, and `Options` by name.

    Example:
        >>> import torch, pyupdate
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = pyupdate.optim.SGD([p], lr=0.5)
        >>> p.grad = torch.tensor([1.0, 0.0])
        >>> optimizer.step()
        >>> p.tolist()
        [0.5, 1.0]
    """


@planned(_adam, counts_steps=True)
class Adam(Planned, torch.optim.Adam):
    """``torch.optim.Adam`` (Kingma and Ba 2015, arXiv:1412.6980), with amsgrad and maximize.

    Args:
        *args, **kwargs: those of ``torch.optim.Adam``, and `Options` by name.

    Example:
        >>> import torch, pyupdate
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = pyupdate.optim.Adam([p], lr=0.5)
        >>> p.grad = torch.tensor([3.0, 0.0])
        >>> optimizer.step()
        >>> p.tolist()
        [0.5, 1.0]
    """


@planned(_adamw, counts_steps=True)
class AdamW(Planned, torch.optim.AdamW):
    """``torch.optim.AdamW`` (Loshchilov and Hutter 2019, arXiv:1711.05101).

    Args:
        *args, **kwargs: those of ``torch.optim.AdamW``, and `Options` by name.

    Example:
        >>> import torch, pyupdate
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = pyupdate.optim.AdamW([p], lr=0.5, weight_decay=0.0)
        >>> p.grad = torch.tensor([3.0, 0.0])
        >>> optimizer.step()
        >>> p.tolist()
        [0.5, 1.0]
    """


def _rmsprop(group: Group) -> Rule:
    if group["centered"]:
        momentum = group["momentum"] > 0
        return rules.rmsprop_centered_momentum if momentum else rules.rmsprop_centered
    return rules.rmsprop_momentum if group["momentum"] > 0 else rules.rmsprop


@planned(_rmsprop, counts_steps=True)
class RMSprop(Planned, torch.optim.RMSprop):
    """``torch.optim.RMSprop`` (Hinton 2012), centered or not, with momentum or without.

    Args:
        *args, **kwargs: those of ``torch.optim.RMSprop``, and `Options` by name.

    Example:
        >>> import torch, pyupdate
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = pyupdate.optim.RMSprop([p], lr=0.5, alpha=0.75)
        >>> p.grad = torch.tensor([3.0, 0.0])
        >>> optimizer.step()
        >>> p.tolist()
        [0.0, 1.0]
    """


@planned(lambda _: rules.adagrad, counts_steps=True)
class Adagrad(Planned, torch.optim.Adagrad):
    """``torch.optim.Adagrad`` (Duchi, Hazan and Singer 2011).

    Args:
        *args, **kwargs: those of ``torch.optim.Adagrad``, and `Options` by name.

    A parameter has its state from the start, as in torch; one that joins with a later group gets it
    at its first step.

    Example:
        >>> import torch, pyupdate
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = pyupdate.optim.Adagrad([p], lr=0.5)
        >>> p.grad = torch.tensor([3.0, 0.0])
        >>> optimizer.step()
        >>> p.tolist()
        [0.5, 1.0]
    """


@planned(lambda _: rules.adadelta, counts_steps=True)
class Adadelta(Planned, torch.optim.Adadelta):
    """``torch.optim.Adadelta`` (Zeiler 2012, arXiv:1212.5701).

    Args:
        *args, **kwargs: those of ``torch.optim.Adadelta``, and `Options` by name.

    Example:
        >>> import torch, pyupdate
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = pyupdate.optim.Adadelta([p], rho=0.75, eps=1.0)
        >>> p.grad = torch.tensor([0.0, -2.0])
        >>> optimizer.step()
        >>> [round(x, 4) for x in p.tolist()]
        [1.0, 2.4142]
    """


@planned(lambda _: rules.adamax, counts_steps=True)
class Adamax(Planned, torch.optim.Adamax):
    """``torch.optim.Adamax`` (Kingma and Ba 2015, arXiv:1412.6980): the largest gradient divides.

    Args:
        *args, **kwargs: those of ``torch.optim.Adamax``, and `Options` by name.

    Example:
        >>> import torch, pyupdate
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = pyupdate.optim.Adamax([p], lr=0.5)
        >>> p.grad = torch.tensor([3.0, 0.0])
        >>> optimizer.step()
        >>> p.tolist()
        [0.5, 1.0]
    """


@planned(lambda _: rules.radam, counts_steps=True)
class RAdam(Planned, torch.optim.RAdam):
    """``torch.optim.RAdam`` (Liu et al. 2020, arXiv:1908.03265), with either weight decay.

    Args:
        *args, **kwargs: those of ``torch.optim.RAdam``, and `Options` by name.

    Until the second moment says enough (five steps, by the default betas) a step is by the first
    moment alone: in proportion to the gradient, whatever its size.

    Example:
        >>> import torch, pyupdate
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = pyupdate.optim.RAdam([p], lr=0.5)
        >>> p.grad = torch.tensor([1.0, 0.0])
        >>> optimizer.step()
        >>> p.tolist()
        [0.5, 1.0]
    """


def _rprop(_: Group) -> Rule:
    return rules.rprop


@planned(_rprop, counts_steps=True)
class Rprop(Planned, torch.optim.Rprop):
    """``torch.optim.Rprop`` (Riedmiller and Braun 1993), a step size an element, for full batches.

    Args:
        *args, **kwargs: those of ``torch.optim.Rprop``, and `Options` by name.

    Example:
        >>> import torch, pyupdate
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = pyupdate.optim.Rprop([p], lr=0.5)
        >>> p.grad = torch.tensor([3.0, -2.0])
        >>> optimizer.step()
        >>> p.tolist()
        [0.5, 1.5]
    """


def _nadam(_: Group) -> Rule:
    return rules.nadam


@planned(_nadam, counts_steps=True)
class NAdam(Planned, torch.optim.NAdam):
    """``torch.optim.NAdam`` (Dozat 2016), Adam with Nesterov's momentum on a schedule.

    Args:
        *args, **kwargs: those of ``torch.optim.NAdam``, and `Options` by name.

    Example:
        >>> import torch, pyupdate
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = pyupdate.optim.NAdam([p], lr=0.5, eps=0.0)
        >>> p.grad = torch.tensor([3.0, -2.0])
        >>> optimizer.step()
        >>> [round(x, 3) for x in p.tolist()]
        [0.472, 1.528]
    """


def _asgd(_: Group) -> Rule:
    return rules.asgd


@planned(_asgd, counts_steps=True)
class ASGD(Planned, torch.optim.ASGD):
    """``torch.optim.ASGD`` (Polyak and Juditsky 1992), SGD whose path is averaged in ``ax``.

    Args:
        *args, **kwargs: those of ``torch.optim.ASGD``, and `Options` by name.

    Example:
        >>> import torch, pyupdate
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = pyupdate.optim.ASGD([p], lr=0.5, lambd=0.0)
        >>> p.grad = torch.tensor([1.0, -2.0])
        >>> optimizer.step()
        >>> p.tolist(), optimizer.state[p]["ax"].tolist()
        ([0.5, 2.0], [0.5, 2.0])
    """
