# SPDX-License-Identifier: Apache-2.0
"""What cannot be stepped is refused by name, with the mend, before any byte changes.

Every breakage is undone after its refusal, and the training that goes on must give the bits of one
that never broke: so nothing inside the plan changed either.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from breakages import BREAKAGES, built, set_grads
from cases import FULL
from torch import nn
from ways import optimizer_of, snapshot, ways

import pyupdate

ADAMW = next(case for case in FULL if case.name == "adamw")
MOMENTUM = next(case for case in FULL if case.name == "sgd_momentum")


@pytest.mark.all_pairs
@pytest.mark.parametrize("max_norm", [None, 1.0], ids=["plain", "max_norm"])
@ways
@pytest.mark.parametrize("breakage", BREAKAGES, ids=str)
@pytest.mark.parametrize("steps_before", [0, 2])
def test_refused_by_name_and_nothing_changes(breakage, way, max_norm, steps_before, backend):
    if breakage.needs_state and not steps_before:
        return  # there is none yet
    net, optimizer = built(way, ADAMW, max_norm)
    twin, truth = built(way, ADAMW, max_norm)
    for step in range(steps_before):
        for model, each in ((net, optimizer), (twin, truth)):
            set_grads(model, step)
            each.step()
    set_grads(net, 10)
    undo = breakage.breaks(net, optimizer)
    before = snapshot(optimizer)
    for _ in range(2):  # a second attempt is refused as well
        with pytest.raises(breakage.error) as refused:
            optimizer.step()
        for words in breakage.says:
            assert words in str(refused.value)
        assert snapshot(optimizer) == before
    undo()
    for step in (11, 12):
        for model, each in ((net, optimizer), (twin, truth)):
            set_grads(model, step)
            each.step()
    for (name, param), other in zip(net.named_parameters(), twin.parameters(), strict=True):
        assert_same_bits(param, other, name)
        for key, value in truth.state[other].items():
            assert_same_bits(optimizer.state[param][key], value, f"{name} {key}")


def test_refused_with_a_scaler_and_the_scaler_learns_nothing(backend):
    net, optimizer = built("ours", ADAMW, None)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))
    set_grads(net, 0)
    net.head.weight.data = net.body.weight.data
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="shares memory"):
        scaler.step(optimizer)
    assert snapshot(optimizer) == before
    net.head.weight.data = torch.ones(4, 4)
    scaler.step(optimizer)  # not "already been called"
    scaler.update()


# ----- parameters that are of another kind from the start -----------------------------------------


class Wrapper(torch.Tensor):
    """A tensor that holds another one, as DTensor does."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapper:
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        def inner(value: Any) -> Any:
            return value.inner if isinstance(value, Wrapper) else value

        out = function(*map(inner, args), **{k: inner(v) for k, v in (kwargs or {}).items()})
        return Wrapper(out) if isinstance(out, torch.Tensor) else out


def _quantised() -> torch.Tensor:
    return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)


KINDS: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "complex": (lambda: torch.ones(3, dtype=torch.complex128), "is complex"),
    "integer": (lambda: torch.ones(3, dtype=torch.int64), "has dtype torch.int64"),
    "bool": (lambda: torch.ones(3, dtype=torch.bool), "has dtype torch.bool"),
    "float8": (lambda: torch.ones(3).to(torch.float8_e4m3fn), "torch.float8_e4m3fn"),
    "meta": (lambda: torch.ones(3, device="meta"), "on the meta device"),
    "quantised": (_quantised, "is quantised"),
    "sparse": (lambda: torch.ones(3).to_sparse(), "is sparse"),
    "nested": (
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        "wraps other tensors",
    ),
    "nested-strided": (
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "is nested",
    ),
    "wrapper": (lambda: Wrapper(torch.ones(3)), "is a Wrapper, which wraps other tensors"),
}


