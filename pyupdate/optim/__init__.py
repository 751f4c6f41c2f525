# SPDX-License-Identifier: Apache-2.0
"""Drop-in optimizers: torch's constructors, state keys and checkpoints; pyupdate's step.

    optimizer = pyupdate.optim.AdamW(model.parameters(), lr=1e-3, max_norm=1.0)

A class is torch's own class with another ``step`` and the keywords of `pyupdate.options.Options`.
The flags ``foreach`` and ``fused`` are checked as torch does and otherwise make no difference;
``differentiable=True`` runs torch's own step.
"""

from __future__ import annotations

from . import adafactor, layerwise, muon, others, schedulefree, stock
from .adafactor import Adafactor
from .adopt import accelerate
from .layerwise import LAMB, LARS, NovoGrad, StableAdamW
from .muon import Muon, split_for_muon
from .others import ADOPT, Adan, AdEMAMix, Lion
from .own import from_rule
from .planned import Planned
from .schedulefree import ScheduleFreeAdamW
from .stock import ASGD, SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, RAdam, RMSprop, Rprop

CLASSES: dict[str, type[Planned]] = {
    name: kind
    for home in (stock, adafactor, layerwise, muon, others, schedulefree)
    for name, kind in vars(home).items()
    if isinstance(kind, type) and issubclass(kind, Planned) and kind is not Planned
}
"""Every optimizer class by its name; `pyupdate.build` takes the names in any case."""

__all__ = [
    "ADOPT",
    "ASGD",
    "LAMB",
    "LARS",
    "SGD",
    "AdEMAMix",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Adan",
    "Lion",
    "Muon",
    "NAdam",
    "NovoGrad",
    "RAdam",
    "RMSprop",
    "Rprop",
    "ScheduleFreeAdamW",
    "StableAdamW",
    "accelerate",
    "from_rule",
    "split_for_muon",
]
