# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/benchmarks.md, from the matrix's records."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from matrix import SECTIONS, cells

from pyupdate.bench.contestants import OURS
from pyupdate.bench.timing import disturbed

Record = dict[str, Any]
STEPS = ("kinds", "rules", "dtypes", "backends", "host")
"""Sections whose records are steps of several contestants."""


def as_markdown(records: list[Record], absent: dict[str, str]) -> str:
    """All of them, with the machine, what failed, and who was absent."""
    ran = [record for record in records if "why_not" not in record]
    if not ran:
        return "Nothing was measured.\n"
    parts = [where(ran)]
    for section, question in SECTIONS.items():
        of = [record for record in ran if record["section"] == section]
        if of:
            parts.append(f"### {question[0].upper()}{question[1:]}\n\n{table(section, of)}")
    parts.append(left_out(records, absent))
    return "\n".join(parts)


def where(ran: list[Record]) -> str:
    """The machine, and when."""
    machine = ran[0]["machine"]
    times = sorted(record["machine"]["time"] for record in ran)
    commits = sorted({record["commit"] for record in ran if record["commit"]})
    marked = sum(disturbed(record) for record in ran)
    return (
        f"{machine['machine']}, {machine['processors']} processors; Python {machine['python']}, "
        f"torch {machine['torch']}; pyupdate {machine['pyupdate']}, back end "
        f"{machine['backend']} ({machine['instruction_set']}, {machine['compiler']}). "
        f"{len(ran)} of {len(list(cells()))} cells, {times[0][:16]} to {times[-1][:16]} UTC, "
        f"commits {', '.join(commits) or 'unknown'}; {marked} disturbed, marked \\*.\n"
    )


def table(section: str, records: list[Record]) -> str:
    """The records of one section."""
    if section in STEPS:
        return of_steps(records)
    if section == "costs":
        return of_costs(records)
    if section == "training":
        return of_training(records)
    return of_growth(records)


def rows(head: Iterable[str], body: Iterable[Iterable[str]]) -> str:
    """A table in Markdown; all columns but the first to the right."""
    names = list(head)
    lines = [
        f"| {' | '.join(names)} |",
        "|---|" + "---:|" * (len(names) - 1),
        *(f"| {' | '.join(cells)} |" for cells in body),
    ]
    return "\n".join(lines) + "\n"


def of_steps(records: list[Record]) -> str:
    """Ours in ms with quartiles, GB/s, % of the stream; the others' times over ours."""
    names = list(dict.fromkeys(name for record in records for name in record["ratio"]))
    head = ["", "ours, ms", "quartiles", "GB/s", "of stream", *(f"{n} / ours" for n in names)]
    return rows(head, (_step(record, names) for record in records))


def _step(record: Record, names: list[str]) -> list[str]:
    low, high = record["quartiles_ms"][OURS]
    speed, part = record["GBps"][OURS], record["of_stream"]
    return [
        _called(record),
        f"{record['ms'][OURS]:.3g}",
        f"{low:.3g} - {high:.3g}",
        f"{speed:.1f}" if speed is not None else "",
        f"{100 * part:.0f} %" if part is not None else "",
        *(_times(record, name) for name in names),
    ]


def _times(record: Record, name: str) -> str:
    if name in record["failed"]:
        return "failed"
    return f"{record['ratio'][name]:.2f}x" if name in record["ratio"] else ""


def _called(record: Record) -> str:
    """Model, tensors and parameters, what differs from the plain AdamW, and the mark."""
    said = [record["of"]]
    if record["section"] == "host":
        said = [f"{record['of']} tensors of one element"]
    elif record["section"] == "kinds":
        tensors = f"{record['tensors']:,} tensor{'s' if record['tensors'] > 1 else ''}"
        said.append(f"({tensors}, {record['elements'] / 1e6:.3g}M)")
    if record["section"] == "rules":
        said = [record["rule"], *([] if record["of"] == "ResNet-50" else [f"({record['of']})"])]
    else:
        said.append(record["kind"])
    if record["dtype"] != "float32":
        said.append(record["dtype"])
    return " ".join(said) + (" \\*" if disturbed(record) else "")


def of_growth(records: list[Record]) -> str:
    """Milliseconds of everybody against a number."""
    names = list(dict.fromkeys(name for record in records for name in record["ms"]))
    head = [records[0]["section"], "threads", *(f"{name}, ms" for name in names)]
    body = (
        [
            f"{int(record['of']):,}" + (" \\*" if disturbed(record) else ""),
            str(record["threads"]),
            *(f"{record['ms'][n]:.3g}" if n in record["ms"] else "" for n in names),
        ]
        for record in records
    )
    return rows(head, body)


def of_costs(records: list[Record]) -> str:
    """First step, third step and memory of every contestant; then the imports."""
    texts = []
    for record in records:
        body = (
            [
                name,
                f"{one['first_ms']:.1f}",
                f"{one['third_ms']:.1f}",
                f"{one['peak_bytes']:.1f}",
            ]
            for name, one in record["costs"].items()
        )
        called = f"{record['of']}, {record['rule']}, {record['kind']}"
        head = [called, "first step, ms", "third step, ms", "peak memory, bytes a parameter"]
        imports = record["import_ms"]
        texts.append(
            rows(head, body)
            + f"\nImporting pyupdate takes {imports['pyupdate']:.0f} ms after torch, which takes "
            f"{imports['torch']:.0f} ms. Peak memory is above parameters and gradients; the state "
            "of AdamW is 8 bytes of it.\n"
        )
    return "\n".join(texts)


def of_training(records: list[Record]) -> str:
    """Forward and backward, the update, its share, and what the whole step gains."""
    body = []
    for record in records:
        total = {n: one["backward_ms"] + one["update_ms"] for n, one in record["training"].items()}
        for name, one in record["training"].items():
            gain = total[name] / total[OURS]
            body.append(
                [
                    f"{record['of']}, {record['elements'] / 1e6:.1f}M, {record['batch']}: {name}",
                    f"{one['backward_ms']:.2f}",
                    f"{one['update_ms']:.2f}",
                    f"{100 * record['share'][name]:.0f} %",
                    f"{gain:.2f}x",
                ]
            )
    head = ["", "forward and backward, ms", "update, ms", "its share", "whole step / ours"]
    return rows(head, body)


def left_out(records: list[Record], absent: dict[str, str]) -> str:
    """Who failed or was not there, and the cells that could not be measured."""
    lines = [f"- {name}: {why}" for name, why in absent.items()]
    failed = {
        (name, why): record["key"]
        for record in records
        for name, why in record.get("failed", {}).items()
    }
    lines += [f"- {name}, in `{key}`: {why}" for (name, why), key in failed.items()]
    lines += [f"- `{r['key']}`: {r['why_not']}" for r in records if "why_not" in r]
    return "### Who was not timed, and why\n\n" + "\n".join(lines or ["Nobody."]) + "\n"
