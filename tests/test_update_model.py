# SPDX-License-Identifier: Apache-2.0
"""`update_model` against torch's own loop; graphs, failures and scalers have files of their own."""

from __future__ import annotations

import gc
import subprocess
import sys
import warnings
import weakref

import pytest
import torch
from torch import nn
from training import (
    CASES,
    Case,
    assert_same,
    batch,
    loss_of,
    network,
    plain_step,
    scaler_of,
)

from pyupdate import last_update, update_model

every_case = pytest.mark.parametrize("case", CASES)
pytestmark = pytest.mark.usefixtures("backend_of_case")


# ----- the update is torch's ----------------------------------------------------------------------


@every_case
def test_steps_are_those_of_torchs_loop(case: Case):
    model = case.model()
    truth, optimizer = case.twin(model)
    for seed in range(6):
        assert update_model(model, loss_of(model, seed)) is None
        assert all(param.grad is None for param in model.parameters())
        plain_step(truth, optimizer, seed)
        assert_same(model, truth, optimizer)


@every_case
@pytest.mark.parametrize("shape", [(), (1,), (18,), (3, 2, 3)])
def test_the_mean_of_a_loss_of_any_shape_is_differentiated(case: Case, shape):
    model = case.model()
    truth, optimizer = case.twin(model)
    loss = loss_of(model, 0)
    loss = loss.reshape(shape) if len(shape) and shape != (1,) else loss.mean().reshape(shape)
    update_model(model, loss)
    plain_step(truth, optimizer, 0)
    assert_same(model, truth)


@every_case
def test_gradients_of_the_user_are_included_and_not_written(case: Case):
    model = case.model()
    truth, optimizer = case.twin(model)
    loss_of(model, 1).mean().backward()
    kept = [param.grad for param in model.parameters()]
    values = [grad.clone() for grad in kept]
    update_model(model, loss_of(model, 2))
    plain_step(truth, optimizer, 1, 2)
    assert_same(model, truth, optimizer)
    assert all(torch.equal(grad, value) for grad, value in zip(kept, values, strict=True))


@every_case
def test_gradients_of_the_user_count_where_the_loss_does_not_reach(case: Case):
    model = case.model()
    truth, optimizer = case.twin(model)
    loss_of(model, 1).mean().backward()
    update_model(model, model[0](batch(2)))
    loss_of(truth, 1).mean().backward()
    truth[0](batch(2)).mean().backward()
    optimizer.step()
    assert_same(model, truth, optimizer)


@every_case
def test_nothing_but_the_models_trainable_parameters_is_differentiated(case: Case):
    model, other = case.model(0), case.model(1, "other")
    truth, optimizer = case.twin(model)
    for param in (model[0].bias, truth[0].bias):
        param.requires_grad_(False)
    frozen_grad = model[0].bias.grad = torch.full_like(model[0].bias, 3.0)
    held = [torch.ones_like(param) for param in other.parameters()]
    for param, grad in zip(other.parameters(), held, strict=True):
        param.grad = grad
    before = [param.detach().clone() for param in other.parameters()]
    x = batch(0).requires_grad_()
    loss = (model(x) - 0.3) ** 2 + 0.0 * other(x)
    update_model(model, loss)
    plain_step(truth, optimizer, 0)
    assert_same(model, truth)
    assert x.grad is None
    assert model[0].bias.grad is frozen_grad
    assert bool((frozen_grad == 3.0).all())
    for param, grad, value in zip(other.parameters(), held, before, strict=True):
        assert param.grad is grad
        assert bool((grad == 1.0).all())
        assert torch.equal(param, value)


@every_case
def test_an_unused_parameter_is_left_alone(case: Case):
    model = case.model()
    model.unused = nn.Parameter(torch.ones(4, dtype=torch.float64))
    model.current_optimizer.add_param_group({"params": [model.unused]})
    loss = (model[2](model[1](model[0](batch(0)))) - 0.3) ** 2
    update_model(model, loss)
    assert bool((model.unused == 1.0).all())
    assert model.unused not in model.current_optimizer.state or not any(
        key in model.current_optimizer.state[model.unused] for key in ("exp_avg", "momentum_buffer")
    )


