# SPDX-License-Identifier: Apache-2.0
"""``python -m pyupdate``: it answers where imports are broken, and its self-test can fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pyupdate
from pyupdate import __main__ as doctor
from pyupdate import backends, build_info, info, selftest
from pyupdate.backends import cpu as cpu_backend
from pyupdate.kernels import oracle
from pyupdate.kernels.rules import RULES
from pyupdate.pytorch import engines

PACKAGE = Path(pyupdate.__file__).resolve().parent
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


@pytest.fixture
def anew() -> Iterator[None]:
    """Back ends are asked again whether they can run, now and after the test."""
    backends._why_not.cache_clear()
    yield
    backends._why_not.cache_clear()


@pytest.fixture(scope="module")
def reported() -> info.Report:
    """A report of this process."""
    return info.report()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with a copy of the package that was never built."""
    package = tmp_path / "pyupdate"
    package.mkdir()
    for path in PACKAGE.iterdir():
        built = path.suffix == ".so" or path.name == "_build_info.json"
        if not built and path.name != "__pycache__":
            (package / path.name).symlink_to(path)
    return tmp_path


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The doctor, with the modules of a folder before all others."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYUPDATE_", "PYTHON"))}
    # -S: the finder of an editable install would look for what the folder lacks in the checkout.
    return subprocess.run(
        [sys.executable, "-S", "-m", "pyupdate", *arguments],
        cwd=folder,
        env={**env, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path]), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def answer(folder: Path, **environment: str) -> dict[str, Any]:
    done = run(folder, "--json", **environment)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def reasons(found: dict[str, Any]) -> dict[str, str | None]:
    """Of the back ends that are for CPU tensors; what a GPU's lacks is another machine's matter."""
    gpus = ("cuda", "triton")
    return {row["name"]: row["reason"] for row in found["backends"] if row["name"] not in gpus}


def test_the_back_end_in_force_is_the_one_that_steps(backend: str) -> None:
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = pyupdate.optim.AdamW([param])
    optimizer.step()
    (plan,) = engines.engine_of(optimizer).plans.values()
    found = info.report()
    assert found["problems"] == {}
    assert found["choice"] == backend
    assert [found["backend"]] == list(plan.backends)


