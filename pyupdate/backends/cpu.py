# SPDX-License-Identifier: Apache-2.0
"""The compiled CPU back end: C++ plans that re-read every pointer at every step."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

from .. import forks
from ..kernels.language import Rule
from ..kernels.rules import RULES
from ..native import passes_digest
from ..options import LastUpdate
from ..pytorch.joining import Joining
from ..pytorch.request import Request, Scaling
from ..pytorch.rows import GroupRule, Inputs, Row, Stale, check_all_memory, check_row, mend_row
from ..pytorch.uninterrupted import append_result
from . import AUTO, choice, say_once
from .compiled import plan_of

Prepare = Callable[[str, Sequence[float]], list[float]]

ISA_VARIABLE = "PYUPDATE_ISA"

_modules: list[Any] = []
"""Compiled modules, pyupdate's own first; others were given to `register_module`."""


def why_not() -> str | None:
    """The reason why this back end cannot run, None if it can."""
    try:
        _own_module()
    except ImportError as error:
        from ..build_info import reason_not_compiled

        return reason_not_compiled() or f"the compiled module does not load: {error}"
    except ValueError as error:
        return f"{ISA_VARIABLE}: {error}"
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        return f"torch {torch.__version__} has no DLPack C exchange API; it came with torch 2.10"
    return None


def register_module(module: Any, *, passes: str | None = None) -> None:
    """Add an extension that was compiled from another rules file, for the rules it names.

    Args:
        module: the extension.
        passes: the `native.passes_digest` of the pyupdate that it was compiled with; None where
            that is known to be this one.

    Raises:
        ImportError: it was compiled with another pyupdate, whose passes are others.
    """
    if passes is not None and passes != passes_digest():
        message = (
            f"{module.__name__} was compiled with another version of pyupdate: "
            "run python -m pyupdate.compile again"
        )
        raise ImportError(message)
    _own_module()
    if module not in _modules:
        _use_wanted_isa(module)
        _modules.append(module)


def _own_module() -> Any:
    if not _modules:
        from .. import _C

        _use_wanted_isa(_C)
        _modules.append(_C)
    return _modules[0]


def _use_wanted_isa(module: Any) -> None:
    wanted = os.environ.get(ISA_VARIABLE, "").strip().lower()
    if wanted:
        module.use_isa(wanted)


def module_with(rule: Rule) -> Any | None:
    """The compiled module that has a rule, None if nobody compiled it.

    Raises:
        RuntimeError: a module was compiled from another text of this rule.
    """
    own = _own_module()
    stale = None
    for module in _modules:
        compiled = module.digests().get(rule.name)
        if compiled == rule.digest:
            return module
        # A rule of the user's may have the name of a shipped one, and is another.
        if compiled is not None and (module is not own or RULES.get(rule.name) is rule):
            stale = module
    if stale is None:
        return None
    mend = "make install" if stale is own else "python -m pyupdate.compile"
    message = (
        f"rule '{rule.name}' was changed since {stale.__name__} was compiled: run {mend} again "
        "(or step on the back end 'reference', which runs the text as it is)"
    )
    raise RuntimeError(message)


def home(row: Row, rule: Rule, chosen: str) -> Any | None:
    """The compiled module that steps a row; None where ``auto`` must leave it to ``reference``.

    Raises:
        RuntimeError: no module has the rule, and this back end was `chosen` by name; or one was
            compiled from another text of it.
    """
    del row
    module = module_with(rule)
    if module is None and chosen == AUTO:
        say_once("cpu", f"rule '{rule.name}' is not compiled (python -m pyupdate.compile)")
    elif module is None:
        message = (
            f"back end 'cpu' was chosen, but rule '{rule.name}' is not compiled: "
            "choose 'auto' or 'reference'"
        )
        raise RuntimeError(message)
    return module


@cache
def _prepare_of(name: str, digest: str, modules: int) -> Prepare | None:
    """What is compiled from this text; the number of modules is given because it may grow."""
    for module in _modules[:modules]:
        # A module may have been built before there was one.
        if module.digests().get(name) == digest and hasattr(module, "prepare"):
            found: Prepare = module.prepare
            return found
    return None


def prepared(rule: Rule, step: int, numbers: Sequence[float]) -> dict[str, float]:
    """The hypers of a step, for what follows a pass: `Rule.prepared`, whose bits these are.

    Compiled where that may be, for a power takes Python 60 us, as long as a small model's step.

    Args:
        rule: without `counted` scalars.
        step: the count.
        numbers: what its group gives.
    """
    compiled = None
    if choice() != "reference":
        compiled = _prepare_of(rule.name, rule.digest, len(_modules))
    if compiled is None:
        return rule.prepared(step, numbers, {})[0]
    return dict(zip(rule.hypers, compiled(rule.name, [step, *numbers]), strict=True))


