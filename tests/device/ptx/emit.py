# SPDX-License-Identifier: Apache-2.0
"""Write the entries of a PTX module as C++ functions over machine.h and arithmetic.h.

A register becomes a local variable of unsigned integer type, which begins as 0xad..., so that a
read before any write is no zero. A label becomes a label, a statement one line.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from . import arithmetic_forms, memory_forms  # noqa: F401  (they fill the table of forms)
from .instruction import FORMS, PAIRS, Instruction, cpp_type
from .text import SIZES, Entry, Statement, Text, Unsupported, Variable, split, variable

# What lies between two shared variables, and belongs to neither: an index past the end is seen.
_GAP = 128

_SPECIAL = {
    **{
        f"%{name}.{axis}": f"self.{'tid' if name == 'tid' else 'block->' + name}[{k}]"
        for name in ("tid", "ntid", "ctaid", "nctaid")
        for k, axis in enumerate("xyz")
    },
    "%laneid": "self.lane",
    "WARP_SZ": "u32{32}",
    "%lanemask_lt": "((u32{1} << self.lane) - 1)",
    "%lanemask_eq": "(u32{1} << self.lane)",
}


def literal(text: str) -> int | None:
    """The bits of a constant; None if it is none."""
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}", text):
        return int(text[2:], 16)
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|0|[1-9]\d*)U?", text):
        return int(text.rstrip("U"), 0) & (2**64 - 1)
    return None


def _identifier(name: str) -> str:
    return re.sub(r"\W", "_", name.replace("_", "__").replace("$", "_S"))


def _aligned(offset: int, align: int) -> int:
    return (offset + align - 1) // align * align


@dataclass
class Layout:
    """What a launch must know of an entry."""

    params: list[tuple[int, Variable]] = field(default_factory=list)  # with their offsets
    param_bytes: int = 0
    shared: list[tuple[int, int]] = field(default_factory=list)  # offset and size of the static
    dynamic: int | None = None  # offset of the memory whose size the launch gives
    shared_bytes: int = 0
    local_bytes: int = 0


class Kernel:
    """One entry on its way to C++."""

    def __init__(self, entry: Entry, module: Text) -> None:
        self.entry = entry
        self.layout = Layout()
        self.symbols: dict[str, str] = {}  # name of a variable -> its address
        self.scopes: list[dict[str, tuple[str, str]]] = [{}]  # register -> C++ name, type
        self.declared: list[str] = []
        self.targets: dict[str, list[str]] = {}  # of indexed branches
        self.labels: set[str] = set()
        for param in entry.params:
            offset = _aligned(self.layout.param_bytes, param.align)
            self.layout.params.append((offset, param))
            self.layout.param_bytes = offset + param.size
            self.symbols[param.name] = f"u64{{{offset}}}"
        used = {word for line in entry.body for word in re.findall(r"[\w$]+", line.text)}
        inner = [s for s in entry.body if re.match(r"\.(shared|local)\b", s.text)]
        own = [variable(s.text, s.line) for s in inner]
        for var in [v for v in module.variables if v.name in used] + own:
            self._place(var)

    def _place(self, var: Variable) -> None:
        layout = self.layout
        if var.space == "local":
            offset = _aligned(layout.local_bytes, max(var.align, 16))
            layout.local_bytes = _aligned(offset + var.size, 16)
            self.symbols[var.name] = f"(reinterpret_cast<u64>(self.local) + {offset})"
        elif var.space != "shared":
            self.symbols[var.name] = f"reinterpret_cast<u64>({global_name(var)})"
        elif var.size == 0:
            if layout.dynamic is None:
                layout.dynamic = layout.shared_bytes = _aligned(layout.shared_bytes, 128)
            self.symbols[var.name] = f"u64{{{layout.dynamic}}}"
        elif layout.dynamic is not None:
            raise Unsupported(f"shared variable {var.name} behind one without a size")
        else:
            offset = _aligned(layout.shared_bytes, var.align)
            layout.shared.append((offset, var.size))
            layout.shared_bytes = offset + var.size + _GAP
            self.symbols[var.name] = f"u64{{{offset}}}"

    # ----- what forms are written with

    def register(self, name: str) -> tuple[str, str]:
        """C++ name and type of a register."""
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        raise Unsupported(f"register {name}")

    def raw(self, operand: str) -> str:
        """The bits of an operand, as an unsigned expression (a predicate: bool)."""
        if operand.startswith("!"):
            name, kind = self.register(operand[1:])
            if kind != "bool":
                raise Unsupported(f"operand {operand}")
            return f"!{name}"
        bits = literal(operand)
        if bits is not None:
            return f"u64{{{bits:#x}}}"
        if operand in _SPECIAL:
            return _SPECIAL[operand]
        if operand in self.symbols:
            return self.symbols[operand]
        return self.register(operand)[0]

    def value(self, operand: str, kind: str) -> str:
        """An operand as a C++ value of its PTX type; halves as float."""
        raw = self.raw(operand)
        if kind == "pred":
            return f"bool({raw})"
        if kind in ("f16", "bf16"):
            return f"widen_{kind}(static_cast<u16>({raw}))"
        return f"as<{cpp_type(kind)}>({raw})"

    def bits(self, value: str, kind: str) -> str:
        """The bits of a C++ value of a PTX type."""
        if kind in ("f16", "bf16"):
            return f"round_{kind}({value})"
        return f"bits({value})" if kind in ("f32", "f64") else value

    def put(self, destination: str, value: str) -> str:
        """The statement that sets a register; `_` is nobody's."""
        if destination == "_":
            return f"static_cast<void>({value});"
        name, kind = self.register(destination)
        return f"{name} = static_cast<{kind}>({value});"

    def address(self, operand: str) -> str:
        """The address in `[base+offset]`, as u64."""
        match = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+)\s*)?\]", operand)
        offset = literal(match[2] or "0") if match else None
        if match is None or offset is None:
            raise Unsupported(f"address {operand}")
        return f"u64({self.raw(match[1])}) + u64{{{offset:#x}}}"

    def label(self, name: str) -> str:
        """The C++ label of a PTX label."""
        return "at_" + _identifier(name)

    # ----- statements

    def statement(self, statement: Statement) -> str:
        """The C++ of one statement."""
        text = statement.text
        if text == "{":
            self.scopes.append({})
            return "{"
        if text == "}":
            self.scopes.pop()
            return "}"
        if text.endswith(":"):
            if text in self.labels:
                raise Unsupported("a label that is there twice")
            self.labels.add(text)
            return f"{self.label(text[:-1])}:;"
        if match := re.fullmatch(r"\.reg \.(\w+) (.*)", text):
            self._declare(match[1], match[2])
            return ""
        if re.match(r"\.(shared|local)\b", text):
            return ""  # has its place already
        if text.startswith(".branchtargets "):
            return ""
        instruction = Instruction(text, statement.line)
        if instruction.opcode not in FORMS:
            raise Unsupported(f"instruction {instruction.opcode}")
        code = FORMS[instruction.opcode](self, instruction)
        instruction.done()
        if instruction.guard is None:
            return f"{{ {code} }}"
        guard = self.value(instruction.guard, "pred")
        return f"if ({'!' if instruction.negated else ''}{guard}) {{ {code} }}"

    def _declare(self, kind: str, names: str) -> None:
        if kind == "pred":
            cpp, fill = "bool", "false"
        elif kind in PAIRS or (kind in SIZES and SIZES[kind] > 1):
            cpp = f"u{SIZES[kind] * 8}"
            fill = f"static_cast<{cpp}>(0xadadadadadadadad)"
        else:
            raise Unsupported(f"registers of type .{kind}")
        for name in split(names):
            many = re.fullmatch(r"([%\w$]+)<(\d+)>", name)
            for one in [f"{many[1]}{k}" for k in range(int(many[2]))] if many else [name]:
                unique = f"r{len(self.declared)}_{_identifier(one)}"
                self.scopes[-1][one] = (unique, cpp)
                self.declared.append(f"{cpp} {unique} = {fill};")

    def write(self, function: str) -> str:
        """The C++ function of the entry."""
        names = [s.text[:-1] if s.text.endswith(":") else "" for s in self.entry.body]
        for name, after in zip(names, self.entry.body[1:], strict=False):
            if name and after.text.startswith(".branchtargets "):
                self.targets[name] = split(after.text.removeprefix(".branchtargets "))
        lines = []
        for statement in self.entry.body:
            try:
                code = self.statement(statement)
            except Unsupported as reason:
                place = f"{self.entry.name}: PTX line {statement.line}: {statement.text}"
                raise Unsupported(f"{place} ({reason})") from None
            if code:
                lines.append(f"  {code}  // {statement.line}")
        registers = [f"  {line}" for line in self.declared]
        head = f"static void {function}(Thread& self, const u8* parameters) {{"
        return "\n".join([head, *registers, *lines, "}"])


