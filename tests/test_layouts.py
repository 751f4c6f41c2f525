# SPDX-License-Identifier: Apache-2.0
"""Every memory layout gives the bits of the same values held contiguously, and only those change.

The truth is the numpy oracle on the values in index order; with a norm, the same optimizer on the
values in the order of the parameter's memory, which is the order of the sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
import pytest
import torch
from bits import array_of, assert_same_bits, oracle_steps, random_values
from cases import FULL, Case, name_of
from torch import nn
from ways import Held, held, optimizer_of, ways

import pyupdate

STEPS = 3

cases = pytest.mark.parametrize("case", FULL, ids=str)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)


@dataclass(frozen=True)
class Layout:
    """Strides for a shape, and the dims from the slowest to the fastest in memory."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    order: tuple[int, ...]
    offset: int = 0
    """Misalignment, in bytes; -1 for one element."""

    def of(self, values: torch.Tensor) -> Held:
        offset = values.element_size() if self.offset < 0 else self.offset
        return held(values, self.strides, offset=offset)


IMAGE = (5, 6, 7, 8)
LAYOUTS = {
    "contiguous": Layout(IMAGE, (336, 56, 8, 1), (0, 1, 2, 3)),
    "channels-last": Layout(IMAGE, (336, 1, 48, 6), (0, 2, 3, 1)),
    "transposed": Layout(IMAGE, (1, 5, 30, 210), (3, 2, 1, 0)),
    "every-second": Layout(IMAGE, (2 * 336, 2 * 56, 2 * 8, 2), (0, 1, 2, 3)),
    "padded-rows": Layout(IMAGE, (6 * 7 * 13, 7 * 13, 13, 1), (0, 1, 2, 3)),
    "slice-of-transposed": Layout(IMAGE, (1, 9, 90, 900), (3, 2, 1, 0)),
    "by-an-element": Layout(IMAGE, (336, 56, 8, 1), (0, 1, 2, 3), offset=-1),
    "by-a-byte": Layout(IMAGE, (336, 56, 8, 1), (0, 1, 2, 3), offset=1),
    "transposed-by-a-byte": Layout(IMAGE, (1, 5, 30, 210), (3, 2, 1, 0), offset=1),
    "channels-last-by-three-bytes": Layout(IMAGE, (336, 1, 48, 6), (0, 2, 3, 1), offset=3),
    # Strides of dims of one element mean nothing, and torch makes odd ones.
    "ones": Layout((1, 1680, 1), (3, 1, 77), (0, 1, 2)),
    "ones-every-second": Layout((1680, 1), (2, 5), (0, 1)),
    "column": Layout((1680, 1), (1, 1), (0, 1)),
    "scalar": Layout((), (), ()),
    "scalar-by-a-byte": Layout((), (), (), offset=1),
    "empty": Layout((0,), (1,), (0,)),
    "empty-odd": Layout((3, 0, 2), (7, 5, 1), (0, 1, 2)),
    # Two chunks and a bit.
    "long-transposed": Layout((210, 157), (1, 210), (1, 0)),
    "long-every-second": Layout((33_000,), (2,), (0,)),
    "long-by-a-byte": Layout((33_000,), (1,), (0,), offset=1),
}


def plain_layout(shape: tuple[int, ...]) -> Layout:
    return Layout(shape, torch.empty(shape).stride(), tuple(range(len(shape))))


@dataclass
class Roles:
    """A parameter with its values, and how it, its gradient and its state are held."""

    name: str
    param_layout: Layout
    grad_layout: Layout
    state_layout: Layout
    initial: torch.Tensor
    grads: list[torch.Tensor]

    def __post_init__(self) -> None:
        self.param = self.param_layout.of(self.initial)
        self.parameter = nn.Parameter(self.param.tensor)
        self.others: list[Held] = []

    def set_grad(self, step: int) -> None:
        grad = self.grad_layout.of(self.grads[step])
        self.others.append(grad)
        self.parameter.grad = grad.tensor

    def move_state(self, optimizer: torch.optim.Optimizer, case: Case) -> None:
        """Hold the state that the first step made in its own layout."""
        state = optimizer.state[self.parameter]
        for key in case.rule.state:
            new = self.state_layout.of(state[key])
            self.others.append(new)
            state[key] = new.tensor

    def assert_right(
        self,
        optimizer: torch.optim.Optimizer,
        case: Case,
        what: str,
        state_dtype: torch.dtype | None,
    ) -> None:
        flat = [array_of(grad).reshape(-1) for grad in self.grads]
        initial = array_of(self.initial).reshape(-1)
        param, state = oracle_steps(case, initial, flat, state_dtype=state_dtype)
        found = self.parameter.detach().contiguous().reshape(-1)
        assert_same_bits(found, param, f"{what} {self.name}")
        for key, value in state.items():
            kept = optimizer.state[self.parameter][key].contiguous()
            assert_same_bits(kept.reshape(value.shape), value, f"{what} {self.name} {key}")
        self.param.assert_neighbours_untouched(f"{what} {self.name}")
        for other in self.others:
            other.assert_neighbours_untouched(f"{what} {self.name}: gradient or state")


