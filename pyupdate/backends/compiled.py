# SPDX-License-Identifier: Apache-2.0
"""What the back ends of compiled modules share: how a module's plan is made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.graph import increment_version

from ..pytorch.checks import STORAGES
from ..pytorch.rows import GroupRule, Row


def plan_of(
    module: Any, rows: Sequence[Row], rules: Sequence[GroupRule], averages: bool, **more: Any
) -> Any:
    """A module's ``Plan`` of rows; `more` is what only that module takes."""
    stepped = {row.group for row in rows}
    types = {torch.Tensor, torch.nn.Parameter, *(type(row.param) for row in rows)}
    return module.Plan(
        tensor_type=torch.Tensor,
        types=list(types),
        increment_version=increment_version,
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
