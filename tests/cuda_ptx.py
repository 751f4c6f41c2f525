# SPDX-License-Identifier: Apache-2.0
"""Steps of the shipped CUDA kernels by their PTX, launched as csrc/cuda/launch.cu would.

The tables of csrc/cuda/launch.h are laid out here a second time, by hand, so a launch also holds
the layout to account. Each launch is told what it may touch and what it may write: the reduce pass
sees no parameter, a stage writes the roles that its rule says and no other.
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cuda_cases
import numpy as np
from compiling import ROOT
from cuda_cases import Array, Asked, Group, Parameter, Result
from device.ptx import Module, translate

from pyupdate.kernels import emit_cpp
from pyupdate.kernels.language import Rule

THREADS = 256
CHUNK = 16_384
# Nobody's bytes on both sides of whatever a kernel may touch.
GAP = 64

TABLES = (
    *("rows", "addresses", "scalars", "items", "hyper_rows", "sources", "numbers", "number_at"),
    *(
        "identities",
        "members",
        "hypers",
        "chunk_sums",
        "grad_sums",
        "row_sums",
        "row_tickets",
        "tickets",
    ),
    *("control", "outcome"),
)
"""The pointers of launch.h's Tables, in its order."""


# ----- compiled -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Program:
    """The kernels of one architecture."""

    rules: Mapping[str, Rule]
    apply: Mapping[int, Module]  # by storage
    reduce: Module

    def kernel(self, rule: str, stage: int, storage: int) -> str:
        """The name of an apply kernel."""
        pattern = re.compile(rf"apply_kernel.*rules{len(rule)}{rule}E.*?Li{stage}E")
        (name,) = [name for name in self.apply[storage].kernels if pattern.search(name)]
        return name


def ptx_of(
    source: str, flags: Sequence[str], architecture: int, folder: Path, sources: Path
) -> str:
    """What nvcc makes of a file of csrc/cuda, with the flags of the build."""
    target = folder / f"{source}{''.join(flags)}-{architecture}.ptx"
    nvcc = shutil.which("nvcc")
    assert nvcc is not None
    options = ["-ptx", "-std=c++20", "-O3", "-fmad=false", f"-arch=sm_{architecture}", *flags]
    include = [f"-I{folder}", f"-I{sources}"]
    path = sources / "cuda" / f"{source}.cu"
    subprocess.run([nvcc, *options, *include, path, "-o", target], check=True)
    return target.read_text()


def all_ptx(
    folder: Path,
    rules: Mapping[str, Rule],
    architecture: int,
    storages: Sequence[int],
    sources: Path = ROOT / "csrc",
) -> dict[str, str]:
    """The PTX of the rules' apply kernels, by storage, and that of "reduce"."""
    (folder / "rules_generated.h").write_text(emit_cpp.emit(rules))
    jobs = {str(k): ("apply", [f"-DPYUPDATE_STORAGE={k}"]) for k in storages}
    jobs["reduce"] = ("reduce", [])
    with ThreadPoolExecutor(2) as pool:
        made = pool.map(lambda job: ptx_of(*job, architecture, folder, sources), jobs.values())
        return dict(zip(jobs, made, strict=True))


def build(folder: Path, rules: Mapping[str, Rule], texts: Mapping[str, str]) -> Program:
    """Translate what `all_ptx` made."""
    with ThreadPoolExecutor(2) as pool:
        built = list(pool.map(lambda text: translate(text, folder), texts.values()))
    modules = dict(zip(texts, built, strict=True))
    reduce = modules.pop("reduce")
    return Program(rules, {int(k): module for k, module in modules.items()}, reduce)


# ----- memory -------------------------------------------------------------------------------------


