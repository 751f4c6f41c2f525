# SPDX-License-Identifier: Apache-2.0
"""The Triton back end, whole: optimizers step CPU tensors by the PTX that a GPU would run.

The truth is the compiled CPU back end, bit for bit, and that is the numpy oracle's
(test_bitwise.py). A kernel that touches what is not its own fails (tests/device/ptx).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from bits import assert_same_bits, random_values
from cases import DTYPES, name_of

import pyupdate
from pyupdate.language import sqrt

pytest.importorskip("triton", reason="triton is not installed (make check-device installs it)")

from device.triton_backend import triton_backend
from triton_training import (
    ALL_OPTIONS,
    OPTIONS,
    OTHER_CAPABILITIES,
    RULES,
    assert_alike,
    check,
    gradients,
    readers,
    trained,
)
from ways import plan_of

# ----- rules --------------------------------------------------------------------------------------


# A rule of each kind: with and without state, of one turn, of sums, of scalars, of another start.
QUICK = ("sgd", "adamw", "nadam", "asgd", "lion", "adafactor", "lamb", "schedulefree_adamw")


@pytest.mark.parametrize(
    "rule", [pytest.param(r, marks=() if r in QUICK else pytest.mark.slow) for r in RULES]
)
def test_a_rule_has_the_bits_of_the_cpu(rule, compiled):
    # Another storage in turn; all of them are crossed with all rules below.
    others = (torch.bfloat16, torch.float64, torch.float16)
    dtypes = (torch.float32, others[list(RULES).index(rule) % 3])
    check(rule, dtypes, sizes=(0, 1, 70, 1025, 16_385))


def test_every_rule_is_here():
    from pyupdate.kernels.rules import RULES as ALL

    assert set(RULES) == set(ALL) - {"muon"}  # which is a matrix's: below


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("rule", ["adamw", "lamb"])
def test_halves_with_state_in_float32(rule, dtype, compiled):
    check(rule, [dtype], state_dtype=torch.float32, sizes=(1, 70, 1025, 16_385))


@pytest.mark.parametrize(
    ("rule", "capability"),
    [
        pytest.param(rule, capability, marks=() if capability == 100 else pytest.mark.slow)
        for rule in ("adamw", "lamb")
        for capability in OTHER_CAPABILITIES
    ],
)
def test_other_architectures(rule, capability, compiled):
    norm = {"max_norm": 1.0} if rule == "adamw" else {}
    check(rule, [torch.bfloat16], capability=capability, sizes=(70, 16_385), **norm)


def test_muon(compiled):
    def trained_on(name: str) -> torch.Tensor:
        torch.manual_seed(0)
        param = torch.nn.Parameter(torch.randn(24, 40))
        optimizer = pyupdate.optim.Muon([param], lr=0.01)
        for _ in range(2):
            param.grad = torch.randn(24, 40)
            optimizer.step()
        assert plan_of(optimizer).backends == (name,)
        return param.detach()

    with triton_backend():
        found = trained_on("triton")
    with pyupdate.use_backend("cpu"):
        assert_same_bits(found, trained_on("cpu"), "muon")


@pyupdate.rule(state={"square_avg": 0.0}, defaults={"alpha": 0.75})
def own_rmsprop(param, grad, square_avg, lr, alpha, eps):
    square_avg = square_avg * alpha + grad * grad * (1.0 - alpha)
    param = param - lr * grad * sqrt(square_avg + eps)
    return param, square_avg


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_a_rule_of_the_user(dtype):
    def trained_on() -> torch.Tensor:
        rng = np.random.default_rng(1)
        param = torch.nn.Parameter(random_values(rng, 3000, dtype))
        optimizer = pyupdate.optim.from_rule(own_rmsprop)([param], lr=0.01, eps=0.1)
        for _ in range(3):
            param.grad = random_values(rng, 3000, dtype)
            optimizer.step()
        return param.detach()

    with triton_backend() as machine:
        found = trained_on()
    assert machine.launches
    with pyupdate.use_backend("reference"):
        assert_same_bits(found, trained_on(), "own rule")


# ----- options ------------------------------------------------------------------------------------


# "all" has a clip by the norm too.
RARE = ("max_norm", "inf norm")


@pytest.mark.parametrize(
    ("dtypes", "options"),
    [
        pytest.param(*case, marks=pytest.mark.slow if name in RARE else (), id=name)
        for name, case in OPTIONS.items()
    ],
)
def test_options(dtypes, options, compiled):
    check("adamw", dtypes, sizes=(1, 70, 2049, 16_385), **options)


def test_options_of_a_rule_of_two_stages(compiled):
    check("novograd", [torch.bfloat16], sizes=(1, 2049, 40_000), **ALL_OPTIONS)


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (torch.float32, math.inf),
        pytest.param(torch.bfloat16, math.nan, marks=pytest.mark.slow),
        pytest.param(torch.float64, -math.inf, marks=pytest.mark.slow),
    ],
    ids=name_of,
)
def test_a_gradient_that_is_not_finite_skips_the_step_on_the_device(dtype, value, compiled):
    sizes = (3, 2049)
    grads = gradients(sizes, [dtype], 4)
    grads[1][1][2048] = value
    grads[2][0][0] = value
    with triton_backend() as machine:
        found = trained("nadam", [dtype], grads, sizes, skip_nonfinite=True)
    with pyupdate.use_backend("cpu"):
        expected = trained("nadam", [dtype], grads, sizes, skip_nonfinite=True)
    assert [skipped for _, skipped, _ in found[2]] == [False, True, True, False]
    found[2][:], expected[2][:] = map(str, found[2]), map(str, expected[2])  # nan is not nan
    assert_alike(found, expected, "skipped")
    assert found[1][0]["step"] == 2.0  # as after two steps: mu_product and step have rested, too
    assert machine.launches[-2].name == "reduce_pass"


def test_finite_squares_that_overflow_do_not_skip(compiled):
    big = torch.full((5,), 2.0**100)
    with triton_backend():
        *_, said = trained("adamw", [torch.float32], [[big]], (5,), max_norm=1.0)
        *_, skips = trained("adamw", [torch.float32], [[big]], (5,), skip_nonfinite=True)
    assert said == [(math.inf, False, 0.0)]
    assert skips == [(math.inf, False, 1.0)]


def test_an_error_is_raised_before_anything_is_written(compiled):
    with triton_backend():
        param = torch.nn.Parameter(torch.ones(70))
        optimizer = pyupdate.optim.AdamW([param], max_norm=1.0, error_if_nonfinite=True)
        param.grad = torch.ones(70)
        optimizer.step()
        before = param.detach().clone()
        param.grad = torch.full((70,), math.nan)
        with pytest.raises(RuntimeError, match="non-finite"):
            optimizer.step()
    assert_same_bits(param.detach(), before, "refused")
    assert optimizer.state[param]["step"] == 1.0


# ----- a scaler, read on the device -------------------------------------------------------------


def scaled_training(steps: int = 6) -> tuple[Any, ...]:
    """`update_model` with a scaler whose scale overflows twice."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 70), torch.nn.ReLU(), torch.nn.Linear(70, 1))
    pyupdate.build(model, "adamw", max_norm=0.5)
    scaler = torch.amp.GradScaler(
        "cpu", 2.0**127, growth_factor=2.0**40, backoff_factor=2.0**-40, growth_interval=2
    )
    skips = []
    for step in range(steps):
        loss = (model(torch.full((3, 5), 10.0 * (step + 1))) - 1.0) ** 2
        pyupdate.update_model(model, loss, scaler=scaler, retain_graph=False)
        scaler.update()
        skips.append(pyupdate.last_update(model).skipped)
    return [p.detach() for p in model.parameters()], skips, scaler.get_scale()


