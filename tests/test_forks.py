# SPDX-License-Identifier: Apache-2.0
"""Torch's own operations in a forked child, whose parent's threads it has not: nothing hangs.

Whatever pyupdate does there with tensors of many elements, beside the passes (test_process.py).
"""

from __future__ import annotations

import os
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_process import (
    WATCHDOG,
    fingerprint,
    go_on,
    in_a_child,
)
from torch import nn

import pyupdate
from pyupdate import forks

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]

SIZE = 40_000  # torch uses threads from 32,768 elements on
BF16 = torch.bfloat16


def of(name: str, *, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """An optimizer of one large matrix that has made a step."""
    param = nn.Parameter(torch.linspace(-1.0, 1.0, SIZE).reshape(200, -1).to(dtype))
    kind: Any = getattr(pyupdate.optim, name)
    optimizer = kind([param], lr=0.1, **options)
    go_on(optimizer, 1)
    param.grad = param.detach().clone()
    return optimizer


def model_with_loss() -> Any:
    torch.manual_seed(3)
    model = pyupdate.build(nn.Linear(300, 400), "adamw")
    model.loss = model(torch.linspace(0.0, 1.0, 60_000).reshape(200, 300)) ** 2
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    return model


def updated(model: Any, **more: Any) -> list[int]:
    pyupdate.update_model(model, model.loss, **more)
    return fingerprint(model.current_optimizer)


def drained(model: Any) -> list[int]:
    deferred: Any = {}
    before = updated(model, defer=True, deferred=deferred)
    pyupdate.drain(deferred)
    return [*before, *fingerprint(model.current_optimizer)]


def stepped(optimizer: Any) -> list[int]:
    optimizer.step()
    optimizer.step()
    return fingerprint(optimizer)


def averaged(optimizer: Any) -> list[int]:
    with pyupdate.averaged_weights(optimizer):
        inside = fingerprint(optimizer)
    return [*inside, *fingerprint(optimizer)]


def moved(optimizer: Any) -> list[int]:
    optimizer.eval()
    found = fingerprint(optimizer)
    optimizer.train()
    return [*found, *fingerprint(optimizer)]


def loaded(optimizer: Any) -> list[int]:
    optimizer.load_state_dict(optimizer.state_dict())
    return fingerprint(optimizer)


def zeroed(optimizer: Any) -> list[int]:
    optimizer.zero_grad(set_to_none=False)
    return [zlib.crc32(p.grad.numpy()) for p in optimizer.param_groups[0]["params"]]


def made(params: list[nn.Parameter]) -> list[int]:
    return fingerprint(pyupdate.optim.Adagrad(params))


def accelerated(optimizer: Any) -> list[int]:
    return fingerprint(pyupdate.accelerate(optimizer, state_dtype=torch.float32))


WORKS: dict[str, tuple[Callable[[], Any], Callable[[Any], list[int]]]] = {
    "Adafactor": (lambda: of("Adafactor"), stepped),
    "Muon": (lambda: of("Muon", ns_steps=1), stepped),
    "rounding": (lambda: of("Muon", dtype=BF16, ns_steps=1, stochastic_rounding=True), stepped),
    "averaged_weights": (lambda: of("AdamW", ema_decay=0.5), averaged),
    "eval and train": (lambda: of("ScheduleFreeAdamW"), moved),
    "update_model": (model_with_loss, updated),
    "drain": (model_with_loss, drained),
    "load_state_dict": (lambda: of("AdamW", dtype=BF16, state_dtype=torch.float32), loaded),
    "zero_grad": (lambda: of("AdamW"), zeroed),
    "a constructor": (lambda: [nn.Parameter(torch.ones(SIZE))], made),
    "accelerate": (lambda: of("AdamW", dtype=BF16), accelerated),
}


@pytest.mark.parametrize("what", WORKS)
def test_torchs_own_operations_in_a_forked_child(what, backend, two_threads):
    prepare, work = WORKS[what]
    _ = torch.zeros(1_000_000) + 1.0  # torch's threads have run before the fork
    ours, theirs = prepare(), prepare()
    found = in_a_child(lambda: [work(theirs), torch.get_num_threads()])
    torch.set_num_threads(1)  # matrix products have other bits on several
    assert found == [work(ours), 2]


def test_a_child_keeps_torch_from_its_threads_and_the_passes_not(two_threads):
    optimizer = of("AdamW")
    seen: list[Any] = []
    optimizer.register_step_post_hook(
        lambda *_: seen.append((torch.get_num_threads(), forks.threads()))
    )

    def work() -> list[Any]:
        go_on(optimizer, 1)
        return [*seen, (torch.get_num_threads(), forks.threads())]

    _ = torch.zeros(1_000_000) + 1.0
    assert in_a_child(work) == [(1, 2), (2, 2)]
    assert work() == [(2, 2), (2, 2)]


_GENERATIONS = """
import os, sys, threading
import torch
from pyupdate import forks

def child_says(then):
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.write(writing, str(int(forks.hangs)).encode() + then())
        os._exit(0)
    os.wait()
    return os.read(reading, 9)

def computed():
    torch.zeros(1_000_000).add_(1.0)
    return child_says(lambda: b"")

print(child_says(computed).decode(), child_says(lambda: b"").decode(), end=" ")
torch.zeros(1_000_000).add_(1.0)
print(child_says(lambda: child_says(lambda: b"")).decode())
"""


_ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "2", "OMP_DYNAMIC": "false"}


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no /proc/self/task")
def test_a_child_of_one_thread_is_not_held_back():
    # Its torch has a pool of its own, which its own child has not; and so on.
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _GENERATIONS],
        env={**os.environ, **_ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=4 * WATCHDOG,
        check=True,
    )
    assert out.stdout == "01 0 11\n"
