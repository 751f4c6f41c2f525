# SPDX-License-Identifier: Apache-2.0
"""What many tests share: back ends, instruction sets and threads of this machine."""

from __future__ import annotations

import gc
import os
import platform
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

# Read when torch loads OpenMP: threads that wait give the core away. Two that spin on two cores
# that others use too made a step of 1 ms take 22.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from all_pairs import leave_what_repeats
from compiling import Build, build_toys, device_module

import pyupdate
from pyupdate.backends import BACKENDS, available

REASONS = dict(available())
"""Why each back end cannot run here; None if it can."""

ISAS = ("v2", "v3", "v4") if platform.machine() in ("x86_64", "AMD64") else ("plain",)
"""The builds of csrc/cpu/passes.cpp."""


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> Iterator[None]:
    """Leave what other processes run: PYUPDATE_TEST_PART=1/3 is every third test, from the second.

    `make gpu` has no pytest-xdist.
    """
    leave_what_repeats(items)
    for item in items:
        is_marked = isinstance(item, pytest.Function) and item.get_closest_marker("slow_reference")
        if is_marked and item.callspec.params["backend"] == "reference":
            item.add_marker(pytest.mark.slow)
    yield  # -k and -m choose
    part = os.environ.get("PYUPDATE_TEST_PART")
    if part is None:
        return
    here, count = (int(number) for number in part.split("/"))
    config.hook.pytest_deselected(items=[x for i, x in enumerate(items) if i % count != here])
    items[:] = items[here::count]


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Have the garbage collector leave alone what is there before the first test.

    Beside 18,000 tests one `gc.collect()` takes 0.45 s, and many tests ask for several.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Have it collected at the end: a library of torch's reports what is left as leaked."""
    gc.unfreeze()


def _backends() -> list[Any]:
    skip = pytest.mark.skip
    return [
        pytest.param(name, marks=[skip(reason=f"{name}: {reason}")] if reason else [])
        for name, reason in REASONS.items()
        if any(backend.name == name and backend.takes("cpu") for backend in BACKENDS)
    ]


@pytest.fixture(params=_backends())
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every back end of CPU tensors in turn, in force during the test; skipped with the reason."""
    with pyupdate.use_backend(request.param):
        yield request.param


@pytest.fixture(scope="session")
def compiled() -> Any:
    """The compiled module; the test is skipped with the reason where there is none."""
    if REASONS["cpu"] is not None:
        pytest.skip(f"cpu: {REASONS['cpu']}")
    from pyupdate import _C

    return _C


@pytest.fixture
def isas(compiled: Any) -> Iterator[list[str]]:
    """The instruction sets that this machine can run; the one in force is restored."""
    before = compiled.isa()
    yield compiled.isas()
    compiled.use_isa(before)


@pytest.fixture
def isa(request: pytest.FixtureRequest, compiled: Any) -> Iterator[str]:
    """One instruction set, in force during the test: parametrise it indirectly with `ISAS`."""
    if request.param not in compiled.isas():
        pytest.skip(f"this machine cannot run {request.param}: {compiled.isas()}")
    before = compiled.isa()
    compiled.use_isa(request.param)
    yield request.param
    compiled.use_isa(before)


@pytest.fixture
def threads() -> Iterator[tuple[int, ...]]:
    """Thread counts to try with torch.set_num_threads; the one in force is restored."""
    before = torch.get_num_threads()
    yield (1, 2, 3, 7)
    torch.set_num_threads(before)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Torch has two threads; the number in force is restored."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def backend_of_case(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs a test that is parametrised by a `training.Case` on the back end of its case."""
    case = request.node.callspec.params.get("case") if hasattr(request.node, "callspec") else None
    with nullcontext() if case is None else case.on_backend():
        yield


@pytest.fixture(scope="session")
def toy_build() -> Build:
    """The CMake build of the toy rules; the test is skipped where there is no compiler."""
    return build_toys()


@pytest.fixture(scope="session")
def cuda_module() -> Any:
    """pyupdate._cuda over its very kernels, run on the CPU; skipped where there is no compiler."""
    return device_module("_cuda_on_cpu")


@pytest.fixture(scope="session")
def recorded_module() -> Any:
    """pyupdate._cuda without kernels; skipped where there is no compiler."""
    return device_module("_cuda_recorded")


@pytest.fixture
def wide_scalars(request: pytest.FixtureRequest) -> Iterator[None]:
    """Makes fp64 the default, of which torch then makes the scalars (mu_product) of a case's rule.

    In fp32 they are the coarsest numbers of an fp64 step: torch rounds a product before it uses it,
    pyupdate when it is stored, so the two would differ by 1e-8.
    """
    case = request.node.callspec.params.get("case") if hasattr(request.node, "callspec") else None
    if getattr(case, "rule", None) is None or not getattr(case.rule, "scalars", None):
        yield
        return
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
