# SPDX-License-Identifier: Apache-2.0
"""What docs/tensorflow.md and the docstrings of the TensorFlow half show works when pasted."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tensorflow", reason="tensorflow is not installed: pyupdate[tensorflow]")

ROOT = Path(__file__).resolve().parents[1]
HALF = sorted(path.stem for path in (ROOT / "pyupdate" / "tensorflow").glob("[a-z]*.py"))
MODULES = ["keras_optim", *(f"tensorflow.{name}" for name in HALF)]


def test_the_blocks_of_the_page() -> None:
    text = (ROOT / "docs" / "tensorflow.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S)
    assert blocks
    session: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks:
        exec(compile(block, "docs/tensorflow.md", "exec"), session)


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module(name: str) -> None:
    failed, _ = doctest.testmod(importlib.import_module(f"pyupdate.{name}"))
    assert failed == 0
