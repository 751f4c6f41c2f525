# SPDX-License-Identifier: Apache-2.0
"""What one launch of kernels/triton_*.py takes, and what all launches of a rule share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ..kernels.triton_forms import RuleForm
from .triton_rows import Entry


@dataclass
class OfRule:
    """What all rows of one rule share on the device."""

    form: RuleForm
    groups: list[tuple[int, int]] = field(default_factory=list)
    """Members, and groups of them."""
    keys: dict[tuple[Any, ...], int] = field(default_factory=dict)
    table: list[int] = field(default_factory=list)
    class_table: Any = None
    classes: Any = None
    numbers: Any = None
    begin: int = 0
    """Where its numbers stand behind the request."""


@dataclass
class Launch:
    """The rows that one launch takes."""

    of: OfRule
    param: torch.dtype
    state: torch.dtype
    aligned: bool
    averages: bool
    entries: list[int] = field(default_factory=list)
    rows: Any = None
    work: Any = None
    per_tensor: Any = None
    tickets: Any = None
    """A row each: how many of its chunks are done; 0 between launches."""
    chunks: int = 0


def class_of(of: OfRule, member: int, entry: Entry) -> int:
    """The index of its class among the rule's; a new one is led by this row's numbers."""
    group = (member, entry.group)
    key = (*group, *entry.counts)
    if key not in of.keys:
        if group not in of.groups:
            of.groups.append(group)
        of.keys[key] = len(of.keys)
        scalars = [*entry.scalars, 0, 0][:2]
        of.table += [of.groups.index(group), entry.step, *scalars]
    return of.keys[key]


def language_type(dtype: torch.dtype) -> Any:
    """The same in Triton's language."""
    import triton.language as tl

    return {
        torch.float64: tl.float64,
        torch.float32: tl.float32,
        torch.bfloat16: tl.bfloat16,
        torch.float16: tl.float16,
    }[dtype]
