# SPDX-License-Identifier: Apache-2.0
"""``from_rule``: an optimizer class of a rule, the user's own or a shipped one."""

from __future__ import annotations

import copyreg
import inspect
import math
import numbers
from typing import Any, ClassVar

import torch

from ..kernels.language import Rule
from ..kernels.own import RESERVED, OwnRule
from ..options import PARAMETERS
from ..pytorch import engines
from ..pytorch.rows import OptimizerRow
from .planned import Planned

_OPTIONS = tuple(parameter.name for parameter in PARAMETERS)


class _MadeOfRules(type):
    """The type of the classes that `from_rule` makes, so that a pickle can make them again."""


class RuleOptimizer(Planned, metaclass=_MadeOfRules):
    """What the classes share that `from_rule` makes; `rule` is what one was made of."""

    rule: ClassVar[Rule]

    def __init__(self, params: Any, *, maximize: bool = False, **arguments: Any) -> None:
        rule = self.rule
        known = {*rule.numbers, *_OPTIONS}
        if unknown := [name for name in arguments if name not in known]:
            numbers = ", ".join(rule.numbers) or "none"
            message = (
                f"from_rule({rule.name}) takes no {', '.join(map(repr, unknown))}; its numbers "
                f"are: {numbers}; its options: maximize, {', '.join(_OPTIONS)}"
            )
            raise TypeError(message)
        numbers_given = {name: arguments.pop(name) for name in rule.numbers if name in arguments}
        defaults = {**_defaults(rule), **numbers_given, "maximize": maximize}
        super().__init__(params, defaults, **arguments)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with numbers of their own; see ``torch.optim.Optimizer``.

        Raises:
            TypeError: a number is missing, or is none.
            ValueError: a number is nan.
        """
        if isinstance(param_group, dict):
            for name in self.rule.numbers:
                given = param_group.get(name, self.defaults.get(name))
                self._check_number(name, given)
        super().add_param_group(param_group)

    def _check_number(self, name: str, value: object) -> None:
        what = f"from_rule({self.rule.name}): number '{name}'"
        if value is None:
            message = f"{what} has no default: give {name}=..., or defaults in pyupdate.rule"
            raise TypeError(message)
        if not isinstance(value, numbers.Real | torch.Tensor):
            message = f"{what} must be a number, but is {value!r}"
            raise TypeError(message)
        if isinstance(value, torch.Tensor) and value.numel() != 1:
            message = f"{what} must be one number, but is a tensor of {tuple(value.shape)}"
            raise TypeError(message)
        if math.isnan(float(value)):
            message = f"{what} is nan"
            raise ValueError(message)


_made: dict[int, type[RuleOptimizer]] = {}


def from_rule(rule: Rule) -> type[RuleOptimizer]:
    """An optimizer class of a rule: torch's interface, pyupdate's step.

    The class is made as ``from_rule(rule)(params, lr=..., maximize=False, **options)``: the rule's
    numbers by their names, and `pyupdate.options.Options` by name. Parameter groups may have
    numbers of their own, learning-rate schedulers work on the number ``lr``, and ``state_dict``,
    ``pickle`` and ``copy.deepcopy`` do what they do for torch's optimizers. The same rule gives the
    same class.

    Args:
        rule: what `pyupdate.rule` made of a function.

    Returns:
        A subclass of ``torch.optim.Optimizer``.

    Raises:
        TypeError: `rule` is none.
        ValueError: a number of it has the name of an option.

    Example:
        >>> import torch, pyupdate
        >>> @pyupdate.rule
        ... def descent(param, grad, lr):
        ...     param = param - lr * grad
        ...     return param
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = pyupdate.optim.from_rule(descent)([p], lr=0.5, max_norm=1.0)
        >>> p.grad = torch.tensor([0.5, 0.0])
        >>> optimizer.step()
        >>> p.tolist()
        [0.75, 1.0]
    """
    if not isinstance(rule, Rule):
        hint = ": decorate it with pyupdate.rule" if callable(rule) else ""
        message = f"from_rule takes a pyupdate.rule, but got a {type(rule).__name__}{hint}"
        raise TypeError(message)
    known = _made.get(id(rule))
    if known is not None:
        return known
    if taken := [name for name in rule.numbers if name in (*RESERVED, *_OPTIONS)]:
        message = (
            f"rule '{rule.name}': the numbers {taken} have names that every optimizer keeps for "
            "itself; choose others"
        )
        raise ValueError(message)
    body = {
        "__doc__": rule.stages[-1].function.text.__doc__,
        "__module__": __name__,
        "__qualname__": f"from_rule({rule.name})",
        "rule": rule,
    }
    made = _MadeOfRules(rule.name, (RuleOptimizer,), body)
    assert issubclass(made, RuleOptimizer)
    made.__signature__ = _signature(rule)  # type: ignore[attr-defined]
    engines.ROWS[made] = OptimizerRow(lambda _: rule, counts_steps=True)
    _made[id(rule)] = made  # it holds the rule, whose id stays taken
    return made


def _defaults(rule: Rule) -> dict[str, float]:
    return dict(rule.defaults) if isinstance(rule, OwnRule) else {}


def _signature(rule: Rule) -> inspect.Signature:
    defaults = _defaults(rule)
    named = inspect.Parameter.KEYWORD_ONLY
    empty = inspect.Parameter.empty
    return inspect.Signature(
        [
            inspect.Parameter("params", inspect.Parameter.POSITIONAL_OR_KEYWORD),
            *(inspect.Parameter(n, named, default=defaults.get(n, empty)) for n in rule.numbers),
            inspect.Parameter("maximize", named, default=False),
            *PARAMETERS,
        ]
    )


def _reduce(made: type) -> str | tuple[Any, ...]:
    """How a pickle makes the class again: from its rule, or by name where somebody wrote it."""
    if _made.get(id(made.__dict__.get("rule"))) is made:
        return from_rule, (made.__dict__["rule"],)
    return made.__qualname__


copyreg.pickle(_MadeOfRules, _reduce)
