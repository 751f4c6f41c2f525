# SPDX-License-Identifier: Apache-2.0
"""A step of the back end `reference` that fails while it writes, and one under a default device."""

from __future__ import annotations

import ast
import copy
import itertools
import sys
from contextlib import suppress

import pytest
import torch
from bits import array_of, assert_same_bits
from cases import CASES, OTHERS
from compiling import ROOT

import pyupdate
from pyupdate import optim
from pyupdate.backends import cpu, reference
from pyupdate.pytorch.engines import engine_of

# ----- a failure in the write ---------------------------------------------------------------------

SIZES = (3, 40, 1, 17)
LARGEST = 1
KINDS = {
    "sgd": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5),
    "adamw": lambda p: optim.AdamW(p, lr=0.1, amsgrad=True, ema_decay=0.9),
    "adam, stochastic": lambda p: optim.Adam(p, lr=0.1, stochastic_rounding=True),
}


def _params(dtype=torch.bfloat16):
    random = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(size, generator=random).to(dtype)) for size in SIZES]


def _give_gradients(params, seed):
    random = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=random).to(param.dtype)


def _everything(params, optimizer):
    """Bit by bit, state in whatever order."""
    states = [optimizer.state.get(p, {}) for p in params]
    return [
        {"param": param.detach().clone()} | {k: v.detach().clone() for k, v in state.items()}
        for param, state in zip(params, states, strict=True)
    ]


def _assert_same(found, wanted):
    for some, others in zip(found, wanted, strict=True):
        assert some.keys() == others.keys()
        for key, value in some.items():
            assert_same_bits(value, array_of(others[key]), key)


class _FailsAt:
    """Stands in for a function; raises at one of its calls."""

    def __init__(self, function, call, error):
        self.function, self.calls, self.call, self.error = function, 0, call, error

    def __call__(self, *args):
        self.calls += 1
        if self.calls == self.call:
            raise self.error
        return self.function(*args)


def _out_of_memory_at(monkeypatch, call):
    fails = _FailsAt(reference.stored_as, call, torch.OutOfMemoryError("no memory"))
    monkeypatch.setattr(reference, "stored_as", fails)


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_without_memory_for_the_largest_row_nothing_was_done(kind, before, monkeypatch):
    with pyupdate.use_backend("reference"):
        params = _params()
        optimizer = KINDS[kind](params)
        for step in range(before):
            _give_gradients(params, step)
            optimizer.step()
        twins = copy.deepcopy(params)
        twin = KINDS[kind](twins)
        if before:
            twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        _give_gradients(params, 9)
        was = _everything(params, optimizer)
        with monkeypatch.context() as broken:
            _out_of_memory_at(broken, 2)  # the largest row's second new value
            with pytest.raises(torch.OutOfMemoryError):
                optimizer.step()
        _assert_same(_everything(params, optimizer), was)
        _give_gradients(twins, 9)
        for step in (9, 10):
            for some, one in ((params, optimizer), (twins, twin)):
                _give_gradients(some, step)
                one.step()
        _assert_same(_everything(params, optimizer), _everything(twins, twin))


def test_the_order_is_from_the_most_memory_to_the_least(monkeypatch):
    seen = []
    original = reference.Part._write

    def write(part, r, row, inputs, new):
        seen.append(row.param.numel())
        original(part, r, row, inputs, new)

    monkeypatch.setattr(reference.Part, "_write", write)
    with pyupdate.use_backend("reference"):
        params = _params()
        optimizer = optim.AdamW(params)
        _give_gradients(params, 0)
        optimizer.step()
    assert seen == sorted(SIZES, reverse=True)


@pytest.mark.parametrize("kind", KINDS)
def test_after_an_interrupt_rows_are_stepped_whole_or_not_at_all(kind, monkeypatch):
    with pyupdate.use_backend("reference"):
        params = _params()
        optimizer = KINDS[kind](params)
        _give_gradients(params, 1)
        twins = copy.deepcopy(params)
        twin = KINDS[kind](twins)
        untouched = _everything(params, optimizer)
        _give_gradients(twins, 1)
        twin.step()
        stepped = _everything(twins, twin)
        with monkeypatch.context() as broken:
            calls = _FailsAt(reference.Part._new_values, 3, KeyboardInterrupt())
            broken.setattr(reference.Part, "_new_values", lambda *args: calls(*args))
            with pytest.raises(KeyboardInterrupt):
                optimizer.step()
        done = [i for i, size in enumerate(SIZES) if size in (40, 17)]
        found = _everything(params, optimizer)
        _assert_same(found, [(stepped if i in done else untouched)[i] for i in range(len(SIZES))])
        for i in done:  # what is left is stepped as a first step is
            params[i].grad = None
        optimizer.step()
        _assert_same(_everything(params, optimizer), stepped)
        for some, one in ((params, optimizer), (twins, twin)):
            _give_gradients(some, 2)
            one.step()
        _assert_same(_everything(params, optimizer), _everything(twins, twin))


class _Interrupted:
    """As a context: an interrupt at the nth end of `apply`, `_write` or what they call in C.

    That is where Python looks for one. `reached` says whether there were so many.
    """

    WHERE = (reference.Part.apply.__code__, reference.Part._write.__code__)

    def __init__(self, end):
        self.left, self.reached = end, False

    def __enter__(self):
        sys.setprofile(self._look)
        return self

    def _look(self, frame, event, _):
        if event.endswith("return") and frame.f_code in self.WHERE:
            self.left -= 1
            if self.left == 0:
                self.reached = True
                raise KeyboardInterrupt

    def __exit__(self, *raised):
        sys.setprofile(None)


