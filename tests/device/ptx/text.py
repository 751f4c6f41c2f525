# SPDX-License-Identifier: Apache-2.0
"""Read a PTX text: its variables, its entries, and the statements of each with their lines."""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass, field

SIZES = {
    **{f"{kind}{bits}": bits // 8 for kind in "bus" for bits in (8, 16, 32, 64)},
    **{"f16": 2, "bf16": 2, "f32": 4, "f64": 8, "f16x2": 4, "bf16x2": 4, "f32x2": 8},
}
"""Bytes of each type; `pred` has none."""


class Unsupported(Exception):
    """A form of PTX that is not known here, so that it is not run."""


@dataclass(frozen=True)
class Variable:
    """A parameter, or a variable in shared, local, global or constant memory."""

    name: str
    space: str
    type: str
    align: int
    size: int  # bytes; 0 where the launch decides
    initial: str = ""


@dataclass(frozen=True)
class Statement:
    """An instruction, a declaration, a label (`name:`), or the brace of a scope."""

    line: int
    text: str


@dataclass
class Entry:
    """One kernel."""

    name: str
    line: int
    params: list[Variable]
    required: tuple[int, ...]  # threads of a block by .reqntid, () if free
    most: tuple[int, ...]  # by .maxntid
    body: list[Statement]


@dataclass
class Text:
    """A whole module."""

    variables: list[Variable] = field(default_factory=list)
    entries: dict[str, Entry] = field(default_factory=dict)


_LINE_DIRECTIVE = re.compile(r"\.(version|target|address_size|file|loc)\b[^\n]*")
_VARIABLE = re.compile(
    r"(?:\.(?:visible|extern|weak)\s+)*\.(shared|local|global|const|param)\s+"
    r"(?:\.align\s+(\d+)\s+)?(?:\.attribute\(\.managed\)\s+)?\.(\w+)\s+"
    r"(?:\.ptr\s+(?:\.(?:global|const|shared|local)\s+)?(?:\.align\s+\d+\s+)?)?"
    r"([\w$]+)\s*(?:\[(\d*)\])?\s*(?:=\s*(.*))?",
    re.S,
)


def split(text: str) -> list[str]:
    """The parts between commas that are in no bracket."""
    parts, depth, begin = [], 0, 0
    for at, character in enumerate(text):
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            parts.append(text[begin:at].strip())
            begin = at + 1
    return [*parts, text[begin:].strip()] if text.strip() else []


def variable(declaration: str, line: int) -> Variable:
    """The variable of a declaration."""
    match = _VARIABLE.fullmatch(declaration.strip())
    if match is None or match[3] not in SIZES:
        raise Unsupported(f"PTX line {line}: {declaration.strip()} (declaration)")
    space, align, kind, name, count, initial = match.groups()
    size = SIZES[kind] * (1 if count is None else int(count or 0))
    return Variable(name, space, kind, int(align or SIZES[kind]), size, initial or "")


def _blank(text: str) -> str:
    """The text without comments and line directives, every character where it was."""

    def spaces(match: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", match[0])

    text = re.sub(r"/\*.*?\*/", spaces, text, flags=re.S)
    text = re.sub(r"//[^\n]*", spaces, text)
    text = re.sub(r'\.pragma\s+"[^"]*"\s*;', spaces, text)
    return re.sub(r"^\s*" + _LINE_DIRECTIVE.pattern, spaces, text, flags=re.M)


def _closing(text: str, opening: int) -> int:
    """Where the brace that opens at `opening` closes."""
    depth = 0
    for at in range(opening, len(text)):
        depth += (text[at] == "{") - (text[at] == "}")
        if depth == 0:
            return at
    raise Unsupported("a brace that never closes")


def _statements(text: str, begin: int, end: int, lines: list[int]) -> list[Statement]:
    found: list[Statement] = []
    at = begin
    token = re.compile(r"\s*(?:([{}])|([\w$]+):(?!:)|([^;{}]*(?:\{[^{}]*\}[^;{}]*)*);)")
    while text[at:end].strip():
        match = token.match(text, at, end)
        if match is None:
            raise Unsupported(f"PTX line {bisect_right(lines, at)}: {text[at:end][:60]!r}")
        group = match.lastindex or 0
        line = bisect_right(lines, match.start(group))
        body = match[group] + (":" if group == 2 else "")
        found.append(Statement(line, " ".join(body.split())))
        at = match.end()
    return found


def _numbers(pattern: str, text: str) -> tuple[int, ...]:
    match = re.search(pattern + r"\s+(\d+(?:\s*,\s*\d+)*)", text)
    return tuple(int(number) for number in match[1].split(",")) if match else ()


def read(text: str) -> Text:
    """The module of a PTX text."""
    lines = [0, *(match.end() for match in re.finditer("\n", text))]
    text = _blank(text)
    module = Text()
    at = 0
    while text[at:].strip():
        at += len(text[at:]) - len(text[at:].lstrip())
        line = bisect_right(lines, at)
        head = re.compile(r"[^;{]*").match(text, at)
        assert head is not None
        end = head.end()
        words = head[0]
        if re.match(r"\.section\b", words):
            at = _closing(text, end) + 1
        elif entry := re.search(r"\.entry\s+([\w$]+)\s*(?:\((.*?)\))?([^()]*)$", words, re.S):
            close = _closing(text, end)
            params = [variable(param, line) for param in split(entry[2] or "")]
            body = _statements(text, end + 1, close, lines)
            required = _numbers(r"\.reqntid", entry[3])
            most = _numbers(r"\.maxntid", entry[3])
            module.entries[entry[1]] = Entry(entry[1], line, params, required, most, body)
            at = close + 1
        elif re.search(r"\.func\b", words):  # a call of it is refused
            at = (end if text[end : end + 1] == ";" else _closing(text, end)) + 1
        else:
            end = text.index(";", at)
            module.variables.append(variable(text[at:end], line))
            at = end + 1
    return module
