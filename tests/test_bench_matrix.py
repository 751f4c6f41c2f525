# SPDX-License-Identifier: Apache-2.0
"""The machinery of `make bench`, on records that nobody measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import pyupdate
from pyupdate.bench.contestants import OURS, Contestant, Workload
from pyupdate.bench.truth import WrongError

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import budget  # noqa: E402 - benchmarks are scripts, not a package
import matrix  # noqa: E402
import proofs  # noqa: E402
import publish  # noqa: E402
import ratios  # noqa: E402
import run  # noqa: E402
import server  # noqa: E402
import tables  # noqa: E402

MACHINE = {
    "time": "2026-01-02T03:04:05+00:00",
    "machine": "Linux x86_64, a machine",
    "processors": 2,
    "threads": 2,
    "python": "3.11.7",
    "torch": "2.13.0 (CPU build)",
    "pyupdate": "0.1.0",
    "backend": "cpu",
    "instruction_set": "v4",
    "compiler": "GNU 12",
    "flags": "",
}


def record(cell: matrix.Cell, fused: float = 2.0, moved: float = 0.0, **more):
    """As `measured` makes them: ours takes a millisecond, torch's fused step `fused` of them."""
    found = {
        "key": cell.key,
        **cell.facts(),
        "tensors": 4,
        "elements": 4_000_000,
        "ms": {"torch fused": fused, OURS: 1.0},
        "quartiles_ms": {"torch fused": [fused, fused], OURS: [0.9, 1.25]},
        "ratio": {"torch fused": fused},
        "failed": {},
        "GBps": {"torch fused": 112.0 / fused, OURS: 112.0},
        "stream_GBps": 140.0,
        "of_stream": 0.8,
        "scale": 1.0,
        "moved": moved,
        "commit": "abc",
        "dirty": False,
        "sources": "these",
        "machine": MACHINE,
    }
    return found | more


def pair(cell: matrix.Cell, ratio: float = 2.0, **more):
    """What `run` makes of a target's processes."""
    of, kind = cell.pair
    process = {"ratio": ratio, "baseline_ms": ratio, "pyupdate_ms": 1.0, "moved": 0.0}
    found = {
        "key": cell.key,
        **cell.facts(),
        "pair": [of, kind],
        "workload": of,
        "target": ratios.EVERY[of].targets.get(kind),
        "ratio": ratio,
        "reached": None,
        "at_most": 2.5,
        "baseline": "torch fused",
        "pyupdate_GBps": 112.0,
        "processes": [process | {"ratio": ratio + by} for by in (0.1, -0.1, 0.0)],
        "thrown_away": [],
        "moved": 0.0,
        "others": 0.0,
        "scale": 1.0,
        "commit": "abc",
        "dirty": False,
        "sources": "these",
        "machine": MACHINE,
    }
    return found | more


CELL = matrix.Cell("kinds", "ResNet-50", "step")


# ----- the plan -----------------------------------------------------------------------------------


def test_every_optimizer_and_every_model_has_its_cell() -> None:
    cells = list(matrix.cells())
    assert len({cell.key for cell in cells}) == len(cells)
    assert {cell.rule for cell in cells} == set(pyupdate.optim.CLASSES)
    assert {cell.section for cell in cells} == set(matrix.SECTIONS)
    assert set(matrix.QUICK) <= set(cells) and set(matrix.FIRST) <= set(cells)
    assert {cell.section for cell in matrix.QUICK} == set(matrix.SECTIONS) - {"compiled"}
    assert {c.of for c in cells if c.section == "kinds"} >= {"ResNet-50", "DLRM", "5,000 tiny"}


def test_what_a_cell_steps() -> None:
    mixed = matrix.Cell("dtypes", "ResNet-50", dtype="mixed").workload()
    assert (mixed.dtype, mixed.of_vectors) == (torch.bfloat16, torch.float32)
    assert mixed.elements == 25_557_032 and len(mixed.shapes) == 161
    assert matrix.Cell("tensors", "30").workload().shapes == ((64,),) * 30
    assert matrix.Cell("elements", "1000").workload().shapes == ((1000,),)
    assert matrix.Cell("host", "7").workload().shapes == ((1,),) * 7
    half = matrix.Cell("kinds", "ViT-B/16").workload()
    whole = matrix.Cell("kinds", "ViT-B/16").workload(scale=2.0)
    assert whole.elements == 86_567_656 > half.elements


