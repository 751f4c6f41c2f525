# SPDX-License-Identifier: Apache-2.0
"""`update_model` against torch's own loop: every sentence of its promise but the deferred ones."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from training import (
    CASES,
    Case,
    Unplanned,
    assert_same,
    assert_untouched,
    batch,
    everything,
    loss_of,
    network,
    plain_step,
)

import pyupdate
from pyupdate import last_update, update_model
from pyupdate.pytorch import reentrant

every_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture(autouse=True)
def _back_end(request):
    """Run each case on its back end."""
    case = request.node.callspec.params.get("case") if hasattr(request.node, "callspec") else None
    if case is None:
        yield
    else:
        with case.on_backend():
            yield


def scaler_of(scale: float = 2.0**10, **options) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale, **options)


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


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # torch's own Adagrad
@pytest.mark.parametrize("optimizer", ["stock", "adagrad"])
def test_sparse_gradients(optimizer):
    def make(sparse):
        torch.manual_seed(3)
        return nn.Embedding(6, 2, sparse=sparse).double()

    model = make(True)
    if optimizer == "stock":
        model.current_optimizer = torch.optim.AdamW(model.parameters())
        before = everything(model)
        with pytest.raises(TypeError, match=r"'weight' is sparse"):
            update_model(model, model(torch.tensor([1, 1, 4])))
        assert_untouched(before, model)
        return
    truth = make(True)
    model.current_optimizer = Unplanned(model.parameters(), lr=0.1)
    theirs = torch.optim.Adagrad(truth.parameters(), lr=0.1)
    update_model(model, model(torch.tensor([1, 1, 4])) ** 2)
    (truth(torch.tensor([1, 1, 4])) ** 2).mean().backward()
    theirs.step()
    assert_same(model, truth)


def _accumulated(first_sparse: bool, second_sparse: bool) -> torch.Tensor:
    weight = nn.Parameter(torch.arange(8.0, dtype=torch.float64).reshape(4, 2))
    model = nn.Module()
    model.weight = weight
    model.current_optimizer = torch.optim.SGD([weight], lr=1.0)
    model.current_optimizer.step = lambda: seen.append(weight.grad.to_dense().clone())
    seen: list[torch.Tensor] = []
    index = torch.tensor([1, 3])
    nn.functional.embedding(index, weight, sparse=first_sparse).pow(2).mean().backward()
    update_model(model, nn.functional.embedding(index[:1], weight, sparse=second_sparse).pow(2))
    return seen[0]


def test_sparse_and_dense_gradients_add_up():
    expected = _accumulated(False, False)
    assert bool((expected[1] == torch.tensor([2.0 + 1.0, 3.0 + 1.5])).all()), expected
    for first in (False, True):
        for second in (False, True):
            assert torch.equal(_accumulated(first, second), expected), (first, second)


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


def _refuse(*_):
    raise TypeError("not today")


# ----- graphs -------------------------------------------------------------------------------------


@every_case
def test_retain_graph(case: Case):
    model = case.model()
    x = batch(0)
    hidden = (x * model[0].bias.sum()).sum()  # a graph that needs no weight that the step writes
    model.current_optimizer = case.make([model[2].weight])
    update_model(model, hidden + model[2].weight.sum())
    update_model(model, hidden + model[2].weight.sum(), retain_graph=False)
    before = everything(model)
    with pytest.raises(RuntimeError, match="backward through the graph a second time") as caught:
        update_model(model, hidden + model[2].weight.sum())
    assert "defer" not in str(caught.value)  # torch's own words
    assert_untouched(before, model)


@every_case
def test_a_loss_that_needs_old_weights_names_its_model(case: Case):
    """Also a test of version counters: compiled kernels write behind autograd's back."""
    generator = case.model(0, "generator")
    critic = nn.Linear(3, 2).double()
    critic.current_optimizer = case.make(critic.parameters())
    critic.model_name = "critic"
    fake = generator(batch(0))
    score = critic(fake)
    update_model(critic, score**2)
    before = everything(generator, critic)
    with pytest.raises(RuntimeError, match=r"'generator'.*defer=True") as caught:
        update_model(generator, -score)
    assert "modified by an inplace operation" in str(caught.value.__cause__)
    assert_untouched(before, generator, critic)


@every_case
def test_the_same_model_twice_on_one_graph_is_refused(case: Case):
    model = case.model()
    loss = loss_of(model, 0)
    update_model(model, loss)
    before = everything(model)
    with pytest.raises(RuntimeError, match=r"'net'.*defer=True"):
        update_model(model, loss)
    assert_untouched(before, model)


