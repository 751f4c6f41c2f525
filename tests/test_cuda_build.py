# SPDX-License-Identifier: Apache-2.0
"""What nvcc builds, on a machine without a driver: `make cuda`, in small, and what the doctor says.

One rule on one architecture, with everything else that the shipped module consists of.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from compiling import ROOT, compiler, kept_folder, load_module, program, run, tool
from device.machine_code import FAMILIES

import pyupdate
from pyupdate import nvcc
from pyupdate.kernels.rules import RULES

sys.path.insert(0, str(ROOT / "benchmarks"))
import cuda_build

RULES_FILE = """
from pyupdate.kernels import rules

RULES = {"sgd": rules.RULES["sgd"]}
"""


def build(checkout: Path) -> int:
    """`make cuda` for one rule and one architecture; the module goes into this checkout."""
    environment = {**os.environ, "PYUPDATE_CUDA_ARCHS": "90"}
    with kept_folder("nvcc") as folder:
        rules = folder / "rules.py"
        if (
            not rules.exists() or rules.read_text() != RULES_FILE
        ):  # a new file compiles it all again
            rules.write_text(RULES_FILE)
        given = {"PYUPDATE_RULES": str(rules)}
        return cuda_build.build(folder / "cmake", checkout / "pyupdate", environment, given)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with a CUDA module that nvcc built."""
    compiler(), tool("nvcc"), tool("cmake"), tool("ninja")
    root = tmp_path_factory.mktemp("checkout")
    (root / "pyupdate").mkdir()
    for path in Path(pyupdate.__file__).resolve().parent.iterdir():
        if not path.name.startswith(("_cuda", "__pycache__", "_build_info")):
            (root / "pyupdate" / path.name).symlink_to(path)
    (root / "pyupdate" / "_build_info.json").write_text('{"compiled": true, "cuda": {}}')
    assert build(root) == 0
    return root


def python(checkout: Path, *arguments: str) -> str:
    """What a Python prints that imports this checkout's package, and that sees no GPU."""
    # -S: the finder of an editable install would import another one.
    done = subprocess.run(
        [sys.executable, "-S", *arguments],
        cwd=checkout,
        env={
            **{k: v for k, v in os.environ.items() if not k.startswith(("PYUPDATE_", "PYTHON"))},
            "PYTHONPATH": os.pathsep.join([str(checkout), *sys.path]),
            "CUDA_VISIBLE_DEVICES": "",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_doctor_says_that_there_is_no_device_and_works(checkout):
    lines = python(checkout, "-m", "pyupdate").splitlines()
    (line,) = [line for line in lines if line.startswith("back end     cuda:")]
    assert line.startswith("back end     cuda: CANNOT RUN: no CUDA device: ")
    assert not [line for line in lines if line.startswith("PROBLEM")]


STEPS = """
import sys, torch, pyupdate
sys.path.insert(0, sys.argv[1])
from device_on_cpu import cuda_on_cpu
from pyupdate import _cuda
param = torch.nn.Parameter(torch.ones(3))
param.grad = torch.ones(3)
pyupdate.optim.SGD([param], lr=0.5).step()
print(param.tolist(), sorted(_cuda.digests()), _cuda.__file__, sep="\\n")
try:
    pyupdate.use_backend("cuda").__enter__()
except RuntimeError as error:
    print(error)
optimizer = pyupdate.optim.SGD([param], lr=0.5)
with cuda_on_cpu(_cuda):
    for _ in range(2):
        try:
            optimizer.step()
        except RuntimeError as error:
            print(error)
print(param.tolist())
"""


@pytest.fixture(scope="module")
def said(checkout: Path) -> list[str]:
    """What comes of steps on the CPU, and of steps of the module itself."""
    return python(checkout, "-c", STEPS, str(ROOT / "tests")).splitlines()


def test_the_module_is_imported_and_parameters_on_the_cpu_are_stepped(checkout, said):
    stepped, rules, path, refused = said[:4]
    assert stepped == "[0.5, 0.5, 0.5]"
    assert rules == "['sgd']"
    assert Path(path).parent == checkout / "pyupdate"
    assert "no CUDA device: " in refused


def test_a_step_without_a_driver_is_an_error_in_cudas_words(said):
    *refused, param = said[4:]
    assert len(refused) == 2
    for line in refused:  # 35: no driver, or one that is too old; 100: no device
        begins = "CUDA device 0 could not be made the current one: "
        assert line.startswith(begins)
        assert line.endswith(("(error 35)", "(error 100)"))
    assert param == "[0.5, 0.5, 0.5]"


def test_it_was_compiled_from_the_text_of_the_rule_for_what_was_asked(checkout):
    (path,) = (checkout / "pyupdate").glob("_cuda.*")
    module = load_module("_cuda", path)
    assert module.digests() == {"sgd": RULES["sgd"].digest}
    assert "-fmad=false" in module.build_info()["flags"]
    assert module.build_info()["flags"].endswith("(90)")
    assert '"built": true' in (checkout / "pyupdate" / "_build_info.json").read_text()


def test_the_shipped_module_has_the_code_of_each_architecture_and_ptx_for_later_ones(tmp_path):
    asked = {"PYUPDATE_CUDA": "ON", "PYUPDATE_CUDA_ARCHS": nvcc.ALL}
    asked |= {"CMAKE_CUDA_COMPILER": tool("nvcc"), "Python_EXECUTABLE": sys.executable}
    definitions = [f"-D{key}={value}" for key, value in asked.items()]
    run(tool("cmake"), "-S", ROOT, "-B", tmp_path, "-G", "Ninja", *definitions)
    commands = (tmp_path / "build.ninja").read_text()
    made = set(re.findall(r"arch=compute_(\d+),code=(sm|compute)_(\d+)", commands))
    codes = {(str(family), "sm", str(each)) for each, family in FAMILIES.items()}
    assert made == codes | {("100", "compute", "100")}


@pytest.mark.parametrize("most", [10, 40_000_000])
def test_time_and_size_are_told_and_a_module_that_is_too_large_fails(
    most, tmp_path, monkeypatch, capsys
):
    def built(source: Path, folder: Path, wanted: object, definitions: object) -> object:
        made = tmp_path / "made"
        made.write_bytes(bytes(2_500_000))
        return made, {"built": True, "compiler": "a compiler"}

    monkeypatch.setattr(cuda_build, "MOST_BYTES", most)
    monkeypatch.setattr(cuda_build.nvcc, "build", built)
    monkeypatch.setattr(cuda_build.time, "monotonic", lambda: 7.0)
    program(tmp_path / "bin" / "nvcc", "exit 0")
    asked = {"PATH": str(tmp_path / "bin"), "PYUPDATE_CUDA_ARCHS": "86;90"}
    status = cuda_build.build(tmp_path, tmp_path, asked)
    told = capsys.readouterr()
    assert "cuda: a compiler for 86;90: 0 s on " in told.out
    assert told.out.endswith(" cores, 2.5 MB\n")
    assert status == (1 if most == 10 else 0)
    assert ("2,500,000 bytes are more than the 10 that" in told.err) == (most == 10)


def test_a_machine_without_nvcc_is_told(tmp_path, capsys):
    assert cuda_build.build(tmp_path, tmp_path, {"PATH": ""}) == 1
    assert "cuda: FAILED: no nvcc on PATH or in CUDA_HOME" in capsys.readouterr().err
