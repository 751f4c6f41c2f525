# SPDX-License-Identifier: Apache-2.0
"""Where torch keeps things, as csrc/ahead.cpp finds it out, in memory that lies about it."""

from __future__ import annotations

import subprocess
import sys

import pytest

# What AutogradMeta has before its gradient is a std::string, the name of a variable, of which no
# name means 16 bytes that nobody writes to. Freed memory that was a tensor's may hold there the
# address of the very tensor that is looked for, and anything else in the tensors that come after.
LYING = """
import ctypes, sys
import torch
import pyupdate.optim

def word(address):
    return ctypes.c_uint64.from_address(address)

def buffer_of(leaf):
    meta = word(leaf._cdata + 24).value
    if word(meta + 8).value != meta + 24:
        print("elsewhere")
        sys.exit()
    return word(meta + 24)

zeros, made = torch.zeros, []
def lying(*args, **kwargs):
    tensor = zeros(*args, **kwargs)
    made.append(tensor)
    if kwargs.get("requires_grad"):
        buffer_of(tensor).value = made[0]._cdata
    return tensor

params = [torch.nn.Parameter(torch.ones(5)) for _ in range(9)]
for param in params:
    param.grad = torch.ones(5)
    buffer_of(param).value = 0xDEAD0000
torch.zeros = lying
optimizer = pyupdate.optim.SGD(params, lr=0.5)
optimizer.step()
assert any(tensor.requires_grad for tensor in made), "it was not looked for"
assert all(param.tolist() == [0.5] * 5 for param in params)
print("right")
"""


@pytest.mark.usefixtures("compiled")
def test_an_address_that_was_left_in_memory_is_not_taken_for_a_place():
    run = subprocess.run(
        [sys.executable, "-c", LYING], capture_output=True, text=True, timeout=300, check=False
    )
    if run.stdout.strip() == "elsewhere":
        pytest.skip("this torch keeps a variable's name elsewhere")
    assert (run.returncode, run.stdout.strip()) == (0, "right"), run.stderr
