# SPDX-License-Identifier: Apache-2.0
"""The memory traffic of a step, derived from what its stages read and write."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import frameworks

if TYPE_CHECKING:
    import torch


def bytes_per_parameter(
    model_or_optimizer: torch.nn.Module | torch.optim.Optimizer, *, scaled: bool = False
) -> float:
    """The bytes that a step moves for each element of a parameter, on average.

    Every stage of the rule reads and writes what its text says, in the dtype that it is stored in;
    a look at all gradients before (a scaler, ``max_norm``, ``skip_nonfinite``) reads them once
    more, and ``ema_decay`` reads and writes the average. What a cache saves is not counted: that
    holds for parameters that no cache keeps from one step to the next, but later stages of a rule
    with several may find a part of what they read still there.

    Args:
        model_or_optimizer: a model with an optimizer attached, or an optimizer, which has a rule.
        scaled: whether the step is made with an enabled ``GradScaler``.

    Returns:
        Bytes; the mean over the optimizer's elements where dtypes or rules differ.

    Raises:
        ValueError: no optimizer, or one without a rule of pyupdate's, or without elements.

    Example:
        >>> import torch, pyupdate
        >>> model = torch.nn.Linear(8, 8)
        >>> pyupdate.bytes_per_parameter(pyupdate.optim.AdamW(model.parameters()))
        28.0
        >>> pyupdate.bytes_per_parameter(pyupdate.optim.AdamW(model.parameters(), max_norm=1.0))
        32.0
    """
    optimizer: Any = model_or_optimizer
    if frameworks.is_torch_module(optimizer):
        optimizer = getattr(optimizer, "current_optimizer", None)
    from .pytorch import engines, state
    from .pytorch.request import Scaling, request_of

    row = engines.row_of(optimizer) if hasattr(optimizer, "param_groups") else None
    elements = (
        sum(p.numel() for group in optimizer.param_groups for p in group["params"]) if row else 0
    )
    if row is None or row.finish is not None or elements == 0:
        message = (
            "bytes_per_parameter takes a model with an optimizer attached (pyupdate.build) or an "
            "optimizer, of pyupdate.optim or one that can be accelerated, that holds elements; got "
            f"{frameworks.type_name(model_or_optimizer)}"
        )
        raise ValueError(message)
    options = engines.options_of(optimizer)
    request = request_of(options, Scaling(check=scaled))
    total = 0
    for group in optimizer.param_groups:
        rule = row.rule(group)
        for param in group["params"]:
            size = dict.fromkeys(
                rule.elements, state.dtype_for(param, options.state_dtype).itemsize
            )
            size["param"] = size["grad"] = param.dtype.itemsize
            moved = sum(size[n] for s in rule.stages for n in (*s.elements, *s.writes))
            moved += size["grad"] if request.reduce else 0
            moved += 2 * state.compute_type(param).itemsize if options.ema_decay is not None else 0
            total += moved * param.numel()
    return total / elements
