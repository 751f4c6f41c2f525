# SPDX-License-Identifier: Apache-2.0
"""Every other library that steps the same rules on this machine, and why the others do not.

    python benchmarks/peers.py          # each peer and rule, held to fp64, and who is absent
    python benchmarks/peers.py --build  # compile what DeepSpeed compiles when it is first used

`makers` are those that share a process with us. Each takes our defaults of a rule, so all make the
same step. `check` says whether one does: whoever does not is listed with its distance, never timed.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from matrix import DTYPES
from torch import nn
from torch.amp.grad_scaler import OptState

from pyupdate import optim
from pyupdate.bench.contestants import (
    BASELINE,
    CLIPPED,
    FUSED_SGD_OF_HALVES,
    MAX_NORM,
    SCALED,
    Contestant,
    Optimizer,
    Workload,
    refuse_halves,
)
from pyupdate.bench.truth import WrongError
from pyupdate.bench.truth import check as check_truth

COMPILED = "torch compiled"
HOOKED = "torch fused + hook"
FUSED = ("SGD", "Adam", "AdamW", "Adagrad")
"""What torch fuses on a CPU."""

NO_EPS = 1e-30
"""Adds nothing to a denominator of fp32 numbers and is the least that matters under a maximum."""


@dataclass(frozen=True)
class Peer:
    """A library's optimizers.

    Attributes:
        module: what has to import.
        classes: by our class's name, theirs.
        given: what its constructor takes besides the rule's numbers.
        corrections: the dtype in which it makes bias corrections.
        consumes: writes on the gradients, which have to be put back before every step.
        compiles: by inductor, at the first step.
        numbers: of the rule, in the place of ours: where the libraries' formulas part.
    """

    module: str
    classes: dict[str, str]
    given: dict[str, Any]
    corrections: torch.dtype = torch.float64
    consumes: bool = False
    compiles: bool = False
    numbers: dict[str, Any] | None = None


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


ROWS = {
    # Its corrections are a running product of fp32 betas (csrc/includes/cpu_adam.h).
    "DeepSpeed": Peer(
        "deepspeed.ops",
        {
            "AdamW": "adam.DeepSpeedCPUAdam",
            "Adam": "adam.DeepSpeedCPUAdam",
            "Adagrad": "adagrad.DeepSpeedCPUAdagrad",
            "Lion": "lion.DeepSpeedCPULion",
        },
        {},
        torch.float32,
        consumes=True,
    ),
    "optimi": Peer(
        "optimi",
        _same("AdamW", "Adam", "SGD", "Lion", "Adan", "RAdam", "StableAdamW"),
        {"triton": False},
        consumes=True,
    ),
    "pytorch-optimizer": Peer(
        "pytorch_optimizer",
        _same("Lion", "Adan", "AdEMAMix", "ADOPT", "StableAdamW", "NovoGrad", "RAdam", "LARS")
        | {"LAMB": "Lamb", "Adamax": "AdaMax"},
        {"weight_decouple": True},
        consumes=True,
    ),
    # Where the rule adds eps to the denominator, it takes the larger of the two.
    "heavyball": Peer(
        "heavyball",
        _same("AdamW"),
        {},
        consumes=True,
        compiles=True,
        numbers={"eps": NO_EPS},
    ),
    "bitsandbytes": Peer(
        "bitsandbytes.optim",
        _same("AdamW", "Lion", "RMSprop", "Adagrad", "AdEMAMix", "LAMB"),
        {},
    ),
}
LARGEST = 200
"""So many tensors, or a step is not compiled: the time of compiling grows with their number, and a
minute is what a table's cell may take."""


def makers(kind: str, rule: str) -> dict[str, Optimizer]:
    """The peers that step a rule in this process, by the name that tables show.

    Args:
        kind: one of `KINDS`.
        rule: the name of our optimizer's class.
    """
    numbers = defaults(rule)
    found: dict[str, Optimizer] = {}
    stock = getattr(torch.optim, rule, None)
    if stock is not None:
        if kind != "step" and rule in FUSED:
            found[HOOKED] = _hooked(stock, numbers)
        found[COMPILED] = _compiled(stock, numbers)
    for name, peer in ROWS.items():
        if rule in peer.classes and _import_error(peer.module) is None:
            found[name] = _of(peer, rule)
    return found


def compiles(name: str) -> bool:
    """Whether a peer compiles its step first."""
    return name == COMPILED or (name in ROWS and ROWS[name].compiles)


def absent() -> dict[str, str]:
    """Why a peer is not here: it does not import, or it is never compared."""
    found = dict(EXCLUDED)
    for name, peer in ROWS.items():
        reason = _import_error(peer.module)
        if reason is not None:
            found[name] = reason
    return found


EXCLUDED = {
    f"{BASELINE}, SGD of halves": FUSED_SGD_OF_HALVES,
    "flashoptim": "steps on a GPU only",
}


def check(one: Contestant, like: Any) -> float:
    """As `pyupdate.bench.truth.check`, with the allowance of the contestant.

    Args:
        one: a contestant of `makers` or of `of_torch`, ours too.
        like: an optimizer of ours: says the rule, and the numbers of all but those peers that have
            their own.

    Returns:
        How far off it was, in eps.

    Raises:
        WrongError: it makes another step, or further off than it may be.
    """
    if one.name == COMPILED:  # inductor takes the powers of betas in fp32, as the step tensor is
        return check_truth(one, like, corrections=torch.float32)
    peer = ROWS.get(one.name)
    if peer is None:
        return check_truth(one, like)
    theirs = like if peer.numbers is None else type(like)(one.params, **peer.numbers)
    return check_truth(one, theirs, corrections=peer.corrections)


