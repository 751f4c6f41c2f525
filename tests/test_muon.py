# SPDX-License-Identifier: Apache-2.0
"""Muon: torch.optim.Muon's step within the accuracy of bfloat16, in batches of one shape."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from cases import DTYPES, name_of
from torch import nn

import pyupdate
from pyupdate.kernels import composite
from pyupdate.optim import Muon, split_for_muon
from pyupdate.pytorch.engines import engine_of, last_step

SHAPES = ((8, 8), (24, 8), (8, 24), (24, 8), (1, 5), (7, 1), (33, 40), (8, 8), (0, 4))
OPTIONS: list[dict[str, Any]] = [
    {},
    {"nesterov": False, "momentum": 0.5},
    {"adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.5},
    {"adjust_lr_fn": "original", "ns_steps": 3, "eps": 1e-3},
    {"ns_coefficients": (2.0, -1.5, 0.5), "weight_decay": 0.0},
]
LR = 0.125
# Neighbours in bfloat16 around 1 are 2^-8 apart. Five steps of the iteration in it are off the
# exact iteration by up to 12 of these and 1.5 in the root mean square (16 normal matrices of each
# of eight shapes, torch's way and ours), so two right ways may differ by twice that. On the
# processor where this was measured they did not differ at all.
STEP = 2.0**-8


def values(seed: int, dtype: torch.dtype, shapes: Sequence[tuple[int, ...]]) -> list[torch.Tensor]:
    rng = np.random.default_rng(seed)
    return [torch.from_numpy(rng.standard_normal(shape)).to(dtype) for shape in shapes]


def params_of(dtype: torch.dtype, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[nn.Parameter]:
    return [nn.Parameter(value) for value in values(1, dtype, shapes)]


def give(params: Sequence[nn.Parameter], grads: Sequence[torch.Tensor]) -> None:
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone()


def scale_of(param: torch.Tensor, options: dict[str, Any]) -> float:
    """What an element of an orthogonalised matrix moves by."""
    rows, columns = param.shape[0], param[0].numel() if param.shape[0] else 1
    if options.get("adjust_lr_fn") == "match_rms_adamw":
        return LR * 0.2 * max(rows, columns) ** 0.5
    return LR * max(1.0, rows / columns) ** 0.5


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, scale: float, what: str) -> None:
    """The update's error, in steps of bfloat16 of the largest element that an update has (1)."""
    if ours.numel() == 0:
        return
    # A stored value of narrower type is rounded once more, after a decay that torch rounds, too.
    eps = torch.finfo(ours.dtype).eps
    stored = 2 * eps * theirs.double().abs()
    error = ((ours.double() - theirs.double()).abs() - stored).clamp(min=0.0) / scale
    assert error.max() <= 12 * STEP, f"{what}: {error.max() / STEP:.2f} steps"
    assert error.square().mean().sqrt() <= 3 * STEP, f"{what}: rms {error.square().mean().sqrt()}"


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_step_is_torchs_within_the_accuracy_of_bfloat16(options, dtype, backend):
    params = params_of(dtype)
    twins = copy.deepcopy(params)
    ours = Muon(params, lr=LR, **options)
    theirs = torch.optim.Muon(twins, lr=LR, **options)
    momentum = ours.param_groups[0]["momentum"]
    before = [torch.zeros(shape, dtype=torch.float64) for shape in SHAPES]
    for seed in range(2, 6):
        grads = values(seed, dtype, SHAPES)
        give(params, grads)
        give(twins, grads)
        ours.step()
        theirs.step()
        for i, (param, twin) in enumerate(zip(params, twins, strict=True)):
            assert_close(param, twin, scale_of(param, options), f"step {seed}, {SHAPES[i]}")
            buffer = ours.state[param]["momentum_buffer"]
            # Not torch's: of a bfloat16 buffer without Nesterov it makes the direction in place.
            exact = before[i] + (grads[i].double() - before[i]) * (1.0 - momentum)
            bound = 2 * torch.finfo(dtype).eps * torch.maximum(before[i].abs(), grads[i].abs())
            assert ((buffer.double() - exact).abs() <= bound).all()
            before[i] = buffer.double().clone()
            assert list(ours.state[param]) == list(theirs.state[twin]) == ["momentum_buffer"]
        with torch.no_grad():  # all go on from ours
            for param, twin in zip(params, twins, strict=True):
                twin.copy_(param)
                theirs.state[twin]["momentum_buffer"].copy_(ours.state[param]["momentum_buffer"])
    assert [p.keys() for p in ours.param_groups] == [p.keys() for p in theirs.param_groups]


def test_the_update_is_a_matrix_whose_singular_values_are_near_one(backend):
    """Against mathematics: five steps of these coefficients take [0.01, 1] to about [0.7, 1.2]."""
    param = nn.Parameter(torch.zeros(32, 48))
    param.grad = values(7, torch.float32, [(32, 48)])[0]
    Muon([param], lr=1.0, weight_decay=0.0).step()
    s = torch.linalg.svdvals(param.detach().double())
    assert 0.6 < s.min() <= s.max() < 1.3
    of_grad = torch.linalg.svd(param.grad.double(), full_matrices=False)
    exact = of_grad[0] @ of_grad[2]
    assert (
        torch.nn.functional.cosine_similarity(
            -param.detach().double().flatten(), exact.flatten(), dim=0
        )
        > 0.98
    )


