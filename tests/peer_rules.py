# SPDX-License-Identifier: Apache-2.0
"""pytorch-optimizer as the truth of the rules that torch has not.

Where it leaves the papers, it is led back: `maximize` turns the gradient before the step (its Adan
takes the first difference from the unturned one); ADOPT's first step only begins the second moment,
so nothing decays, and its clip counts from the second step, as in the authors' code. Adan's
previous gradient, which it keeps negated, is shown with its own sign.

Of the rules with norms, and ScheduleFree, arguments alone make it ours (`peer_of_class`):
  - LARS: it scales and decays matrices only; a vector steps as ours with ``adapt=False``.
  - LAMB: its moments are not corrected (without `adam_debias` it divides the step by the first
    one's correction alone), a weight counts with a norm of at most 10, and eps joins the norm of
    the direction, too. So with ``bias_correction=False, max_weight_norm=10, eps=0``, or
    ``adapt=False``; no arguments give LAMB with both corrections, which is held by hand and by
    formula (test_layerwise.py).
  - NovoGrad, StableAdamW: their defaults.
  - ScheduleFreeAdamW: 1e-15 joins the second moment under its root, which a gradient far from zero
    does not feel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pyupdate.kernels.scalar import integer_power


def peer(name: str, params: Sequence[torch.Tensor], options: dict[str, Any]) -> Any:
    """The peer's optimizer for a rule, made from our options."""
    import pytorch_optimizer

    given = dict(options)
    sign = -1.0 if given.pop("maximize", False) else 1.0
    if "warmup" in given:
        given["t_alpha_beta3"] = given.pop("warmup")
    kinds = {"lion": "Lion", "ademamix": "AdEMAMix", "adopt": "ADOPT", "adan": "Adan"}
    if name == "adopt":
        given["clip_lambda"] = lambda step: (step - 1.0) ** 0.25
    kind: Any = getattr(pytorch_optimizer, kinds[name])
    decouple = name != "adan"  # its proximal decay is the other one
    optimizer = kind(params, **given, weight_decouple=decouple, foreach=False)
    # As test_oracle.Beta: the last bit of a power decides about 1 - beta ** t.
    optimizer.debias = lambda beta, step: 1.0 - integer_power(float(beta), float(step))
    decay = given.get("weight_decay", 0.0)

    def before(*_: Any) -> None:
        for group in optimizer.param_groups:
            first = group.get("step", 0) == 0
            group["weight_decay"] = 0.0 if name == "adopt" and first else decay
            for param in group["params"]:
                param.grad = param.grad * sign
        negate()

    def negate(*_: Any) -> None:
        for state in optimizer.state.values():
            if "previous_grad" in state:
                state["previous_grad"].neg_()

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(negate)
    return optimizer


def peer_of_class(name: str, params: Sequence[torch.Tensor], options: dict[str, Any]) -> Any:
    """The peer's optimizer for one of our classes, made from our options.

    Raises:
        ValueError: none of its arguments give what ours does with these.
    """
    import pytorch_optimizer

    given = dict(options)
    if name == "LAMB":
        adapts = given.pop("adapt", True)
        if given.pop("bias_correction", True) or (adapts and given["eps"] != 0.0):
            message = "pytorch-optimizer's Lamb corrects no second moment and has eps in its ratio"
            raise ValueError(message)
        if given.pop("max_weight_norm", 10.0) != 10.0:
            message = "pytorch-optimizer's Lamb counts norms up to 10"
            raise ValueError(message)
        given |= {"weight_decouple": False, "adam_debias": True, "adam": not adapts}
    kind: Any = getattr(pytorch_optimizer, "Lamb" if name == "LAMB" else name)
    return kind(params, **given, foreach=False)


STATE_OF_PEERS = {"second_moment": "grads_ema", "exp_avg": "moments"}
"""By our key what NovoGrad's state is called there."""
