# SPDX-License-Identifier: Apache-2.0
"""The dtype of state: what the option `state_dtype` asks for, and what loading keeps.

A step takes the state of a bfloat16 or float16 parameter in the parameter's dtype or in float32, as
it finds it. The option says what new state is made in, and what state that is there already becomes
when it is loaded or accelerated.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import Optimizer

HALVES = (torch.bfloat16, torch.float16)


def dtype_for(param: torch.Tensor, wanted: torch.dtype | None) -> torch.dtype:
    """What new state of a parameter is made in, `wanted` being the option `state_dtype`."""
    return wanted if wanted is not None and param.dtype in HALVES else param.dtype


def dtypes_of(param: torch.Tensor) -> tuple[torch.dtype, ...]:
    """What a step takes state of a parameter in."""
    return (param.dtype, torch.float32) if param.dtype in HALVES else (param.dtype,)


def compute_type(param: torch.Tensor) -> torch.dtype:
    """What a parameter is computed in, and its average kept in."""
    return torch.float64 if param.dtype is torch.float64 else torch.float32


def scalar_type() -> torch.dtype:
    """What torch makes a step count in, or another scalar of a parameter."""
    wide = torch.get_default_dtype() is torch.float64
    return torch.float64 if wide else torch.float32


def converted(
    optimizer: Optimizer, wanted: torch.dtype | None
) -> list[tuple[dict[str, Any], str, torch.Tensor]]:
    """Whatever state is not yet as `wanted`: where it stands, and the same values in that dtype.

    Nothing of the optimizer is changed, so a lack of memory leaves it as it was.
    """
    found = []
    for group in optimizer.param_groups:
        for param in group["params"]:
            for key, value in optimizer.state.get(param, {}).items():
                ours = isinstance(value, torch.Tensor) and value.dtype is param.dtype
                if ours and key != "step" and dtype_for(param, wanted) is not param.dtype:
                    inner = optimizer.state[param]
                    found.append((inner, key, value.to(dtype_for(param, wanted))))
    return found


@contextmanager
def kept_on_load(
    optimizer: Optimizer,
    wanted: torch.dtype | None,
    scalars_of: Callable[[int], Collection[str]],
) -> Iterator[None]:
    """Inside, ``load_state_dict`` goes on with the bits that were saved.

    Torch casts all state to the parameter's dtype. Here a scalar stays in the float32 or float64 it
    was saved in: what is float32 beside a float64 parameter is computed in other bits once it is
    float64 (torch's own NAdam and ASGD do not resume to the bit for that). The state of a bfloat16
    or float16 parameter becomes `wanted`, and without it stays in float32 if it was saved in it;
    from any other dtype it is cast as torch does. Other hooks see what they always do: those before
    the load have run when the state is taken, those after it find the state as it stays.

    Args:
        optimizer: which loads.
        wanted: the option `state_dtype`.
        scalars_of: the keys of a parameter's scalars, by the index of its group; asked when the
            groups are loaded.
    """
    given: dict[str, Any] = {}

    def take(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        given.update(_without_what_was_not_saved(state_dict))
        return given

    def put(_: Optimizer) -> None:
        _put(optimizer, given, wanted, scalars_of)

    handles = (
        optimizer.register_load_state_dict_pre_hook(take),
        optimizer.register_load_state_dict_post_hook(put, prepend=True),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _without_what_was_not_saved(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict without the parameters that have nothing but empty dicts for state.

    So torch.distributed.checkpoint says, of a flattened checkpoint, that a parameter had no state:
    it was saved before its first step.
    """
    kept = {key: inner for key, inner in state_dict["state"].items() if not _is_nothing(inner)}
    return {**state_dict, "state": kept}


def _is_nothing(inner: object) -> bool:
    if not isinstance(inner, dict) or not inner:
        return False
    return all(isinstance(value, dict) and not value for value in inner.values())


def _put(
    optimizer: Optimizer,
    given: dict[str, Any],
    wanted: torch.dtype | None,
    scalars_of: Callable[[int], Collection[str]],
) -> None:
    groups = zip(given["param_groups"], optimizer.param_groups, strict=True)
    for g, (saved, group) in enumerate(groups):
        scalars = scalars_of(g)
        for index, param in zip(saved["params"], group["params"], strict=True):
            values = given["state"].get(index)
            if not isinstance(values, dict):
                continue
            inner = optimizer.state[param]
            for key, value in values.items():
                if key == "step" or not isinstance(value, torch.Tensor):
                    continue
                dtype = inner[key].dtype
                if key in scalars and value.dtype in (torch.float32, torch.float64):
                    dtype = value.dtype
                elif param.dtype in HALVES:
                    is_wide = value.dtype is torch.float32
                    dtype = torch.float32 if is_wide else dtype_for(param, wanted)
                if inner[key].dtype is not dtype:
                    inner[key] = value.to(dtype=dtype, device=param.device)
