# SPDX-License-Identifier: Apache-2.0
"""The pictures of a matrix: SVG, the same bytes for the same records, legible on dark pages.

Colours are Okabe and Ito's, which the colour-blind tell apart; lines differ by their marks too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from measured import TORCHS, against

from pyupdate.bench.contestants import BASELINE, OURS

Record = dict[str, Any]

COLOURS = {
    OURS: "#0072B2",
    BASELINE: "#D55E00",
    "torch foreach": "#009E73",
    "torch loop": "#7A7A7A",
}
MARKS = {OURS: "o", BASELINE: "s", "torch foreach": "^", "torch loop": "D"}
SHADES = {"step": "#9CCBE8", "full": "#0072B2", "average": "#003F63"}
SAID = {
    "step": "the step alone",
    "full": "unscale, check, clip, step",
    "average": "that and a moving average",
}
INK = "#222222"
STYLE = {
    "savefig.facecolor": "white",
    "svg.hashsalt": "pyupdate",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}


def draw(records: list[Record], folder: Path) -> list[Path]:
    """Write every picture that there are records for; their paths."""
    ran = [record for record in records if "why_not" not in record]
    made = []
    with matplotlib.rc_context(STYLE):
        for name, picture in PICTURES.items():
            figure = picture(ran)
            if figure is not None:
                path = folder / f"{name}.svg"
                figure.savefig(
                    path, metadata={"Date": None}, facecolor="white", bbox_inches="tight"
                )
                made.append(path)
    return made


def ratios(ran: list[Record]) -> Figure | None:
    """Bars: torch fused's time over ours, by model and kind of step."""
    found = {
        (r["of"], r["kind"]): r["ratio"][BASELINE]
        for r in ran
        if r["section"] == "kinds" and BASELINE in r["ratio"] and r["kind"] in SHADES
    }
    models = list(dict.fromkeys(model for model, _ in found))
    if not models:
        return None
    sizes = {r["of"]: f"{r['of']}\n{_count(r)}" for r in ran if r["section"] == "kinds"}
    figure, axes = _figure(8.0, 0.62 * len(models) + 1.5)
    for i, model in enumerate(models):
        for j, (kind, colour) in enumerate(SHADES.items()):
            if (model, kind) in found:
                value = found[model, kind]
                at = i + 0.27 * (j - 1)
                axes.barh(at, value, 0.25, color=colour, label=SAID[kind] if i == 0 else None)
                _label(axes, value, at, f"{value:.1f}x")
    axes.set_yticks(range(len(models)), [sizes[model] for model in models], fontsize=8.5)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_title("AdamW, float32: torch's fused step takes so many times ours")
    return _bars(figure, axes, "time of torch fused / time of pyupdate", _machine(ran))


def rules(ran: list[Record]) -> Figure | None:
    """Bars: torch's fastest way over ours, by optimizer."""
    found = []
    for record in ran:
        name = against(record) if record["section"] == "rules" else None
        if name is not None:
            torchs = [n for n in record["ratio"] if n in TORCHS]
            best = min(torchs, key=lambda n: record["ratio"][n])
            found.append((record["ratio"][best], record["rule"], best))
    if not found:
        return None
    figure, axes = _figure(8.0, 0.3 * len(found) + 1.5)
    for i, (value, _, best) in enumerate(sorted(found)):
        axes.barh(i, value, 0.7, color=COLOURS.get(best, "#CC79A7"))
        _label(axes, value, i, f"{value:.1f}x  {best}")
    axes.set_yticks(range(len(found)), [rule for _, rule, _ in sorted(found)])
    axes.margins(x=0.2)
    axes.set_title("The plain step of ResNet-50 (Muon: a ViT block): torch's fastest way over ours")
    return _bars(figure, axes, "time of torch's fastest / time of pyupdate", _machine(ran))


def growth(ran: list[Record]) -> Figure | None:
    """Lines: milliseconds against tensors and against elements, both axes by powers of ten."""
    sections = {
        "tensors": "number of tensors, 64 elements each",
        "elements": "elements of one tensor",
    }
    sections = {s: label for s, label in sections.items() if any(r["section"] == s for r in ran)}
    if not sections:
        return None
    figure = Figure(figsize=(4.0 * len(sections), 3.9), layout="constrained")
    both = figure.subplots(1, len(sections), squeeze=False)[0]
    for axes, (section, label) in zip(both, sections.items(), strict=True):
        for name in MARKS:
            for threads, line in ((2, "-"), (1, ":")):
                if threads == 1 and name not in (OURS, BASELINE):
                    continue  # theirs lie beneath one another
                points = [
                    (int(r["of"]), r["ms"][name])
                    for r in ran
                    if r["section"] == section and r["threads"] == threads and name in r["ms"]
                ]
                if points:
                    axes.plot(
                        *zip(*sorted(points), strict=True),
                        line,
                        color=COLOURS[name],
                        marker=MARKS[name],
                        markersize=4 if threads == 2 else 2.5,
                        linewidth=1.6 if threads == 2 else 1.0,
                        label=name + ("" if threads == 2 else ", 1 thread"),
                    )
        axes.set(xscale="log", yscale="log", xlabel=label, ylabel="milliseconds a step")
        axes.grid(True, which="major", color="#E4E4E4", linewidth=0.7)
        axes.set_axisbelow(True)
    both[0].legend(fontsize=8)
    figure.suptitle("AdamW, float32, 2 threads: the step alone", x=0.01, ha="left", fontsize=11)
    figure.supxlabel(_machine(ran), fontsize=8.5)
    return figure


