# SPDX-License-Identifier: Apache-2.0
"""``accumulation_steps``: one step on the mean of k micro-batches, in every way a step is made."""

from __future__ import annotations

import copy
import math
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from bits import array_of, assert_same_bits, oracle_steps, random_values
from cases import FULL, Case
from test_scaler import ADAMW, MOMENTUM, SCALE, scaler_of
from torch import nn
from training import batch, loss_of, network
from ways import optimizer_of, ways

import pyupdate
from pyupdate.kernels.rules import multiplier
from pyupdate.pytorch.accumulation import POSITION
from pyupdate.pytorch.engines import engine_of, last_step

K = 3
cases = pytest.mark.parametrize("case", [ADAMW, MOMENTUM], ids=str)


def close(model: nn.Module, truth: nn.Module) -> None:
    for param, other in zip(model.parameters(), truth.parameters(), strict=True):
        torch.testing.assert_close(param, other, rtol=1e-12, atol=1e-14)


def pair(case: Case, way: str = "ours", **options: Any) -> tuple[Any, Any, Any]:
    """A model with an accumulating optimizer, and its twin with torch's."""
    model: Any = network()
    twin = copy.deepcopy(model)
    options = {"accumulation_steps": K} | options
    model.current_optimizer = optimizer_of(way, case, model.parameters(), **options)
    model.model_name = "net"
    return model, twin, case.truth(list(twin.parameters()))


def torchs_window(twin: nn.Module, other: Any, seeds: range, max_norm: float | None) -> None:
    other.zero_grad()
    for seed in seeds:
        (loss_of(twin, seed).mean() / len(seeds)).backward()
    if max_norm is not None:
        torch.nn.utils.clip_grad_norm_(twin.parameters(), max_norm)
    other.step()


# ----- the mean -----------------------------------------------------------------------------------


@cases
@ways
@pytest.mark.parametrize("max_norm", [None, 0.01], ids=["plain", "max_norm"])
@pytest.mark.parametrize("retain", [True, False], ids=["retain", "free"])
def test_update_model_steps_once_a_window(case: Case, way, max_norm, retain, backend):
    model, twin, other = pair(case, way, max_norm=max_norm)
    hooked: list[int] = []
    model.current_optimizer.register_step_pre_hook(lambda *_: hooked.append(1))
    for turn in range(4 * K):
        before = [param.detach().clone() for param in model.parameters()]
        pyupdate.update_model(model, loss_of(model, turn), retain_graph=retain)
        last = (turn + 1) % K == 0
        assert all((p.grad is None) == last for p in model.parameters())
        assert len(hooked) == (turn + 1) // K
        if last:
            torchs_window(twin, other, range(turn + 1 - K, turn + 1), max_norm)
        else:
            assert all(map(torch.equal, model.parameters(), before))
        close(model, twin)


@cases
@ways
@pytest.mark.parametrize("closure", [False, True], ids=["plain", "closure"])
def test_a_loop_of_ones_own(case: Case, way, closure, backend):
    model, twin, other = pair(case, way, max_norm=0.02)
    optimizer = model.current_optimizer
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    others = torch.optim.lr_scheduler.StepLR(other, 1, gamma=0.5)
    hooked: list[int] = []
    optimizer.register_step_post_hook(lambda *_: hooked.append(1))
    for turn in range(3 * K):

        def evaluate(turn: int = turn) -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, turn).mean()
            loss.backward()
            return loss

        if closure:
            expected = loss_of(model, turn).mean().detach()
            assert torch.equal(optimizer.step(evaluate).detach(), expected)
        else:
            evaluate()
            optimizer.step()
        if (turn + 1) % K == 0:
            scheduler.step()
            torchs_window(twin, other, range(turn + 1 - K, turn + 1), 0.02)
            others.step()
        assert len(hooked) == (turn + 1) // K
        close(model, twin)
    optimizer.zero_grad()
    assert all(param.grad is None for param in model.parameters())


