# SPDX-License-Identifier: Apache-2.0
"""``python -m pyupdate.compile``: the same bits as the text it was made of, or a refusal."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from bits import array_of, assert_same_bits, random_values, torch_steps
from cases import DTYPES, name_of
from compiling import ROOT, compiler, tool

import pyupdate
from pyupdate import compile as command
from pyupdate import native
from pyupdate.backends import cpu as cpu_backend
from pyupdate.kernels import oracle
from pyupdate.optim import from_rule
from pyupdate.pytorch.engines import engine_of

RULES = """\
import pyupdate
from pyupdate.language import divide, integer_power, sign, sqrt, where
from pyupdate.kernels.rules import adamw  # is imported, and so is not compiled again


@pyupdate.rule(state={"exp_avg": 0.0}, defaults={"beta": 0.75})
def signum(param, grad, exp_avg, lr, beta):
    exp_avg = exp_avg * beta + grad * (1.0 - beta)
    param = param - lr * sign(exp_avg)
    return param, exp_avg


def prepare_corrected(step, lr, beta):
    one_minus_beta = 1.0 - beta
    correction = divide(1.0, 1.0 - integer_power(beta, step))
    return lr, beta, one_minus_beta, correction


def norms(param, grad, exp_avg, beta, one_minus_beta):
    exp_avg = exp_avg * beta + grad * one_minus_beta
    kept = param * param
    moved = exp_avg * exp_avg
    return exp_avg, kept, moved


@pyupdate.rule(state={"exp_avg": 0.0}, prepare=prepare_corrected, after=(norms,))
def layer_wise(param, exp_avg, kept, moved, lr, correction):
    trust = where(moved > 0.0, divide(sqrt(kept), sqrt(moved)), 1.0)
    param = param - lr * trust * exp_avg * correction
    return param

