# SPDX-License-Identifier: Apache-2.0
"""Compile every CUDA kernel for each architecture and hold its machine code to the design.

    make gpu-static [ARCHS="90"]

No GPU is needed: nvcc, and of the Triton wheel cuobjdump and nvdisasm. A kernel fails if

- its PTX has a fused, approximate or flushing operation (the numeric contract);
- it has a stack, spills, or touches local memory;
- it is an apply kernel and 256 threads of it do not fit four times on a multiprocessor (64
  registers), in fp64 twice (128), or it cannot load and store 16 bytes at once;
- it is an apply kernel of fp32, or one of halves that writes, and a multiprocessor full of it asks
  for less than 32 KiB before the first use: what covers the latency of memory;
- its machine code has more MUFU, FFMA, FFMA2 or DFMA than a kernel with the same division and
  square root sites and nothing else: whatever is above was made by contraction;
- it reaches global memory by anything but a 64-bit address.

What fails and is known stands in OPEN, with its reason; it is printed, and must still be there. The
table in docs/gpu.md is written with --write, and compared without: it is that of nvcc 13.0.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pyupdate.kernels.rules import RULES

from .sass import Kernel, kernels

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "gpu-static"
PAGE = ROOT / "docs" / "gpu.md"
FAMILIES = {80: 80, 86: 80, 89: 80, 90: 80, 100: 100, 120: 100}
"""Each architecture, and the one whose PTX it has: CMakeLists.txt builds the module so."""

ARCHITECTURES = tuple(FAMILIES)
STORAGES = ("fp64", "fp32", "bf16", "fp16", "bf16+fp32", "fp16+fp32")
"""Along Storages of csrc/types.h; the last two keep their state in fp32."""

COMPILER = "release 13.0"
"""Whose machine code the tables of docs/gpu.md describe."""

THREADS = 256
STARTED = 4
"""Blocks a multiprocessor that a launch has at most: kBlocks of csrc/cuda/sent.cpp."""

# Four blocks a multiprocessor, or two of fp64, whose numbers take two registers.
MOST_REGISTERS = {"fp64": 128}
MOST_REGISTERS_OTHERWISE = 64
LEAST_IN_FLIGHT = 32 << 10
# Rule and stage, where it writes elements; the others leave only sums.
WRITING = {
    f"{name} {k}" for name, rule in RULES.items() for k, s in enumerate(rule.stages) if s.writes
}
# CUDA C++ Programming Guide, technical specifications: threads and KiB of shared memory that a
# multiprocessor holds. Each block takes 1 KiB more than it asks for.
MULTIPROCESSORS = {
    **{80: (2048, 164), 86: (1536, 100), 89: (1536, 100)},
    **{90: (2048, 228), 100: (2048, 228), 120: (1536, 100)},
}

OPEN: dict[tuple[str, str, str], tuple[tuple[int, ...], str]] = {}
"""Faults that are known: rule and stage, storage, what is said; architectures, and the reason."""

FORBIDDEN = re.compile(r"\b(?:fma|mad)\.(?:\w+\.)*b?f\d\S*|\S+\.approx\S*|\S+\.ftz\S*|div\.full\S*")
SITE = re.compile(r"\b((?:div|rem|sqrt|rcp)\.(?:rn\.f|s|u)\d+)\s")
Sites = tuple[tuple[str, int], ...]


@dataclass
class Verdict:
    """What one kernel comes to on one architecture."""

    label: str  # rule and stage
    storage: str
    registers: int
    in_flight: int  # bytes a multiprocessor
    faults: list[str]


def missing_tools() -> list[str]:
    """What is not to be found, after a look into the Triton wheel."""
    wheel = importlib.util.find_spec("triton")
    if wheel is not None and wheel.origin is not None:
        folder = Path(wheel.origin).parent / "backends" / "nvidia" / "bin"
        os.environ["PATH"] += f"{os.pathsep}{folder}"
    needed = {"nvcc": "nvcc", "ptxas": "ptxas (of CUDA)", "c++filt": "c++filt (of binutils)"}
    needed |= {tool: f"{tool} (of the triton wheel)" for tool in ("cuobjdump", "nvdisasm")}
    return [text for tool, text in needed.items() if shutil.which(tool) is None]


def _run(command: Sequence[str | Path]) -> str:
    """What a tool printed, both ways."""
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def _assemble(text: str, architecture: int, place: Path) -> list[Kernel]:
    """What nvcc would make of PTX; ptxas is told of -fmad=false as nvcc tells it."""
    ptx, cubin = place.with_suffix(".ptx"), place.with_suffix(".cubin")
    ptx.write_text(text)
    flags = [f"-arch=sm_{architecture}", "-m64", "--fmad", "false", "-v"]
    said = _run(["ptxas", *flags, ptx, "-o", cubin])
    return list(kernels(said, _run(["cuobjdump", "-sass", cubin])))


# ----- what divisions and square roots cost

_LOAD = {"f32": ("f32", "%f"), "f64": ("f64", "%d"), "s32": ("u32", "%r"), "u32": ("u32", "%r")}
_LOAD |= {"s64": ("u64", "%l"), "u64": ("u64", "%l")}


def calibration(ptx: str, wanted: Sequence[Sites]) -> str:
    """PTX whose k-th kernel has the sites of the k-th entry, and no other arithmetic."""
    head = "".join(re.findall(r"^\.(?:version|target|address_size).*\n", ptx, re.M))
    parts = [head]
    for index, sites in enumerate(wanted):
        lines = ["ld.param.u64 %p, [at];"]
        for site in (name for name, count in sites for _ in range(count)):
            load, register = _LOAD[site.split(".")[-1]]
            binary = site.startswith(("div", "rem"))
            for k in range(1 + binary):
                lines.append(f"ld.volatile.global.{load} {register}{k}, [%p];")
            sources = ", ".join(f"{register}{k}" for k in range(1 + binary))
            lines.append(f"{site} {register}2, {sources};")
            lines.append(f"st.volatile.global.{load} [%p], {register}2;")
        registers = ".reg .f32 %f<3>; .reg .f64 %d<3>; .reg .b32 %r<3>; .reg .b64 %l<3>, %p;"
        body = "\n".join(["{", registers, *lines, "ret;", "}"])
        parts.append(f".visible .entry calibration_{index}(.param .u64 at)\n{body}\n")
    return "\n".join(parts)


def _entries(ptx: str) -> dict[str, str]:
    """The text of each kernel."""
    found = re.split(r"^\.visible \.entry |^\.weak \.entry |^\.entry ", ptx, flags=re.M)[1:]
    return {part.split("(", 1)[0]: part for part in found}


def sites_of(text: str) -> Sites:
    """The divisions and roots of a kernel's PTX, counted."""
    return tuple(sorted(Counter(SITE.findall(text)).items()))


