# SPDX-License-Identifier: Apache-2.0
"""A plan: what is known of an optimizer's parameters before a step, and the order of a step.

It holds rows, never a pointer. A part per back end re-reads every tensor at every step; the plan is
made anew when a part says that it is stale, or when a group's rule is another one (amsgrad on).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any, Protocol

import torch

from ..backends import REFERENCE, Backend, backend_for, choice, reference
from ..backends import cuda as cuda_backend
from ..backends.cuda_devices import Devices
from ..kernels.reduction import halving_tree, largest
from ..kernels.rules import multiplier as multiplier_rule
from ..options import LastUpdate, Options
from . import sharded
from .joining import Joining
from .new_state import make_state
from .request import Request, Scaling, request_of
from .rows import GroupRule, Inputs, Row, entry_of


class Part(Protocol):
    """The rows that one back end steps."""

    rows: Sequence[Row]
    reads_scaling: bool
    """Whether `step` takes a scaling as it is, to have it read on the device."""

    @property
    def nbytes(self) -> int:
        """Memory of its tables."""

    @property
    def wrote(self) -> bool:
        """Whether this step's `apply` has written all of its rows."""

    @property
    def unwritten(self) -> Sequence[Row]:
        """Where a step raised: the rows that it is known to have left as they were."""

    @property
    def made(self) -> LastUpdate | None:
        """What `step` did, once it was made: known also where an interrupt came behind it."""

    def begin(self) -> None:
        """Forget what the last step has done."""

    def step(self, inputs: Inputs, request: Request, scaling: Scaling) -> LastUpdate | None:
        """The whole step at once; None, and nothing done, where it must be made in parts."""

    def check(self, inputs: Inputs) -> list[int]:
        """Refuse what is not right; the rows that have a gradient and no state yet."""

    def state_was_made(self) -> None:
        """Tell it that what the last check found absent is made now, in its first step."""

    def reduce(self, inputs: Inputs, request: Request) -> tuple[bool, dict[int, float]]:
        """Whether an inf or nan was found, and what each row adds to the norm."""

    def apply(self, inputs: Inputs, request: Request, multiplier: float) -> None:
        """Write."""


