# SPDX-License-Identifier: Apache-2.0
"""What a step writes, how autograd hears of it, and what it costs in memory."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from bits import array_of, assert_same_bits, oracle_steps, random_values
from cases import DTYPES, FULL, Case, name_of
from torch import nn
from ways import Held, held, optimizer_of, plan_of, snapshot, ways

import pyupdate
from pyupdate.pytorch.engines import last_step

cases = pytest.mark.parametrize("case", FULL, ids=str)
ADAMW = next(case for case in FULL if case.name == "adamw")
MOMENTUM = next(case for case in FULL if case.name == "sgd_momentum")


# ----- guards -------------------------------------------------------------------------------------


@pytest.mark.all_pairs
@cases
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("offset", [0, 1, 24], ids="at{}".format)
def test_nothing_is_written_beside_any_buffer(case: Case, dtype, offset, compiled):
    with pyupdate.use_backend("cpu"):
        _step_between_guards(case, dtype, offset)


def _step_between_guards(case: Case, dtype: torch.dtype, offset: int) -> None:
    rng = np.random.default_rng(31)
    sizes = [*range(71), 127, 1025, 2047, 2049]
    if offset == 0:
        sizes += [16_383, 16_385, 100_003]
    values = [[random_values(rng, n, dtype) for n in sizes] for _ in range(3)]
    places = [held(value, offset=offset) for value in values[0]]
    params = [nn.Parameter(place.tensor) for place in places]
    optimizer = case.ours(params)
    everything: list[Held] = list(places)
    for turn in (1, 2):
        grads = [held(value, offset=offset) for value in values[turn]]
        everything += grads
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.tensor
        optimizer.step()
        for grad, value in zip(grads, values[turn], strict=True):
            assert_same_bits(grad.tensor, value, "a gradient")  # read, never written
        if turn == 1:
            for param in params:
                for key, value in optimizer.state[param].items():
                    everything.append(held(value, offset=offset if value.dim() else 0))
                    optimizer.state[param][key] = everything[-1].tensor
    for i, place in enumerate(everything):
        place.assert_neighbours_untouched(f"buffer {i}")
    for i, param in enumerate(params):
        truth, state = oracle_steps(case, *_arrays(values[0][i], values[1][i], values[2][i]))
        assert_same_bits(param, truth, f"size {sizes[i]}")
        for key, value in state.items():
            assert_same_bits(optimizer.state[param][key], value, f"size {sizes[i]} {key}")
        if case.step_is_counted:
            assert float(optimizer.state[param]["step"]) == 2.0


def _arrays(param: torch.Tensor, *grads: torch.Tensor):
    return array_of(param), [array_of(grad) for grad in grads]


@pytest.mark.slow
@pytest.mark.parametrize("expanded", [False, True])
def test_more_elements_than_32_bits_count(expanded, compiled):
    size = 2**31 + 16_385  # 4 GB of bf16, and as much of gradient unless that is expanded
    param = nn.Parameter(torch.zeros(size, dtype=torch.bfloat16))
    one = torch.ones(1, dtype=torch.bfloat16)
    param.grad = one.expand(size) if expanded else torch.ones_like(param)
    optimizer = pyupdate.optim.SGD([param], lr=1.0, max_norm=1e9)
    with pyupdate.use_backend("cpu"):
        optimizer.step()
    for start in range(0, size, 1 << 28):
        part = param.detach()[start : start + (1 << 28)]
        assert bool((part == -1.0).all()), start
    last = last_step(optimizer)
    assert last is not None and last.norm == size**0.5


# ----- version counters ---------------------------------------------------------------------------


def _written(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    found = {}
    for i, param in enumerate(optimizer.param_groups[0]["params"]):
        if param.grad is None:
            continue
        found[f"parameter {i}"] = param
        found |= {f"{key} of {i}": value for key, value in optimizer.state[param].items()}
    return found


def _three(case: Case, way: str, **more) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    params = [nn.Parameter(torch.linspace(1.0, 2.0, n)) for n in (3, 1, 20_000)]
    optimizer = optimizer_of(way, case, params, **more)
    for param in params:
        param.grad = torch.ones_like(param)
    return params, optimizer


@pytest.mark.all_pairs
@cases
@ways
def test_everything_written_is_known_to_autograd(case: Case, way, backend):
    params, optimizer = _three(case, way)
    for turn in range(8):
        params[1].grad = None if turn in (2, 7) else torch.ones(1)
        if turn == 4:  # state that the plan has not made, in tensors of no common origin
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        before = {key: value._version for key, value in _written(optimizer).items()}
        untouched = params[1]._version
        grads = [param.grad._version for param in params if param.grad is not None]
        optimizer.step()
        for key, value in _written(optimizer).items():
            assert value._version > before.get(key, -1), f"step {turn}: {key}"
        assert [p.grad._version for p in params if p.grad is not None] == grads
        if params[1].grad is None:
            assert params[1]._version == untouched


@pytest.mark.all_pairs
@cases
@ways
@pytest.mark.parametrize("steps_before", [0, 2])
def test_what_is_skipped_is_not_bumped(case: Case, way, steps_before, backend):
    params, optimizer = _three(case, way)
    for _ in range(steps_before):
        optimizer.step()
    params[2].grad[12_345] = float("inf")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(torch.zeros(()))
    before = snapshot(optimizer)
    scaler.step(optimizer)
    assert snapshot(optimizer) == before  # version counters among it


@pytest.mark.all_pairs
@cases
@ways
def test_a_graph_that_needs_old_values_is_refused_by_autograd(case: Case, way, backend):
    params, optimizer = _three(case, way)
    optimizer.step()
    needs_params = [(param * param).sum() for param in params]
    scale = torch.ones((), requires_grad=True)
    held_state = [
        value for key, value in _written(optimizer).items() if not key.startswith("parameter")
    ]
    needs_state = [(value * scale).sum() for value in held_state]
    fine = (params[0] * 3.0).sum()
    optimizer.step()
    for loss in needs_params + needs_state:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    fine.backward()


# ----- memory -------------------------------------------------------------------------------------

COUNT = 1000


@pytest.mark.parametrize("size", [1, 256, 20_000, 40_000])
@pytest.mark.parametrize("reduce", [False, True], ids=["plain", "max_norm"])
def test_a_plan_is_small(size, reduce, compiled):
    def nbytes(count: int) -> int:
        params = [nn.Parameter(torch.zeros(size)) for _ in range(count)]
        with pyupdate.use_backend("cpu"):
            optimizer = pyupdate.optim.AdamW(params, max_norm=1.0 if reduce else None)
            for _ in range(3):
                for param in params:
                    param.grad = torch.ones(size)
                optimizer.step()
        (part,) = plan_of(optimizer).parts
        return part.nbytes

    count = COUNT if size < 1000 else 100
    more = nbytes(2 * count) - nbytes(count)  # what a plan has once is in neither
    chunks = count * -(-size // 16_384)
    assert more <= 200 * count + 16 * chunks


def test_the_size_of_a_plan_counts_its_tables(compiled):
    def nbytes(count: int) -> int:
        params = [nn.Parameter(torch.zeros(2)) for _ in range(count)]
        with pyupdate.use_backend("cpu"):
            optimizer = pyupdate.optim.AdamW(params)
            for param in params:
                param.grad = torch.ones(2)
            optimizer.step()
            optimizer.step()
        (part,) = plan_of(optimizer).parts
        return part.nbytes

    per_tensor = (nbytes(2000) - nbytes(1000)) / 1000
    # A row, its four addresses, and what is held of the optimizer's objects, in 8 bytes each.
    assert per_tensor >= 40 + 4 * 8 + 4 * 8


_BIG_STEP = """
import sys
import torch, pyupdate
from pyupdate.pytorch.engines import last_step

