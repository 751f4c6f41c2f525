# SPDX-License-Identifier: Apache-2.0
"""Whole steps through the back end ``cuda``, its kernels run on the CPU: the bits of ``cpu``.

The module is pyupdate._cuda with the CPU as its device (tests/device): the same refresh, tables,
kernels and front end as on a GPU. What a step sends and when it may is test_cuda_sending.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from bits import assert_same_bits
from cases import CASES, DTYPES, FULL, OTHERS, WHOLE_TENSOR, Case
from device_on_cpu import cuda_on_cpu
from torch import nn
from ways import plan_of

import pyupdate
from pyupdate import backends
from pyupdate.backends.cuda_memory import Memory
from pyupdate.pytorch import plan

ADAMW = next(case for case in FULL if case.name == "adamw")
MOMENTUM = next(case for case in CASES if case.torch_class is torch.optim.SGD and case.rule.state)
SIZES = (0, 1, 7, 2049, 3, 16_385)

Scenario = Callable[[], tuple[list[torch.Tensor], torch.optim.Optimizer]]


@pytest.fixture
def on_cuda(cuda_module: Any) -> Iterator[Any]:
    """A context in which parameters on the CPU are stepped by the CUDA sources."""

    @contextmanager
    def inside() -> Iterator[None]:
        with cuda_on_cpu(cuda_module):
            yield

    return inside


def assert_same_state(found: torch.optim.Optimizer, expected: torch.optim.Optimizer) -> None:
    for group, other in zip(found.param_groups, expected.param_groups, strict=True):
        for i, (param, twin) in enumerate(zip(group["params"], other["params"], strict=True)):
            assert_same_bits(param, twin, f"parameter {i}")
            inner, outer = found.state.get(param, {}), expected.state.get(twin, {})
            assert inner.keys() == outer.keys(), i
            for key, value in outer.items():
                assert_same_bits(inner[key], value, f"{key} of {i}")


def assert_same_run(
    scenario: Scenario, on_cuda: Any, backends_of: tuple[str, ...] = ("cuda",)
) -> Any:
    """What a scenario comes to on both back ends; the one of ``cuda`` is returned."""
    expected_rest, expected = scenario()
    with on_cuda():
        found_rest, found = scenario()
        assert plan_of(found).backends == backends_of
    assert_same_state(found, expected)
    for k, (a, b) in enumerate(zip(found_rest, expected_rest, strict=True)):
        assert_same_bits(a, b, f"result {k}")
    return found


def parameters(dtypes: tuple[torch.dtype, ...] = DTYPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [
        nn.Parameter(torch.randn(n, generator=generator).to(dtypes[i % len(dtypes)]))
        for i, n in enumerate(SIZES)
    ]


def give_gradients(params: list[nn.Parameter], turn: int, *, bad: bool = False) -> None:
    generator = torch.Generator().manual_seed(100 + turn)
    for param in params:
        param.grad = (2.0 * torch.randn(param.shape, generator=generator)).to(param.dtype)
    if bad:
        grad = params[3].grad
        assert grad is not None
        grad[-1] = math.inf


def facts(optimizer: Any) -> list[torch.Tensor]:
    last = pyupdate.last_update(optimizer)
    assert last is not None
    norm = -1.0 if last.norm is None else last.norm
    return [torch.tensor([norm, last.skipped, last.multiplier], dtype=torch.float64)]


def trained(
    case: Case, *, steps: int = 3, dtypes: tuple[torch.dtype, ...] = DTYPES, **options: Any
) -> Scenario:
    def run() -> tuple[list[torch.Tensor], torch.optim.Optimizer]:
        params = parameters(dtypes)
        lr = case.options["lr"]
        groups: list[dict[str, Any]] = [
            {"params": params[:4]},
            {"params": params[4:], "lr": lr / 2},
        ]
        optimizer = case.ours(groups, **options)  # type: ignore[arg-type]
        told = []
        for turn in range(steps):
            give_gradients(params, turn)
            optimizer.step()
            told += facts(optimizer)
        return told, optimizer

    return run


# ----- rules and options --------------------------------------------------------------------------


@pytest.mark.parametrize("case", [*CASES, *OTHERS, *WHOLE_TENSOR], ids=str)
def test_every_rule(case, on_cuda, compiled):
    assert_same_run(trained(case, max_norm=0.7), on_cuda)


@pytest.mark.parametrize("case", FULL, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_norm": 0.7, "norm_type": math.inf, "skip_nonfinite": True, "clip_value": 0.3},
        {"ema_decay": 0.9, "max_norm": 0.5},
        {"state_dtype": torch.float32},
        {"stochastic_rounding": True, "seed": 5},
    ],
    ids=str,
)
def test_every_option(case, options, on_cuda, compiled):
    assert_same_run(trained(case, **options), on_cuda)


@pytest.mark.parametrize("name", ["Muon", "Adafactor"])
def test_what_finishes_outside_a_rule(name, on_cuda, compiled):
    def run() -> tuple[list[torch.Tensor], torch.optim.Optimizer]:
        generator = torch.Generator().manual_seed(7)
        params = [nn.Parameter(torch.randn(n, 6, generator=generator)) for n in (4, 6, 9)]
        optimizer = getattr(pyupdate.optim, name)(params, lr=0.01, max_norm=0.5)
        for _ in range(3):
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator)
            optimizer.step()
        return facts(optimizer), optimizer

    assert_same_run(run, on_cuda)


def test_muon_without_a_norm_or_a_scaler_waits_for_nothing(on_cuda, monkeypatch, compiled):
    param = nn.Parameter(torch.ones(4, 6))
    optimizer = pyupdate.optim.Muon([param], lr=0.01)

    def read(self: torch.Tensor) -> Any:
        pytest.fail("the step waits for the device")

    with on_cuda():
        for _ in range(3):
            param.grad = torch.ones(4, 6)
            optimizer.step()
            for name in ("item", "tolist", "__float__", "__bool__"):
                monkeypatch.setattr(torch.Tensor, name, read)
        monkeypatch.undo()


def test_what_does_not_fill_its_memory_is_left_to_reference_and_said(on_cuda, compiled, caplog):
    def run() -> tuple[list[torch.Tensor], torch.optim.Optimizer]:
        generator = torch.Generator().manual_seed(7)
        whole = torch.randn(4, 6, generator=generator)
        params = [nn.Parameter(torch.randn(5, generator=generator)), nn.Parameter(whole[:, ::2])]
        optimizer = pyupdate.optim.NAdam(params, lr=0.01, max_norm=0.5)
        for _ in range(3):
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator)
            optimizer.step()
        return [*facts(optimizer), whole], optimizer

    backends.say_once.cache_clear()
    assert_same_run(run, on_cuda, ("cuda", "reference"))
    said = [record.message for record in caplog.records]
    assert len(said) == 1 and "does not lie in plain memory" in said[0], said


def test_maximize_has_the_sign_of_its_group(on_cuda, compiled):
    assert_same_run(trained(ADAMW, max_norm=0.7, maximize=True), on_cuda)


# ----- scalers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [ADAMW, MOMENTUM], ids=str)
@pytest.mark.parametrize("bad", [(), (1,), (2, 3)], ids=str)
@pytest.mark.parametrize("unscaled", [False, True], ids=["whole", "unscaled before"])
def test_a_scaler_is_read_and_told_on_the_device(case, bad, unscaled, on_cuda, compiled):
    def run() -> tuple[list[torch.Tensor], torch.optim.Optimizer]:
        params = parameters((torch.float32,))
        optimizer = case.ours(params, max_norm=0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=3.0, growth_interval=2)
        scaler.scale(torch.zeros(()))
        scales = []
        for turn in range(5):
            give_gradients(params, turn, bad=turn in bad)
            if unscaled:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            last = pyupdate.last_update(optimizer)
            assert last is not None
            assert last.skipped is (turn in bad)
            scales.append(torch.tensor(scaler.get_scale()))
        return scales, optimizer

    assert_same_run(run, on_cuda)


def test_two_optimizers_tell_one_scaler(on_cuda, compiled):
    # update() adds the flags up in the first one's memory: what was skipped must still be known.
    def run() -> tuple[list[torch.Tensor], torch.optim.Optimizer]:
        both = [parameters((torch.float32,)) for _ in range(2)]
        optimizers = [ADAMW.ours(params) for params in both]
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale(torch.zeros(()))
        give_gradients(both[0], 0)
        give_gradients(both[1], 1, bad=True)
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        told = [pyupdate.last_update(optimizer) for optimizer in optimizers]
        assert [last is not None and last.skipped for last in told] == [False, True]
        return [torch.tensor(scaler.get_scale())], optimizers[0]

    assert_same_run(run, on_cuda)


@pytest.mark.parametrize("case", [ADAMW, MOMENTUM], ids=str)
def test_a_skipped_first_step_leaves_zeros_and_no_count(case, on_cuda, compiled):
    def run(turns: range) -> torch.optim.Optimizer:
        params = parameters((torch.float32,))
        optimizer = case.ours(params, skip_nonfinite=True)
        for turn in turns:
            give_gradients(params, turn, bad=turn == 0)
            optimizer.step()
            if turn == 0:
                for param, before in zip(params, parameters((torch.float32,)), strict=True):
                    assert_same_bits(param, before, "a parameter of a skipped step")
                    for key, value in optimizer.state[param].items():
                        assert not value.any(), key
        return optimizer

    expected = run(range(1, 4))
    with on_cuda():
        found = run(range(4))
    assert_same_state(found, expected)


def test_error_if_nonfinite_raises_and_writes_nothing(on_cuda, compiled):
    with on_cuda():
        params = parameters((torch.float32,))
        optimizer = ADAMW.ours(params, max_norm=1.0, error_if_nonfinite=True)
        give_gradients(params, 0, bad=True)
        with pytest.raises(RuntimeError, match="non-finite"):
            optimizer.step()
        for param, before in zip(params, parameters((torch.float32,)), strict=True):
            assert_same_bits(param, before, "a parameter")


# ----- what is there, and when --------------------------------------------------------------------


@pytest.mark.parametrize("case", FULL, ids=str)
@pytest.mark.parametrize("skip", [False, True], ids=["", "after a skip"])
def test_rows_of_other_ages_keep_their_own_counts(case, skip, on_cuda, compiled):
    # Row 1 misses turn 1, row 2 turn 2: both have made as many steps, unless turn 1 was skipped.
    def run() -> tuple[list[torch.Tensor], torch.optim.Optimizer]:
        params = parameters((torch.float32,))
        optimizer = case.ours(params, skip_nonfinite=True)
        for turn in range(6):
            give_gradients(params, turn, bad=skip and turn == 1)
            for late in (1, 2):
                if turn == late:
                    params[late].grad = None
            if turn < 3:
                params[5].grad = None
            if skip and turn == 0:
                params[4].grad = None
            optimizer.step()
        return facts(optimizer), optimizer

    assert_same_run(run, on_cuda)


def test_a_count_that_is_written_by_hand_is_its_rows_alone(on_cuda, compiled):
    def run() -> tuple[list[torch.Tensor], torch.optim.Optimizer]:
        params = parameters((torch.float32,))
        optimizer = ADAMW.ours(params)
        for turn in range(6):
            give_gradients(params, turn)
            if turn == 2:
                optimizer.state[params[4]]["step"].fill_(40.0)
            if turn == 4:
                optimizer.state[params[1]]["exp_avg"].zero_()
            optimizer.step()
        return facts(optimizer), optimizer

    assert_same_run(run, on_cuda)


@pytest.mark.parametrize("case", FULL, ids=str)
def test_a_state_dict_moves_between_the_back_ends(case, on_cuda, compiled):
    def run(*on: bool) -> torch.optim.Optimizer:
        params = parameters((torch.float32, torch.bfloat16))
        optimizer = case.ours(params, max_norm=0.8)
        for turn, there in enumerate(on):
            with on_cuda() if there else nullcontext():
                fresh = case.ours(params, max_norm=0.8)
                fresh.load_state_dict(optimizer.state_dict())
                optimizer = fresh
                for k in range(2):
                    give_gradients(params, 2 * turn + k)
                    optimizer.step()
        return optimizer

    assert_same_state(run(True, False, True, True), run(False, False, False, False))


@pytest.mark.parametrize("case", FULL, ids=str)
def test_memory_that_moved_is_found(case, on_cuda, compiled):
    def run() -> tuple[list[torch.Tensor], torch.optim.Optimizer]:
        params = parameters()
        optimizer = case.ours(params, ema_decay=0.5)
        for turn in range(4):
            give_gradients(params, turn)
            if turn == 2:
                params[3].data = params[3].detach().clone()
                for key, value in optimizer.state[params[5]].items():
                    optimizer.state[params[5]][key] = value.clone()
            optimizer.step()
        return facts(optimizer), optimizer

    assert_same_run(run, on_cuda)


def test_other_layouts_are_brought_into_the_parameters(on_cuda, compiled):
    def run() -> tuple[list[torch.Tensor], torch.optim.Optimizer]:
        generator = torch.Generator().manual_seed(2)
        param = nn.Parameter(torch.randn(4, 3, 5, 6, generator=generator))
        param.data = param.data.to(memory_format=torch.channels_last)
        optimizer = ADAMW.ours([param], max_norm=1.0)
        for turn in range(3):
            grad = torch.randn(4, 3, 5, 6, generator=generator)
            param.grad = grad.to(memory_format=torch.channels_last) if turn == 1 else grad
            optimizer.step()
        return facts(optimizer), optimizer

    assert_same_run(run, on_cuda)


def test_memory_with_gaps_is_left_to_reference(on_cuda, compiled):
    def run() -> torch.optim.Optimizer:
        generator = torch.Generator().manual_seed(2)
        whole = torch.randn(6, 8, generator=generator)
        params = [nn.Parameter(whole[:, :5]), nn.Parameter(torch.randn(9, generator=generator))]
        optimizer = ADAMW.ours(params, max_norm=0.4)
        for _ in range(3):
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator)
            optimizer.step()
        return optimizer

    expected = run()
    with on_cuda():
        found = run()
    assert plan_of(found).backends == ("cuda", "reference")
    assert_same_state(found, expected)


@pytest.mark.parametrize("case", FULL, ids=str)
def test_a_norm_over_two_back_ends(case, on_cuda, compiled):
    expected_told, expected = trained(case, max_norm=0.7, skip_nonfinite=True)()
    with on_cuda():
        turn = [0]
        rows = (plan.backend_for("cpu"), next(b for b in backends.BACKENDS if b.name == "cpu"))

        def alternating(device_type: str) -> backends.Backend:
            turn[0] += 1
            return rows[turn[0] % 2]

        with mock.patch.object(plan, "backend_for", alternating):
            told, found = trained(case, max_norm=0.7, skip_nonfinite=True)()
    assert plan_of(found).backends == ("cpu", "cuda")
    assert_same_state(found, expected)
    for a, b in zip(told, expected_told, strict=True):
        assert_same_bits(a, b, "norm, skip, multiplier")


def test_an_lr_in_a_tensor_is_read_where_it_is(on_cuda, compiled, monkeypatch):
    sent = []
    send = Memory.send
    monkeypatch.setattr(Memory, "send", lambda *a: sent.append(a[3:5]) or send(*a))

    def run() -> tuple[list[torch.Tensor], torch.optim.Optimizer]:
        params = parameters((torch.float32,))
        lr = torch.tensor(0.01)
        optimizer = pyupdate.optim.AdamW(params, lr=lr)
        give_gradients(params, 0)
        for turn in range(4):
            lr.fill_(0.01 / (turn + 1))
            optimizer.step()
        return [lr], optimizer

    assert_same_run(run, on_cuda)
    assert len(sent) == 1  # the gradients stayed in place, so only the first step sent anything
