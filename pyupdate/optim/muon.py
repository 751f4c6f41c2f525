# SPDX-License-Identifier: Apache-2.0
"""Muon: the orthogonalised momentum of a matrix, by Newton and Schulz.

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; the learning rate of
"match_rms_adamw" from Liu et al. 2025, "Muon is Scalable for LLM Training", arXiv:2502.16982. With
X the direction in bfloat16, divided by its norm, and (a, b, c) the coefficients, ns_steps times:

    A = X X^T        X <- a X + (b A + c A A) X

A composite. The momentum is a planned pass like any other rule's (unscaled, checked, clipped and
skipped as everywhere); then matrices of one shape are stacked and orthogonalised by torch's batched
products, in torch.optim.Muon's type and order, and moved. Matrix products are outside of the
numeric contract: the result is torch's within the accuracy of bfloat16, not to the bit.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backends.reference import stored_as
from ..kernels import rounding, rules
from ..kernels.bind import bind
from ..kernels.composite import muon_direction, muon_move
from ..kernels.language import Rule
from ..options import LastUpdate
from ..pytorch import engines
from ..pytorch.rows import Group, Row, number_of, require_numbers, require_read
from ..pytorch.state import HALVES
from .planned import Planned, planned

# Elements of a stack: 64 MiB of bfloat16, and four times that for what it is made of.
_STACK = 2**25


def _muon(group: Group) -> Rule:
    """The momentum's rule, of matrices."""
    for param in group["params"]:
        _check_shape(param, group.get("flatten_trailing", False))
    return rules.muon


def _check_shape(param: Tensor, flatten_trailing: bool) -> None:
    if param.ndim == 2 or (flatten_trailing and param.ndim > 2):
        return
    if flatten_trailing:
        message = (
            "Muon with flatten_trailing=True supports parameters of two and more dimensions "
            f"whereas we found a parameter with size: {param.size()}"
        )
    else:
        message = (
            f"Muon only supports 2D parameters whereas we found a parameter with size: "
            f"{param.size()}"
        )
    raise ValueError(message)


def _check(optimizer: Any, _: Sequence[Row]) -> None:
    """Refuse a group without what only the end of a step reads, before anything is done."""
    for index, group in enumerate(optimizer.param_groups):
        require_numbers(group, index, ("lr", "weight_decay", "eps"))
        _check_iteration(group, index)


_LEARNING_RATES = (None, "original", "match_rms_adamw")

_READ_LAST: dict[str, tuple[Callable[[Any], object], str]] = {
    "ns_steps": (operator.index, "a whole number"),
    "ns_coefficients": (lambda found: [*map(number_of, found)], "three numbers"),
    "nesterov": (bool, "True or False"),
    "adjust_lr_fn": (_LEARNING_RATES.index, "None, 'original' or 'match_rms_adamw'"),
}
"""What the end of a step reads beside numbers: how, and what it must be."""


def _check_iteration(group: Group, index: int) -> None:
    """Refuse what else the end of a step cannot read; in torch's words what torch refuses there."""
    require_read(group, index, _READ_LAST)
    if group["ns_steps"] >= 100:
        message = "Number of steps must be less than 100 for computational efficiency"
        raise ValueError(message)
    if len(group["ns_coefficients"]) != 3:
        message = "Coefficients must be a tuple of exactly 3 values"
        raise ValueError(message)


