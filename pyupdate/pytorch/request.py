# SPDX-License-Identifier: Apache-2.0
"""What the passes are asked for in one step: the options, and how the gradients are scaled."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from ..options import Options


@dataclass(frozen=True)
class Scaling:
    """What a GradScaler adds to a step.

    Attributes:
        unscale: what the gradients are multiplied by, 1 / scale.
        check: whether the step looks for inf and nan and is skipped if there are any.
        found: whether somebody has already found some.
    """

    unscale: float = 1.0
    check: bool = False
    found: bool = False


class NormNotFinite(RuntimeError):
    """What `Options.error_if_nonfinite` asks for."""


class Request(NamedTuple):
    """One step as every back end takes it; csrc/bindings.cpp reads it in this order.

    Attributes:
        reduce: take the norm, and look for inf and nan.
        skip: write nothing if there are any.
        finite_norm: write nothing, and raise, if the norm is not finite.
        inf_norm: the norm is the largest magnitude, not the 2-norm.
        unscale: what every gradient is multiplied by before the norm is taken.
        max_norm: the bound of the norm, negative for no clip.
        clip_value: the bound of every multiplied gradient element, infinite for none.
        ema_weight: of the new parameter in its average, where there are averages.
        stochastic: bfloat16 and float16 are rounded by chance.
        seed: of that.
    """

    reduce: bool
    skip: bool
    finite_norm: bool
    inf_norm: bool
    unscale: float
    max_norm: float
    clip_value: float
    ema_weight: float
    stochastic: bool
    seed: int

    def check_norm(self, norm: float | None, options: Options) -> None:
        """Refuse a norm that is not finite, where that was asked for.

        Raises:
            RuntimeError: torch's own words.
        """
        if self.finite_norm and norm is not None and not math.isfinite(norm):
            message = (
                f"The total norm of order {float(options.norm_type)} for gradients from "
                "`parameters` is non-finite, so it cannot be clipped. To disable this error and "
                "scale the gradients by the non-finite norm anyway, set `error_if_nonfinite=False`"
            )
            raise NormNotFinite(message)


def request_of(options: Options, scaling: Scaling) -> Request:
    """What these options ask of a step of gradients that are scaled so."""
    clips = options.max_norm is not None
    skip = scaling.check or options.skip_nonfinite
    return Request(
        reduce=skip or clips,
        skip=skip,
        finite_norm=options.error_if_nonfinite,
        inf_norm=options.norm_type != 2.0,
        unscale=scaling.unscale,
        max_norm=-1.0 if options.max_norm is None else float(options.max_norm),
        clip_value=math.inf if options.clip_value is None else float(options.clip_value),
        ema_weight=0.0 if options.ema_decay is None else 1.0 - float(options.ema_decay),
        stochastic=options.stochastic_rounding,
        seed=int(options.seed),
    )
