# SPDX-License-Identifier: Apache-2.0
"""Parameters whose values were swapped for others: they stay the optimizer's, as in torch.

By ``torch.utils.swap_tensors``, or by ``Module.to`` where
``torch.__future__.set_swap_module_params_on_conversion`` says so. The truth is torch's own loop.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from training import loss_of, network

import pyupdate

K = 3


def swap(model: nn.Module) -> None:
    for index, param in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(index)
        values = torch.randn(param.shape, generator=generator, dtype=param.dtype)
        torch.utils.swap_tensors(param, nn.Parameter(values))


def convert(model: nn.Module) -> None:
    model.to(torch.float32).to(torch.float64)


@pytest.fixture
def swapping() -> Iterator[None]:
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


changes = pytest.mark.parametrize("change", [swap, convert], ids=lambda found: found.__name__)


def built(**options: Any) -> Any:
    model = pyupdate.build(network(), "adamw", lr=0.05, **options)
    model.twin = [copy.deepcopy(network())]  # in a list, so it is no submodule
    model.other = torch.optim.AdamW(model.twin[0].parameters(), lr=0.05, foreach=False)
    return model


def torchs_step(model: Any, seeds: range) -> None:
    (twin,) = model.twin
    model.other.zero_grad()
    for seed in seeds:
        (loss_of(twin, seed).mean() / len(seeds)).backward()
    model.other.step()
    for param, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(param, expected, rtol=1e-12, atol=1e-14)


def by_update_model(model: Any, seed: int) -> None:
    pyupdate.update_model(model, loss_of(model, seed), retain_graph=False)


def by_loop(model: Any, seed: int) -> None:
    model.current_optimizer.zero_grad()
    loss_of(model, seed).mean().backward()
    model.current_optimizer.step()  # which leaves the gradients there


WAYS: dict[str, tuple[Callable[[Any, int], None], dict[str, Any]]] = {
    "update_model": (by_update_model, {}),
    "loop": (by_loop, {}),
    "windows": (by_update_model, {"accumulation_steps": K}),
    "windows, loop": (by_loop, {"accumulation_steps": K}),
    "in_backward": (by_update_model, {"in_backward": True}),
}


@changes
@pytest.mark.parametrize("way", WAYS)
def test_a_swap_between_steps(way, change, swapping, backend):
    one, options = WAYS[way]
    model = built(**options)
    length = options.get("accumulation_steps", 1)
    for turn in range(4):
        seeds = range(turn * length, (turn + 1) * length)
        for seed in seeds:
            one(model, seed)
        torchs_step(model, seeds)
        if turn < 3:
            for each in (model, *model.twin):
                change(each)


@pytest.mark.parametrize("way", ["windows", "windows, loop"])
def test_a_conversion_inside_a_window_is_refused(way, swapping, backend):
    one, options = WAYS[way]
    model = built(**options)
    one(model, 0)
    for each in (model, *model.twin):
        convert(each)
    with pytest.raises(RuntimeError, match=r"'0.weight' is another tensor by now.*swap tensors"):
        one(model, 1)
    model.zero_grad()
    for seed in range(K):
        one(model, seed)
    torchs_step(model, range(K))


def test_update_model_begins_a_window_anew_where_the_gradients_went_with_a_swap(backend):
    model = built(accumulation_steps=K)
    by_update_model(model, 7)
    for each in (model, *model.twin):
        swap(each)
    for seed in range(K):
        by_update_model(model, seed)
    torchs_step(model, range(K))


def test_a_gradient_that_comes_after_a_swap_in_a_window_is_refused(backend):
    first, late = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = pyupdate.optim.SGD([first, late], lr=1.0, accumulation_steps=K)
    first.sum().backward()
    optimizer.step()
    torch.utils.swap_tensors(late, nn.Parameter(torch.ones(1)))
    (first + late).sum().backward()
    with pytest.raises(ValueError, match="was not in its group yet, or not swapped yet"):
        optimizer.step()


def test_hooks_of_ones_own_stay_through_a_swap_and_an_update_in_backward(backend):
    model = built(in_backward=True)
    weight = model[0].weight
    called: list[torch.Tensor] = []
    handle = weight.register_post_accumulate_grad_hook(called.append)
    by_update_model(model, 0)
    swap(model)
    by_update_model(model, 1)
    by_update_model(model, 2)
    assert [found is weight for found in called] == [True] * 3
    handle.remove()
    by_update_model(model, 3)
    assert len(called) == 3


def test_gradients_are_added_beside_a_hook_that_went_through_a_swap(backend):
    """A hook has what was in `.grad` stay there, and hooks tell then what the loss reached."""
    model = built()
    weight: Any = next(model.parameters())
    called: list[Any] = []
    handle = weight.register_post_accumulate_grad_hook(called.append)
    swap(model)
    with torch.no_grad():
        for param, twin in zip(model.parameters(), model.twin[0].parameters(), strict=True):
            twin.copy_(param)
    loss_of(model, 0).mean().backward()
    called.clear()
    pyupdate.update_model(model, loss_of(model, 1))
    handle.remove()
    assert called == [weight]
    model.other.zero_grad()
    for seed in range(2):
        loss_of(model.twin[0], seed).mean().backward()
    model.other.step()
    for param, expected in zip(model.parameters(), model.twin[0].parameters(), strict=True):
        torch.testing.assert_close(param, expected, rtol=1e-12, atol=1e-14)


def test_a_window_keeps_no_parameter_of_a_removed_group(backend):
    params = [nn.Parameter(torch.zeros(1)) for _ in range(3)]
    groups = [{"params": params[:1]}, {"params": params[1:]}]
    optimizer = pyupdate.optim.SGD(groups, lr=1.0, accumulation_steps=K)
    (params[0] + params[1]).sum().backward()
    optimizer.step()
    alive = [weakref.ref(param) for param in params]
    del optimizer.param_groups[1], groups, params
    gc.collect()
    assert [found() is not None for found in alive] == [True, False, False]
