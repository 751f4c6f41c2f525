# SPDX-License-Identifier: Apache-2.0
"""The demos say where its times were taken on a machine that others used."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch
from compiling import ROOT

from pyupdate.bench import timing, watch

# Not imported before it is needed: that takes as long as torch.
pytestmark = pytest.mark.skipif(
    find_spec("sklearn") is None, reason="the demo's images are scikit-learn's"
)


@pytest.fixture
def digits(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(ROOT / "examples"), *sys.path])
    import digits

    monkeypatch.setattr(digits.handwritten, "SECONDS", 0.0)
    monkeypatch.setattr(watch.timing, "CALIBRATION", 1 << 10)
    return digits


def _set_machine(monkeypatch: pytest.MonkeyPatch, others: float | None, *reads: float) -> None:
    readings = iter(reads)
    monkeypatch.setattr(watch.Gauge, "read", lambda self: next(readings))
    taken: Callable[[], float | None] = lambda: others  # noqa: E731
    monkeypatch.setattr(timing, "others", lambda: taken)


@pytest.mark.parametrize(
    ("others", "last", "said"),
    [
        (0.0, 1.0, None),
        (None, 1.0, None),
        (0.6, 1.0, "others took 60 % of the processors"),
        (0.0, 2.0, "the speed of memory changed by 100 %"),
        (None, 2.0, "the speed of memory changed by 100 %"),
    ],
)
def test_a_disturbed_measurement_is_called_one_on_its_line(
    digits: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    others: float | None,
    last: float,
    said: str | None,
) -> None:
    _set_machine(monkeypatch, others, 1.0, 1.0, last)  # the first is the gauge's own
    contestants = {"pyupdate": lambda: None, "torch": lambda: torch.ones(1000).sum()}
    digits.handwritten.report_times(*digits.handwritten.timed(contestants))
    ours, theirs = capsys.readouterr().out.splitlines()
    assert "says little" not in ours
    assert " x" in theirs
    if said is None:
        assert "says little" not in theirs
    else:
        assert f"(says little: {said} meanwhile)" in theirs


def test_without_torch_nobody_looks(
    digits: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _set_machine(monkeypatch, 0.6, 1.0, 1.0, 2.0)
    monkeypatch.setattr(digits.handwritten, "find_spec", lambda name: None)
    contestants = {"pyupdate": lambda: None, "Keras": lambda: torch.ones(1000).sum()}
    digits.handwritten.report_times(*digits.handwritten.timed(contestants))
    assert "says little" not in capsys.readouterr().out
