# SPDX-License-Identifier: Apache-2.0
"""Steps of the CUDA passes on a CPU: what is compiled, what goes in, and what must come out.

tests/device/cuda_steps.cpp is the other end of `run`; `expected` is the numpy oracle's step and the
reduction order of kernels/reduction.py, row by row, with what stands between the passes.
"""

from __future__ import annotations

import math
import struct
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from bits import assert_same_bits
from cases import CASES, OTHERS
from compiling import ROOT, compiler, launcher, run

from pyupdate.kernels import emit_cpp, oracle, reduction, rules
from pyupdate.kernels.language import Rule
from pyupdate.kernels.rules import RULES

Array = np.ndarray[Any, Any]

# Along csrc/types.h's Storages: name, parameter's and gradient's type, state's, compute's; uint16
# is bf16.
STORAGES: tuple[tuple[str, type, type, type], ...] = (
    ("fp64", np.float64, np.float64, np.float64),
    ("fp32", np.float32, np.float32, np.float32),
    ("bf16", np.uint16, np.uint16, np.float32),
    ("fp16", np.float16, np.float16, np.float32),
    ("bf16, state fp32", np.uint16, np.float32, np.float32),
    ("fp16, state fp32", np.float16, np.float32, np.float32),
)
FP32 = 1

# -O1: a third of the time of -O2 to compile, and the arrays of these tests are small.
FLAGS = ("-std=c++20", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-Wno-unknown-pragmas")

ADDRESS = ("-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
THREAD = ("-g1", "-fsanitize=thread")

# ----- compiled -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Program:
    """A build of the kernels with tests/device/cuda_steps.cpp around them."""

    path: Path
    rules: tuple[str, ...]


def build(
    folder: Path,
    entries: Mapping[str, Rule],
    flags: Sequence[str] = (),
    *,
    edits: Mapping[str, tuple[str, str]] | None = None,
    storages: Sequence[int] = range(len(STORAGES)),
    main: str = "cuda_steps.cpp",
) -> Program:
    """Compile the kernels as host C++.

    Args:
        folder: where everything is written.
        entries: the rules.
        flags: more of the compiler's.
        edits: file of csrc/cuda -> (old text, new text). Only a copy is edited, and an old text
            must be there exactly once.
        storages: those whose apply kernels are compiled; a test may need no other.
        main: the file of tests/device that runs them.
    """
    sources = ROOT / "csrc"
    if edits:
        sources = folder / "csrc"
        for path in (ROOT / "csrc").rglob("*"):
            if path.suffix in (".h", ".cuh", ".cu"):
                copy = sources / path.relative_to(ROOT / "csrc")
                copy.parent.mkdir(parents=True, exist_ok=True)
                text = path.read_text()
                old, new = edits.get(path.name, ("", ""))
                assert not old or text.count(old) == 1, f"{path.name}: {old}"
                copy.write_text(text.replace(old, new) if old else text)
    (folder / "rules_generated.h").write_text(emit_cpp.emit(entries))
    include = [f"-I{folder}", f"-I{sources}", f"-I{ROOT / 'tests/device'}"]
    # An object does not depend on where its sources lie, so CI's launcher may have it already.
    command = [*launcher(), compiler(), *FLAGS, *flags, "-DPYUPDATE_ISA=device", *include]
    command += [f"-ffile-prefix-map={folder}=build", f"-ffile-prefix-map={sources}=csrc"]
    command += ["-x", "c++", "-c"]
    jobs = [
        (sources / "cuda/apply.cu", f"apply{k}.o", (f"-DPYUPDATE_STORAGE={k}",)) for k in storages
    ]
    jobs += [(sources / f"cuda/{name}.cu", f"{name}.o", ()) for name in ("reduce", "launch")]
    jobs.append((ROOT / "tests/device" / main, "main.o", ()))
    left_out = [k for k in range(len(STORAGES)) if k not in storages]
    if left_out:
        stub = folder / "left_out.cpp"
        none = "template <> const ApplyRow* apply_rows<{}>() {{ return nullptr; }}\n"
        text = "".join(none.format(k) for k in left_out)
        head = '#include "cuda/apply_table.h"\n'
        stub.write_text(f"{head}namespace pyupdate::cuda {{\n{text}}}\n")
        jobs.append((stub, "left_out.o", ()))

    def compile_one(job: tuple[Path, str, tuple[str, ...]]) -> Path:
        source, name, more = job
        run(*command, *more, source, "-o", folder / name)
        return folder / name

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, jobs))
    program = folder / "cuda_steps"
    run(compiler(), *flags, *objects, "-pthread", "-o", program)
    return Program(program, tuple(entries))