@torch.no_grad()
def _finish(optimizer: Any, rows: Sequence[Row], last: LastUpdate) -> None:
    """Orthogonalise and move what has a gradient, stack by stack."""
    options = engines.options_of(optimizer)
    stacks: dict[Any, list[Row]] = {}
    for row in rows:
        param = row.param
        if param.grad is None or param.numel() == 0:
            continue
        key = (row.group, param.shape, param.dtype, param.device)
        stacks.setdefault(key, []).append(row)
    for (index, shape, *_), of_shape in stacks.items():
        group = optimizer.param_groups[index]
        most = max(1, _STACK // math.prod(shape))
        for start in range(0, len(of_shape), most):
            some = of_shape[start : start + most]
            params = [row.param for row in some]
            directions = _directions(
                params, optimizer.state, group, last.multiplier, options.clip_value
            )
            updates = _orthogonalised(directions.flatten(2), group)
            keys: list[int | None] = [None] * len(some)
            if options.stochastic_rounding and params[0].dtype in HALVES:
                keys = [_key(optimizer, row, options.seed) for row in some]
            _move(params, updates, group, keys)


def _key(optimizer: Any, row: Row, seed: int) -> int:
    """What a parameter's move is rounded by in this step, which is counted.

    Like the counts of rules whose steps torch does not count: from 1 where the buffer is another.
    """
    known = engines.engine_of(optimizer)
    if known.known is None:
        known.known = {}
    buffer = optimizer.state[row.param]["momentum_buffer"]
    before, count = known.known.get(id(row.param), (None, 0))
    count = count + 1 if before is buffer else 1
    known.known[id(row.param)] = (buffer, count)
    # Stage 0 is the momentum's pass; the parameter is the role 0, as everywhere.
    return rounding.key_of(seed, count, row.group << 32 | row.position, 1, 0)


def _directions(
    params: Sequence[Tensor], state: Any, group: Group, multiplier: float, clip_value: float | None
) -> Tensor:
    """What is orthogonalised, in the compute type."""
    momentum = _loaded([state[param]["momentum_buffer"] for param in params], params[0])
    if not group["nesterov"]:
        return momentum
    grad = _loaded([param.grad for param in params if param.grad is not None], params[0])
    grad = grad * _number(multiplier, grad)
    bound = math.inf if clip_value is None else float(clip_value)
    grad = bind(rules.clipped, "torch")(grad, _number(bound, grad))
    made: Tensor = bind(muon_direction, "torch")(grad, momentum, _number(group["momentum"], grad))
    return made


def _orthogonalised(directions: Tensor, group: Group) -> Tensor:
    """A stack of matrices after the iteration, in bfloat16 as torch has it."""
    a, b, c = map(float, group["ns_coefficients"])
    x = directions.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
    x = x / norm.clamp(min=float(group["eps"]))
    for _ in range(group["ns_steps"]):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _move(
    params: Sequence[Tensor], updates: Tensor, group: Group, keys: Sequence[int | None]
) -> None:
    lr = float(group["lr"])
    rows, columns = updates.shape[1:]
    ratio = math.sqrt(max(1.0, rows / columns))
    if group["adjust_lr_fn"] == "match_rms_adamw":
        ratio = 0.2 * math.sqrt(max(rows, columns))
    move = bind(muon_move, "torch")
    for param, update, key in zip(params, updates, keys, strict=True):
        like = _loaded([param], param)[0]
        decay = _number(1.0 - lr * float(group["weight_decay"]), like)
        step_size = _number(lr * ratio, like)
        moved = move(like, update.to(like.dtype).reshape(param.shape), decay, step_size)
        param.copy_(moved if key is None else stored_as(moved, param.dtype, param, key))


def _loaded(tensors: Sequence[Tensor], like: Tensor) -> Tensor:
    """Tensors of one shape, stacked in the compute type."""
    stacked = torch.stack([tensor.detach() for tensor in tensors])
    return stacked.to(torch.float64 if like.dtype is torch.float64 else torch.float32)


def _number(value: float, like: Tensor) -> Tensor:
    return torch.tensor(float(value), dtype=torch.float64, device="cpu").to(like)


@planned(_muon, counts_steps=False, finish=_finish, check=_check)
class Muon(Planned, torch.optim.Muon):
    """``torch.optim.Muon``; every parameter is a matrix.

    Besides the pass of the momentum, a step reads each momentum, each parameter and, with Nesterov,
    each gradient once, writes each parameter once and makes 17 copies in between (8 without
    Nesterov), whatever the number of tensors; and ``3 * ns_steps`` batches of products for all
    matrices of a shape (of at most 2^25 elements together). Torch 2.13 spoils the momentum of
    bfloat16 parameters without Nesterov, which it divides by its norm in place; here it stays a
    moving average.

    An average (``ema_decay``) is moved behind that, a parameter at a time. A failure for want of
    memory may leave the momentum of a step in place whose move was not made.

    Args:
        *args, **kwargs: those of ``torch.optim.Muon``, and `Options` by name.
        flatten_trailing: True takes parameters of more dimensions too, such as a convolution's, as
            matrices of (out, all the rest); False refuses them as torch does.

    Example:
        >>> import torch, pyupdate
        >>> p = torch.nn.Parameter(torch.zeros(2, 2))
        >>> optimizer = pyupdate.optim.Muon([p], lr=0.1)
        >>> p.grad = torch.eye(2) * 100.0
        >>> optimizer.step()
        >>> [[round(abs(x), 1) for x in row] for row in p.tolist()]  # the size of grad is no matter
        [[0.1, 0.0], [0.0, 0.1]]
    """

    def __init__(
        self, params: Any, *args: Any, flatten_trailing: bool = False, **kwargs: Any
    ) -> None:
        if not flatten_trailing or isinstance(params, Tensor):  # a tensor alone torch refuses
            super().__init__(params, *args, **kwargs)
            return
        # Torch's constructor looks at the shapes; ours, in add_param_group, at what we take.
        super().__init__([nn.Parameter(torch.zeros(1, 1, device="cpu"))], *args, **kwargs)
        self.param_groups.clear()
        self.defaults["flatten_trailing"] = True
        groups = list(params)
        if not groups:
            message = "optimizer got an empty parameter list"
            raise ValueError(message)
        for group in groups if isinstance(groups[0], dict) else [{"params": groups}]:
            self.add_param_group(group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with numbers of their own; see ``torch.optim.Optimizer``.

        Raises:
            ValueError: a parameter is no matrix.
        """
        super().add_param_group(param_group)
        added = self.param_groups[-1]
        try:
            for param in added["params"]:
                _check_shape(param, added.get("flatten_trailing", False))
        except ValueError:
            self.param_groups.pop()
            raise


class MuonSplit(NamedTuple):
    """What `split_for_muon` returns: parameters by who should step them."""

    muon: list[nn.Parameter]
    adamw: list[nn.Parameter]


def split_for_muon(
    model: nn.Module, *, adamw: Collection[str] | None = None, flatten_trailing: bool = False
) -> MuonSplit:
    """Part a model's trainable parameters between Muon and AdamW.

    Muon is for the matrices of hidden layers. AdamW gets the rest: what is no matrix (biases,
    norms), embeddings and what is tied to one, and the output layer.

    Args:
        model: whose parameters.
        adamw: names of parameters, or of modules, whose matrices AdamW gets too, such as
            ``["lm_head"]``. None: those of the module that holds a matrix and was added last, which
            in most models is the output layer; [] for no other than the embeddings.
        flatten_trailing: whether Muon gets parameters of more than two dimensions, too; give
            `Muon` the same.

    Returns:
        Two lists, ``muon`` and ``adamw``, in the order of ``model.parameters()``.

    Raises:
        ValueError: a name in `adamw` is none of the model's.

    Example:
        >>> import torch, pyupdate
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Embedding(10, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 10)
        ... )
        >>> muon, adamw = pyupdate.optim.split_for_muon(model)
        >>> [tuple(p.shape) for p in muon], [tuple(p.shape) for p in adamw]
        ([(4, 4)], [(10, 4), (4,), (10, 4), (10,)])
        >>> optimizers = [pyupdate.optim.Muon(muon), pyupdate.optim.AdamW(adamw)]
    """
    named = dict(model.named_parameters())
    modules = dict(model.named_modules())
    if adamw is None:
        holders = [name for name, module in modules.items() if _holds_matrix(module)]
        adamw = holders[-1:]
    for name in adamw:
        if name not in named and name not in modules:
            message = f"adamw: the model has no parameter and no module named {name!r}"
            raise ValueError(message)
    kept = {id(named[name]) for name in adamw if name in named}
    for name, module in modules.items():
        if name in adamw or isinstance(module, nn.Embedding | nn.EmbeddingBag):
            kept |= {id(param) for param in module.parameters()}
    split = MuonSplit([], [])
    for param in model.parameters():
        if param.requires_grad:
            fits = param.ndim == 2 or (flatten_trailing and param.ndim > 2)
            (split.muon if fits and id(param) not in kept else split.adamw).append(param)
    return split


def _holds_matrix(module: nn.Module) -> bool:
    return any(param.ndim >= 2 for param in module.parameters(recurse=False))