"""
NUMBERS: dict[str, dict[str, float]] = {
    "signum": {"lr": 0.01, "beta": 0.8},
    "layer_wise": {"lr": 0.1, "beta": 0.9},
}
SIZES = (0, 1, 7, 2_049, 16_385)
STEPS = 3


def load(path: Path, name: str) -> ModuleType:
    """A module or package by its path, known to Python by this name."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def made(compiled: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the command makes of `RULES`."""
    compiler(), tool("cmake")
    folder = tmp_path_factory.mktemp("made")
    (folder / "my_rules.py").write_text(RULES)
    done = subprocess.run(
        [sys.executable, "-m", "pyupdate.compile", "my_rules.py"],
        cwd=folder,
        env={
            "PYTHONPATH": str(ROOT),
            "PATH": str(Path(sys.executable).parent) + ":/usr/bin:/bin",
            "CMAKE_CXX_COMPILER_LAUNCHER": os.environ.get("CMAKE_CXX_COMPILER_LAUNCHER", ""),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "my_rules.py: 2 rules: signum, layer_wise" in done.stdout
    assert "import my_rules_compiled" in done.stdout
    return folder


@pytest.fixture
def package(made: Path) -> Iterator[ModuleType]:
    """The package, imported: its rules are known to the back end for the length of a test."""
    before = list(cpu_backend._modules)
    path = made / "my_rules_compiled" / "my_rules_compiled" / "__init__.py"
    yield load(path, "my_rules_compiled")
    cpu_backend._modules[:] = before
    for name in ("my_rules_compiled", "my_rules_compiled._compiled"):
        sys.modules.pop(name, None)


@pytest.fixture
def rules(made: Path) -> ModuleType:
    return load(made / "my_rules.py", "my_rules")


# ----- what it computes ---------------------------------------------------------------------------


def check_bits(rule: Any, dtype: torch.dtype, backend: str, what: str) -> None:
    rng = np.random.default_rng(91)
    start = [random_values(rng, n, dtype) for n in SIZES]
    grads = [[random_values(rng, n, dtype) for n in SIZES] for _ in range(STEPS)]
    params = [torch.nn.Parameter(value.clone()) for value in start]
    optimizer = from_rule(rule)(params, **NUMBERS[rule.name])
    with pyupdate.use_backend(backend):
        torch_steps(optimizer, params, grads)
    (plan,) = engine_of(optimizer).plans.values()
    assert plan.backends == (backend,)
    for i, param in enumerate(params):
        found = array_of(start[i])
        state = {
            name: oracle.store(np.zeros_like(oracle.load(found)), found) for name in rule.state
        }
        for count, row in enumerate(grads, 1):
            numbers = [NUMBERS[rule.name][name] for name in rule.numbers]
            found, state = oracle.step(rule, found, array_of(row[i]), state, numbers, count=count)
        assert_same_bits(param, found, f"{what}, {backend}, size {SIZES[i]}")
        for name, value in state.items():
            assert_same_bits(optimizer.state[param][name], value, f"{what}, {SIZES[i]}, {name}")


@pytest.mark.parametrize(
    "dtype",
    [
        *(pytest.param(d, marks=pytest.mark.slow, id=name_of(d)) for d in DTYPES[::3]),
        *(pytest.param(d, id=name_of(d)) for d in DTYPES[1:3]),
    ],
)
@pytest.mark.parametrize("name", NUMBERS)
def test_compiled_reference_and_numpy_give_the_same_bits(name, dtype, package, rules, threads):
    rule = getattr(rules, name)
    check_bits(rule, dtype, "reference", name)
    module = package._compiled
    for isa, n in product(module.isas(), threads):
        module.use_isa(isa)
        torch.set_num_threads(n)
        check_bits(rule, dtype, "cpu", f"{name}, {isa}, {n} threads")


def test_a_model_is_stepped_by_the_compiled_rule_without_being_asked(package, rules):
    model = pyupdate.build(torch.nn.Linear(3, 1), rules.signum, lr=0.5, max_norm=1.0)
    pyupdate.update_model(model, model(torch.ones(2, 3)))
    (plan,) = engine_of(model.current_optimizer).plans.values()
    assert plan.backends == ("cpu",)


def test_nothing_is_loaded_by_itself(made, rules):
    param = torch.nn.Parameter(torch.ones(1))
    optimizer = from_rule(rules.signum)([param], lr=0.5)
    torch_steps(optimizer, [param], [[torch.ones(1)]])
    (plan,) = engine_of(optimizer).plans.values()
    assert plan.backends == ("reference",)


# ----- a text that changed ------------------------------------------------------------------------

CHANGES = {
    "a number": ("(1.0 - beta)", "(1.5 - beta)"),
    "a sign": ("param - lr * sign", "param + lr * sign"),
    "an operator": ("exp_avg * beta + grad", "exp_avg * beta - grad"),
    "the state's name": ("exp_avg", "moment"),
    "an argument": ("lr, beta", "beta, lr"),
}
SAME = {
    "a comment": ("    param = param - lr * sign", "    # down\n    param = param - lr * sign"),
    "a docstring": ("    exp_avg = exp", "    '''Signs.'''\n    exp_avg = exp"),
    "hints": ("exp_avg, lr, beta)", "exp_avg: float, lr: float, beta: float) -> tuple"),
    "a default": ('"beta": 0.75', '"beta": 0.5'),
    "blanks": ("lr * sign(exp_avg)", "lr*(sign( exp_avg ))"),
}


def changed(folder: Path, change: tuple[str, str]) -> Any:
    """`signum` of a file with another text."""
    text = RULES[: RULES.index("def prepare_corrected")]
    assert change[0] in text
    path = folder / "changed_rules.py"
    path.write_text(text.replace(*change))
    return load(path, "changed_rules").signum


@pytest.mark.parametrize("what", CHANGES)
def test_a_rule_that_was_changed_since_is_refused_and_nothing_is_written(what, package, tmp_path):
    rule = changed(tmp_path, CHANGES[what])
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = from_rule(rule)([param], lr=0.5)
    message = "rule 'signum' was changed since my_rules_compiled._compiled was compiled: run python"
    for choice in ("auto", "cpu"):
        with pyupdate.use_backend(choice), pytest.raises(RuntimeError, match=message):
            torch_steps(optimizer, [param], [[torch.ones(2)]])
        assert param.tolist() == [1.0, 1.0]
        assert not optimizer.state
    with pyupdate.use_backend("reference"):
        torch_steps(optimizer, [param], [[torch.ones(2)]])
    assert param.tolist() != [1.0, 1.0]


@pytest.mark.parametrize("what", SAME)
def test_what_changes_no_number_of_the_compiled_code_is_the_same_rule(what, package, tmp_path):
    rule = changed(tmp_path, SAME[what])
    assert cpu_backend.module_with(rule) is package._compiled


def test_a_function_that_a_rule_calls_belongs_to_its_text(tmp_path):
    text = (
        "import pyupdate\ndef half(x):\n    return x * 0.5\n"
        "@pyupdate.rule\ndef own(param, lr):\n    param = half(param) * lr\n    return param\n"
    )
    digests = []
    for k, body in enumerate((text, text.replace("0.5", "0.25"), text)):
        path = tmp_path / f"calling_{k}.py"
        path.write_text(body)
        digests.append(load(path, path.stem).own.digest)
    assert digests[0] == digests[2] != digests[1]


def test_a_rule_with_the_name_of_a_shipped_one_is_not_that_one(compiled, tmp_path):
    path = tmp_path / "adamw_rules.py"
    path.write_text(
        "import pyupdate\n@pyupdate.rule\ndef adamw(param, grad, lr):\n"
        "    param = param - lr * grad\n    return param\n"
    )
    param = torch.nn.Parameter(torch.ones(1))
    optimizer = from_rule(load(path, "adamw_rules").adamw)([param], lr=0.5)
    torch_steps(optimizer, [param], [[torch.ones(1)]])
    assert param.item() == 0.5
    (plan,) = engine_of(optimizer).plans.values()
    assert plan.backends == ("reference",)


def test_the_shipped_module_has_the_digests_of_the_shipped_rules(compiled, monkeypatch):
    shipped = pyupdate.kernels.rules.RULES
    assert compiled.digests() == {name: rule.digest for name, rule in shipped.items()}
    monkeypatch.setitem(vars(shipped["sgd"]), "digest", "another")
    with pytest.raises(RuntimeError, match=r"'sgd' was changed since pyupdate._C .* make install"):
        cpu_backend.module_with(shipped["sgd"])


def test_a_package_of_another_pyupdate_is_refused_when_it_is_imported(made, tmp_path, compiled):
    path = made / "my_rules_compiled" / "my_rules_compiled" / "__init__.py"
    other = path.with_name("of_another.py")
    other.write_text(path.read_text().replace(native.passes_digest(), "0" * 32))
    before = list(cpu_backend._modules)
    sys.path.insert(0, str(made / "my_rules_compiled"))
    try:
        with pytest.raises(ImportError, match="another version of pyupdate: run python -m"):
            importlib.import_module("my_rules_compiled.of_another")
    finally:
        sys.path.remove(str(made / "my_rules_compiled"))
        other.unlink()
        cpu_backend._modules[:] = before
        for name in [name for name in sys.modules if name.startswith("my_rules_compiled")]:
            del sys.modules[name]


# ----- the command --------------------------------------------------------------------------------


def test_the_folder_makes_a_wheel_of_this_platform(made, tmp_path):
    pytest.importorskip("setuptools")
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    folder = str(made / "my_rules_compiled")
    done = subprocess.run(
        [*pip, "-w", str(tmp_path), folder], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert not wheel.name.endswith("-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.startswith("my_rules_compiled/_compiled.") for name in names)
    assert "my_rules_compiled/__init__.py" in names


_HEAD = "import pyupdate\n@pyupdate.rule\n"
_BODY = "def own(param, lr):\n    param = param * lr\n    return param\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no file"),
        ("x = 1\n", "there is no rule in it: decorate a function with pyupdate.rule"),
        (_HEAD + _BODY.replace("*", "/"), "rules.py:4: in own: '/' is not in the language: write"),
        ("def f(:\n", "SyntaxError"),
        ("import nothing_of_that_name\n", "No module named 'nothing_of_that_name'"),
        (_HEAD + _BODY + "first = own\n@pyupdate.rule\n" + _BODY, "two rules are named 'own'"),
    ],
)
def test_what_cannot_be_compiled_is_said_before_a_compiler_runs(text, message, tmp_path, capsys):
    path = tmp_path / "rules.py"
    if text is not None:
        path.write_text(text)
    assert command.main([str(path), "--output", str(tmp_path / "out")]) == 1
    found = capsys.readouterr()
    assert message in found.err
    assert found.err.startswith("pyupdate.compile: ")
    assert found.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_missing_tool_is_named(tmp_path, capsys, monkeypatch):
    path = tmp_path / "rules.py"
    path.write_text(_HEAD + _BODY)
    monkeypatch.setattr(native, "tool", lambda name, folder: None)
    assert command.main([str(path), "--output", str(tmp_path / "out")]) == 1
    assert "cmake was not found (pip install cmake)" in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*/*.so"))


def test_a_name_that_is_none_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        command.main([str(tmp_path / "rules.py"), "--name", "my-rules"])
    assert "'my-rules' is no name of a package" in capsys.readouterr().err
