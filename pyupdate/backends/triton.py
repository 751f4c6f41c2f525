# SPDX-License-Identifier: Apache-2.0
"""The Triton back end: a step on a GPU without a compiler of ours, and without waiting for it.

A step reads every address anew and compares; where none moved, nothing is sent and the step is
launches alone (`triton_tables.py`): reduce where a norm or a finite check is asked for, else
prepare; then apply. The multiplier, the skip and what follows from the step count are made on the
device, so `LastUpdate` reads them when it is asked. Triton itself is imported when a plan is made.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.graph import increment_version

from ..kernels.language import Rule
from ..options import LastUpdate
from ..pytorch.request import Request, Scaling
from ..pytorch.rows import (
    AVERAGE,
    GroupRule,
    Inputs,
    Row,
    Stale,
    check_all_memory,
    check_row,
    has_state,
    lacks_average,
)
from . import say_once
from .plain import mend
from .triton_memory import address, refuse_capture, tagged, versions
from .triton_rows import Drawn, Entry, Rows, why_not_row
from .triton_step import Asked, what_was_done
from .triton_together import Together, step_together

if TYPE_CHECKING:
    from .triton_tables import Tables

DEVICES = ("cuda", "xpu")


def why_not() -> str | None:
    """The reason why this back end cannot run, None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not any(_is_there(kind) for kind in DEVICES):
        return "torch sees no GPU that Triton compiles for (CUDA, ROCm or XPU)"
    return None


def _is_there(kind: str) -> bool:
    module: Any = getattr(torch, kind, None)
    return module is not None and bool(module.is_available())


def home(row: Row, rule: Rule, chosen: str) -> torch.device | None:
    """The device of a row; None where it must be left to ``reference``."""
    del chosen
    reason = why_not_row(row, rule)
    if reason is not None:
        say_once("triton", reason)
        return None
    return row.param.device


def part(
    rows: Sequence[Row], rules: Sequence[GroupRule], home: torch.device, averages: bool
) -> Part:
    """The part of the rows on one device; read by compiled code where there is some."""
    del home
    from .triton_watch import WatchedPart, can_watch

    return (WatchedPart if can_watch() else Part)(rows, rules, averages)


