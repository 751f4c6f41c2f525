# SPDX-License-Identifier: Apache-2.0
"""``make demo-tf``: what it says, and that its exit status stands for it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tensorflow", reason="tensorflow is not installed: pyupdate[tensorflow]")

DEMO = Path(__file__).resolve().parents[1] / "examples" / "digits_keras.py"


@pytest.mark.slow
def test_the_demo() -> None:
    done = subprocess.run([sys.executable, str(DEMO)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"^test accuracy +([0-9.]+) %", done.stdout, flags=re.M)
    assert found is not None
    assert float(found.group(1)) >= 97.0
    assert "trained on         XLA, in a tf.function" in done.stdout
    assert len(re.findall(r"^epoch ", done.stdout, flags=re.M)) == 12  # no terminal: a line each
    for contestant in ("pyupdate", "Keras apply, eager", "Keras apply in a", "Keras apply, jit"):
        assert re.search(rf"^  {contestant}.* us", done.stdout, flags=re.M)