# ----- what goes in -------------------------------------------------------------------------------


@dataclass
class Group:
    """Rows of one hyper row."""

    rule: Rule
    numbers: Sequence[float]
    storage: int = FP32
    sign: float = 1.0
    count: int = 0
    in_tensor: int = -1
    """Which of the numbers stands in a tensor, as an lr may."""
    member: int = 0
    """Of the plans that are stepped as one; rows are in the order of their members."""


@dataclass
class Parameter:
    """A row: its memory before the steps, and a gradient a step."""

    group: int
    param: Array
    state: dict[str, Array]
    grads: list[Array]
    shift: int = 0
    """Elements between an address of 16 bytes and its first one."""
    step_bytes: int = 4
    identity: int = 0
    average: Array | None = None


@dataclass
class Asked:
    """launch.h's Request; scale and found_inf of 0 are null pointers."""

    reduce: bool = False
    skip_nonfinite: bool = False
    finite_norm: bool = False
    inf_norm: bool = False
    seed: int | None = None
    unscale: float = 1.0
    scale: float = 0.0
    found_inf: float = 0.0
    max_norm: float = -1.0
    clip_value: float = math.inf
    ema_weight: float = 0.0
    apart: bool = False
    others: tuple[Asked, ...] = ()
    """What is asked of the second and later members."""


@dataclass
class Result:
    """What the memory holds after the steps: by row and name, and what each step did."""

    arrays: list[dict[str, Array]]
    outcomes: list[tuple[float, float, bool, bool]] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)


# ----- what comes out -----------------------------------------------------------------------------


def run_steps(
    program: Program,
    groups: Sequence[Group],
    rows: Sequence[Parameter],
    asked: Asked,
    *,
    order: int = 0,
    blocks: int = 3,
    check: bool = True,
) -> Result | subprocess.CompletedProcess[bytes]:
    """The steps by the kernels; without `check`, whatever became of the process."""
    averages = rows[0].average is not None
    steps = len(rows[0].grads)
    said = [order, blocks, steps, averages, len(groups), len(rows), asked.apart]
    given = [_ints([*said, 1 + len(asked.others)])]
    for one, end in zip((asked, *asked.others), rows_end(groups, rows, asked), strict=True):
        said = [end, one.reduce, one.skip_nonfinite, one.finite_norm, one.inf_norm]
        given.append(_ints([*said, one.seed is not None, one.seed or 0]))
        numbers = (one.unscale, one.scale, one.found_inf, one.max_norm, one.clip_value)
        given.append(_floats([*numbers, one.ema_weight]))
    for group in groups:
        rule = program.rules.index(group.rule.name)
        given.append(_ints([rule, group.storage, group.count, group.member]))
        given += [_floats([group.sign]), _ints([group.in_tensor]), _floats(group.numbers)]
    for row in rows:
        given.append(_ints([row.group, row.param.size, row.shift, row.step_bytes, row.identity]))
        given += [_floats([groups[row.group].count]), row.param.tobytes()]
        rule = groups[row.group].rule
        given += [row.state[name].tobytes() for name in rule.state]
        if row.average is not None:
            given.append(row.average.tobytes())
        given += [np.float32(row.state[name]).tobytes() for name in rule.scalars]
    for step in range(steps):
        given += [row.grads[step].tobytes() for row in rows]
    done = subprocess.run([program.path], input=b"".join(given), capture_output=True, check=False)
    if not check:
        return done
    assert done.returncode == 0, done.stderr.decode()
    return _read(done.stdout, groups, rows, steps * (1 + len(asked.others)))


def rows_end(groups: Sequence[Group], rows: Sequence[Parameter], asked: Asked) -> list[int]:
    """The index behind the last row of each member."""
    of = [groups[row.group].member for row in rows]
    assert of == sorted(of)
    return [sum(m <= member for m in of) for member in range(1 + len(asked.others))]