@every_case
def test_what_the_optimizer_does_not_hold_is_differentiated_not_stepped_and_dropped(case: Case):
    model = case.model()
    truth, _ = case.twin(model)
    model.current_optimizer = case.make(model[2].parameters())
    optimizer = case.truth(truth[2].parameters())
    before = model[0].weight.detach().clone()
    seen = []
    model[0].weight.register_hook(seen.append)
    update_model(model, loss_of(model, 0))
    loss_of(truth, 0).mean().backward()
    optimizer.step()
    assert_same(model, truth)
    assert torch.equal(model[0].weight, before)
    assert len(seen) == 1
    assert bool((seen[0] != 0.0).any())
    assert all(param.grad is None for param in model.parameters())


@every_case
@pytest.mark.parametrize("with_scaler", [False, True])
def test_an_optimizer_that_two_models_share_steps_one_of_them(case: Case, with_scaler):
    model, other = network(0), network(1)
    shared = case.make([*model.parameters(), *other.parameters()])
    model.current_optimizer = other.current_optimizer = shared
    truths = []
    for one in (model, other):
        truth, optimizer = case.twin(one)
        truths.append((truth, optimizer))
    (other[0].weight * 2.0).sum().backward()
    kept = other[0].weight.grad
    frozen = [param.detach().clone() for param in other.parameters()]
    scaler = scaler_of() if with_scaler else None
    update_model(model, loss_of(model, 0), scaler=scaler)
    plain_step(*truths[0], 0)
    assert_same(model, truths[0][0])
    assert other[0].weight.grad is kept
    assert bool((kept == 2.0).all())
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), frozen, strict=True))
    if scaler is not None:
        scaler.update()
    other.zero_grad()
    update_model(other, loss_of(other, 1))
    plain_step(*truths[1], 1)
    assert_same(other, truths[1][0])


@every_case
def test_shared_weights_are_one_parameter(case: Case):
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5)).double()
    model[2].weight = model[0].weight
    model.current_optimizer = case.make(model.parameters())
    truth = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5)).double()
    truth[2].weight = truth[0].weight
    truth.load_state_dict(model.state_dict())
    optimizer = case.truth(truth.parameters())
    for seed in range(3):
        update_model(model, loss_of(model, seed))
        plain_step(truth, optimizer, seed)
    assert_same(model, truth)


@every_case
def test_a_changed_module_tree_is_seen(case: Case):
    model = case.model()
    update_model(model, loss_of(model, 0))
    model[2] = nn.Linear(7, 3).double()
    model.current_optimizer = case.make(model.parameters())
    truth, optimizer = case.twin(model)
    model[0].weight.requires_grad_(False)
    truth[0].weight.requires_grad_(False)
    update_model(model, loss_of(model, 1))
    plain_step(truth, optimizer, 1)
    assert_same(model, truth)


def test_trainable_parameters_come_in_torchs_order():
    from pyupdate.pytorch.gradients import trainable

    shared = nn.Linear(3, 3)
    tree = nn.Module()
    tree.late = None
    tree.a = nn.Sequential(shared, nn.Sequential(nn.Conv2d(1, 2, 3), shared), nn.LayerNorm(3))
    tree.b = nn.ModuleDict({"x": nn.Embedding(4, 2), "y": nn.ParameterList([torch.ones(2)])})
    tree.own = nn.Parameter(torch.ones(1))
    tree.register_parameter("nothing", None)
    tree.register_module("nobody", None)
    tree.again = tree.own
    tree.a[1][0].weight.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(network())

    class Chosen(nn.Linear):
        def parameters(self, recurse=True):
            return iter([self.bias])

    for model in (tree, scripted, Chosen(2, 2), torch.nn.DataParallel(network())):
        expected = [param for param in model.parameters() if param.requires_grad]
        found = trainable(model)
        assert [id(param) for param in found] == [id(param) for param in expected]
        assert expected


@every_case
def test_works_under_no_grad(case: Case):
    model = case.model()
    truth, optimizer = case.twin(model)
    loss = loss_of(model, 0)
    with torch.no_grad():
        update_model(model, loss)
    plain_step(truth, optimizer, 0)
    assert_same(model, truth)


