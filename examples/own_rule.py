# SPDX-License-Identifier: Apache-2.0
"""An update rule of one's own: Signum, momentum whose sign alone is followed.

Bernstein et al. 2018, "signSGD: Compressed Optimisation for Non-Convex Problems", arXiv:1802.04434:

    m <- b m + (1 - b) g        p <- p - lr (sign(m) + wd p)

    python examples/own_rule.py

docs/own_rules.md says what may stand in a rule, and how this one is compiled.
"""

from __future__ import annotations

import pyupdate
from pyupdate.language import sign


@pyupdate.rule(state={"exp_avg": 0.0}, defaults={"beta": 0.9, "weight_decay": 0.0})
def signum(param, grad, exp_avg, lr, beta, weight_decay):
    """Signum with decoupled weight decay."""
    exp_avg = exp_avg * beta + grad * (1.0 - beta)
    param = param - lr * (sign(exp_avg) + weight_decay * param)
    return param, exp_avg


def main() -> None:
    import torch

    torch.manual_seed(0)
    x = torch.randn(512, 4)
    y = (x @ torch.tensor([1.0, -2.0, 3.0, 0.5]))[:, None]

    model = pyupdate.build(torch.nn.Linear(4, 1), signum, lr=0.05, beta=0.8, max_norm=10.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(model.current_optimizer, 200)
    for _ in range(200):
        pyupdate.update_model(model, (model(x) - y) ** 2)
        schedule.step()
    print(f"loss {((model(x) - y) ** 2).mean().item():.6f}")
    print("weights", *(f"{weight:.2f}" for weight in model.weight.flatten().tolist()))


if __name__ == "__main__":
    main()
