# SPDX-License-Identifier: Apache-2.0
"""Read what ptxas and cuobjdump say of kernels: resources, and the instructions that run."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
_RESOURCES = re.compile(
    r"Function properties for (\S+)\n\s*(\d+) bytes stack frame, (\d+) bytes spill stores, "
    r"(\d+) bytes spill loads\n.*?Used (\d+) registers(?:.*?(\d+) bytes smem)?"
)


@dataclass(frozen=True)
class Instruction:
    """One machine instruction."""

    at: int
    guarded: bool
    opcode: str
    operands: str


@dataclass
class Kernel:
    """One kernel of one architecture."""

    name: str
    registers: int
    shared: int  # bytes
    stack: int  # bytes
    spills: int  # bytes
    code: list[Instruction] = field(default_factory=list)

    def count(self, *opcodes: str) -> int:
        """How many instructions have one of these first words, as MUFU of MUFU.RCP."""
        counted = Counter(each.opcode.split(".")[0] for each in self.code)
        return sum(counted[opcode] for opcode in opcodes)

    def wide(self, opcode: str) -> int:
        """How many of a kind move 16 bytes."""
        return sum(each.opcode.startswith(f"{opcode}.E.128") for each in self.code)

    def narrow_addresses(self) -> list[str]:
        """Accesses of global memory whose address is not one 64-bit register pair."""
        return [
            f"{each.opcode} {each.operands}"
            for each in self.code
            if each.opcode.split(".")[0] in ("LDG", "STG", "ATOMG", "RED", "ATOM", "LD", "ST")
            and not re.search(r"\[R(\d+|Z)\.64", each.operands)
        ]

    def bytes_in_flight(self) -> int:
        """Most bytes that a thread asks for in loads of 16 bytes before it reads any of them."""
        targets = {
            int(match[1], 16)
            for each in self.code
            if each.opcode.startswith("BRA")
            and (match := re.search(r"0x([0-9a-f]+)", each.operands))
        }
        most = 0
        waiting: set[int] = set()  # registers that a load will fill
        for each in self.code:
            named = {int(number) for number in re.findall(r"\bR(\d+)", each.operands)}
            if each.at in targets or waiting & named or each.opcode.startswith(("BAR", "EXIT")):
                waiting = set()
            if each.opcode.startswith("LDG.E.128") and not each.guarded:
                first = int(re.findall(r"\bR(\d+)", each.operands)[0])
                waiting |= set(range(first, first + 4))
                most = max(most, 4 * len(waiting))
            if each.opcode.startswith(("BRA", "RET")) and not each.guarded:
                waiting = set()
        return most


def kernels(ptxas: str, sass: str) -> Iterator[Kernel]:
    """The kernels of a cubin, from what `ptxas -v` and `cuobjdump -sass` printed."""
    code = {
        part.split("\n", 1)[0].strip(): part
        for part in re.split(r"^\s*Function : ", sass, flags=re.M)[1:]
    }
    for name, stack, stores, loads, registers, shared in _RESOURCES.findall(ptxas):
        if name not in code:
            continue
        kernel = Kernel(
            name, int(registers), int(shared or 0), int(stack), int(stores) + int(loads)
        )
        for at, guard, opcode, operands in _INSTRUCTION.findall(code[name]):
            kernel.code.append(Instruction(int(at, 16), bool(guard), opcode, operands))
        yield kernel
