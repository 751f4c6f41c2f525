# SPDX-License-Identifier: Apache-2.0
"""The choice of a back end: by environment, by context, by device; and what happens without one."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from cases import FULL, Case
from conftest import ISAS
from torch import nn
from ways import optimizer_of, plan_of, ways

import pyupdate
from pyupdate import backends
from pyupdate.backends import cpu
from pyupdate.kernels.language import Rule
from pyupdate.kernels.rules import RULES
from pyupdate.pytorch.engines import last_step

ADAMW = next(case for case in FULL if case.name == "adamw")
cases = pytest.mark.parametrize("case", FULL, ids=str)


# ----- by environment -----------------------------------------------------------------------------


def step_of() -> tuple[str, ...]:
    """The back ends that stepped one parameter."""
    param = nn.Parameter(torch.ones(3))
    optimizer = pyupdate.optim.SGD([param], lr=0.5)
    param.grad = torch.ones(3)
    optimizer.step()
    assert param.tolist() == [0.5] * 3
    return plan_of(optimizer).backends


def test_auto_prefers_the_compiled_one(compiled, monkeypatch, caplog):
    monkeypatch.delenv("PYUPDATE_BACKEND", raising=False)
    assert step_of() == ("cpu",)
    for auto in ("auto", "", "AUTO"):
        monkeypatch.setenv("PYUPDATE_BACKEND", auto)
        assert step_of() == ("cpu",)
    assert not caplog.records


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_an_explicit_choice_by_environment(name, compiled, monkeypatch):
    for spelling in (name, name.upper(), f" {name} "):
        monkeypatch.setenv("PYUPDATE_BACKEND", spelling)
        assert step_of() == (name,)


def test_an_unknown_name_in_the_environment_names_the_known(monkeypatch):
    monkeypatch.setenv("PYUPDATE_BACKEND", "gpu")
    expected = (
        "PYUPDATE_BACKEND: no back end is named 'gpu'; there are: "
        "auto, cuda, triton, cpu, reference"
    )
    with pytest.raises(ValueError) as refused:
        step_of()
    assert str(refused.value) == expected


_STEPS = """
import json, logging, os, sys
records = []
class Kept(logging.Handler):
    def emit(self, record):
        records.append([record.name, record.levelname, record.getMessage()])
logging.getLogger().addHandler(Kept())
{before}
import torch, pyupdate
from pyupdate.pytorch.engines import engine_of
answers = []
for name in sys.argv[1:]:
    os.environ["PYUPDATE_BACKEND"] = name
    try:
        param = torch.nn.Parameter(torch.ones(3))
        optimizer = pyupdate.optim.SGD([param], lr=0.5)
        for _ in range(2):
            param.grad = torch.ones(3)
            optimizer.step()
        assert param.tolist() == [0.0] * 3
        (plan,) = engine_of(optimizer).plans.values()
        answers.append(list(plan.backends))
    except Exception as error:
        answers.append(f"{{type(error).__name__}}: {{error}}")
from pyupdate.backends import available
isa = None
if dict(available())["cpu"] is None:
    from pyupdate import _C
    isa = _C.isa()