def _read(out: bytes, groups: Sequence[Group], rows: Sequence[Parameter], outcomes: int) -> Result:
    at = 0

    def take(like: Array) -> Array:
        nonlocal at
        taken = np.frombuffer(out, like.dtype, like.size, at).reshape(like.shape)
        at += taken.nbytes
        return taken

    result = Result([])
    for _ in range(outcomes):
        norm, multiplier, found, skipped = take(np.zeros(4))
        result.outcomes.append((norm, multiplier, bool(found), bool(skipped)))
    for row in rows:
        rule = groups[row.group].rule
        arrays = {"param": take(row.param)} | {n: take(row.state[n]) for n in rule.state}
        if row.average is not None:
            arrays["average"] = take(row.average)
        if row.step_bytes:
            kind = np.float64 if row.step_bytes == 8 else np.float32
            arrays["step"] = take(np.zeros((), kind))
        arrays |= {name: take(np.zeros((), np.float32)) for name in rule.scalars}
        result.arrays.append(arrays)
    result.counts = [int(c) for c in take(np.zeros(len(groups), np.int64))]
    assert at == len(out)
    return result


def expected(groups: Sequence[Group], rows: Sequence[Parameter], asked: Asked) -> Result:
    """The same by the oracle; of several members, by one after the other."""
    if asked.others:
        return _one_by_one(groups, rows, asked)
    arrays = [{"param": row.param, **row.state} for row in rows]
    averages = [row.average for row in rows]
    counts = [group.count for group in groups]
    result = Result([])
    unscale = asked.unscale
    if asked.scale:
        unscale *= float(np.float32(1.0 / asked.scale))
    for step in range(len(rows[0].grads)):
        grads = [row.grads[step] for row in rows]
        nonfinite = asked.reduce and not all(np.isfinite(oracle.load(g)).all() for g in grads)
        norm, multiplier = -1.0, unscale
        if asked.reduce:
            norm = _norm(grads, unscale, inf_norm=asked.inf_norm)
            multiplier = rules.multiplier(norm, unscale, asked.max_norm)
        found = nonfinite or asked.found_inf != 0.0
        skipped = (
            asked.found_inf != 0.0
            or (asked.skip_nonfinite and nonfinite)
            or (asked.finite_norm and not math.isfinite(norm))
        )
        result.outcomes.append((norm, multiplier, found, skipped))
        if skipped:
            continue
        counts = [count + 1 for count in counts]
        for r, row in enumerate(rows):
            group = groups[row.group]
            param, state = oracle.step(
                group.rule,
                arrays[r]["param"],
                grads[r],
                {name: arrays[r][name] for name in (*group.rule.state, *group.rule.scalars)},
                group.numbers,
                count=counts[row.group],
                multiplier=multiplier * group.sign,
                clip_value=asked.clip_value,
                chance=None if asked.seed is None else (asked.seed, row.identity),
            )
            arrays[r] = {"param": param, **state}
            if row.average is not None:
                averages[r] = oracle.average(averages[r], param, asked.ema_weight)
    for row, ends, average in zip(rows, arrays, averages, strict=True):
        if average is not None:
            ends["average"] = average
        if row.step_bytes:
            kind = np.float64 if row.step_bytes == 8 else np.float32
            ends["step"] = np.asarray(counts[row.group], kind)
        result.arrays.append(ends)
    result.counts = counts
    return result


def _one_by_one(groups: Sequence[Group], rows: Sequence[Parameter], asked: Asked) -> Result:
    found = []
    for member, one in enumerate((replace(asked, others=()), *asked.others)):
        places = [g for g, group in enumerate(groups) if group.member == member]
        own = [replace(row, group=places.index(row.group)) for row in rows if row.group in places]
        found.append(expected([groups[g] for g in places], own, one))
    of_steps = zip(*(result.outcomes for result in found), strict=True)
    return Result(
        [arrays for result in found for arrays in result.arrays],
        [outcome for of_step in of_steps for outcome in of_step],
        [count for result in found for count in result.counts],
    )


def _norm(grads: Sequence[Array], unscale: float, *, inf_norm: bool) -> float:
    if inf_norm:
        return reduction.largest([oracle.largest_magnitude(grad, unscale) for grad in grads])
    total = reduction.halving_tree([oracle.sum_of_squares(grad, unscale) for grad in grads])
    return math.sqrt(total)


def _ints(numbers: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(numbers)}q", *(int(number) for number in numbers))


def _floats(numbers: Sequence[float]) -> bytes:
    return struct.pack(f"<{len(numbers)}d", *numbers)


# ----- plans --------------------------------------------------------------------------------------

OPTIONS = {
    "plain": Asked(),
    "scaler": Asked(reduce=True, skip_nonfinite=True, unscale=0.5, scale=1024.0),
    "clip": Asked(reduce=True, max_norm=0.3),
    "inf norm": Asked(reduce=True, max_norm=0.01, inf_norm=True),
    "value": Asked(clip_value=0.1),
    "average": Asked(ema_weight=0.125),
    "chance": Asked(seed=7),
    "all": Asked(reduce=True, max_norm=0.7, clip_value=0.2, ema_weight=0.01, seed=-3, apart=True),
}