def bandwidth(ran: list[Record]) -> Figure | None:
    """Bars: GB/s of the least bytes, as part of what a bare loop over seven streams reaches."""
    found = [
        r
        for r in ran
        if r["section"] == "kinds" and r["kind"] == "full" and r["stream_GBps"] and r["GBps"][OURS]
    ]
    if not found:
        return None
    figure, axes = _figure(8.0, 0.5 * len(found) + 1.5)
    for i, record in enumerate(found):
        for j, name in enumerate((OURS, BASELINE)):
            if record["GBps"].get(name):
                part = 100.0 * record["GBps"][name] / record["stream_GBps"]
                at = i + 0.38 * (j - 0.5)
                axes.barh(at, part, 0.35, color=COLOURS[name], label=name if i == 0 else None)
                _label(axes, part, at, f"{record['GBps'][name]:.0f} GB/s")
    axes.set_yticks(range(len(found)), [f"{r['of']}\n{_count(r)}" for r in found], fontsize=8.5)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_title("The full step's least bytes a second, of what a bare stream moves here")
    return _bars(figure, axes, "% of a bare loop over AdamW's seven streams", _machine(ran), 100.0)


def training(ran: list[Record]) -> Figure | None:
    """Stacked bars: forward and backward, and the update."""
    found = [record for record in ran if record["section"] == "training"]
    if not found:
        return None
    figure, axes = _figure(8.0, 0.9 * len(found) + 1.5)
    labels, at = [], 0.0
    for record in found:
        for name, one in record["training"].items():
            first = not labels
            axes.barh(
                at,
                one["backward_ms"],
                0.7,
                color="#C8C8C8",
                label="forward and backward" if first else None,
            )
            axes.barh(at, one["update_ms"], 0.7, left=one["backward_ms"], color=COLOURS[name])
            end = one["backward_ms"] + one["update_ms"]
            said = f"update {one['update_ms']:.2f} ms, {100 * record['share'][name]:.0f} %"
            _label(axes, end, at, said)
            labels.append((at, f"{record['of']}\n{name}"))
            at += 1.0
        at += 0.5
    axes.set_yticks(*map(list, zip(*labels, strict=True)), fontsize=8.5)
    axes.invert_yaxis()
    axes.set_title("A whole training step: the update is a part of it")
    axes.margins(x=0.25)
    return _bars(figure, axes, "milliseconds", _machine(ran), None)


SAYS = {
    "ratios": "AdamW: time of torch's fused step over pyupdate's, by model and kind of step",
    "rules": "Plain steps: time of torch's fastest way over pyupdate's, by optimizer",
    "growth": "Milliseconds of a step against the number of tensors and of elements",
    "bandwidth": "Bandwidth of full steps, as part of what a bare stream reaches",
    "training": "Whole training steps, and the update's share of them",
}
"""In words, for who cannot see them."""

PICTURES = {
    "ratios": ratios,
    "rules": rules,
    "growth": growth,
    "bandwidth": bandwidth,
    "training": training,
}


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _label(axes: Any, x: float, y: float, said: str) -> None:
    """A bar's number, behind its end, over the line where nobody is faster."""
    axes.annotate(
        said,
        (x, y),
        (4, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
        zorder=4,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
    )


def _bars(figure: Figure, axes: Any, label: str, machine: str, line: float | None = 1.0) -> Figure:
    """What all bar charts share; `line` is where nobody is faster."""
    if line is not None:
        axes.axvline(line, color="#444444", linewidth=0.9, linestyle=(0, (4, 3)), zorder=3)
    axes.set_xlabel(f"{label}\n{machine}", fontsize=9)
    axes.tick_params(axis="y", length=0)
    if axes.get_legend_handles_labels()[1]:
        figure.legend(fontsize=8.5, loc="outside lower left", ncols=3)
    return figure


def _count(record: Record) -> str:
    tensors = f"{record['tensors']:,} tensor{'s' if record['tensors'] > 1 else ''}"
    return f"{tensors}, {record['elements'] / 1e6:.3g}M"


def _machine(ran: list[Record]) -> str:
    one = ran[0]["machine"]
    return (
        f"{one['machine']}, {one['processors']} processors, torch {one['torch'].split(' ')[0]}, "
        f"{one['time'][:10]}"
    )