def part(rows: Sequence[Row], rules: Sequence[GroupRule], home: Any, averages: bool) -> Part:
    """The part of the rows that one module steps."""
    return Part(rows, rules, home, averages)


class Part:
    """The rows of a plan that one compiled module steps."""

    reads_scaling = False

    def __init__(
        self, rows: Sequence[Row], rules: Sequence[GroupRule], module: Any, averages: bool
    ) -> None:
        self.rows = rows
        self.module = module
        self._rules = rules
        self._threads = forks.threads
        self._found = module.Found
        self._ready = module.Found.READY
        self._plan = plan_of(module.Plan, rows, rules, averages)
        self._answers: list[Any] = []  # of what this step has asked the compiled plan to write
        self._reduces = False

    @property
    def nbytes(self) -> int:
        """Memory of the plan's tables."""
        return int(self._plan.nbytes())

    def step(self, inputs: Inputs, request: Request, scaling: Scaling) -> LastUpdate | None:
        """The whole step in one parallel region; None, and nothing done, where state is missing."""
        self._reduces = request.reduce
        asked = (inputs.groups, inputs.state, inputs.numbers, request)
        append_result(self._answers, self._plan.step, *asked, self._threads())
        found, noticed, *_ = self._answers[-1]
        if found is not self._ready and found != self._ready:
            self._answers.clear()
            if found == self._found.FRESH:
                return None
            self._settle(found, noticed, inputs)
            return self.step(inputs, request, scaling)
        return self.made

    def begin(self) -> None:
        """Forget what the last step has done."""
        self._answers.clear()

    @property
    def made(self) -> LastUpdate | None:
        """What `step` did, once it was made: known also where an interrupt came behind it."""
        if not self._answers or self._answers[-1] is None or self._answers[-1][0] != self._ready:
            return None
        _, _, norm, _, skipped, multiplier = self._answers[-1]
        return LastUpdate(norm if self._reduces else None, skipped, multiplier)

    @property
    def wrote(self) -> bool:
        """Whether this step's `apply` has written all of its rows."""
        return bool(self._answers)

    @property
    def unwritten(self) -> Sequence[Row]:
        """Where a step raised: the rows that it is known to have left as they were."""
        return () if self.wrote else self.rows

    def state_was_made(self) -> None:
        """Nothing to note: the compiled plan sees what there is."""

    @staticmethod
    def step_together(joinings: Sequence[Joining]) -> list[LastUpdate] | None:
        """Whole steps of several parts in one parallel region; see `Joining`."""
        module = joinings[0].part.module
        if any(one.part.module is not module for one in joinings):
            return None
        asked = []
        for part, inputs, request, _ in joinings:
            asked.append((part._plan, inputs.groups, inputs.state, inputs.numbers, request))
        joint: list[Any] = []
        try:
            append_result(joint, module.step_together, asked, forks.threads())
            return _noted(joinings, joint[0])
        except BaseException:
            if joint:  # an interrupt behind the step
                _noted(joinings, joint[0])
            raise

    def check(self, inputs: Inputs) -> list[int]:
        """Refuse what is not right; the rows that have a gradient and no state yet."""
        while True:
            found, noticed = self._plan.check(inputs.groups, inputs.state, inputs.numbers)
            if found in (self._found.READY, self._found.FRESH):
                return list(noticed)
            self._settle(found, noticed, inputs)

    def reduce(self, inputs: Inputs, request: Request) -> tuple[bool, dict[int, float]]:
        """After a `check`: whether an inf or nan was found, and what each row adds to the norm."""
        nonfinite, active, sums = self._plan.reduce(
            inputs.groups, inputs.state, inputs.numbers, request, self._threads()
        )
        return nonfinite, dict(zip(active, sums, strict=True))

    def apply(self, inputs: Inputs, request: Request, multiplier: float) -> None:
        """After a `check` that found all state: write."""
        asked = (inputs.groups, inputs.state, inputs.numbers, request, multiplier)
        append_result(self._answers, self._plan.apply, *asked, self._threads())

    def _settle(self, found: Any, noticed: Sequence[int], inputs: Inputs) -> None:
        """Say what is wrong, or mend it, or vouch that it is right after all."""
        if found == self._found.OVERLAP:
            check_all_memory(self.rows, self._rules, inputs)
            self._plan.vouch()
        elif found == self._found.SUSPECT:
            row = self.rows[noticed[0]]
            if mend_row(row, self._rules[row.group], inputs):
                return
            check_row(row, self._rules[row.group], inputs)
            raise Stale(row.name)
        else:
            message = "the optimizer's parameters"
            raise Stale(message)


def _noted(joinings: Sequence[Joining], answers: Sequence[Any]) -> list[LastUpdate] | None:
    """What a joint step did, noted in each part; None where it was not made."""
    if not answers:
        return None
    made = []
    for (part, _, request, _), answered in zip(joinings, answers, strict=True):
        part._answers[:] = [answered]
        part._reduces = request.reduce
        made.append(part.made)
    return made
