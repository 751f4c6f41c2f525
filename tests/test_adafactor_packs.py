# SPDX-License-Identifier: Apache-2.0
"""Adafactor's packs and stacks: what parameters of one sweep share, and that it shows in no bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adafactor_cases import assert_close, give, params_of, values
from bits import assert_same_bits
from cases import DTYPES, name_of

from pyupdate.optim import Adafactor, adafactor_packs, adafactor_stacks
from pyupdate.pytorch.engines import engine_of, last_step


@pytest.mark.parametrize("shape", [(3,), (4, 3)], ids=str)
@pytest.mark.parametrize("kind", ["packs", "stacks", "packs of different shapes"])
def test_operations_do_not_grow_with_the_number_of_parameters(shape, kind, monkeypatch):
    class Counting(torch.overrides.TorchFunctionMode):
        calls = 0

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            name = getattr(func, "__name__", "")
            assert name not in ("item", "__float__", "__bool__"), name
            if name not in ("__get__", "detach", "new_zeros", "dim", "numel", "new_empty"):
                self.calls += 1
            return func(*args, **(kwargs or {}))

    if kind == "stacks":
        monkeypatch.setattr(adafactor_packs, "SMALL", 0)

    def calls_of(count: int) -> int:
        from pyupdate.optim.adafactor import _finish

        more = range(count) if "different" in kind else [0] * count
        shapes = [(shape[0] + i, *shape[1:]) for i in more]
        params = params_of(torch.float32, shapes)
        optimizer = Adafactor(params)
        for seed in (2, 3):
            give(params, values(seed, torch.float32, shapes))
            optimizer.step()
        (plan,) = engine_of(optimizer).plans.values()
        last = last_step(optimizer)
        assert last is not None
        with Counting() as counting:
            _finish(optimizer, plan.rows, last)
        return counting.calls

    assert calls_of(9) == calls_of(2) > 0


def test_of_one_element_there_are_two_averages():
    """More of them than elements, in a pack that follows a smaller one."""
    shapes = ((1, 1), (1, 1), (1, 1), (1, 1))
    params, twins = params_of(torch.float64, shapes), params_of(torch.float64, shapes)
    groups = [[{"params": of[:1]}, {"params": of[1:]}] for of in (params, twins)]
    ours, theirs = Adafactor(groups[0], lr=0.5), torch.optim.Adafactor(groups[1], lr=0.5)
    for seed in (2, 3, 4):
        give(params, values(seed, torch.float64, shapes))
        give(twins, values(seed, torch.float64, shapes))
        ours.step()
        theirs.step()
    for param, twin in zip(params, twins, strict=True):
        assert_close(param, twin, 1.0 + twin.detach().abs(), "one element")
        for key, value in theirs.state[twin].items():
            assert_close(ours.state[param][key], value, value.abs(), key)


def test_large_stacks_are_parted_without_a_difference(monkeypatch):
    monkeypatch.setattr(adafactor_packs, "SMALL", 0)
    made = []
    for most in (2**20, 20):
        monkeypatch.setattr(adafactor_stacks, "BLOCK", most)
        params = params_of(torch.float32, [(4, 3)] * 5)
        give(params, values(2, torch.float32, [(4, 3)] * 5))
        Adafactor(params).step()
        made.append(params)
    for one, other in zip(*made, strict=True):
        assert_close(one, other, other.detach().abs(), "parted")


MIXED = (
    (2, 3, 4),
    (7,),
    (8, 3),
    (),
    (33, 2),
    (1, 5),
    (3, 4),
    (2, 2, 3, 4),
    (1100,),
    (5, 1),
    (70, 30),
    (5, 4, 3, 3),
    (2, 3, 3),
    (6, 4, 4, 1),
    (1, 4, 1),
)
"""Some made of matrices of one shape, many or few; sums of more than one run."""


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("most", [2**17, 40])
def test_company_in_a_pack_makes_no_difference(dtype, most, monkeypatch, backend):
    """Of other shapes, other step counts and other layouts of gradients and state."""
    monkeypatch.setattr(adafactor_packs, "PACK", most)
    options: dict[str, Any] = {"lr": 0.75, "weight_decay": 0.25, "beta2_decay": -0.5}
    options |= {"clip_value": 1.5, "maximize": True}
    params, twins = params_of(dtype, MIXED), params_of(dtype, MIXED)
    together, alone = Adafactor(params, **options), [Adafactor([p], **options) for p in twins]
    for seed in range(2, 7):
        grads: list[Any] = values(seed, dtype, MIXED)
        if seed == 3:
            grads[::2] = [None] * len(grads[::2])  # these are a step behind
        if seed == 5:
            grads = [torch.stack([grad, grad], -1)[..., 0] for grad in grads]
            state = together.state[params[2]]
            state["row_var"] = torch.stack([state["row_var"]] * 2, -1)[..., 0]
        for param, twin, grad in zip(params, twins, grads, strict=True):
            param.grad, twin.grad = grad, None if grad is None else grad.clone()
        together.step()
        for one in alone:
            one.step()
    for param, twin, one in zip(params, twins, alone, strict=True):
        what = f"{tuple(param.shape)} in company"
        assert_same_bits(param.detach(), twin.detach(), what)
        for key, value in one.state[twin].items():
            assert_same_bits(together.state[param][key], value, f"{key} of {what}")
    every = engine_of(together).known.swept
    packs = [one for one in every if isinstance(one, adafactor_packs.Pack)]
    assert packs == every and (len(packs) > 3) == (most == 40)