@ways
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.filterwarnings("ignore:.*quantiz.*")
@pytest.mark.parametrize("kind", list(KINDS))
def test_kinds_of_parameters(kind, way, backend):
    make, words = KINDS[kind]
    odd = make()
    trainable = odd.is_floating_point() or odd.is_complex()
    net = nn.Module()
    net.good = nn.Linear(2, 2)
    net.odd = nn.Module()
    net.odd.part = nn.Parameter(odd, requires_grad=trainable)
    optimizer = optimizer_of(way, MOMENTUM, net.parameters())
    pyupdate.build(net, optimizer)
    for param in net.good.parameters():
        param.grad = torch.ones_like(param)
    before = snapshot(optimizer)
    if kind.startswith("nested"):  # torch does not let its gradient be set: it is left alone
        optimizer.step()
        assert snapshot(optimizer) != before
        return
    net.odd.part.grad = make()
    before = snapshot(optimizer)
    with pytest.raises(TypeError, match=re.escape("'odd.part'")) as refused:
        optimizer.step()
    assert words in str(refused.value)
    assert "accepted are dense tensors of" in str(refused.value)
    assert snapshot(optimizer) == before
    del optimizer.param_groups[0]["params"][-1]  # the mend
    optimizer.step()
    assert snapshot(optimizer) != before


@pytest.mark.parametrize("count", [-1.0, -2.0])
def test_a_count_below_zero_in_a_loaded_state(count, backend):
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = pyupdate.optim.AdamW([param])
    optimizer.step()
    optimizer.state[param]["step"].fill_(count)
    loaded = pyupdate.optim.AdamW([param])  # whose plan has seen no count before
    loaded.load_state_dict(optimizer.state_dict())
    before = snapshot(loaded)
    with pytest.raises(ValueError, match=r"'step' of .* must be a whole number from 0 on"):
        loaded.step()
    assert snapshot(loaded) == before


def test_a_wrapped_gradient(backend):
    param = nn.Parameter(torch.ones(3))
    param.grad = Wrapper(torch.ones(3))
    optimizer = pyupdate.optim.AdamW([param])
    with pytest.raises(TypeError, match="the gradient of 'group 0, parameter 0' is a Wrapper"):
        optimizer.step()
    assert not optimizer.state and torch.equal(param, torch.ones(3))


@ways
def test_interleaved_memory_is_fine_until_it_meets(way, backend):
    # What was once checked exactly and found apart must be checked again when it moves.
    base = torch.zeros(40)
    first, second = nn.Parameter(base[:20:2]), nn.Parameter(base[1:20:2])
    optimizer = optimizer_of(way, MOMENTUM, [first, second])
    for param in (first, second):
        param.grad = torch.ones(10)
    for _ in range(3):
        optimizer.step()
    second.data = base[2:22:2]
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="shares memory"):
        optimizer.step()
    assert snapshot(optimizer) == before
    second.data = base[3:23:2]
    optimizer.step()
    second.grad = base[4:14]
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="lies in the memory of"):
        optimizer.step()
    assert snapshot(optimizer) == before


@ways
def test_memory_shared_with_a_parameter_that_is_not_stepped_is_fine(way, backend):
    base = torch.zeros(4)
    first, second = nn.Parameter(base), nn.Parameter(base.view(4))
    optimizer = optimizer_of(way, ADAMW, [first, second])
    first.grad = torch.ones(4)
    optimizer.step()
    assert torch.equal(first, second) and first[0] != 0.0


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        (
            "betas",
            (0.9,),
            r"'betas' of parameter group 0 is \(0\.9,\), so rule 'adamw' has no number 'beta2'",
        ),
        ("lr", "x", "'lr' of parameter group 0 is 'x'"),
        (
            "lr",
            torch.tensor([0.1, 0.2]),
            r"'lr' of parameter group 0 is tensor\(\[0\.1000, 0\.2000\]\)",
        ),
        ("lr", "0.1", "'lr' of parameter group 0 is '0.1'"),
        ("weight_decay", 10**400, "'weight_decay' of parameter group 0 is 1000"),
        ("eps", None, "'eps' of parameter group 0 is None"),
        ("eps", KeyError, "'eps' of parameter group 0 is missing"),
        ("amsgrad", KeyError, "'amsgrad' of parameter group 0 is missing, so AdamW knows no rule"),
    ],
)
def test_a_group_without_a_number_is_refused_by_name(key, value, says, backend):
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = pyupdate.optim.AdamW([param])
    param.grad = torch.ones(2)
    optimizer.param_groups[0][key] = value
    if value is KeyError:
        del optimizer.param_groups[0][key]
    with pytest.raises(ValueError, match=says):
        optimizer.step()
    assert param.tolist() == [1.0, 1.0] and not optimizer.state