def roles_in(dtype: torch.dtype) -> list[Roles]:
    """Every layout in every role, the others contiguous; and all roles in different ones."""
    rng = np.random.default_rng(7)
    names = list(LAYOUTS)
    found = []
    for name, layout in LAYOUTS.items():
        plain = plain_layout(layout.shape)
        alike = [n for n in names if LAYOUTS[n].shape == layout.shape]
        after = [LAYOUTS[alike[(alike.index(name) + turn) % len(alike)]] for turn in (1, 2)]
        for kind, layouts in {
            "all": (layout, layout, layout),
            "parameter": (layout, plain, plain),
            "gradient": (plain, layout, plain),
            "state": (plain, plain, layout),
            "different": (layout, *after),
        }.items():
            n = prod(layout.shape)
            values = [random_values(rng, n, dtype).reshape(layout.shape) for _ in range(STEPS + 1)]
            found.append(Roles(f"{name}/{kind}", *layouts, values[0], values[1:]))
    return found


@pytest.mark.each_value
@cases
@pytest.mark.parametrize(
    ("dtype", "state_dtype"),
    [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.float32)],
    ids=["float32", "bfloat16", "bfloat16-float32"],
)
@ways
def test_every_role_in_every_layout(case: Case, dtype, state_dtype, way, backend):
    everything = roles_in(dtype)
    params = [roles.parameter for roles in everything]
    optimizer = optimizer_of(way, case, params, state_dtype=state_dtype)
    for step in range(STEPS):
        for roles in everything:
            roles.set_grad(step)
        optimizer.step()
        if step == 0:
            for roles in everything:
                roles.move_state(optimizer, case)
    for roles in everything:
        roles.assert_right(optimizer, case, backend, state_dtype)


@pytest.mark.all_pairs
@cases
@dtypes
def test_the_norm_is_summed_in_the_order_of_the_parameters_memory(case: Case, dtype, backend):
    rng = np.random.default_rng(8)
    orders_that_matter = 0
    for name, layout in LAYOUTS.items():
        n = prod(layout.shape)
        values = [random_values(rng, n, dtype).reshape(layout.shape) for _ in range(STEPS + 1)]
        roles = Roles(name, layout, plain_layout(layout.shape), layout, values[0], values[1:])
        optimizer = case.ours([roles.parameter], max_norm=0.7)
        as_stored = [value.permute(layout.order).reshape(-1) for value in values]
        flat = nn.Parameter(as_stored[0].clone())
        truth = case.ours([flat], max_norm=0.7)
        by_index = nn.Parameter(values[0].reshape(-1).clone())
        other_order = case.ours([by_index], max_norm=0.7)
        for step in range(STEPS):
            roles.set_grad(step)
            flat.grad = as_stored[step + 1].clone()
            by_index.grad = values[step + 1].reshape(-1).clone()
            for each in (optimizer, truth, other_order):
                each.step()
            norms = [last_norm(each) for each in (optimizer, truth, other_order)]
            assert norms[0] == norms[1], name
            orders_that_matter += norms[0] != norms[2]
            exact = as_stored[step + 1].double().norm()
            np.testing.assert_allclose(norms[0], float(exact), rtol=1e-6)
        found = roles.parameter.detach().permute(layout.order).reshape(-1)
        assert_same_bits(found, flat, name)
        for key in case.rule.state:
            kept = optimizer.state[roles.parameter][key].permute(layout.order).reshape(-1)
            assert_same_bits(kept, truth.state[flat][key], f"{name} {key}")
        roles.param.assert_neighbours_untouched(name)
    assert orders_that_matter  # the data could tell


def last_norm(optimizer: torch.optim.Optimizer) -> float:
    from pyupdate.pytorch.engines import last_step

    last = last_step(optimizer)
    assert last is not None and last.norm is not None
    return last.norm


# ----- gradients that autograd and users make -----------------------------------------------------


@pytest.mark.all_pairs
@cases
@ways
@pytest.mark.parametrize("shape", [(1,), (7,), (5, 6), (70, 300)], ids=str)
def test_expanded_gradients(case: Case, way, shape, backend):
    start = torch.linspace(-1, 1, prod(shape)).reshape(shape)
    param, full = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    ours, truth = (optimizer_of(way, case, [p], max_norm=2.0) for p in (param, full))
    for step in range(STEPS):
        place = held(torch.tensor(0.25 * (step + 1)))
        param.grad = place.tensor.expand(shape)  # what sum().backward() leaves
        full.grad = torch.full(shape, 0.25 * (step + 1))
        ours.step()
        truth.step()
        place.assert_neighbours_untouched("gradient")
        assert float(place.tensor) == 0.25 * (step + 1)
    assert_same_bits(param, full, backend)
    row = nn.Parameter(torch.ones(3, 4))
    row.grad = torch.arange(4.0).expand(3, 4)
    assert_same_bits(_after_a_step(case, way, row), _after_a_step(case, way, _clone(row)), "row")


def _clone(param: nn.Parameter) -> nn.Parameter:
    made = nn.Parameter(torch.ones_like(param))
    assert param.grad is not None
    made.grad = param.grad.contiguous()
    return made


