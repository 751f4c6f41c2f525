# SPDX-License-Identifier: Apache-2.0
"""What csrc/bindings.cpp offers, and every module that is built from another rules file."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch

from .pytorch.request import Request

_Groups = list[dict[str, Any]]
_State = dict[torch.Tensor, dict[str, Any]]
_Numbers = Sequence[Sequence[float]]

class Found:
    """What a refresh of a plan found."""

    READY: ClassVar[Found]
    FRESH: ClassVar[Found]
    STALE: ClassVar[Found]
    SUSPECT: ClassVar[Found]
    OVERLAP: ClassVar[Found]
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...

class Stream:
    """Arrays that AdamW's streams go through, for benchmarks."""

    BYTES_READ: ClassVar[int]
    """That `read` moves an element."""

    def __init__(self, elements: int, averages: bool = False) -> None:
        """Make four arrays of so many float32, or with an average five."""

    @property
    def bytes(self) -> int:
        """That `run` moves an element."""

    def run(self, threads: int) -> None:
        """One turn of what a step reads and writes."""

    def read(self, threads: int) -> None:
        """One turn of what a norm reads."""

class Reader:
    """Reads tensors as a step must that trusts no pointer of the one before, for benchmarks."""

    def __init__(self, tensor_type: type[torch.Tensor], rows: Sequence[list[torch.Tensor]]) -> None:
        """Take rows of tensors, each a parameter and then its state.

        Raises:
            ValueError: rows of several widths.
            RuntimeError, BufferError: of what is no tensor, or one without memory: torch's own.
        """

    def read(self) -> int:
        """Ask for every gradient, and read each tensor once: where it lies, its shape and dtype.

        Nothing is compared or done with it. Returns how many tensors there were, with gradients.
        """

class Plan:
    """The rows of an optimizer that this module steps; every method re-reads every tensor."""

    def __init__(
        self,
        *,
        tensor_type: type[torch.Tensor],
        types: list[type],
        increment_version: Callable[[Any], None],
        tensor_list: Any,
        groups: Sequence[tuple[str, Sequence[str], bool]],
        params: list[torch.Tensor],
        storages: Sequence[str],
        group_of: Sequence[int],
        positions: Sequence[int],
        averages: bool,
    ) -> None:
        """Make a plan.

        Args:
            tensor_type: ``torch.Tensor``, whose DLPack exchange API is used.
            types: the tensor types that are their own memory.
            increment_version: torch's.
            tensor_list: torch's list type for tensors, or None.
            groups: rule, state keys, and whether torch counts its steps.
            params: the parameters, in the order of the groups.
            storages: the name of each one's dtype; that of its state is read.
            group_of: the index of each one's group.
            positions: the place of each one in its group.
            averages: whether each one has an average beside its state.
        """

    def step(
        self,
        groups: _Groups,
        state: _State,
        numbers: _Numbers,
        request: Request,
        threads: int,
    ) -> tuple[Found, list[int], float, bool, bool, float]:
        """A whole step; (found, rows noticed, norm, non-finite, skipped, multiplier)."""

    def check(self, groups: _Groups, state: _State, numbers: _Numbers) -> tuple[Found, list[int]]:
        """The refresh alone; what it found and the rows it noticed."""

    def reduce(
        self, groups: _Groups, state: _State, numbers: _Numbers, request: Request, threads: int
    ) -> tuple[bool, list[int], list[float]]:
        """The reduce pass; whether an inf or nan was found, the rows and what each adds."""

    def apply(
        self,
        groups: _Groups,
        state: _State,
        numbers: _Numbers,
        request: Request,
        multiplier: float,
        threads: int,
    ) -> None:
        """The apply pass with a given multiplier."""

    def vouch(self) -> None:
        """The memory as last refreshed shares nothing."""

    def active(self) -> list[int]:
        """The rows that had a gradient at the last refresh."""

    def nbytes(self) -> int:
        """Memory of the tables."""

    def chunks(self) -> int:
        """Chunks of the active rows."""

def step_together(
    steps: Sequence[tuple[Plan, _Groups, _State, _Numbers, Request]], threads: int
) -> list[tuple[Found, list[int], float, bool, bool, float]]:
    """The steps of different plans in one region.

    Empty, and nothing done, where one of them is not plainly right or they share memory.
    """

def register_with_xla(api: int, prefix: str) -> str:
    """Let XLA on a CPU call the passes as ``<prefix>_measure`` and ``<prefix>_step``.

    `api` is the address that XLA's ``GetXlaFfiApi`` returns. Returns why XLA cannot, or nothing.
    """

def isa() -> str:
    """The instruction set in force."""

def isas() -> list[str]:
    """The instruction sets that are built and that this processor can run, lowest first."""

def use_isa(name: str) -> None:
    """Put another one in force; ValueError where it is not built or cannot run."""

def rules() -> list[str]:
    """The rules that are compiled in."""

def prepare(rule: str, numbers: Sequence[float]) -> list[float]:
    """What the `prepare` of a rule makes of the step count, the numbers and the counted scalars.

    The hypers, then the new values of those scalars; ValueError for another count of numbers.
    """

def stages(rule: str) -> list[tuple[int, int]]:
    """What each stage of a rule reads and writes, as bits: parameter, gradient, then its states."""

def digests() -> dict[str, str]:
    """Rule -> `Rule.digest` of the text that it was compiled from."""

def build_info() -> dict[str, str]:
    """The compiler and flags of the build, and what runs its threads."""
