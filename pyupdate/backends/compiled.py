# SPDX-License-Identifier: Apache-2.0
"""What the back ends over compiled plans share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..pytorch.checks import STORAGES
from ..pytorch.rows import GroupRule, Inputs, Row, Stale, check_all_memory, check_row
from .plain import mend


def plan_of(
    kind: Any, rows: Sequence[Row], rules: Sequence[GroupRule], averages: bool, **more: Any
) -> Any:
    """A plan of rows, of a module's class for them; `more` is what only that class takes."""
    stepped = {row.group for row in rows}
    types = {torch.Tensor, torch.nn.Parameter, *(type(row.param) for row in rows)}
    return kind(
        tensor_type=torch.Tensor,
        types=list(types),
        # Not torch.autograd.graph's, in whose Python a signal may raise between check and step.
        increment_version=torch._C._increment_version,
        tensor_list=getattr(torch._C, "ScriptList", None),
        groups=[
            (rule.rule.name, list(rule.rule.state), list(rule.rule.scalars), rule.counts_steps)
            if g in stepped
            else ("", [], [], False)
            for g, rule in enumerate(rules)
        ],
        params=[row.param for row in rows],
        storages=[STORAGES[row.param.dtype] for row in rows],
        group_of=[row.group for row in rows],
        positions=[row.position for row in rows],
        averages=averages,
        **more,
    )


def settle(
    plan: Any,
    kinds: Any,
    found: Any,
    noticed: Sequence[int],
    rows: Sequence[Row],
    rules: Sequence[GroupRule],
    inputs: Inputs,
) -> None:
    """Of a device's plan that is not ready: say what is wrong, or mend it, or vouch for it.

    `kinds` is the module's ``Found``, of which `found` is one.

    Raises:
        TypeError, ValueError: a row is not right.
        Stale: the plan no longer fits.
    """
    if found == kinds.OVERLAP:
        check_all_memory(rows, rules, inputs)
        plan.vouch()
    elif found == kinds.SUSPECT:
        row = rows[noticed[0]]
        if mend(row, rules[row.group], inputs):
            for other in rows:  # mostly the others are alike
                mend(other, rules[other.group], inputs)
            return
        check_row(row, rules[row.group], inputs)
        raise Stale(row.name)
    else:
        message = "the optimizer's parameters"
        raise Stale(message)


def runs_of(counts: Sequence[tuple[int, float]]) -> list[tuple[int, int, float]]:
    """Neighbours of one value as (first, behind the last, value), in order: the last one wins."""
    runs: list[tuple[int, int, float]] = []
    for r, count in counts:
        if runs and runs[-1][1:] == (r, count):
            runs[-1] = (runs[-1][0], r + 1, count)
        else:
            runs.append((r, r + 1, count))
    return runs