def _after_a_step(case: Case, way: str, param: nn.Parameter) -> nn.Parameter:
    optimizer_of(way, case, [param]).step()
    return param


@ways
def test_gradients_of_a_channels_last_network(way, backend):
    case = next(c for c in FULL if c.name == "adamw")
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).double()
    last = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).double()
    last.load_state_dict(plain.state_dict())
    last.to(memory_format=torch.channels_last)
    images = torch.randn(4, 3, 9, 9, dtype=torch.float64)
    truth = case.truth(plain.parameters())
    ours = optimizer_of(way, case, list(last.parameters()))
    for _ in range(STEPS):
        for net, optimizer, x in (
            (plain, truth, images),
            (last, ours, images.contiguous(memory_format=torch.channels_last)),
        ):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
    assert last[0].weight.grad.is_contiguous(memory_format=torch.channels_last)
    for a, b in zip(last.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


# ----- several tensors in one storage -------------------------------------------------------------


def interleaved(dtype: torch.dtype, n: int) -> dict[str, list[torch.Tensor]]:
    """Tensors whose extents meet and whose elements do not."""
    base = torch.zeros(2 * n, dtype=dtype)
    columns = torch.zeros(n, 7, dtype=dtype)
    corner = torch.zeros(n, n, dtype=dtype)
    return {
        "even-odd": [base[::2], base[1::2]],
        "columns": [columns[:, :3], columns[:, 3:4], columns[:, 4:]],
        "triangle-rows": [corner[0, 1:], corner[1:, 0], corner[1:, 1:]],
    }


@pytest.mark.all_pairs
@cases
@ways
@pytest.mark.parametrize("kind", ["even-odd", "columns", "triangle-rows"])
def test_interleaved_views_of_one_storage(case: Case, way, kind, backend):
    rng = np.random.default_rng(9)
    dtype = torch.float32
    places = interleaved(dtype, 41)[kind]
    grads_at = [interleaved(dtype, 41)[kind] for _ in range(STEPS)]
    params = [nn.Parameter(place) for place in places]
    initial, grads = [], []
    for i, param in enumerate(params):
        values = [random_values(rng, param.numel(), dtype) for _ in range(STEPS + 1)]
        initial.append(values[0])
        grads.append(values[1:])
        with torch.no_grad():
            param.copy_(values[0].reshape(param.shape))
        for step in range(STEPS):
            grads_at[step][i].copy_(values[step + 1].reshape(param.shape))
    optimizer = optimizer_of(way, case, params)
    for step in range(STEPS):
        for param, grad in zip(params, grads_at[step], strict=True):
            param.grad = grad
        optimizer.step()
    for i, param in enumerate(params):
        truth, _ = oracle_steps(case, array_of(initial[i]), [array_of(g) for g in grads[i]])
        assert_same_bits(param.detach().reshape(-1), truth, f"{backend} {kind} {i}")


@pytest.mark.all_pairs
@cases
@ways
def test_a_parameter_its_gradient_and_its_state_in_one_storage(case: Case, way, backend):
    rng = np.random.default_rng(10)
    n = 1000
    base = torch.zeros(n, 2 + len(case.rule.state))
    values = [random_values(rng, n, torch.float32) for _ in range(STEPS + 1)]
    base[:, 0] = values[0]
    param = nn.Parameter(base[:, 0])
    optimizer = optimizer_of(way, case, [param])
    for step in range(STEPS):
        base[:, 1] = values[step + 1]
        param.grad = base[:, 1]
        optimizer.step()
        if step == 0:
            for column, key in enumerate(case.rule.state, start=2):
                base[:, column] = optimizer.state[param][key]
                optimizer.state[param][key] = base[:, column]
    truth, state = oracle_steps(case, array_of(values[0]), [array_of(v) for v in values[1:]])
    assert_same_bits(param.detach().contiguous(), truth, backend)
    for key, value in state.items():
        assert_same_bits(optimizer.state[param][key].contiguous(), value, f"{backend} {key}")
    assert_same_bits(base[:, 1].contiguous(), array_of(values[-1]), "the gradient")


def test_layouts_that_change_between_steps(backend):
    case = next(c for c in FULL if c.name == "adamw")
    rng = np.random.default_rng(11)
    names = [name for name, layout in LAYOUTS.items() if layout.shape == IMAGE]
    values = [random_values(rng, prod(IMAGE), torch.float32).reshape(IMAGE) for _ in range(11)]
    param = nn.Parameter(values[0].clone())
    optimizer = pyupdate.optim.AdamW([param], **case.options)
    kept = []
    for step, name in enumerate(names):
        place = LAYOUTS[name].of(param.detach())
        grad = LAYOUTS[names[-1 - step]].of(values[step + 1])
        kept += [place, grad]
        param.data = place.tensor
        param.grad = grad.tensor
        optimizer.step()
    flat = [array_of(v).reshape(-1) for v in values[: len(names) + 1]]
    truth, _ = oracle_steps(case, flat[0], flat[1:])
    assert_same_bits(param.detach().contiguous().reshape(-1), truth, backend)
    for place in kept:
        place.assert_neighbours_untouched(backend)