@pytest.mark.parametrize(
    ("name", "key"), [("Muon", "eps"), ("Muon", "adjust_lr_fn"), ("Adafactor", "eps")]
)
def test_a_group_without_what_a_composite_reads_last_is_refused_first(name, key, backend):
    param = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = getattr(pyupdate.optim, name)([param])
    param.grad = torch.ones(2, 2)
    del optimizer.param_groups[0][key]
    with pytest.raises(ValueError, match=f"'{key}' of parameter group 0 is missing"):
        optimizer.step()
    assert param.tolist() == [[1.0, 1.0]] * 2 and not optimizer.state


NO_NUMBERS = ["0.1", None, [0.1], torch.ones(2), 1j, 10**400]


@pytest.mark.parametrize("steps_before", [0, 1])
@pytest.mark.parametrize(
    ("name", "key", "values", "says"),
    [
        *[("Muon", key, NO_NUMBERS, "") for key in ("lr", "momentum", "weight_decay", "eps")],
        ("Muon", "ns_steps", ["5", None, 5.5, math.nan], "must be a whole number"),
        ("Muon", "ns_coefficients", ["abc", None, (1.0, "2", 3.0), 3.0], "must be three numbers"),
        ("Muon", "nesterov", [torch.ones(2)], "must be True or False"),
        ("Muon", "adjust_lr_fn", ["no", 1], "must be None, 'original' or 'match_rms_adamw'"),
        ("Adafactor", "lr", NO_NUMBERS, ""),
        ("Adafactor", "d", ["0.1", 10**400], "must be two numbers"),
        ("Adafactor", "eps", ["12", (None, "1"), (1.0, None)], "must be two numbers"),
        ("RMSprop", "momentum", ["0.9", None], "knows no rule for it"),
    ],
)
def test_what_is_no_number_is_refused_before_a_byte_changes(
    name, key, values, says, steps_before, backend
):
    params = [nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
    groups = [{"params": [param]} for param in params]
    optimizer = getattr(pyupdate.optim, name)(groups)
    for param in params:
        param.grad = torch.ones(2, 2)
    for _ in range(steps_before):
        optimizer.step()
    right, before = optimizer.param_groups[1][key], snapshot(optimizer)
    for value in values:
        optimizer.param_groups[1][key] = value
        with pytest.raises(ValueError, match="parameter group 1 ") as refused:
            optimizer.step()
        assert says in str(refused.value)
        assert snapshot(optimizer) == before
    optimizer.param_groups[1][key] = right
    optimizer.step()
    assert all(torch.equal(params[0], param) for param in params)


@pytest.mark.all_pairs
@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("wrong", [3, [], [1.0], torch.ones(2, 2)], ids=repr)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("AdamW", {}),
        ("AdamW", {"ema_decay": 0.5}),
        ("SGD", {"momentum": 0.5}),
        ("SGD", {"momentum": 0.5, "max_norm": 1.0}),
        ("LARS", {}),
        ("Muon", {}),
        ("Adafactor", {}),
    ],
    ids=str,
)
def test_state_that_is_no_dict_is_refused(name, options, wrong, steps_before, backend):
    def made() -> tuple[list[nn.Parameter], Any]:
        params = [nn.Parameter(torch.full((2, 2), 2.0)) for _ in range(2)]
        return params, getattr(pyupdate.optim, name)(params, lr=0.25, **options)

    def make_step(params: list[nn.Parameter], optimizer: Any, scale: float) -> None:
        for index, param in enumerate(params):
            param.grad = torch.tensor([[1.0, 2.0], [3.0, -1.0]]) * scale * (index + 1)
        optimizer.step()

    params, optimizer = made()
    twins, twin = made()
    for _ in range(steps_before):
        make_step(params, optimizer, 1.0)
        make_step(twins, twin, 1.0)
    values = [param.detach().clone() for param in params]
    first = {key: value.clone() for key, value in optimizer.state.get(params[0], {}).items()}
    right = optimizer.state.pop(params[1], None)
    optimizer.state[params[1]] = wrong
    for _ in range(2):
        with pytest.raises(TypeError, match=r"state of 'group 0, parameter 1' is a .* not a dict"):
            make_step(params, optimizer, 3.0)
        assert all(map(torch.equal, params, values))
        assert optimizer.state[params[1]] is wrong
        found = optimizer.state.get(params[0], {})
        assert found.keys() == first.keys()
        assert all(torch.equal(found[key], value) for key, value in first.items())
    del optimizer.state[params[1]]
    if right is not None:
        optimizer.state[params[1]] = right
    for scale in (0.5, 2.0):
        make_step(params, optimizer, scale)
        make_step(twins, twin, scale)
    for param, other in zip(params, twins, strict=True):
        assert_same_bits(param, other, name)