print(json.dumps([answers, records, isa]))
"""


def in_a_process(*names: str, before: str = "", **environment: str) -> Any:
    """What stepped for each choice of a back end, what was logged, and the instruction set."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith("PYUPDATE_")}
    out = subprocess.run(
        [sys.executable, "-c", _STEPS.format(before=before), *names],
        env={**plain, **environment},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (out.returncode, out.stderr) == (0, "")
    return json.loads(out.stdout)


def test_without_the_module(compiled):
    before = "sys.modules['pyupdate._C'] = None  # as if it had not been built"
    names = ("auto", "auto", "cpu", "reference")
    answers, records, _ = in_a_process(*names, before=before)
    assert answers[0] == answers[1] == answers[3] == ["reference"]
    start = "RuntimeError: PYUPDATE_BACKEND: back end 'cpu' cannot run here: "
    assert answers[2].startswith(start)
    reason = answers[2].removeprefix(start)
    assert len(reason) > 10
    # Said once, with the reason.
    said = f"back end 'cpu' cannot run here, falling back: {reason}"
    assert records == [["pyupdate", "WARNING", said]]


def test_a_torch_without_the_exchange_api(compiled):
    before = "import torch; del torch.Tensor.__dlpack_c_exchange_api__"
    answers, records, _ = in_a_process("auto", "cpu", before=before)
    assert answers[0] == ["reference"]
    assert "has no DLPack C exchange API; it came with torch 2.10" in answers[1]
    assert len(records) == 1 and "torch 2.10" in records[0][2]


def test_an_instruction_set_by_environment(compiled):
    lowest = compiled.isas()[0]
    answers, records, isa = in_a_process("cpu", PYUPDATE_ISA=f" {lowest.upper()} ")
    assert (answers, records, isa) == ([["cpu"]], [], lowest)


def test_an_unknown_instruction_set_names_the_known(compiled):
    known = f"instruction set 'v9' is not built or cannot run here; there are: {', '.join(ISAS)}"
    if tuple(compiled.isas()) != ISAS:
        known = known.split(";")[0]
    answers, records, _ = in_a_process("cpu", "auto", PYUPDATE_ISA="v9")
    assert "RuntimeError: PYUPDATE_BACKEND: back end 'cpu' cannot run here" in answers[0]
    assert f"PYUPDATE_ISA: {known}" in answers[0]
    assert answers[1] == ["reference"]
    assert len(records) == 1 and known in records[0][2]
    with pytest.raises(ValueError, match="'v9' is not built"):
        compiled.use_isa("v9")


# ----- by context ---------------------------------------------------------------------------------


def test_contexts_nest_and_are_restored(compiled, monkeypatch):
    monkeypatch.delenv("PYUPDATE_BACKEND", raising=False)
    assert backends.choice() == "auto"
    with pyupdate.use_backend("cpu"):
        with pyupdate.use_backend("reference"):
            assert backends.choice() == "reference"
            with pyupdate.use_backend("auto"):
                assert backends.choice() == "auto"
            assert backends.choice() == "reference"
        assert backends.choice() == "cpu"
        with pytest.raises(KeyError), pyupdate.use_backend("reference"):
            raise KeyError
        assert backends.choice() == "cpu"
    assert backends.choice() == "auto"
    monkeypatch.setenv("PYUPDATE_BACKEND", "reference")
    assert backends.choice() == "reference"
    with pyupdate.use_backend("auto"):
        assert backends.choice() == "auto"


def test_an_unknown_name_is_refused_at_once():
    with (
        pytest.raises(
            ValueError, match=r"use_backend: no back end is named 'gpu'.*auto, cuda, triton, cpu"
        ),
        pyupdate.use_backend("gpu"),
    ):
        pytest.fail("entered")
    assert backends.choice() in ("auto", os.environ.get("PYUPDATE_BACKEND", "auto"))


@cases
@ways
def test_back_ends_may_change_between_steps(case: Case, way, compiled):
    def trained(names: list[str]) -> torch.optim.Optimizer:
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(n)) for n in (5, 3000)]
        optimizer = optimizer_of(way, case, params, max_norm=0.5)
        for name in names:
            for param in params:
                param.grad = torch.randn(param.shape)
            with pyupdate.use_backend(name):
                optimizer.step()
            assert plan_of(optimizer).backends == (name,)
        return optimizer

    found = trained(["cpu", "reference", "reference", "cpu", "reference"])
    expected = trained(["cpu"] * 5)
    assert_same_optimizer(found, expected)


def assert_same_optimizer(found: torch.optim.Optimizer, expected: torch.optim.Optimizer) -> None:
    for group, other in zip(found.param_groups, expected.param_groups, strict=True):
        for i, (param, twin) in enumerate(zip(group["params"], other["params"], strict=True)):
            assert_same_bits(param, twin, f"parameter {i}")
            assert found.state.get(param, {}).keys() == expected.state.get(twin, {}).keys()
            for key, value in expected.state.get(twin, {}).items():
                assert_same_bits(found.state[param][key], value, f"{key} of {i}")


# ----- several in one model -----------------------------------------------------------------------


@pytest.fixture
def mixed(monkeypatch, compiled):
    """A back end for each parameter in turn, as if it depended on its device."""
    from pyupdate.pytorch import plan

    turn = [0]
    by_name = {backend.name: backend for backend in backends.BACKENDS}

    def alternating(device_type: str) -> backends.Backend:
        turn[0] += 1
        return by_name["reference" if turn[0] % 2 else "cpu"]

    def switch(on: bool) -> None:
        turn[0] = 0
        made = alternating if on else lambda device_type: by_name["cpu"]
        monkeypatch.setattr(plan, "backend_for", made)

    return switch


OPTIONS: list[dict[str, Any]] = [
    {},
    {"max_norm": 0.7},
    {"max_norm": 0.7, "norm_type": float("inf"), "skip_nonfinite": True, "clip_value": 0.3},
    {"ema_decay": 0.9},
]

SIZES = (40_000, 3, 0, 2047, 1, 20_000, 7)


def params_and_groups(case: Case) -> tuple[list[nn.Parameter], list[dict]]:
    generator = torch.Generator().manual_seed(3)
    dtypes = (torch.float32, torch.float64, torch.bfloat16)
    params = [
        nn.Parameter(torch.randn(n, generator=generator).to(dtypes[i % 3]))
        for i, n in enumerate(SIZES)
    ]
    return params, [{"params": params[:3]}, {"params": params[3:], "lr": 0.5 * case.options["lr"]}]


