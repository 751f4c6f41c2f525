# SPDX-License-Identifier: Apache-2.0
"""The forms of PTX's arithmetic: numbers, bits, comparisons, conversions, moves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .instruction import BITS, FLOATS, HALVES, INTEGERS, PAIRS, Instruction, form
from .text import SIZES, Unsupported

if TYPE_CHECKING:
    from .emit import Kernel

_OPERATORS = {"add": "+", "sub": "-", "mul": "*", "and": "&", "or": "|", "xor": "^"}


def _each(kernel: Kernel, kind: str, operands: list[str], write: str) -> str:
    """Bits of `write` on values of one type, or on both halves of a pair; `{0}`: first operand."""
    if kind not in PAIRS:
        return kernel.bits(write.format(*(kernel.value(x, kind) for x in operands)), kind)
    half = PAIRS[kind]
    width = SIZES[half] * 8
    results = []
    for shift in (0, width):
        halves = [f"u64({kernel.raw(x)}) >> {shift}" for x in operands]
        if half == "f32":
            values = [f"as<f32>({x})" for x in halves]
        else:
            values = [f"widen_{half}(static_cast<u16>({x}))" for x in halves]
        results.append(kernel.bits(write.format(*values), half))
    return f"{'pair' if half == 'f32' else 'pair16'}({', '.join(results)})"


@form("add", "sub", "mul", "mad", "fma")
def _arithmetic(kernel: Kernel, i: Instruction) -> str:
    wide = i.take("lo", "hi", "wide")
    rounded = i.take("rn")
    kinds = FLOATS if i.opcode in ("mad", "fma") else (*FLOATS, *HALVES, *PAIRS)
    kind = i.type(*INTEGERS, *kinds, *(["f32x2"] if i.opcode == "fma" else []))
    fused = i.opcode in ("mad", "fma")
    narrow = i.take(*HALVES) if kind == "f32" and i.opcode in ("add", "sub") else None
    target, *sources = i.take_operands(4 if fused else 3)
    # ptxas may make one operation of a product and a sum that do not say how they are rounded.
    if kind not in INTEGERS and not rounded:
        raise Unsupported("no .rn: it may be contracted")
    if narrow:  # from sm_100 on: a half and an f32
        a, b = kernel.value(sources[0], narrow), kernel.value(sources[1], "f32")
        return kernel.put(target, kernel.bits(f"{a} {_OPERATORS[i.opcode]} {b}", "f32"))
    if kind not in INTEGERS:
        if wide:
            raise Unsupported("rounding")
        write = "fused({0}, {1}, {2})" if fused else f"{{0}} {_OPERATORS[i.opcode]} {{1}}"
        return kernel.put(target, _each(kernel, kind, sources, write))
    multiplies = i.opcode in ("mul", "mad")
    if rounded or bool(wide) != multiplies or i.opcode == "fma":
        raise Unsupported("width")
    if not multiplies:
        a, b = (f"u64({kernel.raw(x)})" for x in sources)
        return kernel.put(target, f"{a} {_OPERATORS[i.opcode]} {b}")
    a, b = (kernel.value(x, kind) for x in sources[:2])
    if wide == "wide":
        if SIZES[kind] == 8:
            raise Unsupported("a product of 128 bits")
        product = f"{kind[0]}64({a}) * {kind[0]}64({b})"
    elif wide == "hi":
        both = "__int128" if kind[0] == "s" else "unsigned __int128"
        product = f"(static_cast<{both}>({a}) * static_cast<{both}>({b})) >> {SIZES[kind] * 8}"
    else:
        product = f"u64({a}) * u64({b})"
    if fused:
        product = f"u64({product}) + u64({kernel.raw(sources[2])})"
    return kernel.put(target, product)


@form("div", "rem")
def _divide(kernel: Kernel, i: Instruction) -> str:
    rounded = i.take("rn")
    kind = i.type(*INTEGERS, *(FLOATS if i.opcode == "div" else ()))
    target, a, b = i.take_operands(3)
    a, b = kernel.value(a, kind), kernel.value(b, kind)
    if (kind in FLOATS) != bool(rounded):
        raise Unsupported("rounding")
    if rounded:
        return kernel.put(target, kernel.bits(f"{a} / {b}", kind))
    name = "quotient" if i.opcode == "div" else "remainder"
    return kernel.put(target, f"{name}<{kind}>(self, {a}, {b}, {i.line})")


@form("sqrt", "rcp")
def _root(kernel: Kernel, i: Instruction) -> str:
    i.need("rn")
    kind = i.type(*FLOATS)
    target, x = i.take_operands(2)
    x = kernel.value(x, kind)
    return kernel.put(target, kernel.bits(f"root({x})" if i.opcode == "sqrt" else f"1 / {x}", kind))


@form("neg", "abs")
def _sign(kernel: Kernel, i: Instruction) -> str:
    kind = i.type("s16", "s32", "s64", *FLOATS, *HALVES)
    target, x = i.take_operands(2)
    raw = kernel.raw(x)
    if kind not in INTEGERS:
        sign = f"(u64{{1}} << {SIZES[kind] * 8 - 1})"
        return kernel.put(target, f"{raw} ^ {sign}" if i.opcode == "neg" else f"{raw} & ~{sign}")
    value = kernel.value(x, kind)
    negative = f"u64{{0}} - u64({raw})"
    return kernel.put(
        target, negative if i.opcode == "neg" else f"{value} < 0 ? {negative} : u64({raw})"
    )


@form("min", "max")
def _extreme(kernel: Kernel, i: Instruction) -> str:
    nan_wins = "true" if i.take("NaN") else "false"
    kind = i.type(*INTEGERS, *FLOATS, *HALVES, "bf16x2", "f16x2")
    name = "least" if i.opcode == "min" else "greatest"
    three = kind == "f32" and len(i.operands) == 4  # from sm_100 on
    target, *sources = i.take_operands(4 if three else 3)
    if kind in INTEGERS:
        if nan_wins == "true":
            raise Unsupported(".NaN of integers")
        a, b = (kernel.value(x, kind) for x in sources)
        return kernel.put(target, f"{a} {'<' if i.opcode == 'min' else '>'} {b} ? {a} : {b}")
    write = f"{name}({{0}}, {{1}}, {nan_wins})"
    if three:
        write = f"{name}({write}, {{2}}, {nan_wins})"
    return kernel.put(target, _each(kernel, kind, sources, write))


@form("and", "or", "xor")
def _logic(kernel: Kernel, i: Instruction) -> str:
    kind = i.type("pred", *BITS)
    target, a, b = i.take_operands(3)
    a, b = (kernel.value(x, kind) for x in (a, b))
    return kernel.put(target, f"{a} {_OPERATORS[i.opcode]} {b}")


@form("not")
def _not(kernel: Kernel, i: Instruction) -> str:
    kind = i.type("pred", *BITS)
    target, x = i.take_operands(2)
    return kernel.put(target, f"{'!' if kind == 'pred' else '~'}{kernel.value(x, kind)}")


@form("shl", "shr")
def _shift(kernel: Kernel, i: Instruction) -> str:
    kind = i.type(*BITS, *(INTEGERS if i.opcode == "shr" else ()))
    target, a, by = i.take_operands(3)
    name = "shifted_left" if i.opcode == "shl" else "shifted_right"
    return kernel.put(
        target, f"{name}({kernel.value(a, kind)}, static_cast<u32>({kernel.raw(by)}))"
    )


@form("shf")
def _funnel(kernel: Kernel, i: Instruction) -> str:
    side = i.need("l", "r")
    wraps = i.need("wrap", "clamp") == "wrap"
    i.type("b32")
    target, low, high, by = i.take_operands(4)
    by = kernel.value(by, "u32")
    by = f"{by} & 31" if wraps else f"({by} > 32 ? 32 : {by})"
    name = "funnel_left" if side == "l" else "funnel_right"
    return kernel.put(
        target, f"{name}({kernel.value(low, 'u32')}, {kernel.value(high, 'u32')}, {by})"
    )


@form("lop3", "prmt")
def _table(kernel: Kernel, i: Instruction) -> str:
    i.type("b32")
    target, *sources = i.take_operands(5 if i.opcode == "lop3" else 4)
    values = ", ".join(kernel.value(x, "u32") for x in sources)
    return kernel.put(target, f"{'logic3' if i.opcode == 'lop3' else 'permuted'}({values})")


@form("popc", "clz", "brev")
def _count(kernel: Kernel, i: Instruction) -> str:
    kind = i.type("b32", *(["b64"] if i.opcode != "brev" else []))
    target, x = i.take_operands(2)
    x = kernel.value(x, kind)
    wide = "ll" if kind == "b64" else ""
    if i.opcode == "brev":
        return kernel.put(target, f"reversed({x})")
    if i.opcode == "popc":
        return kernel.put(target, f"__builtin_popcount{wide}({x})")
    return kernel.put(target, f"{x} == 0 ? {SIZES[kind] * 8} : __builtin_clz{wide}({x})")


@form("bfe", "bfi")
def _field(kernel: Kernel, i: Instruction) -> str:
    inserts = i.opcode == "bfi"
    kind = i.type(*(("b32", "b64") if inserts else ("u32", "s32", "u64", "s64")))
    target, *sources = i.take_operands(5 if inserts else 4)
    values = [kernel.value(x, kind) for x in sources[:-2]]
    values += [kernel.value(x, "u32") for x in sources[-2:]]
    return kernel.put(target, f"{'with_field' if inserts else 'field'}({', '.join(values)})")


@form("copysign")
def _copysign(kernel: Kernel, i: Instruction) -> str:
    kind = i.type(*FLOATS)
    target, sign, size = i.take_operands(3)
    top = f"(u64{{1}} << {SIZES[kind] * 8 - 1})"
    return kernel.put(target, f"({kernel.raw(sign)} & {top}) | ({kernel.raw(size)} & ~{top})")


# ----- comparisons and selections

_ORDERED = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "=="}
_UNSIGNED = {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
_OPPOSITE = {"ltu": ">=", "leu": ">", "gtu": "<=", "geu": "<"}


def _compare(comparison: str, kind: str, a: str, b: str) -> str:
    if kind in INTEGERS or kind in BITS:
        table = {**_ORDERED, "ne": "!="}
        if kind in BITS:
            table = {"eq": "==", "ne": "!="}
        elif kind[0] == "u":
            table |= _UNSIGNED
        if comparison not in table:
            raise Unsupported(f"comparison .{comparison} of .{kind}")
        return f"{a} {table[comparison]} {b}"
    if comparison in _ORDERED:
        return f"{a} {_ORDERED[comparison]} {b}"
    if comparison in _OPPOSITE:  # or a nan
        return f"!({a} {_OPPOSITE[comparison]} {b})"
    rest = {
        "ne": f"{a} < {b} || {a} > {b}",
        "equ": f"!({a} < {b} || {a} > {b})",
        "neu": f"{a} != {b}",
        "num": f"{a} == {a} && {b} == {b}",
        "nan": f"{a} != {a} || {b} != {b}",
    }
    return rest[comparison]


@form("setp")
def _setp(kernel: Kernel, i: Instruction) -> str:
    comparison = i.need(*_ORDERED, *_UNSIGNED, *_OPPOSITE, "ne", "equ", "neu", "num", "nan")
    joined = i.take("and", "or", "xor")
    kind = i.type(*INTEGERS, *BITS, *FLOATS, *HALVES, "f16x2", "bf16x2")
    if kind in PAIRS:
        return _setp_of_two(kernel, i, comparison, PAIRS[kind], joined)
    targets, a, b, *other = i.take_operands(4 if joined else 3)
    condition = _compare(comparison, kind, kernel.value(a, kind), kernel.value(b, kind))
    code = f"const bool holds = {condition};"
    for target, value in zip(targets.split("|"), ("holds", "!holds"), strict=False):
        if joined:
            value = f"{value} {_OPERATORS[joined]} {kernel.value(other[0], 'pred')}"
        code += " " + kernel.put(target.strip(), value)
    return code


def _setp_of_two(
    kernel: Kernel, i: Instruction, comparison: str, half: str, joined: str | None
) -> str:
    """Two halves each: `p|q` are for the lower ones and the upper ones."""
    if joined:
        raise Unsupported(f".{joined} of two halves")
    targets, *sources = i.take_operands(3)
    code = ""
    for shift, target in zip((0, 16), targets.split("|"), strict=True):
        raws = [f"static_cast<u16>(u32({kernel.raw(x)}) >> {shift})" for x in sources]
        a, b = (f"widen_{half}({raw})" for raw in raws)
        code += " " + kernel.put(target.strip(), _compare(comparison, half, a, b))
    return code


@form("selp")
def _select(kernel: Kernel, i: Instruction) -> str:
    i.type(*INTEGERS, *BITS, *FLOATS)
    target, a, b, condition = i.take_operands(4)
    choice = f"{kernel.value(condition, 'pred')} ? u64({kernel.raw(a)}) : u64({kernel.raw(b)})"
    return kernel.put(target, choice)


# ----- moves and conversions


@form("mov")
def _move(kernel: Kernel, i: Instruction) -> str:
    kind = i.type("pred", *INTEGERS, *BITS, *FLOATS)
    target, source = i.take_operands(2)
    if kind == "pred":
        return kernel.put(target, kernel.value(source, "pred"))
    parts = (target if target.startswith("{") else source).strip("{} ").split(",")
    width = SIZES[kind] * 8 // len(parts)
    if target.startswith("{"):
        code = f"const u64 whole = {kernel.raw(source)};"
        for k, part in enumerate(parts):
            code += " " + kernel.put(part.strip(), f"whole >> {k * width}")
        return code
    if source.startswith("{"):
        mask = (1 << width) - 1
        whole = " | ".join(
            f"(u64({kernel.raw(part.strip())}) & {mask:#x}) << {k * width}"
            for k, part in enumerate(parts)
        )
        return kernel.put(target, whole)
    return kernel.put(target, kernel.raw(source))


@form("cvta")
def _cvta(kernel: Kernel, i: Instruction) -> str:
    to = i.take("to")
    space = i.need("global", "shared", "local", "param", "const")
    i.type("u64")
    target, source = i.take_operands(2)
    base = {"shared": "reinterpret_cast<u64>(self.block->shared)"}.get(space, "u64{0}")
    if space == "param":
        base = "reinterpret_cast<u64>(parameters)"
    return kernel.put(target, f"u64({kernel.raw(source)}) {'-' if to else '+'} {base}")


_TO_INTEGRAL = {
    "rni": "nearest({})",
    "rzi": "__builtin_trunc({})",
    "rmi": "__builtin_floor({})",
    "rpi": "__builtin_ceil({})",
}


@form("cvt")
def _convert(kernel: Kernel, i: Instruction) -> str:
    rounding = i.take("rn", *_TO_INTEGRAL)
    into = i.type("u8", "s8", *INTEGERS, *FLOATS, *HALVES, "f16x2", "bf16x2")
    if into in PAIRS:
        if rounding != "rn":
            raise Unsupported("rounding")
        i.type("f32")
        target, high, low = i.take_operands(3)
        halves = [kernel.bits(kernel.value(x, "f32"), PAIRS[into]) for x in (low, high)]
        return kernel.put(target, f"pair16({', '.join(halves)})")
    source_kind = i.type("u8", "s8", *INTEGERS, *FLOATS, *HALVES)
    target, source = i.take_operands(2)
    value = kernel.value(source, source_kind)
    from_float, to_float = (kind in (*FLOATS, *HALVES) for kind in (source_kind, into))
    if not from_float and not to_float:
        if rounding:
            raise Unsupported("rounding")
        return kernel.put(target, f"static_cast<{into}>({value})")
    if not to_float:
        if rounding not in _TO_INTEGRAL or into in ("u8", "s8"):
            raise Unsupported("rounding")
        return kernel.put(target, f"clamped<{into}>({_TO_INTEGRAL[rounding].format(value)})")
    if rounding in _TO_INTEGRAL:
        if into != source_kind or into not in FLOATS:
            raise Unsupported("rounding")
        integral = f"static_cast<{into}>({_TO_INTEGRAL[rounding].format(value)})"
        return kernel.put(target, kernel.bits(integral, into))
    widens = from_float and SIZES[into] > SIZES[source_kind]
    if widens == bool(rounding) or source_kind == into:
        raise Unsupported("rounding")
    if into in HALVES and source_kind != "f32":
        raise Unsupported("a half from anything but .f32")
    if source_kind in HALVES and into != "f32":
        raise Unsupported("a half to anything but .f32")
    if into not in HALVES:
        value = f"static_cast<{into}>({value})"
    return kernel.put(target, kernel.bits(value, into))