@pytest.mark.parametrize("kind", KINDS)
def test_wherever_an_interrupt_comes_rows_are_stepped_whole_or_not_at_all(kind):
    def made():
        params = _params()
        optimizer = KINDS[kind](params)
        _give_gradients(params, 1)
        return params, optimizer

    with pyupdate.use_backend("reference"):
        params, optimizer = made()
        untouched = _everything(params, optimizer)
        optimizer.step()
        stepped = _everything(params, optimizer)
        counts = set()
        for end in itertools.count(1):
            params, optimizer = made()
            with suppress(KeyboardInterrupt), _Interrupted(end) as interrupted:
                optimizer.step()
            if not interrupted.reached:
                break
            found = _everything(params, optimizer)
            moved = [
                not torch.equal(now["param"], then["param"])
                for now, then in zip(found, untouched, strict=True)
            ]
            both = zip(moved, untouched, stepped, strict=True)
            wanted = [done if is_done else then for is_done, then, done in both]
            _assert_same(found, wanted)
            counts.add(sum(moved))
            for param, done in zip(params, moved, strict=True):
                param.grad = None if done else param.grad
            optimizer.step()
            _assert_same(_everything(params, optimizer), stepped)
        assert counts == set(range(len(SIZES) + 1))


def test_rows_of_other_back_ends_are_written_after_those_that_need_memory(compiled, monkeypatch):
    home = cpu.home

    def of_every_other_row(row, *args):
        return home(row, *args) if row.position % 2 == 0 else None

    monkeypatch.setattr(cpu, "home", of_every_other_row)
    params = _params(torch.float32)
    optimizer = optim.SGD(params, lr=0.1, momentum=0.9, dampening=0.5)
    _give_gradients(params, 0)
    was = _everything(params, optimizer)
    with monkeypatch.context() as broken:
        _out_of_memory_at(broken, 1)
        with pytest.raises(torch.OutOfMemoryError):
            optimizer.step()
    _assert_same(_everything(params, optimizer), was)
    optimizer.step()
    (plan,) = engine_of(optimizer).plans.values()
    assert plan.backends == ("cpu", "reference")


@pyupdate.rule(state={"before": 0.0})
def keeps_what_was(param, grad, before, lr):
    before = param
    param = param - lr * grad
    return param, before


def test_a_rule_may_keep_what_a_parameter_was():
    with pyupdate.use_backend("reference"):
        param = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        optimizer = optim.from_rule(keeps_what_was)([param], lr=0.5)
        param.grad = torch.ones(2)
        for step in range(3):
            optimizer.step()
            assert param.tolist() == [1.0 - 0.5 * (step + 1), -2.0 - 0.5 * (step + 1)]
            assert optimizer.state[param]["before"].tolist() == [
                1.0 - 0.5 * step,
                -2.0 - 0.5 * step,
            ]


# ----- under a default device ---------------------------------------------------------------------


def _stepped_under(device, make, backend):
    """Interleaved columns, so that memory is looked at too; what three steps leave."""
    random = torch.Generator().manual_seed(0)
    both = torch.randn(6, 4, generator=random)
    params = [torch.nn.Parameter(both[:, ::2]), torch.nn.Parameter(both[:, 1::2])]
    grads = [[torch.randn(6, 2, generator=random) for _ in params] for _ in range(3)]
    optimizer = make(params)
    with pyupdate.use_backend(backend), torch.device(device):
        for some in grads:
            for param, grad in zip(params, some, strict=True):
                param.grad = grad
            optimizer.step()
    return _everything(params, optimizer)


_ALONE = {
    "Muon": lambda p: optim.Muon(p, lr=0.1),
    "Adafactor": lambda p: optim.Adafactor(p, lr=0.1),
    "all options": lambda p: optim.AdamW(
        p, lr=0.1, max_norm=0.5, clip_value=0.3, skip_nonfinite=True, ema_decay=0.5
    ),
}
_MAKERS = {str(case): case.ours for case in (*CASES, *OTHERS)} | _ALONE


@pytest.mark.parametrize("made", _MAKERS)
def test_a_default_device_changes_nothing(made, backend):
    found = _stepped_under("meta", _MAKERS[made], backend)
    _assert_same(found, _stepped_under("cpu", _MAKERS[made], backend))


def test_a_scalers_step_under_a_default_device(backend):
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    params = _params(torch.float32)
    optimizer = optim.AdamW(params, lr=0.1, max_norm=1.0)
    scaler.scale(torch.ones(()))
    for factor, steps in ((4.0, 1), (torch.inf, 1)):
        for param in params:
            param.grad = torch.full_like(param, factor)
        with torch.device("meta"):
            scaler.step(optimizer)
            scaler.update()
        assert {float(optimizer.state[param]["step"]) for param in params} == {float(steps)}
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    with torch.device("meta"):
        params[0].grad = torch.ones_like(params[0])
        for param in params[1:]:
            param.grad = None
        optimizer.step()
    assert float(optimizer.state[params[0]]["step"]) == 2.0


_MAKES_TENSORS = frozenset(
    ("tensor", "as_tensor", "scalar_tensor", "zeros", "ones", "empty", "full", "arange")
    + ("linspace", "eye", "rand", "randn", "randint", "randperm")
)


def test_whoever_makes_a_tensor_says_where():
    silent = []
    for file in sorted((ROOT / "pyupdate").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and isinstance(node.func.value, ast.Name)
                and node.func.value.id == "torch"
                and node.func.attr in _MAKES_TENSORS
                and "device" not in {word.arg for word in node.keywords}
            ):
                silent.append(f"{file.name}:{node.lineno}")
    assert not silent, silent