@pytest.mark.all_pairs
@cases
@ways
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_model_on_several_back_ends_has_one_norm(case: Case, way, options, mixed):
    # The bits of all on one: the sums of the rows are added in the order of the rows.
    results = []
    for several in (False, True):
        mixed(several)
        params, groups = params_and_groups(case)
        optimizer = optimizer_of(way, case, groups, **options)
        generator = torch.Generator().manual_seed(4)
        norms = []
        for turn in range(6):
            scaler = torch.amp.GradScaler("cpu", init_scale=3.0, enabled=turn >= 3)
            scaler.scale(torch.zeros(()))
            for param in params:
                grad = torch.randn(param.shape, generator=generator) * 3.0
                param.grad = grad.to(param.dtype)
            if turn == 2:
                params[1].grad = params[3].grad = None
            if turn == 4:
                params[5].grad[-1] = float("nan")
            optimizer.step(grad_scaler=scaler)
            norms.append(last_step(optimizer))
        assert plan_of(optimizer).backends == (("cpu", "reference") if several else ("cpu",))
        results.append((optimizer, norms))
    (one, norms), (several, others) = results
    assert [str(each) for each in norms] == [str(each) for each in others]
    assert [each.skipped for each in norms] == [turn == 4 for turn in range(6)]
    assert_same_optimizer(several, one)


def test_what_one_back_end_refuses_no_other_has_written(mixed):
    for broken in range(2):  # a row of each
        mixed(True)
        params = [nn.Parameter(torch.ones(5)) for _ in range(4)]
        optimizer = pyupdate.optim.AdamW(params)
        for param in params:
            param.grad = torch.ones(5)
        optimizer.step()
        before = [param.detach().clone() for param in params]
        steps = [float(optimizer.state[param]["step"]) for param in params]
        optimizer.state[params[broken]]["step"].fill_(-1.0)
        with pytest.raises(ValueError, match=f"state 'step' of 'group 0, parameter {broken}'"):
            optimizer.step()
        assert all(map(torch.equal, params, before))
        optimizer.state[params[broken]]["step"].fill_(1.0)
        assert [float(optimizer.state[param]["step"]) for param in params] == steps


def test_a_parameter_on_another_device_goes_to_reference(compiled, caplog):
    # There is none here, so the registry is asked.
    backends.say_once.cache_clear()
    with caplog.at_level(logging.WARNING, "pyupdate"):
        for choice in ("auto", "cpu"):
            with pyupdate.use_backend(choice):
                assert backends.backend_for("cpu").name == "cpu"
                assert backends.backend_for("cuda").name == "reference"
        with pyupdate.use_backend("reference"):
            assert backends.backend_for("cpu").name == "reference"
    # Who asks for no back end is told which one the device lacks; nothing else was missing.
    lacks = {name: reason for name, reason in backends.available() if name in ("cuda", "triton")}
    said = [f"back end '{n}' cannot run here, falling back: {why}" for n, why in lacks.items()]
    assert [record.getMessage() for record in caplog.records] == said


def test_available_names_every_back_end_with_its_reason(compiled):
    found = dict(backends.available())
    assert list(found) == ["cuda", "triton", "cpu", "reference"]
    assert found["cuda"] is None or any(w in found["cuda"] for w in ("not built", "CUDA device"))
    assert found["cpu"] is None and found["reference"] is None
    assert found["triton"] is None or "triton" in found["triton"] or "GPU" in found["triton"]


def test_what_a_step_prepares_is_compiled_to_the_bits_of_the_text(compiled, monkeypatch):
    numbers = [0.75, 0.5, 0.25, 0.125, 0.875, 0.375, 0.625, 0.0625]
    wanted = {}
    for rule in (rule for rule in RULES.values() if not rule.counted):
        given = numbers[: len(rule.numbers)]
        wanted[rule.name] = [rule.prepared(step, given, {})[0] for step in (1, 2, 7, 1000)]
    assert "adafactor" in wanted

    def found() -> dict[str, list[dict[str, float]]]:
        return {
            name: [
                cpu.prepared(RULES[name], step, numbers[: len(RULES[name].numbers)])
                for step in (1, 2, 7, 1000)
            ]
            for name in wanted
        }

    with pyupdate.use_backend("reference"):
        assert found() == wanted

    def refused(*_: Any) -> Any:
        message = "the text was run"
        raise AssertionError(message)

    monkeypatch.setattr(Rule, "prepared", refused)
    assert found() == wanted
    with pytest.raises(ValueError, match="rule 'adafactor' prepares 4 numbers, not 3"):
        compiled.prepare("adafactor", numbers[:3])