def global_name(var: Variable) -> str:
    """The C++ name of a variable of the module."""
    return "global_" + _identifier(var.name)


def _global(var: Variable) -> str:
    words = var.initial.strip().removeprefix("{").removesuffix("}")
    values = [literal(word) for word in split(words)]
    if None in values or var.type not in SIZES:
        raise Unsupported(f"variable {var.name}: initialised with {var.initial}")
    kind = f"u{SIZES[var.type] * 8}"
    count = var.size // SIZES[var.type]
    listed = ", ".join(f"static_cast<{kind}>({value:#x})" for value in values)
    return f"alignas(128) static {kind} {global_name(var)}[{count}] = {{{listed}}};"


def write_module(module: Text) -> tuple[str, dict[str, Layout]]:
    """The C++ source of a module, and what launches must know of its entries."""
    kept = [var for var in module.variables if var.space in ("global", "const")]
    ranges = "".join(
        f"  {{reinterpret_cast<u64>({global_name(var)}), "
        f"reinterpret_cast<u64>({global_name(var)}) + {var.size}, {int(var.space == 'global')}}},\n"
        for var in kept
    )
    parts = [
        '#include "arithmetic.h"\n#include "machine.h"\n\nusing namespace ptx;\n'
        '#define EXPORT extern "C" __attribute__((visibility("default")))\n',
        *(_global(var) for var in kept),
        f"EXPORT const u64 ptx_global_count = {len(kept)};",
        f"EXPORT const Range ptx_globals[] = {{\n{ranges}  {{0, 0, 0}}}};\n",
    ]
    layouts = {}
    for index, (name, entry) in enumerate(module.entries.items()):
        kernel = Kernel(entry, module)
        parts.append(kernel.write(f"kernel_{index}"))
        parts.append(
            f"EXPORT u64 ptx_run_{index}(const Launch* how) {{\n"
            f"  return launch(*how, kernel_{index});\n}}\n"
        )
        layouts[name] = kernel.layout
    return "\n".join(parts), layouts
