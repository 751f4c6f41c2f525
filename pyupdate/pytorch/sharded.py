# SPDX-License-Identifier: Apache-2.0
"""Models that ``torch.distributed.fsdp`` has sharded: what of them cannot be updated.

``fully_shard`` gives autograd other parameters than the model's optimizer holds, and so does
``FullyShardedDataParallel`` with ``use_orig_params=True``, whose parameters are views, or with
``MixedPrecision(param_dtype=...)``: gradients taken for the model's parameters alone do not reach
them. Flat parameters in their own dtype they do. There a step sees one rank's shards, so what takes
all gradients or whole tensors into account is refused: ranks would come to different answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..options import Options
from .rows import GroupRule, Row

_FSDP2 = "FSDPModule"
_FSDP1 = "FullyShardedDataParallel"
_MARK = "_fsdp_flattened"
"""Torch's own mark of a parameter that is, or is in, a flat shard (torch 2.10 to 2.13)."""

_WHOLE_SIZE = "_unpadded_unsharded_size"
"""Of a flat parameter, where it says its size over all ranks."""

_WHOLE = ("max_norm", "skip_nonfinite")
"""The options that look at all gradients; error_if_nonfinite asks for a max_norm too."""

_known: dict[type, bool] = {}


def is_distributed() -> bool:
    """Whether this process is one of a group, so that modules may reduce gradients over it."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def check_model(name: str, model: nn.Module) -> None:
    """Refuse a model with a module whose parameters a backward pass for them does not reach.

    Raises:
        ValueError: names the module.
    """
    if not is_distributed():
        return
    for qualified, module in model.named_modules() if _has_sharded(model) else ():
        kinds = {kind.__name__ for kind in type(module).__mro__}
        if _FSDP2 in kinds:
            how, mend = "fully_shard", ""
        elif _FSDP1 in kinds and getattr(module, "_use_orig_params", False):
            how = f"{_FSDP1}(use_orig_params=True)"
            mend = f"{_FSDP1}(use_orig_params=False), "
        elif _FSDP1 in kinds and _computes_in_another_dtype(module):
            how = f"{_FSDP1} with MixedPrecision(param_dtype={module.mixed_precision.param_dtype})"
            mend = "MixedPrecision without param_dtype and torch.autocast, "
        else:
            continue
        where = f"module '{qualified}' of '{name}'" if qualified else f"'{name}'"
        message = (
            f"the parameters of {where} are sharded by {how}, and a gradient taken for them "
            f"reaches none: take {mend}DistributedDataParallel, or a loop of your own with "
            "loss.backward() and an optimizer of torch's"
        )
        raise ValueError(message)


def _computes_in_another_dtype(module: Any) -> bool:
    """Whether FSDP gives autograd the flat parameter in another dtype, to which it is another."""
    wanted = getattr(getattr(module, "mixed_precision", None), "param_dtype", None)
    return wanted is not None and any(p.dtype is not wanted for p in module.parameters())


def _has_sharded(model: nn.Module) -> bool:
    """Whether a module is of a class of FSDP; a class is looked at once."""
    for module in model.modules():
        kind = type(module)
        known = _known.get(kind)
        if known is None:
            names = {base.__name__ for base in kind.__mro__}
            known = _known[kind] = not names.isdisjoint((_FSDP1, _FSDP2))
        if known:
            return True
    return False


def shard_among(rows: Sequence[Row], rules: Sequence[GroupRule]) -> str | None:
    """The name of the first of these parameters that is a rank's shard, None where none is.

    Raises:
        ValueError: a shard's rule takes whole parameters into account.
    """
    first = None
    for row in rows:
        if is_shard(row.param):
            rule = rules[row.group].rule
            if rule.per_tensor:
                refuse_rule(row.name, rule.name)
            first = first or row.name
    return first


def is_shard(param: torch.Tensor) -> bool:
    """Whether a parameter is one rank's part of a flat one, or lies in it.

    With ``ShardingStrategy.NO_SHARD`` a flat one is all there, and its gradient that of all ranks.
    """
    return getattr(param, _MARK, False) is True and getattr(param, _WHOLE_SIZE, None) != param.shape


def refuse_rule(name: str, rule: str) -> None:
    """Refuse a rule that takes a whole parameter into account.

    Raises:
        ValueError: names both.
    """
    message = (
        f"parameter '{name}' is a shard of {_FSDP1}, and {rule} takes norms of whole parameters, "
        "of which this rank has a part: take an elementwise rule, as that of AdamW"
    )
    raise ValueError(message)


def check_options(shard: str, options: Options, *, scaled: bool) -> None:
    """Refuse to judge all gradients by those of one rank's shards.

    Args:
        shard: the name of a parameter that is one.
        options: of the step.
        scaled: whether a scaler has the step look for inf and nan.

    Raises:
        ValueError: names the parameter and what asks for all gradients.
    """
    values = {name: getattr(options, name) for name in _WHOLE}
    asked = [
        f"{name}={value!r}"
        for name, value in values.items()
        if value is not None and value is not False
    ]
    asks = asked[0] if asked else None
    if asks is None and scaled:
        asks = "a scaler that does not ask the other ranks, as FSDP's ShardedGradScaler does,"
    if asks is not None:
        message = (
            f"parameter '{shard}' is a shard of {_FSDP1}, and {asks} needs all gradients, of which "
            "this rank has a part: ranks would make different steps. Leave it out; "
            f"{_FSDP1}.clip_grad_norm_ clips by the norm of all"
        )
        raise ValueError(message)
