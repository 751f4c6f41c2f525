# SPDX-License-Identifier: Apache-2.0
"""Which sources a figure is of: the commit, whether something was changed since, and a digest."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MEASURED = ("pyupdate/**/*.py", "pyupdate/_C*.so", "pyupdate/_cuda*.so", "kernels/**/*.py")
"""What runs when a step of ours is timed; the compiled modules, not what they are compiled from."""
DECIDES = ("pyupdate", "kernels", "csrc", "benchmarks/*.py", "CMakeLists.txt", "setup.py")
"""For git: what a figure depends on. Not the results, which a run writes itself."""


def stamp() -> dict[str, Any]:
    """``commit`` and ``dirty``, None outside a checkout of git; ``sources``, the digest."""
    commit = _git("rev-parse", "--short=12", "HEAD")
    changed = _git("status", "--porcelain", "--", *DECIDES) if commit else None
    return {
        "commit": commit,
        "dirty": None if changed is None else bool(changed),
        "sources": digest(),
    }


def digest() -> str:
    """Of the names and bytes of what is `MEASURED`: equal where the same code runs."""
    made = hashlib.sha256()
    for path in sorted(path for pattern in MEASURED for path in ROOT.glob(pattern)):
        made.update(f"{path.relative_to(ROOT)}\n".encode())
        made.update(hashlib.sha256(path.read_bytes()).digest())
    return made.hexdigest()[:12]


def said(record: dict[str, Any]) -> str:
    """The commit of a record, for a table."""
    if not record.get("commit"):
        return "no commit"
    changed = record.get("dirty") or record.get("changed_meanwhile")
    return f"{record['commit']} with changes" if changed else str(record["commit"])


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