@every_case
def test_hooks_of_the_optimizer_and_schedulers_run(case: Case):
    model = case.model()
    truth, optimizer = case.twin(model)
    calls = []
    model.current_optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    model.current_optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    ours = torch.optim.lr_scheduler.StepLR(model.current_optimizer, 1, 0.5)
    theirs = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for seed in range(3):
        update_model(model, loss_of(model, seed))
        ours.step()
        plain_step(truth, optimizer, seed)
        theirs.step()
    assert calls == ["before", "after"] * 3
    assert_same(model, truth)


def _refuse(*_):
    raise TypeError("not today")


@pytest.fixture
def process_group(tmp_path):
    address = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@every_case
@pytest.mark.parametrize("view", [False, True])
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed")
def test_a_data_parallel_model(case: Case, view, process_group):
    """Whose `.grad` may be views of a bucket that the next backward pass overwrites."""
    inner = network()
    truth, optimizer = case.twin(inner)
    model = nn.parallel.DistributedDataParallel(inner, gradient_as_bucket_view=view)
    model.current_optimizer = case.make(model.parameters())
    for seed in range(4):
        update_model(model, loss_of(model, seed))
        plain_step(truth, optimizer, seed)
        loss_of(model, 10 + seed).mean().backward()
        held = [(param.grad, param.grad.clone()) for param in model.parameters()]
        handle = model.current_optimizer.register_step_pre_hook(_refuse)
        with pytest.raises(TypeError, match="not today"):
            update_model(model, loss_of(model, 20 + seed))
        handle.remove()
        for param, (grad, value) in zip(model.parameters(), held, strict=True):
            assert param.grad is grad
            assert torch.equal(grad, value)
        deferred: dict = {}
        for shift in (20, 30):
            loss = loss_of(model, shift + seed)
            update_model(model, loss, defer=True, deferred=deferred)
        deferred.popitem()[1][0]()
        plain_step(truth, optimizer, 10 + seed, 20 + seed, 30 + seed)
        assert_same(inner, truth)


# ----- what happened, and what does not -----------------------------------------------------------


@every_case
def test_last_update(case: Case):
    model = case.model()
    assert last_update(model) is None
    scaler = scaler_of(2.0**7)
    loss = loss_of(model, 0)
    gradients = torch.autograd.grad(loss.mean(), list(model.parameters()), retain_graph=True)
    norm = torch.linalg.vector_norm(torch.cat([grad.flatten() for grad in gradients]))
    update_model(model, loss, scaler=scaler)
    last = last_update(model)
    assert last is not None
    assert not last.skipped
    assert last.multiplier == 2.0**-7
    if case.planned:
        assert last.norm == pytest.approx(norm.item(), rel=1e-12)
    scaler.update(2.0**3)
    assert last_update(model) == last
    assert last_update(model.current_optimizer) == last
    update_model(model, loss_of(model, 1), defer=True, deferred={})
    assert last_update(model) == last  # nothing was applied


def test_last_update_of_anything_else():
    for wrong in (None, 3, network()):
        with pytest.raises(ValueError, match="last_update takes a model with an optimizer"):
            last_update(wrong)


@every_case
def test_never_prints(case: Case, capfd):
    model = case.model()
    update_model(model, loss_of(model, 0), scaler=scaler_of())
    assert capfd.readouterr() == ("", "")


@every_case
def test_no_model_is_kept_alive(case: Case):
    model = case.model(name=None)
    update_model(model, loss_of(model, 0))
    update_model(model, loss_of(model, 1), defer=True, deferred={}, scaler=scaler_of())
    gone = weakref.ref(model)
    weight = weakref.ref(model[0].weight)
    del model
    gc.collect()
    assert gone() is None
    assert weight() is None


def test_importing_loads_no_framework():
    program = (
        "import sys, pyupdate\n"
        "from pyupdate import build, last_update, update_model\n"
        "try: update_model(None, 1.0)\n"
        "except ValueError: pass\n"
        "else: sys.exit('accepted')\n"
        "found = {'torch', 'tensorflow', 'keras'} & set(sys.modules)\n"
        "sys.exit(f'imported {found}' if found else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
