# SPDX-License-Identifier: Apache-2.0
"""The tables of plans on the device, and the launches of kernels/triton_*.py over them.

They are of one plan or of several that are stepped as one, their members. Everything that a step
reads stands in memory of the device: addresses, sizes and chunks (int64), made anew where a pointer
moved; the requests and the groups' numbers (fp64), sent again where one is another. So a step is
launches alone, without waiting for the device, and can be captured.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from operator import is_
from typing import Any

import torch

from ..kernels import triton_layout, triton_passes, triton_reduce
from ..kernels.triton_forms import form_of
from .triton_launch import Launch, OfRule, class_of, language_type
from .triton_rows import Drawn, Entry, chunks_of
from .triton_step import Asked

_OPTIONS: dict[str, Any] = {"num_stages": 1, "enable_fp_fusion": False}
_REQUEST = triton_layout.REQUEST.value
_RESULT = triton_layout.RESULT.value
_WIDTH = triton_layout.WIDTH.value


def _even(n: int) -> int:
    """Rounded up, so that what stands behind n numbers of 8 bytes is aligned to 16."""
    return n + n % 2


class Tables:
    """Rows cut into chunks and sorted into launches."""

    def __init__(
        self,
        drawn: Sequence[Drawn],
        device: torch.device,
        send: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """Of one plan, or of several that are stepped as one."""
        self.device = device
        self._drawn = list(drawn)
        self._rules: dict[tuple[str, str], OfRule] = {}
        launches: dict[tuple[Any, ...], Launch] = {}
        entries: list[Entry] = []
        self._first_row: list[int] = [0]
        rows: list[list[int]] = []
        first_chunks: list[int] = []
        chunk_of: list[int] = []
        row_of: list[int] = []
        for m, (own, _) in enumerate(drawn):
            for r, entry in enumerate(own.entries):
                rule = (entry.rule.name, entry.rule.digest)
                of = self._rules.get(rule)
                if of is None:
                    of = self._rules[rule] = OfRule(form_of(entry.rule))
                kind = (entry.param, entry.state, entry.is_aligned, own.averages)
                launch = launches.setdefault((rule, *kind), Launch(of, *kind))
                launch.entries.append(len(entries))
                between = (len(chunk_of), class_of(of, m, entry), m)
                rows.append([*entry.columns(), *between, *entry.last_columns()])
                first_chunks.append(len(chunk_of))
                chunks = chunks_of(entry.size)
                chunk_of += [c << 32 | chunks for c in range(chunks)]
                row_of.append(r << 32 | len(own.entries))
                entries.append(entry)
            self._first_row.append(len(entries))
        self.total_rows, self.total_chunks = len(entries), len(chunk_of)
        first_chunks.append(self.total_chunks)
        self._launches = list(launches.values())
        shared = [first_chunks, chunk_of, self._first_row, row_of]
        self._sent = self._lay_out(rows, entries, shared, send)
        sums = max([1, *(of.form.per_tensor for of in self._rules.values())])
        self._sums = self._doubles(sums * self.total_chunks)
        self._row_sums = self._doubles(self.total_rows)
        self._flags = torch.zeros(max(1, self.total_chunks), device=device)
        self._ticket = self._tickets(1)
        self._absent = torch.arange(2.0, device=device).unbind()
        self._begin_numbers()

    # ----- tables -------------------------------------------------------------------------------

    def _lay_out(
        self,
        rows: list[list[int]],
        entries: Sequence[Entry],
        shared: Sequence[list[int]],
        send: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """All int64 tables in one tensor, sent at once; its parts become the attributes."""
        parts = list(shared)
        for launch in self._launches:
            parts.append([number for e in launch.entries for number in rows[e]])
            work = [
                local << 32 | chunk
                for local, e in enumerate(launch.entries)
                for chunk in range(chunks_of(entries[e].size))
            ]
            launch.chunks = len(work)
            parts.append(work)
        parts += [of.table for of in self._rules.values()]
        flat: list[int] = []
        places = []
        for part in parts:
            places.append((len(flat), len(part)))
            flat += part + [0] * (_even(len(part)) - len(part))
        gradient_at = [0] * len(entries)
        for launch, (begin, _) in zip(self._launches, places[len(shared) :: 2], strict=False):
            for local, e in enumerate(launch.entries):
                gradient_at[e] = begin + local * _WIDTH + 1
        self._gradient_at = torch.tensor(gradient_at, dtype=torch.int64, device="cpu")
        self._host = torch.tensor(flat or [0, 0], dtype=torch.int64, device="cpu")
        self._host[self._gradient_at] = torch.cat([own.gradients for own in self._drawn])
        sent = send(self._host)
        views = iter([sent[begin : begin + n] for begin, n in places])
        self._first_chunks, self._chunk_of = next(views), next(views)
        self._first_rows, self._row_of = next(views), next(views)
        for launch in self._launches:
            launch.rows, launch.work = next(views), next(views)
            launch.per_tensor = self._doubles(len(launch.entries) * launch.of.form.per_tensor)
            launch.tickets = self._tickets(len(launch.entries))
        for of in self._rules.values():
            of.class_table = next(views)
            of.classes = self._doubles(len(of.keys) * of.form.class_width)
        return sent

    def are_of(self, drawn: Sequence[Drawn]) -> bool:
        """Whether they were made of these; where the gradients lie by now is another matter."""
        return [each.rows for each in self._drawn] == [each.rows for each in drawn]

    def follow(self, drawn: Sequence[Drawn], send: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Take in where the gradients of what they `are_of` have moved."""
        moved = [m for m, own in enumerate(drawn) if own is not self._drawn[m]]
        if not moved:
            return
        for m in moved:
            at = self._gradient_at[self._first_row[m] : self._first_row[m + 1]]
            self._host[at] = drawn[m].gradients
        self._sent.copy_(send(self._host))
        self._drawn = list(drawn)

    def have_seen(self, drawn: Sequence[Drawn]) -> bool:
        """Whether they stand as these say, gradients included."""
        return len(drawn) == len(self._drawn) and all(map(is_, drawn, self._drawn))

    def _doubles(self, n: int) -> torch.Tensor:
        return torch.zeros(max(2, n), dtype=torch.float64, device=self.device)

    def _tickets(self, n: int) -> torch.Tensor:
        return torch.zeros(max(4, n), dtype=torch.int32, device=self.device)

    @property
    def nbytes(self) -> int:
        """Memory of the tables."""
        tensors = [self._sent, self._sums, self._row_sums, self._flags, self._request]
        tensors += [launch.per_tensor for launch in self._launches]
        tensors += [self._ticket, *(launch.tickets for launch in self._launches)]
        tensors += [of.classes for of in self._rules.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    # ----- what is asked for --------------------------------------------------------------------

    def _begin_numbers(self) -> None:
        length = _even(len(self._drawn) * _REQUEST)
        for of in self._rules.values():
            of.begin = length
            length += _even(len(of.groups) * (1 + of.form.numbers))
        self._request = self._doubles(length)
        self._asked = b""
        for of in self._rules.values():
            of.numbers = self._request[of.begin :]

    def ask(self, asked: Sequence[Asked], send: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Send each member's request and its groups' numbers (sign first), if one is another."""
        told: list[float] = []
        for one in asked:
            told += one.told
        for of in self._rules.values():
            told += [0.0] * (of.begin - len(told))
            for member, group in of.groups:
                told += asked[member].numbers[group]
        told += [0.0] * (self._request.numel() - len(told))
        bits = struct.pack(f"{len(told)}d", *told)
        if bits != self._asked:
            self._request.copy_(send(torch.frombuffer(bytearray(bits), dtype=torch.float64)))
            self._asked = bits

    # ----- launches -----------------------------------------------------------------------------

    def step(self, asked: Sequence[Asked]) -> list[torch.Tensor]:
        """All launches; of each member its multiplier, skip and norm."""
        reduces = any(one.request.reduce for one in asked)
        results = self.reduce(asked) if reduces else self.prepare(asked)
        self.apply(asked, results)
        return [results] if len(asked) == 1 else list(results.view(-1, _RESULT).unbind())

    def reduce(self, asked: Sequence[Asked]) -> torch.Tensor:
        """Norm, multiplier, skip and hypers; returns multipliers, skips and norms, interleaved."""
        result = self._new_result()
        scale, found = self._scales_and_flags(asked)
        norms = sorted({one.request.inf_norm for one in asked if one.request.reduce})
        passes = [(launch, inf_norm) for inf_norm in norms for launch in self._launches]
        prepares = {id(launch.of): i for i, (launch, _) in enumerate(passes)}  # with the last one
        with self._on_device():
            for i, (launch, inf_norm) in enumerate(passes):
                of = launch.of
                triton_reduce.reduce_pass[(launch.chunks,)](
                    launch.rows,
                    launch.work,
                    self._chunk_of,
                    self._row_of,
                    self._first_chunks,
                    self._first_rows,
                    self._request,
                    self._row_sums if scale is None else scale,
                    self._row_sums if found is None else found,
                    self._sums,
                    self._flags,
                    self._row_sums,
                    self._ticket,
                    result,
                    of.class_table,
                    of.numbers,
                    of.classes,
                    self.total_chunks,
                    self.total_rows,
                    len(self._drawn),
                    len(of.keys),
                    **self._preparing(of if prepares[id(of)] == i else None),
                    grad=language_type(launch.param),
                    aligned=launch.aligned,
                    is_inf_norm=inf_norm,
                    is_scaled=scale is not None,
                    is_found=found is not None,
                    decides=launch is self._launches[-1],
                    num_warps=8,
                    **_OPTIONS,
                )
        return result

    def prepare(self, asked: Sequence[Asked]) -> torch.Tensor:
        """What `reduce` does in a step that reads no gradient before it applies them."""
        result = self._new_result()
        scale, found = self._scales_and_flags(asked)
        with self._on_device():
            for index, of in enumerate(self._rules.values()):
                triton_reduce.prepare_pass[(max(1, len(of.keys)),)](
                    self._request,
                    self._row_sums if scale is None else scale,
                    self._row_sums if found is None else found,
                    result,
                    of.class_table,
                    of.numbers,
                    of.classes,
                    len(self._drawn),
                    **self._preparing(of),
                    is_scaled=scale is not None,
                    is_found=found is not None,
                    decides=index == 0,
                    num_warps=1,
                    **_OPTIONS,
                )
        return result

    def _scales_and_flags(
        self, asked: Sequence[Asked]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """A number each for every member, on the device; None where nobody has one."""
        no_flag, no_scale = self._absent
        scales, flags = [one.scale for one in asked], [one.found for one in asked]
        return _one_behind_the_other(scales, no_scale), _one_behind_the_other(flags, no_flag)

    def _new_result(self) -> torch.Tensor:
        """A step's own, so that what was left of the one before can still be read."""
        size = len(self._drawn) * _RESULT
        return torch.empty(size, dtype=torch.float64, device=self.device)

    @staticmethod
    def _preparing(of: OfRule | None) -> dict[str, Any]:
        """How a kernel makes a rule's classes; of none, that it does not."""
        return {
            "prepare": None if of is None else of.form.prepare,
            "number_count": 0 if of is None else of.form.numbers,
            "counted": 0 if of is None else of.form.counted,
            "results": () if of is None else of.form.results,
            "class_width": 0 if of is None else of.form.class_width,
        }

    def apply(self, asked: Sequence[Asked], result: torch.Tensor) -> None:
        """Every stage of every rule."""
        clips = any(one.request.clip_value != float("inf") for one in asked)
        by_chance = asked[0].request.stochastic  # as all others'
        with self._on_device():
            for launch in self._launches:
                for s in range(len(launch.of.form.stages)):
                    self._apply_stage(launch, s, result, clips=clips, by_chance=by_chance)

    def _apply_stage(
        self, launch: Launch, s: int, result: torch.Tensor, *, clips: bool, by_chance: bool
    ) -> None:
        form, stage = launch.of.form, launch.of.form.stages[s]
        averages = launch.averages and s + 1 == len(form.stages)
        kinds = [launch.param if role < 2 else launch.state for role in stage.roles]
        sizes = [kind.itemsize for kind in kinds] or [launch.param.itemsize]
        if averages:
            sizes += [launch.param.itemsize, max(4, launch.param.itemsize)]
        block, warps = triton_passes.block_of(tuple(sizes), bool(stage.sums))
        triton_passes.apply_pass[(launch.chunks,)](
            launch.rows,
            launch.work,
            launch.of.classes,
            self._request,
            result,
            self._sums,
            launch.per_tensor,
            launch.tickets,
            self.total_chunks,
            text=stage.wide_text if launch.param is torch.float64 else stage.text,
            takes=stage.takes,
            gives=stage.gives,
            sum_indices=stage.sums,
            turn_text=stage.turn,
            turn_takes=stage.turn_takes,
            turn_gives=stage.turn_gives,
            ends=bool(stage.sums) or stage.turn is not None,
            counted=form.counted,
            class_width=form.class_width,
            per_tensor_width=form.per_tensor,
            stage=s,
            block=block,
            param=language_type(launch.param),
            state=language_type(launch.state),
            aligned=launch.aligned,
            clips=clips,
            is_by_chance=by_chance,
            averages=averages,
            is_joint=len(self._drawn) > 1,
            num_warps=warps,
            **_OPTIONS,
        )

    def found(self) -> tuple[bool, list[float]]:
        """After `reduce`: whether there is an inf or nan, and what each row adds to the norm."""
        rows = self._sums[self._first_chunks[: self.total_rows]]
        return bool(self._flags.any()), rows.tolist()

    def _on_device(self) -> AbstractContextManager[Any]:
        if self.device.type == "cpu":
            return nullcontext()
        module: Any = torch.get_device_module(self.device.type)
        made: AbstractContextManager[Any] = module.device(self.device)
        return made


def _one_behind_the_other(
    numbers: Sequence[torch.Tensor | None], absent: torch.Tensor
) -> torch.Tensor | None:
    """A member's number each, `absent` where it has none; None where no member has one."""
    if all(number is None for number in numbers):
        return None
    if len(numbers) == 1:
        return numbers[0]
    return torch.stack([absent if n is None else n.reshape(()) for n in numbers])