class Memory:
    """One piece of memory, with gaps on both sides that nothing may touch."""

    def __init__(self, data: bytes, shift: int = 0) -> None:
        self.size = len(data)
        self._whole = np.full(self.size + shift + 2 * GAP + 16, 0x5A, np.uint8)
        self._begin = GAP + -(self._whole.ctypes.data + GAP) % 16 + shift
        self.address = self._whole.ctypes.data + self._begin
        self._whole[self._begin : self._begin + self.size] = np.frombuffer(data, np.uint8)

    def range(self, writable: bool) -> tuple[int, int, bool]:
        return self.address, self.size, writable

    def bytes(self) -> bytes:
        return self._whole[self._begin : self._begin + self.size].tobytes()

    def array(self, like: Array) -> Array:
        return np.frombuffer(self.bytes(), like.dtype).reshape(like.shape)


def _chunks(size: int) -> int:
    return max(1, -(-size // CHUNK))


@dataclass
class Row:
    """The memory of one row: of a gradient, that of this step."""

    roles: dict[str, Memory]
    step: Memory | None
    scalars: list[Memory]
    grad: Memory


class Steps:
    """The tables of one plan, and the launches over them."""

    def __init__(
        self, program: Program, groups: Sequence[Group], rows: Sequence[Parameter], asked: Asked
    ) -> None:
        self.program, self.groups, self.asked = program, groups, asked
        rules = [group.rule for group in groups]
        self.averages = rows[0].average is not None
        width = 2 + max(len(rule.state) for rule in rules) + self.averages
        per_tensor = max(len(rule.per_tensor) for rule in rules)
        scalars_width = max(len(rule.scalars) for rule in rules)
        self.rows = [self._row(row) for row in rows]
        self.of_row = [row.group for row in rows]
        hypers, sources, numbers, number_at, offset = [], [], [], [], 0
        self.in_tensors: list[Memory] = []
        names = list(program.rules)
        for index, group in enumerate(groups):
            first = self.of_row.index(index)
            sources += [first, len(numbers)]
            head = (names.index(group.rule.name), group.storage, offset, group.count)
            hypers.append(struct.pack("<4qdq", *head, group.sign, group.member))
            offset += len(group.rule.hypers) + len(group.rule.counted)
            for k, number in enumerate(group.numbers):
                self.in_tensors.append(Memory(struct.pack("<d", number)))
                inside = k == group.in_tensor
                numbers.append(-1.0 if inside else number)
                number_at.append(self.in_tensors[-1].address + 1 if inside else 0)
        packed, scalars, chunk = [], [], 0
        self.items: dict[tuple[str, int], list[int]] = {}
        for r, (row, own) in enumerate(zip(rows, self.rows, strict=True)):
            at = 0 if own.step is None else own.step.address + (row.step_bytes == 8)
            packed.append(struct.pack("<3q2i", row.param.size, chunk, at, row.group, -1))
            chunk += _chunks(row.param.size)
            of_row = [memory.address for memory in own.scalars]
            scalars += of_row + [0] * (scalars_width - len(of_row))
            key = (groups[row.group].rule.name, groups[row.group].storage)
            self.items.setdefault(key, []).extend(
                r << 32 | index for index in range(_chunks(row.param.size))
            )
        items = [item for own in self.items.values() for item in own]

        def words(values: Sequence[int]) -> bytes:
            return struct.pack(f"<{len(values)}q", *values)

        zeros = {
            "hypers": 8 * offset,
            "chunk_sums": 8 * chunk * max(1, per_tensor),
            "grad_sums": 8 * len(rows),
            "row_sums": 8 * len(rows) * per_tensor,
            "row_tickets": 4 * len(rows),
            "tickets": 4 * (2 + len(asked.others)),
            "control": 40 * (1 + len(asked.others)),
            "outcome": 24 * (1 + len(asked.others)),
        }
        # NaN, so that what is read before it was written is seen; only tickets are promised zero.
        self.tables = {
            name: Memory(bytes([0 if "tickets" in name else 0xFF]) * size)
            for name, size in zeros.items()
        }
        self.tables |= {
            "rows": Memory(b"".join(packed)),
            "addresses": Memory(bytes(8 * width * len(rows))),
            "scalars": Memory(words(scalars)),
            "items": Memory(words(items)),
            "hyper_rows": Memory(b"".join(hypers)),
            "sources": Memory(words(sources)),
            "numbers": Memory(struct.pack(f"<{len(numbers)}d", *numbers)),
            "number_at": Memory(words(number_at)),
            "identities": Memory(words([row.identity for row in rows])),
        }
        self.width, self.item_count, self.words = width, len(items), words
        self.counts = (len(rows), width, scalars_width, len(groups), chunk, per_tensor)
        self.members = 1 + len(asked.others)
        self.of_scalers: list[Memory] = []
        if asked.others:
            ends = cuda_cases.rows_end(groups, rows, asked)
            packed = [
                self._request(one, False) + struct.pack("<q", end)
                for one, end in zip((asked, *asked.others), ends, strict=True)
            ]
            self.tables["members"] = Memory(b"".join(packed))

    def _row(self, row: Parameter) -> Row:
        group = self.groups[row.group]

        def memory(array: Array) -> Memory:
            return Memory(array.tobytes(), row.shift * array.itemsize)

        roles = {"param": memory(row.param)}
        roles |= {name: memory(row.state[name]) for name in group.rule.state}
        if row.average is not None:
            roles["average"] = memory(row.average)
        counts = {4: "<f", 8: "<d"}
        step = Memory(struct.pack(counts[row.step_bytes], group.count)) if row.step_bytes else None
        scalars = [Memory(np.float32(row.state[name]).tobytes()) for name in group.rule.scalars]
        return Row(roles, step, scalars, memory(row.grads[0]))

    def set_gradients(self, rows: Sequence[Parameter], step: int) -> None:
        """New memory for the gradients, and the table of addresses."""
        table = []
        for row, own in zip(rows, self.rows, strict=True):
            own.grad = Memory(row.grads[step].tobytes(), row.shift * row.grads[step].itemsize)
            states = [own.roles[name].address for name in self.groups[row.group].rule.state]
            addresses = [own.roles["param"].address, own.grad.address, *states]
            addresses += [0] * (self.width - len(addresses))
            if self.averages:
                addresses[-1] = own.roles["average"].address
            table += addresses
        self.tables["addresses"] = Memory(self.words(table))

    # ----- launches

    def _pack_tables(self) -> bytes:
        pointers = [self.tables[name].address if name in self.tables else 0 for name in TABLES]
        if self.asked.seed is None:
            pointers[TABLES.index("identities")] = 0
        return struct.pack("<18Q8q", *pointers, *self.counts, self.averages, self.members)

    def _request(self, asked: Asked, leave_open: bool) -> bytes:
        def place(number: float) -> int:
            if not number:
                return 0
            self.of_scalers.append(Memory(struct.pack("<f", number)))
            return self.of_scalers[-1].address

        flags = (asked.reduce, asked.skip_nonfinite, asked.finite_norm, asked.inf_norm)
        pointers = (place(asked.scale), place(asked.found_inf))
        numbers = (asked.max_norm, asked.clip_value, asked.ema_weight, 1.0)
        head = struct.pack("<6i", *flags, asked.seed is not None, leave_open)
        return head + struct.pack("<qd2Q4d", asked.seed or 0, asked.unscale, *pointers, *numbers)

    def _asked_of_all(self) -> Asked:
        """What a launch is given: of several members, whether one of them reduces."""
        asked = self.asked
        if not asked.others:
            return asked
        return Asked(reduce=any(one.reduce for one in (asked, *asked.others)))

    def _writable(self, *written: str) -> Iterator[tuple[int, int, bool]]:
        for name, memory in self.tables.items():
            yield memory.range(name in written)

    def _launch(
        self, module: Module, kernel: str, grid: int, work: bytes, memory: Any, order: int
    ) -> None:
        faults = module.launch(kernel, grid, THREADS, [work], memory=memory, order_seed=order)
        assert not faults, f"{kernel}: {len(faults)} faults, first {faults[0]}"

    def reduce(
        self, blocks: int, order: int, leave_open: bool = False, alone: bool = False
    ) -> None:
        """The reduce pass; alone: its tail, over a copy of the rows' parts of the norm."""
        written = ("hyper_rows", "hypers", "chunk_sums", "grad_sums", "row_tickets", "tickets")
        memory = list(self._writable(*written, "control", "outcome"))
        memory += [row.grad.range(False) for row in self.rows]
        memory += [row.step.range(False) for row in self.rows if row.step is not None]
        memory += [scalar.range(False) for row in self.rows for scalar in row.scalars]
        request = self._request(self._asked_of_all(), leave_open)
        memory += [number.range(False) for number in [*self.in_tensors, *self.of_scalers]]
        sums = self.tables["grad_sums"]
        if alone:
            sums = Memory(sums.bytes())
            memory.append(sums.range(True))
        items = self.item_count if self._asked_of_all().reduce and not alone else 0
        tail = (items, sums.address, len(self.rows), self.tables["tickets"].address + 4)
        work = self._pack_tables() + request + struct.pack("<qQqQ", *tail)
        (kernel,) = self.program.reduce.kernels
        self._launch(self.program.reduce, kernel, max(1, min(items, blocks)), work, memory, order)

    def apply(self, blocks: int, order: int) -> None:
        """Every stage of every bucket."""
        begin = 0
        for (name, storage), items in self.items.items():
            end = begin + len(items)
            rule = self.program.rules[name]
            for index, stage in enumerate(rule.stages):
                last = index + 1 == len(rule.stages)
                ends = bool(stage.sums or stage.turn)
                written = ("chunk_sums", "row_sums", "row_tickets") if ends else ()
                memory = list(self._writable(*written))
                for row, group in zip(self.rows, self.of_row, strict=True):
                    own = self.groups[group]
                    if (own.rule.name, own.storage) != (name, storage):
                        continue
                    memory.append(row.grad.range(False))
                    for role, held in row.roles.items():
                        average = role == "average" and last
                        memory.append(held.range(average or role in stage.writes))
                    if row.step is not None:
                        memory.append(row.step.range(index == 0))
                    memory += [scalar.range(True) for scalar in row.scalars]
                work = struct.pack("<qq?7x", begin, end, self._asked_of_all().reduce)
                self._launch(
                    self.program.apply[storage],
                    self.program.kernel(name, index, storage),
                    min(len(items), blocks),
                    self._pack_tables() + work,
                    memory,
                    order,
                )
            begin = end


def run_steps(
    program: Program,
    groups: Sequence[Group],
    rows: Sequence[Parameter],
    asked: Asked,
    *,
    order: int = 0,
    blocks: int = 3,
) -> Result:
    """The steps by the kernels' PTX; `cuda_cases.expected` says what must come out."""
    steps = Steps(program, groups, rows, asked)
    result = Result([])
    for step in range(len(rows[0].grads)):
        steps.set_gradients(rows, step)
        steps.reduce(blocks, order, leave_open=asked.apart)
        if asked.apart:
            steps.reduce(1, order, leave_open=False, alone=True)
        steps.apply(blocks, order)
        for outcome in struct.iter_unpack("<2d2f", steps.tables["outcome"].bytes()):
            norm, multiplier, found, skipped = outcome
            result.outcomes.append((norm, multiplier, bool(found), bool(skipped)))
        tickets = steps.tables["tickets"].bytes() + steps.tables["row_tickets"].bytes()
        assert not any(tickets), "a ticket was left"
    for row, own in zip(rows, steps.rows, strict=True):
        rule = groups[row.group].rule
        arrays = {"param": own.roles["param"].array(row.param)}
        arrays |= {name: own.roles[name].array(row.state[name]) for name in rule.state}
        if row.average is not None:
            arrays["average"] = own.roles["average"].array(row.average)
        if own.step is not None:
            kind = np.float64 if row.step_bytes == 8 else np.float32
            arrays["step"] = own.step.array(np.zeros((), kind))
        for name, scalar in zip(rule.scalars, own.scalars, strict=True):
            arrays[name] = scalar.array(np.zeros((), np.float32))
        result.arrays.append(arrays)
    hyper_rows = np.frombuffer(steps.tables["hyper_rows"].bytes(), np.int64).reshape(-1, 6)
    result.counts = [int(count) for count in hyper_rows[:, 3]]
    return result
