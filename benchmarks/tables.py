# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/benchmarks.md, from the matrix's records."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable
from typing import Any

import stamp
from matrix import SECTIONS, cells

from pyupdate.bench.contestants import OURS
from pyupdate.bench.timing import disturbed

Record = dict[str, Any]
STEPS = ("kinds", "rules", "compiled", "dtypes", "backends", "host")
"""Sections whose records are steps of several contestants."""


def as_markdown(records: list[Record], absent: dict[str, str], pairs: Iterable[Record] = ()) -> str:
    """All of them, with the machine, what failed, and who was absent.

    Args:
        records: one a cell, but for the targets.
        absent: who was not compared, and why.
        pairs: of the targets, as `ratios.cell` makes them.
    """
    targets = list(pairs)
    ran = [record for record in records if "why_not" not in record]
    if not ran and not targets:
        return "Nothing was measured.\n"
    newest = max([*ran, *targets], key=lambda one: one["machine"]["time"])
    marked = [one | {"mark": mark(one, newest)} for one in ran]
    parts = [where(ran, targets, newest)]
    for section, question in SECTIONS.items():
        of = [record for record in marked if record["section"] == section]
        if section == "targets":
            of = [one | {"mark": mark(one, newest)} for one in targets]
        if of:
            parts.append(f"### {question[0].upper()}{question[1:]}\n\n{table(section, of)}")
    parts.append(left_out(records, absent))
    return "\n".join(parts)


def mark(record: Record, newest: Record) -> str:
    """An asterisk where others disturbed, a dagger where the sources were older ones."""
    found = "\\*" if disturbed({"moved": _moved(record)} | record) else ""
    old = record.get("sources") != newest.get("sources")
    return (" " if found or old else "") + found + ("†" if old else "")


def _moved(record: Record) -> float:
    """Of a pair whose record does not say it itself."""
    return max((one["moved"] for one in record.get("processes", ())), default=0.0)


def where(ran: list[Record], targets: list[Record], newest: Record) -> str:
    """The machine, when, and of which sources."""
    machine = newest["machine"]
    every = [*ran, *targets]
    times = sorted(record["machine"]["time"] for record in every)
    commits = Counter(stamp.said(record) for record in every)
    said = ", ".join(f"{commit} ({count} cells)" for commit, count in commits.most_common())
    disturbances = sum("*" in mark(record, newest) for record in every)
    old = sum("†" in mark(record, newest) for record in every)
    return (
        f"{machine['machine']}, {machine['processors']} processors; Python {machine['python']}, "
        f"torch {machine['torch']}; pyupdate {machine['pyupdate']}, back end "
        f"{machine['backend']} ({machine['instruction_set']}, {machine['compiler']}). "
        f"{len(every)} of {len(list(cells()))} cells, {times[0][:16]} to {times[-1][:16]} UTC. "
        f"Each was measured at the commit that its record names: {said}; {disturbances} disturbed, "
        f"marked \\*; {old} of other sources than the newest, marked †.\n"
    )


def table(section: str, records: list[Record]) -> str:
    """The records of one section."""
    if section in STEPS:
        return of_steps(records)
    if section == "targets":
        return of_targets(records)
    if section == "costs":
        return of_costs(records)
    if section == "training":
        return of_training(records)
    if section == "apart":
        return of_apart(records)
    return of_growth(records)


def of_targets(pairs: list[Record]) -> str:
    """What is reached, what bare loops allow at most, and the target."""
    head = ["", "against", "its ms", "ours, ms", "ours, GB/s", "reached", "in each process"]
    return rows([*head, "at most", "target"], (_target(one) for one in pairs))


def _target(one: Record) -> list[str]:
    its, ours = (
        statistics.median(process[name] for process in one["processes"])
        for name in ("baseline_ms", "pyupdate_ms")
    )
    each = sorted(process["ratio"] for process in one["processes"])
    return [
        f"{one['workload']}, {one['kind']}{one['mark']}",
        one["baseline"],
        f"{its:.3g}",
        f"{ours:.3g}",
        f"{one['pyupdate_GBps']:.1f}",
        f"{one['ratio']:.2f}x",
        " ".join(f"{ratio:.2f}" for ratio in each),
        f"{one['at_most']:.2f}x" if one.get("at_most") is not None else "",
        f"{one['target']:.2f}x" if one["target"] is not None else "",
    ]


def of_apart(records: list[Record]) -> str:
    """Ours in ms, and the others' times over ours, of peers in processes of their own."""
    names = list(dict.fromkeys(name for record in records for name in record["ratio"]))
    body = (
        [
            f"{record['of']} ({record['tensors']:,} tensors, {record['elements'] / 1e6:.3g}M) "
            f"{record['kind']}{record['mark']}",
            f"{record['ms'][OURS]:.3g}",
            *(_times(record, name) for name in names),
        ]
        for record in records
    )
    return rows(["", "ours, ms", *(f"{name} / ours" for name in names)], body)


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
    return " ".join(said) + record["mark"]


def of_growth(records: list[Record]) -> str:
    """Milliseconds of everybody against a number."""
    names = list(dict.fromkeys(name for record in records for name in record["ms"]))
    head = [records[0]["section"], "threads", *(f"{name}, ms" for name in names)]
    body = (
        [
            f"{int(record['of']):,}{record['mark']}",
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
        called = f"{record['of']}, {record['rule']}, {record['kind']}{record['mark']}"
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
                    f"{record['of']}, {record['elements'] / 1e6:.1f}M, {record['batch']}: "
                    f"{name}{record['mark']}",
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