@ways
@pytest.mark.parametrize("which", ["parameter", "gradient", "state"])
def test_memory_that_was_freed_is_refused_by_name(which, way, backend):
    params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = optimizer_of(way, ADAMW, params)
    for param in params:
        param.grad = torch.ones(3)
    optimizer.step()
    own = torch.ones(3)  # state of this size has its storage in common with others
    optimizer.state[params[1]]["exp_avg"] = own
    freed = {"parameter": params[1].detach(), "gradient": params[1].grad, "state": own}[which]
    assert freed is not None
    before = params[0].detach().clone()
    freed.untyped_storage().resize_(0)
    with pytest.raises(TypeError, match=rf"{which}.* 'group 0, parameter 1' is without memory"):
        optimizer.step()
    assert torch.equal(params[0], before)
    freed.untyped_storage().resize_(12)
    freed.fill_(1.0)
    optimizer.step()
    assert not torch.equal(params[0], before)


@ways
@pytest.mark.parametrize("which", ["parameter", "gradient", "state"])
def test_a_storage_that_was_made_too_small_is_refused_by_name(which, way, backend):
    params = [nn.Parameter(torch.ones(300)) for _ in range(2)]
    optimizer = optimizer_of(way, ADAMW, params)
    for param in params:
        param.grad = torch.ones(300)
    optimizer.step()
    own = torch.ones(300)
    optimizer.state[params[1]]["exp_avg"] = own
    optimizer.step()
    small = {"parameter": params[1].detach(), "gradient": params[1].grad, "state": own}[which]
    assert small is not None
    before = params[0].detach().clone()
    small.untyped_storage().resize_(4 * 299)
    for _ in range(2):
        with pytest.raises(TypeError, match=rf"{which}.* 'group 0, parameter 1' is larger than"):
            optimizer.step()
        assert torch.equal(params[0], before)
    small.untyped_storage().resize_(4 * 300)
    small.fill_(1.0)
    optimizer.step()
    assert not torch.equal(params[0], before)


@pytest.mark.parametrize("which", ["gradient", "state"])
def test_a_subclass_that_no_parameter_is_of_is_refused_with_the_mend(which, backend):
    class Named(torch.Tensor):
        pass

    param = nn.Parameter(torch.ones(3))
    optimizer = pyupdate.optim.AdamW([param])
    param.grad = torch.ones(3)
    optimizer.step()
    named = torch.ones(3).as_subclass(Named)
    if which == "gradient":
        param.grad = named
    else:
        optimizer.state[param]["exp_avg"] = named
    before = param.detach().clone()
    if backend != "reference":
        with pytest.raises(RuntimeError, match=r"parameter 0.*as_subclass\(torch\.Tensor"):
            optimizer.step()
        assert torch.equal(param, before)
        plain = named.as_subclass(torch.Tensor)
        if which == "gradient":
            param.grad = plain
        else:
            optimizer.state[param]["exp_avg"] = plain
    optimizer.step()
    assert not torch.equal(param, before)
