# SPDX-License-Identifier: Apache-2.0
"""Records become files: JSON, pictures, and the tables of docs/benchmarks.md and README.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matrix
import pictures
import ratios
import tables

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "benchmarks.md"
README = ROOT / "README.md"
MARK = "<!-- results -->"
MARK_OF_README = "<!-- benchmark -->"
RESULTS = ROOT / "benchmarks" / "results"

Record = dict[str, Any]


def publish(
    records: list[Record],
    folder: Path,
    *,
    absent: dict[str, str],
    document: Path = DOCUMENT,
    readme: Path = README,
) -> list[Record]:
    """Write all that is made of records, and of what was published there of other cells.

    Args:
        records: one a cell.
        folder: for ``matrix.jsonl``, ``latest.json`` (the targets) and the pictures; where it is
            not benchmarks/results, for ``tables.md`` too, and the documents stay as they are.
        absent: who was not compared, and why.
        document: where the tables stand between two marks.
        readme: where the table of targets stands between two others.

    Returns:
        All that is published now.
    """
    folder.mkdir(parents=True, exist_ok=True)
    steps = beside([one for one in records if one["section"] != "targets"], folder)
    lines = "".join(json.dumps(record) + "\n" for record in steps)
    (folder / "matrix.jsonl").write_text(lines)
    pairs = targets([one for one in records if one["section"] == "targets"], folder)
    shown = [
        f"![{pictures.SAYS[path.stem]}](../benchmarks/results/{path.name})\n"
        for path in pictures.draw(steps, folder)
    ]
    failed = [one for one in records if one["section"] == "targets" and "why_not" in one]
    text = "\n".join([*shown, tables.as_markdown([*steps, *failed], absent, pairs)])
    if folder == RESULTS:
        document.write_text(between(document.read_text(), text))
        if all(kind in _kinds(pairs, w) for w in ratios.WORKLOADS.values() for kind in w.targets):
            table = ratios.as_markdown(pairs) + "\n"
            readme.write_text(between(readme.read_text(), table, MARK_OF_README))
    else:
        (folder / "tables.md").write_text(text)
    return [*steps, *pairs, *failed]


def beside(records: list[Record], folder: Path) -> list[Record]:
    """Records, and in the matrix's order the published ones of other cells that can stand there."""
    path = folder / "matrix.jsonl"
    ran = [record for record in records if "why_not" not in record]
    found = {record["key"]: record for record in records}
    for line in path.read_text().splitlines() if path.exists() and ran else ():
        old = json.loads(line)
        stands = "machine" in old and ratios.same(old["machine"], ran[0]["machine"])
        if stands and old["scale"] == ran[0]["scale"]:
            found.setdefault(old["key"], old)
    return [found[cell.key] for cell in matrix.cells() if cell.key in found]


def targets(records: list[Record], folder: Path) -> list[Record]:
    """Keep what was measured of the targets; all that is known of them now."""
    path = folder / "latest.json"
    pairs = [
        {key: value for key, value in one.items() if key not in ("key", "pair", "section", "of")}
        | {"workload": one["pair"][0], "kind": one["pair"][1]}
        for one in records
        if "why_not" not in one
    ]
    if pairs:
        return ratios.keep(path, pairs)
    return ratios.read(path) if path.exists() else []


def _kinds(pairs: list[Record], workload: Any) -> set[str]:
    return {one["kind"] for one in pairs if one["workload"] == workload.name}


def between(document: str, text: str, mark: str = MARK) -> str:
    """The document with another text between its marks."""
    before, _, after = document.split(mark)
    return f"{before}{mark}\n{text}{mark}{after}"
