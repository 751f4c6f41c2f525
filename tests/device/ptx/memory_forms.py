# SPDX-License-Identifier: Apache-2.0
"""The forms of PTX that reach beyond a register: memory, other threads, branches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .instruction import BITS, FLOATS, INTEGERS, Instruction, cpp_type, form
from .text import SIZES, Unsupported

if TYPE_CHECKING:
    from .emit import Kernel

_SCOPES = ("cta", "cluster", "gpu", "sys")
_SPACES = ("global", "shared", "local", "param", "const", "shared::cta")
# What changes no value: where a line is cached, and for how long.
_EVICTING = (
    *("L1::evict_normal", "L1::evict_unchanged", "L1::evict_first", "L1::evict_last"),
    *("L1::no_allocate", "L2::evict_normal", "L2::evict_first", "L2::evict_last"),
)
_CACHING = {
    "ld": ("ca", "cg", "cs", "lu", "cv", "nc", "L2::64B", "L2::128B", "L2::256B", *_EVICTING),
    "st": ("wb", "cg", "cs", "wt", *_EVICTING),
}


def _space(i: Instruction) -> str:
    space = i.take(*_SPACES) or "generic"
    return {"shared::cta": "shared", "const": "global"}.get(space, space)


@form("ld", "st")
def _access(kernel: Kernel, i: Instruction) -> str:
    store = i.opcode == "st"
    if i.take("relaxed", "release" if store else "acquire"):
        i.need(*_SCOPES)
    i.take("volatile", "weak")
    space = _space(i)
    while i.take(*_CACHING[i.opcode]):
        pass
    policy = i.take("L2::cache_hint")
    count = int((i.take("v2", "v4", "v8") or "v1")[1:])
    kind = i.type("u8", "s8", "b8", *INTEGERS, *BITS, *FLOATS)
    operands = i.take_operands(3 if policy else 2)
    address, registers = operands[:2] if store else (operands[1], operands[0])
    names = [name.strip() for name in registers.strip("{} ").split(",")]
    if len(names) != count or SIZES[kind] * count > 32:
        raise Unsupported(f"{len(names)} registers")
    kind, size = cpp_type(kind), SIZES[kind]
    word = f"u{size * 8}"
    where = f"self, {kernel.address(address)}, {size * count}"
    if space == "param":
        if store:
            raise Unsupported("a store to a parameter")
        code = f"const u8* at = param({where}, {i.line});"
    else:
        code = f"u8* at = {space}({where}, {'true' if store else 'false'}, {i.line});"
    for k, name in enumerate(names):
        if store:
            code += f" put<{word}>(at + {k * size}, static_cast<{word}>({kernel.raw(name)}));"
        else:
            signed = kind if kind[0] == "s" else word
            code += " " + kernel.put(name, f"get<{signed}>(at + {k * size})")
    return code


_ATOMICS = {
    "add": "old + a",
    "exch": "a",
    "cas": "old == a ? b : old",
    "min": "a < old ? a : old",
    "max": "a > old ? a : old",
    "and": "old & a",
    "or": "old | a",
    "xor": "old ^ a",
    "inc": "old >= a ? 0 : old + 1",
    "dec": "old == 0 || old > a ? a : old - 1",
}


@form("atom", "red")
def _atomic(kernel: Kernel, i: Instruction) -> str:
    i.take("relaxed", "acquire", "release", "acq_rel")
    i.take(*_SCOPES)
    space = _space(i)
    if space not in ("global", "shared", "generic"):
        raise Unsupported(f"space .{space}")
    operation = i.need(*_ATOMICS)
    floats = FLOATS if operation == "add" else ()
    kind = i.type("u32", "s32", "u64", "s64", "b32", "b64", *floats)
    returns = i.opcode == "atom"
    operands = i.take_operands(2 + returns + (operation == "cas"))
    target = operands.pop(0) if returns else "_"
    value = cpp_type(kind)
    where = f"self, {kernel.address(operands[0])}, {SIZES[kind]}, true, {i.line}"
    code = f"u8* at = {space}({where}); const {value} old = get<{value}>(at);"
    for name, operand in zip("ab", operands[1:], strict=False):
        code += f" const {value} {name} = {kernel.value(operand, kind)};"
    new = f"static_cast<{value}>({_ATOMICS[operation]})"
    return f"{code} put<{value}>(at, {new}); {kernel.put(target, kernel.bits('old', kind))}"


@form("membar")
def _membar(kernel: Kernel, i: Instruction) -> str:
    i.need("gl", "cta", "sys")
    return ""  # one OS thread: memory is always in order


@form("fence")
def _fence(kernel: Kernel, i: Instruction) -> str:
    i.take("sc", "acq_rel", "acquire", "release")
    i.need(*_SCOPES)
    return ""


@form("createpolicy")
def _policy(kernel: Kernel, i: Instruction) -> str:
    i.need("fractional")
    i.need("L2::evict_last", "L2::evict_first", "L2::evict_normal", "L2::evict_unchanged")
    i.type("b64")
    target, *fraction = i.take_operands(len(i.operands))
    if len(fraction) > 1:
        raise Unsupported("operands")
    return kernel.put(target, "u64{0}")


# ----- other threads


@form("bar", "barrier")
def _barrier(kernel: Kernel, i: Instruction) -> str:
    i.take("cta")
    if i.take("warp"):
        i.need("sync")
        (mask,) = i.take_operands(1)
        return f"exchange(self, {kernel.value(mask, 'u32')}, 0, {i.line});"
    if i.take("sync"):
        i.take("aligned")
        if i.take_operands(1) != ["0"]:
            raise Unsupported("a barrier other than 0 of all threads")
        return f"barrier(self, {i.line});"
    i.need("red")
    joined = i.need("popc", "and", "or")
    i.take("aligned")
    i.type("u32" if joined == "popc" else "pred")
    target, number, vote = i.take_operands(3)
    if number != "0":
        raise Unsupported("a barrier other than 0 of all threads")
    votes = f"barrier_count(self, {kernel.value(vote, 'pred')}, {i.line})"
    all_of = "self.block->ntid[0] * self.block->ntid[1] * self.block->ntid[2]"
    result = {"popc": votes, "or": f"{votes} != 0", "and": f"{votes} == {all_of}"}[joined]
    return kernel.put(target, result)


@form("shfl")
def _shuffle(kernel: Kernel, i: Instruction) -> str:
    i.need("sync")
    modes = {"up": "kUp", "down": "kDown", "bfly": "kButterfly", "idx": "kIndex"}
    mode = modes[i.need(*modes)]
    i.type("b32")
    targets, *sources = i.take_operands(5)
    values = ", ".join(kernel.value(x, "u32") for x in sources)
    code = f"bool inside; const u32 got = shuffle(self, {mode}, {values}, {i.line}, &inside);"
    for target, value in zip(targets.split("|"), ("got", "inside"), strict=False):
        code += " " + kernel.put(target.strip(), value)
    return code


@form("vote")
def _vote(kernel: Kernel, i: Instruction) -> str:
    i.need("sync")
    what = i.need("all", "any", "uni", "ballot")
    i.type("b32" if what == "ballot" else "pred")
    target, vote, mask = i.take_operands(3)
    votes = f"ballot(self, {kernel.value(vote, 'pred')}, {kernel.value(mask, 'u32')}, {i.line})"
    result = {
        "ballot": "votes",
        "any": "votes != 0",
        "all": "votes == self.group",
        "uni": "votes == 0 || votes == self.group",
    }[what]
    return f"const u32 votes = {votes}; {kernel.put(target, result)}"


@form("redux")
def _redux(kernel: Kernel, i: Instruction) -> str:
    i.need("sync")
    operation = i.need("add", "min", "max", "and", "or", "xor")
    magnitude, nan_wins = i.take("abs"), i.take("NaN")
    float_too = ("f32",) if operation in ("min", "max") else ()
    kind = i.type("u32", "s32", "b32", *float_too)
    target, source, mask = i.take_operands(3)
    value = kernel.value(source, "u32")
    if kind == "f32":
        name = "least" if operation == "min" else "greatest"
        join = f"bits({name}(as<f32>(a), as<f32>(b), {'true' if nan_wins else 'false'}))"
        value += " & 0x7fffffff" if magnitude else ""
    elif magnitude or nan_wins or (kind == "b32") != (operation in ("and", "or", "xor")):
        raise Unsupported("redux of this type")
    elif operation in ("min", "max"):
        sign = "<" if operation == "min" else ">"
        join = f"as<{kind}>(a) {sign} as<{kind}>(b) ? a : b"
    else:
        join = {"add": "a + b", "and": "a & b", "or": "a | b", "xor": "a ^ b"}[operation]
    joined = f"[](u32 a, u32 b) -> u32 {{ return {join}; }}"
    lanes = kernel.value(mask, "u32")
    return kernel.put(target, f"reduce(self, {value}, {lanes}, {i.line}, {joined})")


# ----- branches


@form("bra")
def _branch(kernel: Kernel, i: Instruction) -> str:
    i.take("uni")
    (label,) = i.take_operands(1)
    return f"goto {kernel.label(label)};"


@form("brx")
def _branch_by_index(kernel: Kernel, i: Instruction) -> str:
    i.need("idx")
    i.take("uni")
    index, table = i.take_operands(2)
    if table not in kernel.targets:
        raise Unsupported(f"branch targets {table}")
    cases = " ".join(
        f"case {k}: goto {kernel.label(label)};" for k, label in enumerate(kernel.targets[table])
    )
    trap = f"default: fault(self, kTrap, {i.line}); return;"
    return f"switch ({kernel.raw(index)}) {{ {cases} {trap} }}"


@form("ret", "exit")
def _return(kernel: Kernel, i: Instruction) -> str:
    return "return;"


@form("trap")
def _trap(kernel: Kernel, i: Instruction) -> str:
    return f"fault(self, kTrap, {i.line}); return;"
