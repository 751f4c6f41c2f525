# SPDX-License-Identifier: Apache-2.0
"""LARS, LAMB, NovoGrad, StableAdamW and ScheduleFreeAdamW beside pytorch-optimizer, in fp64.

An implementation by others, step after step without being set back: where its arguments say the
same as ours, parameters and state agree to a few roundings.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from peer_rules import STATE_OF_PEERS, peer_of_class
from torch import nn

import pyupdate

MATRICES = ((3, 5), (17, 4), (64, 33), (1, 7), (130, 127))
VECTORS = ((1,), (7,), (33,), (1025,))
STEPS = 10
EPS = 2.0**-52

_lamb = {"lr": 0.03, "bias_correction": False, "max_weight_norm": 10.0, "eps": 0.0}
_lars = {"lr": 0.5, "trust_coefficient": 0.25}
ROWS: list[tuple[str, dict[str, Any], tuple[tuple[int, ...], ...]]] = [
    ("LARS", {**_lars, "momentum": 0.0}, MATRICES),
    ("LARS", {**_lars, "momentum": 0.0, "weight_decay": 0.1, "maximize": True}, MATRICES),
    ("LARS", {**_lars, "weight_decay": 0.1, "dampening": 0.25}, MATRICES),
    ("LARS", {**_lars, "weight_decay": 0.1, "nesterov": True}, MATRICES),
    ("LARS", {**_lars, "adapt": False}, VECTORS),
    ("LAMB", _lamb, (*MATRICES, *VECTORS)),
    ("LAMB", {**_lamb, "weight_decay": 0.1, "betas": (0.8, 0.95)}, (*MATRICES, *VECTORS)),
    ("LAMB", {**_lamb, "weight_decay": 0.1, "maximize": True}, (*MATRICES, *VECTORS)),
    (
        "LAMB",
        {"lr": 0.03, "bias_correction": False, "adapt": False, "eps": 0.5, "weight_decay": 0.1},
        (*MATRICES, *VECTORS),
    ),
    ("NovoGrad", {"lr": 0.03}, (*MATRICES, *VECTORS)),
    ("NovoGrad", {"lr": 0.03, "weight_decay": 0.1, "eps": 0.5}, (*MATRICES, *VECTORS)),
    ("NovoGrad", {"lr": 0.03, "grad_averaging": True, "maximize": True}, MATRICES),
    ("StableAdamW", {"lr": 0.03}, (*MATRICES, *VECTORS)),
    ("StableAdamW", {"lr": 0.03, "weight_decay": 0.1, "betas": (0.5, 0.9375)}, MATRICES),
    ("StableAdamW", {"lr": 0.03, "eps": 0.5, "maximize": True}, MATRICES),
    ("ScheduleFreeAdamW", {"lr": 0.03}, (*MATRICES, *VECTORS)),
    ("ScheduleFreeAdamW", {"lr": 0.03, "weight_decay": 0.1, "warmup_steps": 4}, MATRICES),
    ("ScheduleFreeAdamW", {"lr": 0.03, "r": 0.5, "weight_lr_power": 1.0, "eps": 0.5}, MATRICES),
    ("ScheduleFreeAdamW", {"lr": 0.03, "maximize": True, "betas": (0.8, 0.95)}, MATRICES),
]


@pytest.fixture(autouse=True)
def scalars_in_fp64() -> Iterator[None]:
    """Of NovoGrad's second moment and ScheduleFree's sums, which have torch's default type."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def stepped(optimizer: Any, params: list[nn.Parameter]) -> None:
    """Some steps on gradients of 1/2 to 1, of either sign; both sides spoil what they are given."""
    rng = np.random.default_rng(1)
    for _ in range(STEPS):
        for param in params:
            drawn = rng.uniform(-0.5, 0.5, param.shape)
            param.grad = torch.from_numpy(np.copysign(0.5 + np.abs(drawn), drawn))
        optimizer.step()


@pytest.mark.parametrize(("name", "options", "shapes"), ROWS, ids=str)
def test_the_peer_agrees_to_a_few_roundings(name, options, shapes, backend):
    rng = np.random.default_rng(0)
    values = [rng.standard_normal(shape) for shape in shapes]
    ours, theirs = ([nn.Parameter(torch.from_numpy(v.copy())) for v in values] for _ in range(2))
    optimizer = getattr(pyupdate.optim, name)(ours, **options)
    given = {key: value for key, value in options.items() if name != "LARS" or key != "adapt"}
    peer = peer_of_class(name, theirs, given)
    stepped(optimizer, ours)
    stepped(peer, theirs)
    compared = 0
    for mine, other, before in zip(ours, theirs, values, strict=True):
        pairs = {"param": (mine.detach(), other.detach())}
        for key, value in optimizer.state[mine].items():
            its = peer.state[other]
            found = its.get(key, its.get(STATE_OF_PEERS.get(key, key)))
            if found is not None:
                pairs[key] = value, found
        for key, (value, truth) in pairs.items():
            scale = max(1.0, float(truth.abs().max()))
            error = float((value - truth).abs().max())
            assert error <= STEPS * 8 * EPS * scale, f"{key} of {tuple(mine.shape)}: {error}"
        assert not np.allclose(mine.detach().numpy(), before, atol=1e-6)
        compared += len(pairs)
    keys = {"LARS": 1 if options.get("momentum") == 0.0 else 2}.get(name, 3)
    assert compared == keys * len(ours)


def test_lambs_ratio_has_eps_there_and_not_here(backend):
    """A step by hand: the direction u = (4, 4) / (4 + 1) without decay, in a tensor of norm 5.

    The gradient is 8 everywhere: m = 8 / 2 = 4, v = 64 / 4 = 16.
    """
    param, eps, lr = [3.0, 4.0], 1.0, 0.5
    options = {"lr": lr, "betas": (0.5, 0.75), "eps": eps, "bias_correction": False}
    with pytest.raises(ValueError, match="has eps in its ratio"):
        peer_of_class("LAMB", [nn.Parameter(torch.tensor(param))], options)
    import pytorch_optimizer

    given = {"weight_decouple": False, "adam_debias": True, "foreach": False}
    kinds = {
        0.0: pyupdate.optim.LAMB,
        eps: lambda p, bias_correction, **more: pytorch_optimizer.Lamb(p, **more, **given),
    }
    for added, kind in kinds.items():
        p = nn.Parameter(torch.tensor(param))
        optimizer = kind([p], **options)
        p.grad = torch.tensor([8.0, 8.0])
        optimizer.step()
        u = 4.0 / (4.0 + eps)
        norm = 2.0**0.5 * u
        expected = [x - lr * 5.0 / (norm + added) * u for x in param]
        assert np.allclose(p.detach().numpy(), expected, rtol=4 * EPS, atol=0.0)
