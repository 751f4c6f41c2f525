# SPDX-License-Identifier: Apache-2.0
"""One training run in TensorFlow and under torch: to the bit, where XLA may not contract.

XLA makes one rounding of a multiplication and an addition where the processor can; AVX cannot. So
processes of their own are started, whose XLA_FLAGS leave it nothing else.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorflow", reason="tensorflow is not installed: pyupdate[tensorflow]")

from rule_run import NUMBERS, STEPS, drawn
from test_keras_optim import TEXTS, begun, numbers_of

from pyupdate.kernels import oracle
from pyupdate.kernels.rules import RULES

EPS = float(np.finfo(np.float32).eps)
NO_CONTRACTION = "--xla_cpu_max_isa=AVX"
POWERS = [
    "adam",
    "amsgrad",
    "adamax",
    "radam",
    "nadam",
    "asgd",
    "schedulefree",
    "ademamix",
    "adan",
    "lamb",
    "stable",
]
QUICK = [name for name in TEXTS if not any(part in name for part in POWERS)]  # a second each

Found = dict[str, np.ndarray[Any, Any]]


def run(path: Path, framework: str, names: list[str], flags: str = "") -> Found:
    done = subprocess.run(
        [
            sys.executable,
            str(Path(__file__).with_name("rule_run.py")),
            str(path),
            framework,
            *names,
        ],
        env={**os.environ, "XLA_FLAGS": flags, "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    with np.load(path) as found:
        return dict(found)


@pytest.fixture(scope="module")
def true(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """The run in PyTorch."""
    pytest.importorskip("torch", reason="torch is not installed: pyupdate[torch]")
    return run(tmp_path_factory.mktemp("torch") / "found.npz", "torch", list(NUMBERS))


@pytest.mark.slow
def test_a_run_in_both_frameworks_has_the_same_bits(true: Found, tmp_path: Path) -> None:
    same = run(tmp_path / "same.npz", "keras", list(NUMBERS), NO_CONTRACTION)
    assert len(true) == STEPS * 2 * (2 + 2 + 3 + 3)  # of two tensors: param and state
    assert true.keys() == same.keys()
    for what, value in true.items():
        assert value.tobytes() == same[what].tobytes(), what


@pytest.mark.slow
def test_where_xla_contracts_a_run_is_near_the_other(true: Found, tmp_path: Path) -> None:
    near = run(tmp_path / "near.npz", "keras", list(NUMBERS))
    for what, value in true.items():
        name, step, part, _ = what.split()
        if part == "param":  # one ulp of a sum near zero may turn a sign: that moves by 2 lr
            turned = 2 * 0.01 if name == "own" else 0.0
            bound = int(step) * (8 * EPS * np.maximum(np.abs(value), 0.5) + turned)
            assert np.all(np.abs(near[what] - value) <= bound), what


def by_the_oracle(name: str) -> Found:
    """The same run in numpy, every operation rounded once."""
    rule, numbers = RULES[name], NUMBERS.get(name) or numbers_of(name)
    made: Found = {}
    for i, param in enumerate(drawn(0)):
        state = {key: begun(initial, numbers, param) for key, initial in rule.state.items()}
        zero = np.zeros((), np.float32)
        state |= {key: begun(initial, numbers, zero) for key, initial in rule.scalars.items()}
        for step in range(1, STEPS + 1):
            grad = drawn(step)[i]
            param, state = oracle.step(
                rule, param, grad, state, [numbers[n] for n in rule.numbers], count=step
            )
            made[f"{name} {step} param {i}"] = param
            made |= {f"{name} {step} {key} {i}": value for key, value in state.items()}
    return made


@pytest.mark.parametrize(
    "names", [QUICK, pytest.param([n for n in TEXTS if n not in QUICK], marks=pytest.mark.slow)]
)
def test_every_rule_has_the_bits_of_the_oracle(names: list[str], tmp_path: Path) -> None:
    found = run(tmp_path / "keras.npz", "keras", names, NO_CONTRACTION)
    compared = 0
    for name in names:
        for what, true in by_the_oracle(name).items():
            assert found[what].tobytes() == np.float32(true).tobytes(), what
            compared += 1
    assert compared == len(found)
