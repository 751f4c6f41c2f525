# SPDX-License-Identifier: Apache-2.0
"""One instruction, taken apart: what a form does not take is refused.

A form (a function of arithmetic_forms.py or memory_forms.py) takes from its instruction the
modifiers, types and operands that it knows. `done` refuses what is left, so no modifier is ever
ignored by accident.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from .text import SIZES, Unsupported, split

if TYPE_CHECKING:
    from .emit import Kernel

INTEGERS = ("u16", "s16", "u32", "s32", "u64", "s64")
BITS = ("b16", "b32", "b64")
FLOATS = ("f32", "f64")
HALVES = ("f16", "bf16")
PAIRS = {"f32x2": "f32", "f16x2": "f16", "bf16x2": "bf16"}


def cpp_type(kind: str) -> str:
    """The C++ type in which a value of a PTX type is computed."""
    return kind.replace("b", "u") if kind in (*BITS, "b8") else kind


Form = Callable[["Kernel", "Instruction"], str]
FORMS: dict[str, Form] = {}
"""The form of each opcode: it writes the C++ statements of an instruction."""

_SHAPE = re.compile(r"(?:@(!?)([%\w$]+)\s+)?([a-z][a-z0-9]*)((?:\.[\w:]+)*)(?:\s+(.*))?", re.S)


def form(*opcodes: str) -> Callable[[Form], Form]:
    """Enter a form in the table."""

    def enter(function: Form) -> Form:
        for opcode in opcodes:
            assert opcode not in FORMS, opcode
            FORMS[opcode] = function
        return function

    return enter


class Instruction:
    """The guard, opcode, modifiers and operands of a statement."""

    def __init__(self, text: str, line: int) -> None:
        match = _SHAPE.fullmatch(text)
        if match is None:
            raise Unsupported("not an instruction")
        self.line = line
        self.negated = match[1] == "!"
        self.guard: str | None = match[2]
        self.opcode = match[3]
        self.modifiers = match[4].split(".")[1:]
        self.operands = split(match[5] or "")

    def take(self, *names: str) -> str:
        """The first modifier that is one of these, taken off; "" if there is none."""
        for name in self.modifiers:
            if name in names:
                self.modifiers.remove(name)
                return name
        return ""

    def need(self, *names: str) -> str:
        """A modifier that must be there."""
        name = self.take(*names)
        if not name:
            raise Unsupported(f"one of .{' .'.join(names)} is needed")
        return name

    def type(self, *allowed: str) -> str:
        """The next type, taken off; it must be one of these."""
        for name in self.modifiers:
            if name in SIZES or name == "pred":
                if name not in allowed:
                    raise Unsupported(f"type .{name}")
                self.modifiers.remove(name)
                return name
        raise Unsupported("no type")

    def take_operands(self, count: int) -> list[str]:
        """All operands, of which there must be so many."""
        if len(self.operands) != count:
            raise Unsupported(f"{len(self.operands)} operands where {count} are known")
        operands, self.operands = self.operands, []
        return operands

    def done(self) -> None:
        """Refuse what no form has taken."""
        if self.modifiers or self.operands:
            left = [*(f".{name}" for name in self.modifiers), *self.operands]
            raise Unsupported(f"{' '.join(left)} is not known here")
