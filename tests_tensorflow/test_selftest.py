# SPDX-License-Identifier: Apache-2.0
"""The Keras half of ``python -m pyupdate --selftest`` can fail."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("tensorflow", reason="tensorflow is not installed: pyupdate[tensorflow]")

from training import LACKS_PASSES

from pyupdate.kernels.rules import RULES
from pyupdate.tensorflow import measure, passes, selftest


@pytest.mark.slow  # CI's install matrix runs the whole self-test
def test_every_rule_that_is_tried_is_right() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pyupdate.tensorflow.selftest"],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    results = [json.loads(line) for line in done.stdout.splitlines()]
    compiled = [] if passes.why_not() else [n for n in selftest.TRIED if not RULES[n].scalars]
    assert [row["rule"] for row in results] == [*selftest.TRIED, *compiled]
    assert set(selftest.TRIED) <= set(RULES)
    assert all(row["passed"] and 0 < row["worst"] <= 1 for row in results)
    assert [row["bits"] for row in results] == [None] * len(selftest.TRIED) + [True] * len(compiled)


def test_it_fails_where_the_clip_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    multiplied = measure.multiplied

    def unclipped(grads: Any, multiplier: Any, clip_value: Any) -> Any:
        return multiplied(grads, multiplier * 0.0 + 0.25, clip_value)

    monkeypatch.setattr(measure, "multiplied", unclipped)
    result = selftest.tried("sgd_momentum")
    assert result.passed is False
    assert result.worst > 1.0


@pytest.mark.skipif(LACKS_PASSES, reason=passes.why_not())
def test_it_fails_where_the_passes_take_another_number(monkeypatch: pytest.MonkeyPatch) -> None:
    true = passes._rule_numbers
    monkeypatch.setattr(passes, "_rule_numbers", lambda *given: [2.0 * n for n in true(*given)])
    result = selftest.tried("sgd_momentum", "keras, passes")
    assert result.passed is False
    assert result.worst > 1.0


def test_it_fails_where_xla_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyupdate.tensorflow.traced.why_uncompiled", lambda variables: "no")
    result = selftest.tried("sgd_momentum")
    assert result.passed is False
    assert result.reason == "stepped by TensorFlow without XLA: no"
