# SPDX-License-Identifier: Apache-2.0
"""``make demo-tf``: what it says, and that its exit status stands for it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tensorflow", reason="tensorflow is not installed: pyupdate[tensorflow]")

from pyupdate.tensorflow import passes

DEMO = Path(__file__).resolve().parents[1] / "examples" / "digits_keras.py"


@pytest.mark.slow
def test_the_demo() -> None:
    done = subprocess.run([sys.executable, str(DEMO)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"^test accuracy +([0-9.]+) %", done.stdout, flags=re.M)
    assert found is not None
    assert float(found.group(1)) >= 97.0
    path = "XLA" if passes.why_not() else passes.PATH
    assert f"trained on         {path}, in a tf.function" in done.stdout
    assert len(re.findall(r"^epoch ", done.stdout, flags=re.M)) == 12  # no terminal: a line each
    for contestant in ("pyupdate", "Keras apply, eager", "Keras apply in a", "Keras apply, jit"):
        assert re.search(rf"^  {contestant}.* us", done.stdout, flags=re.M)


@pytest.mark.slow
def test_a_disturbed_measurement_is_called_one_here_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn", reason="the demo's images are scikit-learn's")
    pytest.importorskip("torch", reason="the gauge is torch's")
    monkeypatch.setattr(sys, "path", [str(DEMO.parent), *sys.path])
    import digits_keras
    from pyupdate.bench import timing, watch

    monkeypatch.setattr(digits_keras.handwritten, "SECONDS", 0.0)
    monkeypatch.setattr(timing, "CALIBRATION", 1 << 10)
    monkeypatch.setattr(watch.Gauge, "read", lambda self: 1.0)
    monkeypatch.setattr(timing, "others", lambda: lambda: 0.6)
    monkeypatch.setattr(digits_keras, "train", lambda *_: 0.0)
    monkeypatch.setattr(digits_keras, "path_of", lambda _: "nothing")
    assert digits_keras.main() == 1  # it is not trained
    lines = capsys.readouterr().out.splitlines()
    of_keras = [line for line in lines if line.startswith("  Keras apply")]
    assert len(of_keras) == 3
    assert all("(says little: others took 60 % of the processors" in line for line in of_keras)
