# SPDX-License-Identifier: Apache-2.0
"""What a user adds to a plain step, and what a step leaves to be read.

`Options` is the one text of the options: the optimizer classes, `pyupdate.build` and
`pyupdate.accelerate` take its fields by name and show them in their signatures.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

_F = TypeVar("_F", bound=Callable[..., Any])
_N = TypeVar("_N", int, float)


@dataclass(frozen=True)
class Options:
    """What is added to a plain step.

    Attributes:
        max_norm: the bound of the gradients' global norm, as in torch's ``clip_grad_norm_``; None
            for no clip.
        norm_type: which norm that is: 2, or ``math.inf`` for the largest magnitude of any element.
            The 2-norm of finite float32 gradients can overflow (values near 1e19); the inf norm
            cannot.
        error_if_nonfinite: with `max_norm`, raise torch's ``RuntimeError``, before anything is
            written, if the norm is inf or nan. Also with a scaler, as torch's
            ``clip_grad_norm_(error_if_nonfinite=True)`` does: its skipped steps raise then.
        skip_nonfinite: skip the step if a gradient is inf or nan, without a scaler: parameters,
            state and step counts keep their bits.
        clip_value: the bound of every element of the gradient, as in torch's
            ``clip_grad_value_``, after it was unscaled and clipped by `max_norm`; None for none.
        accumulation_steps: the step is made on the mean of so many micro-batches: gradients of that
            many calls of `pyupdate.update_model` (or of ``optimizer.step()``, around which
            ``zero_grad()`` then keeps them) add up in ``.grad``, and all calls but the last only
            count. The norm, the clips and the finite check are those of the mean. Step hooks see
            made steps only.
        ema_decay: keep an exponential moving average of every parameter, which each of its steps
            moves towards it by 1 - ema_decay (from 0 to 1; 0.999 is usual); it begins as the value
            before the first step. In float32 (float64 for float64 parameters), in
            ``state[param]["ema"]``, so that a ``state_dict`` carries it;
            `pyupdate.averaged_weights` puts it into the model. None keeps none.
        state_dtype: ``torch.float32`` makes and keeps the state of bfloat16 and float16 parameters
            in float32; other parameters' has their own dtype in any case. None: state has the
            dtype of its parameter, as in torch, where moving averages stall: a bfloat16 average
            that moves by less than 1/512 of itself a step does not move at all. Twice the state's
            memory, for averages that are right.
        stochastic_rounding: round parameters and state that are stored in bfloat16 or float16 up or
            down by chance, so that what is lost in one step is won in another: on average a small
            move is not lost, without the memory of `state_dtype`. Values that the dtype holds
            exactly, inf and nan are stored as they are; what overflows to nearest, overflows.
        seed: of the stochastic rounding. What is drawn depends on it, on the step count, on the
            parameter's place in its group and the group's in the optimizer, and on the element's
            place in the parameter's memory: a run repeats itself to the bit on any back end. `SGD`,
            `LARS` and `Muon` keep no step count: after ``load_state_dict`` they count anew.
    """

    max_norm: float | None = None
    norm_type: float = 2.0
    error_if_nonfinite: bool = False
    skip_nonfinite: bool = False
    clip_value: float | None = None
    accumulation_steps: int = 1
    ema_decay: float | None = None
    state_dtype: torch.dtype | None = None
    stochastic_rounding: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        _check_state_dtype(self.state_dtype)
        for name in ("max_norm", "clip_value"):
            bound = getattr(self, name)
            if bound is None:
                continue
            bound = self._as_number(name, " or None")
            if not bound >= 0.0:
                message = f"{name} must not be negative or nan, but is {bound}"
                raise ValueError(message)
        steps = self._as_whole_number("accumulation_steps")
        if steps < 1:
            message = f"accumulation_steps must be at least 1, but is {steps}"
            raise ValueError(message)
        if self.ema_decay is not None:
            decay = self._as_number("ema_decay", " or None")
            if not 0.0 <= decay <= 1.0:
                message = f"ema_decay must be from 0 to 1, but is {decay}"
                raise ValueError(message)
        if self._as_number("norm_type") not in (2.0, math.inf):
            message = f"norm_type must be 2 or math.inf, but is {self.norm_type}"
            raise ValueError(message)
        seed = self._as_whole_number("seed")
        if not 0 <= seed < 2**63:
            message = f"seed must be from 0 to 2**63 - 1, but is {seed}"
            raise ValueError(message)
        for name in ("error_if_nonfinite", "skip_nonfinite", "stochastic_rounding"):
            if not isinstance(getattr(self, name), bool):
                found = type(getattr(self, name)).__name__
                message = f"{name} must be True or False, not {found}"
                raise TypeError(message)
        if self.error_if_nonfinite and self.max_norm is None:
            message = "error_if_nonfinite looks at the norm of max_norm: give a max_norm too"
            raise ValueError(message)
        if self.error_if_nonfinite and self.skip_nonfinite:
            message = "error_if_nonfinite and skip_nonfinite contradict each other: leave one out"
            raise ValueError(message)

    @property
    def asked_for(self) -> tuple[str, ...]:
        """The names of the options that are not at their default."""
        fields = dataclasses.fields(self)
        return tuple(f.name for f in fields if getattr(self, f.name) != f.default)

    def _as_number(self, name: str, alternative: str = "") -> float:
        """An option as Python's number, which it becomes: numpy's are numbers too.

        Tensors and arrays are none: an option is read once, and they could change later.
        """
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            found = type(value).__name__
            message = f"{name} must be a number{alternative}, not {found}: give Python's or numpy's"
            raise TypeError(message)
        return self._set(name, float(value))

    def _as_whole_number(self, name: str) -> int:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            found = type(value).__name__
            message = f"{name} must be a whole number, not {found}: give Python's or numpy's"
            raise TypeError(message)
        return self._set(name, int(value))

    def _set(self, name: str, value: _N) -> _N:
        object.__setattr__(self, name, value)  # frozen, but this is what it is made with
        return value


def _check_state_dtype(value: object) -> None:
    if value is None:
        return
    import torch  # not above: pyupdate is imported without it

    if not isinstance(value, torch.dtype):
        message = f"state_dtype must be torch.float32 or None, not {type(value).__name__}"
        raise TypeError(message)
    if value is not torch.float32:
        message = f"state_dtype must be torch.float32 or None, but is {value}"
        raise ValueError(message)


PARAMETERS = tuple(
    inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
    for f in dataclasses.fields(Options)
)
"""The options as keyword parameters, for the signature of whatever takes them."""


def options_from(given: Mapping[str, Any], taker: str) -> Options:
    """The options that were given by name.

    Raises:
        TypeError: one is unknown, or of the wrong type; says what `taker` takes.
        ValueError: a value cannot be had, alone or beside another one.
    """
    names = [parameter.name for parameter in PARAMETERS]
    unknown = [name for name in given if name not in names]
    if unknown:
        message = f"{taker} got an unexpected option '{unknown[0]}'; there are {', '.join(names)}"
        raise TypeError(message)
    return Options(**given)


def shows_options(function: _F) -> _F:
    """Let ``help`` show the options in the place of a function's ``**options``."""
    shown = inspect.signature(function)
    own = [p for p in shown.parameters.values() if p.kind is not p.VAR_KEYWORD]
    signature = shown.replace(parameters=[*own, *PARAMETERS])
    function.__signature__ = signature  # type: ignore[attr-defined]
    return function


