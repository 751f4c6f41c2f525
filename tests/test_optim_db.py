# SPDX-License-Identifier: Apache-2.0
"""The drop-in classes over torch's own table of optimizers, ``optim_db``.

It lists, for each of torch's optimizers, configurations that a test should cross and arguments that
must be refused. What is not crossed stands in `LEFT_OUT` and `WITHOUT_A_RULE`, with the reason; how
much there is, in `COUNTS`.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from bits import assert_same_bits
from cases import name_of
from torch import nn
from torch.utils._pytree import tree_map_only

from pyupdate.optim.planned import DROP_INS

pytest.importorskip("expecttest", reason="torch.testing._internal needs the package expecttest")

from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

WITHOUT_A_RULE = {
    "LBFGS": "evaluates the closure many times a step: not one update of each parameter",
    "SparseAdam": "steps sparse gradients, which every class here refuses",
}
"""Torch's optimizers that pyupdate has no class for."""

LEFT_OUT = {
    "capturable": "no step on the CPU: refused with torch's error, see test_capturable_is_refused",
    "complex": "refused, by name of the parameter: see test_complex_and_sparse_are_refused",
    "sparse": "refused, by name of the gradient: see test_complex_and_sparse_are_refused",
    "does not support complex parameters": "an error of the db's that every class here words alike",
}
"""Of the classes that there are: what the db has and is not compared with torch's."""

COUNTS = {
    "Adadelta": (6, 3, 7),
    "Adafactor": (5, 0, 9),
    "Adagrad": (7, 0, 7),
    "Adam": (5, 5, 12),
    "Adamax": (5, 5, 7),
    "AdamW": (5, 5, 12),
    "ASGD": (7, 5, 7),
    "Muon": (7, 0, 8),
    "NAdam": (7, 4, 8),
    "RAdam": (6, 4, 8),
    "RMSprop": (8, 3, 7),
    "Rprop": (5, 2, 7),
    "SGD": (9, 0, 7),
}
"""Of torch 2.13: configurations for the CPU, capturable ones, and errors that are compared."""

INFOS = [info for info in optim_db if info.optim_cls in DROP_INS]


def configurations(info: Any) -> list[tuple[str, dict[str, Any]]]:
    """Those for the CPU, then those for a GPU, capturable as the db has them."""
    listed = [
        info.optim_inputs_func(device=device, dtype=torch.float64) for device in ("cpu", "cuda")
    ]
    on_gpus = [each for each in listed[1] if each.kwargs.get("capturable")]
    return [(each.desc, each.kwargs) for each in listed[0] + on_gpus]


def errors(info: Any) -> list[Any]:
    listed = info.optim_error_inputs_func("cpu", torch.float64)
    return [each for each in listed if each.optimizer_error_input.desc not in LEFT_OUT]


def rows(listed: Any) -> list[Any]:
    return [
        pytest.param(info, *row, id=f"{info.name}-{row[0]}".replace(" ", "_"))
        for info in INFOS
        for row in listed(info)
    ]


every_configuration = pytest.mark.parametrize(("info", "said", "options"), rows(configurations))
every_class = pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)


def test_nothing_of_the_db_is_lost():
    names = {info.name for info in INFOS}
    assert {info.name for info in optim_db} - names == set(WITHOUT_A_RULE)
    assert names == set(COUNTS)
    assert len(LEFT_OUT) == 4
    if not torch.__version__.startswith("2.13."):
        pytest.skip(f"the counts are torch 2.13's, this is {torch.__version__}")
    for info in INFOS:
        kinds = ["capturable" in options for _, options in configurations(info)]
        found = kinds.count(False), kinds.count(True), len(errors(info))
        assert found == COUNTS[info.name], info.name


# ----- steps --------------------------------------------------------------------------------------

