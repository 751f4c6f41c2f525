# SPDX-License-Identifier: Apache-2.0
"""What tests on a GPU share: its back ends, runs on them, and the same runs by ``cpu``.

``PYUPDATE_TEST_DEVICE=cpu`` runs what needs no GPU over tests/device, which shows that the tests
themselves are right: `cuda` by its kernels as host C++, `triton` (slow) by its PTX.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from cases import CASES, DTYPES, FULL, FULL_OTHERS, WHOLE_TENSOR, Case
from torch import nn
from ways import plan_of

import pyupdate
from pyupdate.backends import available

DEVICE = os.environ.get("PYUPDATE_TEST_DEVICE", "cuda")
ADAMW = next(case for case in FULL if case.name == "adamw")
MOMENTUM = next(case for case in CASES if case.name == "sgd_momentum")
LAMB = next(case for case in WHOLE_TENSOR if case.name == "lamb")
ONE_A_RULE = (*FULL, *FULL_OTHERS, *WHOLE_TENSOR)
SIZES = (0, 1, 7, 2049, 3, 16_385, 70_001)
FP32 = (torch.float32,)


def _marks(name: str) -> list[pytest.MarkDecorator]:
    if DEVICE == "cpu":
        return [pytest.mark.slow] if name == "triton" else []
    reason = dict(available())[name]
    return [pytest.mark.skip(reason=f"back end {name}: {reason}")] if reason else []


def param_of(name: str, *values: Any) -> Any:
    """A test's parameters behind the name of a back end, skipped where that cannot run."""
    return pytest.param(name, *values, marks=_marks(name), id="-".join(map(str, (name, *values))))


on_each = pytest.mark.parametrize("on", [param_of("cuda"), param_of("triton")])
"""`make gpu` tells the tests of `triton` by that word in their names."""
on_a_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="it needs a GPU itself")
on_two_gpus = pytest.mark.skipif(
    DEVICE != "cuda" or torch.cuda.device_count() < 2, reason="it needs two GPUs"
)
# What torch says at the first use of it, which says nothing of ours.
debug_mode_is_new = pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
nothing_captured = pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")


def crossed(cases: Sequence[Case], some: Sequence[Case]) -> Any:
    """Every case on ``cuda``, some on ``triton``, which compiles each for a second a dtype."""
    rows = [("cuda", case) for case in cases] + [("triton", case) for case in some]
    return pytest.mark.parametrize(("on", "case"), [param_of(*row) for row in rows])


@cache
def _module() -> Any:
    from compiling import device_module

    return device_module("_cuda_on_cpu")


@contextmanager
def inside(on: str) -> Iterator[None]:
    """Steps by this back end, whatever its device is."""
    if DEVICE == "cuda":
        with pyupdate.use_backend(on):
            yield
    elif on == "triton":
        from device.triton_backend import triton_backend

        with triton_backend():
            yield
    else:
        from device_on_cpu import cuda_on_cpu

        with cuda_on_cpu(_module()):
            yield


# ----- tensors ------------------------------------------------------------------------------------


def parameters(device: str, dtypes: tuple[torch.dtype, ...] = FP32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [
        nn.Parameter(torch.randn(n, generator=generator).to(device, dtypes[i % len(dtypes)]))
        for i, n in enumerate(SIZES)
    ]


def put_gradients(params: Sequence[torch.Tensor], turn: int, *, bad: bool = False) -> None:
    """New values in the gradients, which stay where they are."""
    generator = torch.Generator().manual_seed(100 + turn)
    for param in params:
        values = (2.0 * torch.randn(param.shape, generator=generator)).to(param.dtype)
        if bad and values.numel() == 2049:
            values[-1] = math.inf
        if param.grad is None:
            param.grad = values.to(param.device)
        else:
            param.grad.copy_(values)


def assert_same(found: torch.optim.Optimizer, expected: torch.optim.Optimizer) -> None:
    """Parameters and state have the same bits."""
    for group, other in zip(found.param_groups, expected.param_groups, strict=True):
        for i, (param, twin) in enumerate(zip(group["params"], other["params"], strict=True)):
            assert_same_bits(param.detach().cpu(), twin, f"parameter {i}")
            assert found.state[param].keys() == expected.state[twin].keys()
            for key, value in expected.state[twin].items():
                assert_same_bits(found.state[param][key].cpu(), value, f"{key} of {i}")


# ----- runs ---------------------------------------------------------------------------------------


def trained(
    case: Case,
    device: str,
    bad: tuple[int, ...] = (),
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    **options: Any,
) -> tuple[torch.optim.Optimizer, list[str]]:
    params = parameters(device, dtypes)
    groups: list[dict[str, Any]] = [
        {"params": params[:4]},
        {"params": params[4:], "lr": case.options["lr"] / 2},
    ]
    optimizer = case.ours(groups, **options)  # type: ignore[arg-type]
    told = []
    for turn in range(4):
        put_gradients(params, turn, bad=turn in bad)
        optimizer.step()
        told.append(str(pyupdate.last_update(optimizer)))
    return optimizer, told


def assert_same_run(on: str, case: Case, **more: Any) -> None:
    """`trained` comes to the bits of ``cpu`` and says the same of every step."""
    with pyupdate.use_backend("cpu"):
        expected, told = trained(case, "cpu", **more)
    with inside(on):
        found, others = trained(case, DEVICE, **more)
        assert plan_of(found).backends == (on,)
    assert_same(found, expected)
    assert others == told


def both(on: str, run: Any) -> None:
    """`run(device)` gives an optimizer and what is equal beside it; the same on both."""
    with pyupdate.use_backend("cpu"):
        expected, told = run("cpu")
    with inside(on):
        found, others = run(DEVICE)
    assert_same(found, expected)
    assert others == told


@contextmanager
def captured(graph: torch.cuda.CUDAGraph) -> Iterator[None]:
    """`torch.cuda.graph`, which leaves its stream where the end of a capture raises."""
    before = torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            yield
    finally:
        torch.cuda.set_stream(before)
