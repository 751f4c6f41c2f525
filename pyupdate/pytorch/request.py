# SPDX-License-Identifier: Apache-2.0
"""What the passes are asked for in one step: the options, and how the gradients are scaled."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..options import Options


@dataclass(frozen=True)
class Scaling:
    """What a GradScaler adds to a step.

    A scale and flags are tensors where they were tensors, so that a step on their device need not
    wait for them; `read` makes numbers of them.

    Attributes:
        unscale: what the gradients are multiplied by.
        check: whether the step looks for inf and nan and is skipped if there are any.
        found: whether somebody has already found some.
        scale: its reciprocal, as torch rounds it, multiplies the gradients too.
        flags: none of them may be other than zero, or the step is skipped.
        divisor: of the gradients, beside that: the number of micro-batches.
    """

    unscale: float = 1.0
    check: bool = False
    found: bool = False
    scale: torch.Tensor | None = None
    flags: tuple[torch.Tensor, ...] = ()
    divisor: float = 1.0

    def read(self) -> Scaling:
        """The same in numbers alone; waits for a device that has tensors of it."""
        if self.scale is None and not self.flags and self.divisor == 1.0:
            return self
        unscale = self.unscale
        if self.scale is not None:
            unscale *= reciprocal(float(self.scale))
        found = self.found or any(float(flag) != 0.0 for flag in self.flags)
        return Scaling(unscale / self.divisor, self.check, found)

    def scale_on(self, device: torch.device) -> torch.Tensor | None:
        """The scale in float32, on a device."""
        return None if self.scale is None else self.scale.to(device, torch.float32)

    def found_on(self, device: torch.device) -> torch.Tensor | None:
        """A number on a device that is not zero where somebody has found inf or nan."""
        if not self.flags:
            return None
        flags = [flag.to(device, torch.float32).reshape(()) for flag in self.flags]
        return flags[0] if len(flags) == 1 else torch.stack(flags).abs().sum()


def reciprocal(scale: float) -> float:
    """1 / scale as torch takes it: in fp64, rounded to fp32."""
    # In Python: three operations of torch take 40 us between two steps of a model.
    exact = 1.0 / scale if scale != 0.0 else math.copysign(math.inf, scale)
    return ctypes.c_float(exact).value


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
    """What these options ask of a step of gradients that are scaled so, by numbers alone."""
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