def group_of(name: str, storage: int = FP32, **more: Any) -> Group:
    for case in (*CASES, *OTHERS):
        if case.name == name and (case.full or name.startswith("sgd")):
            sign, numbers = case.numbers()
            return Group(case.rule, numbers, storage, sign, **more)
    rule = RULES[name]  # of a composite, whose other half is the framework's
    return Group(rule, [0.1 + 0.05 * k for k in range(len(rule.numbers))], storage, **more)


def row_of(
    rng: np.random.Generator, groups: list[Group], index: int, size: int, **more: Any
) -> Any:
    """A row with state as some steps leave it, and gradients for two steps."""
    group = groups[index]
    _, kind, state_kind, compute = STORAGES[group.storage]

    def values(kind: type, scale: float = 1.0) -> Any:
        wide = (rng.standard_normal(size) * scale).astype(compute)
        return oracle.store(wide, np.zeros(size, kind))

    state: dict[str, Any] = {
        name: oracle.store(oracle.load(values(state_kind)) ** 2, np.zeros(size, state_kind))
        for name in group.rule.state
    }
    state |= {name: np.asarray(0.75, np.float32) for name in group.rule.scalars}
    return Parameter(index, values(kind), state, [values(kind, 0.5) for _ in range(2)], **more)


def with_averages(rng: np.random.Generator, groups: list[Group], rows: list[Parameter]) -> None:
    for row in rows:
        compute = STORAGES[groups[row.group].storage][3]
        row.average = rng.standard_normal(row.param.size).astype(compute)


def mixed_plan(
    rule: str, asked: Asked, seed: int, storages: Sequence[int] = range(len(STORAGES))
) -> tuple[list[Group], list[Parameter]]:
    """Rows of every storage, aligned and not, of no element and of more than a chunk."""
    rng = np.random.default_rng(seed)
    groups = [group_of(rule, storage, count=2) for storage in storages]
    rows = [
        row_of(rng, groups, k, size, shift=shift, identity=(1 << 32) + size, step_bytes=wide)
        for k in range(len(groups))
        for size, shift, wide in ((0, 0, 4), (13, 1, 8), (1_003, 0, 0), (16_401, 0, 4))
    ]
    if asked.ema_weight:
        with_averages(rng, groups, rows)
    return groups, rows


TOGETHER = (
    OPTIONS["clip"],
    OPTIONS["plain"],
    OPTIONS["scaler"],
    replace(OPTIONS["inf norm"], found_inf=1.0),
    OPTIONS["inf norm"],
    OPTIONS["value"],
)
"""Of members that are stepped as one: the fourth is skipped, and so is the third where a gradient
of its own is not finite."""


def joint_plan(
    rules_of: Sequence[str], seed: int, storages: Sequence[int] = range(len(STORAGES))
) -> tuple[list[Group], list[Parameter], Asked]:
    """Plans of these rules in turn, one for each of `TOGETHER`, stepped as one."""
    rng = np.random.default_rng(seed)
    groups, rows = [], []
    for member in range(len(TOGETHER)):
        name = rules_of[member % len(rules_of)]
        for storage in (storages[0], storages[member % len(storages)]):
            groups.append(group_of(name, storage, count=member, member=member))
            for size, shift in ((1_003, member % 2), (16_401 if member % 3 else 5, 0)):
                rows.append(row_of(rng, groups, len(groups) - 1, size, shift=shift))
    third = next(row for row in rows if groups[row.group].member == 2)
    third.grads[1] = oracle.store(
        np.full(third.param.size, np.inf, STORAGES[groups[third.group].storage][3]),
        third.grads[1].copy(),
    )
    return groups, rows, replace(TOGETHER[0], others=TOGETHER[1:])


def assert_same(found: Result, wanted: Result, rows: Sequence[Parameter]) -> None:
    """Bit for bit, but for what a nan is made of."""
    for step, (a, b) in enumerate(zip(found.outcomes, wanted.outcomes, strict=True)):
        assert a == b or any(math.isnan(x) for x in b), f"outcome of step {step}: {a}, not {b}"
    assert found.counts == wanted.counts
    for r, (a, b) in enumerate(zip(found.arrays, wanted.arrays, strict=True)):
        assert a.keys() == b.keys()
        for name in b:
            assert_same_bits(a[name], b[name], f"row {r} of {rows[r].param.size}, {name}")
