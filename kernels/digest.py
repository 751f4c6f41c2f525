# SPDX-License-Identifier: Apache-2.0
"""What a rule's text comes to, as one short word: a compiled rule is known again by it.

Comments, docstrings, type hints and the names of files do not count; whatever can change a number
does, the texts of all functions that are called included.
"""

from __future__ import annotations

import ast
import copy
import hashlib
from collections.abc import Iterable
from functools import cache

from .grammar import Function


def digest_of(names: Iterable[Iterable[str]], functions: Iterable[Function]) -> str:
    """The digest of an interface and of texts, in hexadecimal.

    Args:
        names: lists of names whose order the compiled code knows (state, numbers).
        functions: in the order in which they run.
    """
    found: dict[str, str] = {}
    order = []
    for function in functions:
        _collect(function, found)
        order.append(function.name)
    told = [*(" ".join(listed) for listed in names), " ".join(order), *found.values()]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:32]


def _collect(function: Function, found: dict[str, str]) -> None:
    for call in function.calls:
        _collect(call, found)
    found.setdefault(function.name, _plain(function))


@cache
def _plain(function: Function) -> str:
    """The text of one function, without what does not count."""
    tree = copy.deepcopy(function.tree)
    tree.decorator_list = []
    tree.returns = None
    for argument in (*tree.args.posonlyargs, *tree.args.args):
        argument.annotation = None
    if ast.get_docstring(tree) is not None:
        del tree.body[0]
    return ast.unparse(tree)
