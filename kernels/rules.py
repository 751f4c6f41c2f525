# SPDX-License-Identifier: Apache-2.0
"""The one table of update rules, and what stands before every rule: the norm and the multiplier.

The rules themselves are in `families/`, one file a family. What runs on any device, in any library,
comes from that text.
"""

from __future__ import annotations

from .families.adafactor import adafactor
from .families.adagrad import adadelta, adagrad
from .families.adam import adam, adam_amsgrad, adamw, adamw_amsgrad
from .families.adam_like import adamax, radam
from .families.averaged import asgd, schedulefree_adamw
from .families.layerwise import lamb, lars, lars_momentum, novograd, stable_adamw
from .families.lion import lion
from .families.muon import muon
from .families.nadam import nadam
from .families.resilient import rprop
from .families.rmsprop import (
    rmsprop,
    rmsprop_centered,
    rmsprop_centered_momentum,
    rmsprop_momentum,
)
from .families.several_averages import adan, ademamix, adopt
from .families.sgd import sgd, sgd_momentum
from .language import absolute, divide, maximum, minimum, where

RULES = {
    entry.name: entry
    for entry in (
        *(sgd, sgd_momentum),
        *(adam, adam_amsgrad, adamw, adamw_amsgrad),
        *(rmsprop, rmsprop_momentum, rmsprop_centered, rmsprop_centered_momentum),
        *(adagrad, adadelta, adamax, radam),
        *(nadam, rprop, asgd, schedulefree_adamw),
        *(lion, ademamix, adopt, adan),
        *(muon, adafactor),
        *(lars, lars_momentum, lamb, novograd, stable_adamw),
    )
}
"""Every rule by name, in the order in which the compiled modules list them."""


def squared(grad: float) -> float:
    """What the reduce pass adds up, per element of the unscaled gradient."""
    return grad * grad


def magnitude(grad: float) -> float:
    """What the reduce pass keeps the largest of, for the inf norm; never -0, so that 0 is least."""
    return absolute(grad)


def larger(a: float, b: float) -> float:
    """How two of those are one: the larger, and nan if either is nan, in any order."""
    return maximum(a, b)


def clipped(grad: float, clip_value: float) -> float:
    """The gradient in [-clip_value, clip_value], as torch's clip_grad_value_; a nan stays one."""
    lowest = 0.0 - clip_value
    grad = where(grad > clip_value, clip_value, grad)
    return where(grad < lowest, lowest, grad)


def averaged(average: float, param: float, weight: float) -> float:
    """The moving average of a parameter after a step, from what was stored of it; `ema_decay`."""
    return average + (param - average) * weight


def nonfinite(grad: float) -> float:
    """1 for an inf or nan, else 0: the reduce pass looks again where its sum is not finite."""
    return where(grad - grad == 0.0, 0.0, 1.0)


def multiplier(norm: float, unscale: float, max_norm: float) -> float:
    """unscale x clip of torch.nn.utils.clip_grad_norm_, in fp64; no clip where max_norm < 0.

    `norm` is that of the unscaled gradients. As in torch, an infinite norm gives 0, a nan norm nan.
    1e-6, torch's guard against a zero norm, is not exact in binary and is said as 1 / 1000000.
    """
    clip = minimum(divide(max_norm, norm + divide(1.0, 1000000.0)), 1.0)
    return unscale * where(max_norm < 0.0, 1.0, clip)
