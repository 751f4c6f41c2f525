# SPDX-License-Identifier: Apache-2.0
"""Peers that need a process of their own, beside pyupdate in it: FastEstimator, Keras.

    python benchmarks/apart.py                       # both, every kind of a step: two minutes
    python benchmarks/apart.py Keras --kind step     # one

FastEstimator: its `UpdateOp`, from a loss to new parameters, beside `pyupdate.update_model`. The
loss has given gradients, so that both make the same backward pass, which costs one multiplication
an element. Keras: its AdamW applied to given gradients, eagerly, in a tf.function, and compiled by
XLA, beside the deferred update of `pyupdate.update_model`.

Each is held to the rule in fp64 first, as everywhere; who is wrong is named and not timed. `make
bench` measures the same cells.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matrix import APART
from peers import NO_EPS
from shapes import MODELS, tiny
from torch import nn
from workloads import THREADS

import pyupdate
from pyupdate import optim
from pyupdate.bench import timing, watch
from pyupdate.bench.contestants import MAX_NORM, OURS, SCALE, Contestant, Workload
from pyupdate.bench.truth import WrongError, check

SHAPES = {"ResNet-50": MODELS["ResNet-50"].shapes(), "300 tiny": tiny(300)}

Made = dict[str, Any]


class Given(torch.autograd.Function):
    """A loss with given gradients."""

    @staticmethod
    def forward(ctx: Any, grads: list[torch.Tensor], *_: torch.Tensor) -> torch.Tensor:
        ctx.grads = grads
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> Any:
        return (None, *torch._foreach_mul(ctx.grads, upstream[0]))


class Held(nn.Module):
    """Nothing but parameters."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__()
        self.held = nn.ParameterList(params)


class FromLoss(Contestant):
    """Its step begins at a loss, which is made off the clock."""

    def __init__(self, name: str, workload: Workload, kind: str, module: Any, update: Any) -> None:
        def make(params: list[nn.Parameter]) -> Any:
            self.model = module(params)
            return self.model.current_optimizer

        super().__init__(name, workload, kind, make)
        scale = 1.0 / SCALE if self.scaled else 1.0
        self.given = [fresh * scale for fresh in self.fresh]
        self.run = torch.enable_grad()(partial(update, self))  # a proof has switched it off

    @torch.enable_grad()
    def prepare(self) -> None:
        for param in self.params:
            param.grad = None
        self.loss = Given.apply(self.given, *self.params)


def fastestimator(workload: Workload, kind: str) -> Made:
    """UpdateOp with torch's AdamW as its users write it and fused, and ours."""
    import fastestimator as fe

    def module(stock: Callable[..., Any]) -> Any:
        return lambda params: fe.build(lambda: Held(params), optimizer_fn=stock)

    def theirs(one: FromLoss) -> None:
        one.update.forward(one.loss, {"warmup": False, "deferred": {}, "tape": None})

    def with_update(one: FromLoss) -> FromLoss:
        one.update = fe.op.tensorop.model.UpdateOp(one.model, loss_name="loss")
        one.update.build("torch", torch.device("cpu"))
        if one.scaled:  # FastEstimator itself makes one for CUDA only
            one.optimizer.scaler = one.scaler
        return one

    def ours(one: FromLoss) -> None:
        if one.scaled:
            pyupdate.update_model(one.model, one.loss, retain_graph=False, scaler=one.scaler)
            one.scaler.update()
        else:
            pyupdate.update_model(one.model, one.loss, retain_graph=False)

    stocks = {
        "FastEstimator": torch.optim.AdamW,
        "FastEstimator, torch fused": lambda params: torch.optim.AdamW(params, fused=True),
    }
    found: Made = {}
    for name, stock in stocks.items():
        found[name] = with_update(FromLoss(name, workload, kind, module(stock), theirs))

    def built(params: list[nn.Parameter]) -> Any:
        return pyupdate.build(Held(params), optim.AdamW, model_name="ours")

    found[OURS] = FromLoss(OURS, workload, kind, built, ours)
    return found