@cache
def defaults(rule: str) -> dict[str, Any]:
    """Our defaults of a rule."""
    made = getattr(optim, rule)([nn.Parameter(torch.zeros(2, 2))])
    return dict(made.defaults)


def _of(peer: Peer, rule: str) -> Optimizer:
    # DeepSpeed compiles its kernels when they are first used, with the ninja of this environment.
    beside = str(Path(sys.executable).parent)
    if beside not in os.environ["PATH"].split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join((beside, os.environ["PATH"]))
    where, _, name = f"{peer.module}.{peer.classes[rule]}".rpartition(".")
    given = peer.given | ({"adamw_mode": False} if rule == "Adam" else {})
    kind = getattr(importlib.import_module(where), name)
    options = _taken(kind, defaults(rule) | (peer.numbers or {}) | given)

    def make(params: list[nn.Parameter]) -> Any:
        if peer.compiles:
            _refuse_many(params)
        made = kind(params, **options)
        made.consume_grad = peer.consumes
        return made

    return make


def _taken(kind: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Those that a constructor takes."""
    names = set(inspect.signature(kind).parameters)
    return {name: value for name, value in options.items() if name in names}


def _compiled(stock: Any, numbers: dict[str, Any]) -> Optimizer:
    """Torch's optimizer with its step compiled, as torch's recipe has it.

    Source: https://docs.pytorch.org/tutorials/recipes/compiling_optimizer.html
    """
    options = _taken(stock, numbers | {"foreach": True})

    def make(params: list[nn.Parameter]) -> Any:
        # By default the ninth optimizer of a process is not compiled any more, without an error.
        torch._dynamo.config.recompile_limit = 1 << 10
        torch._dynamo.config.accumulated_recompile_limit = 1 << 12
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        _refuse_many(params)
        made = stock(params, **options)
        made.step = torch.compile(made.step)
        return made

    return make


def _refuse_many(params: list[nn.Parameter]) -> None:
    if len(params) > LARGEST:
        message = f"{len(params)} tensors: more than {LARGEST} take minutes to compile"
        raise ValueError(message)


def _hooked(stock: Any, numbers: dict[str, Any]) -> Optimizer:
    options = _taken(stock, numbers | {"fused": True})

    def make(params: list[nn.Parameter]) -> Any:
        refuse_halves(stock, params)
        made = stock(params, **options)
        made.whole_step = hooked_step
        return made

    return make


@torch.no_grad()
def hooked_step(one: Contestant) -> None:
    """Torch's fused step without the passes that rewrite gradients, for whoever knows the way.

    `GradScaler.step` hands on the ``grad_scale`` that it finds on the optimizer when the gradients
    count as unscaled, and the fused kernels divide by it: so the norm is only read, tells by itself
    whether something is not finite, and unscaling and clipping are one factor. The kernels still
    write the gradients back.
    """
    optimizer, scaler = one.optimizer, one.scaler
    norm = nn.utils.get_total_norm([param.grad for param in one.params if param.grad is not None])
    found_inf = torch.logical_not(torch.isfinite(norm)).float()
    scale = scaler._get_scale_async() if one.kind in SCALED else torch.ones(())
    assert scale is not None
    if one.kind in CLIPPED:
        scale = scale / torch.clamp(MAX_NORM / (norm / scale + 1e-6), max=1.0)
    optimizer.grad_scale = scale
    if one.kind in SCALED:
        state = scaler._per_optimizer_states[id(optimizer)]
        state["stage"] = OptState.UNSCALED
        state["found_inf_per_device"] = {norm.device: found_inf}
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.found_inf = found_inf
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
    one.average()


@cache
def _import_error(module: str) -> str | None:
    try:
        with _as_it_was():
            importlib.import_module(module)
    except Exception as error:  # a library may fail in any way when it is imported
        return f"does not import: {type(error).__name__}: {error}".splitlines()[0]
    return None


@contextmanager
def _as_it_was() -> Iterator[None]:
    """A library that is imported decides nothing about torch for the others."""
    precision, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.set_num_threads(threads)


PROBED = Workload("probed", ((200, 100), (33,), (5, 5), (257, 4)))


def _said(name: str, kind: str, rule: str, make: Optimizer, workload: Workload) -> str:
    try:
        one = Contestant(name, workload, kind, make)
        off = check(one, getattr(optim, rule)(one.params))
    except WrongError as error:
        return f"WRONG: {error}"
    except Exception as error:  # likewise
        return f"FAILED: {type(error).__name__}: {error}".splitlines()[0]
    return f"right: {off:.1f} eps off"


def build() -> int:
    """Compile what peers compile when they are first used, so that no table waits for it."""
    for rule in ROWS["DeepSpeed"].classes if "DeepSpeed" not in absent() else ():
        try:
            makers("step", rule)["DeepSpeed"]([nn.Parameter(torch.zeros(1))])
        except RuntimeError as error:
            print(f"DeepSpeed: {rule}: {error}", file=sys.stderr)
    return 0


def main() -> int:
    """Hold everyone to every rule that it has, in every dtype of the matrix."""
    for rule in optim.CLASSES:
        for kind in ("step", "full"):
            for name, make in makers(kind, rule).items():
                for called, (dtype, of_vectors) in DTYPES.items():
                    workload = Workload("probed", PROBED.shapes, {}, dtype, of_vectors)
                    said = _said(name, kind, rule, make, workload)
                    print(f"{rule:18}{kind:6}{name:20}{called:10}{said}", flush=True)
    for name, reason in absent().items():
        print(f"absent: {name}: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(build() if sys.argv[1:] == ["--build"] else main())