def test_elementwise_parts_by_hand():
    assert composite.muon_direction(3.0, 1.0, 0.75) == 3.0 - 2.0 * 0.75
    assert composite.muon_move(4.0, 0.5, 0.75, 0.25) == 4.0 * 0.75 - 0.5 * 0.25


def test_equal_shapes_are_one_batch(monkeypatch):
    calls: list[int] = []
    whole = torch.baddbmm

    def counted(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(x.shape[0])
        return whole(x, *args, **kwargs)

    monkeypatch.setattr(torch, "baddbmm", counted)
    params = params_of(torch.float32, [(4, 4)] * 7 + [(2, 4)] * 3)
    give(params, values(2, torch.float32, [tuple(param.shape) for param in params]))
    Muon(params, ns_steps=5).step()
    assert calls == [7] * 10 + [3] * 10


def test_flatten_trailing_is_the_step_of_the_flat_matrix(backend):
    shape, flat = (6, 4, 3, 3), (6, 36)
    deep, twin = (
        nn.Parameter(values(1, torch.float32, [shape])[0].reshape(s)) for s in (shape, flat)
    )
    plain = nn.Parameter(torch.ones(3, 3))
    optimizer = Muon([deep, plain], lr=LR, flatten_trailing=True)
    truth = Muon([twin], lr=LR)
    for seed in (2, 3):
        grad = values(seed, torch.float32, [shape])[0]
        deep.grad, twin.grad = grad, grad.reshape(flat)
        optimizer.step()
        truth.step()
    assert torch.equal(deep.reshape(flat), twin)
    assert deep.shape == shape
    assert plain.tolist() == [[1.0] * 3] * 3
    again = Muon([nn.Parameter(deep.detach().clone()), plain], flatten_trailing=True)
    again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[0]["lr"] == LR
    assert copy.deepcopy(optimizer).param_groups[0]["flatten_trailing"] is True


def test_flatten_trailing_takes_groups_and_refuses_vectors():
    deep = nn.Parameter(torch.ones(2, 2, 2))
    optimizer = Muon([{"params": [deep], "lr": 0.5}], flatten_trailing=True)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.param_groups[0]["params"] == [deep]
    for params in ([nn.Parameter(torch.ones(3))], [nn.Parameter(torch.ones(()))]):
        with pytest.raises(ValueError, match="of two and more dimensions whereas we found"):
            Muon(params, flatten_trailing=True)
    with pytest.raises(ValueError, match="empty parameter list"):
        Muon([], flatten_trailing=True)


@pytest.mark.parametrize("flat", [{}, {"flatten_trailing": True}], ids=["torchs", "flat"])
@pytest.mark.parametrize("shape", [(2, 2), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("leaf", [True, False])
def test_a_tensor_alone_has_torchs_words(leaf, shape, flat):
    param = nn.Parameter(torch.ones(shape))
    said = []
    for kind, given in ((Muon, flat), (torch.optim.Muon, {})):
        with pytest.raises(TypeError, match="should be an iterable of Tensors or dicts") as caught:
            kind(param if leaf else param * 2.0, **given)
        said.append(str(caught.value))
    assert said[0] == said[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1.0}, "Learning rate should be >= 0 but is: -1.0"),
        ({"lr": torch.ones(2)}, "Tensor lr must be 1-element"),
        ({"momentum": -0.5}, "momentum should be >= 0 but is: -0.5"),
        ({"weight_decay": -0.5}, "weight decay should be >= 0 but is: -0.5"),
        ({"adjust_lr_fn": "no"}, "Adjust learning rate function no is not supported"),
    ],
)
@pytest.mark.parametrize("flat", [{}, {"flatten_trailing": True}], ids=["torchs", "flat"])
def test_bad_arguments_have_torchs_words(arguments, message, flat):
    with pytest.raises(ValueError, match=message):
        Muon([nn.Parameter(torch.ones(2, 2))], **arguments, **flat)


def test_what_is_no_matrix_has_torchs_words():
    said = []
    for kind in (Muon, torch.optim.Muon):
        with pytest.raises(ValueError, match="only supports 2D") as caught:
            kind([nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(3))])
        said.append(str(caught.value))
    assert said[0] == said[1]
    optimizer = Muon([nn.Parameter(torch.ones(2, 2))])
    with pytest.raises(ValueError, match="only supports 2D"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ns_steps": 100}, "Number of steps must be less than 100"),
        ({"ns_coefficients": (1.0, 2.0)}, "Coefficients must be a tuple of exactly 3 values"),
    ],
)
def test_what_torch_refuses_in_a_step_is_refused_before_anything_is_written(change, message):
    param = nn.Parameter(torch.ones(2, 2))
    param.grad = torch.ones(2, 2)
    optimizer = Muon([param], **change)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert not optimizer.state
    assert param.tolist() == [[1.0, 1.0]] * 2


