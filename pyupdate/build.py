# SPDX-License-Identifier: Apache-2.0
"""``build``: attach an optimizer and a name to a model, so that ``update_model`` finds them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from . import frameworks
from .options import options_from, shows_options

if TYPE_CHECKING:
    import keras
    import torch

    from .kernels.language import Rule

Model = TypeVar("Model", bound="torch.nn.Module | keras.Model")


@shows_options
def build(
    model: Model | Callable[[], Model],
    optimizer: str
    | Rule
    | Callable[..., torch.optim.Optimizer | keras.Optimizer]
    | torch.optim.Optimizer
    | keras.Optimizer,
    *,
    model_name: str | None = None,
    in_backward: bool = False,
    **arguments: Any,
) -> Model:
    """Attach an optimizer and a name to a model.

    Sets ``model.current_optimizer`` and ``model.model_name`` (and ``model.update_in_backward``
    where that is asked for); nothing else of the model changes, and its ``state_dict`` stays as it
    was.

    Args:
        model: a ``torch.nn.Module`` or a Keras model, or a callable taking no argument that makes
            one.
        optimizer: the name of a class of `pyupdate.optim` in any case, such as "adamw"; or a rule
            of your own (`pyupdate.rule`); or a callable that gets the list of the model's
            parameters and returns an optimizer; or an optimizer that holds at least one of them.
            For a Keras model: Keras's name of an optimizer, a Keras optimizer, or a callable taking
            no argument that returns one.
        model_name: how errors and deferred updates name the model. None keeps the name that the
            model has, else makes one from its type, numbered after its first use.
        in_backward: True steps each bucket of parameters as soon as its gradients are there, while
            `update_model` still differentiates the rest, and frees them: a small part of the
            gradients exists at a time, and the weights get the same bits. ``update_model`` must
            then be given ``retain_graph=False``; it takes neither a scaler nor ``defer=True``. Step
            hooks run before and after the backward pass. A backward pass that raises in the middle
            leaves stepped what was stepped.
        **arguments: `pyupdate.options.Options` by name, such as ``max_norm`` (of a Keras model:
            ``max_norm``, ``clip_value``, ``skip_nonfinite``, ``ema_decay`` and
            ``accumulation_steps``). With any of them, an
            optimizer of torch's is accelerated (`pyupdate.accelerate`), and one of ours has these
            from then on, instead of those that it had. Where `optimizer` is a name
            or a rule, also what its class takes besides the parameters, such as ``lr``.

    Returns:
        The model.

    Raises:
        ValueError: `model` is, or makes, neither of the two, or a module without parameters; the
            name of the optimizer is unknown; what `optimizer` is or returns is no optimizer, or
            holds none of the model's parameters; `model_name` is empty or no string; the value of
            an option cannot be had; `in_backward` with what needs all gradients at once
            (``max_norm``), with tied weights or with a module that reduces gradients over
            processes.
        TypeError: an option is unknown, of the wrong type, or given (`in_backward` too) with an
            optimizer that cannot be accelerated; the optimizer's step needs a closure (LBFGS).

    Example:
        >>> import torch, pyupdate
        >>> model = pyupdate.build(torch.nn.Linear(4, 1), "adamw", model_name="line")
        >>> type(model.current_optimizer).__name__, model.model_name
        ('AdamW', 'line')
        >>> model = pyupdate.build(torch.nn.Linear(4, 1), "sgd", lr=0.1, momentum=0.9)
        >>> model = pyupdate.build(
        ...     lambda: torch.nn.Linear(4, 1), lambda p: torch.optim.SGD(p, lr=0.1), max_norm=1.0
        ... )
        >>> model = pyupdate.build(torch.nn.Linear(4, 1), "adamw", in_backward=True)
        >>> pyupdate.update_model(model, model(torch.ones(8, 4)), retain_graph=False)
    """
    if model_name is not None and (not isinstance(model_name, str) or not model_name):
        message = f"model_name must be a string of at least one character, but is {model_name!r}"
        raise ValueError(message)
    from .kernels.language import Rule

    if not isinstance(optimizer, str | Rule):
        options_from(arguments, "build")
    made: Any = model
    foreign = frameworks.is_torch_module(made) or frameworks.is_tensorflow(made)
    if not foreign and callable(made):
        made = made()
        frameworks.check_model(made, "what the callable given as model made")
    else:
        frameworks.check_model(made)
    attach: Any
    if frameworks.is_keras_model(made):
        from .tensorflow import attach
    else:
        from .pytorch import attach
    result: Model = attach.attach(made, optimizer, model_name, arguments, in_backward)
    return result
