# SPDX-License-Identifier: Apache-2.0
"""The builds of passes.cpp: each runs or says why not, its loops use whole vectors, nothing fuses.

What this machine cannot run is disassembled all the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from bits import array_of, assert_same_bits, oracle_steps, random_values, torch_steps
from cases import FULL
from compiling import FLAGS, compiler, run, tool
from conftest import ISAS

from pyupdate.kernels.rules import RULES

VECTORS = {"v2": "xmm", "v3": "ymm", "v4": "zmm"}
STORAGES = {
    "fp64": "double",
    "fp32": "float",
    "bf16": "pyupdate::{0}::bf16, pyupdate::{0}::bf16, pyupdate::{0}::bf16",
    "fp16": "pyupdate::{0}::fp16, pyupdate::{0}::fp16, pyupdate::{0}::fp16",
}
WIDE = {
    "bf16, state fp32": "pyupdate::{0}::bf16, pyupdate::{0}::bf16, float",
    "fp16, state fp32": "pyupdate::{0}::fp16, pyupdate::{0}::fp16, float",
}
"""Where no state is touched, the compiler has one code for these and for state of their own."""

FUSED = re.compile(r"\bv?fn?m(add|sub)")
PACKED = re.compile(r"\bv?(add|sub|mul|div|sqrt)p[sd]\b")
SCALAR = re.compile(r"\bv?(add|sub|mul|div|sqrt)s[sd]\b")

x86 = pytest.mark.skipif(ISAS == ("plain",), reason="no x86-64: one plain build")
every_isa = pytest.mark.parametrize("isa", ISAS)


# ----- chosen when the module is loaded -----------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_an_instruction_set_runs_or_its_skip_says_why(isa, compiled):
    assert compiled.isa() == isa
    case = next(case for case in FULL if case.name == "adamw")
    rng = np.random.default_rng(81)
    values, grad = (random_values(rng, 1_000, torch.float32) for _ in range(2))
    param = torch.nn.Parameter(values.clone())
    torch_steps(case.ours([param]), [param], [[grad]])
    expected, _ = oracle_steps(case, array_of(values), [array_of(grad)])
    assert_same_bits(param, expected, isa)


def test_the_best_is_chosen_and_an_unknown_one_is_refused(compiled, isas):
    assert list(ISAS)[: len(isas)] == isas
    compiled.use_isa(isas[-1])
    with pytest.raises(ValueError, match=r"instruction set 'v9' .* there are: " + ", ".join(isas)):
        compiled.use_isa("v9")
    assert compiled.isa() == isas[-1]


# ----- disassembled -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Function:
    """A disassembled function: addresses and instructions."""

    name: str
    code: tuple[tuple[int, str], ...]

    def loops(self) -> Iterator[list[str]]:
        """The bodies of its innermost loops: a jump back, and no jump back within."""
        jumps = []
        for address, text in self.code:
            found = re.match(r"j\w+\s+([0-9a-f]+)\b", text)
            if found and self.code[0][0] <= int(found[1], 16) <= address:
                jumps.append((int(found[1], 16), address))
        for start, end in jumps:
            if not any(start <= a and b < end for a, b in jumps):
                yield [text for address, text in self.code if start <= address <= end]


@cache
def disassembled(path: Path) -> dict[str, Function]:
    text = run(tool("objdump"), "-d", "-C", "--no-show-raw-insn", path)
    functions = {}
    for part in re.split(r"\n\n+", text):
        head = re.match(r"[0-9a-f]+ <(.*)>:\n", part)
        if head:
            lines = re.findall(r"^\s*([0-9a-f]+):\t(.*)$", part, re.MULTILINE)
            code = tuple((int(address, 16), body) for address, body in lines)
            functions[head[1]] = Function(head[1], code)
    return functions


def converts(isa: str, storage: str) -> bool:
    """Whether halves are converted by instructions, around the loop of fp32."""
    return isa in ("v3", "v4") and storage.startswith("fp16")


def kernel(functions: dict[str, Function], isa: str, stage: str, storage: str) -> Function:
    space = f"pyupdate::{isa}::"
    stored = {**STORAGES, **WIDE}[storage].format(isa)
    run = "run_converted" if converts(isa, storage) else "run"
    wanted = f"{space}(anonymous namespace)::{run}<{space}{stage}, {space}Storage<{stored}, "
    (found,) = (f for name, f in functions.items() if wanted in name)
    return found


def assert_vectorised(function: Function, register: str) -> None:
    """Some innermost loop does its arithmetic, reads and writes in whole vectors."""
    for body in function.loops():
        code = "\n".join(body)
        arithmetic = [text for text in body if PACKED.search(text)]
        whole = arithmetic and all(register in text for text in arithmetic)
        writes = re.search(r"mov[au]p[sd]|movdq|mov[au]ps", code) and re.search(
            rf"%{register}\d+,[^,]*\(", code
        )
        if whole and writes and not SCALAR.search(code):
            return
    raise AssertionError(f"no loop of {function.name} works on whole {register}")


def assert_steps_fp32(function: Function, isa: str) -> None:
    """It has the loop of fp32, or calls who has it, which is another one of these cases."""
    space = f"pyupdate::{isa}::"
    (stage,) = re.findall(rf"run_converted<({space}[\w:]+), ", function.name)
    called = f"::run<{stage}, {space}Storage<float, float, float, float> >"
    if not any("call" in text and called in text for _, text in function.code):
        assert_vectorised(function, VECTORS[isa])


@pytest.fixture(scope="module")
def installed(compiled) -> dict[str, Function]:
    """The functions of the module that the other tests run."""
    functions = disassembled(Path(compiled.__file__))
    if not any("::run<" in name for name in functions):
        pytest.skip("the installed module is stripped")
    return functions


@x86
@every_isa
@pytest.mark.parametrize(
    ("stage", "storage"),
    [
        (f"{name}::stage{i}", storage)
        for name, rule in RULES.items()
        if name != "adafactor"  # it computes nothing, and g++ leaves no loop
        for i, stage in enumerate(rule.stages)
        for storage in (*STORAGES, *(WIDE if {*rule.state} & {*stage.elements} else ()))
    ],
)
def test_the_loop_of_every_stage_works_on_whole_vectors(stage, storage, isa, installed):
    function = kernel(installed, isa, f"rules::{stage}", storage)
    if converts(isa, storage):  # its own loops convert: below
        assert_steps_fp32(function, isa)
    else:
        assert_vectorised(function, VECTORS[isa])


@x86
@every_isa
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("stage", ["squared_stage", "magnitude_stage"])
def test_the_loop_of_the_reduce_pass_works_on_whole_vectors(stage, storage, isa, installed):
    function = kernel(installed, isa, stage, storage)
    if converts(isa, storage):
        assert_steps_fp32(function, isa)
    else:
        assert_vectorised(function, VECTORS[isa])


@x86
@pytest.mark.parametrize("isa", ["v3", "v4"])
@pytest.mark.parametrize(
    ("name", "instruction"),
    [("narrow(", "vcvtps2ph"), ("widen_any<pyupdate::{0}::fp16>(", "vcvtph2ps")],
)
def test_fp16_is_converted_by_whole_vectors(name, instruction, isa, installed):
    wanted = f"pyupdate::{isa}::(anonymous namespace)::{name.format(isa)}"
    (function,) = (f for found, f in installed.items() if wanted in found)
    bodies = [[text for text in body if instruction in text] for body in function.loops()]
    assert any(body and all(VECTORS[isa] in text for text in body) for body in bodies)


@x86
@every_isa
@pytest.mark.parametrize("half", ["bf16", "fp16"])
def test_the_loop_that_rounds_by_chance_works_on_whole_vectors(half, isa, installed):
    name = f"pyupdate::{isa}::(anonymous namespace)::round<pyupdate::{isa}::{half}>"
    (function,) = (f for found, f in installed.items() if name in found)
    products = [
        [text for text in body if re.search(r"\bv?pmulld\b", text)] for body in function.loops()
    ]
    assert any(body and all(VECTORS[isa] in text for text in body) for body in products)


@x86
def test_nothing_in_the_module_fuses_a_multiplication_with_an_addition(installed):
    for function in installed.values():
        assert not any(FUSED.search(text) for _, text in function.code), function.name


@x86
@every_isa
def test_nothing_in_a_fresh_object_fuses_and_its_loops_work_on_whole_vectors(isa, toy_build):
    functions = disassembled(toy_build.objects[isa])
    # Not toy_two::stage1: g++ 12 keeps its branch on a sum, which all elements share, in the loop.
    for stage in ("adamw::stage0", "toy_two::stage0", "toy_three::stage1", "toy_three::stage2"):
        assert_vectorised(kernel(functions, isa, f"rules::{stage}", "fp32"), VECTORS[isa])
    for function in functions.values():
        assert not any(FUSED.search(text) for _, text in function.code), function.name


@every_isa
def test_no_symbol_of_one_build_can_stand_in_for_another(isa, toy_build):
    """The linker keeps one copy of a weak symbol: the v4 copy must never serve the v2 build."""
    lines = run(tool("nm"), "-C", "--defined-only", toy_build.objects[isa]).splitlines()
    symbols = [line.split(maxsplit=2)[1:] for line in lines]
    shared = [name for kind, name in symbols if kind not in "tdrb"]
    assert shared, "the object offers nothing"
    for name in shared:
        assert re.match(rf"(guard variable for |vtable for )?pyupdate::{isa}::", name), name


@x86
def test_these_tests_would_notice(tmp_path):
    """A contracted loop shows its fused instructions, an unvectorised one its lack of vectors."""
    source = tmp_path / "loop.cpp"
    source.write_text(
        "void loop(float* a, const float* b, int n) {\n"
        "#pragma GCC ivdep\n"
        "  for (int i = 0; i < n; ++i) a[i] = a[i] * b[i] + 1.5f;\n}\n"
    )

    def loop(*flags: str) -> Function:
        path = tmp_path / "loop.o"
        run(compiler(), *FLAGS, *flags, "-c", source, "-o", path)
        disassembled.cache_clear()
        return disassembled(path)["loop(float*, float const*, int)"]

    v4 = ("-march=x86-64-v4", "-mprefer-vector-width=512")
    assert_vectorised(loop(*v4), "zmm")
    contracted = loop(*v4, "-ffp-contract=fast")
    assert any(FUSED.search(text) for _, text in contracted.code)
    for wrong in (loop(*v4, "-fno-tree-vectorize"), loop("-march=x86-64-v3")):
        with pytest.raises(AssertionError, match="no loop of"):
            assert_vectorised(wrong, "zmm")
