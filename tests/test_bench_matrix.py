# SPDX-License-Identifier: Apache-2.0
"""The machinery of `make bench` and `make bench-check`, on records that nobody measured."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import pyupdate
from pyupdate.bench.contestants import OURS, Contestant, Workload
from pyupdate.bench.truth import WrongError

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gate  # noqa: E402 - benchmarks are scripts, not a package
import matrix  # noqa: E402
import proofs  # noqa: E402
import publish  # noqa: E402
import run  # noqa: E402
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
        "machine": MACHINE,
    }
    return found | more


CELL = matrix.CHECKED[0]


# ----- the plan -----------------------------------------------------------------------------------


def test_every_optimizer_and_every_model_has_its_cell() -> None:
    cells = list(matrix.cells())
    assert len({cell.key for cell in cells}) == len(cells)
    assert {cell.rule for cell in cells} == set(pyupdate.optim.CLASSES)
    assert {cell.section for cell in cells} == set(matrix.SECTIONS)
    assert set(matrix.QUICK) <= set(cells) and set(matrix.CHECKED) <= set(cells)
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


def test_filters() -> None:
    cells = tuple(matrix.cells())
    lions = matrix.chosen(cells, rules=["Lion"])
    assert [cell.key for cell in lions] == ["rules/ResNet-50/step/Lion/float32/2"]
    assert {c.kind for c in matrix.chosen(cells, sections=["kinds"], kinds=["clip"])} == {"clip"}
    assert matrix.chosen(cells, only="DLRM/full") == [matrix.Cell("kinds", "DLRM", "full")]


# ----- interruptions ------------------------------------------------------------------------------


@pytest.fixture
def measuring(monkeypatch, tmp_path):
    """`run` with a fake measurement: what was measured, in order, and a switch to interrupt it."""
    said: list[str] = []
    interrupt_at: list[int] = []

    def in_a_process(cell, told):
        if len(said) in interrupt_at:
            raise KeyboardInterrupt
        said.append(cell.key)
        return record(cell)

    monkeypatch.setattr(run, "CELLS", tmp_path / "cells.jsonl")
    monkeypatch.setattr(run, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(run, "in_a_process", in_a_process)
    monkeypatch.setattr(run, "absent", dict)
    monkeypatch.setattr(run.timing, "machine", lambda threads: MACHINE)
    monkeypatch.setattr(publish.pictures, "draw", lambda records, folder: [])
    return said, interrupt_at


def test_a_run_goes_on_where_it_was_interrupted(measuring) -> None:
    said, interrupt_at = measuring
    interrupt_at.append(2)
    with pytest.raises(KeyboardInterrupt):
        run.main(["--quick"])
    interrupt_at.clear()
    with run.CELLS.open("a") as file:
        file.write('\n{"key": "kinds/')  # half a record
    assert run.main(["--quick"]) == 0
    assert said == [cell.key for cell in matrix.QUICK]
    shown = (run.CELLS.parent / "tables.md").read_text()
    assert f"11 of {len(list(matrix.cells()))} cells" in shown and "AdamW on every model" in shown
    assert run.main(["--quick"]) == 0 and len(said) == 11


def test_the_clock_ends_a_piece(measuring) -> None:
    said, _ = measuring
    assert run.main(["--quick", "--within", "-1"]) == 0
    assert said == []
    assert not (run.CELLS.parent / "tables.md").exists()


@pytest.mark.parametrize(
    "old",
    [
        {"scale": 2.0},
        {"machine": MACHINE | {"torch": "2.12.0"}},
        {"machine": MACHINE | {"compiler": "GNU 13"}},
        {"machine": None},
    ],
    ids=["scale", "torch", "compiler", "failed"],
)
def test_what_cannot_stand_beside_is_measured_again(measuring, old) -> None:
    said, _ = measuring
    run.append(run.CELLS, record(CELL) | old)
    run.main(["--only", CELL.key])
    assert said == [CELL.key]
    run.main(["--only", CELL.key])
    assert said == [CELL.key]


def test_a_disturbed_cell_is_repeated_and_marked(monkeypatch) -> None:
    moves = iter([0.4, 0.2, 0.3])
    monkeypatch.setattr(run, "in_a_process", lambda *_: record(CELL, moved=next(moves)))
    assert run.steadiest(CELL, [])["moved"] == 0.2
    moves = iter([0.4, 0.1])
    assert run.steadiest(CELL, [])["moved"] == 0.1
    text = tables.as_markdown([record(CELL, moved=0.2)], {})
    assert "step \\* |" in text and "1 disturbed" in text


def test_who_is_there_all_the_time_disturbs_too(monkeypatch) -> None:
    assert "1 disturbed" in tables.as_markdown([record(CELL, others=0.2)], {})
    assert "0 disturbed" in tables.as_markdown([record(CELL, others=0.05), record(CELL)], {})
    crowds = iter([0.5, 0.2, 0.3])
    monkeypatch.setattr(run, "in_a_process", lambda *_: record(CELL, others=next(crowds)))
    assert run.steadiest(CELL, [])["others"] == 0.2


def test_a_process_that_fails_is_a_cell_with_a_reason(monkeypatch, capsys) -> None:
    nobody = matrix.Cell("kinds", "nobody")
    found = run.in_a_process(nobody, [])
    assert found["why_not"] == "StopIteration" and "machine" not in found
    assert "nobody" in capsys.readouterr().err
    known = found | {"key": CELL.key}
    assert f"`{CELL.key}`: StopIteration" in tables.as_markdown([record(CELL), known], {})


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


# ----- the gate -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "committed, tries, said",
    [
        (2.0, [(2.0, 0.0)], "held"),
        (2.0, [(1.6, 0.0)], "held"),  # 25 % exactly
        (2.0, [(1.59, 0.0)], "WORSE"),
        (2.0, [(1.0, 0.0), (1.9, 0.0)], "held"),
        (2.0, [(1.0, 0.0), (1.1, 0.0)], "WORSE"),
        (2.0, [(1.0, 0.3), (1.1, 0.2)], "disturbed"),
        (2.0, [(1.0, 0.3), (1.1, 0.0)], "WORSE"),
        (2.0, [(1.0, 0.0), (3.0, 0.3)], "WORSE"),  # a disturbed run excuses nothing
        (2.0, [(9.0, 0.0)], "held"),
        (2.0, [], "not measured"),
        (None, [(1.0, 0.0)], "new"),
    ],
)
def test_verdicts(committed, tries, said) -> None:
    before = record(CELL, fused=committed) if committed else None
    found = [record(CELL, fused=ratio, moved=moved) for ratio, moved in tries]
    verdict = gate.judged(before, found, CELL.key)
    assert verdict.said == said
    assert said in verdict.line and CELL.key in verdict.line


def test_only_what_did_not_hold_is_measured_twice() -> None:
    for answers, said in (([2.0], "held"), ([1.0, 2.0], "held"), ([1.0, 1.0], "WORSE")):
        left = iter(answers)
        verdict = gate.checked(CELL, record(CELL), lambda c, left=left: record(c, fused=next(left)))
        assert verdict.said == said and next(left, None) is None


def test_the_gate_fails_by_its_status(monkeypatch, tmp_path, capsys) -> None:
    for cell in matrix.CHECKED:
        run.append(tmp_path / "matrix.jsonl", record(cell))
    monkeypatch.setattr(sys, "argv", ["gate", "--against", str(tmp_path / "matrix.jsonl")])
    for fused, status in ((2.0, 0), (1.0, 1)):
        monkeypatch.setattr(gate, "in_a_process", lambda cell, _, f=fused: record(cell, fused=f))
        assert gate.main() == status
    assert f"FAILED: {len(matrix.CHECKED)} cells" in capsys.readouterr().out


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
