# SPDX-License-Identifier: Apache-2.0
"""The Triton back end's rows and launches: layouts, late and moved gradients, what is sent when.

The truth is the compiled CPU back end, bit for bit, as in test_triton.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from bits import assert_same_bits, random_values
from cases import DTYPES, name_of

import pyupdate
from pyupdate.pytorch import plan

pytest.importorskip("triton", reason="triton is not installed (make check-device installs it)")

from device.triton_backend import triton_backend
from triton_training import OTHER_CAPABILITIES, assert_alike, check, gradients, readers, trained
from ways import held, plan_of

# ----- rows ---------------------------------------------------------------------------------------


def test_every_small_size(compiled):
    check("adamw", [torch.bfloat16], sizes=range(71), max_norm=1.0)


@readers
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_rows_that_are_not_aligned_are_a_launch_of_their_own(dtype, compiled, by_compiled):
    def trained_on() -> tuple[list[torch.Tensor], list[Any]]:
        rng = np.random.default_rng(9)
        values = [random_values(rng, n, dtype) for n in (1025, 1025, 20_000, 70)]
        offsets = (0, dtype.itemsize, 3 * dtype.itemsize, 0)
        memory = [held(v, offset=o) for v, o in zip(values, offsets, strict=True)]
        params = [torch.nn.Parameter(m.tensor) for m in memory]
        optimizer = pyupdate.optim.AdamW(params, max_norm=1.0)
        for _ in range(2):
            for param, offset in zip(params, (dtype.itemsize, 0, 0, 0), strict=True):
                grad = random_values(rng, param.numel(), dtype)
                param.grad = held(grad, offset=offset).tensor
            optimizer.step()
        for m in memory:
            m.assert_neighbours_untouched("parameter")
        return [p.detach() for p in params], memory

    with triton_backend(compiled=by_compiled) as machine:
        found, _ = trained_on()
    names = [launch.name for launch in machine.launches]
    assert names[-4:] == ["reduce_pass"] * 2 + ["apply_pass"] * 2
    with pyupdate.use_backend("cpu"):
        expected, _ = trained_on()
    for x, y in zip(found, expected, strict=True):
        assert_same_bits(x, y, "parameter")


@readers
def test_other_layouts(compiled, by_compiled):
    def trained_on() -> list[torch.Tensor]:
        torch.manual_seed(0)
        params = [
            torch.nn.Parameter(torch.randn(3, 4, 5, 6).to(memory_format=torch.channels_last)),
            torch.nn.Parameter(torch.randn(30, 20).t()),
            torch.nn.Parameter(torch.randn(4, 6)[:, ::2]),  # left to `reference`
        ]
        optimizer = pyupdate.optim.AdamW(params, max_norm=1.0)
        for _ in range(3):
            for param in params:
                param.grad = torch.randn(param.shape)  # contiguous
            optimizer.step()
        return [p.detach().clone() for p in params], plan_of(optimizer).backends

    with triton_backend(compiled=by_compiled):
        found, names = trained_on()
    assert names == ("reference", "triton")
    with pyupdate.use_backend("cpu"):
        expected, _ = trained_on()
    for x, y in zip(found, expected, strict=True):
        assert_same_bits(x.contiguous(), y.contiguous(), "parameter")


@readers
def test_rows_of_other_counts(compiled, by_compiled):
    # The second parameter's gradient comes late, the first one's rests once.
    grads = gradients((70, 2049), [torch.float32], 5)
    grads[0][1] = grads[2][0] = None
    for rule in ("adamw", "nadam", "sgd_momentum"):
        with triton_backend(compiled=by_compiled):
            found = trained(rule, [torch.float32], grads, (70, 2049))
        with pyupdate.use_backend("cpu"):
            expected = trained(rule, [torch.float32], grads, (70, 2049))
        assert_alike(found, expected, rule)


def test_late_gradients_wait_for_nothing(monkeypatch, compiled):
    # Compiled code knows which rows were stepped alike by what it has done with them.
    def read(self: torch.Tensor) -> Any:
        pytest.fail("a number is read")

    def trained_on() -> list[torch.Tensor]:
        params = [torch.nn.Parameter(torch.full((70,), float(k))) for k in range(3)]
        optimizer = pyupdate.optim.NAdam(params, lr=0.1)
        for step in range(5):
            for k, param in enumerate(params):
                param.grad = torch.arange(70.0) if step in (0, 4) or k != step % 3 else None
            optimizer.step()
            monkeypatch.setattr(torch.Tensor, "tolist", read)  # once there is state
            monkeypatch.setattr(torch.Tensor, "item", read)
        monkeypatch.undo()
        return [p.detach() for p in params]

    with triton_backend(compiled=True):
        found = trained_on()
    with pyupdate.use_backend("cpu"):
        expected = trained_on()
    for x, y in zip(found, expected, strict=True):
        assert_same_bits(x, y, "parameter")


@readers
def test_groups_and_schedules_share_a_launch(compiled, by_compiled):
    def trained_on() -> list[torch.Tensor]:
        params = [torch.nn.Parameter(torch.full((70,), float(k))) for k in range(3)]
        groups = [{"params": [p], "lr": 0.1 * k, "maximize": k == 2} for k, p in enumerate(params)]
        optimizer = pyupdate.optim.SGD(groups, lr=0.1, momentum=0.9, dampening=0.5)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for _ in range(3):
            for param in params:
                param.grad = torch.arange(70.0)
            optimizer.step()
            schedule.step()
        return [p.detach() for p in params]

    with triton_backend(compiled=by_compiled) as machine:
        found = trained_on()
    assert [launch.name for launch in machine.launches] == ["prepare_pass", "apply_pass"] * 3
    with pyupdate.use_backend("cpu"):
        expected = trained_on()
    for x, y in zip(found, expected, strict=True):
        assert_same_bits(x, y, "parameter")


@readers
def test_gradients_that_move_are_followed_and_looked_at(compiled, by_compiled):
    def trained_on() -> list[torch.Tensor]:
        rng = np.random.default_rng(2)
        params = [torch.nn.Parameter(random_values(rng, n, torch.float32)) for n in (0, 70, 2049)]
        optimizer = pyupdate.optim.AdamW(params, max_norm=1.0)
        kept = []
        for step in range(5):
            for k, param in enumerate(params):
                kept.append(param.grad)
                if k != step % 3:
                    param.grad = random_values(rng, param.numel(), torch.float32)
                if step == 0:
                    param.grad = torch.ones(param.numel())
            optimizer.step()
        values = [param.detach().clone() for param in params]
        params[1].grad = optimizer.state[params[1]]["exp_avg"]
        with pytest.raises(ValueError, match="lies in the memory of state 'exp_avg'"):
            optimizer.step()
        return values

    with triton_backend(compiled=by_compiled):
        found = trained_on()
    with pyupdate.use_backend("cpu"):
        expected = trained_on()
    for x, y in zip(found, expected, strict=True):
        assert_same_bits(x, y, "parameter")


@readers
@pytest.mark.parametrize(
    ("change", "shift"),
    [
        (lambda opt, p: opt.load_state_dict(opt.state_dict()), 0),
        (lambda opt, p: opt.state[p]["step"].fill_(7.0), 5),
        (lambda opt, p: p.data.set_(torch.ones(70)), 0),
    ],
    ids=["load_state_dict", "step by hand", "other memory"],
)
def test_what_is_changed_between_steps_is_seen(
    change: Callable[..., Any], shift, compiled, by_compiled
):
    def trained_on() -> tuple[torch.Tensor, float]:
        param = torch.nn.Parameter(torch.arange(70.0))
        optimizer = pyupdate.optim.AdamW([param], lr=0.1)
        for step in range(4):
            if step == 2:
                change(optimizer, param)
            param.grad = torch.arange(70.0) - step
            optimizer.step()
        return param.detach(), float(optimizer.state[param]["step"])

    with triton_backend(compiled=by_compiled):
        found, count = trained_on()
    with pyupdate.use_backend("cpu"):
        expected, _ = trained_on()
    assert count == 4 + shift
    assert_same_bits(found, expected, "parameter")


# ----- what is launched ---------------------------------------------------------------------------


@readers
def test_tables_are_sent_again_only_where_a_pointer_moved(monkeypatch, compiled, by_compiled):
    from pyupdate.backends.triton import Part

    sent = []
    send = Part.send
    monkeypatch.setattr(Part, "send", lambda self, host: (sent.append(host), send(self, host))[1])
    param = torch.nn.Parameter(torch.ones(70))
    param.grad = torch.ones(70)
    optimizer = pyupdate.optim.AdamW([param], max_norm=1.0)
    with triton_backend(compiled=by_compiled):
        for _ in range(2):
            optimizer.step()
        sent.clear()
        for _ in range(3):
            optimizer.step()
        assert not sent
        optimizer.param_groups[0]["lr"] = 0.5
        optimizer.step()
        assert [host.dtype for host in sent] == [torch.float64]  # the numbers alone
        sent.clear()
        kept = param.grad  # or the new one might lie there
        param.grad = torch.ones(70)  # the addresses alone
        optimizer.step()
        assert [host.dtype for host in sent] == [torch.int64]
        del kept
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        plan_of(optimizer).parts[0]._is_cuda = True
        optimizer.step()
        before = param.detach().clone()
        optimizer.param_groups[0]["lr"] = 0.25
        with pytest.raises(RuntimeError, match=r"while a CUDA graph is captured.*three steps"):
            optimizer.step()
        param.grad = torch.ones(70)
        with pytest.raises(RuntimeError, match="an address or the set of gradients has changed"):
            optimizer.step()
    assert_same_bits(param.detach(), before, "refused")


@pytest.mark.parametrize(
    ("rule", "stages", "options"),
    [
        ("adamw", 1, {}),
        ("adamw", 1, {"max_norm": 1.0, "skip_nonfinite": True, "ema_decay": 0.75}),
        ("lamb", 2, {"max_norm": 1.0}),
        ("lamb", 2, {}),
    ],
)
def test_a_step_is_one_launch_and_one_a_stage(rule, stages, options, compiled):
    grads = gradients((70, 2049, 40_000), [torch.float32], 3)
    with triton_backend() as machine:
        trained(rule, [torch.float32], grads, (70, 2049, 40_000), **options)
    first = "reduce_pass" if options else "prepare_pass"
    one = [first, *["apply_pass"] * stages]
    # The first step makes its state between the check and the step.
    assert [launch.name for launch in machine.launches[-2 * len(one) :]] == one * 2
    assert len(machine.launches) <= len(one) * 3 + 1


@pytest.mark.parametrize(("rule", "kernel"), [("adamw", "reduce_pass"), ("lamb", "apply_pass")])
def test_the_last_program_sees_what_the_others_wrote(rule, kernel, compiled):
    # On one OS thread memory is in order, so the order that a GPU needs is read in the PTX.
    with triton_backend() as machine:
        trained(rule, [torch.float32], gradients((70,), [torch.float32], 2), (70,), max_norm=1.0)
    texts = {launch.text for launch in machine.launches if launch.name == kernel}
    ordered = re.compile(
        r"bar\.sync\s+0;\s[^{}]*?atom\.global\.gpu\.acq_rel\.add[^{}]*?bar\.sync\s+0;", re.S
    )
    tickets = [text for text in texts if "atom." in text]
    assert tickets
    for text in tickets:
        (found,) = ordered.findall(text)
        before, after = found.split("atom.global")
        assert "st.global" not in before and "ld.global" not in after


FORBIDDEN = re.compile(r"\b(fma|mad)\.(rn\.)?f|\.approx|\.ftz|div\.full|\.local")
MOVED = re.compile(r"bar\.sync|ldmatrix|stmatrix|st\.shared")


@pytest.mark.parametrize(
    "capability", [90, *(pytest.param(c, marks=pytest.mark.slow) for c in OTHER_CAPABILITIES)]
)
def test_the_ptx_keeps_the_contract_and_moves_16_bytes(capability, compiled):
    wide = {torch.float64: "v2.b64", torch.float32: "v4.b32"}
    for dtype in DTYPES:
        grads = gradients((20_000,), [dtype], 2)
        with triton_backend(capability) as machine:
            trained("adamw", [dtype], grads, (20_000,), max_norm=1.0)
        texts = {launch.name: launch.text for launch in machine.launches}
        for name, text in texts.items():
            assert not FORBIDDEN.search(text), name
        apply = texts["apply_pass"]
        assert not MOVED.search(apply)  # nothing goes from thread to thread
        size = wide.get(dtype, "v4.b32")
        assert len(re.findall(rf"ld\.global\.{size}", apply)) == 4
        assert len(re.findall(rf"st\.global\.{size}", apply)) == 3
        assert re.search(rf"ld\.global\.{size}", texts["reduce_pass"])


def test_a_row_that_is_longer_than_its_memory_is_caught(monkeypatch, compiled):
    # The harness is worth something only if it sees this.
    from pyupdate.backends.triton_rows import Entry

    columns = Entry.columns
    monkeypatch.setattr(Entry, "columns", lambda self: [*columns(self)[:-1], self.size + 1])
    with pytest.raises(AssertionError, match="out of bounds"):
        check("adamw", [torch.float32], sizes=(70,))


@pytest.mark.parametrize("size", [2048, 16_385, 100_000])
def test_sums_are_in_the_one_order(size, compiled):
    # A 1 beside 2**54 is lost in fp64, and several of them are not, so any other order shows.
    grad = torch.ones(size, dtype=torch.float64)
    grad[:: 2048 // 8 + 3] = 2.0**27
    with triton_backend():
        *_, found = trained("adamw", [torch.float64], [[grad]], (size,), max_norm=1.0)
    with pyupdate.use_backend("cpu"):
        *_, expected = trained("adamw", [torch.float64], [[grad]], (size,), max_norm=1.0)
    assert found == expected


@readers
def test_a_first_step_without_memory_leaves_no_state(monkeypatch, compiled, by_compiled):
    real = plan.make_state

    def runs_out(rows, *args):
        real(rows[:1], *args)
        raise torch.OutOfMemoryError

    with triton_backend(compiled=by_compiled):
        params = [torch.nn.Parameter(torch.ones(5)) for _ in range(2)]
        optimizer = pyupdate.optim.SGD(params, lr=1.0, momentum=0.9, dampening=0.5)
        for param in params:
            param.grad = torch.ones(5)
        with monkeypatch.context() as broken:
            broken.setattr(plan, "make_state", runs_out)
            with pytest.raises(torch.OutOfMemoryError):
                optimizer.step()
        assert not any(optimizer.state.get(param) for param in params)
        for turn in (1, 2):  # the first of which no dampening slows down
            optimizer.step()
            moved = 1.0 if turn == 1 else 1.0 + 0.9 + 0.5
            assert_same_bits(params[1], torch.full((5,), 1.0 - moved), str(turn))
