# SPDX-License-Identifier: Apache-2.0
"""On a GPU: memory of any layout and alignment, tiny numbers and numbers that change.

How these run without a GPU is said in gpu_runs.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bits import assert_same_bits
from cases import DTYPES
from gpu_runs import ADAMW, DEVICE, LAMB, both, on_a_gpu, on_each
from torch import nn

import pyupdate

GUARD = 7.0
LAYOUTS = ("channels last", "transposed", "slice", "columns", "one element on", "empty", "single")


def _views(layout: str, base: torch.Tensor) -> torch.Tensor:
    """A view of this layout into flat memory, which is larger."""
    views = {
        "channels last": lambda: base[: 8 * 5 * 3 * 3].view(8, 3, 3, 5).permute(0, 3, 1, 2),
        "transposed": lambda: base[: 33 * 65].view(33, 65).t(),
        "slice": lambda: base[: 64 * 64].view(64, 64)[8:40],
        "columns": lambda: base[: 64 * 64].view(64, 64)[:, ::2],
        "one element on": lambda: base[1:4098],
        "empty": lambda: base[:0],
        "single": lambda: base[5],
    }
    return views[layout]()


def _placed(values: torch.Tensor, layout: str, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """These values in memory of a layout, and all of that memory."""
    base = torch.full((4352,), GUARD, dtype=values.dtype, device=device)
    view = _views(layout, base)
    view.copy_(values)
    return view, base


def _like(layout: str, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    shape = _views(layout, torch.empty(4352)).shape
    return torch.randn(shape, generator=generator).to(dtype)


@pytest.mark.parametrize("grads", ["alike", "contiguous", "one element on"])
@pytest.mark.parametrize("case", [ADAMW, LAMB], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_each
def test_any_layout_and_nothing_beside_it(on, dtype, case, grads):
    def run(device: str) -> tuple[torch.optim.Optimizer, list[torch.Tensor]]:
        generator = torch.Generator().manual_seed(3)
        placed = [_placed(_like(name, dtype, generator), name, device) for name in LAYOUTS]
        params = [nn.Parameter(view) for view, _ in placed]
        memory = [base for _, base in placed]
        optimizer = case.ours(params, max_norm=0.7, ema_decay=0.9)
        for _ in range(3):
            for param, name in zip(params, LAYOUTS, strict=True):
                values = _like(name, dtype, generator)
                if grads == "alike":
                    param.grad, base = _placed(values, name, device)
                    memory.append(base)
                elif grads == "contiguous":
                    param.grad = values.to(device).contiguous()
                else:
                    flat = torch.empty(values.numel() + 1, dtype=dtype, device=device)
                    param.grad = flat[1:].view(values.shape).copy_(values)
            optimizer.step()
        return optimizer, [base.cpu() for base in memory]

    memory: list[list[torch.Tensor]] = []

    def told(device: str) -> tuple[torch.optim.Optimizer, str]:
        optimizer, bases = run(device)
        memory.append(bases)
        return optimizer, str(pyupdate.last_update(optimizer))

    both(on, told)
    for found, expected in zip(*memory, strict=True):
        assert_same_bits(found, expected, "memory, with what lies beside the tensors")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_each
def test_subnormal_numbers_stay(on, dtype):
    """A unit that flushes them to zero leaves other bits."""
    least = torch.finfo(dtype).smallest_normal

    def run(device: str) -> tuple[torch.optim.Optimizer, bool]:
        ramp = torch.linspace(-1.0, 1.0, 2049, dtype=torch.float64)
        param = nn.Parameter((ramp * least).to(dtype).to(device))
        optimizer = pyupdate.optim.SGD([param], lr=0.25, momentum=0.5)
        for turn in range(3):
            param.grad = (ramp.roll(turn) * least).to(dtype).to(device)
            optimizer.step()
        size = param.detach().cpu().double().abs()
        return optimizer, bool(((size > 0.0) & (size < least)).sum() > 100)

    both(on, run)
    assert run("cpu")[1]


@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
@on_each
def test_a_learning_rate_that_changes(on, tensor):
    """In one of two groups, by assignment and in place: none is kept from an earlier step."""

    def run(device: str) -> tuple[torch.optim.Optimizer, None]:
        generator = torch.Generator().manual_seed(5)
        params = [nn.Parameter(torch.randn(300, generator=generator).to(device)) for _ in range(4)]
        rate: Any = torch.tensor(0.5, device=device) if tensor else 0.5
        groups = [{"params": params[:2], "lr": rate}, {"params": params[2:]}]
        optimizer = ADAMW.ours(groups)
        for turn in range(6):
            for param in params:
                param.grad = torch.randn(300, generator=generator).to(device)
            group = optimizer.param_groups[0]
            if turn == 3:
                group["lr"] = torch.tensor(0.75, device=device) if tensor else 0.75
            elif tensor:
                group["lr"].mul_(0.5)
            else:
                group["lr"] *= 0.5
            optimizer.step()
        return optimizer, None

    both(on, run)


@on_each
@on_a_gpu
def test_capturable_is_each_groups_own(on):
    def run(device: str) -> tuple[torch.optim.Optimizer, None]:
        generator = torch.Generator().manual_seed(5)
        params = [nn.Parameter(torch.randn(300, generator=generator).to(device)) for _ in range(4)]
        groups: list[dict[str, Any]] = [{"params": params[:2]}, {"params": params[2:]}]
        if device == DEVICE:
            groups[1]["capturable"] = True
        optimizer = ADAMW.ours(groups)
        for _ in range(3):
            for param in params:
                param.grad = torch.randn(300, generator=generator).to(device)
            optimizer.step()
        return optimizer, None

    both(on, run)
