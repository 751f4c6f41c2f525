# SPDX-License-Identifier: Apache-2.0
"""Run PTX on a CPU, every access checked.

    from device.ptx import translate

    module = translate(ptx_text)
    faults = module.launch(
        "axpy", grid=4, block=256, args=[x.ctypes.data, y.ctypes.data, 2.0, 1000],
        memory=[(x.ctypes.data, x.nbytes, False), (y.ctypes.data, y.nbytes, True)],
    )
    assert not faults, faults

Each entry becomes a C++ function (emit.py, *_forms.py) that g++ builds, once per text, into
`build/ptx`; threads are fibers (machine.cpp). Addresses are the host's own: `tensor.data_ptr()`,
`array.ctypes.data`. The bits are those that the PTX ISA promises: no contraction, correctly
rounded division and square root.

- `memory` lists (address, bytes, writable): whatever a kernel touches beside it is a fault. Memory
  that two tensors share is listed once. Neighbours are told apart only if something lies between
  them, so leave gaps that nothing else owns.
- `args` has one number per parameter: int, float, or bytes for a struct.
- `shared` is the size of `extern __shared__` memory. Shared and local memory begin as NaN.
- `order_seed` other than 0 runs threads and blocks in another order.

An access that is out of bounds, misaligned, or writes what is read-only is dropped (a load gives
NaN) and reported; so are a barrier that not all threads reach, warp operations whose lanes do not
agree, division of integers by 0, a trap, and threads that wait for ever. Blocks run one after the
other: races between blocks are not seen, and a block that waits for a later one hangs.

An instruction, a modifier or a number of operands that is not known raises `Unsupported` with its
line: approximate operations (`.approx`, `.ftz`, `div.full`), calls, matrix and asynchronous
instructions among them. Nothing is guessed.
"""

from .build import Fault, Module, translate
from .text import Unsupported

__all__ = ["Fault", "Module", "Unsupported", "translate"]
