# SPDX-License-Identifier: Apache-2.0
"""The Triton back end in full: every rule, storage and option on every architecture; slow.

Some of each runs in test_triton.py, which also says how.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from cases import DTYPES
from compiling import ROOT

pytest.importorskip("triton", reason="triton is not installed (make check-device installs it)")

from device import triton_compile
from triton_training import ALL_OPTIONS, OPTIONS, OTHER_CAPABILITIES, RULES, check

pytestmark = pytest.mark.slow

HALVES = (torch.bfloat16, torch.float16)
# None, a tail alone, blocks and a tail, a chunk and a tail of the next.
SIZES = (0, 1, 70, 2049, 16_385)
capabilities = pytest.mark.parametrize("capability", (90, *OTHER_CAPABILITIES))
every_rule = pytest.mark.parametrize("rule", RULES)


@capabilities
@every_rule
def test_every_rule(rule: str, capability: int, compiled: Any) -> None:
    check(rule, DTYPES, capability=capability, order=11, sizes=SIZES, max_norm=1.0)


@capabilities
@every_rule
def test_every_rule_on_halves_with_state_in_float32(
    rule: str, capability: int, compiled: Any
) -> None:
    check(rule, HALVES, capability=capability, order=12, state_dtype=torch.float32, sizes=SIZES)


@every_rule
def test_every_option_at_once(rule: str, compiled: Any) -> None:
    # Halves are rounded by chance; the parameter alone where their state is in float32.
    options = dict(ALL_OPTIONS)
    if rule == "adafactor":
        del options["ema_decay"], options["stochastic_rounding"]  # which it refuses
    check(rule, DTYPES, sizes=SIZES, **options)
    check(rule, HALVES, sizes=SIZES, state_dtype=torch.float32, **options)


@pytest.mark.parametrize("options", [options for _, options in OPTIONS.values()], ids=OPTIONS)
def test_each_option_in_every_storage(options: dict[str, Any], compiled: Any) -> None:
    check("adamw", DTYPES, sizes=SIZES, **options)
    check("adamw", HALVES, sizes=SIZES, state_dtype=torch.float32, **options)


@pytest.mark.parametrize("target", triton_compile.TARGETS)
@pytest.mark.parametrize("rule", triton_compile.RULES)
def test_every_rule_compiles_to_what_keeps_the_contract(rule: str, target: str) -> None:
    count, faults = triton_compile.examined(rule, target, triton_compile.STORAGES)
    stages = len(triton_compile.RULES[rule].stages)
    assert count == 1 + (1 + stages) * len(triton_compile.STORAGES)
    assert not faults


def test_the_interpreter_gives_the_same_bits(compiled: Any) -> None:
    # Apart: Triton reads the variable when it is imported.
    tests = ROOT / "tests"
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{tests}",
    }
    command = [sys.executable, "-m", "device.triton_interpreted", "adamw", "lamb"]
    done = subprocess.run(
        command, cwd=tests, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "adamw\nlamb\n"), done.stderr
