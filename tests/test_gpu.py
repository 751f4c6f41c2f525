# SPDX-License-Identifier: Apache-2.0
"""On a GPU: the bits of ``cpu``, graphs, streams, no wait, more than 2**31 elements.

Skipped without one. ``PYUPDATE_TEST_DEVICE=cpu`` runs what needs no GPU over tests/device, which
shows that the tests themselves are right.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from cases import CASES, DTYPES, FULL, OTHERS, WHOLE_TENSOR, Case
from torch import nn
from ways import plan_of

import pyupdate
from pyupdate.backends import available

DEVICE = os.environ.get("PYUPDATE_TEST_DEVICE", "cuda")
REASON = dict(available())["cuda"]
ADAMW = next(case for case in FULL if case.name == "adamw")
SIZES = (0, 1, 7, 2049, 3, 16_385, 70_001)

pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and REASON is not None, reason=f"back end cuda: {REASON}"
)
on_a_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="it needs a GPU itself")
# What torch says at the first use of it, which says nothing of ours.
debug_mode_is_new = pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
nothing_captured = pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")


@pytest.fixture(autouse=True)
def on_the_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Makes `inside` the back end ``cuda``, whatever its device is."""
    global _inside
    if DEVICE == "cuda":
        _inside = lambda: pyupdate.use_backend("cuda")  # noqa: E731
    else:
        from device_on_cpu import cuda_on_cpu

        module = request.getfixturevalue("cuda_module")
        _inside = lambda: cuda_on_cpu(module)  # noqa: E731
    yield


_inside: Any = nullcontext


@contextmanager
def inside() -> Iterator[None]:
    with _inside():
        yield


def parameters(
    device: str, dtypes: tuple[torch.dtype, ...] = (torch.float32,)
) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [
        nn.Parameter(torch.randn(n, generator=generator).to(device, dtypes[i % len(dtypes)]))
        for i, n in enumerate(SIZES)
    ]


def put_gradients(params: list[nn.Parameter], turn: int, *, bad: bool = False) -> None:
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
    for group, other in zip(found.param_groups, expected.param_groups, strict=True):
        for i, (param, twin) in enumerate(zip(group["params"], other["params"], strict=True)):
            assert_same_bits(param.detach().cpu(), twin, f"parameter {i}")
            assert found.state[param].keys() == expected.state[twin].keys()
            for key, value in expected.state[twin].items():
                assert_same_bits(found.state[param][key].cpu(), value, f"{key} of {i}")


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


def assert_same_run(case: Case, **more: Any) -> None:
    with pyupdate.use_backend("cpu"):
        expected, told = trained(case, "cpu", **more)
    with inside():
        found, others = trained(case, DEVICE, **more)
        assert plan_of(found).backends == ("cuda",)
    assert_same(found, expected)
    assert others == told


# ----- bits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [*CASES, *OTHERS, *WHOLE_TENSOR], ids=str)
def test_every_rule(case):
    assert_same_run(case, max_norm=0.7)


@pytest.mark.parametrize("case", FULL, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_norm": 0.7, "norm_type": math.inf, "skip_nonfinite": True, "bad": (2,)},
        {"clip_value": 0.3, "ema_decay": 0.9},
        {"state_dtype": torch.float32},
        {"stochastic_rounding": True, "seed": 5},
    ],
    ids=str,
)
def test_every_option(case, options):
    assert_same_run(case, **options)


@pytest.mark.parametrize("case", [ADAMW], ids=str)
def test_a_small_run_for_the_sanitizer(case):
    # What `make gpu` runs under compute-sanitizer: every pass, storage and option, few elements.
    options = {"max_norm": 0.7, "clip_value": 0.5, "ema_decay": 0.9, "skip_nonfinite": True}
    assert_same_run(case, bad=(1,), **options)
    lamb = next(case for case in WHOLE_TENSOR if case.name == "lamb")
    assert_same_run(lamb, max_norm=0.7)


# ----- scalers ------------------------------------------------------------------------------------


@debug_mode_is_new
def test_a_scaler_on_the_device_never_waits():
    def run(device: str) -> tuple[torch.optim.Optimizer, float]:
        params = parameters(device)
        optimizer = ADAMW.ours(params, max_norm=0.9)
        scaler = torch.amp.GradScaler(device, init_scale=3.0, growth_interval=2)
        scaler.scale(torch.zeros((), device=device))
        for turn in range(6):
            put_gradients(params, turn, bad=turn == 3)
            watched = device == "cuda" and turn > 0
            if watched:
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")
            try:
                scaler.step(optimizer)
                scaler.update()
            finally:
                if watched:
                    torch.cuda.set_sync_debug_mode("default")
        return optimizer, scaler.get_scale()

    with pyupdate.use_backend("cpu"):
        expected, scale = run("cpu")
    with inside():
        found, other = run(DEVICE)
    assert_same(found, expected)
    assert other == scale


# ----- streams and graphs -------------------------------------------------------------------------


LONG = 2**30
"""Cycles, half a second: far more than a step takes the host."""


def prepared(device: str, turns: int) -> list[list[torch.Tensor]]:
    """Gradients of the turns, on the device before anything is asked of them."""
    params = parameters(device)
    found = []
    for turn in range(turns):
        put_gradients(params, turn)
        found.append([param.grad.clone() for param in params if param.grad is not None])
    return found


