# SPDX-License-Identifier: Apache-2.0
"""``python -m pyupdate`` where an import ends the process, or a chosen back end cannot run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from test_doctor import answer, checkout, reasons, run

__all__ = ["checkout"]

KILLS = "import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n"


@pytest.mark.parametrize("name", ["torch", "numpy"])
@pytest.mark.parametrize("error", ["SystemExit('not here')", "BaseException('not here')"])
def test_an_import_that_raises_more_than_an_exception(
    checkout: Path, name: str, error: str
) -> None:
    (checkout / f"{name}.py").write_text(f"raise {error}\n")
    found = answer(checkout)
    kind = error.partition("(")[0]
    assert f"{kind}: not here" in str(found["problems"]) + str(found["backends"])
    done = run(checkout, "--selftest")
    assert done.returncode == 1
    assert "self-test: FAILED" in done.stdout
    assert "not here" in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_numpy_that_kills_the_process_is_named_instead_of_torch(checkout: Path) -> None:
    (checkout / "numpy.py").write_text(KILLS)
    found = answer(checkout)
    said = "importing numpy kills the process (SIGILL)"
    assert found["problems"]["import of numpy"] == said
    assert "importing torch" not in str(found)
    assert "importing numpy" in str(reasons(found)) or found["backend"] is not None
    done = run(checkout)
    assert said in done.stdout


def test_the_verdict_says_why_where_the_chosen_back_end_cannot_run(checkout: Path) -> None:
    done = run(checkout, "--selftest", PYUPDATE_BACKEND="cpu", KERAS_BACKEND="none")
    assert done.returncode == 1
    verdict = done.stdout.splitlines()[-1]
    assert verdict.startswith("self-test: FAILED: ")
    assert "but RuntimeError: PYUPDATE_BACKEND: back end 'cpu' cannot run here" in verdict


@pytest.mark.parametrize(
    ("end", "status", "said"),
    [
        ("sys.exit(3)", 3, ""),
        ("os.kill(os.getpid(), signal.SIGABRT)", 134, "python -m pyupdate was ended by SIGABRT\n"),
    ],
)
def test_the_command_ends_as_the_child_that_goes_on(end: str, status: int, said: str) -> None:
    text = f"import os, signal, sys\nfrom pyupdate import info\ninfo.in_a_child()\n{end}\n"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=300)
    assert done.returncode == status
    assert done.stderr == said