def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024

kind, scaled = sys.argv[1], sys.argv[2] == "True"
small = torch.nn.Parameter(torch.zeros(100))
params = [torch.nn.Parameter(torch.full((16 << 20,), 1.0)) for _ in range(4)]  # 256 MB
for p in [small, *params]:
    p.grad = torch.full_like(p, 2.0)
if kind == "sgd":
    optimizer = pyupdate.optim.SGD([small, *params], lr=0.5, momentum=0.9, max_norm=1e9)
else:
    optimizer = pyupdate.accelerate(torch.optim.AdamW([small, *params]), max_norm=1e9)
scaler = torch.amp.GradScaler("cpu", init_scale=1.0, enabled=scaled)
scaler.scale(torch.zeros(()))
peaks = []
for _ in range(3):
    before = peak()
    scaler.step(optimizer)
    scaler.update()
    peaks.append(peak() - before)
    assert not last_step(optimizer).skipped
    params[0].grad = params[0].grad  # the same memory
print(*peaks)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc/self/status")
@pytest.mark.parametrize(
    ("kind", "scaled"), [pytest.param("sgd", False, marks=pytest.mark.slow), ("adamw", True)]
)
def test_a_step_copies_nothing(kind, scaled, compiled):
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _BIG_STEP, kind, str(scaled)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert out.returncode == 0, out.stderr
    first, *later = (float(peak) for peak in out.stdout.split())  # MB
    state = 256 * (1 if kind == "sgd" else 2)
    # The first step makes the state; a copy of one parameter would be 64 MB.
    assert state - 8 <= first <= state + 32
    assert max(later) <= 16