def test_reentrant_checkpoints_never_hide_parameters():
    block, head = nn.Linear(3, 3), nn.Linear(3, 1)
    model = nn.ModuleDict({"block": block, "head": head})
    pyupdate.build(model, "sgd", model_name="net")
    x = torch.ones(2, 3)
    ways = {
        "module": lambda x: checkpoint(block, x, use_reentrant=True),
        "lambda": lambda x: checkpoint(lambda y: block(y), x, use_reentrant=True),
        "method": lambda x: checkpoint(block.forward, x, use_reentrant=True),
    }
    for run in ways.values():
        for _ in range(2):  # what was judged once is judged again
            before = everything(model)
            with pytest.raises(ValueError, match=r"'block\.weight' of 'net'.*use_reentrant=False"):
                update_model(model, head(run(x.clone().requires_grad_())))
            assert_untouched(before, model)
    with pytest.raises(ValueError, match="use_reentrant=True"):
        update_model(model, checkpoint(block, x.clone().requires_grad_(), use_reentrant=True))
    # Another model's checkpoint is none of this one's business, whatever this one leaves unused.
    critic = nn.ModuleDict({"used": nn.Linear(3, 1), "unused": nn.Linear(1, 1)})
    pyupdate.build(critic, "sgd")
    weight = critic["used"].weight.detach().clone()
    fake = checkpoint(block, x.clone().requires_grad_(), use_reentrant=True)
    update_model(critic, critic["used"](fake))
    assert not torch.equal(critic["used"].weight, weight)
    # use_reentrant=False trains the block
    weight = block.weight.detach().clone()
    update_model(model, head(checkpoint(block, x, use_reentrant=False)))
    assert not torch.equal(block.weight, weight)


def test_the_graph_is_searched_once_for_a_set_of_unreached_parameters(monkeypatch):
    model = nn.ModuleList([nn.Linear(2, 2) for _ in range(3)])
    pyupdate.build(model, "sgd")
    searched = []
    monkeypatch.setattr(reentrant, "_checkpointed", lambda loss: searched.append(loss) or ())
    for _ in range(3):
        update_model(model, model[0](torch.ones(1, 2)))
    assert len(searched) == 1
    update_model(model, model[1](torch.ones(1, 2)))
    assert len(searched) == 2
    update_model(model, model[2](model[1](model[0](torch.ones(1, 2)))))
    assert len(searched) == 2


class _Runs:
    """A callable that shows nothing of what it runs."""

    def __init__(self, block):
        self.run = {"block": block}

    def __call__(self, x):
        return self.run["block"](x)


def test_a_reentrant_checkpoint_of_nobody_knows_what_warns_once():
    model = nn.ModuleDict({"block": nn.Linear(3, 3), "head": nn.Linear(3, 1)})
    pyupdate.build(model, "sgd", model_name="net")
    x = torch.ones(2, 3, requires_grad=True)
    run = _Runs(model["block"])
    with pytest.warns(RuntimeWarning, match=r"'net'.*use_reentrant=False") as caught:
        update_model(model, model["head"](checkpoint(run, x, use_reentrant=True)))
    assert caught[0].filename == __file__
    update_model(model, model["head"](checkpoint(run, x, use_reentrant=True)))


# ----- failures leave everything as it was --------------------------------------------------------


class _Breaks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise ArithmeticError("broken in the middle")


@every_case
@pytest.mark.parametrize("with_grad", [False, True])
def test_a_backward_that_raises_in_the_middle(case: Case, with_grad):
    model = case.model()
    update_model(model, loss_of(model, 0))
    if with_grad:
        model[0].weight.grad = torch.ones_like(model[0].weight)
        model[2].bias.grad = torch.ones_like(model[2].bias)
    before = everything(model)
    hidden = _Breaks.apply(model[1](model[0](batch(0))))
    deferred: dict = {"other": [print]}
    for defer in (False, True):
        with pytest.raises(ArithmeticError, match="broken in the middle"):
            update_model(model, model[2](hidden), defer=defer, deferred=deferred)
        assert_untouched(before, model)
        assert deferred == {"other": [print]}


