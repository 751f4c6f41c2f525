# SPDX-License-Identifier: Apache-2.0
"""Build translated PTX with g++, and launch it."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import struct
import subprocess
import tempfile
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .emit import Layout, write_module
from .text import SIZES, Text, read

_HERE = Path(__file__).parent
_BUILD = _HERE.parents[2] / "build" / "ptx"
_KINDS = (
    *("out of bounds", "misaligned", "write to read-only memory", "divergent barrier"),
    *("lanes of a warp operation do not agree", "division by zero", "trap", "waits for ever"),
)
"""The kinds of machine.h's enum, in its order."""

# -O1: a test runs few elements, so the compiler's time counts. Nothing may be contracted or
# assumed: bits are what is tested.
_FLAGS = (
    *("-std=c++20", "-O1", "-fPIC", "-ffp-contract=off", "-fno-math-errno"),
    *("-fno-strict-aliasing", "-fvisibility=hidden", "-fno-gnu-unique", "-w"),
)

_MOST_THREADS = 1024
_MOST_SHARED = 227 << 10  # bytes a block can have on sm_90 and sm_100
_MOST_FAULTS = 64  # that are described


@dataclass(frozen=True)
class Fault:
    """What a thread did that hardware forbids or leaves undefined."""

    kind: str
    line: int  # of the PTX text, from 1
    text: str  # that line
    block: tuple[int, int, int]
    thread: tuple[int, int, int]
    address: int
    bytes: int
    write: bool

    def __str__(self) -> str:
        access = f" {'store' if self.write else 'load'} of {self.bytes} bytes at {self.address:#x}"
        place = f"block {self.block} thread {self.thread}, PTX line {self.line}: {self.text}"
        return f"{self.kind}{access if self.bytes else ''}, {place}"


class _Range(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("begin", "end", "writable")]


class _Fault(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_uint32),
        ("line", ctypes.c_uint32),
        ("block", ctypes.c_uint32 * 3),
        ("thread", ctypes.c_uint32 * 3),
        ("address", ctypes.c_uint64),
        ("bytes", ctypes.c_uint32),
        ("write", ctypes.c_uint32),
    ]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("param", ctypes.c_void_p),
        ("param_bytes", ctypes.c_uint64),
        ("shared_bytes", ctypes.c_uint64),
        ("shared", ctypes.POINTER(_Range)),
        ("shared_count", ctypes.c_uint64),
        ("local_bytes", ctypes.c_uint64),
        ("ranges", ctypes.POINTER(_Range)),
        ("range_count", ctypes.c_uint64),
        ("seed", ctypes.c_uint64),
        ("faults", ctypes.POINTER(_Fault)),
        ("fault_capacity", ctypes.c_uint64),
    ]


Memory = tuple[int, int, bool]
"""Address, bytes, and whether they may be written."""


def _ranges(memory: Iterable[Memory]) -> list[Memory]:
    """Ranges as (begin, end, writable) in order, those that share bytes joined."""
    joined: list[Memory] = []
    for begin, size, writable in sorted(memory):
        if size == 0:
            continue
        if joined and begin < joined[-1][1]:
            first, end, before = joined[-1]
            if before != writable:
                message = f"memory: {begin:#x} is in a writable and in a read-only range"
                raise ValueError(message)
            joined[-1] = (first, max(end, begin + size), writable)
        else:
            joined.append((begin, begin + size, writable))
    return joined


def _array(ranges: Sequence[Memory]) -> ctypes.Array[_Range]:
    return (_Range * max(len(ranges), 1))(*(_Range(*each) for each in ranges))


def _three(size: int | Sequence[int]) -> tuple[int, int, int]:
    given = (size,) if isinstance(size, int) else tuple(size)
    x, y, z = (*given, 1, 1)[:3]
    return x, y, z


def _pack(layout: Layout, args: Sequence[int | float | bytes]) -> bytes:
    if len(args) != len(layout.params):
        message = f"args: {len(args)} given, the kernel takes {len(layout.params)}"
        raise ValueError(message)
    packed = bytearray(layout.param_bytes)
    for (offset, param), arg in zip(layout.params, args, strict=True):
        array = param.size != SIZES[param.type]
        if isinstance(arg, bytes | bytearray):
            data = bytes(arg)
        elif array:
            message = f"args: {param.name} is a struct of {param.size} bytes, {arg!r} given"
            raise TypeError(message)
        elif isinstance(arg, float):
            if param.size not in (4, 8) or param.type[0] in "us":
                message = f"args: {param.name} is .{param.type}, {arg!r} given"
                raise TypeError(message)
            data = struct.pack("<f" if param.size == 4 else "<d", arg)
        elif param.type in ("f32", "f64"):
            data = struct.pack("<f" if param.size == 4 else "<d", float(arg))
        else:
            data = (int(arg) & ((1 << 8 * param.size) - 1)).to_bytes(param.size, "little")
        if len(data) != param.size:
            message = f"args: {param.name} has {param.size} bytes, {len(data)} given"
            raise ValueError(message)
        packed[offset : offset + param.size] = data
    return bytes(packed)


