# SPDX-License-Identifier: Apache-2.0
"""What `make bench` measures: cells, each of which answers a question. Not a full cross.

Every optimizer crossed with every model, step, dtype and peer would be some 10,000 cells; these are
those that tell something that the others do not. A cell is measured in a process of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from shapes import MODELS

from pyupdate import optim
from pyupdate.bench.contestants import KINDS, Workload

THREADS = 2

SECTIONS = {
    "kinds": "AdamW on every model: the step alone, and all that may be in it",
    "rules": "the step of every optimizer",
    "dtypes": "AdamW on bfloat16 parameters, and on bfloat16 matrices with float32 vectors",
    "backends": "AdamW without the compiled module",
    "tensors": "growth with the number of tensors",
    "elements": "growth with the number of elements",
    "host": "what a step costs beside its memory: tensors of one element",
    "costs": "import, first step and memory",
    "training": "a whole training step, and which share of it the update is",
}
"""In the order in which they are measured, with the question of each."""

MODEL = "ResNet-50"
"""Where one model has to do: convolutions, matrices and vectors."""
MUONS = "ViT-B/16 matrices"
SMALL = "1,000 tiny"
WITH_PEERS = (MODEL, SMALL, MUONS)
"""Where the contestants that are not torch's take part: elsewhere a dozen copies of a model fill
the memory, and say what these say."""
COMPILED = (("kinds", MODEL, "step"), ("kinds", MODEL, "full"), ("kinds", SMALL, "step"))
"""Sections, models and kinds where those take part that compile a step, for a minute each."""
HALVES = (MODEL, "GPT-2 124M", SMALL)
HUGE = "one of 100M"

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


@dataclass(frozen=True)
class Cell:
    """What is measured in one process.

    Attributes:
        section: one of `SECTIONS`.
        of: a model of `shapes`, a number of tensors or elements, or one of `TRAINED`.
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


def cells() -> Iterator[Cell]:
    """All of them, in the order in which they are measured."""
    models = [m for m in MODELS if m not in ("Llama 1B", MUONS)]
    for model in models:
        # A hundred million numbers take a minute a kind: the two ends say it.
        for kind in ("step", "full") if model == HUGE else KINDS:
            yield Cell("kinds", model, kind)
    for rule in optim.CLASSES:
        yield Cell("rules", MUONS if rule == "Muon" else MODEL, rule=rule)
    for model in HALVES:
        for dtype in ("bfloat16", "mixed"):
            for kind in ("step", "full"):
                if model != SMALL or dtype != "mixed":  # it has no matrices
                    yield Cell("dtypes", model, kind, dtype=dtype)
    for model in (MODEL, SMALL):
        yield Cell("backends", model, "full")
    for section, points in (("tensors", COUNTS), ("elements", SIZES)):
        for point in points:
            for threads in (THREADS, 1):
                yield Cell(section, str(point), threads=threads)
    for kind in ("step", "full"):
        yield Cell("host", "1000", kind, threads=1)
    yield Cell("costs", MODEL, "full")
    for model in TRAINED:
        yield Cell("training", model, "clip")


QUICK = (
    *(Cell("kinds", model, kind) for model in (MODEL, SMALL) for kind in ("step", "full")),
    *(Cell("tensors", str(count)) for count in (1, 100, 10_000)),
    *(Cell("elements", str(size)) for size in (10**3, 10**5, 10**7)),
    Cell("host", "1000", threads=1),
)
"""`make bench BENCH=--quick`: some three minutes, a first look."""

CHECKED = (
    *(Cell("kinds", model, kind) for model in (MODEL, SMALL) for kind in ("step", "full")),
    Cell("kinds", MODEL, "average"),
    Cell("kinds", "5,000 tiny", "full"),
    Cell("rules", MODEL, rule="SGD"),
    Cell("rules", MODEL, rule="NAdam"),
    Cell("dtypes", MODEL, "full", dtype="bfloat16"),
    Cell("host", "1000", threads=1),
)
"""What `make bench-check` measures again: what is bound by memory, by calls, and by arithmetic."""


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
