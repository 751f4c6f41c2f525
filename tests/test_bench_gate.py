# SPDX-License-Identifier: Apache-2.0
"""`make bench-check` and the targets, on processes that nobody ran."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from test_bench_matrix import MACHINE, pair

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gate  # noqa: E402 - benchmarks are scripts, not a package
import matrix  # noqa: E402
import publish  # noqa: E402
import ratios  # noqa: E402
import stamp  # noqa: E402
import tables  # noqa: E402

PAIR = ("1,000 x 256", "step")


# ----- the gate -----------------------------------------------------------------------------------


def processes(*found: float | tuple[float, float]):
    """Answers in turn: a ratio, or a ratio and by how much the machine moved."""
    left = iter(found)

    def measure(workload: str, kind: str):
        assert (workload, kind) == PAIR
        one = next(left)
        ratio, moved = one if isinstance(one, tuple) else (one, 0.0)
        return {"ratio": ratio, "moved": moved, "others": 0.0}

    return measure, left


def test_what_is_held_to_is_the_worst_committed_process() -> None:
    one = {"ratio": 3.46, "processes": [{"ratio": 3.46}, {"ratio": 2.95}, {"ratio": 3.58}]}
    assert gate.least(one) == 2.95


@pytest.mark.parametrize(
    "found, said",
    [
        ([2.0, 2.0], "held"),
        ([1.6, 9.0], "held"),  # 25 % exactly
        ([1.59, 1.0], "WORSE"),
        ([1.0, 1.9, 1.7], "held"),
        ([1.0, 1.9, 1.5], "WORSE"),
        ([(1.0, 0.3), 1.9, 1.9], "held"),  # what is disturbed says nothing
        ([(9.0, 0.3), 1.0, 1.0], "WORSE"),
        ([(1.0, 0.3), (1.0, 0.3), 1.9, (9.0, 0.3)], "disturbed"),
    ],
)
def test_the_median_of_three_processes_decides(found, said) -> None:
    measure, left = processes(*found)
    verdict = gate.checked(PAIR, 2.0, measure)
    assert verdict.said == said and next(left, None) is None  # and no process more
    assert said in verdict.line and "2.00x" in verdict.line and PAIR[0] in verdict.line


def test_what_has_no_committed_ratio_is_new() -> None:
    assert gate.checked(PAIR, None, processes()[0]).said == "new"


def test_what_cannot_be_measured_is_not_held(capsys) -> None:
    def breaks(*_):
        message = "pyupdate is 90.0 eps off"
        raise RuntimeError(message)

    assert gate.checked(PAIR, 2.0, breaks).said == "not measured"
    assert "eps off" in capsys.readouterr().err


def test_the_gate_fails_by_its_status(monkeypatch, tmp_path, capsys) -> None:
    path = tmp_path / "latest.json"
    ratios.keep(path, [_kept(pair(matrix.target(*held))) for held in ratios.HELD])
    monkeypatch.setattr(sys, "argv", ["gate", "--against", str(path)])
    for ratio, status in ((2.0, 0), (1.0, 1)):
        answer = {"ratio": ratio, "moved": 0.0, "others": 0.0}
        monkeypatch.setattr(gate.Server, "target", lambda *_, a=answer, **__: a)
        assert gate.main() == status
    said = capsys.readouterr().out
    assert f"FAILED: {len(ratios.HELD)} ratios" in said and "no ratio is worse" in said


def _kept(record):
    """As a record of the matrix stands in latest.json."""
    return {**record, "kind": record["pair"][1]}


# ----- the targets --------------------------------------------------------------------------------


def answers(*moved: float):
    """What asks processes, during which the machine moved so much; and what they were asked."""
    asked: list[bool] = []

    def ask(workload: str, kind: str, *, seconds: float, bare: bool):
        asked.append(bare)
        found = {
            "ratio": float(len(asked)),
            "baseline": "torch fused",
            "baseline_ms": 2.0,
            "pyupdate_ms": 1.0,
            "bytes": 28.0,
            "moved": moved[len(asked) - 1],
            "others": 0.0,
        }
        return found | ({"at_most": 9.0} if bare else {})

    return ask, asked


def test_a_target_is_the_median_of_three_quiet_processes() -> None:
    ask, asked = answers(0.0, 0.4, 0.0, 0.0)
    found = ratios.cell(ratios.WORKLOADS["1,000 x 256"], "step", ask)
    assert asked == [True, False, False, False]  # one of them also times the bare loops
    assert found["ratio"] == 3.0 and [one["ratio"] for one in found["processes"]] == [1, 3, 4]
    assert [one["ratio"] for one in found["thrown_away"]] == [2.0]
    assert (found["target"], found["reached"], found["at_most"]) == (12.0, False, 9.0)
    assert found["moved"] == 0.0 and found["pyupdate_GBps"] == pytest.approx(28 * 0.256)


def test_a_restless_machine_is_not_waited_for_for_ever() -> None:
    ask, asked = answers(0.5, 0.4, 0.0, 0.3)
    found = ratios.cell(ratios.WORKLOADS["1,000 x 256"], "step", ask)
    assert len(asked) == 4
    assert [one["moved"] for one in found["processes"]] == [0.0, 0.3, 0.4]  # the quietest
    assert found["moved"] == 0.4 and "DISTURBED" in ratios.as_text([found])


def test_a_file_of_targets_keeps_what_is_not_measured_again(tmp_path) -> None:
    path = tmp_path / "latest.json"
    first, second = (
        _kept(pair(matrix.target("1,000 x 256", kind))) for kind in ("step", "average")
    )
    ratios.keep(path, [second])
    assert [one["kind"] for one in ratios.keep(path, [first])] == ["step", "average"]
    again = first | {"ratio": 3.0}
    assert [one["ratio"] for one in ratios.keep(path, [again])] == [3.0, 2.0]
    other = again | {"machine": MACHINE | {"torch": "2.14.0"}}
    assert len(ratios.keep(path, [other])) == 1


def test_the_table_of_targets(tmp_path) -> None:
    cells = [
        pair(matrix.target("1,000 x 256", "step"), ratio=4.0),
        pair(matrix.target("ResNet-50", "average"), at_most=None, others=0.3),
    ]
    shown = publish.targets(cells, tmp_path)
    text = tables.as_markdown([], {}, shown)
    row = "| 1,000 x 256, step | torch fused | 4 | 1 | 112.0 | 4.00x | 3.90 4.00 4.10 | 2.50x |"
    assert f"{row} 12.00x |" in text
    assert "| ResNet-50, average \\* |" in text and "2 of " in text
    assert "| 1,000 x 256 | 4.0x |" in ratios.as_markdown(shown)
    assert "ResNet" not in ratios.as_markdown(shown)  # it has no target


def test_readme_states_the_targets(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(publish, "RESULTS", tmp_path)
    monkeypatch.setattr(publish.pictures, "draw", lambda records, folder: [])
    document, readme = tmp_path / "document.md", tmp_path / "README.md"
    cells = [pair(cell, ratio=7.0) for cell in matrix.cells() if cell.section == "targets"]
    for given, stated in ((cells[1:], False), (cells[:1], True)):
        for path, mark in ((document, publish.MARK), (readme, publish.MARK_OF_README)):
            path.write_text(f"a {mark} old {mark} b")
        publish.publish(given, tmp_path, absent={}, document=document, readme=readme)
        assert ("| 48 x 1024x1024 | 7.0x |" in readme.read_text()) == stated
        assert "at most" in document.read_text() and "old" not in document.read_text()
    real = publish.README.read_text()
    assert real.count(publish.MARK_OF_README) == 2


# ----- which sources ------------------------------------------------------------------------------


def test_a_stamp_is_of_the_bytes_that_run(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(stamp, "ROOT", tmp_path)
    (tmp_path / "pyupdate").mkdir()
    (tmp_path / "pyupdate" / "a.py").write_text("1")
    (tmp_path / "pyupdate" / "_C.so").write_text("2")
    first = stamp.digest()
    assert stamp.digest() == first
    (tmp_path / "notes.txt").write_text("3")
    assert stamp.digest() == first
    (tmp_path / "pyupdate" / "_C.so").write_text("3")
    assert stamp.digest() != first


@pytest.mark.parametrize(("changed", "dirty"), [(" M pyupdate/step.py", True), ("", False)])
def test_a_stamp_says_whether_something_was_changed(monkeypatch, changed, dirty) -> None:
    said = {"rev-parse": "abc123", "status": changed}
    monkeypatch.setattr(stamp, "_git", lambda *arguments: said[arguments[0]])
    found = stamp.stamp()
    assert (found["commit"], found["dirty"]) == ("abc123", dirty)
    assert stamp.said(found) == ("abc123 with changes" if dirty else "abc123")
    assert stamp.said(found | {"changed_meanwhile": True}) == "abc123 with changes"
    monkeypatch.setattr(stamp, "_git", lambda *_: None)
    assert stamp.said(stamp.stamp()) == "no commit"


def test_latest_json_is_what_the_gate_reads() -> None:
    found = {(one["workload"], one["kind"]) for one in ratios.read(ratios.LATEST)}
    assert found <= {(workload.name, kind) for workload, kind in ratios.every_pair()}
    assert len(found & set(ratios.HELD)) >= 7
    assert json.loads(ratios.LATEST.read_text())["machine"]["torch"].startswith("2.")