def _resident() -> int:
    """Pages of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1])


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc/self/statm")
@pytest.mark.slow_reference
@ways
def test_two_thousand_steps_leak_nothing(way, backend):
    params = [nn.Parameter(torch.zeros(n)) for n in (1, 100, 2000)]
    optimizer = optimizer_of(way, ADAMW, params, max_norm=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    scaler.scale(torch.zeros(()))

    def steps(count: int) -> None:
        for turn in range(count):
            for param in params:
                param.grad = torch.ones_like(param)
            if turn % 7 == 3:
                params[1].grad = None
            if turn % 11 == 5:
                params[0].grad[0] = float("nan")
            if turn % 50 == 8:
                optimizer.load_state_dict(optimizer.state_dict())
            if turn % 50 == 9:  # a refusal
                data, params[2].data = params[2].data, params[2].data[:1].expand(2000)
                with pytest.raises(ValueError):
                    optimizer.step()
                params[2].data = data
            scaler.step(optimizer)
            scaler.update(1.0)
        optimizer.zero_grad()

    steps(200)
    gc.collect()
    objects, tensors, pages = len(gc.get_objects()), _tensors(), _resident()
    steps(2000)
    gc.collect()
    assert len(gc.get_objects()) - objects < 100
    assert _tensors() == tensors
    # A leak of one tensor a step of this smallest size would be more than a megabyte.
    assert _resident() - pages < 512


def _tensors() -> int:
    return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())


@ways
@pytest.mark.parametrize("scheduled", [False, True])
def test_an_optimizer_is_freed_when_it_is_dropped(way, scheduled, backend):
    params = [nn.Parameter(torch.zeros(n)) for n in (1, 100)]
    optimizer = optimizer_of(way, MOMENTUM, params)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1) if scheduled else None
    for param in params:
        param.grad = torch.ones_like(param)
    for _ in range(3):
        optimizer.step()
    buffer = weakref.ref(optimizer.state[params[0]]["momentum_buffer"])
    seen = weakref.ref(optimizer)
    del optimizer, scheduler
    gc.collect()
    assert seen() is None and buffer() is None
    param = weakref.ref(params[0])
    del params
    gc.collect()
    assert param() is None


def test_a_cycle_through_a_hook_is_freed(backend):
    # parameter -> hook -> optimizer -> plan -> parameter. (Torch's own optimizers are freed from a
    # cycle through register_hook, but not from one through register_post_accumulate_grad_hook.)
    param = nn.Parameter(torch.ones(3))
    optimizer = pyupdate.optim.AdamW([param])
    param.register_hook(lambda grad, kept=optimizer: None)
    for _ in range(3):
        (param * param).sum().backward()
        optimizer.step()
    seen = weakref.ref(optimizer), weakref.ref(param)
    del optimizer, param
    gc.collect()
    assert [each() for each in seen] == [None, None]


@ways
def test_a_gradient_is_not_kept_alive(way, backend):
    param = nn.Parameter(torch.ones(3))
    optimizer = optimizer_of(way, ADAMW, [param])
    for _ in range(2):
        param.grad = torch.ones(3)
        optimizer.step()
    seen = weakref.ref(param.grad)
    param.grad = None
    assert seen() is None
