# SPDX-License-Identifier: Apache-2.0
"""Records become files: JSON lines, pictures, and the tables of docs/benchmarks.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pictures
import tables

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"
MARK = "<!-- results -->"
RESULTS = DOCUMENT.parent.parent / "benchmarks" / "results"


def publish(
    records: list[dict[str, Any]],
    folder: Path,
    *,
    absent: dict[str, str],
    document: Path = DOCUMENT,
) -> None:
    """Write all that is made of records.

    Args:
        records: one a cell, in the order of the matrix.
        folder: for ``matrix.jsonl`` and the pictures; where it is not benchmarks/results, for
            ``tables.md`` too, and the document stays as it is.
        absent: who was not compared, and why.
        document: where the tables stand between two marks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "matrix.jsonl").write_text(lines)
    shown = [
        f"![{pictures.SAYS[path.stem]}](../benchmarks/results/{path.name})\n"
        for path in pictures.draw(records, folder)
    ]
    text = "\n".join([*shown, tables.as_markdown(records, absent)])
    if folder == RESULTS:
        document.write_text(between(document.read_text(), text))
    else:
        (folder / "tables.md").write_text(text)


def between(document: str, text: str) -> str:
    """The document with another text between its marks."""
    before, _, after = document.split(MARK)
    return f"{before}{MARK}\n{text}{MARK}{after}"
