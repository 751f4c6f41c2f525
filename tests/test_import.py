# SPDX-License-Identifier: Apache-2.0
"""``import pyupdate`` is light: no framework, nothing printed, nothing started."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def python(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *options, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )


FRAMEWORKS = ("torch", "tensorflow", "keras", "jax", "triton", "numpy", "sklearn")


@pytest.mark.parametrize(
    "statement",
    [
        "import pyupdate",
        "import pyupdate; dir(pyupdate); pyupdate.__version__; pyupdate.build",
        "import pyupdate.kernels.rules",
    ],
)
def test_no_framework_is_imported(statement):
    out = python(
        f"{statement}\nimport sys\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    )
    loaded = out.stdout.split()
    assert "pyupdate" in loaded
    assert [name for name in FRAMEWORKS if name in loaded] == []


def test_nothing_is_printed_and_no_thread_started():
    out = python("import pyupdate, threading\nassert threading.active_count() == 1")
    assert (out.stdout, out.stderr) == ("", "")


def test_what_it_imports_takes_little(record_property, capsys):
    # The time is printed, not asserted: what decides about it is which modules are loaded.
    code = "import time; t = time.perf_counter(); import pyupdate; print(time.perf_counter() - t)"
    fastest = min(float(python(code).stdout) for _ in range(5))
    record_property("seconds", fastest)
    with capsys.disabled():
        print(f" import pyupdate: {1000 * fastest:.1f} ms", end="")
    out = python("import pyupdate", "-X", "importtime")
    loaded = {line.split("|")[-1].strip() for line in out.stderr.splitlines()}
    ours = {name for name in loaded if name.split(".")[0] == "pyupdate"}
    assert ours == {"pyupdate", "pyupdate.build", "pyupdate.frameworks", "pyupdate.options"}


def test_every_public_name_exists():
    code = """
import pyupdate
for name in pyupdate.__all__:
    assert getattr(pyupdate, name) is not None, name
assert set(dir(pyupdate)) == set(pyupdate.__all__)
try:
    pyupdate.no_such_name
except AttributeError as error:
    print(error)
"""
    assert python(code).stdout == "module 'pyupdate' has no attribute 'no_such_name'\n"


def test_star_import_and_submodules():
    code = """
from pyupdate import *
import pyupdate
assert optim.AdamW is pyupdate.optim.AdamW and callable(build) and callable(accelerate)
import pyupdate.build
assert callable(pyupdate.build) or hasattr(pyupdate.build, "build")
"""
    python(code)