def test_every_target_and_what_is_held_has_its_cell() -> None:
    pairs = {cell.pair for cell in matrix.cells() if cell.section == "targets"}
    named = {(w.name, kind) for w in ratios.WORKLOADS.values() for kind in w.targets}
    assert pairs == named | set(ratios.HELD) and len(named) == 15
    assert matrix.target("60 x 512x512, 200 x 512", "NAdam").rule == "NAdam"


def test_what_tells_most_comes_first() -> None:
    order = matrix.by_worth(matrix.cells())
    assert (
        set(order) == set(matrix.cells())
        and order[: len(matrix.FIRST) // 2]
        == list(dict.fromkeys(matrix.FIRST))[: len(matrix.FIRST) // 2]
    )
    # Every section has its turn before any is finished.
    assert {cell.section for cell in order[:45]} == set(matrix.SECTIONS) - {"compiled"}
    assert order[-1] not in matrix.FIRST


def test_filters() -> None:
    cells = tuple(matrix.cells())
    lions = matrix.chosen(cells, rules=["Lion"])
    assert [cell.key for cell in lions] == ["rules/ResNet-50/step/Lion/float32/2"]
    assert {c.kind for c in matrix.chosen(cells, sections=["kinds"], kinds=["clip"])} == {"clip"}
    assert matrix.chosen(cells, only="DLRM/full") == [matrix.Cell("kinds", "DLRM", "full")]


# ----- interruptions and minutes ------------------------------------------------------------------


@pytest.fixture
def measuring(monkeypatch, tmp_path):
    """`run` with a fake measurement: what was measured, in order, and a switch to interrupt it."""
    said: list[str] = []
    interrupt_at: list[int] = []

    def in_a_process(cell, server, **_):
        if len(said) in interrupt_at:
            raise KeyboardInterrupt
        said.append(cell.key)
        return pair(cell) if cell.section == "targets" else record(cell)

    monkeypatch.setattr(run, "FOLDER", tmp_path)
    monkeypatch.setattr(run, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(run, "in_a_process", in_a_process)
    monkeypatch.setattr(run, "absent", dict)
    monkeypatch.setattr(run, "digest", lambda: "these")
    monkeypatch.setattr(run.timing, "machine", lambda threads: MACHINE)
    monkeypatch.setattr(publish.pictures, "draw", lambda records, folder: [])
    for section in ("of_apart", "of_costs", "of_training"):
        monkeypatch.setattr(tables, section, lambda records: "")
    return said, interrupt_at, tmp_path


def test_a_run_goes_on_where_it_was_interrupted(measuring) -> None:
    said, interrupt_at, folder = measuring
    interrupt_at.append(2)
    with pytest.raises(KeyboardInterrupt):
        run.main(["--quick"])
    interrupt_at.clear()
    with (folder / "cells.jsonl").open("a") as file:
        file.write('\n{"key": "kinds/')  # half a record
    assert run.main(["--quick"]) == 0
    assert sorted(said) == sorted(cell.key for cell in matrix.QUICK)
    shown = (folder / "tables.md").read_text()
    assert f"{len(said)} of {len(list(matrix.cells()))} cells" in shown
    assert run.main(["--quick"]) == 0 and len(said) == len(matrix.QUICK)


def test_what_was_measured_is_published_when_the_minutes_are_over(measuring, capsys) -> None:
    said, _, folder = measuring
    # Of its sections only two cost little enough for two minutes.
    assert run.main(["--minutes", "0.6", "--section", "costs", "--section", "training"]) == 0
    assert said == [cell.key for cell in matrix.cells() if cell.section == "training"]
    assert "1 cells were not reached" in capsys.readouterr().out
    assert (folder / "tables.md").exists() and (folder / "cells.jsonl").exists()
    assert run.main(["--minutes", "0", "--section", "costs", "--section", "training"]) == 0
    assert len(said) == 3 and "/costs/" in f"/{said[-1]}"


def test_the_whole_matrix_is_published_and_begun_anew(measuring) -> None:
    said, _, folder = measuring
    assert run.main(["--minutes", "0"]) == 0
    assert said == [cell.key for cell in matrix.by_worth(matrix.cells())]
    assert (folder / "last.jsonl").exists() and not (folder / "cells.jsonl").exists()
    kept = json.loads((folder / "results" / "latest.json").read_text())
    assert [(one["workload"], one["kind"]) for one in kept["pairs"]] == [
        (workload.name, kind) for workload, kind in ratios.every_pair()
    ]


def test_a_published_cell_stays_until_it_is_measured_again(measuring) -> None:
    said, _, folder = measuring
    earlier = MACHINE | {"time": "2025-01-01T00:00:00+00:00"}
    lion = matrix.Cell("rules", "ResNet-50", rule="Lion")
    old = [
        record(CELL, commit="old", sources="others", machine=earlier),
        record(lion, machine=MACHINE | {"machine": "another"}),
    ]
    (folder / "matrix.jsonl").write_text("".join(json.dumps(one) + "\n" for one in old))
    run.main(["--only", "rules/ResNet-50/step/SGD"])
    shown = (folder / "tables.md").read_text()
    assert "| ResNet-50 (4 tensors, 4M) step † |" in shown and "| SGD |" in shown
    assert "abc (1 cells)" in shown and "old (1 cells)" in shown and "Lion" not in shown
    run.main(["--only", CELL.key])
    shown = (folder / "tables.md").read_text()
    assert "| ResNet-50 (4 tensors, 4M) step |" in shown and "abc (2 cells)" in shown
    assert len(said) == 2


def test_sources_that_change_during_a_run_lose_no_cell(measuring, monkeypatch) -> None:
    said, _, folder = measuring
    monkeypatch.setattr(run, "digest", lambda: "newer")
    command = ["--section", "host", "--attempts", "1"]
    for _ in range(2):  # the fake records are of "these" sources
        assert run.main(command) == 0
        assert "| 1000 tensors of one element full |" in (folder / "tables.md").read_text()
    assert len(said) == 4


@pytest.mark.parametrize(
    "old",
    [
        {"scale": 2.0},
        {"sources": "others"},
        {"machine": MACHINE | {"torch": "2.12.0"}},
        {"machine": MACHINE | {"compiler": "GNU 13"}},
    ],
    ids=["scale", "sources", "torch", "compiler"],
)
def test_what_cannot_stand_beside_is_measured_again(measuring, old) -> None:
    said, _, folder = measuring
    run.append(folder / "cells.jsonl", record(CELL) | old)
    run.main(["--only", CELL.key])
    assert said == [CELL.key]
    run.main(["--only", CELL.key])
    assert said == [CELL.key]


def test_a_disturbed_cell_is_measured_again_later_and_marked(measuring, monkeypatch) -> None:
    _, _, folder = measuring
    moves = {"clip": iter([0.4, 0.2, 0.3]), "scaler": iter([0.4, 0.1]), "step": iter([0.0])}
    said: list[str] = []

    def in_a_process(cell, server, **_):
        said.append(cell.kind)
        return record(cell, moved=next(moves[cell.kind]))

    monkeypatch.setattr(run, "in_a_process", in_a_process)
    chosen = [a for kind in moves for a in ("--kind", kind)]
    command = ["--section", "kinds", "--only", "ResNet", *chosen]
    assert run.main(command) == 0
    assert said == ["step", "scaler", "clip", "scaler", "clip", "clip"]
    kept = {one["kind"]: one["moved"] for one in run.read(folder / "cells.jsonl")}
    assert kept == {"step": 0.0, "scaler": 0.1, "clip": 0.2}
    text = (folder / "tables.md").read_text()
    assert "clip \\* |" in text and "1 disturbed" in text
    assert run.main(command) == 0 and len(said) == 6  # three attempts are enough
    moves |= {"step": iter([0.4, 0.0]), "full": iter([0.0])}
    monkeypatch.setattr(run, "LATER", 0)
    run.main(["--section", "kinds", "--only", "DLRM"])
    assert said[6:] == ["step", "step", "full"]  # not at the end, which may never come


def test_who_is_there_all_the_time_disturbs_too() -> None:
    assert "1 disturbed" in tables.as_markdown([record(CELL, others=0.2)], {})
    assert "0 disturbed" in tables.as_markdown([record(CELL, others=0.05), record(CELL)], {})
    crowds = [record(CELL, others=others) for others in (0.5, 0.2, 0.3)]
    assert run.quietest(crowds)["others"] == 0.2
    newer = record(CELL, others=0.4, sources="newer")
    assert run.quietest([*crowds, newer])["others"] == 0.4
    assert run.quietest([*crowds, run.without(CELL, "it broke")])["others"] == 0.2


@pytest.mark.slow
def test_a_process_that_fails_is_a_cell_with_a_reason(monkeypatch, capsys) -> None:
    nobody, apart = matrix.Cell("kinds", "nobody"), matrix.Cell("apart", "nobody")
    with server.Server() as one:
        forked, fresh = (run.in_a_process(cell, one, seconds=0.1) for cell in (nobody, apart))
        found = run.in_a_process(matrix.Cell("host", "7", threads=1), one, seconds=0.1)
        assert "there is no cell 'host/7" in found["why_not"]  # it goes on
        with pytest.raises(RuntimeError, match="it took more than 0 s"):
            one.ask("cell", limit=0.0, key=CELL.key, seconds=9.0, scale=1.0, with_peers=False)
    assert forked["why_not"].startswith("ValueError: there is no cell 'kinds/nobody")
    assert "there is no cell 'apart/nobody" in fresh["why_not"] and "machine" not in fresh
    assert "nobody" in capsys.readouterr().err
    known = forked | {"key": CELL.key}
    assert f"`{CELL.key}`: ValueError" in tables.as_markdown([record(CELL), known], {})

    def breaks(*_, **__):
        message = "no such workload"
        raise RuntimeError(message)

    monkeypatch.setattr(ratios, "cell", breaks)
    found = run.in_a_process(matrix.target("1,000 x 256", "step"), one, seconds=0.1)
    assert found["why_not"] == "no such workload"


@pytest.mark.slow
def test_a_cell_in_a_process_of_its_own() -> None:
    with server.Server() as one:
        cell = matrix.Cell("tensors", "1", threads=1)
        found = [run.in_a_process(cell, one, seconds=0.1) for _ in range(2)]
        target = one.target("1,000 x 1", "step", seconds=0.1, bare=True)
    for record_of_it in found:
        assert record_of_it["key"] == cell.key and record_of_it["ms"][OURS] > 0.0
        assert record_of_it["sources"] == run.digest() and "took_s" in record_of_it
    assert target["ratio"] > 0.0 and target["at_most"] > 0.0


def test_minutes_are_spread_over_what_is_left(monkeypatch) -> None:
    cells = [matrix.Cell("kinds", "DLRM", kind) for kind in ("step", "full")]
    target = matrix.target("1,000 x 256", "step")
    now = [0.0]
    monkeypatch.setattr(budget.time, "monotonic", lambda: now[0])
    plan = budget.Budget(1.0, {cell.key: 10.0 for cell in (*cells, target)}, begun=0.0)
    # 60 s, 10 of them for pictures and 20 for making; 2 x 2 turns of warming up and timing.
    assert plan.seconds(cells, 20.0) == 7.5
    assert plan.seconds([*cells, target]) == pytest.approx(20.0 / (2 * 2 + 3 * 2))
    assert plan.seconds(cells) == budget.MOST_S
    assert plan.takes(target, 1.0) == 16.0 and plan.fits(target, 1.0)
    now[0] = 35.0
    assert plan.seconds(cells) == budget.LEAST_S and not plan.fits(target, 1.0)
    assert plan.fits(cells[0], 0.5)
    plan.learn({"key": cells[0].key, "section": "kinds", "took_s": 33.0, "asked_s": 1.5})
    assert plan.fixed(cells[0]) == 30.0 and not plan.fits(cells[0], 0.5)
    assert budget.Budget(None).fits(cells[0], 1e9)


# ----- tables and pictures ------------------------------------------------------------------------


def test_tables_by_hand() -> None:
    costs = {"first_ms": 30.04, "third_ms": 2.0, "peak_bytes": 8.02}
    trained = {
        "torch fused": {"backward_ms": 6.0, "update_ms": 4.0},
        OURS: {"backward_ms": 6.0, "update_ms": 2.0},
    }
    growth = [matrix.Cell("tensors", "20000", threads=n) for n in (2, 1)]
    text = tables.as_markdown(
        [
            record(CELL, failed={"other": "2.0 eps off"}),
            *(record(cell) for cell in growth),
            record(
                matrix.Cell("costs", "ResNet-50", "full"),
                costs={OURS: costs},
                import_ms={"torch": 900.0, "pyupdate": 40.0},
            ),
            record(
                matrix.Cell("training", "transformer", "clip"),
                training=trained,
                share={"torch fused": 0.4, OURS: 0.25},
                batch="8 x 64 tokens",
            ),
        ],
        {"somebody": "not installed"},
    )
    assert "| ResNet-50 (4 tensors, 4M) step | 1 | 0.9 - 1.25 | 112.0 | 80 % | 2.00x |" in text
    assert "| 20,000 | 1 | 2 | 1 |" in text
    assert "| pyupdate | 30.0 | 2.0 | 8.0 |" in text and "takes 40 ms after torch" in text
    assert "8 x 64 tokens: torch fused | 6.00 | 4.00 | 40 % | 1.25x |" in text
    assert "- somebody: not installed" in text and f"- other, in `{CELL.key}`: 2.0 eps off" in text


def test_only_what_stands_between_the_marks_changes() -> None:
    assert publish.between(f"a {publish.MARK} old {publish.MARK} b", "new\n") == (
        f"a {publish.MARK}\nnew\n{publish.MARK} b"
    )
    assert publish.DOCUMENT.read_text().count(publish.MARK) == 2


def test_pictures_are_the_same_bytes_for_the_same_records(tmp_path) -> None:
    cells = [
        record(CELL),
        record(matrix.Cell("kinds", "ResNet-50", "full")),
        record(matrix.Cell("rules", "ResNet-50")),
        *(record(matrix.Cell("tensors", n)) for n in ("1", "10")),
    ]
    made = [publish.pictures.draw(cells, _folder(tmp_path / name)) for name in "ab"]
    assert [path.name for path in made[0]] == [
        "ratios.svg",
        "rules.svg",
        "growth.svg",
        "bandwidth.svg",
    ]
    for first, second in zip(*made, strict=True):
        assert first.read_bytes() == second.read_bytes()
    assert "2.0x" in made[0][0].read_text() and "2026-01-02" in made[0][0].read_text()


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


# ----- proofs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", proofs.COMPOSITE)
def test_composites_are_proven_and_the_wrong_refused(rule: str) -> None:
    workload = Workload("matrices", ((64, 32), (40, 50)))
    for kind in (getattr(torch.optim, rule), getattr(pyupdate.optim, rule)):
        one = Contestant(OURS, workload, "step", kind)
        proofs.check_composite(one, one.optimizer)
        one.optimizer.param_groups[0]["lr"] *= 1.5
        with pytest.raises(WrongError, match="of a move off"):
            proofs.check_composite(one, kind(one.params))
    full = Contestant(OURS, workload, "full", getattr(pyupdate.optim, rule))
    with pytest.raises(ValueError, match="only plain steps"):
        proofs.check_composite(full, full.optimizer)