_V = TypeVar("_V")


class LastUpdate:
    """What the last update of an optimizer did.

    The values are read from the device when they are asked for, and then kept; on a CPU they are
    plain numbers from the beginning.

    Attributes:
        norm: the global norm of the unscaled gradients before clipping (the 2-norm, or that of
            `Options.norm_type`); None where nobody asked for it (no scaler, no ``max_norm``, no
            ``skip_nonfinite``).
        skipped: whether nothing was written because a gradient was inf or nan.
        multiplier: what every gradient was multiplied by (unscale x clip by the norm).
        flag: where the step was made on a GPU, its one number there that is not zero if nothing was
            written; else None.
    """

    __slots__ = ("_multiplier", "_norm", "_skipped", "flag")

    def __init__(
        self,
        norm: float | Callable[[], float | None] | None,
        skipped: bool | Callable[[], bool],
        multiplier: float | Callable[[], float],
        flag: torch.Tensor | None = None,
    ) -> None:
        """Take numbers, or functions that read them from the device."""
        self._norm = norm
        self._skipped = skipped
        self._multiplier = multiplier
        self.flag = flag

    @property
    def norm(self) -> float | None:
        """Before clipping, None where nobody asked for it."""
        self._norm = found = _read(self._norm)
        return found

    @property
    def skipped(self) -> bool:
        """Whether nothing was written."""
        self._skipped = found = _read(self._skipped)
        return found

    @property
    def multiplier(self) -> float:
        """What every gradient was multiplied by."""
        self._multiplier = found = _read(self._multiplier)
        return found

    def _values(self) -> tuple[float | None, bool, float]:
        return self.norm, self.skipped, self.multiplier

    def __repr__(self) -> str:
        return (
            f"LastUpdate(norm={self.norm!r}, skipped={self.skipped!r}, "
            f"multiplier={self.multiplier!r})"
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LastUpdate):
            return NotImplemented
        return self._values() == other._values()

    def __hash__(self) -> int:
        return hash(self._values())


def _read(value: _V | Callable[[], _V]) -> _V:
    return value() if callable(value) else value