def keras(workload: Workload, kind: str) -> Made:
    """Three ways to apply Keras's AdamW, and ours, which traces the same optimizer.

    Keras adds eps before the second moment's correction: with eps of nothing its formula is ours.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import keras
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(torch.get_num_threads())
    random = torch.Generator().manual_seed(1)
    begin, fresh = (
        [torch.randn(shape, generator=random) * scale for shape in workload.shapes]
        for scale in (1.0, 0.01)
    )

    class Weights(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.held = [self.add_weight(shape=tuple(one.shape)) for one in begin]
            self.built = True
            for variable, one in zip(self.held, begin, strict=True):
                variable.assign(one.numpy())

    def optimizer() -> Any:
        norm = MAX_NORM if kind == "clip" else None
        return keras.optimizers.AdamW(1e-3, weight_decay=0.01, epsilon=NO_EPS, global_clipnorm=norm)

    grads = [tf.constant(one.numpy()) for one in fresh]

    def of_keras(wrap: Callable[[Any], Any]) -> tuple[Any, Callable[[], Any]]:
        model, made = Weights(), optimizer()
        made.build(model.trainable_variables)
        apply = wrap(lambda given: made.apply(given, model.trainable_variables))
        return model, lambda: apply(grads)

    def of_pyupdate() -> tuple[Any, Callable[[], Any]]:
        model = pyupdate.build(Weights(), optimizer(), model_name="ours")
        deferred: dict[str, Any] = {}
        with tf.GradientTape() as tape:
            products = [tf.reduce_sum(v.value * g) for v, g in zip(model.held, grads, strict=True)]
            loss = tf.add_n(products)
        pyupdate.update_model(model, loss, tape=tape, defer=True, deferred=deferred)
        return model, deferred["ours"][0]

    made = {
        "Keras eager": of_keras(lambda apply: apply),
        "Keras in tf.function": of_keras(tf.function),
        "Keras jit_compile=True": of_keras(lambda apply: tf.function(apply, jit_compile=True)),
        OURS: of_pyupdate(),
    }
    return {name: _OfKeras(name, workload, kind, *one, fresh) for name, one in made.items()}


class _OfKeras:
    """What a proof and a clock ask of a contestant, for the variables of a Keras model."""

    scaled = False
    averages: tuple[()] = ()

    def __init__(
        self, name: str, workload: Workload, kind: str, model: Any, run: Any, fresh: Any
    ) -> None:
        self.name, self.workload, self.kind = name, workload, kind
        self.model, self.run, self.fresh = model, run, fresh

    @property
    def params(self) -> list[torch.Tensor]:
        return [torch.tensor(variable.numpy()) for variable in self.model.held]

    def prepare(self) -> None:
        pass


def measure(peer: str, model: str, kind: str, *, seconds: float) -> dict[str, Any]:
    """A cell: who is right, in turns.

    Args:
        peer: one of `matrix.APART`.
        model: one of `SHAPES`.
        kind: one of the peer's.
        seconds: of timing, at least.
    """
    # TensorFlow, which FastEstimator imports too, and Triton abort in one process: each brings an
    # LLVM with the same options. Nothing here needs Triton.
    sys.modules["triton"] = None  # type: ignore[assignment]
    workload = Workload(model, tuple(SHAPES[model]))
    with timing.settled(THREADS):
        made = fastestimator(workload, kind) if peer == "FastEstimator" else keras(workload, kind)
        eps = NO_EPS if peer == "Keras" else 1e-8
        like = optim.AdamW([nn.Parameter(torch.zeros(2))], eps=eps)
        # Keras takes the powers of its betas in the variables' dtype, ours traces it.
        corrections = torch.float32 if peer == "Keras" else torch.float64
        off, failed = {}, {}
        for name, one in list(made.items()):
            try:
                off[name] = check(one, like, corrections=corrections)
            except WrongError as error:
                failed[name] = str(error)
                del made[name]
        runs = {name: (one.prepare, one.run) for name, one in made.items()}
        warm, steady = timing.warm_up(runs, seconds=seconds)
        watched = watch.interleave(runs, seconds=seconds, rounds=8, patience=2.0)
        times = watched.times
    return {
        "peer": peer,
        "workload": model,
        "tensors": len(workload.shapes),
        "elements": workload.elements,
        "kind": kind,
        "ms": {name: 1e3 * times[name].median for name in made},
        "ratio": {name: timing.ratio(times[name], times[OURS]) for name in made if name != OURS},
        "off_eps": off,
        "failed": failed,
        "warm_rounds": warm,
        "steady": steady,
        **watched.facts(),
        "machine": timing.machine(THREADS),
    }


def as_text(cell: dict[str, Any]) -> str:
    """A line a contestant."""
    lines = [f"{cell['workload']}, {cell['kind']}, AdamW, medians of {cell['rounds']} rounds"]
    for name, took in cell["ms"].items():
        ratio = cell["ratio"].get(name, 1.0)
        lines.append(f"  {name:28}{took:10.2f} ms{ratio:8.2f}x{cell['off_eps'][name]:8.1f} eps off")
    lines += [f"  {name:28}not timed: {reason}" for name, reason in cell["failed"].items()]
    if timing.disturbed(cell):
        lines.append(f"  DISTURBED: the machine moved by {100 * cell['moved']:.0f} %")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("peer", nargs="?", choices=tuple(APART))
    parser.add_argument("--kind", choices=("step", "scaler", "clip"))
    parser.add_argument("--model", choices=tuple(SHAPES))
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--json", action="store_true", help="print a JSON object a cell")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        found = measure(chosen.peer, chosen.model, chosen.kind, seconds=chosen.seconds)
        print(json.dumps(found))
        return 0
    for peer in APART if chosen.peer is None else (chosen.peer,):
        for kind in APART[peer] if chosen.kind is None else (chosen.kind,):
            for model in SHAPES if chosen.model is None else (chosen.model,):
                given = ["--kind", kind, "--model", model, "--seconds", str(chosen.seconds)]
                found = in_a_process(peer, given)
                if isinstance(found, str):
                    print(f"{peer}: absent: {found}")
                else:
                    print(json.dumps(found) if chosen.json else as_text(found), flush=True)
    return 0


def in_a_process(peer: str, given: list[str]) -> dict[str, Any] | str:
    """A cell, or why there is none: the last line of what the process said."""
    command = [sys.executable, str(Path(__file__)), peer, "--one", *given]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


if __name__ == "__main__":
    sys.exit(main())