MATRICES = ((8, 8), (24, 8), (8, 24), (33, 1), (1, 7))
SHAPES = ((), (0,), (1,), (7,), (8,), (8,), (8,), (31,), (33,), (33,), (1025,), *MATRICES)
SHAPES_OF = {
    "Muon": (*MATRICES, (0, 4)),
    "Adafactor": tuple(shape for shape in SHAPES if shape != (0,)),  # torch's divides by the size
}
STEPS = 3


def tensors(info: Any, seed: int, dtype: torch.dtype, *, gradients: bool) -> list[torch.Tensor]:
    """Parameters of up to 1/4; gradients of 3/4 to 1 of either sign, so that no decay cancels one.

    Where grad + weight_decay * param is a small difference its relative error has no bound, and
    Adam divides by its size.
    """
    rng = np.random.default_rng(seed)
    made = []
    for shape in SHAPES_OF.get(info.name, SHAPES):
        values = rng.uniform(-0.25, 0.25, shape)
        if gradients:
            values = np.copysign(0.75 + np.abs(values), values)
        made.append(torch.from_numpy(np.asarray(values)).to(dtype))
    return made


def stepped(info: Any, kind: Any, dtype: torch.dtype, options: dict[str, Any]) -> Any:
    """An optimizer after its steps.

    Numbers that the db gives as tensors are of the dtype: torch takes its step sizes in theirs, and
    an fp32 lr makes an fp64 step as coarse as itself.
    """
    params = [nn.Parameter(value) for value in tensors(info, 0, dtype, gradients=False)]
    options = tree_map_only(torch.Tensor, lambda number: number.to(dtype, copy=True), options)
    optimizer = kind(params, **options)
    for turn in range(1, STEPS + 1):
        for param, grad in zip(params, tensors(info, turn, dtype, gradients=True), strict=True):
            param.grad = grad
        optimizer.step()
    return optimizer


def values_of(optimizer: Any) -> dict[str, list[torch.Tensor]]:
    """Parameters, and state by key, each in the order of the parameters."""
    params = optimizer.param_groups[0]["params"]
    found = {"param": [param.detach() for param in params]}
    for param in params:
        for key, value in optimizer.state.get(param, {}).items():
            found.setdefault(key, []).append(value)
    return found


def bound_of(
    info: Any, key: str, options: dict[str, Any], value: torch.Tensor, largest: float
) -> float:
    """How far apart two right values may be after the steps; `largest` is the key's largest value.

    A step is within the contract's 8 eps. In fp64 the last bit of beta2 ** t decides about
    1 - beta2 ** t as well, which 0.999 magnifies a thousandfold; for fp32 both take it in fp64.
    """
    if info.name == "Muon" and key == "param":
        # 12 steps of bfloat16 (test_muon.py says why) of what an element moves by.
        lr = float(options.get("lr", 1e-3))
        return STEPS * 12 * 2.0**-8 * lr * max(1.0, value.shape[0] / max(value.shape[1], 1)) ** 0.5
    eps = torch.finfo(value.dtype).eps
    if info.name == "Adafactor":  # its sums have up to 1025 terms, in another order than torch's
        return STEPS * 1025 * eps * largest
    return STEPS * (1000 if value.dtype is torch.float64 else 8) * eps * largest


@pytest.fixture
def scalars_of(dtype: torch.dtype) -> Iterator[None]:
    """Scalars, mu_product for one, are of the default dtype: not the coarsest of an fp64 step."""
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(torch.float32)


def on_the_cpu(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "capturable"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
@every_configuration
def test_steps_are_those_of_torchs_loop(info, said, options, dtype, scalars_of):
    options = on_the_cpu(options)
    loop = {"foreach": False} if "foreach" in info.supported_impls else {}
    truth = stepped(info, info.optim_cls, dtype, {**options, **loop})
    found = values_of(stepped(info, DROP_INS[info.optim_cls], dtype, options))
    expected = values_of(truth)
    assert list(found) == list(expected)
    for key, values in expected.items():
        largest = max(float(value.abs().max()) for value in values if value.numel())
        for ours, theirs in zip(found[key], values, strict=True):
            assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), key
            bound = bound_of(info, key, options, theirs, largest)
            error = (ours.double() - theirs.double()).abs()
            assert bool((error <= bound).all()), f"{key}: {error.max()} is above {bound}"


