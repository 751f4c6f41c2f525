# SPDX-License-Identifier: Apache-2.0
"""What looked like an ordinary step and was none: each of these once hung, crashed or was wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bits import assert_same_bits
from torch import nn

import pyupdate
from pyupdate.optim import CLASSES

LARGE = 2**19 + 5
"""Elements of a row that is a wave of its own."""


@pytest.mark.parametrize("name", ["LAMB", "LARS"])
@pytest.mark.parametrize("sizes", [(LARGE, 0), (0, LARGE), (LARGE, 0, LARGE), (0, 0)], ids=str)
def test_an_empty_parameter_beside_large_ones_of_several_stages(name, sizes, compiled):
    """In a process that can be ended: its wave had no item, for which a thread waited for ever."""
    text = (
        "import torch, pyupdate\n"
        f"params = [torch.nn.Parameter(torch.ones(n)) for n in {sizes}]\n"
        f"optimizer = pyupdate.optim.{name}(params, lr=0.5)\n"
        "for _ in range(2):\n"
        "    for param in params: param.grad = torch.ones_like(param)\n"
        "    optimizer.step()\n"
        "print(*(len({*param.tolist()}) for param in params))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", text],
        env={**os.environ, "PYUPDATE_BACKEND": "cpu"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.stdout.split() == [str(min(size, 1)) for size in sizes], done.stderr


class Raises(nn.Parameter):
    """Its hash raises where it is told to, as a signal may in Python's text of a tensor's hash."""

    left = 0

    def __hash__(self) -> int:
        Raises.left -= 1
        if Raises.left == 0:
            raise KeyboardInterrupt
        return id(self)


def test_an_interrupt_while_the_state_is_read_is_no_lack_of_state(compiled):
    """Of which a momentum would begin anew. At each question of a step in turn."""
    params = [Raises(torch.ones(3)) for _ in range(3)]
    optimizer = pyupdate.optim.SGD(params, lr=0.5, momentum=0.5)

    def step() -> None:
        for param in params:
            param.grad = torch.ones(3)
        optimizer.step()

    step()
    first = optimizer.state.pop(params[0])  # no longer in the order of the parameters
    optimizer.state[params[0]] = first
    raised = 0
    for count in range(1, 40):
        before = [param.tolist() for param in params]
        Raises.left = count
        try:
            step()
        except KeyboardInterrupt:
            raised += 1
            assert [param.tolist() for param in params] == before
        else:
            assert Raises.left > 0, f"question {count} was not heard"
            break
        finally:
            Raises.left = 0
    assert raised > 0
    assert all(param.tolist() == [0.5 - 0.5 * 1.5] * 3 for param in params)


@pytest.mark.parametrize("of", ["gradient", "parameter"])
def test_a_large_tensor_whose_storage_was_made_smaller(of, backend):
    param = nn.Parameter(torch.ones(1 << 16))
    optimizer = pyupdate.optim.SGD([param], lr=0.5)
    param.grad = torch.ones(1 << 16)
    optimizer.step()
    tensor = torch.ones(1 << 16)
    if of == "gradient":
        param.grad = tensor  # another object than before, whose memory may be anybody's
        tensor.untyped_storage().resize_(64)
    else:
        param.untyped_storage().resize_(64)
    with pytest.raises(TypeError, match="larger than its storage"):
        optimizer.step()


def test_the_step_count_of_an_empty_parameter_in_the_memory_of_another_one(backend):
    weight, empty = nn.Parameter(torch.full((4,), 5.0)), nn.Parameter(torch.empty(0))
    optimizer = pyupdate.optim.AdamW([weight, empty], lr=0.0, weight_decay=0.0)
    weight.grad, empty.grad = torch.zeros(4), torch.empty(0)
    optimizer.step()
    optimizer.state[empty]["step"] = weight.data[0]
    with pytest.raises(ValueError, match="shares memory with"):
        optimizer.step()
    assert weight.tolist() == [5.0] * 4


def test_two_strided_parameters_change_their_layouts(backend):
    """Fine as {0, 1, 100, 101} and {2, 3, 4, 5}; {0, 1, 2, 3} and {2, 3, 102, 103} are not."""
    memory = torch.zeros(256)
    a, b = (nn.Parameter(torch.zeros(2, 2)) for _ in range(2))
    a.data, b.data = memory.as_strided((2, 2), (100, 1), 0), memory.as_strided((2, 2), (2, 1), 2)
    optimizer = pyupdate.optim.SGD([a, b], lr=1.0)
    a.grad = b.grad = torch.ones(2, 2)
    optimizer.step()
    before = memory.clone()
    a.data, b.data = memory.as_strided((2, 2), (2, 1), 0), memory.as_strided((2, 2), (100, 1), 2)
    with pytest.raises(ValueError, match="shares memory with"):
        optimizer.step()
    assert_same_bits(memory, before.numpy(), "memory")


def test_a_subnormal_scalar_where_the_caller_flushes_them(compiled):
    found = []
    for flush in (False, True):
        param = nn.Parameter(torch.ones(3))
        param.grad = torch.ones(3)
        optimizer = pyupdate.optim.NAdam([param], lr=0.01)
        optimizer.step()
        optimizer.state[param]["mu_product"].view(torch.int32).fill_(1000)
        torch.set_flush_denormal(flush)
        try:
            optimizer.step()
        finally:
            torch.set_flush_denormal(False)
        found.append(optimizer.state[param]["mu_product"].view(torch.int32).item())
    assert found[0] == found[1] > 0


NO_THREADS = """
import os, resource, torch, pyupdate
torch.set_num_threads(2)
param = torch.nn.Parameter(torch.ones(3_000_000))
param.grad = torch.ones_like(param)
optimizer = pyupdate.optim.SGD([param], lr=0.5)
optimizer.step()
child = os.fork()
if child == 0:
    used = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + 1_000_000, used + 1_000_000))
    torch.set_num_threads(10)
    optimizer.step()
    os._exit(0 if float(param.detach()[-1]) == 0.0 else 3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc/self/statm")
def test_a_forked_child_in_which_no_thread_can_be_made(compiled):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", NO_THREADS],
        env={**os.environ, "PYUPDATE_BACKEND": "cpu"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.stdout == "0\n", done.stderr


@pytest.mark.parametrize("name", ["SGD", "AdamW", "LAMB", "Lion"])
def test_a_parameter_that_crosses_the_boundary_of_two_groups(name, backend):
    """From the end of one to the beginning of the next: all in one list, nothing has changed."""
    made = []
    for moves in (True, False):
        params = [nn.Parameter(torch.full((3,), 2.0)) for _ in range(3)]
        groups = [params[:1], params[1:]] if moves else [params[:2], params[2:]]
        optimizer = CLASSES[name](
            [{"params": groups[0], "lr": 0.125}, {"params": groups[1], "lr": 0.5}], lr=1.0
        )
        rates = [group["lr"] for group in optimizer.param_groups]
        for turn in range(2):
            first, second = optimizer.param_groups
            if turn == 1 and moves:
                first["params"].append(second["params"].pop(0))
            first["lr"], second["lr"] = rates if turn else (0.0, 0.0)
            for param in params:
                param.grad = torch.ones(3)
            optimizer.step()
        made.append(params)
    for one, other in zip(*made, strict=True):
        assert_same_bits(one, other.detach().numpy(), name)


@pytest.mark.parametrize("way", ["window", "deferred"])
def test_what_was_frozen_before_its_step_leaves_no_gradient_behind(way, backend):
    x = torch.ones(2, 4)
    model = pyupdate.build(
        nn.Linear(4, 1), "sgd", lr=0.5, **({"accumulation_steps": 2} if way == "window" else {})
    )
    before = model.weight.detach().clone()
    waiting: dict[str, object] = {}
    if way == "window":
        pyupdate.update_model(model, model(x))
        model.weight.requires_grad_(False)
        pyupdate.update_model(model, model(x))
    else:
        pyupdate.update_model(model, model(x), defer=True, deferred=waiting)
        model.weight.requires_grad_(False)
        pyupdate.drain(waiting)
    assert model.weight.grad is None and model.bias.grad is None
    assert torch.equal(model.weight, before)
    model.weight.requires_grad_(True)
    for _ in range(2 if way == "window" else 1):
        pyupdate.update_model(model, model(x))
    torch.testing.assert_close(model.weight.detach(), before - 0.5)


def test_a_frozen_part_keeps_what_waits_for_the_step_of_its_own_model(backend):
    critic = pyupdate.build(nn.Linear(1, 1), "sgd", lr=0.5, accumulation_steps=2)
    actor = nn.Linear(2, 1)
    both = nn.Sequential(actor, critic)
    pyupdate.build(both, pyupdate.optim.SGD(actor.parameters(), lr=0.5, accumulation_steps=2))
    before = critic.weight.detach().clone()
    pyupdate.update_model(critic, critic(torch.ones(1, 1)))
    critic.requires_grad_(False)
    for _ in range(2):
        pyupdate.update_model(both, both(torch.ones(1, 2)))
    critic.requires_grad_(True)
    assert critic.weight.grad is not None
    pyupdate.update_model(critic, critic(torch.ones(1, 1)))
    torch.testing.assert_close(critic.weight.detach(), before - 0.5)


def test_a_graph_whose_memory_torch_compile_reuses_is_refused_with_the_mend(monkeypatch):
    model = pyupdate.build(nn.Linear(2, 1), "sgd", lr=0.5)

    def backward(*_: object, **__: object) -> None:
        message = (
            "This backward function was compiled with non-empty donated buffers which requires"
        )
        raise RuntimeError(message)

    monkeypatch.setattr(torch.autograd, "backward", backward)
    with pytest.raises(RuntimeError, match=r"of 'Linear\w*'.*pass retain_graph=False"):
        pyupdate.update_model(model, model(torch.ones(1, 2)))


class Lost(Exception):
    """What a backward pass fails by."""


@pytest.mark.parametrize("deferred", [False, True])
def test_another_models_step_in_a_backward_pass_that_fails_is_not_ours(deferred, backend):
    """Of an optimizer that both have: the gradients that were there were dropped."""
    models = [nn.Linear(4, 2) for _ in range(2)]
    groups = [{"params": [*model.parameters()]} for model in models]
    ours, other = models
    ours.current_optimizer = other.current_optimizer = pyupdate.optim.SGD(groups, lr=1.0)  # type: ignore[assignment]
    waiting: dict[str, list] = {}
    if deferred:
        pyupdate.update_model(ours, ours(torch.ones(1, 4)), defer=True, deferred=waiting)
    else:
        ours.weight.grad = torch.full_like(ours.weight, 7.0)
    before = ours.weight.grad.clone()

    def step_the_other(_: torch.Tensor) -> None:
        with torch.enable_grad():
            pyupdate.update_model(other, other(torch.ones(1, 4)))
        raise Lost

    out = ours(torch.ones(1, 4))
    out.register_hook(step_the_other)
    with pytest.raises(Lost):
        pyupdate.update_model(ours, out, deferred=waiting)
    assert torch.equal(ours.weight.grad, before)
    assert len(waiting) == deferred


def test_a_failed_deferral_leaves_what_the_dict_held(backend):
    """Also a callable for which nothing waits any more."""
    model = pyupdate.build(nn.Linear(4, 2), "sgd")
    waiting: dict[str, list] = {}
    pyupdate.update_model(model, model(torch.ones(1, 4)), defer=True, deferred=waiting)
    model.zero_grad()
    before = {name: list(updates) for name, updates in waiting.items()}
    with pytest.raises(ValueError, match="reaches none of its parameters"):
        loss = torch.ones((), requires_grad=True) * 1
        pyupdate.update_model(model, loss, defer=True, deferred=waiting)
    assert waiting == before
