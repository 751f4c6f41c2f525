# SPDX-License-Identifier: Apache-2.0
"""A plan of tensors on a device never reads what they hold: the host cannot."""

import subprocess
import sys

# The memory of a device, as the host sees it: pages that nobody may read. `Watch` is the plan that
# reads the tensors of a GPU for the back ends (csrc/watch.cpp); here it is given those of a CPU.
STEPS = """
import ctypes, mmap, torch
from pyupdate import optim
from pyupdate.backends import triton_watch
from pyupdate.backends.compiled import plan_of
from pyupdate.pytorch import step
from pyupdate.pytorch.rows import rows_of

far = []

def moved(tensor):
    memory = mmap.mmap(-1, mmap.PAGESIZE)
    far.append(memory)
    there = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel()).view(tensor.shape)
    return there.copy_(tensor)

params = [torch.nn.Parameter(moved(torch.ones(4))) for _ in range(20)]
optimizer = optim.NAdam(params)
for param in params:
    param.grad = moved(torch.ones(4))
optimizer.step()
for inner in optimizer.state.values():
    for key in inner:
        inner[key] = moved(inner[key])

rules, inputs = step._read(optimizer, step.engine_of(optimizer))
watch = plan_of(
    triton_watch._module().Watch,
    rows_of(inputs.groups, None, {}),
    rules,
    False,
    shapes=[triton_watch._shape_of(rule) for rule in rules],
)
touched = [t for p in params for t in (p.detach(), p.grad, *optimizer.state[p].values())]
for tensor in touched:
    address = ctypes.c_void_p(tensor.data_ptr())
    assert ctypes.CDLL(None).mprotect(address, mmap.PAGESIZE, 0) == 0
for _ in range(3):
    found, noticed, _ = watch.look(inputs.groups, inputs.state, inputs.numbers)
    print(found.name, noticed, flush=True)
"""


def test_a_plan_of_a_device_reads_no_number(compiled):
    done = subprocess.run(
        [sys.executable, "-c", STEPS], capture_output=True, text=True, check=False, timeout=120
    )
    assert (done.returncode, done.stdout.split("\n")) == (0, ["READY []"] * 3 + [""]), done.stderr
