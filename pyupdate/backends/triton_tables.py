# SPDX-License-Identifier: Apache-2.0
"""The tables of a plan on the device, and the launches of kernels/triton_*.py over them.

Everything that a step reads stands in memory of the device: addresses, sizes and chunks (int64),
made anew where a pointer moved; the request and the groups' numbers (fp64), sent again where one is
another. So a step is launches alone, without waiting for the device, and can be captured.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from ..kernels import triton_forms, triton_layout, triton_passes, triton_reduce
from ..pytorch.request import Request
from .triton_rows import Entry, chunks_of

_OPTIONS: dict[str, Any] = {"num_stages": 1, "enable_fp_fusion": False}
_REQUEST = triton_layout.REQUEST.value
_WIDTH = triton_layout.WIDTH.value


@dataclass
class _OfRule:
    """What all rows of one rule share on the device."""

    form: triton_forms.RuleForm
    groups: list[int] = field(default_factory=list)
    keys: dict[tuple[Any, ...], int] = field(default_factory=dict)
    table: list[int] = field(default_factory=list)
    class_table: Any = None
    classes: Any = None
    numbers: Any = None
    begin: int = 0
    """Where its numbers stand behind the request."""


@dataclass
class _Launch:
    """The rows that one launch takes."""

    of: _OfRule
    param: torch.dtype
    state: torch.dtype
    aligned: bool
    entries: list[int] = field(default_factory=list)
    rows: Any = None
    work: Any = None
    per_tensor: Any = None
    tickets: Any = None
    """A row each: how many of its chunks are done; 0 between launches."""
    chunks: int = 0


def _even(n: int) -> int:
    """Rounded up, so that what stands behind n numbers of 8 bytes is aligned to 16."""
    return n + n % 2


class Tables:
    """Rows cut into chunks and sorted into launches."""

    def __init__(
        self,
        entries: Sequence[Entry],
        device: torch.device,
        averages: bool,
        send: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        self.device = device
        self.averages = averages
        self.total_rows = len(entries)
        self._rules: dict[str, _OfRule] = {}
        launches: dict[tuple[Any, ...], _Launch] = {}
        first_chunks: list[int] = []
        chunk_of: list[int] = []
        rows: list[list[int]] = []
        for e, entry in enumerate(entries):
            of = self._rules.get(entry.rule.name)
            if of is None:
                of = self._rules[entry.rule.name] = _OfRule(triton_forms.form_of(entry.rule))
            key = (entry.rule.name, entry.param, entry.state, entry.is_aligned)
            launch = launches.setdefault(key, _Launch(of, *key[1:]))
            launch.entries.append(e)
            between = (len(chunk_of), _class_of(of, entry))
            rows.append([*entry.columns(), *between, *entry.last_columns()])
            first_chunks.append(len(chunk_of))
            chunks = chunks_of(entry.size)
            chunk_of += [c << 32 | chunks for c in range(chunks)]
        self.total_chunks = len(chunk_of)
        self._launches = list(launches.values())
        self._sent = self._lay_out(rows, entries, first_chunks, chunk_of, send)
        sums = max([1, *(of.form.per_tensor for of in self._rules.values())])
        self._sums = self._doubles(sums * self.total_chunks)
        self._row_sums = self._doubles(self.total_rows)
        self._flags = torch.zeros(max(1, self.total_chunks), device=device)
        self._ticket = self._tickets(1)
        self._begin_numbers()

    # ----- tables -------------------------------------------------------------------------------

    def _lay_out(
        self,
        rows: list[list[int]],
        entries: Sequence[Entry],
        first_chunks: list[int],
        chunk_of: list[int],
        send: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """All int64 tables in one tensor, sent at once; its parts become the attributes."""
        parts: list[list[int]] = [first_chunks, chunk_of]
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
        for launch, (begin, _) in zip(self._launches, places[2::2], strict=False):
            for local, e in enumerate(launch.entries):
                gradient_at[e] = begin + local * _WIDTH + 1
        self._gradient_at = torch.tensor(gradient_at, dtype=torch.int64, device="cpu")
        self._host = torch.tensor(flat or [0, 0], dtype=torch.int64, device="cpu")
        sent = send(self._host)
        views = iter([sent[begin : begin + n] for begin, n in places])
        self._first_chunks, self._chunk_of = next(views), next(views)
        for launch in self._launches:
            launch.rows, launch.work = next(views), next(views)
            launch.per_tensor = self._doubles(len(launch.entries) * launch.of.form.per_tensor)
            launch.tickets = self._tickets(len(launch.entries))
        for of in self._rules.values():
            of.class_table = next(views)
            of.classes = self._doubles(len(of.keys) * of.form.class_width)
        return sent

    def move_gradients(
        self, addresses: torch.Tensor, send: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        """Enter the gradients' new addresses, in the order of the rows."""
        self._host[self._gradient_at] = addresses
        self._sent.copy_(send(self._host))

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
        length = _REQUEST
        for of in self._rules.values():
            of.begin = length
            length += _even(len(of.groups) * (1 + of.form.numbers))
        self._request = self._doubles(length)
        self._asked = b""
        for of in self._rules.values():
            of.numbers = self._request[of.begin :]

    def ask(
        self,
        request: Request,
        unscale: float,
        divisor: float,
        numbers: Sequence[Sequence[float]],
        send: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """Send the request and the groups' numbers (sign first), if one is another."""
        (seed,) = struct.unpack("d", struct.pack("q", request.seed))
        asked = [unscale, divisor, request.max_norm, request.clip_value, request.ema_weight]
        asked += [float(request.skip), float(request.finite_norm), seed]
        for of in self._rules.values():
            asked += [0.0] * (of.begin - len(asked))
            for group in of.groups:
                asked += numbers[group]
        asked += [0.0] * (self._request.numel() - len(asked))
        bits = struct.pack(f"{len(asked)}d", *asked)
        if bits != self._asked:
            self._request.copy_(send(torch.frombuffer(bytearray(bits), dtype=torch.float64)))
            self._asked = bits

    # ----- launches -----------------------------------------------------------------------------

    def reduce(
        self, request: Request, scale: torch.Tensor | None, found: torch.Tensor | None
    ) -> torch.Tensor:
        """Norm, multiplier, skip and hypers; returns the tensor of multiplier, skip and norm."""
        result = self._new_result()
        of_rule = {id(launch.of): launch for launch in self._launches}  # the last one of each
        with self._on_device():
            for launch in self._launches:
                of = launch.of
                prepares = of_rule[id(of)] is launch
                triton_reduce.reduce_pass[(launch.chunks,)](
                    launch.rows,
                    launch.work,
                    self._chunk_of,
                    self._first_chunks,
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
                    len(of.keys),
                    **self._preparing(of if prepares else None),
                    grad=_language_type(launch.param),
                    aligned=launch.aligned,
                    is_inf_norm=request.inf_norm,
                    is_scaled=scale is not None,
                    is_found=found is not None,
                    decides=launch is self._launches[-1],
                    num_warps=8,
                    **_OPTIONS,
                )
        return result

    def prepare(self, scale: torch.Tensor | None, found: torch.Tensor | None) -> torch.Tensor:
        """What `reduce` does in a step that reads no gradient before it applies them."""
        result = self._new_result()
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
                    **self._preparing(of),
                    is_scaled=scale is not None,
                    is_found=found is not None,
                    decides=index == 0,
                    num_warps=1,
                    **_OPTIONS,
                )
        return result

    def _new_result(self) -> torch.Tensor:
        """A step's own, so that what was left of the one before can still be read."""
        return torch.empty(3, dtype=torch.float64, device=self.device)

    @staticmethod
    def _preparing(of: _OfRule | None) -> dict[str, Any]:
        """How a kernel makes a rule's classes; of none, that it does not."""
        return {
            "prepare": None if of is None else of.form.prepare,
            "number_count": 0 if of is None else of.form.numbers,
            "counted": 0 if of is None else of.form.counted,
            "results": () if of is None else of.form.results,
            "class_width": 0 if of is None else of.form.class_width,
        }

    def apply(self, request: Request, result: torch.Tensor) -> None:
        """Every stage of every rule."""
        with self._on_device():
            for launch in self._launches:
                for s in range(len(launch.of.form.stages)):
                    self._apply_stage(launch, s, request, result)

    def _apply_stage(self, launch: _Launch, s: int, request: Request, result: torch.Tensor) -> None:
        form, stage = launch.of.form, launch.of.form.stages[s]
        averages = self.averages and s + 1 == len(form.stages)
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
            param=_language_type(launch.param),
            state=_language_type(launch.state),
            aligned=launch.aligned,
            clips=request.clip_value != float("inf"),
            is_by_chance=request.stochastic,
            averages=averages,
            num_warps=warps,
            **_OPTIONS,
        )

    def found(self) -> tuple[bool, list[float]]:
        """After `reduce`: whether there is an inf or nan, and what each row adds to the norm."""
        rows = self._sums[self._first_chunks] if self.total_rows else self._sums[:0]
        return bool(self._flags.any()), rows.tolist()

    def _on_device(self) -> AbstractContextManager[Any]:
        if self.device.type == "cpu":
            return nullcontext()
        module: Any = torch.get_device_module(self.device.type)
        made: AbstractContextManager[Any] = module.device(self.device)
        return made


def _class_of(of: _OfRule, entry: Entry) -> int:
    """The index of its class among the rule's; a new one is led by this row's numbers."""
    key = (entry.group, *entry.counts)
    if key not in of.keys:
        if entry.group not in of.groups:
            of.groups.append(entry.group)
        of.keys[key] = len(of.keys)
        scalars = [*entry.scalars, 0, 0][:2]
        of.table += [of.groups.index(entry.group), entry.step, *scalars]
    return of.keys[key]


def _language_type(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return {
        torch.float64: tl.float64,
        torch.float32: tl.float32,
        torch.bfloat16: tl.bfloat16,
        torch.float16: tl.float16,
    }[dtype]
