# SPDX-License-Identifier: Apache-2.0
"""What `make bench` measures: cells, each of which answers a question. Not a full cross.

Every optimizer crossed with every model, step, dtype and peer would be some 10,000 cells; these are
those that tell something that the others do not. A cell is measured in a process of its own, a
target in three.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from shapes import MODELS
from workloads import DEFAULTS, HELD, LAYERWISE, WORKLOADS

from pyupdate import optim
from pyupdate.bench.contestants import KINDS, Workload

THREADS = 2

SECTIONS = {
    "targets": "targets, and what `make bench-check` compares with",
    "kinds": "AdamW on every model: the step alone, and all that may be in it",
    "rules": "the step of every optimizer",
    "compiled": "those that compile a step first, for minutes",
    "dtypes": "AdamW on bfloat16 parameters, and on bfloat16 matrices with float32 vectors",
    "backends": "AdamW without the compiled module",
    "tensors": "growth with the number of tensors",
    "elements": "growth with the number of elements",
    "host": "what a step costs beside its memory: tensors of one element",
    "apart": "FastEstimator's own update, and Keras's",
    "costs": "import, first step and memory",
    "training": "a whole training step, and which share of it the update is",
}
"""In the order in which they are shown, with the question of each."""

MODEL = "ResNet-50"
"""Where one model has to do: convolutions, matrices and vectors."""
MUONS = "ViT-B/16 matrices"
SMALL = "1,000 tiny"
FEW = "GPT-2 124M"
"""40 tensors: the time of compiling a step grows with their number."""
WITH_PEERS = (MODEL, SMALL, MUONS)
SIDE_BY_SIDE = ("kinds", "rules", "dtypes")
"""Models and sections where the contestants that are not torch's take part: elsewhere a dozen
copies of a model fill the memory, and say what these say."""
HALVES = {MODEL: ("bfloat16", "mixed"), "GPT-2 124M": ("bfloat16",), SMALL: ("bfloat16",)}
EACH, ENDS = (MODEL, SMALL), ("step", "full")
"""Models of which every kind of a step is measured; elsewhere the two ends say it."""

PER_TENSOR = 64
COUNTS = (1, 3, 10, 30, 100, 300, 1000, 3000, 10_000, 20_000)
SIZES = (10**3, 10**4, 10**5, 10**6, 10**7, 10**8, 2 * 10**8)

DTYPES = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "mixed": (torch.bfloat16, torch.float32),
}
"""Of matrices, and of vectors where theirs is another."""

TRAINED = ("transformer", "multilayer perceptron")

APART = {"FastEstimator": ("step", "scaler"), "Keras": ("step", "clip")}
"""FastEstimator has no clip of the global norm. Keras's scaler clips before it unscales, so of the
kinds with a scaler only ours would be right."""
OF_APART = (MODEL, "300 tiny")
"""A thousand would be compiled by XLA for minutes."""


@dataclass(frozen=True)
class Cell:
    """What is measured in one process.

    Attributes:
        section: one of `SECTIONS`.
        of: a model of `shapes`, a number of tensors or elements, one of `TRAINED`, a workload with
            a target, or a peer of `APART`, a comma and what it steps.
        kind: one of `contestants.KINDS`.
        rule: the name of an optimizer's class.
        dtype: one of `DTYPES`.
        threads: of torch and of ours.
    """

    section: str
    of: str
    kind: str = "step"
    rule: str = "AdamW"
    dtype: str = "float32"
    threads: int = THREADS

    @property
    def key(self) -> str:
        """What it is called, and found by."""
        return "/".join(str(value) for value in asdict(self).values())

    def facts(self) -> dict[str, Any]:
        """Its fields, for a record."""
        return asdict(self)

    @property
    def pair(self) -> tuple[str, str]:
        """A target's workload and kind as `ratios.py` calls them."""
        return self.of, self.kind if self.rule == "AdamW" else self.rule

    def workload(self, scale: float = 1.0) -> Workload:
        """Its shapes, on a machine `scale` times as large as two cores and 24 GiB."""
        dtype, of_vectors = DTYPES[self.dtype]
        if self.section == "tensors":
            shapes: tuple[tuple[int, ...], ...] = ((PER_TENSOR,),) * int(self.of)
        elif self.section == "elements":
            shapes = ((int(self.of),),)
        elif self.section == "host":
            shapes = ((1,),) * int(self.of)
        else:
            shapes = MODELS[self.of].shapes(scale)
        return Workload(self.of, shapes, dtype=dtype, of_vectors=of_vectors)


def target(of: str, kind: str) -> Cell:
    """The cell of a pair, which `Cell.pair` gives back."""
    if kind in (*DEFAULTS, *LAYERWISE):
        return Cell("targets", of, rule=kind)
    return Cell("targets", of, kind)


