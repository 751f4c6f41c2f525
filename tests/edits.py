# SPDX-License-Identifier: Apache-2.0
"""What users do between steps to parameters, gradients, state and groups, as functions."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

SHAPES = ((3, 4), (5,), (2, 3, 2), ())


class Side:
    """Parameters and their optimizer: the one under test, or its truth."""

    def __init__(self, make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> None:
        rng = np.random.default_rng(21)
        self.params = [nn.Parameter(torch.tensor(rng.standard_normal(s))) for s in SHAPES]
        self.optimizer = make(self.params)
        self.rng = rng

    def values(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.tensor(self.rng.standard_normal(shape))

    def set_grads(self, fresh: bool) -> None:
        for param in self.params:
            grad = self.values(tuple(param.shape))
            if fresh or param.grad is None or param.grad.shape != param.shape:
                param.grad = grad
            else:
                param.grad.copy_(grad)

    def state(self, index: int) -> dict[str, torch.Tensor]:
        return self.optimizer.state[self.params[index]]


# ----- edits --------------------------------------------------------------------------------------


def data(side: Side) -> None:
    side.params[0].data = side.values((3, 4))


def data_of_another_shape(side: Side) -> None:
    side.params[1].data = side.values((7,))
    side.optimizer.state.pop(side.params[1], None)
    side.params[1].grad = None


def data_back(side: Side) -> None:
    side.params[1].data = side.values((5,))
    side.optimizer.state.pop(side.params[1], None)
    side.params[1].grad = None


def data_transposed(side: Side) -> None:
    side.params[0].data = side.values((4, 3)).t()


def set_(side: Side) -> None:
    with torch.no_grad():
        side.params[0].set_(side.values((3, 4)))


def set_into_a_larger_storage(side: Side) -> None:
    large = side.values((100,))
    with torch.no_grad():
        side.params[2].set_(large.untyped_storage(), 13, (2, 3, 2), (20, 5, 2))


def resize(side: Side) -> None:
    side.params[1].detach().resize_(4096)  # the storage moves, the values stay in front


def resize_storage(side: Side) -> None:
    storage = side.params[0].untyped_storage()  # freed and allocated anew
    before = storage.clone()
    storage.resize_(0)
    storage.resize_(before.nbytes())
    storage.copy_(before)


def swap_data(side: Side) -> None:
    side.params[0].data, other = side.values((3, 4)), side.params[0].data
    side.params.append(nn.Parameter(other))  # the memory lives on in another parameter
    side.optimizer.add_param_group({"params": [side.params[-1]], "lr": 0.02})


def drop_gradients(side: Side) -> None:
    side.optimizer.zero_grad(set_to_none=True)


def zero_gradients(side: Side) -> None:
    side.optimizer.zero_grad(set_to_none=False)


def strided_gradient(side: Side) -> None:
    side.params[0].grad = side.values((6, 4))[::2]


def clear_state(side: Side) -> None:
    side.optimizer.state.clear()


def new_state_dict(side: Side) -> None:
    side.optimizer.state = defaultdict(dict)


def empty_inner_state(side: Side) -> None:
    side.optimizer.state[side.params[0]] = {}


def delete_state(side: Side) -> None:
    side.optimizer.state.pop(side.params[2], None)


def replace_inner_state(side: Side) -> None:
    inner = side.optimizer.state[side.params[0]]
    side.optimizer.state[side.params[0]] = {key: v.clone() for key, v in reversed(inner.items())}


def replace_tensors_of_state(side: Side) -> None:
    for inner in side.optimizer.state.values():
        for key in list(inner):
            inner[key] = inner[key] * 1.0


def write_state(side: Side) -> None:
    for inner in side.optimizer.state.values():
        for key, value in inner.items():
            value.mul_(2.0 if key == "step" else 0.5)


def set_memory_of_state(side: Side) -> None:
    for inner in side.optimizer.state.values():
        for key, value in inner.items():
            if key != "step":
                value.set_(value.clone())


def reload_state(side: Side) -> None:
    side.optimizer.load_state_dict(copy.deepcopy(side.optimizer.state_dict()))


def numbers_for_steps(side: Side) -> None:
    for inner in side.optimizer.state.values():
        if "step" in inner:
            inner["step"] = int(inner["step"])
    if any("step" in inner for inner in side.optimizer.state.values()):
        # Torch itself turns them into tensors only here.
        side.optimizer.__setstate__(side.optimizer.__dict__.copy())


def learning_rate(side: Side) -> None:
    side.optimizer.param_groups[0]["lr"] *= 0.5


def learning_rate_tensor(side: Side) -> None:
    side.optimizer.param_groups[0]["lr"] = torch.tensor(0.007, dtype=torch.float64)


def weight_decay(side: Side) -> None:
    side.optimizer.param_groups[0]["weight_decay"] += 0.03


def maximize(side: Side) -> None:
    group = side.optimizer.param_groups[0]
    group["maximize"] = not group["maximize"]


def new_group(side: Side) -> None:
    side.params.append(nn.Parameter(side.values((3,))))
    side.optimizer.add_param_group({"params": [side.params[-1]], "lr": 0.03})


def append_to_group(side: Side) -> None:
    side.params.append(nn.Parameter(side.values((2,))))
    side.optimizer.param_groups[0]["params"].append(side.params[-1])


def remove_from_group(side: Side) -> None:
    removed = side.optimizer.param_groups[0]["params"].pop(2)
    side.optimizer.state.pop(removed, None)


def reverse_group(side: Side) -> None:
    side.optimizer.param_groups[0]["params"].reverse()


def new_list_of_params(side: Side) -> None:
    group = side.optimizer.param_groups[0]
    group["params"] = group["params"][1:] + group["params"][:1]


def replace_parameter(side: Side) -> None:
    params = side.optimizer.param_groups[0]["params"]
    old = params[1]
    index = next(i for i, param in enumerate(side.params) if param is old)
    side.params[index] = params[1] = nn.Parameter(side.values(tuple(old.shape)))
    side.optimizer.state.pop(old, None)


def move_a_boundary(side: Side) -> None:
    """The last parameter of the first group becomes the first of a second one, or goes back."""
    groups = side.optimizer.param_groups
    if len(groups) == 1:
        last = groups[0]["params"].pop()
        side.optimizer.add_param_group({"params": [last], "lr": 0.03})
    elif len(groups[0]["params"]) > 1:
        groups[1]["params"].insert(0, groups[0]["params"].pop())


def new_list_of_groups(side: Side) -> None:
    groups = side.optimizer.param_groups
    first = {**groups[0], "params": groups[0]["params"][:1]}
    second = {**groups[0], "params": groups[0]["params"][1:], "lr": 0.004}
    side.optimizer.param_groups = [second, first, *groups[1:]]


def freeze(side: Side) -> None:
    side.params[0].requires_grad_(False)
    side.params[0].grad = None


def unfreeze(side: Side) -> None:
    side.params[0].requires_grad_(True)


EDITS: dict[str, Callable[[Side], None]] = {
    edit.__name__: edit
    for edit in (
        data,
        data_of_another_shape,
        data_back,
        data_transposed,
        set_,
        set_into_a_larger_storage,
        resize,
        resize_storage,
        swap_data,
        drop_gradients,
        zero_gradients,
        strided_gradient,
        clear_state,
        new_state_dict,
        empty_inner_state,
        delete_state,
        replace_inner_state,
        replace_tensors_of_state,
        write_state,
        set_memory_of_state,
        reload_state,
        numbers_for_steps,
        learning_rate,
        learning_rate_tensor,
        weight_decay,
        maximize,
        new_group,
        append_to_group,
        remove_from_group,
        reverse_group,
        move_a_boundary,
        new_list_of_params,
        replace_parameter,
        new_list_of_groups,
        freeze,
        unfreeze,
    )
}

ONCE = ("remove_from_group",)
"""Edits that make no sense a second time."""