# ----- one kernel


def _label(name: str) -> tuple[str, str]:
    """Rule and stage, and storage, from a kernel's name."""
    plain = _run(["c++filt", name]).strip()
    match = re.search(r"apply_kernel<.*?rules::(\w+), .*?, (\d+), .*?Storage<(.*?)> *>\(", plain)
    if match is None:
        return re.sub(r"\(.*|.*::", "", plain.replace("(anonymous namespace)::", "")), ""
    types = {"double": "fp64", "float": "fp32"}
    param, _, state, _ = (
        types.get(word := kind.strip().split("::")[-1], word) for kind in match[3].split(",")
    )
    return f"{match[1]} {match[2]}", param if state == param else f"{param}+{state}"


def resident(kernel: Kernel, architecture: int) -> int:
    """Threads of a multiprocessor, which holds as many of the blocks that are started as it can."""
    threads, kilobytes = MULTIPROCESSORS[architecture]
    registers = -(-kernel.registers // 8) * 8  # a warp's are given in eights a thread
    shared = kernel.shared + 1024
    held = min(65536 // (registers * THREADS), threads // THREADS, (kilobytes << 10) // shared)
    return min(held, STARTED) * THREADS


def judge(kernel: Kernel, ptx: str, allowed: Kernel, architecture: int) -> Verdict:
    """Hold one kernel to everything; `allowed` is the calibration kernel of its sites."""
    label, storage = _label(kernel.name)
    faults = [f"{found} in the PTX" for found in FORBIDDEN.findall(ptx)[:3]]
    if kernel.stack or kernel.spills:
        faults.append(f"{kernel.stack} bytes of stack, {kernel.spills} of spills")
    if local := kernel.count("LDL", "STL"):
        faults.append(f"{local} accesses of local memory")
    for kind in (("MUFU",), ("FFMA", "FFMA2", "DFMA")):
        found, most = kernel.count(*kind), allowed.count(*kind)
        if found > most:
            faults.append(f"{found} {'/'.join(kind)}, {most} for its divisions and roots")
    faults += [f"narrow address: {access}" for access in kernel.narrow_addresses()[:3]]
    in_flight = kernel.bytes_in_flight() * resident(kernel, architecture)
    if storage:
        if kernel.registers > MOST_REGISTERS.get(storage, MOST_REGISTERS_OTHERWISE):
            faults.append(f"{kernel.registers} registers")
        if kernel.wide("LDG") == 0:
            faults.append("no loads of 16 bytes")
        if label in WRITING and kernel.wide("STG") == 0:
            faults.append("no stores of 16 bytes")
        asked = storage == "fp32" or (kernel.wide("STG") > 0 and storage != "fp64")
        if asked and in_flight < LEAST_IN_FLIGHT:
            faults.append(f"{in_flight >> 10} KiB of loads in flight")
    return Verdict(label, storage, kernel.registers, in_flight, faults)


# ----- all of them


def _sources() -> Iterator[tuple[str, Path, list[str]]]:
    """Name, file and flags of what is compiled."""
    cuda = ROOT / "csrc" / "cuda"
    for index, storage in enumerate(STORAGES):
        yield f"apply-{storage}", cuda / "apply.cu", [f"-DPYUPDATE_STORAGE={index}"]
    yield "reduce", cuda / "reduce.cu", []


@functools.cache
def _ptx(name: str, source: Path, flags: tuple[str, ...], family: int, build: Path) -> str:
    """What nvcc makes of a file for a family, also left in `build`."""
    ptx = build / f"{name}-compute_{family}.ptx"
    includes = [f"-I{ROOT / 'csrc'}", f"-I{build}"]
    options = ["-std=c++20", "-O3", "-fmad=false", f"-arch=compute_{family}", *flags]
    _run(["nvcc", "-ptx", *options, *includes, source, "-o", ptx])
    return ptx.read_text()


def examine(
    name: str, source: Path, flags: Sequence[str], architecture: int, build: Path = BUILD
) -> list[Verdict]:
    """Compile a file for an architecture, and judge every kernel in it."""
    text = _ptx(name, source, tuple(flags), FAMILIES[architecture], build)
    entries = _entries(text)
    compiled = _assemble(text, architecture, build / f"{name}-{architecture}")
    wanted = sorted({sites_of(entry) for entry in entries.values()})
    bare = calibration(text, wanted)
    place = build / f"{name}-{architecture}-calibration"
    costs = {kernel.name: kernel for kernel in _assemble(bare, architecture, place)}
    allowed = {sites: costs[f"calibration_{k}"] for k, sites in enumerate(wanted)}
    return [
        judge(kernel, entries[kernel.name], allowed[sites_of(entries[kernel.name])], architecture)
        for kernel in compiled
    ]


def table(architecture: int, verdicts: Sequence[Verdict]) -> str:
    """Registers / KiB in flight a multiprocessor, a row a stage of a rule."""
    cells = {(each.label, each.storage): each for each in verdicts}
    labels = sorted({each.label for each in verdicts if each.storage})
    lines = [
        f"### sm_{architecture}",
        "",
        f"| rule, stage | {' | '.join(STORAGES)} |",
        f"|---|{'---|' * len(STORAGES)}",
    ]
    for label in labels:
        row = [cells.get((label, storage)) for storage in STORAGES]
        texts = [f"{each.registers} / {each.in_flight >> 10}" if each else "" for each in row]
        lines.append(f"| {label} | {' | '.join(texts)} |")
    rest = [each for each in verdicts if not each.storage]
    lines += ["", "; ".join(f"`{each.label}`: {each.registers} registers" for each in rest), ""]
    return "\n".join(lines)


def _marks(architecture: int) -> tuple[str, str]:
    return f"<!-- sm_{architecture} -->\n", f"<!-- end of sm_{architecture} -->"


def report(architecture: int, verdicts: Sequence[Verdict]) -> bool:
    """Print every fault; whether none is new, and none that is in OPEN is gone."""
    good = True
    open_here = {key: why for key, (where, why) in OPEN.items() if architecture in where}
    gone = set(open_here)
    for each in verdicts:
        for fault in each.faults:
            own = (each.label, each.storage)
            known = [key for key in open_here if key[:2] == own and key[2] in fault]
            gone -= set(known)
            said = f"known: {open_here[known[0]]}" if known else "FAILED"
            print(f"sm_{architecture} {each.label} {each.storage}: {fault} ({said})")
            good &= bool(known)
    for label, storage, what in gone:
        print(f"sm_{architecture} {label} {storage}: {what} is gone, take it out of OPEN")
    return good and not gone


def main() -> int:
    """Examine, compare or write the tables, and say what failed."""
    parser = argparse.ArgumentParser(description="Hold every kernel's machine code to account.")
    parser.add_argument("--archs", type=int, nargs="*", default=list(ARCHITECTURES))
    parser.add_argument("--write", action="store_true", help="write the tables of docs/gpu.md")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 4))
    options = parser.parse_args()
    if missing := missing_tools():
        print(f"gpu-static: SKIPPED: no {', '.join(missing)}")
        return 0
    BUILD.mkdir(parents=True, exist_ok=True)
    emit = [sys.executable, "-m", "pyupdate.kernels.emit_cpp", "--output"]
    _run([*emit, BUILD / "rules_generated.h"])
    same_compiler = COMPILER in _run(["nvcc", "--version"])
    failed = False
    page = PAGE.read_text()
    for architecture in options.archs:
        with ThreadPoolExecutor(options.jobs) as pool:
            jobs = [pool.submit(examine, *what, architecture) for what in _sources()]
            verdicts = [verdict for job in jobs for verdict in job.result()]
        begin, end = _marks(architecture)
        found = table(architecture, verdicts)
        before, rest = page.split(begin)
        told, after = rest.split(end)
        if options.write:
            page = before + begin + found + end + after
        elif not same_compiler:
            print(f"sm_{architecture}: tables of docs/gpu.md not compared: nvcc is not {COMPILER}")
        elif told != found:
            print(f"sm_{architecture}: docs/gpu.md says something else; make gpu-static WRITE=1")
            failed = True
        failed |= not report(architecture, verdicts)
        print(f"sm_{architecture}: {len(verdicts)} kernels")
    if options.write:
        PAGE.write_text(page)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
