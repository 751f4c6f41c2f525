# SPDX-License-Identifier: Apache-2.0
"""Subnormals are kept, whatever floating-point mode the calling thread is in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import pyupdate
from pyupdate.backends import available

_AVAILABLE = dict(available())

pytestmark = pytest.mark.skipif(
    _AVAILABLE["cpu"] is not None,
    reason=f"no compiled back end: {_AVAILABLE['cpu']}",
)


@contextmanager
def flushing() -> Iterator[None]:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals to zero")
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("threads", [1, 2])
def test_subnormals_survive_a_flushing_caller(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    param = torch.nn.Parameter(torch.full((40_000,), 2.0**-140))
    param.grad = torch.full((40_000,), -(2.0**-141))
    expected = torch.full((40_000,), 2.0**-140 + 2.0**-141)
    optimizer = pyupdate.optim.SGD([param], lr=1.0)
    try:
        with pyupdate.use_backend("cpu"), flushing():
            optimizer.step()
    finally:
        torch.set_num_threads(before)
    assert torch.equal(param.detach(), expected)


def test_the_callers_mode_is_put_back() -> None:
    tiny = torch.full((1,), 2.0**-140)
    param = torch.nn.Parameter(torch.ones(4))
    param.grad = torch.ones(4)
    with pyupdate.use_backend("cpu"), flushing():
        pyupdate.optim.SGD([param], lr=1.0).step()
        flushed = tiny * 1.0
    assert float(flushed) == 0.0