class Module:
    """A built module; see the package's docstring."""

    def __init__(self, text: str, module: Text, layouts: dict[str, Layout], so: Path) -> None:
        self.text = text
        self._lines = text.split("\n")
        self._module = module
        self._layouts = layouts
        self._library = ctypes.CDLL(str(so))
        count = ctypes.c_uint64.in_dll(self._library, "ptx_global_count").value
        own = (_Range * (count + 1)).in_dll(self._library, "ptx_globals")
        self._globals = [(r.begin, r.end - r.begin, bool(r.writable)) for r in own[:count]]

    @property
    def kernels(self) -> tuple[str, ...]:
        """The names of the entries."""
        return tuple(self._layouts)

    def launch(
        self,
        kernel: str,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        args: Sequence[int | float | bytes],
        *,
        memory: Iterable[Memory] = (),
        shared: int = 0,
        order_seed: int = 0,
    ) -> list[Fault]:
        """Run a kernel to its end.

        Returns:
            What went wrong, in the order in which it did; the first 64 faults at most.

        Raises:
            ValueError: The launch itself is not one that hardware would take.
        """
        layout = self._layouts[kernel]
        entry = self._module.entries[kernel]
        grid, block = _three(grid), _three(block)
        threads = block[0] * block[1] * block[2]
        if min(*grid, *block) < 1 or threads > _MOST_THREADS:
            message = f"grid {grid} or block {block} cannot be launched"
            raise ValueError(message)
        if (entry.required and block != _three(entry.required)) or (
            entry.most and threads > functools.reduce(lambda a, b: a * b, entry.most)
        ):
            message = f"block {block}: {kernel} was compiled for {entry.required or entry.most}"
            raise ValueError(message)
        own = sum(size for _, size in layout.shared)
        if own + shared > _MOST_SHARED or (shared and layout.dynamic is None):
            message = f"shared: {shared} bytes beside {own} of the kernel's own"
            raise ValueError(message)
        data = _pack(layout, args)
        param = ctypes.create_string_buffer(data, max(len(data), 1))
        pieces = [(begin, begin + size, True) for begin, size in layout.shared]
        if shared and layout.dynamic is not None:
            pieces.append((layout.dynamic, layout.dynamic + shared, True))
        ranges = _ranges([*memory, *self._globals])
        faults = (_Fault * _MOST_FAULTS)()
        launch = _Launch(
            grid,
            block,
            ctypes.addressof(param),
            len(data),
            layout.shared_bytes + shared,
            _array(pieces),
            len(pieces),
            layout.local_bytes,
            _array(ranges),
            len(ranges),
            order_seed,
            faults,
            _MOST_FAULTS,
        )
        run = self._library[f"ptx_run_{self.kernels.index(kernel)}"]
        run.restype, run.argtypes = ctypes.c_uint64, [ctypes.POINTER(_Launch)]
        count = run(ctypes.byref(launch))
        return [self._describe(fault) for fault in faults[: min(count, _MOST_FAULTS)]]

    def _describe(self, fault: _Fault) -> Fault:
        line = fault.line
        return Fault(
            _KINDS[fault.kind],
            line,
            self._lines[line - 1].strip() if line else "",
            (fault.block[0], fault.block[1], fault.block[2]),
            (fault.thread[0], fault.thread[1], fault.thread[2]),
            fault.address,
            fault.bytes,
            bool(fault.write),
        )


def _compile(source: str | Path, target: Path, *more: str) -> None:
    """Compile to `target`, which appears when it is whole: several processes may build at once."""
    with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as file:
        unfinished = Path(file.name)
    command = ["g++", *_FLAGS, f"-I{_HERE}", str(source), *more, "-o", str(unfinished)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        unfinished.unlink()
        message = f"{' '.join(command)}:\n{done.stderr[:4000]}"
        raise RuntimeError(message)
    unfinished.chmod(0o755)
    unfinished.replace(target)


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join([*texts, *_FLAGS]).encode()).hexdigest()[:20]


def translate(text: str, build: Path = _BUILD, only: Collection[str] | None = None) -> Module:
    """The kernels of a PTX text, built for this machine.

    Args:
        text: What `nvcc -ptx` wrote, or Triton's `asm["ptx"]`.
        only: The entries that are wanted; all if None. The others are not looked at.
        build: Where sources and shared objects are kept, found again by their content.

    Raises:
        Unsupported: Something in the text is not known here; says the line.
        RuntimeError: g++ failed.
    """
    module = read(text)
    if only is not None:
        module.entries = {name: module.entries[name] for name in only}
    source, layouts = write_module(module)
    build.mkdir(parents=True, exist_ok=True)
    headers = [(_HERE / name).read_text() for name in ("machine.h", "arithmetic.h")]
    machine_source = (_HERE / "machine.cpp").read_text()
    machine = build / f"machine-{_digest(machine_source, *headers)}.o"
    if not machine.exists():
        _compile(_HERE / "machine.cpp", machine, "-O2", "-c")
    stem = build / _digest(source, machine.name)
    if not stem.with_suffix(".so").exists():
        stem.with_suffix(f".{os.getpid()}.cpp").write_text(source)
        stem.with_suffix(f".{os.getpid()}.cpp").replace(stem.with_suffix(".cpp"))
        _compile(stem.with_suffix(".cpp"), stem.with_suffix(".so"), "-shared", str(machine))
    return Module(text, module, layouts, stem.with_suffix(".so"))