class Part:
    """The rows of a plan on one device, read by Python."""

    reads_scaling, made = True, None  # an interrupt may come between two of a step's launches

    def __init__(self, rows: Sequence[Row], rules: Sequence[GroupRule], averages: bool) -> None:
        self.rows = rows
        self._rules = rules
        self._averages = averages
        self.device = rows[0].param.device
        self.together = Together()
        """What it keeps where it is the first of several that are stepped as one."""
        self._is_cuda = self.device.type == "cuda"
        self._drawn: Drawn | None = None
        self._tables: Tables | None = None
        self._active: list[int] = []
        self._seen: list[Any] | None = None
        self._listed: list[list[int]] | None = None
        self._counters = torch.zeros(len(rows), dtype=torch.float64, device=self.device)
        self._counted: dict[int, object] = {}  # by which buffer a counter of ours is known
        self._lacking: frozenset[int] = frozenset()
        self._made: frozenset[int] = frozenset()
        self._counts: dict[int, tuple[float, ...]] = {}
        self._counters_of: list[Any] = []
        self._written: list[torch.Tensor] = []
        self._held: list[torch.Tensor] = []
        self._versions: list[int] = []
        self.wrote = self._begun = False

    @property
    def nbytes(self) -> int:
        """Memory of its tables on the device."""
        own = 0 if self._tables is None else self._tables.nbytes
        return own + self.together.nbytes

    # ----- one step -----------------------------------------------------------------------------

    def step(self, inputs: Inputs, request: Request, scaling: Scaling) -> LastUpdate | None:
        """The whole step without waiting for the device; None, and nothing done, without state."""
        if self.check(inputs) or not self._active:
            return None
        asked = self.asked(inputs, request, scaling)
        (result,) = self._ready(asked).step([asked])
        self.bump()
        return what_was_done(result, asked)

    def asked(self, inputs: Inputs, request: Request, scaling: Scaling) -> Asked:
        """What it is asked for in a step."""
        scale, found = scaling.scale_on(self.device), scaling.found_on(self.device)
        unscale, divisor = scaling.unscale, scaling.divisor
        return Asked(request, unscale, divisor, inputs.numbers, scale, found)

    def begin(self) -> None:
        """Forget what the last step has done."""
        self.wrote = self._begun = False

    @property
    def unwritten(self) -> Sequence[Row]:
        """Where a step raised: the rows that it is known to have left as they were."""
        return () if self._begun else self.rows

    step_together = staticmethod(step_together)

    def drawn(self, inputs: Inputs) -> Drawn | None:
        """What its tables are made of, once all was checked; None where a step needs more."""
        return self._drawn if not self.check(inputs) and self._active else None

    def check(self, inputs: Inputs) -> list[int]:
        """Refuse what is not right; the rows that have a gradient and no state yet."""
        # Who writes a step count or a scalar by hand parts what was stepped alike.
        by_hand = versions(self._held) != self._versions
        seen = self._look(inputs)
        if seen == self._seen and not by_hand:
            return []
        self._refuse_while_capturing("an address or the set of gradients has changed")
        if by_hand:
            self._counters_of = []
        elif self._only_gradients_moved(seen):
            self._seen = seen
            return []
        # Also what is moved from the end of a group to the beginning of the next.
        listed = [list(map(id, group["params"])) for group in inputs.groups]
        if self._listed is None:
            self._listed = listed
        if self._listed != listed:
            message = "the optimizer's parameters"
            raise Stale(message)
        self._seen = self._drawn = None
        fresh, lacking = [], []
        self._active = [r for r, row in enumerate(self.rows) if row.param.grad is not None]
        for r in self._active:
            row, rule = self.rows[r], self._rules[self.rows[r].group]
            mend(row, rule, inputs)
            check_row(row, rule, inputs)
            if why_not_row(row, rule.rule) is not None:
                raise Stale(row.name)
            inner = inputs.state.get(row.param)
            if rule.keys and not has_state(inner, rule.keys, row.name):
                lacking.append(r)
            if lacking[-1:] == [r] or lacks_average(inner, inputs):
                fresh.append(r)
        self._lacking = frozenset(lacking)
        check_all_memory(self.rows, self._rules, inputs)
        if not fresh:
            self._draw(inputs)
            self._seen = self._look(inputs)
            self._versions = versions(self._held)
        return fresh

    def reduce(self, inputs: Inputs, request: Request) -> tuple[bool, dict[int, float]]:
        """After a `check`: whether an inf or nan was found, and what each row adds to the norm.

        Waits for the device; for a first step, and for a norm over several back ends.
        """
        if not self._active:
            return False, {}
        if self._drawn is None:
            self._draw(inputs)
        asked = Asked(request, request.unscale, 1.0, inputs.numbers)
        tables = self._ready(asked)
        tables.reduce([asked])
        flags, sums = tables.found()
        return flags, dict(zip(self._active, sums, strict=True))

    def apply(self, inputs: Inputs, request: Request, multiplier: float) -> None:
        """After a `check` that found all state: write."""
        if self._active:
            asked = Asked(request, multiplier, 1.0, inputs.numbers)
            tables = self._ready(asked)
            self._begun = True
            tables.apply([asked], tables.prepare([asked]))
            self.bump()
        self.wrote = True
        self._made = frozenset()

    def state_was_made(self) -> None:
        """Tell it that what the last check found absent was made: a first step is known as such."""
        self._made = self._lacking

    # ----- what is read anew --------------------------------------------------------------------

    def _look(self, inputs: Inputs) -> list[Any]:
        """All that the tables were made of, as it is now: equal lists mean equal tables."""
        seen: list[Any] = [list(map(id, group["params"])) for group in inputs.groups]
        try:
            for row in self.rows:
                grad = row.param.grad
                if grad is None:
                    seen.append(None)
                    continue
                rule = self._rules[row.group]
                inner = inputs.state.get(row.param) or {}
                values = [inner[key] for key in self._kept(rule) if key in inner]
                seen.append(
                    (
                        grad.data_ptr(),
                        (
                            row.param.data_ptr(),
                            row.param.stride(),
                            grad.dtype,
                            grad.device,
                            grad.shape,
                            grad.stride(),
                            grad.is_neg(),
                            [(id(value), value.data_ptr()) for value in values],
                        ),
                    )
                )
        except (AttributeError, NotImplementedError, RuntimeError):
            return [object()]  # not plain tensors: the check says which, and why
        return seen

    def _only_gradients_moved(self, seen: list[Any]) -> bool:
        """Whether all is as before but where gradients lie; then the tables know by now.

        Checked again is what an address decides: alignment, and that no gradient lies in what is
        written. 1,000 moved gradients cost 3 ms, a new table of them 80.
        """
        before = self._seen
        if before is None or len(seen) != len(before):
            return False
        alike = all(
            now == then or (now is not None and then is not None and now[1:] == then[1:])
            for now, then in zip(seen, before, strict=True)
        )
        groups = len(seen) - len(self.rows)
        if not alike or seen[:groups] != before[:groups]:
            return False
        addresses = []
        for r in self._active:
            (to, _), (was, _) = seen[groups + r], before[groups + r]
            if (to - was) % 16 or (to == 0) != (was == 0):
                return False
            addresses.append(to)
        assert self._drawn is not None
        gradients = torch.tensor(addresses, dtype=torch.int64, device="cpu")
        if self._drawn.rows.written.meet(gradients, self._drawn.rows.gradient_bytes):
            return False
        self._drawn = self._drawn._replace(gradients=gradients)
        return True

    def _kept(self, rule: GroupRule) -> tuple[str, ...]:
        return (*rule.keys, *((AVERAGE,) if self._averages else ()))

    def _numbers(self, rule: GroupRule) -> tuple[str, ...]:
        return (*(("step",) if rule.counts_steps else ()), *rule.rule.scalars)

    # ----- tables -------------------------------------------------------------------------------

    def _draw(self, inputs: Inputs) -> None:
        """Note what tables are made of."""
        self._note_counts(inputs)
        entries = [self._entry(r, inputs) for r in self._active]
        self._drawn = Drawn.of(Rows(entries, averages=self._averages))
        self._hold(inputs)

    def _note_counts(self, inputs: Inputs) -> None:
        """Find out which rows were stepped alike."""
        self._seed_counters(inputs)
        self._read_counts(inputs)

    def _hold(self, inputs: Inputs) -> None:
        """Keep what the tables were made of, to know it again."""
        self._written, self._held = [], []
        for r in self._active:
            row = self.rows[r]
            inner = inputs.state.get(row.param) or {}
            rule = self._rules[row.group]
            values = [inner[key] for key in self._kept(rule) if inner.get(key) is not None]
            self._held += values  # so that no other tensor gets the identity of one of them
            numbers = self._numbers(rule)
            moved = [inner[key] for key in self._kept(rule) if key not in numbers and key in inner]
            self._written += [t for t in (row.param, *moved) if not t.is_inference()]

    def _entry(self, r: int, inputs: Inputs) -> Entry:
        row = self.rows[r]
        rule = self._rules[row.group]
        inner = inputs.state.get(row.param) or {}
        states = [inner.get(key) for key in rule.rule.state]
        grad = row.param.grad
        assert grad is not None
        step = inner.get("step") if rule.counts_steps else self._counters[r]
        return Entry(
            rule=rule.rule,
            group=row.group,
            addresses=(row.param.data_ptr(), grad.data_ptr(), *map(address, states)),
            average=address(inner.get(AVERAGE)) if self._averages else 0,
            param=row.param.dtype,
            state=next((s.dtype for s in states if s is not None), row.param.dtype),
            size=row.param.numel(),
            counts=self._counts[r],
            step=tagged(step),
            scalars=tuple(tagged(inner.get(name)) for name in rule.rule.scalars),
            identity=row.group << 32 | row.position,
        )

    def _seed_counters(self, inputs: Inputs) -> None:
        """Of rules whose steps torch does not count: a buffer that is there has made one."""
        for r in self._active:
            row = self.rows[r]
            rule = self._rules[row.group]
            if rule.counts_steps:
                continue
            inner = inputs.state.get(row.param) or {}
            buffer = inner.get(next(iter(rule.rule.state), ""))
            if buffer is not None and self._counted.get(r) is not buffer:
                self._counters[r] = 0.0 if r in self._made else 1.0
                self._counted[r] = buffer

    def _read_counts(self, inputs: Inputs) -> None:
        """Which rows have been stepped alike: read once, and kept while they are stepped together.

        Waits for the device, where the set of gradients, a step or a scalar is another one.
        """
        values: list[list[torch.Tensor]] = []
        for r in self._active:
            rule = self._rules[self.rows[r].group]
            inner = inputs.state.get(self.rows[r].param) or {}
            step = inner.get("step") if rule.counts_steps else self._counters[r]
            found = [step, *(inner.get(name) for name in rule.rule.counted)]
            values.append([value for value in found if value is not None])
        of = [
            (r, [v.data_ptr() for v in row], id(self._counted.get(r)))
            for r, row in zip(self._active, values, strict=True)
        ]
        if of == self._counters_of:
            return
        flat = [value.detach().double().reshape(()) for row in values for value in row]
        numbers = iter(torch.stack(flat).tolist() if flat else [])
        self._counts = {
            r: tuple(next(numbers) for _ in row)
            for r, row in zip(self._active, values, strict=True)
        }
        self._counters_of = of

    def _ready(self, asked: Asked) -> Tables:
        from .triton_tables import Tables

        assert self._drawn is not None
        if self._tables is None or not self._tables.are_of([self._drawn]):
            self._tables = Tables([self._drawn], self.device, self.send)
        self._tables.follow([self._drawn], self.send)
        self._tables.ask([asked], self.send)
        return self._tables

    def bump(self) -> None:
        """Let autograd know what was written; state that was made in one go has one version."""
        if self._written:
            increment_version(self._written)
            self._versions = versions(self._held)

    def send(self, host: torch.Tensor) -> torch.Tensor:
        """A copy on the device, in the order of its stream; refused while a graph is captured."""
        self._refuse_while_capturing("a number of a group or of the step is another one")
        if self.device.type == "cpu":
            return host
        return host.pin_memory().to(self.device, non_blocking=True)

    def _refuse_while_capturing(self, why: str) -> None:
        if self._is_cuda and torch.cuda.is_current_stream_capturing():
            refuse_capture(why)
