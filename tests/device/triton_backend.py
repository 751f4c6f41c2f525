# SPDX-License-Identifier: Apache-2.0
"""The Triton back end on CPU tensors: a row of the registry that only tests have.

The part is the product's own; it says beside what its kernels may reach, and what they may write.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import pyupdate
from device.triton_on_cpu import Machine, on_cpu
from pyupdate import backends
from pyupdate.backends import triton as product
from pyupdate.backends import triton_watch
from pyupdate.options import LastUpdate
from pyupdate.pytorch.joining import Joining
from pyupdate.pytorch.request import Request, Scaling
from pyupdate.pytorch.rows import AVERAGE, GroupRule, Inputs, Row

_WRITTEN = frozenset(
    {"sums", "flags", "row_sums", "result", "classes", "per_tensor", "ticket", "tickets"}
)
_machine: list[Machine] = []
_compiled: list[bool] = []

home = product.home


def why_not() -> None:
    return None


def part(
    rows: Sequence[Row], rules: Sequence[GroupRule], home: Any, averages: bool
) -> product.Part:
    return (_WatchedPart if _compiled[-1] else _Part)(rows, rules, averages)


class _Saying(product.Part):
    """The product's part, which says what it reaches."""

    def step(self, inputs: Inputs, request: Request, scaling: Scaling) -> LastUpdate | None:
        _say([(self, inputs)])
        return super().step(inputs, request, scaling)

    def reduce(self, inputs: Inputs, request: Request) -> tuple[bool, dict[int, float]]:
        _say([(self, inputs)])
        return super().reduce(inputs, request)

    def apply(self, inputs: Inputs, request: Request, multiplier: float) -> None:
        _say([(self, inputs)])
        super().apply(inputs, request, multiplier)

    @staticmethod
    def step_together(joinings: Sequence[Joining]) -> list[LastUpdate] | None:
        _say([(joining.part, joining.inputs) for joining in joinings])
        return product.Part.step_together(joinings)


def _say(parts: Sequence[tuple[product.Part, Inputs]]) -> None:
    def reach() -> Iterator[tuple[torch.Tensor, bool]]:
        for part, inputs in parts:
            yield part._counters, True
            for row in part.rows:
                if row.param.grad is None:
                    continue
                yield row.param, True
                yield row.param.grad, False
                inner = inputs.state.get(row.param) or {}
                for key in (*part._rules[row.group].keys, AVERAGE):
                    if key in inner:
                        yield inner[key], True

    _machine[-1].memory = reach


class _Part(_Saying):
    pass


class _WatchedPart(_Saying, triton_watch.WatchedPart):
    pass


ROW = backends.Backend("triton", "device.triton_backend", ("cpu",), "Triton's PTX on the CPU")


@contextmanager
def triton_backend(capability: int = 90, *, compiled: bool | None = None) -> Iterator[Machine]:
    """Step CPU tensors by the Triton kernels of a compute capability, inside the block.

    `compiled` says who reads the tensors, compiled code or Python; unsaid, as the product does.
    """
    with on_cpu(capability) as machine, pytest.MonkeyPatch.context() as patch:
        machine.written = _WRITTEN
        rows = tuple(ROW if row.name == "triton" else row for row in backends.BACKENDS)
        patch.setattr(backends, "BACKENDS", rows)
        _machine.append(machine)
        _compiled.append(triton_watch.can_watch() if compiled is None else compiled)
        try:
            with pyupdate.use_backend("triton"):
                yield machine
        finally:
            _machine.pop()
            _compiled.pop()
