# SPDX-License-Identifier: Apache-2.0
"""Names that a function of the language cannot have, because C++ has another use for them.

Refused with their line when the function is analysed, not by a compiler's message about generated
text. tests/test_naming.py asks a compiler for every keyword and every macro of the headers.
"""

from __future__ import annotations

import re

_KEYWORDS = """
    alignas alignof and and_eq asm auto bitand bitor bool break case catch char char8_t char16_t
    char32_t class co_await co_return co_yield compl concept const const_cast consteval constexpr
    constinit continue decltype default delete do double dynamic_cast else enum explicit export
    extern false float for friend goto if inline int long mutable namespace new noexcept not not_eq
    nullptr operator or or_eq private protected public register reinterpret_cast requires return
    short signed sizeof static static_assert static_cast struct switch template this thread_local
    throw true try typedef typeid typename union unsigned using virtual void volatile wchar_t while
    xor xor_eq
"""

# Macros in small letters: of standard headers, and of compilers that are not told -std=c++20.
_MACROS = "assert errno i386 linux offsetof sched_priority stderr stdin stdout unix"

_NOT_A_NAME = {
    **dict.fromkeys(_KEYWORDS.split(), "is a keyword of C++"),
    **dict.fromkeys(_MACROS.split(), "may be a macro of C++ headers"),
}
_CAPITAL = re.compile(r"[A-Z]")
_RESERVED = re.compile(r"_[A-Z]|.*__")
_CUDA = re.compile(r"cuda[A-Z]")

# What a rule's struct in C++ already holds: kernels/emit_cpp.py.
_MEMBERS = re.compile(r"prepare|stage\d+")


def why_not_a_name(name: str) -> str | None:
    """Why no argument, variable or function can be called so; None if it can."""
    why = _NOT_A_NAME.get(name)
    if _CAPITAL.match(name):
        why = "begins with a capital, as macros and types of C++ do"
    elif _RESERVED.match(name):
        why = "is reserved in C++ (a double underscore, or one before a capital)"
    elif _CUDA.match(name):
        why = "begins as names of CUDA do"
    elif not name.isascii():
        why = "is not plain ASCII"
    return why and f"'{name}' {why}: choose another name"


def why_not_a_rule(name: str) -> str | None:
    """Why no rule can be called so, though a function could; None if it can."""
    if _MEMBERS.fullmatch(name):
        return f"'{name}' is what the C++ of every rule calls a part of itself: choose another name"
    return None