def cells() -> Iterator[Cell]:
    """All of them, in the order in which they are shown."""
    for workload in WORKLOADS.values():
        yield from (target(workload.name, kind) for kind in workload.targets)
    yield from (target(of, kind) for of, kind in HELD if of not in WORKLOADS)
    for model in WHOLE:
        yield from (Cell("kinds", model, kind) for kind in KINDS if kind in ENDS or model in EACH)
    for rule in optim.CLASSES:
        yield Cell("rules", MUONS if rule == "Muon" else MODEL, rule=rule)
    yield Cell("compiled", FEW)
    for model, dtypes in HALVES.items():
        for dtype in dtypes:
            yield from (Cell("dtypes", model, kind, dtype=dtype) for kind in ENDS)
    for model in (MODEL, SMALL):
        yield Cell("backends", model, "full")
    for section, points in (("tensors", COUNTS), ("elements", SIZES)):
        for point in points:
            for threads in (THREADS, 1) if point < SIZES[-1] else (THREADS,):
                yield Cell(section, str(point), threads=threads)
    for kind in ("step", "full"):
        yield Cell("host", "1000", kind, threads=1)
    for peer, kinds in APART.items():
        yield from (Cell("apart", f"{peer}, {of}", kind) for of in OF_APART for kind in kinds)
    yield Cell("costs", MODEL, "full")
    for model in TRAINED:
        yield Cell("training", model, "clip")


WHOLE = tuple(model for model in MODELS if model not in ("Llama 1B", MUONS))

FIRST = (
    *(Cell("kinds", model, kind) for model in (MODEL, SMALL) for kind in ("step", "full")),
    *(target(w.name, kind) for w in WORKLOADS.values() for kind in KINDS if kind in w.targets),
    *(Cell("tensors", str(count)) for count in (1, 100, 10_000)),
    *(Cell("elements", str(size)) for size in (10**3, 10**5, 10**7)),
    *(Cell("dtypes", MODEL, "full", dtype=dtype) for dtype in ("bfloat16", "mixed")),
    Cell("backends", SMALL, "full"),
    *(Cell("training", model, "clip") for model in TRAINED),
    *(Cell("apart", f"{peer}, {MODEL}") for peer in APART),
    Cell("tensors", "1000", threads=1),
    Cell("elements", str(10**6), threads=1),
    Cell("host", "1000", threads=1),
    *(Cell("kinds", model, kind) for model in WHOLE for kind in ("step", "full")),
    Cell("kinds", MODEL, "average"),
    Cell("costs", MODEL, "full"),
    *(Cell("rules", MUONS if rule == "Muon" else MODEL, rule=rule) for rule in optim.CLASSES),
    *(target(of, kind) for of, kind in HELD),
    *(target(w.name, kind) for w in WORKLOADS.values() for kind in w.targets),
    Cell("compiled", FEW),
)
"""What is measured first, lest the time run out: every axis once, then the tables that are read."""


def by_worth(among: Iterable[Cell]) -> list[Cell]:
    """In the order in which they are measured: `FIRST`, and the rest as it is shown."""
    place = {cell: i for i, cell in reversed(list(enumerate(FIRST)))}
    return sorted(among, key=lambda cell: place.get(cell, len(FIRST)))


QUICK = (
    target("1,000 x 256", "step"),
    *(Cell("kinds", model, kind) for model in (MODEL, SMALL) for kind in ("step", "full")),
    Cell("rules", MODEL, rule="NAdam"),
    Cell("dtypes", SMALL, "full", dtype="bfloat16"),
    Cell("dtypes", MODEL, "full", dtype="mixed"),
    Cell("backends", SMALL, "full"),
    *(Cell("tensors", str(count)) for count in (1, 100, 10_000)),
    Cell("tensors", "100", threads=1),
    *(Cell("elements", str(size)) for size in (10**3, 10**5, 10**7)),
    Cell("elements", str(10**5), threads=1),
    Cell("host", "1000", threads=1),
    *(Cell("apart", f"{peer}, 300 tiny") for peer in APART),
    Cell("costs", MODEL, "full"),
    Cell("training", "multilayer perceptron", "clip"),
)
"""`make bench BENCH=--quick`: a first look at every section, but for what compiles for minutes."""


def chosen(
    among: Iterator[Cell] | tuple[Cell, ...],
    *,
    only: str = "",
    sections: list[str] | None = None,
    kinds: list[str] | None = None,
    rules: list[str] | None = None,
) -> list[Cell]:
    """Those whose key contains `only`, of these sections, kinds of step and optimizers."""
    return [
        cell
        for cell in among
        if only in cell.key
        and (not sections or cell.section in sections)
        and (not kinds or cell.kind in kinds)
        and (not rules or cell.rule in rules)
    ]
