# SPDX-License-Identifier: Apache-2.0
"""What the documentation shows works when it is pasted, and names nothing that is absent."""

from __future__ import annotations

import doctest
import importlib
import linecache
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import pyupdate
from pyupdate import optim

ROOT = Path(__file__).resolve().parents[1]
KERAS = ROOT / "docs" / "tensorflow.md"  # tests_tensorflow/ runs what it shows
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
NEEDS_TENSORFLOW = {
    "pyupdate.keras_optim",
    "pyupdate.tensorflow",
    *(f"pyupdate.tensorflow.{path.stem}" for path in (ROOT / "pyupdate/tensorflow").glob("*.py")),
}
NEEDS_TRITON = ("pyupdate.kernels.triton_", "pyupdate.backends.triton_tables")
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(pyupdate.__path__, "pyupdate.")
    if not module.name.endswith("._C") and module.name not in NEEDS_TENSORFLOW
)


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["pyupdate", *MODULES])
def test_the_examples_of_a_module(name: str) -> None:
    if name.startswith(NEEDS_TRITON):
        pytest.importorskip("triton", reason="triton is not installed (make check-device does it)")
    torch.manual_seed(0)
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0


@pytest.mark.parametrize(
    "public",
    [
        *(f"pyupdate.{name}" for name in pyupdate.__all__ if name not in ("__version__", "optim")),
        *(f"pyupdate.optim.{name}" for name in optim.__all__),
    ],
)
def test_what_is_public_has_an_example(public: str) -> None:
    home, _, name = public.rpartition(".")
    value: Any = getattr(importlib.import_module(home), name)
    found = doctest.DocTestFinder(recurse=False).find(value, name)
    assert sum(len(test.examples) for test in found) > 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_python_blocks_of_a_page(page: Path) -> None:
    """They run in order, as if pasted into one session."""
    torch.manual_seed(0)
    session: dict[str, Any] = {"__name__": "__main__"}
    if page == KERAS:
        pytest.skip("tests_tensorflow/test_documentation.py runs them, in a process of its own")
    blocks = re.findall(r"^```python\n(.*?)^```", text_of(page), flags=re.M | re.S)
    if page.name == "README.md":
        assert len(blocks) >= 5
    for number, block in enumerate(blocks):
        name = f"<block {number} of {page.name}>"  # a rule's text is read where Python keeps it
        linecache.cache[name] = (len(block), None, block.splitlines(keepends=True), name)
        exec(compile(block, name, "exec"), session)
    if page.name == "README.md":  # the deferred updates were made, and left nothing behind
        updated = pyupdate.last_update(session["critic"])
        assert updated is not None
        assert not updated.skipped
        assert session["critic"].weight.grad is None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_names_only_what_is_there(page: Path) -> None:
    text = text_of(page)
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert "//" in link or (page.parent / link).exists(), link
    targets = set(re.findall(r"^([a-z0-9-]+):", text_of(ROOT / "Makefile"), flags=re.M))
    assert set(re.findall(r"(?:^    |`)make ([a-z0-9-]+)", text, flags=re.M)) <= targets
    sources = [
        ROOT / "setup.py",
        ROOT / "CMakeLists.txt",
        ROOT / "tests" / "gpu_runs.py",
        *(path for path in (ROOT / "pyupdate").rglob("*.py") if "kernels" not in path.parts),
    ]
    code = "\n".join(map(text_of, sources))
    for variable in re.findall(r"PYUPDATE_[A-Z_]+", text):
        assert variable in code, variable


@pytest.mark.parametrize("choice", ["auto", pytest.param("reference", marks=pytest.mark.slow)])
def test_the_demo(choice: str) -> None:
    """Its own exit status says whether the accuracy and the weights are right."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "digits.py")],
        env={**os.environ, "PYUPDATE_BACKEND": choice},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"^test accuracy +([0-9.]+) %", done.stdout, flags=re.M)
    assert found is not None
    assert float(found.group(1)) >= 97.0
    with pyupdate.use_backend(choice):
        name = pyupdate.backends.backend_for("cpu").name
    assert f"back end {name}" in done.stdout
    assert f"torch {torch.__version__} (" in done.stdout
    assert len(re.findall(r"^epoch ", done.stdout, flags=re.M)) == 12  # no terminal: a line each
    for contestant in ("pyupdate", "torch.optim.AdamW ", "torch.optim.AdamW(fused=True)"):
        assert re.search(rf"^  {re.escape(contestant)} .* us", done.stdout, flags=re.M)


def test_the_rule_of_ones_own() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(ROOT / "examples" / "own_rule.py")],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "loss 0.000000\nweights 1.00 -2.00 3.00 0.50\n"