class Plan:
    """The rows of one optimizer, or of a subset of its parameters, parted by back end."""

    def __init__(
        self,
        rows: Sequence[Row],
        rules: Sequence[GroupRule],
        *,
        averages: bool = False,
        left_out: Sequence[torch.Tensor] = (),
    ) -> None:
        self.rows = rows
        self.left_out = left_out
        """What has no gradient and could not be stepped if it had one; not once it has."""
        self.rules = rules
        self.averages = averages
        self.choice = choice()
        self._shard = sharded.shard_among(rows, rules)
        self.lacked_state = True
        """Whether a step that was not made may have found state absent."""
        parts: dict[tuple[Backend, Hashable], list[Row]] = {}
        for row in rows:
            parts.setdefault(self._home(row), []).append(row)
        self.parts: list[Part] = []
        self._names: list[str] = []
        for (backend, home), members in parts.items():
            self.parts.append(backend.load().part(members, rules, home, averages))
            self._names.append(backend.name)
        self._order = {id(row.param): r for r, row in enumerate(rows)}
        self._made: LastUpdate | None = None
        self._devices: Devices | None = None
        of_cuda = [part for part in self.parts if isinstance(part, cuda_backend.Part)]
        if len(self.parts) > 1 and len(of_cuda) == len(self.parts):
            self._devices = Devices(of_cuda, self._order)

    def _home(self, row: Row) -> tuple[Backend, Hashable]:
        """The back end that steps a row, and what its rows have in common there."""
        backend = backend_for(row.param.device.type)
        home = backend.load().home(row, self.rules[row.group].rule, self.choice)
        return (REFERENCE, ()) if home is None else (backend, home)

    @property
    def backends(self) -> tuple[str, ...]:
        """The names of the back ends that step it."""
        return tuple(sorted(set(self._names)))

    def fits(self, rules: Sequence[GroupRule], inputs: Inputs) -> bool:
        """Whether it is still what would be made; its parts see by themselves what they step."""
        return (
            # Without parts it cannot tell whether the groups list other parameters by now.
            bool(self.parts)
            and self.rules == rules
            and self.choice == choice()
            and self.averages == inputs.averages
            and all(param.grad is None for param in self.left_out)
        )

    def begin(self) -> None:
        """Before a step: forget what the last one has done."""
        self._made = None
        for part in self.parts:
            part.begin()

    @property
    def made(self) -> LastUpdate | None:
        """What `step` did, once it was made: known also where an interrupt came behind it."""
        whole = self.parts[0] if len(self.parts) == 1 else None
        return self._made if whole is None or self._made is not None else whole.made

    def step(self, inputs: Inputs, options: Options, scaling: Scaling) -> LastUpdate:
        """Check everything, then reduce, then write; `begin` goes before.

        Raises:
            TypeError, ValueError: something is refused; nothing was written.
            RuntimeError: `Options.error_if_nonfinite`; nothing was written.
            Stale: the plan no longer fits.
        """
        if self._shard is not None:
            sharded.check_options(self._shard, options, scaled=scaling.check)
        whole = self.parts[0] if len(self.parts) == 1 else None
        if whole is not None and whole.reads_scaling:
            done = whole.step(inputs, request_of(options, scaling), scaling)
            if done is not None:
                self.lacked_state = False
                if options.error_if_nonfinite:  # who asks for an error waits for the device
                    request_of(options, scaling).check_norm(done.norm, options)
                return done
        if self._devices is not None:
            done = self._devices.step(inputs, request_of(options, scaling), scaling)
            if done is not None:
                self.lacked_state = False
                if options.error_if_nonfinite:
                    request_of(options, scaling).check_norm(done.norm, options)
                return done
        scaling = scaling.read()
        if scaling.found:
            self._check_parts(inputs)
            return LastUpdate(None, skipped=True, multiplier=scaling.unscale)
        request = request_of(options, scaling)
        if whole is not None and not whole.reads_scaling:
            done = whole.step(inputs, request, scaling)
            if done is not None:
                self.lacked_state = False
                request.check_norm(done.norm, options)
                return done
        return self._step_in_parts(inputs, options, request)

    def joining(self, inputs: Inputs, options: Options, scaling: Scaling) -> Joining | None:
        """What a step of several plans needs of this one; None if it must be stepped alone."""
        if len(self.parts) != 1 or self._shard is not None:
            return None
        (part,) = self.parts
        if not hasattr(part, "step_together"):
            return None
        if not part.reads_scaling:
            scaling = scaling.read()
        if scaling.found:
            return None
        return Joining(part, inputs, request_of(options, scaling), scaling)

    def _step_in_parts(self, inputs: Inputs, options: Options, request: Request) -> LastUpdate:
        fresh = self._check_parts(inputs)
        norm = None
        multiplier = request.unscale
        if request.reduce:
            sums: dict[int, float] = {}
            nonfinite = False
            for part in self.parts:
                found, of_rows = part.reduce(inputs, request)
                nonfinite = nonfinite or found
                sums |= {self._order[id(part.rows[r].param)]: s for r, s in of_rows.items()}
            in_order = [sums[r] for r in sorted(sums)]
            if request.inf_norm:
                norm = largest(in_order)
            else:
                total = halving_tree(in_order)
                norm = math.sqrt(total) if total >= 0.0 else math.nan
            request.check_norm(norm, options)
            multiplier = multiplier_rule(norm, request.unscale, request.max_norm)
            if nonfinite and request.skip:
                return LastUpdate(norm, skipped=True, multiplier=multiplier)
        last = LastUpdate(norm, skipped=False, multiplier=multiplier)
        made: list[tuple[Any, str]] = []
        try:
            self._make_states(fresh, inputs, made)
            for part in self.parts:  # their new state is checked like any other
                part.check(inputs)
            # What a part that takes memory for it cannot do is found out first.
            for part in sorted(self.parts, key=lambda part: not isinstance(part, reference.Part)):
                part.apply(inputs, request, multiplier)
            self._made = last
        except BaseException:  # rows that were written keep what was made for them
            if all(part.wrote for part in self.parts):
                self._made = last
            left = {id(row.param) for part in self.parts for row in part.unwritten}
            self._drop_states([one for one in made if id(one[0]) in left], inputs)
            raise
        self.lacked_state = False
        return last

    def _check_parts(self, inputs: Inputs) -> list[list[int]]:
        """What each part's check says."""
        self.lacked_state = True  # until all of them have said otherwise
        fresh = [part.check(inputs) for part in self.parts]
        self.lacked_state = any(fresh)
        for part, rows in zip(self.parts, fresh, strict=True):
            for r in rows:  # a compiled plan takes an entry that is no dict for none
                entry_of(part.rows[r], inputs)
        return fresh

    def _make_states(
        self, fresh: Sequence[Sequence[int]], inputs: Inputs, made: list[tuple[Any, str]]
    ) -> None:
        lacking: list[Row] = []
        for part, rows in zip(self.parts, fresh, strict=True):
            part.state_was_made()
            lacking += [part.rows[r] for r in rows]
        make_state(lacking, self.rules, inputs, made)

    def _drop_states(self, made: Sequence[tuple[Any, str]], inputs: Inputs) -> None:
        for param, key in made:
            inputs.state[param].pop(key, None)
