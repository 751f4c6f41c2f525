# SPDX-License-Identifier: Apache-2.0
"""On a GPU: streams, CUDA graphs, more than 2**31 elements, two GPUs. Skipped without one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import DTYPES
from gpu_runs import (
    ADAMW,
    DEVICE,
    FP32,
    LAMB,
    MOMENTUM,
    ONE_A_RULE,
    assert_same,
    captured,
    crossed,
    inside,
    nothing_captured,
    on_a_gpu,
    on_each,
    on_two_gpus,
    parameters,
    put_gradients,
    trained,
)
from torch import nn

import pyupdate

LONG = 2**30
"""Cycles, half a second: far more than a step takes the host."""
# Backward on another stream than the one of a parameter's first use: here it is meant.
streams_differ = pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream does not")


def stepped(
    device: str, before: Callable[[int], None], *, backward: bool = False
) -> Callable[[], torch.optim.Optimizer]:
    """Four steps whose gradients are made on the device; `before` a turn, something else.

    All that comes from the host is there before: a copy of it would wait for the stream.
    """
    params = parameters(device)
    turns = []
    for turn in range(4):
        put_gradients(params, turn)
        turns.append([param.grad.clone() for param in params if param.grad is not None])
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer = ADAMW.ours(params, max_norm=0.7)

    def run() -> torch.optim.Optimizer:
        for turn, values in enumerate(turns):
            before(turn)
            if backward:
                for param in params:
                    assert param.grad is not None
                    param.grad.zero_()
                pairs = zip(params, values, strict=True)
                torch.stack([(param * value).sum() for param, value in pairs]).sum().backward()
            else:
                for param, value in zip(params, values, strict=True):
                    assert param.grad is not None
                    param.grad.copy_(value)
            optimizer.step()
        return optimizer

    return run


@on_a_gpu
@streams_differ
@on_each
@pytest.mark.parametrize("backward", [False, True], ids=["step", "backward"])
def test_a_step_goes_to_the_callers_stream(on, backward):
    # In the last turn everything is known and nothing sent: the stream sleeps, then the gradients
    # are made. What was launched on another stream reads those of the turn before.
    with pyupdate.use_backend("cpu"):
        expected = stepped("cpu", lambda turn: None, backward=backward)()
    side, asleep = torch.cuda.Stream(), torch.cuda.Event()

    def sleep_before_the_last(turn: int) -> None:
        torch.cuda.synchronize()
        if turn == 3:
            torch.cuda._sleep(LONG)
            asleep.record(side)

    with inside(on):
        run = stepped(DEVICE, sleep_before_the_last, backward=backward)
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            found = run()
        assert not asleep.query(), "the last step waited for the device, so this shows nothing"
        torch.cuda.current_stream().wait_stream(side)
    assert_same(found, expected)


@crossed((ADAMW,), ())
@pytest.mark.parametrize("backward", [False, True], ids=["step", "backward"])
def test_those_steps_are_right_without_a_stream(on, case, backward):
    # Of the two tests' own run, what needs no GPU.
    assert case is ADAMW
    with pyupdate.use_backend("cpu"):
        expected = stepped("cpu", lambda turn: None)()
    with inside(on):
        found = stepped(DEVICE, lambda turn: None, backward=backward)()
    assert_same(found, expected)


# ----- graphs -------------------------------------------------------------------------------------


@on_a_gpu
@crossed(ONE_A_RULE, (ADAMW, MOMENTUM, LAMB))
def test_a_captured_step_counts_and_skips_on(on, case):
    options: dict[str, Any] = {"max_norm": 0.7, "skip_nonfinite": True, "ema_decay": 0.9}
    bad = (5, 7)
    with pyupdate.use_backend("cpu"):
        params = parameters("cpu")
        expected = case.ours(params, **options)
        for turn in range(10):
            put_gradients(params, turn, bad=turn in bad)
            expected.step()
    with inside(on):
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
@on_each
def test_a_capture_that_would_send_is_refused(on):
    with inside(on):
        params = parameters(DEVICE)
        optimizer = ADAMW.ours(params)
        for turn in range(2):
            put_gradients(params, turn)
            optimizer.step()
        params[3].grad = params[3].grad.clone()  # type: ignore[union-attr]
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        why = {
            "cuda": "the gradient of 'group 0, parameter 3' is another",
            "triton": "an address or the set of gradients has changed",
        }
        with pytest.raises(RuntimeError, match=why[on]), captured(graph):
            optimizer.step()
        optimizer.step()  # outside, where it may send


# ----- sizes --------------------------------------------------------------------------------------


@on_a_gpu
@on_each
def test_more_than_2_to_the_31_elements(on):
    count, part = 2**31 + 16_391, 16_384
    rows, rest = divmod(count, part)
    needed = 5 * 2 * count
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"it needs {needed / 2**30:.0f} GiB of GPU memory")
    generator = torch.Generator().manual_seed(6)
    values, grads = (torch.randn(part, generator=generator).bfloat16() for _ in range(2))
    squares = grads.double().square()
    norm = math.sqrt(rows * float(squares.sum()) + float(squares[:rest].sum()))

    def repeated(pattern: torch.Tensor) -> torch.Tensor:
        whole = torch.empty(count, dtype=pattern.dtype, device=DEVICE)
        whole[: rows * part].view(rows, part).copy_(pattern.to(DEVICE))
        whole[rows * part :].copy_(pattern[:rest])
        return whole

    def options(max_norm: float) -> dict[str, Any]:
        return {"lr": 0.01, "clip_value": 0.5, "max_norm": max_norm, "skip_nonfinite": True}

    with pyupdate.use_backend("cpu"):
        small = nn.Parameter(values.clone())
        small.grad = grads.clone()
        pyupdate.optim.AdamW([small], **options(1e9)).step()
    expected = small.detach().to(DEVICE)
    with inside(on):
        large = nn.Parameter(repeated(values))
        large.grad = repeated(grads)
        optimizer = pyupdate.optim.AdamW([large], **options(1e9))
        optimizer.step()
        last = pyupdate.last_update(optimizer)
        assert last is not None and last.norm is not None and not last.skipped
        # Of positive numbers, in fp64: 31 additions deep.
        assert abs(last.norm / norm - 1.0) < 1e-13
        large.grad[-1] = math.inf
        optimizer.step()
        last = pyupdate.last_update(optimizer)
        assert last is not None and last.skipped
        torch.cuda.synchronize()
    ours = large.detach()
    assert bool((ours[: rows * part].view(rows, part) == expected).all())
    assert torch.equal(ours[rows * part :], expected[:rest])


# ----- two GPUs -----------------------------------------------------------------------------------


def over_two(dtypes: tuple[torch.dtype, ...]) -> list[nn.Parameter]:
    params = parameters("cuda:0", dtypes)
    for i in (1, 3, 5):
        params[i] = nn.Parameter(params[i].detach().to("cuda:1"))
    return params


@on_two_gpus
@on_each
def test_two_gpus_have_one_norm_and_one_skip(on):
    with pyupdate.use_backend("cpu"):
        expected, _ = trained(ADAMW, "cpu", max_norm=0.7, skip_nonfinite=True, bad=(2,))
    params = over_two(DTYPES)
    lr = ADAMW.options["lr"]
    groups: list[Any] = [{"params": params[:4]}, {"params": params[4:], "lr": lr / 2}]
    with inside(on):
        found = ADAMW.ours(groups, max_norm=0.7, skip_nonfinite=True)
        for turn in range(4):
            put_gradients(params, turn, bad=turn == 2)
            found.step()
    assert_same(found, expected)


@on_two_gpus
@on_each
def test_an_inf_on_both_of_two_gpus_skips_once(on):
    # Torch adds the flags of the devices up: one that asks whether the sum is 1 misses it.
    def run(params: list[nn.Parameter], device: str) -> tuple[torch.optim.Optimizer, float]:
        optimizer = ADAMW.ours(params)
        scaler = torch.amp.GradScaler(device, init_scale=4.0)
        scaler.scale(torch.zeros((), device=device))
        for turn in range(4):
            put_gradients(params, turn)
            if turn == 2:
                for i in (3, 4):  # one of each GPU
                    params[i].grad[-1] = math.inf  # type: ignore[index]
            scaler.step(optimizer)
            scaler.update()
        return optimizer, scaler.get_scale()

    with pyupdate.use_backend("cpu"):
        expected, scale = run(parameters("cpu", FP32), "cpu")
    with inside(on):
        found, other = run(over_two(FP32), "cuda")
    assert_same(found, expected)
    assert other == scale == 2.0