@every_case
@pytest.mark.parametrize("with_scaler", [False, True])
def test_a_step_that_is_refused(case: Case, with_scaler):
    model = case.model()
    update_model(model, loss_of(model, 0))
    loss_of(model, 1).mean().backward()
    handle = model.current_optimizer.register_step_pre_hook(_refuse)
    scaler = scaler_of() if with_scaler else None
    before = everything(model)
    with pytest.raises(TypeError, match="not today"):
        update_model(model, loss_of(model, 2), scaler=scaler)
    assert_untouched(before, model)
    handle.remove()
    model.zero_grad()
    truth, optimizer = case.twin(model)
    optimizer.load_state_dict(copy.deepcopy(model.current_optimizer.state_dict()))
    update_model(model, loss_of(model, 2), scaler=scaler)  # nor did the scaler change
    plain_step(truth, optimizer, 2)
    assert_same(model, truth)


def test_a_parameter_that_cannot_be_stepped_is_named_and_nothing_changes():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = nn.Parameter(torch.zeros(1, 1).expand(2, 2))
    model.current_optimizer = torch.optim.AdamW(model.parameters())
    model[0].bias.grad = torch.ones(2)
    before = everything(model)
    with pytest.raises((TypeError, ValueError), match=r"1\.weight"):
        update_model(model, model(torch.ones(1, 2)))
    assert_untouched(before, model)


@every_case
def test_losses_that_reach_nothing(case: Case):
    model, other = case.model(), case.model(1, "other")
    loss_of(model, 0).mean().backward()
    before = everything(model, other)
    with torch.no_grad():
        constant = loss_of(model, 0)
    for loss in (constant, loss_of(model, 0).detach(), torch.tensor(3), loss_of(other, 0)):
        with pytest.raises(ValueError, match=r"'net'.*depend.*use_reentrant=True"):
            update_model(model, loss)
        assert_untouched(before, model, other)
    with pytest.raises(ValueError, match=r"'net'.*no elements"):
        update_model(model, loss_of(model, 0)[:0])
    assert_untouched(before, model, other)
    loss = loss_of(model, 0)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"'net'.*frozen"):
        update_model(model, loss)
    assert_untouched(before, model, other)


@every_case
def test_an_optimizer_of_other_parameters_is_refused(case: Case):
    model = case.model()
    model.current_optimizer = case.make(network().parameters())
    loss = loss_of(model, 0)
    with pytest.raises(ValueError, match=r"'net'.*none of its trainable parameters"):
        update_model(model, loss, retain_graph=False)
    loss.mean().backward()  # the graph was not used up


def _keras(kind: str, *bases: type) -> object:
    return type(kind, bases, {"__module__": "keras.src.models.model"})()


def _tensor() -> object:
    return type("EagerTensor", (), {"__module__": "tensorflow.python.framework.ops"})()


class _UsersKeras(type("Model", (), {"__module__": "keras.src.models.model"})):
    pass


def test_what_is_no_model_or_no_loss_is_refused_first():
    model = network()
    loss = torch.ones(1)
    for wrong in (3.0, None, [loss], "loss"):
        with pytest.raises(ValueError, match=r"loss must be a torch.Tensor, but is"):
            update_model(None, wrong, defer=True)
    with pytest.raises(
        ValueError, match=r"loss is a tensorflow.*TensorFlow is not in this version"
    ):
        update_model(model, _tensor())
    for keras in (_keras("Model"), _keras("Model", nn.Module), _UsersKeras()):
        with pytest.raises(ValueError, match="Keras are not in this version"):
            update_model(keras, loss)
    for wrong, named in ((None, "NoneType"), (object(), "object"), (nn.Linear, "the class Linear")):
        with pytest.raises(ValueError, match=f"must be a torch.nn.Module, but is .*{named}"):
            update_model(wrong, loss)
    with pytest.raises(ValueError, match=r"tape.*TensorFlow.*not in this version"):
        update_model(model, loss, tape=object())


def test_a_model_without_optimizer_says_how_to_attach_one():
    model = network()
    with pytest.raises(ValueError, match=r"Sequential.*no optimizer.*pyupdate\.build"):
        update_model(model, loss_of(model, 0))
    for wrong in (None, 3, torch.optim.SGD):
        model.current_optimizer = wrong
        with pytest.raises(ValueError, match=r"Sequential.*attached.*pyupdate\.build"):
            update_model(model, loss_of(model, 0))
    assert all(param.grad is None for param in model.parameters())


# ----- scalers ------------------------------------------------------------------------------------


