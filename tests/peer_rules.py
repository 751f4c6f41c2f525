# SPDX-License-Identifier: Apache-2.0
"""pytorch-optimizer as the truth of the elementwise rules that torch has not.

Where it leaves the papers, it is led back: `maximize` turns the gradient before the step (its Adan
takes the first difference from the unturned one); ADOPT's first step only begins the second moment,
so nothing decays, and its clip counts from the second step, as in the authors' code. Adan's
previous gradient, which it keeps negated, is shown with its own sign.
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