@pytest.mark.parametrize("case", FULL, ids=str)
def test_to_the_bit(case: Case, backend):
    # 1 / k is a part of the one multiplier: the norm is that of the mean, and nothing is rounded
    # but the sum of the gradients, which is torch's.
    rng = np.random.default_rng(81)
    start = random_values(rng, 5000, torch.float32)
    parts = [[random_values(rng, 5000, torch.float32) for _ in range(K)] for _ in range(2)]
    param = nn.Parameter(start.clone())
    optimizer = case.ours([param], accumulation_steps=K, max_norm=0.5)
    sums, clips = [], []
    for window in parts:
        param.grad = None
        for part in window:
            param.grad = part.clone() if param.grad is None else param.grad.add_(part)
            optimizer.step()
        last = last_step(optimizer)
        assert last is not None
        assert last.norm is not None
        mean = param.grad.double() / K
        assert last.norm == pytest.approx(float(mean.norm()), rel=1e-6)
        sums.append(array_of(param.grad))
        clips.append(multiplier(last.norm, 1.0 / K, 0.5))
        assert last.multiplier == clips[-1]
    truth, _ = oracle_steps(case, array_of(start), sums, clips)
    assert_same_bits(param, truth, "parameter")


# ----- with a scaler ------------------------------------------------------------------------------


@cases
@pytest.mark.parametrize(
    ("by", "often"),
    [
        pytest.param("update_model", True, id="update each time"),
        pytest.param("update_model", False, id="update once a window"),
        # Torch refuses a second scaler.step before scaler.update.
        pytest.param("step", True, id="step, update each time"),
    ],
)
def test_a_scaler_counts_windows(case: Case, by, often, backend):
    options = {"growth_interval": 2, "growth_factor": 2.0, "backoff_factor": 0.5}
    scaler, expected = scaler_of(**options), scaler_of(**options)
    model, twin, other = pair(case, max_norm=0.05)
    scales = []
    for turn in range(8 * K):
        loss = loss_of(model, turn)
        if turn == 4 * K + 1:
            loss = loss * math.inf
        if by == "update_model":
            pyupdate.update_model(model, loss, scaler=scaler)
        else:
            model.current_optimizer.zero_grad()
            scaler.scale(loss.mean()).backward()
            scaler.step(model.current_optimizer)
        last = (turn + 1) % K == 0
        if often or last:
            scaler.update()
        if last:
            other.zero_grad()
            for seed in range(turn + 1 - K, turn + 1):
                theirs = loss_of(twin, seed).mean() / K
                expected.scale(theirs * math.inf if seed == 4 * K + 1 else theirs).backward()
            expected.unscale_(other)
            torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.05)
            expected.step(other)
            expected.update()
        assert scaler.get_scale() == expected.get_scale(), turn
        assert int(scaler._growth_tracker) == int(expected._growth_tracker) or not (last or often)
        scales.append(scaler.get_scale())
        for param, twins in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(param, twins, rtol=1e-6, atol=1e-9)
    assert len(set(scales)) > 2


def test_a_scale_that_changes_in_a_window_is_refused(backend):
    model, _, _ = pair(ADAMW)
    scaler = scaler_of()
    pyupdate.update_model(model, loss_of(model, 0), scaler=scaler)
    grads = [param.grad for param in model.parameters()]
    scaler.update(2.0 * SCALE)
    with pytest.raises(ValueError, match=r"changed from 128\.0 to 256\.0 inside a window"):
        pyupdate.update_model(model, loss_of(model, 1), scaler=scaler)
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    model.current_optimizer.zero_grad()  # the window was given up, so this drops them
    assert all(param.grad is None for param in model.parameters())
    for turn in range(K):
        pyupdate.update_model(model, loss_of(model, turn), scaler=scaler)
        scaler.update()
    assert last_step(model.current_optimizer) is not None
    pyupdate.update_model(model, loss_of(model, 0), scaler=scaler)
    with pytest.raises(ValueError, match=r"changed from 256\.0 to None"):
        pyupdate.update_model(model, loss_of(model, 1))


