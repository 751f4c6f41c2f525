# SPDX-License-Identifier: Apache-2.0
"""Where new state lies: that of small tensors in common memory, and nobody notices."""

import copy
import gc
import io
import pickle
from itertools import pairwise

import pytest
import torch

from pyupdate import optim
from pyupdate.pytorch import new_state

SMALL = ((16,), (3, 5), (1,), (), (700,))
KEYS = ("step", "exp_avg", "exp_avg_sq", "ema")


def stepped(shapes, kind=optim.AdamW, steps=2, **options):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = kind(params, **options)
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()
    return params, optimizer


def end_of(tensor):
    return tensor.data_ptr() + tensor.numel() * tensor.itemsize


@pytest.mark.parametrize("key", KEYS)
def test_small_state_of_one_key_lies_in_order(key, backend):
    params, optimizer = stepped(SMALL, ema_decay=0.9)
    found = [optimizer.state[param][key] for param in params]
    for before, after in pairwise(found):
        gap = after.data_ptr() - end_of(before)
        assert 0 <= gap < new_state.ALIGNED
        if key != "step":
            offset = after.data_ptr() - found[0].data_ptr()
            assert offset % new_state.ALIGNED == 0


def test_kinds_of_state_have_memory_of_their_own():
    params, optimizer = stepped(SMALL, ema_decay=0.9)
    inner = optimizer.state[params[0]]
    assert len({inner[key].untyped_storage().data_ptr() for key in KEYS}) == len(KEYS)


def test_large_and_strided_tensors_have_memory_of_their_own():
    params, optimizer = stepped(((8,), (new_state.SMALL // 4 + 1,), (8,)))
    strided = torch.nn.Parameter(torch.randn(4, 8).t())
    strided.grad = torch.randn(8, 4)
    optimizer.add_param_group({"params": [strided]})
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()
    for param in (params[1], strided):
        alone = optimizer.state[param]["exp_avg"]
        assert alone.untyped_storage().nbytes() == alone.numel() * alone.itemsize
        assert alone.stride() == param.stride()


def test_common_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(new_state, "COMMON", 1 << 12)
    made = []
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *a, **k: made.append(zeros(*a, **k)) or made[-1])
    stepped(((256,),) * 10, steps=1)
    blocks = [one.nbytes for one in made if one.dim() == 1 and one.numel() > 64]
    assert sorted(blocks) == [1 << 11] * 2 + [1 << 12] * 4  # 4, 4 and 2 of 1 KiB, of two moments


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (1, 1), (2, 1, 3), (1,), ()], ids=str)
def test_strides_are_torchs(shape, backend):
    (param,), optimizer = stepped((shape,))
    for key in ("exp_avg", "exp_avg_sq"):
        assert optimizer.state[param][key].stride() == torch.zeros_like(param).stride()


def test_neighbours_are_not_touched():
    params, optimizer = stepped(SMALL)
    before = [optimizer.state[param]["exp_avg"].clone() for param in params]
    for param in params:
        param.grad = None
    params[1].grad = torch.ones_like(params[1])
    optimizer.step()
    for i, param in enumerate(params):
        same = torch.equal(optimizer.state[param]["exp_avg"], before[i])
        assert same is (i != 1)


def test_a_checkpoint_is_as_long_as_its_numbers():
    _, optimizer = stepped(((256,),) * 100)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    _, torchs = stepped(((256,),) * 100, torch.optim.AdamW)
    other = io.BytesIO()
    torch.save(torchs.state_dict(), other)
    assert file.tell() <= other.tell()


@pytest.mark.parametrize("whole", [False, True])
def test_so_is_a_pickle(whole):
    params, optimizer = stepped(((256,),) * 100)
    _, torchs = stepped(((256,),) * 100, torch.optim.AdamW)
    some = [
        one.state_dict() if whole else one.state_dict()["state"][7] for one in (optimizer, torchs)
    ]
    ours, theirs = (pickle.dumps(one) for one in some)
    assert len(ours) <= len(theirs)
    for param in params:
        for tensor in optimizer.state[param].values():
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize


def test_a_loaded_checkpoint_trains_on_as_before():
    params, optimizer = stepped(SMALL)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    others = [torch.nn.Parameter(param.detach().clone()) for param in params]
    loaded = torch.optim.AdamW(others, foreach=False)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for param, other in zip(params, others, strict=True):
        param.grad = torch.ones_like(param)
        other.grad = torch.ones_like(other)
    optimizer.step()
    loaded.step()
    eps = torch.finfo(torch.float32).eps
    for param, other in zip(params, others, strict=True):
        ours, theirs = optimizer.state[param], loaded.state[other]
        assert ours["step"] == theirs["step"] == 3
        assert torch.all((param - other).abs() <= 8 * eps * param.abs().clamp(min=1e-3))
        for key in ("exp_avg", "exp_avg_sq"):
            bound = 2 * eps * ours[key].abs().clamp(min=1.0)  # the gradients are 1
            assert torch.all((ours[key] - theirs[key]).abs() <= bound)


def test_a_copy_shares_nothing():
    params, optimizer = stepped(SMALL)
    copied_params, copied = copy.deepcopy((params, optimizer))
    before = [copied.state[param]["exp_avg"].clone() for param in copied_params]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    for param, value in zip(copied_params, before, strict=True):
        assert torch.equal(copied.state[param]["exp_avg"], value)


def test_state_is_no_view_and_its_memory_is_freed_with_it():
    params, optimizer = stepped(SMALL)
    inner = optimizer.state[params[0]]
    assert inner["exp_avg"]._base is None and not inner["exp_avg"]._is_view()
    storage = inner["exp_avg"].untyped_storage()._weak_ref()
    assert not torch.UntypedStorage._expired(storage)
    del optimizer, inner
    gc.collect()
    assert torch.UntypedStorage._expired(storage)
    torch.UntypedStorage._free_weak_ref(storage)
