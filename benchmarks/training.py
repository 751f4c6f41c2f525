# SPDX-License-Identifier: Apache-2.0
"""A whole training step: forward, backward, clip by the norm and AdamW; the update's share of it.

An optimizer is a small part of a step where a batch is large, and a large one where it is small.
Both models are small, for two cores. The share says how much of the gain a user will see.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import nn

import pyupdate
from pyupdate.bench import timing
from pyupdate.bench.contestants import BASELINE, MAX_NORM, OURS
from pyupdate.bench.truth import WrongError

WARM = 5
CLOSE = 1e-3
"""Relative: the losses of both after `WARM` steps on the same batch. Their norms are summed in
another order, and a tiny gradient's sign turns a move of AdamW round."""


class Transformer(nn.Module):
    """Four blocks, 256 wide, over 1,000 tokens: 3.7M parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1000, 256)
        block = nn.TransformerEncoderLayer(256, 4, 1024, 0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, 4, enable_nested_tensor=False)
        self.head = nn.Linear(256, 1000)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.embedding(tokens)))


def transformer() -> tuple[nn.Module, Callable[[nn.Module], torch.Tensor], str]:
    """A model, its loss on a fixed batch, and what the batch is."""
    tokens = torch.randint(0, 1000, (8, 65))

    def loss(model: nn.Module) -> torch.Tensor:
        logits = model(tokens[:, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    return Transformer(), loss, "8 x 64 tokens"


def perceptron() -> tuple[nn.Module, Callable[[nn.Module], torch.Tensor], str]:
    """784 - 512 - 512 - 512 - 10, as people train it on handwritten digits."""
    widths = (784, 512, 512, 512)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    x, y = torch.randn(64, 784), torch.randint(0, 10, (64,))
    model = nn.Sequential(*layers, nn.Linear(512, 10))
    return model, lambda made: nn.functional.cross_entropy(made(x), y), "64 pictures"


MODELS = {"transformer": transformer, "multilayer perceptron": perceptron}


def measured(name: str, *, seconds: float) -> dict[str, Any]:
    """Torch's fused AdamW after `clip_grad_norm_`, and ours, in turns on copies of one model.

    Returns:
        Median ms of forward and backward, and of the update with the drop of the gradients.
    """
    torch.manual_seed(1)
    model, loss_of, batch = MODELS[name]()
    models = {BASELINE: model, OURS: copy.deepcopy(model)}
    updates = {BASELINE: _torchs(models[BASELINE]), OURS: _ours(models[OURS])}
    times: dict[str, list[tuple[float, float]]] = {who: [] for who in models}
    losses: dict[str, float] = {}
    before = timing.calibrate()
    end = time.perf_counter() + seconds
    turn = 0
    others = timing.others()
    while turn < 2 * WARM or time.perf_counter() < end:
        for who in list(models)[:: 1 if turn % 2 else -1]:
            start = time.perf_counter()
            loss = loss_of(models[who])
            loss.backward()
            between = time.perf_counter()
            updates[who]()
            times[who].append((between - start, time.perf_counter() - between))
            losses[who] = loss.item()
        turn += 1
        if turn == WARM:
            apart = abs(losses[OURS] - losses[BASELINE])
            if not apart <= CLOSE * abs(losses[BASELINE]):
                message = f"the losses of {name} are {apart:.1e} apart after {WARM} steps"
                raise WrongError(message)
            times = {who: [] for who in models}
            others = timing.others()
    taken = others()
    moved = timing.moved(before, timing.calibrate())
    found = {
        who: {
            "backward_ms": 1e3 * statistics.median(one for one, _ in each),
            "update_ms": 1e3 * statistics.median(one for _, one in each),
        }
        for who, each in times.items()
    }
    return {
        "batch": batch,
        "elements": sum(param.numel() for param in model.parameters()),
        "rounds": turn - WARM,
        "moved": moved,
        "others": taken,
        "training": found,
        "share": {
            who: one["update_ms"] / (one["update_ms"] + one["backward_ms"])
            for who, one in found.items()
        },
    }


def _torchs(model: nn.Module) -> Callable[[], None]:
    params = list(model.parameters())
    optimizer = torch.optim.AdamW(params, fused=True)

    def update() -> None:
        nn.utils.clip_grad_norm_(params, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()

    return update


def _ours(model: nn.Module) -> Callable[[], None]:
    optimizer = pyupdate.optim.AdamW(model.parameters(), max_norm=MAX_NORM)

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return update