# ----- what every optimizer has -------------------------------------------------------------------


def test_a_clip_and_a_scaler_come_before_the_momentum(backend):
    grad = values(3, torch.float32, [(6, 6)])[0]
    plain, clipped, valued = (nn.Parameter(torch.ones(6, 6)) for _ in range(3))
    norm = float(grad.norm())
    bounded = grad.clamp(-0.5, 0.5)
    for param, given, options in (
        (plain, grad / (norm + 1e-6), {}),
        (clipped, grad, {"max_norm": 1.0}),
    ):
        param.grad = given
        optimizer = Muon([param], lr=LR, **options)
        optimizer.step()
    assert last_step(optimizer).norm == pytest.approx(norm, rel=1e-6)
    assert_close(clipped, plain, LR, "max_norm")
    optimizer = Muon([valued], lr=LR, clip_value=0.5)
    valued.grad = grad
    optimizer.step()
    torch.testing.assert_close(optimizer.state[valued]["momentum_buffer"], bounded * 0.05)
    twin = nn.Parameter(torch.ones(6, 6))
    twin.grad = bounded
    Muon([twin], lr=LR).step()
    assert torch.equal(valued, twin)


def test_a_scaler_unscales_and_skips(backend):
    param = nn.Parameter(torch.ones(4, 4))
    twin = nn.Parameter(torch.ones(4, 4))
    optimizer = Muon([param], lr=LR)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))
    grad = values(3, torch.float32, [(4, 4)])[0]
    param.grad, twin.grad = grad * 4.0, grad
    scaler.step(optimizer)
    scaler.update()
    Muon([twin], lr=LR).step()
    assert torch.equal(param, twin)
    param.grad = torch.full((4, 4), float("inf"))
    before = optimizer.state[param]["momentum_buffer"].clone()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(param, twin)
    assert torch.equal(optimizer.state[param]["momentum_buffer"], before)
    assert scaler.get_scale() == 2.0


def test_a_stock_muon_is_accelerated_and_its_state_goes_on():
    param, twin = (nn.Parameter(torch.ones(5, 3)) for _ in range(2))
    stock, theirs = torch.optim.Muon([param], lr=LR), torch.optim.Muon([twin], lr=LR)
    for seed in (2, 3):
        grad = values(seed, torch.float32, [(5, 3)])[0]
        param.grad, twin.grad = grad, grad.clone()
        stock.step()
        theirs.step()
        pyupdate.accelerate(stock)
    assert type(stock) is Muon
    assert_close(param, twin, LR * (5 / 3) ** 0.5, "accelerated")
    theirs.load_state_dict(stock.state_dict())
    assert torch.equal(theirs.state[twin]["momentum_buffer"], stock.state[param]["momentum_buffer"])


def test_update_model_steps_it_and_what_has_no_gradient_stays():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    unused = model[1].weight.detach().clone()
    pyupdate.build(model, "muon", lr=0.25, max_norm=1.0)
    before = model[0].weight.detach().clone()
    pyupdate.update_model(model, model[0](torch.ones(2, 4)) ** 2)
    assert not torch.equal(model[0].weight, before)
    assert torch.equal(model[1].weight, unused)
    assert model[0].weight.grad is None
    assert list(model.current_optimizer.state) == [model[0].weight]


def test_the_momentum_runs_compiled(compiled):
    param = nn.Parameter(torch.ones(4, 4))
    param.grad = torch.ones(4, 4)
    optimizer = Muon([param])
    optimizer.step()
    (plan,) = engine_of(optimizer).plans.values()
    assert plan.backends == ("cpu",)


# ----- who gets what ------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.conv = nn.Conv1d(4, 4, 3)
        self.hidden = nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 10, bias=False)
        if tied:
            self.head.weight = self.embed.weight


def names(model: nn.Module, params: Sequence[nn.Parameter]) -> list[str]:
    of = {id(param): name for name, param in model.named_parameters()}
    return [of[id(param)] for param in params]


@pytest.mark.parametrize(
    ("tied", "arguments", "expected"),
    [
        (False, {}, ["hidden.weight"]),
        (False, {"flatten_trailing": True}, ["conv.weight", "hidden.weight"]),
        (False, {"adamw": []}, ["hidden.weight", "head.weight"]),
        (False, {"adamw": ["hidden"]}, ["head.weight"]),
        (False, {"adamw": ["hidden.weight", "head"]}, []),
        (True, {"adamw": []}, ["hidden.weight"]),
    ],
)
def test_the_split(tied, arguments, expected):
    model = Small(tied)
    muon, adamw = split_for_muon(model, **arguments)
    assert names(model, muon) == expected
    trainable = {name for name, param in model.named_parameters() if param.requires_grad}
    assert set(names(model, adamw)) == trainable - set(expected)
    assert len(muon) + len(adamw) == len(trainable)


def test_the_split_refuses_a_name_that_is_none():
    with pytest.raises(ValueError, match="no parameter and no module named 'lm_head'"):
        split_for_muon(Small(), adamw=["lm_head"])