def test_unscale_before_the_last_micro_batch_is_refused(backend):
    model, _, _ = pair(ADAMW)
    scaler = scaler_of()
    scaler.scale(loss_of(model, 0).mean()).backward()
    scaler.unscale_(model.current_optimizer)
    with pytest.raises(RuntimeError, match="before the last micro-batch of accumulation_steps"):
        scaler.step(model.current_optimizer)


# ----- deferred, failing, withdrawn, saved --------------------------------------------------------


@pytest.mark.parametrize("drain", ["each time", "once"])
def test_deferred_micro_batches(drain, backend):
    model, twin, other = pair(MOMENTUM)
    waiting: dict[str, Any] = {}
    for turn in range(2 * K):
        before = [param.detach().clone() for param in model.parameters()]
        pyupdate.update_model(model, loss_of(model, turn), defer=True, deferred=waiting)
        assert all(map(torch.equal, model.parameters(), before))
        if drain == "each time" or (turn + 1) % K == 0:
            pyupdate.drain(waiting)
            assert not waiting
        if (turn + 1) % K == 0:
            torchs_window(twin, other, range(turn + 1 - K, turn + 1), None)
        close(model, twin)


def test_what_fails_does_not_count(backend):
    model, twin, other = pair(ADAMW, max_norm=1.0, error_if_nonfinite=True)

    def fails(loss: torch.Tensor, error: type[Exception], words: str) -> None:
        grads = [(p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
        position = model.current_optimizer.param_groups[0].get(POSITION)
        with pytest.raises(error, match=words):
            pyupdate.update_model(model, loss)
        assert model.current_optimizer.param_groups[0].get(POSITION) == position
        for param, (grad, value) in zip(model.parameters(), grads, strict=True):
            assert param.grad is grad
            assert grad is None or torch.equal(grad, value)

    for turn in range(K):
        fails(torch.zeros(()), ValueError, "does not require gradients")
        if turn == K - 1:
            fails(loss_of(model, turn) * math.inf, RuntimeError, "non-finite")
        pyupdate.update_model(model, loss_of(model, turn))
    torchs_window(twin, other, range(K), 1.0)
    close(model, twin)


def test_the_models_zero_grad_withdraws_a_window(backend):
    model, twin, other = pair(ADAMW)
    pyupdate.update_model(model, loss_of(model, 7))
    model.zero_grad()
    for turn in range(K):
        pyupdate.update_model(model, loss_of(model, turn))
    torchs_window(twin, other, range(K), None)
    close(model, twin)


def test_a_state_dict_carries_the_position(backend):
    model, twin, other = pair(ADAMW)
    optimizer = model.current_optimizer
    assert optimizer.state_dict()["param_groups"][0][POSITION] == 0
    pyupdate.update_model(model, loss_of(model, 0))
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved["param_groups"][0][POSITION] == 1
    resumed: Any = copy.deepcopy(network())
    resumed.model_name = "net"
    resumed.current_optimizer = ADAMW.ours(resumed.parameters(), accumulation_steps=K)
    for param, old in zip(resumed.parameters(), model.parameters(), strict=True):
        param.grad = old.grad.clone()
    resumed.current_optimizer.load_state_dict(saved)
    for turn in range(1, K):
        pyupdate.update_model(resumed, loss_of(resumed, turn))
    torchs_window(twin, other, range(K), None)
    close(resumed, twin)
    assert resumed.current_optimizer.state_dict()["param_groups"][0][POSITION] == 0
    with pytest.raises(ValueError, match="to become 1 in an open window, when 1 of 3"):
        pyupdate.accelerate(optimizer)
    model.zero_grad()
    pyupdate.accelerate(optimizer)  # other options: no window any more
    loss_of(model, 0).mean().backward()
    optimizer.zero_grad()
    assert all(param.grad is None for param in model.parameters())


def test_models_that_share_a_group_are_refused_and_groups_of_their_own_are_fine(backend):
    first, second = network(1), network(2)
    together = [*first.parameters(), *second.parameters()]
    shared = pyupdate.optim.SGD(together, lr=0.1, accumulation_steps=K)
    first.current_optimizer = shared  # type: ignore[assignment]
    with pytest.raises(ValueError, match="holds trainable parameters of other models"):
        pyupdate.update_model(first, loss_of(first, 0))
    groups = [{"params": list(first.parameters())}, {"params": list(second.parameters())}]
    both: Any = pyupdate.optim.SGD(groups, lr=0.1, accumulation_steps=2)
    for model in (first, second):
        model.current_optimizer = both
    start = second[0].weight.detach().clone()
    pyupdate.update_model(first, loss_of(first, 0))
    pyupdate.update_model(second, loss_of(second, 0))
    pyupdate.update_model(first, loss_of(first, 1))
    assert [group.get(POSITION) for group in both.param_groups] == [0, 1]
    assert torch.equal(second[0].weight, start)
    assert second[0].weight.grad is not None


def test_a_scheduler_warns_until_a_step_was_made(backend):
    model, _, _ = pair(ADAMW)
    optimizer = model.current_optimizer
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    model(batch(0)).mean().backward()
    optimizer.step()
    with pytest.warns(UserWarning, match=r"lr_scheduler\.step\(\)` before"):
        scheduler.step()
    assert engine_of(optimizer).last is None


def own_loop(**options: Any) -> tuple[nn.Parameter, Any]:
    param = nn.Parameter(torch.zeros(1))
    return param, pyupdate.optim.SGD([param], lr=1.0, accumulation_steps=4, **options)


@pytest.mark.parametrize("steps", [1, 4])
def test_a_loaded_window_without_gradients_is_closed(steps, backend):
    param, optimizer = own_loop()
    (param * 1.0).sum().backward()
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    other = nn.Parameter(torch.zeros(1))
    resumed = pyupdate.optim.SGD([other], lr=1.0, accumulation_steps=steps)
    resumed.load_state_dict(saved)
    assert not resumed.param_groups[0].get(POSITION)


def test_the_models_zero_grad_in_a_loop_of_ones_own_is_refused(backend):
    model, twin, other = pair(ADAMW)
    optimizer = model.current_optimizer
    for turn in range(2):
        optimizer.zero_grad()
        loss_of(model, turn).mean().backward()
        if turn == 0:
            optimizer.step()
            model.zero_grad()
    before = [param.detach().clone() for param in model.parameters()]
    with pytest.raises(RuntimeError, match="1 of accumulation_steps=3 micro-batches were counted"):
        optimizer.step()
    assert all(map(torch.equal, model.parameters(), before))
    for turn in range(K):  # the window was given up, so the first zero_grad drops
        optimizer.zero_grad()
        loss_of(model, turn).mean().backward()
        optimizer.step()
    torchs_window(twin, other, range(K), None)
    close(model, twin)


def test_a_counted_gradient_that_was_dropped_and_did_not_come_back_is_refused(backend):
    kept, dropped = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = pyupdate.optim.SGD([kept, dropped], lr=0.25, accumulation_steps=2)
    (kept + dropped).sum().backward()
    optimizer.step()
    dropped.grad = None
    kept.sum().backward()
    with pytest.raises(RuntimeError, match="1 of accumulation_steps=2 micro-batches were counted"):
        optimizer.step()
    assert (kept.tolist(), dropped.tolist()) == ([0.0], [0.0])


@pytest.mark.parametrize("counted", [1, 2, 3])
@pytest.mark.parametrize("change", ["dropped", "replaced", "swapped"])
def test_a_change_after_any_micro_batch_is_refused_and_frees_the_gradient(counted, change, backend):
    params = [nn.Parameter(torch.zeros(2)) for _ in range(3)]  # the last one has no gradient
    optimizer = pyupdate.optim.SGD(params, lr=0.25, accumulation_steps=4)
    for _ in range(counted):
        (params[0] + params[1]).sum().backward()
        optimizer.step()
    gone = weakref.ref(params[0].grad)
    if change == "swapped":
        params[0].grad, params[1].grad = params[1].grad, params[0].grad
    else:
        params[0].grad = None
        assert gone() is None
        if change == "replaced":  # by what may well have its id
            params[0].grad = torch.ones(2)
    match = f"{counted} of accumulation_steps=4 micro-batches were counted"
    with pytest.raises(RuntimeError, match=match):
        optimizer.step()
    assert not any(param.any() for param in params)


def test_a_gradient_that_arrives_late_in_a_window_is_counted_from_then_on(backend):
    params = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = pyupdate.optim.SGD(params, lr=1.0, accumulation_steps=3)
    for late in (False, True):
        (params[0] + params[1] if late else params[0]).sum().backward()
        optimizer.step()
    params[1].grad = None
    params[0].sum().backward()
    with pytest.raises(RuntimeError, match="2 of accumulation_steps=3 micro-batches were counted"):
        optimizer.step()


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_gradients_that_have_gradients_are_other_tensors_and_the_same_window(backend):
    param, linear = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))
    optimizer = pyupdate.optim.SGD([param, linear], lr=0.25, accumulation_steps=4)
    for _ in range(4):
        (param * param + linear).sum().backward(create_graph=True)
        optimizer.step()
    assert (param.tolist(), linear.tolist()) == ([0.5], [-0.25])
    param.grad = linear.grad = None  # a graph that holds itself


