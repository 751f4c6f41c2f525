# SPDX-License-Identifier: Apache-2.0
"""The compiled CUDA back end: a step is launches alone, and never waits for the device.

The compiled plan (csrc/cuda/bindings.cpp) re-reads every pointer at every step and asks for its
tables to be sent where one moved. Multiplier, skip, step counts and hypers are made on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from ..kernels.language import Rule
from ..kernels.rules import RULES
from ..options import LastUpdate
from ..pytorch.joining import Joining
from ..pytorch.new_state import make_state
from ..pytorch.request import Request, Scaling
from ..pytorch.rows import GroupRule, Inputs, Row
from ..pytorch.uninterrupted import append_result
from . import AUTO, say_once
from .compiled import plan_of, runs_of, settle
from .cuda_memory import Memory, refuse_capture
from .cuda_step import Asked, address, can_be_read_there, new_outcomes, what_was_done
from .cuda_together import Together
from .plain import is_plain

_DLPACK = {"cpu": 1, "cuda": 2}
_FLAG = slice(4, 8)
"""Where the device's own memory says, in bytes, that a reduce pass met an inf or nan."""


def why_not() -> str | None:
    """The reason why this back end cannot run, None if it can."""
    try:
        module = _module()
    except ImportError as error:
        from ..build_info import reason_no_cuda

        return reason_no_cuda() or f"the compiled module does not load: {error}"
    reason = module.why_no_device()
    if reason:
        return f"no CUDA device: {reason}"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device"
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        return f"torch {torch.__version__} has no DLPack C exchange API; it came with torch 2.10"
    return None


def _module() -> Any:
    from .. import _cuda

    return _cuda


@cache
def _digests(module: Any) -> dict[str, str]:
    """Of the texts of the rules that it was compiled from."""
    found: dict[str, str] = module.digests()
    return found


def home(row: Row, rule: Rule, chosen: str) -> torch.device | None:
    """The device of a row; None where it must be left to ``reference``.

    Raises:
        RuntimeError: the rule is not compiled, and this back end was `chosen` by name; or it was
            compiled from another text.
    """
    compiled = _digests(_module()).get(rule.name)
    if compiled is not None and compiled != rule.digest and RULES.get(rule.name) is rule:
        message = (
            f"rule '{rule.name}' was changed since pyupdate._cuda was compiled: run make install "
            "again (or step on the back end 'reference', which runs the text as it is)"
        )
        raise RuntimeError(message)
    if compiled != rule.digest:
        if chosen != AUTO:
            message = (
                f"back end 'cuda' was chosen, but rule '{rule.name}' is not compiled: "
                "choose 'auto' or 'reference'"
            )
            raise RuntimeError(message)
        say_once("cuda", f"rule '{rule.name}' is not compiled")
        return None
    if not is_plain(row.param):
        say_once("cuda", f"parameter '{row.name}' does not lie in plain memory")
        return None
    return row.param.device


def part(
    rows: Sequence[Row], rules: Sequence[GroupRule], home: torch.device, averages: bool
) -> Part:
    """The part of the rows on one device."""
    return Part(rows, rules, home, averages, _module())


