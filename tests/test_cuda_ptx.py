# SPDX-License-Identifier: Apache-2.0
"""The PTX that nvcc makes of the shipped CUDA kernels, run on the CPU: no fault, the oracle's bits.

Every access is checked against what the launch may touch and may write (cuda_ptx.py). `make test`
runs three rules as for sm_90, `make gpu-emulate` every rule as for each architecture whose PTX
differs.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import cuda_ptx
import numpy as np
import pytest
from compiling import ROOT
from cuda_cases import (
    OPTIONS,
    STORAGES,
    Asked,
    assert_same,
    expected,
    group_of,
    joint_plan,
    mixed_plan,
    row_of,
)
from device.machine_code import FAMILIES, FORBIDDEN
from device.ptx import translate

from pyupdate.kernels.rules import RULES

# One stage; three sums and a turn; scalars that prepare counts.
SOME = {name: RULES[name] for name in ("adamw", "lamb", "nadam")}

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH to make PTX")


def plain(text: str) -> str:
    """PTX without what names its architecture and its compiler."""
    return re.sub(r"^(//.*|\.version.*|\.target.*)\n", "", text, flags=re.M)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> cuda_ptx.Program:
    folder = tmp_path_factory.mktemp("sm_90")
    texts = cuda_ptx.all_ptx(folder, SOME, 90, range(len(STORAGES)))
    return cuda_ptx.build(folder, SOME, texts)


# What options do is also shown of the sources (test_cuda_on_cpu.py), where a case takes a tenth.
OFTEN = [("adamw", "plain"), ("adamw", "all"), ("lamb", "all"), ("nadam", "all")]
REST = [(rule, options) for rule in SOME for options in OPTIONS if (rule, options) not in OFTEN]


@pytest.mark.parametrize(
    ("rule", "options"), [*OFTEN, *(pytest.param(*case, marks=pytest.mark.slow) for case in REST)]
)
def test_options_on_every_storage(program: cuda_ptx.Program, rule: str, options: str) -> None:
    groups, rows = mixed_plan(rule, OPTIONS[options], 51)
    found = cuda_ptx.run_steps(program, groups, rows, OPTIONS[options], order=5, blocks=7)
    assert_same(found, expected(groups, rows, OPTIONS[options]), rows)


@pytest.mark.parametrize("order", [0, 1])
def test_many_chunks_in_any_order(program: cuda_ptx.Program, order: int) -> None:
    rng = np.random.default_rng(52)
    groups = [group_of("lamb", count=1)]
    rows = [row_of(rng, groups, 0, 70_003, shift=shift) for shift in (0, 1)]
    found = cuda_ptx.run_steps(
        program, groups, rows, OPTIONS["clip"], order=order, blocks=1 + 5 * order
    )
    assert_same(found, expected(groups, rows, OPTIONS["clip"]), rows)


def test_several_plans_in_one_step(program: cuda_ptx.Program) -> None:
    groups, rows, asked = joint_plan(tuple(SOME), 54)
    found = cuda_ptx.run_steps(program, groups, rows, asked, order=3, blocks=5)
    assert_same(found, expected(groups, rows, asked), rows)


def test_no_fused_or_approximate_operation(program: cuda_ptx.Program) -> None:
    for module in (program.reduce, *program.apply.values()):
        assert not FORBIDDEN.findall(module.text)


# ----- faults planted in the sources, each caught by what it does

PLANTED = {
    "one element too far in the tail": (
        "device.h",
        "for (int i = packs * V; i < count; ++i)",
        "for (int i = packs * V; i <= count; ++i)",
        "out of bounds",
    ),
    "a shared index off by one": (
        "sums.cuh",
        "tree[threadIdx.x] = x;",
        "tree[threadIdx.x + 1] = x;",
        "out of bounds store",
    ),
    "a barrier in a divergent branch": (
        "sums.cuh",
        "tree[threadIdx.x] = x;\n  __syncthreads();",
        "tree[threadIdx.x] = x;\n  if (threadIdx.x < 96) __syncthreads();",
        "divergent barrier",
    ),
    "found_inf == 1": (
        "finish.cuh",
        "*request.found_inf != 0.0f",
        "*request.found_inf == 1.0f",
        "outcome of step 0",
    ),
    "a missing barrier": (
        "sums.cuh",
        "tree[threadIdx.x] = x;\n  __syncthreads();",
        "tree[threadIdx.x] = x;",
        "outcome of step 0",
    ),
}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.slow  # test_cuda_faults.py has them too, in the sources
@pytest.mark.parametrize("what", PLANTED)
def test_a_fault_planted_in_the_reduce_pass(
    program: cuda_ptx.Program, folder: Path, what: str
) -> None:
    file, old, new, said = PLANTED[what]
    path = folder / "csrc" / "cuda" / file
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    (reduce,) = cuda_ptx.all_ptx(folder, SOME, 90, [], folder / "csrc").values()
    program = replace(program, reduce=translate(reduce, folder))
    rng = np.random.default_rng(53)
    groups = [group_of("adamw")]
    rows = [row_of(rng, groups, 0, size) for size in (4_003, 17_001)]
    asked = Asked(reduce=True, max_norm=0.1, found_inf=2.0 if what.startswith("found") else 0.0)
    with pytest.raises(AssertionError, match=said):
        found = cuda_ptx.run_steps(program, groups, rows, asked)
        assert_same(found, expected(groups, rows, asked), rows)


# ----- everything

# nvcc makes the same PTX for the members of a family, but for the line that names the target;
# `plain` leaves that out. So one of each runs, and the others are compared with it.


@pytest.fixture(scope="module", params=sorted(set(FAMILIES.values())), ids="sm_{}".format)
def texts(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, dict[str, str]]:
    folder = tmp_path_factory.mktemp(f"all-{request.param}")
    return request.param, cuda_ptx.all_ptx(folder, RULES, request.param, range(len(STORAGES)))


@pytest.fixture(scope="module")
def every(
    texts: tuple[int, dict[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> cuda_ptx.Program:
    return cuda_ptx.build(tmp_path_factory.mktemp("every"), RULES, texts[1])


@pytest.mark.slow
def test_which_architectures_have_the_same_ptx(
    texts: tuple[int, dict[str, str]], tmp_path: Path
) -> None:
    first, wanted = texts
    for other in (each for each, family in FAMILIES.items() if family == first != each):
        found = cuda_ptx.all_ptx(tmp_path, RULES, other, range(len(STORAGES)))
        assert found.keys() == wanted.keys()
        for name, text in found.items():
            assert plain(text) == plain(wanted[name]), f"sm_{other}, {name}"
            assert f".target sm_{other}\n" in text


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_in_every_storage(every: cuda_ptx.Program, rule: str) -> None:
    for options in ("scaler", "all"):  # halves rounded to nearest, and by chance
        groups, rows = mixed_plan(rule, OPTIONS[options], 54)
        found = cuda_ptx.run_steps(every, groups, rows, OPTIONS[options], order=3)
        assert_same(found, expected(groups, rows, OPTIONS[options]), rows)


@pytest.mark.slow
def test_no_fused_or_approximate_operation_in_any_rule(
    texts: tuple[int, dict[str, str]],
) -> None:
    for text in texts[1].values():
        assert not FORBIDDEN.findall(text)
