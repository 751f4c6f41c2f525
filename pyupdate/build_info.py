# SPDX-License-Identifier: Apache-2.0
"""What the build left behind: whether the compiled module was made, and if not, why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_FILE = Path(__file__).with_name("_build_info.json")


def build_info() -> dict[str, Any]:
    """The record of the build; empty if there is none (a plain checkout on the path)."""
    try:
        found: dict[str, Any] = json.loads(_FILE.read_text())
    except (OSError, ValueError):
        return {}
    return found


def reason_not_compiled() -> str | None:
    """Why the install has no compiled module, None if it has one or nobody knows."""
    info = build_info()
    if not info:
        return "not built: install the package with pip, or run `make` in a checkout"
    return None if info.get("compiled") else str(info.get("reason") or "the build gave no reason")


def reason_no_cuda() -> str | None:
    """Why the install has no CUDA module, None if it has one or nobody knows."""
    info = build_info()
    if not info:
        return reason_not_compiled()
    found = info.get("cuda") or {}
    if found.get("built"):
        return None
    return f"not built: {found.get('reason') or 'the build gave no reason'}"
