# SPDX-License-Identifier: Apache-2.0
"""How often a step of Muon and of Adafactor goes over memory, whatever the number of tensors.

Each is a planned pass and what follows it. The pass is counted by what its stage reads and writes,
what follows by the operations that torch is asked for (Muon) and by the blocks that a sweep takes
and stores (Adafactor).
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pyupdate
from pyupdate.kernels.rules import RULES
from pyupdate.optim import adafactor_stacks
from pyupdate.optim.adafactor_packs import Pack
from pyupdate.optim.adafactor_stacks import Stack

COUNTS = (1, 2, 7)


def with_grads(shape: tuple[int, ...], count: int) -> list[nn.Parameter]:
    params = [nn.Parameter(torch.randn(shape)) for _ in range(count)]
    for param in params:
        param.grad = torch.randn(shape)
    return params


def of_the_pass(rule: str) -> Counter[str]:
    """By what is gone over: reads and writes of the planned pass, in elements of a parameter."""
    (stage,) = RULES[rule].stages
    found = Counter(f"read {name}" for name in stage.elements)
    found.update(f"write {name}" for name in stage.writes)
    return found


# ----- Muon ---------------------------------------------------------------------------------------


class Reads(TorchDispatchMode):
    """Elements that operations read and write of some tensors, and what they make besides."""

    def __init__(self, tensors: dict[str, list[torch.Tensor]], size: int) -> None:
        super().__init__()
        self.names = {t.untyped_storage().data_ptr(): n for n, of in tensors.items() for t in of}
        self.total = sum(tensor.numel() for tensor in tensors["param"])
        self.size = size  # of one parameter: less is a number or a norm, not a pass
        self.elements: Counter[str] = Counter()
        self.products = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = op(*args, **(kwargs or {}))
        if op.is_view or "detach" in str(op) or "_unsafe_view" in str(op):
            return made
        if "bmm" in str(op):
            self.products += 1
            return made
        overwrites = str(op).startswith("aten.copy_")
        written = args[0] if overwrites else made
        given = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
        for tensor in given[1:] if overwrites else given:
            name = self.names.get(tensor.untyped_storage().data_ptr())
            if name is not None:
                self.elements[f"read {name}"] += tensor.numel()
        if isinstance(written, torch.Tensor) and written.numel() >= self.size:
            name = self.names.get(written.untyped_storage().data_ptr(), "else")
            self.elements[f"write {name}"] += written.numel()
        return made

    def passes(self) -> dict[str, float]:
        return {name: count / self.total for name, count in self.elements.items()}


@pytest.mark.parametrize(
    ("nesterov", "grads", "made"), [(True, 1, 17), (False, 0, 8)], ids=["nesterov", "plain"]
)
@pytest.mark.parametrize("count", COUNTS)
def test_muon(count, nesterov, grads, made):
    """README: gradients twice (once), momentum twice, parameters once; 17 (8) stacks between."""
    params = with_grads((48, 32), count)
    optimizer: Any = pyupdate.optim.Muon(params, nesterov=nesterov, ns_steps=5)
    optimizer.step()
    tensors = {
        "param": [param.detach() for param in params],
        "grad": [param.grad for param in params if param.grad is not None],
        "momentum_buffer": [optimizer.state[param]["momentum_buffer"] for param in params],
    }
    with Reads(tensors, size=48 * 32) as reads:
        optimizer.step()
    expected = {"read param": 1, "read momentum_buffer": 1, "write param": 1, "write else": made}
    if grads:
        expected["read grad"] = grads
    assert reads.passes() == expected
    assert reads.products == 5 * 3  # an iteration has three, each of all matrices of a shape
    assert of_the_pass("muon") == Counter(
        ["read grad", "read momentum_buffer", "write momentum_buffer"]
    )


# ----- Adafactor ----------------------------------------------------------------------------------


def counted(kind: Any, name: str, seen: Counter[str], swept: Any) -> Any:
    """A method of a stack or pack that notes how many elements it takes or stores."""
    own = getattr(kind, name)

    def call(self: Any, at: int, *rest: Any) -> Any:
        assert kind is swept
        seen[name] += self.roots[at].size if kind is Pack else self.roots[at].numel()
        return own(self, at, *rest)

    return call


@pytest.mark.parametrize(
    ("shape", "swept", "grads", "params_read"),
    [
        ((16, 24), Pack, 1, 1),
        ((33,), Pack, 1, 1),
        ((256, 512), Stack, 1, 1),
        ((1024, 512), Stack, 3, 2),
    ],
    ids=["a pack", "a pack of vectors", "one block", "many blocks"],
)
@pytest.mark.parametrize("count", COUNTS)
def test_adafactor(count, shape, swept, grads, params_read, monkeypatch):
    """README: of one block gradient and parameter are taken once; of more three times and twice."""
    if grads == 3:
        monkeypatch.setattr(adafactor_stacks, "BLOCK", 2**16)
    seen: Counter[str] = Counter()
    for kind in (Pack, Stack):
        for name in ("grad", "param", "store"):
            monkeypatch.setattr(kind, name, counted(kind, name, seen, swept))
    params = with_grads(shape, count)
    optimizer = pyupdate.optim.Adafactor(params)
    optimizer.step()
    seen.clear()
    optimizer.step()
    total = sum(param.numel() for param in params)
    found = {name: number / total for name, number in seen.items()}
    assert found == {"grad": grads, "param": params_read, "store": 1}
    # It gives each element back as it was, of which a compiler leaves nothing.
    assert of_the_pass("adafactor") == Counter(["read param", "write param"])
