# SPDX-License-Identifier: Apache-2.0
"""What users do to parameters, gradients, state and groups between steps: as in torch's own loop.

Every edit is made to a model under test and to its twin under torch's ``foreach=False`` loop, in
fp64. A pointer, a step count or a list of parameters that went stale would show at once.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable

import numpy as np
import pytest
import torch
from bits import assert_same_bits
from cases import FULL, Case
from torch import nn
from ways import optimizer_of, ways

import pyupdate

SHAPES = ((3, 4), (5,), (2, 3, 2), ())
# One rule whose steps only the plan counts, and the one with the most state.
SOME = tuple(case for case in FULL if case.name in ("sgd_momentum", "adamw_amsgrad"))
cases = pytest.mark.parametrize("case", SOME, ids=str)


class Side:
    """Parameters and their optimizer: the one under test, or its truth."""

    def __init__(self, make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> None:
        rng = np.random.default_rng(21)
        self.params = [nn.Parameter(torch.tensor(rng.standard_normal(s))) for s in SHAPES]
        self.optimizer = make(self.params)
        self.rng = rng

    def values(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.tensor(self.rng.standard_normal(shape))

    def set_grads(self, fresh: bool) -> None:
        for param in self.params:
            grad = self.values(tuple(param.shape))
            if fresh or param.grad is None or param.grad.shape != param.shape:
                param.grad = grad
            else:
                param.grad.copy_(grad)

    def state(self, index: int) -> dict[str, torch.Tensor]:
        return self.optimizer.state[self.params[index]]


# ----- edits --------------------------------------------------------------------------------------


def data(side: Side) -> None:
    side.params[0].data = side.values((3, 4))


def data_of_another_shape(side: Side) -> None:
    side.params[1].data = side.values((7,))
    side.optimizer.state.pop(side.params[1], None)
    side.params[1].grad = None


def data_back(side: Side) -> None:
    side.params[1].data = side.values((5,))
    side.optimizer.state.pop(side.params[1], None)
    side.params[1].grad = None


def data_transposed(side: Side) -> None:
    side.params[0].data = side.values((4, 3)).t()


def set_(side: Side) -> None:
    with torch.no_grad():
        side.params[0].set_(side.values((3, 4)))


def set_into_a_larger_storage(side: Side) -> None:
    large = side.values((100,))
    with torch.no_grad():
        side.params[2].set_(large.untyped_storage(), 13, (2, 3, 2), (20, 5, 2))


def resize(side: Side) -> None:
    side.params[1].detach().resize_(4096)  # the storage moves, the values stay in front


def resize_storage(side: Side) -> None:
    storage = side.params[0].untyped_storage()  # freed and allocated anew
    before = storage.clone()
    storage.resize_(0)
    storage.resize_(before.nbytes())
    storage.copy_(before)


def swap_data(side: Side) -> None:
    side.params[0].data, other = side.values((3, 4)), side.params[0].data
    side.params.append(nn.Parameter(other))  # the memory lives on in another parameter
    side.optimizer.add_param_group({"params": [side.params[-1]], "lr": 0.02})


def drop_gradients(side: Side) -> None:
    side.optimizer.zero_grad(set_to_none=True)


def zero_gradients(side: Side) -> None:
    side.optimizer.zero_grad(set_to_none=False)


def strided_gradient(side: Side) -> None:
    side.params[0].grad = side.values((6, 4))[::2]


def clear_state(side: Side) -> None:
    side.optimizer.state.clear()


def new_state_dict(side: Side) -> None:
    side.optimizer.state = defaultdict(dict)


def empty_inner_state(side: Side) -> None:
    side.optimizer.state[side.params[0]] = {}


def delete_state(side: Side) -> None:
    side.optimizer.state.pop(side.params[2], None)


def replace_inner_state(side: Side) -> None:
    inner = side.optimizer.state[side.params[0]]
    side.optimizer.state[side.params[0]] = {key: v.clone() for key, v in reversed(inner.items())}


def replace_tensors_of_state(side: Side) -> None:
    for inner in side.optimizer.state.values():
        for key in list(inner):
            inner[key] = inner[key] * 1.0


def write_state(side: Side) -> None:
    for inner in side.optimizer.state.values():
        for key, value in inner.items():
            value.mul_(2.0 if key == "step" else 0.5)


def set_memory_of_state(side: Side) -> None:
    for inner in side.optimizer.state.values():
        for key, value in inner.items():
            if key != "step":
                value.set_(value.clone())


def reload_state(side: Side) -> None:
    side.optimizer.load_state_dict(copy.deepcopy(side.optimizer.state_dict()))


def numbers_for_steps(side: Side) -> None:
    for inner in side.optimizer.state.values():
        if "step" in inner:
            inner["step"] = int(inner["step"])
    if any("step" in inner for inner in side.optimizer.state.values()):
        # Torch itself turns them into tensors only here.
        side.optimizer.__setstate__(side.optimizer.__dict__.copy())


def learning_rate(side: Side) -> None:
    side.optimizer.param_groups[0]["lr"] *= 0.5


def learning_rate_tensor(side: Side) -> None:
    side.optimizer.param_groups[0]["lr"] = torch.tensor(0.007, dtype=torch.float64)


def weight_decay(side: Side) -> None:
    side.optimizer.param_groups[0]["weight_decay"] += 0.03


def maximize(side: Side) -> None:
    group = side.optimizer.param_groups[0]
    group["maximize"] = not group["maximize"]


def new_group(side: Side) -> None:
    side.params.append(nn.Parameter(side.values((3,))))
    side.optimizer.add_param_group({"params": [side.params[-1]], "lr": 0.03})


def append_to_group(side: Side) -> None:
    side.params.append(nn.Parameter(side.values((2,))))
    side.optimizer.param_groups[0]["params"].append(side.params[-1])


def remove_from_group(side: Side) -> None:
    removed = side.optimizer.param_groups[0]["params"].pop(2)
    side.optimizer.state.pop(removed, None)


def reverse_group(side: Side) -> None:
    side.optimizer.param_groups[0]["params"].reverse()


def new_list_of_params(side: Side) -> None:
    group = side.optimizer.param_groups[0]
    group["params"] = group["params"][1:] + group["params"][:1]


def replace_parameter(side: Side) -> None:
    params = side.optimizer.param_groups[0]["params"]
    old = params[1]
    index = next(i for i, param in enumerate(side.params) if param is old)
    side.params[index] = params[1] = nn.Parameter(side.values(tuple(old.shape)))
    side.optimizer.state.pop(old, None)


def new_list_of_groups(side: Side) -> None:
    groups = side.optimizer.param_groups
    first = {**groups[0], "params": groups[0]["params"][:1]}
    second = {**groups[0], "params": groups[0]["params"][1:], "lr": 0.004}
    side.optimizer.param_groups = [second, first, *groups[1:]]


def freeze(side: Side) -> None:
    side.params[0].requires_grad_(False)
    side.params[0].grad = None


def unfreeze(side: Side) -> None:
    side.params[0].requires_grad_(True)


EDITS: dict[str, Callable[[Side], None]] = {
    edit.__name__: edit
    for edit in (
        data,
        data_of_another_shape,
        data_back,
        data_transposed,
        set_,
        set_into_a_larger_storage,
        resize,
        resize_storage,
        swap_data,
        drop_gradients,
        zero_gradients,
        strided_gradient,
        clear_state,
        new_state_dict,
        empty_inner_state,
        delete_state,
        replace_inner_state,
        replace_tensors_of_state,
        write_state,
        set_memory_of_state,
        reload_state,
        numbers_for_steps,
        learning_rate,
        learning_rate_tensor,
        weight_decay,
        maximize,
        new_group,
        append_to_group,
        remove_from_group,
        reverse_group,
        new_list_of_params,
        replace_parameter,
        new_list_of_groups,
        freeze,
        unfreeze,
    )
}

ONCE = ("remove_from_group",)
"""Edits that make no sense a second time."""


def sides(way: str, case: Case) -> tuple[Side, Side]:
    return Side(lambda params: optimizer_of(way, case, params)), Side(case.truth)


def step(side: Side, turn: int) -> None:
    side.set_grads(fresh=turn % 3 == 0)
    if turn % 4 == 3:
        side.params[1].grad = None
    side.optimizer.step()


def assert_alike(ours: Side, truth: Side, when: str) -> None:
    close = {"rtol": 1e-9, "atol": 1e-12}
    for i, (param, other) in enumerate(zip(ours.params, truth.params, strict=True)):
        said = f"parameter {i} {when}: "
        torch.testing.assert_close(param, other, **close, msg=lambda m, s=said: s + m)
        state, expected = ours.optimizer.state.get(param), truth.optimizer.state.get(other)
        assert (state or {}).keys() == (expected or {}).keys(), said
        for key, value in (expected or {}).items():
            if value is None:
                assert state[key] is None
                continue
            text = f"{said}{key}: "
            torch.testing.assert_close(state[key], value, **close, msg=lambda m, s=text: s + m)


@cases
@ways
@pytest.mark.parametrize("edit", list(EDITS))
def test_an_edit_between_steps(case: Case, way, edit, backend):
    ours, truth = sides(way, case)
    for turn in range(6):
        for side in (ours, truth):
            if turn in (2, 4) and not (edit in ONCE and turn == 4):
                EDITS[edit](side)
            step(side, turn)
        assert_alike(ours, truth, f"after step {turn}")


@cases
@pytest.mark.parametrize("seed", range(3))
def test_edits_in_any_order(case: Case, seed, backend):
    order = np.random.default_rng(seed).permutation([e for e in EDITS if e not in ONCE])
    ours, truth = sides(("ours", "accelerated")[seed % 2], case)
    for turn, edit in enumerate(order[:16]):
        for side in (ours, truth):
            EDITS[edit](side)
            step(side, turn)
        assert_alike(ours, truth, f"after {list(order[: turn + 1])}")


# ----- gradients that only look unusual -----------------------------------------------------------


def negated_of_complex(values: torch.Tensor) -> torch.Tensor:
    """The imaginary part of a conjugate: a view that is negated when it is read."""
    made = torch.complex(torch.zeros_like(values), -values).conj().imag
    assert made.is_neg()
    return made


GRADIENTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "neg_view": lambda values: torch._neg_view(-values),
    "conj_imag": negated_of_complex,
    "twice": lambda values: torch._neg_view(torch._neg_view(values)),
}


@cases
@ways
@pytest.mark.parametrize("kind", list(GRADIENTS))
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (2,), (5, 7)], ids=str)
@pytest.mark.parametrize("max_norm", [None, 0.5], ids=["plain", "max_norm"])
def test_lazily_negated_gradients(case: Case, way, kind, shape, max_norm, backend):
    torch.manual_seed(4)
    start = torch.randn(shape)
    param, plain = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    ours, truth = (optimizer_of(way, case, [p], max_norm=max_norm) for p in (param, plain))
    kept = []
    for _ in range(3):
        values = torch.randn(shape)
        given = GRADIENTS[kind](values)
        kept.append((given, given.clone()))
        param.grad, plain.grad = given, values.clone()
        ours.step()
        truth.step()
    assert_same_bits(param, plain, kind)
    for given, before in kept:
        assert torch.equal(given, before)


@cases
@ways
def test_lazily_zero_gradients(case: Case, way, backend):
    param, plain = (nn.Parameter(torch.linspace(-1, 1, 6)) for _ in range(2))
    ours, truth = (optimizer_of(way, case, [p], max_norm=0.5) for p in (param, plain))
    for turn in range(4):
        plain.grad = torch.zeros(6) if turn % 2 else torch.arange(6.0)
        param.grad = torch._efficientzerotensor((6,)) if turn % 2 else torch.arange(6.0)
        ours.step()
        truth.step()
    assert_same_bits(param, plain, "zeros")


@pytest.mark.parametrize("what", ["parameter", "parameter later", "state"])
def test_lazily_negated_memory_is_never_written(what, backend):
    # Its bytes are the opposite of its values.
    param = nn.Parameter(torch.ones(3))
    optimizer = pyupdate.optim.SGD([param], lr=0.5, momentum=0.5)
    opposite = torch.complex(torch.zeros(3), torch.ones(3)).conj().imag
    if what == "parameter":
        param.data = opposite
    param.grad = torch.ones(3)
    if what != "parameter":
        optimizer.step()
        if what == "state":
            optimizer.state[param]["momentum_buffer"] = opposite
        else:
            param.data = opposite
    before = param.detach().clone()
    with pytest.raises(TypeError, match=r"is lazily negated.*resolve_neg"):
        optimizer.step()
    assert torch.equal(param, before) and torch.equal(opposite, -torch.ones(3))


@ways
@pytest.mark.parametrize("number", [3, 3.0], ids=["int", "float"])
def test_plain_numbers_as_step_counters(way, number, backend):
    case = next(c for c in FULL if c.name == "adam")
    ours, truth = sides(way, case)
    for side in (ours, truth):
        step(side, 0)
        for inner in side.optimizer.state.values():
            inner["step"] = number if side is ours else torch.tensor(3.0)
    for turn in (1, 2):
        for side in (ours, truth):
            step(side, turn)
    assert_alike(ours, truth, "after")
    assert all(float(s["step"]) == 5.0 for s in ours.optimizer.state.values())
