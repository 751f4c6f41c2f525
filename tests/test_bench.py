# SPDX-License-Identifier: Apache-2.0
"""What a benchmark promises: nobody is timed who is wrong, turns are taken, figures are right."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

import pyupdate
from pyupdate.bench import command, contestants, timing, truth
from pyupdate.bench.contestants import KINDS, OURS, SCALE, Contestant, Workload, of_torch
from pyupdate.bench.measure import measure
from pyupdate.bench.truth import STEPS, WrongError, check, error_of_corrections
from pyupdate.pytorch import engines

SMALL = Workload("small", ((200, 100), (33,), (), (5, 5)))  # whose gradient is clipped
RULES = ("SGD", "AdamW", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adadelta", "LAMB", "LARS", "Lion")


def contestant(name: str, kind: str, rule: str = "AdamW", workload: Workload = SMALL) -> Contestant:
    return Contestant(name, workload, kind, of_torch(kind, rule)[name])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", of_torch("step"))
def test_who_is_right_is_let_through(name: str, kind: str) -> None:
    one = contestant(name, kind)
    off = check(one, pyupdate.optim.AdamW(one.params))
    assert 0.0 < off < 24.0


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_of_ours_is_right(rule: str) -> None:
    one = contestant(OURS, "full", rule)
    check(one, one.optimizer)


def test_who_is_wrong_is_named_and_left_out(monkeypatch) -> None:
    def breaks(params):
        message = "no such device"
        raise RuntimeError(message)

    makers = {"idle": lambda params: torch.optim.AdamW(params, lr=0.0), "absent": breaks}
    cell = measure(SMALL, "step", makers | of_torch("step"), seconds=0.0, threads=1)
    assert list(cell["failed"]) == ["absent", "idle"] and "idle" not in cell["ms"]
    assert cell["failed"]["absent"] == "RuntimeError: no such device"
    assert "eps off after" in cell["failed"]["idle"]
    ours = {OURS: lambda params: pyupdate.optim.AdamW(params, lr=0.0)}
    monkeypatch.setattr(Contestant, "_ours", lambda self: None)
    with pytest.raises(WrongError):
        measure(SMALL, "step", ours | {OURS: of_torch("step")[OURS]}, seconds=0.0, threads=1)


def test_matrices_in_halves_and_vectors_not() -> None:
    workload = Workload("mixed", ((40, 7), (33,)), dtype=torch.bfloat16, of_vectors=torch.float32)
    for name in of_torch("step"):
        one = contestant(name, "step", workload=workload)
        assert [param.dtype for param in one.params] == [torch.bfloat16, torch.float32]
        assert check(one, pyupdate.optim.AdamW(one.params)) < 8.0
        right = one.run

        def run(right=right, vector=one.params[1].data) -> None:
            right()
            vector.add_(1e-4)  # far below a half's precision, and far above a float32's

        one.run = run
        with pytest.raises(WrongError):
            check(one, pyupdate.optim.AdamW(one.params))


def test_the_same_numbers_for_all() -> None:
    first, second = (contestant(name, "full") for name in ("torch loop", OURS))
    copied = Contestant(OURS, SMALL, "full", of_torch("full")[OURS], first)
    for a, b, c in zip(first.params, second.params, copied.params, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c) and a.data_ptr() != c.data_ptr()
        assert torch.equal(a.grad, c.grad) and a.grad.data_ptr() != c.grad.data_ptr()
    plain = contestant("torch loop", "step")
    other = Contestant(OURS, SMALL, "step", of_torch("step")[OURS], plain)
    assert plain.params[0].grad.data_ptr() != other.params[0].grad.data_ptr()


def test_halves_are_held_to_their_own_precision() -> None:
    workload = Workload("halves", ((40, 7), (33,)), dtype=torch.bfloat16)
    one = contestant(OURS, "step", workload=workload)
    assert check(one, one.optimizer) < 8.0


BREAKAGES = {
    "momentum": lambda one, _: one.optimizer.param_groups[0].update(momentum=0.9),
    "no clip": lambda _, patch: patch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: None),
    "another scale": lambda one, _: one.scaler.update(2.0 * SCALE),
    "no step": lambda one, _: setattr(one, "run", lambda: None),
    "stale gradients": lambda one, _: setattr(one, "prepare", lambda: None),
    "another average": lambda one, _: [average.add_(1.0) for average in one.averages],
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_who_is_wrong_is_not_timed(breakage: str, monkeypatch) -> None:
    kind = "scaler" if "scale" in breakage else "average"  # a clip would mend the scale
    one = contestant("torch foreach", kind, "SGD")
    like = pyupdate.optim.SGD(one.params)
    BREAKAGES[breakage](one, monkeypatch)
    with pytest.raises(WrongError):
        check(one, like)


class Fp32Corrections(torch.optim.AdamW):
    """AdamW with bias corrections from fp32 powers, as of `late` steps more or another beta2."""

    def __init__(self, params, late: float = 0.0, beta2: float = 0.999) -> None:
        super().__init__(params)
        self.late, self.beta2 = late, beta2

    @torch.no_grad()
    def step(self) -> None:
        group = self.param_groups[0]
        beta1, beta2 = torch.tensor(0.9), torch.tensor(self.beta2)
        self.made = getattr(self, "made", 0) + 1
        for param in group["params"]:
            state = self.state[param]
            m = state.setdefault("exp_avg", torch.zeros_like(param))
            v = state.setdefault("exp_avg_sq", torch.zeros_like(param))
            m.lerp_(param.grad, 0.1)
            v.mul_(0.999).addcmul_(param.grad, param.grad, value=0.001)
            of_m, of_v = (1.0 - b ** (self.made + self.late) for b in (beta1, beta2))
            param.mul_(1.0 - 1e-5).sub_(1e-3 / of_m * m / ((v / of_v).sqrt() + 1e-8))


def off_by(dtype: torch.dtype, **wrong: float) -> float:
    one = Contestant("fp32", SMALL, "step", lambda params: Fp32Corrections(params, **wrong))
    return check(one, pyupdate.optim.AdamW(one.params), corrections=dtype)


def test_bias_corrections_in_fp32_are_allowed_where_they_are_declared() -> None:
    assert 100.0 < off_by(torch.float32) < 300.0
    with pytest.raises(WrongError):
        off_by(torch.float64)


@pytest.mark.parametrize("wrong", [{"late": 1.0}, {"late": 1e-3}, {"beta2": 0.9990005}])
def test_wrong_bias_corrections_are_not(wrong: dict[str, float]) -> None:
    with pytest.raises(WrongError):
        off_by(torch.float32, **wrong)


def test_what_fp32_costs_a_bias_correction() -> None:
    """The bound holds for a product and a power, and is within six times of the worse."""
    like = pyupdate.optim.AdamW([torch.nn.Parameter(torch.zeros(2))])
    rule = engines.row_of(like).rule(like.param_groups[0])
    for beta2 in (0.9, 0.99, 0.999, 0.9999):
        named = {"beta1": 0.9, "beta2": beta2}
        for t in range(1, STEPS + 1):
            bound = error_of_corrections(rule, named, t, torch.float32)
            assert error_of_corrections(rule, named, t, torch.float64) == 0.0
            found = 0.0
            for beta, root in ((0.9, 1.0), (beta2, 0.5)):
                exact = 1.0 - beta**t
                products = np.float32(1.0)
                for _ in range(t):
                    products = products * np.float32(beta)
                powers = (products, np.power(np.float32(beta), np.float32(t)))
                made = [float(np.float32(1.0) - power) for power in powers]
                found += root * max(abs(one / exact - 1.0) for one in made)
            assert found <= bound <= 6.0 * found


def test_a_part_of_a_tensor_stands_for_it(monkeypatch) -> None:
    """One lane of eight that is never stepped is seen in few elements of many."""
    monkeypatch.setattr(truth, "COMPARED", 256)
    workload = Workload("long", ((40_000,), (3, 7)))
    one = contestant(OURS, "full", workload=workload)
    check(one, one.optimizer)
    one = contestant("torch fused", "full", workload=workload)
    whole = one.run

    def run() -> None:
        before = one.params[0].detach()[5::8].clone()
        whole()
        one.params[0].detach()[5::8] = before

    one.run = run
    with pytest.raises(WrongError):
        check(one, pyupdate.optim.AdamW(one.params))


def test_gradients_that_a_step_drops_or_spoils_are_put_back() -> None:
    class Consumes(torch.optim.AdamW):
        consume_grad = True

        def step(self) -> None:
            super().step()
            for param in self.param_groups[0]["params"]:
                param.grad.zero_()
                param.grad = None if self.consume_grad else param.grad

    one = Contestant("consumes", SMALL, "step", Consumes)
    assert check(one, pyupdate.optim.AdamW(one.params)) < 24.0
    Consumes.consume_grad = False
    one = Contestant("consumes", SMALL, "step", Consumes)
    with pytest.raises(WrongError):
        check(one, pyupdate.optim.AdamW(one.params))


def test_a_step_of_its_own_is_taken() -> None:
    def make(params):
        made = torch.optim.AdamW(params)
        made.whole_step = lambda one: said.append(one)
        return made

    said: list[Contestant] = []
    one = Contestant("own", SMALL, "full", make)
    one.run()
    assert said == [one]


def test_no_stream_without_its_loop(compiled, monkeypatch) -> None:
    monkeypatch.delattr(compiled, "Stream")
    assert timing.stream(1000, 1) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fused_sgd_of_halves_is_no_baseline(dtype: torch.dtype) -> None:
    workload = Workload("halves", SMALL.shapes, dtype=dtype)
    cell = measure(workload, "step", of_torch("step", "SGD"), seconds=0.0, threads=1)
    assert (
        list(cell["failed"]) == ["torch fused"] and "it does less" in cell["failed"]["torch fused"]
    )
    contestants.refuse_halves(torch.optim.AdamW, [torch.zeros(1, dtype=dtype)])
    contestants.refuse_halves(torch.optim.SGD, [torch.zeros(1)])


def test_turns_are_taken_in_alternating_order() -> None:
    said: list[str] = []

    def runs(name: str):
        return (lambda: said.append(f"prepare {name}"), lambda: said.append(name))

    times = timing.interleave({name: runs(name) for name in "abc"}, seconds=0.0, rounds=2)
    assert [one for one in said if "prepare" not in one] == list("abc" + "cba")
    assert all(said[i] == f"prepare {said[i + 1]}" for i in range(0, len(said), 2))
    assert {name: len(found.seconds) for name, found in times.items()} == dict.fromkeys("abc", 2)


class Clock:
    """Stands in for time: what runs moves it by what it is said to take."""

    def __init__(self, monkeypatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def runs(self, **seconds):
        def run(turns):
            def move() -> None:
                self.now += next(turns)

            return (lambda: None, move)

        return {name: run(iter(turns)) for name, turns in seconds.items()}


def test_warm_up_ends_where_all_stand_still(monkeypatch) -> None:
    clock = Clock(monkeypatch)
    cooling = [9.0, 8.0, 7.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    # In the ninth round the last two windows of three are 2 1 1 and 1 1 1: medians of one.
    runs = clock.runs(a=cooling, b=[1.0] * 11)
    assert timing.warm_up(runs, seconds=1e9) == (9, True)
    within = [1.0, 1.0, 1.0, 1.04, 1.04, 1.04]
    assert timing.warm_up(clock.runs(a=within)) == (6, True)


def test_warm_up_is_bounded(monkeypatch) -> None:
    clock = Clock(monkeypatch)
    restless = [1.5**i for i in range(100)]
    assert timing.warm_up(clock.runs(a=restless), seconds=1e9) == (timing.MOST_WARM, False)
    assert timing.warm_up(clock.runs(a=restless), seconds=2.0) == (6, False)  # two windows at least


def test_figures_by_hand() -> None:
    theirs, ours = timing.Times([2.0, 9.0, 4.0]), timing.Times([1.0, 3.0, 4.0])
    assert timing.ratio(theirs, ours) == 2.0  # of 2, 3 and 1
    assert theirs.median == 4.0
    assert timing.Times([1.0, 2.0, 3.0, 4.0, 5.0]).quartiles == (1.5, 4.5)
    assert timing.moved(1.0, 1.25) == timing.moved(1.25, 1.0) == 0.25


def test_the_time_of_others_is_counted(monkeypatch) -> None:
    clock = Clock(monkeypatch)
    busy, own = iter([100.0, 106.0]), iter([50.0, 53.0])
    monkeypatch.setattr(timing, "_busy", lambda: next(busy))
    monkeypatch.setattr(timing, "_own", lambda: next(own))
    monkeypatch.setattr(timing.os, "cpu_count", lambda: 2)
    taken = timing.others()
    clock.now += 10.0
    assert taken() == 0.15  # six seconds of work, three of them ours, of twenty
    monkeypatch.undo()
    assert timing.others()() is not None


def test_threads_and_collection_are_as_before() -> None:
    import gc

    before = torch.get_num_threads()
    with timing.settled(1):
        assert torch.get_num_threads() == 1 and not gc.isenabled()
    assert torch.get_num_threads() == before and gc.isenabled()


def test_the_stream(compiled) -> None:
    run, moved = timing.stream(1000, 2)
    run()
    assert moved == 28 and compiled.Stream.BYTES_READ == 4
    averaging = compiled.Stream(1000, averages=True)
    averaging.run(2)
    averaging.read(2)
    assert averaging.bytes == 36  # an average is read and written
    with pytest.raises(ValueError, match="at least one element"):
        compiled.Stream(0)


def test_reading_tensors(compiled) -> None:
    def row(*, has_grad: bool) -> list[torch.Tensor]:
        param = torch.nn.Parameter(torch.ones(2))
        param.grad = torch.ones(2) if has_grad else None
        return [param, torch.zeros(2), torch.tensor(1.0)]

    rows = [row(has_grad=i % 2 == 0) for i in range(20)]
    assert compiled.Reader(torch.Tensor, rows).read() == 20 * 3 + 10
    assert compiled.Reader(torch.Tensor, []).read() == 0
    with pytest.raises(ValueError, match="of one width"):
        compiled.Reader(torch.Tensor, [rows[0], rows[1][:2]])
    for wrong in (3, "text", torch.ones(2, device="meta"), torch.ones(2).to_sparse()):
        with pytest.raises(RuntimeError):
            compiled.Reader(torch.Tensor, [[rows[0][0], wrong]])


@pytest.mark.parametrize("kind", ["step", "average"])
def test_a_cell(kind: str) -> None:
    cell = measure(SMALL, kind, of_torch(kind), seconds=0.0, threads=1)
    assert list(cell["ms"]) == list(of_torch(kind)) and cell["rounds"] >= 8
    assert cell["bytes"] == {"step": 28.0, "average": 40.0}[kind]
    elements = 200 * 100 + 33 + 1 + 25
    for name, speed in cell["GBps"].items():
        assert speed == pytest.approx(cell["bytes"] * elements / cell["ms"][name] / 1e6)
    assert (cell["of_stream"] is None) == (timing.stream(1, 1) is None)
    low, high = cell["quartiles_ms"][OURS]
    assert low <= cell["ms"][OURS] <= high


def test_the_command(monkeypatch, capsys) -> None:
    monkeypatch.setattr(command, "WORKLOADS", (SMALL,))
    monkeypatch.setattr(timing, "CALIBRATION", 1 << 10)
    assert command.main(["--seconds", "0.01", "--threads", "1"]) == 0
    text = capsys.readouterr().out
    assert text.count("small") == 3 and "torch fused/ours" in text
    assert command.main(["--seconds", "0.01", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [cell["kind"] for cell in result["cells"]] == ["step", "full", "average"]
    disturbed = command.as_text(result | {"moved": 0.2})
    assert "DISTURBED" in disturbed and "20 %" in disturbed
    assert "DISTURBED" not in command.as_text(result | {"moved": 0.1})
    with pytest.raises(SystemExit):
        command.main(["--threads", "0"])


def test_it_is_a_command_of_the_package() -> None:
    command_line = [sys.executable, "-m", "pyupdate", "bench", "--help"]
    done = subprocess.run(command_line, capture_output=True, text=True, check=True)
    assert "python -m pyupdate bench" in done.stdout