@every_case
def test_with_a_scaler_steps_skips_and_scales_are_torchs(case: Case):
    model = case.model()
    truth, optimizer = case.twin(model)
    ours, theirs = scaler_of(growth_interval=2), scaler_of(growth_interval=2)
    for seed in range(8):
        loss = loss_of(model, seed)
        expected = loss_of(truth, seed).mean()
        if seed in (0, 4):
            loss = loss * torch.tensor([[1.0, 1.0, float("inf")]])
            expected = expected * float("inf")
        before = everything(model)
        update_model(model, loss, scaler=ours)
        assert last_update(model).skipped == (seed in (0, 4))
        theirs.scale(expected).backward()
        theirs.step(optimizer)
        optimizer.zero_grad()
        if seed in (0, 4):
            assert_untouched(before, model)
        ours.update()
        theirs.update()
        assert ours.get_scale() == theirs.get_scale()
        assert ours.state_dict() == theirs.state_dict()
        assert_same(model, truth)
    assert_same(model, truth, optimizer)


@every_case
def test_a_second_step_before_update_raises_torchs_error(case: Case):
    model = case.model()
    scaler = scaler_of()
    update_model(model, loss_of(model, 0), scaler=scaler)
    before = everything(model)
    loss = loss_of(model, 1)
    with pytest.raises(RuntimeError, match=r"step\(\) has already been called since the last"):
        update_model(model, loss, scaler=scaler, retain_graph=False)
    assert_untouched(before, model)
    scaler.update()
    update_model(model, loss, scaler=scaler)  # neither was the graph used up


@every_case
def test_scaled_gradients_of_the_user_are_included(case: Case):
    model = case.model()
    truth, optimizer = case.twin(model)
    ours, theirs = scaler_of(), scaler_of()
    ours.scale(loss_of(model, 0).mean()).backward()
    update_model(model, loss_of(model, 1), scaler=ours)
    plain_step(truth, optimizer, 0, 1, scaler=theirs)
    assert_same(model, truth, optimizer)


@every_case
def test_gradients_that_were_unscaled_already_are_refused(case: Case):
    model = case.model()
    scaler = scaler_of()
    scaler.scale(loss_of(model, 0).mean()).backward()
    scaler.unscale_(model.current_optimizer)
    before = everything(model)
    for defer in (False, True):
        with pytest.raises(RuntimeError, match=r"unscale_\(\) has already been called.*'net'"):
            update_model(model, loss_of(model, 1), scaler=scaler, defer=defer, deferred={})
        assert_untouched(before, model)


@every_case
def test_two_models_share_a_scaler(case: Case):
    models = [case.model(0, "a"), case.model(1, "b")]
    truths = [case.twin(model) for model in models]
    ours, theirs = scaler_of(), scaler_of()
    for seed in range(3):
        for model, (truth, optimizer) in zip(models, truths, strict=True):
            update_model(model, loss_of(model, seed), scaler=ours)
            plain_step(truth, optimizer, seed, scaler=theirs)
        ours.update()
        theirs.update()
    for model, (truth, optimizer) in zip(models, truths, strict=True):
        assert_same(model, truth, optimizer)


@every_case
def test_a_disabled_scaler_acts_as_none(case: Case):
    model = case.model()
    truth, optimizer = case.twin(model)
    scaler = scaler_of(enabled=False)
    for seed in range(2):  # no update() between: None has none
        update_model(model, loss_of(model, seed), scaler=scaler)
        plain_step(truth, optimizer, seed)
    assert_same(model, truth, optimizer)


@every_case
def test_a_subclass_of_the_scaler(case: Case):
    class Loud(torch.amp.GradScaler):
        pass

    model = case.model()
    truth, optimizer = case.twin(model)
    update_model(model, loss_of(model, 0), scaler=Loud("cpu"))
    plain_step(truth, optimizer, 0)
    assert_same(model, truth)


@every_case
def test_with_a_scaler_nothing_that_the_optimizer_holds_has_a_gradient(case: Case):
    model = case.model()
    model.current_optimizer = case.make(model[0].parameters())
    before = [param.detach().clone() for param in model.parameters()]
    update_model(model, model[2].bias, scaler=scaler_of())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert all(param.grad is None for param in model.parameters())


def test_a_scaler_of_another_kind_is_refused():
    model = pyupdate.build(network(), "sgd", model_name="net")
    with pytest.raises(ValueError, match=r"scaler must be a torch\.amp\.GradScaler.*float"):
        update_model(model, loss_of(model, 0), scaler=2.0)


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