def stepped(
    device: str, turns: int, before: Callable[[int], None]
) -> Callable[[], torch.optim.Optimizer]:
    """Steps of AdamW whose gradients are copied on the device; `before` a turn, something else."""
    grads = prepared(device, turns)
    params = parameters(device)
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer = ADAMW.ours(params, max_norm=0.7)

    def run() -> torch.optim.Optimizer:
        for turn, values in enumerate(grads):
            before(turn)
            for param, value in zip(params, values, strict=True):
                assert param.grad is not None
                param.grad.copy_(value)
            optimizer.step()
        return optimizer

    return run


@on_a_gpu
def test_a_step_goes_to_the_callers_stream():
    # In the last turn everything is known and nothing sent: the stream sleeps, then copies the
    # gradients. What was launched on another stream reads those of the turn before.
    with pyupdate.use_backend("cpu"):
        expected = stepped("cpu", 4, lambda turn: None)()
    side, asleep = torch.cuda.Stream(), torch.cuda.Event()

    def sleep_before_the_last(turn: int) -> None:
        torch.cuda.synchronize()
        if turn == 3:
            torch.cuda._sleep(LONG)
            asleep.record(side)

    with inside():
        run = stepped(DEVICE, 4, sleep_before_the_last)
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            found = run()
        assert not asleep.query(), "the last step waited for the device, so this shows nothing"
        torch.cuda.current_stream().wait_stream(side)
    assert_same(found, expected)


@contextmanager
def captured(graph: torch.cuda.CUDAGraph) -> Iterator[None]:
    """`torch.cuda.graph`, which stays on its own stream where the end of a capture raises."""
    before = torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            yield
    finally:
        torch.cuda.set_stream(before)


@on_a_gpu
@pytest.mark.parametrize("case", FULL, ids=str)
def test_a_captured_step_counts_and_skips_on(case):
    options: dict[str, Any] = {"max_norm": 0.7, "skip_nonfinite": True, "ema_decay": 0.9}
    bad = (5, 7)

    def eager(device: str) -> torch.optim.Optimizer:
        params = parameters(device)
        optimizer = case.ours(params, **options)
        for turn in range(10):
            put_gradients(params, turn, bad=turn in bad)
            optimizer.step()
        return optimizer

    with pyupdate.use_backend("cpu"):
        expected = eager("cpu")
    with inside():
        params = parameters(DEVICE)
        found = case.ours(params, **options)
        for turn in range(3):
            put_gradients(params, turn)
            found.step()
        graph = torch.cuda.CUDAGraph()
        put_gradients(params, 3)
        torch.cuda.synchronize()
        with captured(graph):
            found.step()
        for turn in range(3, 10):
            put_gradients(params, turn, bad=turn in bad)
            graph.replay()
        torch.cuda.synchronize()
    assert_same(found, expected)


@on_a_gpu
@nothing_captured
def test_a_capture_that_would_send_is_refused():
    with inside():
        params = parameters(DEVICE)
        optimizer = ADAMW.ours(params)
        for turn in range(2):
            put_gradients(params, turn)
            optimizer.step()
        params[3].grad = params[3].grad.clone()  # type: ignore[union-attr]
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with (
            pytest.raises(RuntimeError, match="the gradient of 'group 0, parameter 3' is another"),
            captured(graph),
        ):
            optimizer.step()
        optimizer.step()  # outside, where it may send


# ----- sizes --------------------------------------------------------------------------------------


@on_a_gpu
def test_more_than_2_to_the_31_elements():
    count, part = 2**31 + 16_391, 16_384
    needed = 5 * 2 * count
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"it needs {needed / 2**30:.0f} GiB of GPU memory")
    generator = torch.Generator().manual_seed(6)
    values, grads = (torch.randn(part, generator=generator).bfloat16() for _ in range(2))

    def repeated(pattern: torch.Tensor) -> torch.Tensor:
        whole = torch.empty(count, dtype=pattern.dtype, device=DEVICE)
        rows = count // part
        whole[: rows * part].view(rows, part).copy_(pattern.to(DEVICE))
        whole[rows * part :].copy_(pattern[: count - rows * part])
        return whole

    with inside():
        large = nn.Parameter(repeated(values))
        large.grad = repeated(grads)
        pyupdate.optim.AdamW([large], lr=0.01, clip_value=0.5).step()
        ours = large.detach()
        torch.cuda.synchronize()
    with pyupdate.use_backend("cpu"):
        small = nn.Parameter(values.clone())
        small.grad = grads.clone()
        pyupdate.optim.AdamW([small], lr=0.01, clip_value=0.5).step()
    rows = count // part
    expected = small.detach().to(DEVICE)
    assert bool((ours[: rows * part].view(rows, part) == expected).all())
    assert torch.equal(ours[rows * part :], expected[: count - rows * part])


@on_a_gpu
def test_two_gpus_have_one_norm_and_one_skip():
    if torch.cuda.device_count() < 2:
        pytest.skip("it needs two GPUs")
    with pyupdate.use_backend("cpu"):
        expected, _ = trained(ADAMW, "cpu", max_norm=0.7, skip_nonfinite=True, bad=(2,))
    params = parameters("cuda:0", DTYPES)
    for i in (1, 3, 5):
        params[i] = nn.Parameter(params[i].detach().to("cuda:1"))
    lr = ADAMW.options["lr"]
    groups: list[Any] = [{"params": params[:4]}, {"params": params[4:], "lr": lr / 2}]
    with inside():
        found = ADAMW.ours(groups, max_norm=0.7, skip_nonfinite=True)
        for turn in range(4):
            put_gradients(params, turn, bad=turn == 2)
            found.step()
    assert_same(found, expected)
