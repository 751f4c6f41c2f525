# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: RET504 - a rule returns the names that it assigned
"""`pyupdate.rule` and `from_rule`: a user's rule is an optimizer like any other."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from bits import array_of, assert_same_bits, torch_steps
from cases import DTYPES, name_of
from compiling import ROOT
from own_rules import (
    NUMBERS,
    SIZES,
    STEPS,
    descent,
    every_rule,
    everything,
    layer_wise,
    signum,
    stepped,
    values,
)

import pyupdate
from pyupdate.kernels import oracle
from pyupdate.kernels.rules import RULES
from pyupdate.language import (
    absolute,
    divide,
    maximum,
    sign,
)
from pyupdate.optim import from_rule
from pyupdate.pytorch.engines import engine_of
from pyupdate.pytorch.rows import numbers_of

# ----- numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@every_rule
def test_a_rule_gives_the_bits_of_the_numpy_oracle(rule, dtype):
    optimizer, params = stepped(rule, dtype)
    (plan,) = engine_of(optimizer).plans.values()
    assert plan.backends == ("reference",)
    sign_of, *numbers = numbers_of(rule, optimizer.param_groups[0])
    assert numbers == [NUMBERS[rule][name] for name in rule.numbers]
    for i, param in enumerate(params):
        found = array_of(values(1, dtype)[i])
        state = {
            name: oracle.store(np.full_like(oracle.load(found), initial), found)
            for name, initial in rule.state.items()
        }
        for step in range(STEPS):
            grad = array_of(values(2 + step, dtype)[i])
            found, state = oracle.step(
                rule, found, grad, state, numbers, count=step + 1, multiplier=sign_of
            )
        assert_same_bits(param, found, f"{SIZES[i]}")
        for name, value in state.items():
            assert_same_bits(optimizer.state[param][name], value, f"{SIZES[i]}, {name}")
        assert optimizer.state[param]["step"].item() == STEPS


def test_against_torchs_sgd_and_plain_numpy():
    _, params = stepped(descent, torch.float64)
    truth = [torch.nn.Parameter(value) for value in values(1, torch.float64)]
    grads = [values(seed, torch.float64) for seed in range(2, 2 + STEPS)]
    torch_steps(torch.optim.SGD(truth, lr=0.3, foreach=False), truth, grads)
    for param, other in zip(params, truth, strict=True):
        # Torch contracts p - lr g: in each step one rounding less of a number below 16.
        torch.testing.assert_close(param, other, rtol=0.0, atol=STEPS * 2.0**-50)

    optimizer, params = stepped(signum, torch.float64)
    for i, param in enumerate(params):
        p, m = values(1, torch.float64)[i].numpy(), 0.0
        for grad in grads:
            m = 0.8 * m + (1.0 - 0.8) * grad[i].numpy()
            p = p - 0.01 * (np.sign(m) + 0.1 * p)
        np.testing.assert_allclose(param.detach().numpy(), p, rtol=1e-12)
        np.testing.assert_allclose(optimizer.state[param]["exp_avg"].numpy(), m, rtol=1e-12)


def test_layer_wise_against_plain_numpy():
    _, params = stepped(layer_wise, torch.float64)
    for i, param in enumerate(params):
        p, m = values(1, torch.float64)[i].numpy(), 0.0
        for t in range(STEPS):
            m = 0.9 * m + 0.1 * values(2 + t, torch.float64)[i].numpy()
            trust = np.linalg.norm(p) / np.linalg.norm(m) if np.any(m) else 1.0
            p = p - 0.1 * trust * m / (1 - 0.9 ** (t + 1))
        np.testing.assert_allclose(param.detach().numpy(), p, rtol=1e-9)


def test_a_shipped_rule_makes_a_class_too():
    numbers = {"lr": 0.01, "beta1": 0.8, "beta2": 0.9, "eps": 1e-8, "weight_decay": 0.1}
    found, truth = ([torch.nn.Parameter(value) for value in values(1)] for _ in range(2))
    grads = [values(seed) for seed in range(2, 5)]
    torch_steps(from_rule(RULES["adamw"])(found, **numbers), found, grads)
    ours = pyupdate.optim.AdamW(truth, lr=0.01, betas=(0.8, 0.9), eps=1e-8, weight_decay=0.1)
    torch_steps(ours, truth, grads)
    for param, other in zip(found, truth, strict=True):
        assert_same_bits(param, array_of(other), "adamw")


# ----- it is an optimizer -------------------------------------------------------------------------


def test_groups_have_numbers_of_their_own_and_defaults_fill_the_rest():
    a, b = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
    groups = [{"params": [a], "weight_decay": 0.5}, {"params": [b], "lr": 0.25, "beta": 0.0}]
    optimizer = from_rule(signum)(groups, lr=0.5, weight_decay=0.0)
    assert [group["beta"] for group in optimizer.param_groups] == [0.75, 0.0]
    torch_steps(optimizer, [a, b], [[torch.full((1,), 2.0)] * 2])
    # m = 0.25 * 2: a <- 1 - 0.5 (1 + 0.5); m = 2: b <- 1 - 0.25
    assert (a.item(), b.item()) == (0.25, 0.75)
    assert [optimizer.state[p]["exp_avg"].item() for p in (a, b)] == [0.5, 2.0]


def test_a_number_may_come_from_the_groups_alone():
    param = torch.nn.Parameter(torch.ones(1))
    optimizer = from_rule(descent)([{"params": [param], "lr": torch.tensor(0.5)}])
    torch_steps(optimizer, [param], [[torch.ones(1)]])
    assert param.item() == 0.5


def test_maximize_and_a_scheduler():
    param = torch.nn.Parameter(torch.ones(1))
    optimizer = from_rule(descent)([param], lr=0.5, maximize=True)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for expected in (1.5, 1.75, 1.875):
        torch_steps(optimizer, [param], [[torch.ones(1)]])
        schedule.step()
        assert param.item() == expected


def test_the_step_reaches_the_rule():
    @pyupdate.rule
    def counting(param, step):
        param = param + step
        return param

    param = torch.nn.Parameter(torch.zeros(1))
    optimizer = from_rule(counting)([param])
    torch_steps(optimizer, [param], [[torch.ones(1)]] * 4)
    assert param.item() == 1 + 2 + 3 + 4
    assert optimizer.state[param]["step"].item() == 4


def half_mean(grad):
    total = grad * 1.0
    return total


def half_mean_turn(total, longest, numel, factor):
    mean = divide(total, numel) * factor
    longest = maximum(longest, mean)
    return mean, longest


@pyupdate.rule(
    state={"anchor": "param", "rate": "factor"},
    after=((half_mean, half_mean_turn),),
    scalars={"longest": "factor"},
)
def turning(param, anchor, rate, mean, lr):
    param = anchor - lr * mean * rate
    return param


def test_turns_scalars_and_state_that_begins_as_something():
    param = torch.nn.Parameter(torch.tensor([8.0, 4.0]))
    optimizer = from_rule(turning)([param], lr=0.5, factor=0.25)
    torch_steps(optimizer, [param], [[torch.tensor([12.0, 4.0])], [torch.zeros(2)]])
    # The mean is 8, a quarter of it 2: 8 - 0.5 * 2 * 0.25; then no gradient, so the anchor.
    state = optimizer.state[param]
    assert param.tolist() == state["anchor"].tolist() == [8.0, 4.0]
    assert state["rate"].tolist() == [0.25, 0.25]
    assert state["longest"].item() == 2.0
    param.grad = torch.tensor([12.0, 4.0])
    optimizer.step()
    assert param.tolist() == [7.75, 3.75]


def test_max_norm_and_a_scaler():
    param = torch.nn.Parameter(torch.zeros(2))
    optimizer = from_rule(descent)([param], lr=1.0, max_norm=1.0)
    torch_steps(optimizer, [param], [[torch.tensor([3.0, 4.0])]])
    assert param.tolist() == pytest.approx([-0.6, -0.8], rel=1e-6)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))
    param.grad = torch.tensor([np.inf, 1.0])
    before = param.detach().clone()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(param, before)
    assert scaler.get_scale() == 2.0
    assert optimizer.state[param]["step"].item() == 1


class Named(from_rule(signum)):  # type: ignore[misc]
    """A subclass that has a name of its own."""


def torn(optimizer):
    return pickle.loads(pickle.dumps(optimizer))


def saved(optimizer):
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # the test's own bytes, a whole optimizer


@pytest.mark.parametrize("copied", [copy.deepcopy, torn, saved])
@pytest.mark.parametrize("kind", [from_rule(signum), Named], ids=["made", "named"])
def test_copies_and_pickles_go_on_alike(copied, kind):
    params = [torch.nn.Parameter(value) for value in values(1)]
    optimizer = kind(params, lr=0.1, weight_decay=0.25, max_norm=2.0)
    torch_steps(optimizer, params, [values(2)])
    other = copied(optimizer)
    assert type(other) is kind
    assert other.pyupdate_options == optimizer.pyupdate_options
    copies = other.param_groups[0]["params"]
    assert copies[0] is not params[0]
    for one, its in ((optimizer, params), (other, copies)):
        torch_steps(one, its, [values(3)])
    for a, b in zip(params, copies, strict=True):
        assert_same_bits(b, array_of(a), "param")
        assert_same_bits(other.state[b]["exp_avg"], array_of(optimizer.state[a]["exp_avg"]), "m")
        assert other.state[b]["step"].item() == 2


def test_a_state_dict_goes_on_where_it_was():
    optimizer, params = stepped(everything)
    copies = [torch.nn.Parameter(param.detach().clone()) for param in params]
    other = from_rule(everything)(copies, lr=9.0, low=9.0, high=9.0)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    for one, its in ((optimizer, params), (other, copies)):
        torch_steps(one, its, [values(9)])
    for a, b in zip(params, copies, strict=True):
        assert_same_bits(b, array_of(a), "param")
        for key, value in optimizer.state[a].items():
            assert_same_bits(other.state[b][key], array_of(value), key)


def test_the_same_rule_gives_the_same_class():
    assert from_rule(signum) is from_rule(signum)
    assert from_rule(copy.deepcopy(signum)) is from_rule(signum)
    assert torn(signum) is signum
    assert torn(from_rule(signum)) is from_rule(signum)
    assert torn(Named) is Named


def test_what_help_shows():
    assert repr(signum) == "<pyupdate.rule signum(lr, beta=0.75, weight_decay), state: exp_avg>"
    assert repr(descent) == "<pyupdate.rule descent(lr), state: none>"
    shown = str(from_rule(signum).__signature__)
    assert shown.startswith("(params, *, lr, beta=0.75, weight_decay, maximize=False, max_norm")
    assert from_rule(everything).__doc__ == "Every word of the language, and the step."


# ----- build --------------------------------------------------------------------------------------


def test_build_takes_a_rule_and_its_numbers():
    model = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    pyupdate.build(model, descent, lr=0.5)
    pyupdate.update_model(model, model(torch.tensor([[1.0, 2.0]])))
    assert model.weight.tolist() == [[0.5, 0.0]]
    assert type(model.current_optimizer) is from_rule(descent)
    model = pyupdate.build(model, signum, lr=0.5, weight_decay=0.0, max_norm=2.0)
    assert model.current_optimizer.pyupdate_options.max_norm == 2.0


def test_build_passes_arguments_to_the_class_of_a_name():
    model = pyupdate.build(torch.nn.Linear(2, 1), "sgd", lr=0.5, momentum=0.25)
    assert model.current_optimizer.param_groups[0]["momentum"] == 0.25


@pytest.mark.parametrize(
    ("optimizer", "arguments", "message"),
    [
        (descent, {}, "number 'lr' has no default: give lr="),
        (descent, {"lr": 0.1, "beta": 1.0}, "takes no 'beta'; its numbers are: lr; its options"),
        ("sgd", {"beta": 1.0}, "beta"),
        (torch.optim.SGD, {"lr": 1.0}, "build got an unexpected option 'lr'"),
    ],
)
def test_build_refuses_arguments_that_nobody_takes(optimizer, arguments, message):
    model = torch.nn.Linear(2, 1)
    with pytest.raises(TypeError, match=message):
        pyupdate.build(model, optimizer, **arguments)
    assert not hasattr(model, "current_optimizer")


# ----- around it ----------------------------------------------------------------------------------


def test_a_rule_in_a_function_works_but_is_not_pickled():
    @pyupdate.rule
    def inner(param, grad, lr):
        param = param - lr * grad
        return param

    param = torch.nn.Parameter(torch.ones(1))
    optimizer = from_rule(inner)([param], lr=0.5)
    copied = copy.deepcopy(optimizer)
    torch_steps(copied, copied.param_groups[0]["params"], [[torch.ones(1)]])
    assert copied.param_groups[0]["params"][0].item() == 0.5
    with pytest.raises(pickle.PicklingError, match=r"'inner' cannot be pickled.*top level"):
        pickle.dumps(optimizer)


def test_rules_need_no_torch():
    """The decorator and the language are importable without a framework."""
    code = (
        "import sys, pyupdate, pyupdate.language; pyupdate.rule; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_absolute_and_sign_are_exact_on_every_value():
    special = [0.0, -0.0, 1.5, -1.5, np.inf, -np.inf, 5e-324]
    assert [absolute(x) for x in special] == [abs(x) for x in special]
    assert [sign(x) for x in special] == [np.sign(x) for x in special]
    assert str(absolute(-0.0)) == "0.0"
    assert absolute(np.nan) != absolute(np.nan)


def test_a_rule_that_nobody_compiled_says_so_once(compiled, caplog):
    made = pyupdate.rule(taken_by_the_log)
    for _ in range(2):
        param = torch.nn.Parameter(torch.ones(2))
        param.grad = torch.ones(2)
        from_rule(made)([param], lr=0.5).step()
    said = [record.getMessage() for record in caplog.records if record.name == "pyupdate"]
    assert said == [
        "back end 'cpu' cannot run here, falling back: rule 'taken_by_the_log' is not compiled "
        "(python -m pyupdate.compile)"
    ]


def taken_by_the_log(param, grad, lr):
    param = param - lr * grad
    return param


def test_numpys_numbers_are_numbers():
    found = []
    for lr in (0.25, np.float32(0.25), np.float64(0.25)):
        param = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        optimizer = from_rule(descent)([param], lr=lr)
        param.grad = torch.tensor([2.0, 1.0])
        optimizer.step()
        found.append(param.tolist())
    assert found == [[0.5, -2.25]] * 3