@every_configuration
def test_what_makes_no_difference(info, said, options):
    flags = []
    plain_lr = not any(isinstance(value, torch.Tensor) for value in options.values())
    if plain_lr and "foreach" in info.supported_impls:  # else an error: see below
        flags.append({"foreach": True})
    if "cpu" in info.supports_fused_on:
        flags.append({"fused": True})
    ours, options = DROP_INS[info.optim_cls], on_the_cpu(options)
    plain = values_of(stepped(info, ours, torch.float32, options))
    for flag in flags:
        flagged = values_of(stepped(info, ours, torch.float32, {**options, **flag}))
        for key, values in plain.items():
            for value, other in zip(values, flagged[key], strict=True):
                assert_same_bits(other, value.numpy(), f"{flag}, {key}")


@pytest.mark.parametrize(
    "info", [row for row in INFOS if COUNTS[row.name][1]], ids=lambda info: info.name
)
def test_capturable_is_refused(info):
    said = []
    for kind in (DROP_INS[info.optim_cls], info.optim_cls):
        param = torch.nn.Parameter(torch.ones(2))
        optimizer = kind([param], capturable=True)
        optimizer.step()  # there is no gradient to step by
        param.grad = torch.ones(2)
        with pytest.raises(AssertionError) as caught:
            optimizer.step()
        said.append(str(caught.value))
        assert param.tolist() == [1.0, 1.0]
    first, devices = "If capturable=True, params", "must be on supported devices: ['cuda'"
    assert all(text.startswith(first) and devices in text for text in said)


@pytest.mark.parametrize(
    ("info", "said", "options"),
    [row for row in rows(configurations) if "differentiable" in row.values[0].supported_impls],
)
def test_differentiable_is_torchs_own_step(info, said, options):
    options = on_the_cpu(options)
    found = []
    for kind in (DROP_INS[info.optim_cls], info.optim_cls):
        leaf = torch.full((3,), 0.25, dtype=torch.float64, requires_grad=True)
        param = leaf.clone()
        optimizer = kind([param], differentiable=True, **copy.deepcopy(options))
        param.grad = (leaf * torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64)).clone()
        optimizer.step()
        found.append((param.detach(), *torch.autograd.grad(param.square().sum(), leaf)))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs) and theirs.abs().sum() > 0.0


# ----- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("info", "said", "index"),
    rows(lambda info: [(e.optimizer_error_input.desc, i) for i, e in enumerate(errors(info))]),
)
def test_errors_are_torchs(info, said, index):
    error = errors(info)[index]
    assert error.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR  # a step's are in LEFT_OUT
    given = error.optimizer_error_input
    params = [nn.Parameter(torch.ones(2, 2))] if given.params is None else given.params
    caught: list[Exception] = []
    for kind in (DROP_INS[info.optim_cls], info.optim_cls):
        with (
            warnings.catch_warnings(action="error"),
            pytest.raises(error.error_type, match=error.error_regex) as raised,
        ):
            kind(params, **given.kwargs)
        caught.append(raised.value)
    assert type(caught[0]) is type(caught[1]) and str(caught[0]) == str(caught[1])


@every_class
@pytest.mark.parametrize("kind", ["complex", "sparse"])
def test_complex_and_sparse_are_refused(info, kind):
    assert kind in LEFT_OUT
    param = nn.Parameter(torch.ones(2, 2, dtype=torch.cfloat if kind == "complex" else None))
    refused = f"'group 0, parameter 0' is {kind}"
    optimizer = DROP_INS[info.optim_cls]([param])
    param.grad = torch.ones_like(param)
    if kind == "sparse":
        param.grad = param.grad.to_sparse()
    with pytest.raises(TypeError, match=re.escape(refused)):
        optimizer.step()
    assert torch.equal(param, torch.ones_like(param))