def test_a_group_is_added_between_windows(backend):
    param, optimizer = own_loop()
    late = nn.Parameter(torch.zeros(1))
    param.sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match="1 of accumulation_steps=4 micro-batches were counted"):
        optimizer.add_param_group({"params": [late]})
    assert len(optimizer.param_groups) == 1
    for _ in range(3):
        param.sum().backward()
        optimizer.step()
    assert param.tolist() == [-1.0]
    optimizer.zero_grad()
    optimizer.add_param_group({"params": [late]})
    for _ in range(4):
        (param + 2.0 * late).sum().backward()
        optimizer.step()
    assert (param.tolist(), late.tolist()) == ([-2.0], [-2.0])


def test_a_loaded_window_does_not_count_gradients_that_were_stepped(backend):
    param, optimizer = own_loop()
    for turn in range(4):
        (param * 2.0).sum().backward()
        optimizer.step()
        if turn == 2:
            saved = copy.deepcopy(optimizer.state_dict())
    assert param.tolist() == [-2.0]
    optimizer.load_state_dict(saved)  # says 3, but what is in .grad was stepped
    assert optimizer.param_groups[0][POSITION] == 0
    for _ in range(4):
        optimizer.zero_grad()
        (param * 2.0).sum().backward()
        optimizer.step()
    assert param.tolist() == [-4.0]


def test_a_loaded_count_does_not_replace_that_of_gradients_in_place(backend):
    param, optimizer = own_loop()
    saved = None
    for _ in range(5):
        (param * 2.0).sum().backward()
        optimizer.step()
        if saved is None or optimizer.param_groups[0].get(POSITION) == 3:
            saved = copy.deepcopy(optimizer.state_dict())
        if optimizer.param_groups[0][POSITION] == 0:
            optimizer.zero_grad()
    assert saved is not None
    optimizer.load_state_dict(saved)  # says 3; one micro-batch is in .grad
    assert optimizer.param_groups[0][POSITION] == 1
    assert param.grad is not None
    with torch.no_grad():
        param.grad.copy_(torch.tensor([6.0]))  # the saved window's own gradients
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0][POSITION] == 3
    (param * 2.0).sum().backward()
    optimizer.step()
    assert param.tolist() == [-4.0]
