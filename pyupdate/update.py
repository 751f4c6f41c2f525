# SPDX-License-Identifier: Apache-2.0
"""The one call: ``update_model`` turns a loss into updated weights, whatever the framework.

Thin: it looks at what it was given, refuses what no framework takes, and hands over. Neither torch
nor tensorflow is imported before an object of theirs was seen.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from . import frameworks
from .eagerly import eagerly

if TYPE_CHECKING:
    import keras
    import tensorflow as tf
    import torch

    from .options import LastUpdate

Deferred = MutableMapping[str, list[Callable[[], None]]]


@eagerly
def update_model(
    model: torch.nn.Module | keras.Model,
    loss: torch.Tensor | tf.Tensor,
    tape: tf.GradientTape | None = None,
    retain_graph: bool = True,
    scaler: torch.amp.GradScaler | None = None,
    defer: bool = False,
    deferred: Deferred | None = None,
) -> None:
    """Differentiate a loss and apply the whole update to a model.

    The gradients of ``loss.mean()`` are taken for the model's trainable parameters and for nothing
    else, added to what is in their ``.grad``, unscaled, checked, clipped and stepped by
    ``model.current_optimizer`` (see `pyupdate.build`), and dropped. A failure leaves parameters,
    gradients, optimizer state and `deferred` as they were. (One exception is asked for by name:
    ``build(..., in_backward=True)``.)

    A Keras model is stepped by its optimizer as it is, compiled (docs/tensorflow.md): eagerly or in
    a ``tf.function``. What is said here of ``.grad`` and of `scaler` is PyTorch's.

    Args:
        model: a ``torch.nn.Module`` with an optimizer attached as ``model.current_optimizer``.
            Parameters that the optimizer does not hold are differentiated, not stepped. Or a Keras
            model (Keras 3 on TensorFlow, or tf-keras) with an optimizer attached or compiled in.
        loss: a floating tensor of any shape; its mean over all elements is differentiated.
        tape: for a Keras model the ``tf.GradientTape`` that recorded the loss, inside or after its
            ``with`` block. None for a torch model.
        retain_graph: True keeps the graph for another call. Give False at the last use of a graph:
            its memory is freed earlier. Graphs that torch.compile's backward passes share memory
            with cannot be kept: a RuntimeError says what to do.
        scaler: a ``torch.amp.GradScaler``; the step is skipped if a gradient is not finite. What is
            in ``.grad`` already must carry its current scale. Call ``scaler.update()`` yourself,
            once per iteration, after all models' updates. A disabled scaler acts as None.
        defer: True adds the gradients to ``.grad`` and leaves the step to a callable in `deferred`.
            Give it where another loss, not yet differentiated, needs this model's old weights.
        deferred: maps a model's name (``model.model_name``, else a name unique to it) to callables
            taking no argument; calling each, in the dict's order, applies what was deferred.
            Deferred calls on one model leave one callable and make one step on the summed gradient;
            a call without `defer` applies what is pending too and removes the model's callable. For
            Keras models they pile up, one a call, each a step on its own gradients.

    Raises:
        ValueError: `loss` is no tensor; `model` neither a ``torch.nn.Module`` nor a Keras model, or
            not of the loss's framework; `tape` is missing, or `scaler` given, for a Keras model; no
            optimizer is attached;
            no trainable parameter, or none that the loss reaches or the optimizer holds; `defer`
            without `deferred`; pending gradients that carry the scale of another scaler;
            `retain_graph`, `scaler` or `defer` with a model that was built with ``in_backward``.
        RuntimeError: weights that this loss needs were updated before it was differentiated (defer
            the earlier update); a gradient that ``accumulation_steps`` has counted was dropped or
            replaced (``model.zero_grad()`` drops the rest). Torch's own: a graph used twice, an
            optimizer stepped or unscaled since the last ``scaler.update()``.
        TypeError: a parameter or gradient that cannot be stepped, named.

    Example:
        >>> import torch, pyupdate
        >>> model = pyupdate.build(torch.nn.Linear(4, 1), "sgd")
        >>> with torch.no_grad():
        ...     _ = model.weight.zero_()
        >>> loss = (model(torch.ones(8, 4)) - 1.0) ** 2
        >>> pyupdate.update_model(model, loss)
        >>> bool((model.weight != 0).all()), model.weight.grad
        (True, None)
    """
    if not frameworks.is_torch_tensor(loss) and not frameworks.is_tensorflow_tensor(loss):
        message = f"loss must be a torch.Tensor or a tf.Tensor, but is {frameworks.type_name(loss)}"
        raise ValueError(message)
    frameworks.check_model(model)
    if frameworks.is_keras_model(model):
        if not frameworks.is_tensorflow_tensor(loss):
            kind = frameworks.type_name(loss)
            message = f"loss is a {kind}, but the model is Keras's: give a tf.Tensor"
            raise ValueError(message)
        from .tensorflow import update as keras_update

        keras_update.update(model, loss, tape, scaler, defer, deferred)
        return
    if not frameworks.is_torch_tensor(loss):
        kind = frameworks.type_name(loss)
        message = f"loss is a {kind}, but the model is torch's: give a torch.Tensor"
        raise ValueError(message)
    if tape is not None:
        message = (
            f"tape is a {frameworks.type_name(tape)}: tapes are TensorFlow's; leave tape=None for "
            "a torch model"
        )
        raise ValueError(message)
    from .pytorch import update

    update.update(model, loss, retain_graph, scaler, defer, deferred)


def averaged_weights(
    model_or_optimizer: torch.nn.Module | torch.optim.Optimizer | keras.Model,
) -> AbstractContextManager[None]:
    """Put the averages that ``ema_decay`` keeps into the parameters, inside a ``with`` block.

    The values are exchanged in place, rounded to the parameter's dtype, and afterwards, or after an
    exception, the parameters have their own bits again, whatever was written into them inside. A
    parameter that has not been stepped yet keeps its value. Buffers (running statistics of
    normalisation) are not averaged. No step can be made inside. Costs a copy of the parameters.

    Args:
        model_or_optimizer: a model with an optimizer attached (`pyupdate.build`), whose parameters
            are exchanged; or an optimizer, for all of its parameters.

    Returns:
        The context manager.

    Raises:
        ValueError: on entry: neither of the two, or no averages are kept.
        RuntimeError: on entry: inside another such block for the same optimizer.

    Example:
        >>> import torch, pyupdate
        >>> model = pyupdate.build(torch.nn.Linear(4, 1), "adamw", ema_decay=0.99)
        >>> pyupdate.update_model(model, model(torch.ones(8, 4)))
        >>> with pyupdate.averaged_weights(model):
        ...     answer = model(torch.ones(1, 4))
    """
    averages: Any
    if frameworks.is_keras_model(model_or_optimizer):
        from .tensorflow import averages
    else:
        from .pytorch import averages
    swapped_in: AbstractContextManager[None] = averages.swapped_in(model_or_optimizer)
    return swapped_in


@eagerly
def finish_window(
    model_or_optimizer: torch.nn.Module | torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None = None,
) -> bool:
    """Make the step of a window of ``accumulation_steps`` that is not full, and drop its gradients.

    For the end of an epoch whose batches are no multiple of the window: the step is on the mean of
    the micro-batches that are there, few or many. What was deferred into the window is among them.

    Args:
        model_or_optimizer: a torch model that `update_model` updates; or, in a loop of your own,
            the optimizer whose ``step()`` counts.
        scaler: the ``torch.amp.GradScaler`` that the micro-batches were scaled with; it is told of
            the step. Call its ``update()`` afterwards, as always.

    Returns:
        Whether a window was open, so that a step was made; an inf or nan skips it as it does any.
        Of a model, none is open whose gradients ``model.zero_grad()`` has dropped.

    Raises:
        ValueError: neither a torch model with an optimizer attached nor a torch optimizer; `scaler`
            is no ``GradScaler``; the micro-batches were scaled otherwise, or not at all (the window
            is given up then: drop its gradients with ``zero_grad()``); groups of the optimizer have
            windows of other lengths.
        RuntimeError: a gradient that was counted is gone, or another tensor; the scaler's own.
        TypeError: a parameter or gradient that cannot be stepped, named.

    Example:
        >>> import torch, pyupdate
        >>> model = pyupdate.build(torch.nn.Linear(4, 1), "adamw", accumulation_steps=4)
        >>> for _ in range(6):
        ...     pyupdate.update_model(model, model(torch.ones(8, 4)))
        >>> pyupdate.finish_window(model), pyupdate.finish_window(model)
        (True, False)
    """
    of: Any = model_or_optimizer
    is_model = frameworks.is_torch_module(of)
    if not is_model and not frameworks.is_torch_optimizer(of):
        message = (
            "finish_window takes a torch model with an optimizer attached (pyupdate.build) or a "
            f"torch optimizer, but got {frameworks.type_name(of)}"
        )
        raise ValueError(message)
    from .pytorch import finishing, update

    enabled = update.enabled(scaler)
    return finishing.of_model(of, enabled) if is_model else finishing.of_optimizer(of, enabled)


@eagerly
def last_update(
    model_or_optimizer: torch.nn.Module | torch.optim.Optimizer | keras.Model | keras.Optimizer,
) -> LastUpdate | None:
    """What the last update did: gradient norm, whether it was skipped, the multiplier.

    Its values are read from the device when they are asked for, not when the update is made.

    Args:
        model_or_optimizer: a model that was updated (its ``current_optimizer`` is looked at), or an
            optimizer.

    Returns:
        A `pyupdate.options.LastUpdate`, or None where nothing was applied yet.

    Raises:
        ValueError: neither a model with an optimizer attached nor an optimizer.

    Example:
        >>> import torch, pyupdate
        >>> model = pyupdate.build(torch.nn.Linear(4, 1), "adamw", max_norm=1.0)
        >>> pyupdate.last_update(model) is None
        True
        >>> pyupdate.update_model(model, model(torch.ones(8, 4)))
        >>> pyupdate.last_update(model).skipped
        False
    """
    optimizer: Any = model_or_optimizer
    if frameworks.is_tensorflow(optimizer):
        from .tensorflow import update as keras_update

        return keras_update.last_update(optimizer)
    if frameworks.is_torch_module(optimizer):
        optimizer = getattr(optimizer, "current_optimizer", None)
    if not hasattr(optimizer, "param_groups"):
        message = (
            "last_update takes a model with an optimizer attached (pyupdate.build) or a torch "
            f"optimizer, but got {frameworks.type_name(model_or_optimizer)}"
        )
        raise ValueError(message)
    from .pytorch import apply

    return apply.last_update(optimizer)