class Part:
    """The rows of a plan on one device."""

    reads_scaling = True

    def __init__(
        self,
        rows: Sequence[Row],
        rules: Sequence[GroupRule],
        device: torch.device,
        averages: bool,
        module: Any,
    ) -> None:
        self.rows = rows
        self._rules = rules
        self._device = device
        self._found = module.Found
        self._module = module
        self._together: Together | None = None
        self._answers: list[Any] = []  # of what this step has asked the compiled plan to write
        self._asked: tuple[Asked, Scaling] | None = None
        self._outcome: torch.Tensor | None = None  # of a step that several devices make
        self._scale: torch.Tensor | None = None
        self._counts = torch.zeros(len(rows), dtype=torch.float64, device=device)
        self.plan = plan_of(
            module.Plan, rows, rules, averages, device=(_DLPACK[device.type], device.index or 0)
        )
        """The compiled one."""
        self.plan.set_counts(self._counts.data_ptr())
        self._memory = Memory(device, [self], self.plan.copy)

    @property
    def nbytes(self) -> int:
        """Memory of its tables, on the host and on the device."""
        tensors = (self._memory.tables, self._memory.scratch, self._counts)
        joint = 0 if self._together is None else self._together.nbytes
        return joint + int(self.plan.nbytes()) + sum(t.nbytes for t in tensors)

    # ----- one step -----------------------------------------------------------------------------

    def step(self, inputs: Inputs, request: Request, scaling: Scaling) -> LastUpdate | None:
        """The whole step; None, and nothing done, where it must be made in parts."""
        if not can_be_read_there(scaling):
            return None
        asked = self.asked(inputs, request, scaling, new_outcomes(self._device))
        self._asked = asked, scaling
        made: list[tuple[torch.Tensor, str]] = []
        try:
            while True:
                groups, state, send = inputs.groups, inputs.state, self._memory.send
                append_result(self._answers, self.plan.step, groups, state, *asked.of_plan, send)
                found, noticed = self._answers[-1]
                if found == self._found.READY:
                    break
                self._answers.clear()
                if found == self._found.FRESH:
                    self._make_state(noticed, inputs, made)
                else:
                    self._settle(found, noticed, inputs)
        except BaseException:
            if self.made is None:
                self.plan.state_was_made(False)
                for param, key in made:
                    inputs.state[param].pop(key, None)
            raise
        return self.made

    def note(self, asked: Asked, scaling: Scaling) -> LastUpdate:
        """What it has done in a joint step."""
        self._asked = asked, scaling
        self._answers[:] = [(self._found.READY, [])]
        made = self.made
        assert made is not None
        return made

    def begin(self) -> None:
        """Forget what the last step has done."""
        self._answers.clear()

    @property
    def made(self) -> LastUpdate | None:
        """What `step` did, once it was made: known also where an interrupt came behind it."""
        if not self._answers or self._answers[-1] is None or self._asked is None:
            return None
        if self._answers[-1][0] != self._found.READY:
            return None
        asked, scaling = self._asked
        assert asked.outcome is not None
        return what_was_done(asked.outcome, asked.request, scaling, asked.flag)

    @property
    def wrote(self) -> bool:
        """Whether this step's `apply` has written all of its rows."""
        return bool(self._answers) or not self.plan.active()

    @property
    def unwritten(self) -> Sequence[Row]:
        """Where a step raised: the rows that it is known to have left as they were."""
        return () if self.wrote else self.rows

    def asked(
        self,
        inputs: Inputs,
        request: Request,
        scaling: Scaling,
        outcome: torch.Tensor | None = None,
    ) -> Asked:
        """What its plan is asked for in a step, which leaves what it did in `outcome`."""
        numbers, number_at = self._numbers(inputs)
        request = request._replace(unscale=request.unscale / scaling.divisor)
        scale, flag = scaling.scale_on(self._device), scaling.found_on(self._device)
        return Asked(numbers, number_at, request, outcome, scale, flag)

    @staticmethod
    def step_together(joinings: Sequence[Joining]) -> list[LastUpdate] | None:
        """Whole steps of several parts in the launches of one; see `Joining`."""
        parts: list[Part] = [one.part for one in joinings]
        first = parts[0]
        if any(
            part._device != first._device or part._module is not first._module for part in parts
        ):
            return None
        if not all(can_be_read_there(one.scaling) for one in joinings):
            return None
        if first._together is None or not first._together.is_of(parts):
            first._together = Together(parts, first._device, first._module)
        return first._together.step(joinings)

    # ----- a step of several devices (cuda_devices.py) ------------------------------------------

    def make_ready(self, inputs: Inputs, made: list[tuple[torch.Tensor, str]]) -> None:
        """Check everything, and make the state that is not there."""
        while lacking := self.check(inputs):
            self._make_state(lacking, inputs, made)

    def reduce_there(self, inputs: Inputs, request: Request, scaling: Scaling) -> torch.Tensor:
        """What each row with a gradient adds to the norm, on the device."""
        scale = scaling.scale_on(self._device)
        self._outcome = new_outcomes(self._device)
        self._scale = scale
        numbers, number_at = self._numbers(inputs)
        begin = self.plan.reduce(
            inputs.groups,
            inputs.state,
            numbers,
            number_at,
            request._replace(unscale=request.unscale / scaling.divisor),
            (self._outcome.data_ptr(), address(scale), 0),
            self._memory.send,
        )
        return self._memory.scratch[begin : begin + 8 * len(self.active())].view(torch.float64)

    def finish_there(
        self, request: Request, scaling: Scaling, sums: torch.Tensor, found: torch.Tensor
    ) -> LastUpdate:
        """The rest of a step after `reduce_there`, by the sums of all devices' rows."""
        request = request._replace(unscale=request.unscale / scaling.divisor)
        flag = scaling.found_on(self._device)
        outcome, scale = self._outcome, self._scale
        assert outcome is not None
        self.plan.finish(
            request,
            (outcome.data_ptr(), address(scale), address(flag)),
            sums.data_ptr(),
            sums.numel(),
            found.data_ptr(),
        )
        self._outcome = self._scale = None
        return what_was_done(outcome, request, scaling, flag)

    @property
    def flag(self) -> torch.Tensor:
        """Whether its last reduce pass met an inf or nan; one number on the device."""
        return self._memory.scratch[_FLAG].view(torch.int32)

    def forget_reduce(self) -> None:
        """After `reduce_there`, where the step is not made; what a check found absent stays so."""
        self.plan.state_was_made(False)
        if self._memory.scratch.numel():
            self._memory.scratch[_FLAG].zero_()

    def active(self) -> list[int]:
        """The rows that have a gradient."""
        active: list[int] = self.plan.active()
        return active

    def sent(self, host: torch.Tensor) -> torch.Tensor:
        """A copy on the device, in the order of its stream."""
        if self._device.type == "cpu":
            return host
        return host.pin_memory().to(self._device, non_blocking=True)

    def refuse_while_capturing(self, what: str) -> None:
        """Refuse what must be sent while a graph is captured."""
        if self.plan.capturing():
            refuse_capture(f"{what} is another one")

    # ----- in parts -----------------------------------------------------------------------------

    def _make_state(
        self, rows: Sequence[int], inputs: Inputs, made: list[tuple[torch.Tensor, str]]
    ) -> None:
        """Of a first step, which may yet be skipped: zeros, and a step count of 0."""
        if self.plan.capturing():
            refuse_capture(f"the state of '{self.rows[rows[0]].name}' is not made yet")
        self.plan.state_was_made(True)
        make_state([self.rows[r] for r in rows], self._rules, inputs, made)

    def check(self, inputs: Inputs) -> list[int]:
        """Refuse what is not right; the rows that have a gradient and no state yet."""
        while True:
            found, noticed = self.plan.check(inputs.groups, inputs.state, self._numbers(inputs)[0])
            if found in (self._found.READY, self._found.FRESH):
                return list(noticed)
            self._settle(found, noticed, inputs)

    def state_was_made(self) -> None:
        """Tell it that what the last check found absent is made now, in its first step."""
        self.plan.state_was_made(True)

    def reduce(self, inputs: Inputs, request: Request) -> tuple[bool, dict[int, float]]:
        """After a `check`: whether an inf or nan was found, and what each row adds to the norm.

        Waits for the device: a norm over several devices is made on the host.
        """
        active = self.plan.active()
        if not active:
            return False, {}
        outcome = new_outcomes(self._device)
        numbers, number_at = self._numbers(inputs)
        begin = self.plan.reduce(
            inputs.groups,
            inputs.state,
            numbers,
            number_at,
            request,
            (outcome.data_ptr(), 0, 0),
            self._memory.send,
        )
        sums = self._memory.scratch[begin : begin + 8 * len(active)].view(torch.float64).tolist()
        flag = self._memory.scratch[_FLAG]
        nonfinite = any(flag.tolist())
        flag.zero_()
        return nonfinite, dict(zip(active, sums, strict=True))

    def apply(self, inputs: Inputs, request: Request, multiplier: float) -> None:
        """After a `check` that found all state: write."""
        if not self.plan.active():
            return
        outcome = new_outcomes(self._device)
        numbers, number_at = self._numbers(inputs)
        places = (outcome.data_ptr(), 0, 0)
        append_result(
            self._answers,
            self.plan.apply,
            inputs.groups,
            inputs.state,
            numbers,
            number_at,
            request,
            multiplier,
            places,
            self._memory.send,
        )

    def _numbers(self, inputs: Inputs) -> tuple[list[list[float]], list[list[int]]]:
        """The groups' numbers, and where one stands on the device, to be read there."""
        values: list[list[float]] = []
        places: list[list[int]] = []
        for group in inputs.given:
            at = [_place_on(self._device, number) for number in group]
            places.append(at if any(at) else [])
            values.append([0.0 if a else float(n) for a, n in zip(at, group, strict=True)])
        return values, places

    def set_counts(self, counts: Sequence[tuple[int, float]]) -> None:
        """Set the plan's own step counts of these rows."""
        for first, last, count in runs_of(counts):
            self._counts[first:last].fill_(count)

    # ----- what is not plainly right ------------------------------------------------------------

    def _settle(self, found: Any, noticed: Sequence[int], inputs: Inputs) -> None:
        """Say what is wrong, or mend it, or vouch that it is right after all."""
        settle(self.plan, self._found, found, noticed, self.rows, self._rules, inputs)


def _place_on(device: torch.device, number: float | torch.Tensor) -> int:
    """The address of a number that is there, with 1 added where it is float64; else 0."""
    if isinstance(number, float) or number.device != device:
        return 0
    return number.data_ptr() + (number.dtype is torch.float64)
