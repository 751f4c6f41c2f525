# SPDX-License-Identifier: Apache-2.0
"""Which rounds of a measurement count: those while the machine held still."""

from __future__ import annotations

import pytest

from pyupdate.bench import timing, watch


class Machine:
    """Stands in for time, for the gauge and for what others take.

    Attributes:
        now: seconds; a turn of ours takes one, of theirs two, while memory is as quick as at first.
        gauged: what the gauge reads, in turn; the last for ever.
        taken: what others take in a piece, in turn; then nothing.
    """

    def __init__(self, monkeypatch, gauged=(1.0,), taken=()) -> None:
        self.now = 0.0
        self.gauged, self.taken = list(gauged), list(taken)
        self.said: list[str] = []
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(watch, "Gauge", lambda: self)
        monkeypatch.setattr(timing, "others", lambda: self._others)
        self.speed = self.gauged[0]

    def read(self) -> float:
        self.speed = self.gauged.pop(0) if len(self.gauged) > 1 else self.gauged[0]
        return self.speed

    def _others(self) -> float:
        return self.taken.pop(0) if self.taken else 0.0

    def runs(self, ours: float = 1.0, theirs: float = 2.0) -> timing.Runs:
        def run(name: str, takes: float):
            def move() -> None:
                self.said.append(name)
                self.now += takes * self.speed

            return (lambda: None, move)

        return {"theirs": run("theirs", theirs), "ours": run("ours", ours)}


def test_all_rounds_of_a_machine_that_holds_still_count(monkeypatch) -> None:
    machine = Machine(monkeypatch)
    found = watch.interleave(machine.runs(), seconds=0.5, rounds=4)
    assert found.times["ours"].seconds == [1.0] * 4 and found.times["theirs"].seconds == [2.0] * 4
    # A piece is one round here, yet the order is reversed every other round.
    assert machine.said == ["theirs", "ours", "ours", "theirs"] * 2
    assert (found.moved, found.others, found.thrown_away) == (0.0, 0.0, 0)
    assert not timing.disturbed(found.facts()) and found.facts()["rounds"] == 4


def test_rounds_during_which_the_gauge_moved_are_thrown_away(monkeypatch) -> None:
    machine = Machine(monkeypatch, gauged=[1.0, 1.0, 3.0, 3.0, 1.0])
    found = watch.interleave(machine.runs(), seconds=0.5, rounds=3, patience=9.0)
    # Still: the first, the third (all of it slow), and those behind the return to the first speed.
    assert found.times["ours"].seconds == [1.0, 3.0, 1.0]
    assert found.thrown_away == 2 and not timing.disturbed(found.facts())
    assert timing.ratio(found.times["theirs"], found.times["ours"]) == 2.0
    assert found.facts()["gauge_ms"] == [1e3, 1e3, 3e3, 3e3, 1e3, 1e3]


def test_rounds_during_which_others_were_there_are_thrown_away(monkeypatch) -> None:
    machine = Machine(monkeypatch, taken=[0.3, 0.05, 0.5])
    found = watch.interleave(machine.runs(), seconds=0.5, rounds=3, patience=9.0)
    assert found.thrown_away == 2 and found.others == 0.05
    assert not timing.disturbed(found.facts())


@pytest.mark.parametrize("patience", [1.0, 3.0])
def test_patience_ends(monkeypatch, patience: float) -> None:
    machine = Machine(monkeypatch, taken=[0.5] * 100)
    found = watch.interleave(machine.runs(), seconds=12.0, rounds=2, patience=patience)
    assert machine.now == 12.0 * patience
    # Nothing is better than the rest: all rounds count, and the record says that it is disturbed.
    assert len(found.times["ours"].seconds) == 4 * patience and found.thrown_away == 0
    assert found.others == 0.5 and timing.disturbed(found.facts())


def test_few_quiet_rounds_are_not_enough(monkeypatch) -> None:
    machine = Machine(monkeypatch, taken=[0.0] + [0.5] * 100)
    found = watch.interleave(machine.runs(), seconds=6.0, rounds=2)
    assert timing.disturbed(found.facts())
    machine = Machine(monkeypatch, taken=[0.0, 0.0] + [0.5] * 100)
    found = watch.interleave(machine.runs(), seconds=9.0, rounds=2)
    assert not timing.disturbed(found.facts()) and found.thrown_away == 1


def test_what_the_gauge_left_in_the_caches_is_not_timed(monkeypatch) -> None:
    machine = Machine(monkeypatch)
    found = watch.interleave(machine.runs(ours=0.0625, theirs=0.0625), seconds=0.9, rounds=2)
    # Pieces of half a second: four rounds, the first of which does not count, and as many again.
    assert len(found.times["ours"].seconds) == 6 and found.thrown_away == 2


def test_a_gauge_reads_time(monkeypatch) -> None:
    monkeypatch.setattr(timing, "CALIBRATION", 1 << 10)
    assert watch.Gauge().read() > 0.0