def test_a_report_says_what_this_process_has(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYUPDATE_BACKEND", "reference")
    assert doctor.main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["backend"] == found["choice"] == "reference"
    assert found["environment"]["PYUPDATE_BACKEND"] == "reference"
    # A wheel of PyPI's does not name its build (2.13.0), the library does (2.13.0+cu130).
    assert found["packages"]["torch"] in (torch.__version__, torch.__version__.partition("+")[0])
    assert found["packages"]["numpy"] == np.__version__
    assert found["threads"]["step"] == torch.get_num_threads()
    assert ("CUDA" in found["torch_build"]) == (torch.version.cuda is not None)
    assert {row["name"]: row["reason"] for row in found["backends"]} == dict(backends.available())

    assert doctor.main([]) == 0
    text = capsys.readouterr().out
    assert f"torch {found['packages']['torch']}" in text
    assert "in force     reference" in text
    assert "PYUPDATE_BACKEND=reference" in text


def test_a_report_says_what_is_compiled(compiled: Any, isas: list[str]) -> None:
    compiled.use_isa(isas[0])
    found = info.report()
    assert found["instruction_sets"] == {"chosen": isas[0], "available": isas}
    assert found["build"]["compiled"] is True
    assert found["threading"]["kind"] == compiled.build_info()["threading"]
    if found["threading"]["kind"] == "OpenMP" and sys.platform == "linux":
        assert found["threading"]["shared_with_torch"] is (len(found["threading"]["libgomp"]) == 1)


def test_a_choice_that_cannot_run_is_a_problem_not_a_crash(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYUPDATE_BACKEND", "abacus")
    assert doctor.main([]) == 0
    text = capsys.readouterr().out
    assert "in force     NONE" in text
    assert "no back end is named 'abacus'" in text


def test_an_old_torch_is_a_reason(
    compiled: Any, anew: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(torch.Tensor, "__dlpack_c_exchange_api__")
    found = info.report()
    assert "it came with torch 2.10" in str(reasons(found)["cpu"])
    assert found["backend"] == "reference"


@pytest.mark.parametrize("error", ["ImportError('libcublas.so is missing')", "OSError('bad ELF')"])
def test_a_broken_torch(checkout: Path, error: str) -> None:
    (checkout / "torch.py").write_text(f"raise {error}\n")
    found = answer(checkout)
    said = error.partition("'")[2].rstrip("')")
    assert all(said in str(reason) for reason in reasons(found).values())
    assert found["backend"] is None
    assert said in found["problems"]["torch"]
    assert found["packages"]["numpy"] == np.__version__

    done = run(checkout, "--selftest")
    assert done.returncode == 1
    assert "in force     NONE" in done.stdout
    assert "self-test: FAILED" in done.stdout


def test_a_module_that_was_not_built_and_why(checkout: Path) -> None:
    record = {"compiled": False, "reason": "no C++ compiler was found"}
    (checkout / "pyupdate/_build_info.json").write_text(json.dumps(record))
    found = answer(checkout, PYUPDATE_BACKEND="cpu")
    assert reasons(found) == {"cpu": "no C++ compiler was found", "reference": None}
    assert found["backend"] is None  # it was chosen and cannot run
    assert "cannot run here: no C++ compiler was found" in found["problems"]["back end in force"]
    assert found["build"]["reason"] == "no C++ compiler was found"


def test_a_module_that_does_not_load(checkout: Path) -> None:
    (checkout / "pyupdate/_build_info.json").write_text('{"compiled": true}')
    (checkout / f"pyupdate/_C{SUFFIX}").write_bytes(b"\x7fELF but no more")
    found = answer(checkout)
    assert "the compiled module does not load" in str(reasons(found)["cpu"])
    assert found["backend"] == "reference"


def test_a_module_that_kills_the_process(checkout: Path) -> None:
    (checkout / "pyupdate/_C.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n"
    )
    found = answer(checkout)
    assert reasons(found) == {
        "cpu": "importing pyupdate._C kills the process (SIGILL)",
        "reference": None,
    }
    assert found["backend"] == "reference"


def test_the_record_of_a_build(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = checkout / "_build_info.json"
    monkeypatch.setattr(build_info, "_FILE", record)
    assert build_info.build_info() == {}
    assert "not built" in str(build_info.reason_not_compiled())
    record.write_text("{")
    assert build_info.build_info() == {}
    record.write_text('{"compiled": true}')
    assert build_info.reason_not_compiled() is None


# ----- the self-test ------------------------------------------------------------------------------


def test_the_self_test_passes_and_misses_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--selftest", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["selftest"]
    tried = {(row["backend"], row["rule"]) for row in found["results"] if row["passed"]}
    labels = ["reference"]
    if cpu_backend.why_not() is None:
        from pyupdate import _C

        labels += [f"cpu/{isa}" for isa in _C.isas()]
    keras = [row for row in found["results"] if row["backend"].startswith("keras")]
    tried -= {(row["backend"], row["rule"]) for row in keras}
    assert tried == {(label, rule) for label in labels for rule in RULES}
    left_out = info.keras_models()["reason"]
    if left_out is not None:
        assert [(row["passed"], row["reason"]) for row in keras] == [(None, left_out)]
    else:
        assert {"adamw", "lion", "lars_momentum"} <= {row["rule"] for row in keras if row["passed"]}


@pytest.fixture
def without_keras(monkeypatch: pytest.MonkeyPatch) -> None:
    """The self-test of this process alone."""
    monkeypatch.setattr(selftest, "keras_models", lambda: iter(()))


@pytest.fixture
def only_reference(without_keras: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The self-test of one back end."""
    monkeypatch.setattr(selftest.backends, "available", lambda: [("reference", None)])


# Adafactor's planned pass reads no gradient, so no multiplier of it can show there.
READ_GRADIENTS = {
    name for name, rule in RULES.items() if any("grad" in stage.elements for stage in rule.stages)
}


def failures(text: str) -> list[str]:
    return [line for line in text.splitlines() if "FAILED" in line]


def test_the_self_test_fails_by_its_bits(
    only_reference: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = oracle.step

    def off_by_bits(rule: Any, param: Any, *rest: Any, **options: Any) -> Any:
        new, state = step(rule, param, *rest, **options)
        return (new * np.float32(1 + 2.0**-22) if new.dtype == np.float32 else new), state

    monkeypatch.setattr(oracle, "step", off_by_bits)
    assert doctor.main(["--selftest"]) == 1
    *lines, verdict = failures(capsys.readouterr().out)
    assert len(lines) == len(RULES)
    assert all("BITS DIFFER" in line for line in lines)
    assert f"0 of {len(RULES)}" in verdict


@pytest.mark.slow
def test_the_self_test_fails_by_its_bound(
    only_reference: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = selftest.truth.exact_multiplier
    monkeypatch.setattr(selftest.truth, "exact_multiplier", lambda grads: exact(grads) * 1.01)
    assert doctor.main(["--selftest"]) == 1
    *lines, _ = failures(capsys.readouterr().out)
    assert {line.split()[1] for line in lines} == READ_GRADIENTS
    assert len(lines) == len(READ_GRADIENTS)
    assert all("bits equal" in line for line in lines)


def test_the_self_test_fails_where_a_back_end_raises(
    without_keras: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(selftest.Plan, "step", fail)
    assert doctor.main(["--selftest"]) == 1
    assert "FAILED: RuntimeError: no such luck" in capsys.readouterr().out


@pytest.mark.slow
def test_the_self_test_fails_where_a_back_end_forgets_the_clip(
    without_keras: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    stepped = selftest.Plan.step

    def unclipped(self: Any, inputs: Any, options: Any, scaling: Any) -> Any:
        return stepped(self, inputs, pyupdate.options.Options(), scaling)

    monkeypatch.setattr(selftest.Plan, "step", unclipped)
    results = list(selftest.run())
    assert {result.rule for result in results} == set(RULES)
    assert {result.rule for result in results if result.passed} == set(RULES) - READ_GRADIENTS


def keras_program(monkeypatch: pytest.MonkeyPatch, text: str) -> list[selftest.Result]:
    """What the self-test makes of another program in the place of Keras's half."""
    monkeypatch.setattr(info, "keras_models", lambda: {"runs": True, "reason": None})
    monkeypatch.setattr(selftest, "find_spec", lambda name: name)
    start = subprocess.run

    def started(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert command[1:] == ["-m", "pyupdate.tensorflow.selftest"]
        return start([sys.executable, "-c", text], **options)

    monkeypatch.setattr(subprocess, "run", started)
    return list(selftest.keras_models())


def test_the_self_test_fails_where_keras_ends_early(monkeypatch: pytest.MonkeyPatch) -> None:
    good = selftest.Result("keras", "lion", True, None, 0.5)
    said = f"print({json.dumps(good.as_dict())!r}); exit('no such luck')"
    assert keras_program(monkeypatch, said) == [
        good,
        selftest.Result("keras", "every rule", False, reason="exit 1: no such luck"),
    ]


def test_the_self_test_leaves_out_keras_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "keras_models", lambda: {"runs": False, "reason": "not today"})
    (result,) = selftest.keras_models()
    assert result.passed is None
    assert "left out: not today" in result.line()


@pytest.mark.parametrize(
    ("there", "chosen", "reason"),
    [
        ({"tensorflow-cpu", "keras"}, "tensorflow", None),
        ({"tensorflow", "tf-keras"}, "torch", None),  # tf-keras has no other back end
        (
            {"keras"},
            "tensorflow",
            "TensorFlow is not installed: pip install 'pyupdate[tensorflow]'",
        ),
        ({"tensorflow"}, "tensorflow", "neither keras nor tf-keras is installed"),
        ({"tensorflow", "keras"}, "jax", "KERAS_BACKEND=jax: set it to tensorflow"),
    ],
)
def test_whether_keras_models_can_be_stepped(
    monkeypatch: pytest.MonkeyPatch,
    reported: info.Report,
    there: set[str],
    chosen: str,
    reason: str | None,
) -> None:
    monkeypatch.setattr(info, "_installed", lambda name: "1.0" if name in there else None)
    monkeypatch.setenv("KERAS_BACKEND", chosen)
    found = info.keras_models()
    assert found["runs"] == (reason is None)
    assert (reason or "") in (found["reason"] or "")
    said = "can run, compiled by XLA" if reason is None else f"CANNOT RUN: {reason}"
    assert f"Keras models {said}" in info.as_text(reported | {"keras_models": found})