@readers
def test_update_model_with_a_scaler(compiled, by_compiled):
    with triton_backend(compiled=by_compiled):
        params, skips, scale = scaled_training()
    with pyupdate.use_backend("cpu"):
        expected, expected_skips, expected_scale = scaled_training()
    assert skips == expected_skips and True in skips and False in skips
    assert scale == expected_scale
    for x, y in zip(params, expected, strict=True):
        assert_same_bits(x, y, "parameter")


class Unread(torch.Tensor):
    """A number that may be sent to a kernel and not read."""

    def __float__(self) -> float:
        pytest.fail("the step waits for the device")

    def __bool__(self) -> bool:
        pytest.fail("the step waits for the device")

    def item(self) -> float:  # type: ignore[override]
        pytest.fail("the step waits for the device")


@pytest.mark.parametrize("unscaled", [False, True])
def test_a_step_with_a_scaler_reads_no_number(unscaled, compiled):
    param = torch.nn.Parameter(torch.ones(70))
    optimizer = pyupdate.optim.AdamW([param])
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with triton_backend():
        for step in range(3):
            scaler.scale(torch.zeros(()))
            param.grad = torch.full((70,), math.inf if step == 1 else 2.0)
            if unscaled:
                scaler.unscale_(optimizer)
                flags = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
                for device, flag in flags.items():
                    flags[device] = flag.as_subclass(Unread) if step else flag
            elif step:  # the first one is made in parts
                scaler._scale = scaler._scale.as_subclass(Unread)
            scaler.step(optimizer)
            if step:
                flags = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
                values = [flag.as_subclass(torch.Tensor) for flag in flags.values()]
                assert [float(value) for value in values] == [float(step == 1)]
            scaler._scale = scaler._scale.as_subclass(torch.Tensor)
            scaler._per_optimizer_states.clear()
    assert optimizer.state[param]["step"] == 2.0
