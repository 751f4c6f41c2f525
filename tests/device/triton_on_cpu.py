# SPDX-License-Identifier: Apache-2.0
"""Triton kernels on CPU tensors, through their real PTX, every access checked.

    with on_cpu(90) as machine:
        machine.memory = lambda: [(tensor, is_written), ...]
        kernel[grid](cpu_tensor, 5)

Triton does all it does for a GPU of that capability: it specialises on the arguments, compiles,
assembles the PTX and calls its driver. Only the driver is this file's: it has the PTX run by
`device.ptx`. A kernel may touch its arguments' tensors, and what `memory` lists: where it finds
addresses in a table, nobody else can know what they are of. Any fault raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.cache import get_cache_manager

from . import ptx

Reach = Callable[[], Iterable[tuple[torch.Tensor, bool]]]


@dataclass
class Launched:
    """One launch: the kernel's name, its programs and its PTX."""

    name: str
    programs: int
    text: str


@dataclass
class Machine:
    """What stands in for the GPU."""

    capability: int
    memory: Reach = tuple
    written: frozenset[str] = frozenset()
    """Names of kernel parameters whose tensors may be written; without any, all may."""
    order_seed: int = 0
    runs: bool = True
    """False for who measures what the host does until a launch: kernels are compiled alone."""
    launches: list[Launched] = field(default_factory=list)


_translated: dict[str, ptx.Module] = {}


class _Launcher:
    """What Triton makes of a compiled kernel, to call it with a grid and arguments."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.names = list(source.fn.arg_names)
        self.kinds = list(source.signature.values())
        self.metadata = metadata
        path = get_cache_manager(metadata.hash).get_file(f"{metadata.name}.ptx")
        self.text = Path(path).read_text()

    def __call__(self, *given: Any) -> None:
        grid, arguments = given[:3], given[9:]
        # Triton keeps compiled kernels, so this may be called for a later machine.
        machine: Machine = triton.runtime.driver.active.machine
        if not machine.runs:
            return
        numbers: list[int | float] = []
        memory = dict[int, tuple[int, bool]]()

        def reach(tensor: torch.Tensor, written: bool) -> None:
            storage = tensor.untyped_storage()
            size, before = memory.get(storage.data_ptr(), (0, False))
            memory[storage.data_ptr()] = (max(size, storage.nbytes()), before or written)

        for name, kind, value in zip(self.names, self.kinds, arguments, strict=True):
            if kind == "constexpr":
                continue
            if isinstance(value, torch.Tensor):
                numbers.append(value.data_ptr())
                reach(value, not machine.written or name in machine.written)
            else:
                numbers.append(value)
        for tensor, written in machine.memory():
            reach(tensor, written)
        if self.metadata.hash not in _translated:
            _translated[self.metadata.hash] = ptx.translate(self.text)
        machine.launches.append(Launched(self.metadata.name, grid[0], self.text))
        faults = _translated[self.metadata.hash].launch(
            self.metadata.name,
            grid,
            self.metadata.num_warps * 32,
            [*numbers, 0, 0],  # behind them Triton's scratch memory, global and for profiles
            memory=[(begin, size, written) for begin, (size, written) in memory.items()],
            shared=self.metadata.shared,
            order_seed=machine.order_seed,
        )
        if faults:
            raise AssertionError("\n".join(map(str, faults[:8])))


class _Driver(DriverBase):
    """The part of Triton's interface to a GPU that launching asks for."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.launcher_cls = _Launcher
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (object(), object(), 0, 0, 1024),
            get_device_properties=lambda _: {"max_shared_mem": 232448, "multiprocessor_count": 4},
        )

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.machine.capability, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return SimpleNamespace(synchronize=lambda: None)

    def get_current_device(self) -> int:
        return self.machine.capability  # Triton keeps a table of compiled kernels for each device

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_benchmarker(self) -> Callable[..., Sequence[float]]:
        raise NotImplementedError("nothing is timed here")


@contextmanager
def on_cpu(capability: int) -> Iterator[Machine]:
    """Run kernels as a GPU of a compute capability (80, 90, 100, 120) would, inside the block."""
    machine = Machine(capability)
    before = triton.runtime.driver._active  # no public way back to having none
    triton.runtime.driver.set_active(_Driver(machine))
    try:
        yield machine
    finally:
        triton.runtime.driver._active = before
