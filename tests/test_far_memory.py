# SPDX-License-Identifier: Apache-2.0
"""What a plan follows pointers to is there: not the memory of a device, nor what is no pointer."""

import subprocess
import sys

# The memory of a device, as the host sees it: pages that nobody may read. `Watch` is the plan that
# reads the tensors of a GPU for the back ends (csrc/watch.cpp); here it is given those of a CPU.
STEPS = """
import ctypes, mmap, torch
from pyupdate import optim
from pyupdate.backends import triton_watch
from pyupdate.backends.compiled import plan_of
from pyupdate.pytorch import engines, step
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

rules, inputs = step._read(optimizer, engines.engine_of(optimizer))
watch = plan_of(
    triton_watch._module().Watch,
    rows_of(inputs.groups, None, {})[0],
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


# Where torch keeps its pointers is looked for by the first plan; in inference mode there is less.
FIRST_IN_INFERENCE_MODE = """
import torch
from pyupdate import optim

def stepped():
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = optim.AdamW([param])
    for _ in range(3):
        param.grad = torch.ones(3)
        optimizer.step()
    return param.tolist()

with torch.inference_mode():
    first = stepped()
print(first == stepped(), flush=True)
"""


def test_the_first_plan_may_be_made_in_inference_mode(compiled):
    done = subprocess.run(
        [sys.executable, "-c", FIRST_IN_INFERENCE_MODE],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
