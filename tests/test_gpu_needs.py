# SPDX-License-Identifier: Apache-2.0
"""What `make gpu` asks of a machine: tools, packages and commands, where they are and are not."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from compiling import ROOT, program

sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu
import gpu_models
import stamp

# ----- what it runs -------------------------------------------------------------------------------


def test_without_a_gpu_it_says_so_and_succeeds(tmp_path):
    # The PATH of a machine with a compiler, and no nvidia-smi.
    program(tmp_path / "nvcc", "exit 0")
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "gpu.py", "--results", tmp_path / "results"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        "make gpu: SKIPPED: no CUDA device: nvidia-smi is not there, or shows none, and torch sees "
        "none\n"
    )
    assert not (tmp_path / "results").exists()


def test_a_gpu_without_nvcc_or_torchs_cuda_is_told(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    program(tmp_path / "nvidia-smi", "echo 9.0")
    assert gpu.architectures() == "90-real"
    assert gpu.why_not() == "no nvcc on PATH or in CUDA_HOME"
    program(tmp_path / "nvcc", "exit 0")

    def too_old():
        warnings.warn("The NVIDIA driver on your system is too old", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", too_old)
    told = f"torch {torch.__version__} sees no CUDA device"
    assert gpu.why_not() == f"{told}; The NVIDIA driver on your system is too old"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert gpu.why_not() is None


def test_a_gpu_that_torch_sees_alone_is_built_for(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: ((9, 0), (8, 0), (9, 0))[i])
    assert gpu.architectures() == "80-real;90-real"


@pytest.mark.parametrize("lacks", ["torch", "numpy"])
def test_a_gpu_and_nvcc_without_a_package_are_told_without_a_traceback(tmp_path, lacks):
    program(tmp_path / "nvcc", "exit 0")
    program(tmp_path / "nvidia-smi", "echo 9.0")
    hides = (
        "import sys, runpy, importlib.util, importlib.abc\n"
        "class Hides(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] == {lacks!r}: raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Hides())\n"
        "found = importlib.util.find_spec\n"
        f"importlib.util.find_spec = lambda name, *a: None if name == {lacks!r} else found(name)\n"
        f"sys.argv = ['gpu.py', '--results', {str(tmp_path / 'results')!r}]\n"
        f"runpy.run_path({str(ROOT / 'benchmarks' / 'gpu.py')!r}, run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", hides],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert f"has no {lacks}; PYTHON=... chooses another" in done.stdout
    result = json.loads((tmp_path / "results" / "gpu.json").read_text())
    assert f"has no {lacks}" in result["cannot run"]


def test_what_the_machine_is_says_driver_tools_and_sources(tmp_path, monkeypatch):
    device = SimpleNamespace(name="NVIDIA H100", major=9, minor=0, total_memory=85 * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    program(tmp_path / "nvidia-smi", "echo 580.65.06")
    program(tmp_path / "nvcc", "echo nvcc; echo Cuda compilation tools, release 13.0, V13.0.48")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = gpu_models.about()
    assert (found["gpu"], found["architecture"]) == ("NVIDIA H100", "9.0")
    assert found["driver"] == "580.65.06"
    assert found["nvcc"] == "Cuda compilation tools, release 13.0, V13.0.48"
    assert set(found["back ends"]) == {"cuda", "triton", "cpu"}
    assert found["back ends"]["cuda"] is not None
    stamped = stamp.stamp()
    assert {key: found[key] for key in stamped} == stamped
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("where", ["path", "home/bin", "beside/bin", "home/compute-sanitizer"])
def test_the_sanitizers_run_the_small_test(tmp_path, monkeypatch, where):
    # One that checks what it is told, as compute-sanitizer has it, and runs the rest.
    told = (
        '[ "$1 $3 $4" = "--tool --error-exitcode 9" ] || exit 7\nshift 4\n'
        '[ "$1 $2" != "--report-api-errors no" ] || shift 2\nexec "$@" --co'
    )
    tool = program(tmp_path / where / "compute-sanitizer", told)
    program(tmp_path / "beside" / "bin" / "nvcc", "exit 0")
    (tmp_path / "path").mkdir(exist_ok=True)
    (tmp_path / "path" / "nvcc").symlink_to(tmp_path / "beside" / "bin" / "nvcc")
    monkeypatch.setenv("PATH", f"{tmp_path / 'path'}:/usr/bin:/bin")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PYUPDATE_TEST_DEVICE", "cpu")
    found = gpu.steps()
    tests = ["correctness", *(f"triton {part + 1}" for part in range(gpu.TRITON_PARTS))]
    assert list(found) == [*tests, *gpu.TOOLS]
    for name in gpu.TOOLS:
        assert found[name][:3] == [str(tool), "--tool", name]
        assert ("--report-api-errors" in found[name]) == (name == "memcheck")
    if where != "path":
        return
    done = gpu.execute(found["memcheck"], tmp_path / "log", 60)
    log = (tmp_path / "log").read_text()
    assert done["exit"] == 0, log
    assert "test_a_small_run_for_the_sanitizer" in log
    assert done["last"].startswith("2/"), log


@pytest.mark.slow
def test_the_parts_share_every_test_of_triton(monkeypatch):
    def collected(*arguments, **environment):
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "--co", *gpu.TESTS, *arguments],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return [line for line in done.stdout.splitlines() if "::" in line]

    whole = collected("-k", "triton")
    n = gpu.TRITON_PARTS
    parts = [collected("-k", "triton", PYUPDATE_TEST_PART=f"{i}/{n}") for i in range(n)]
    assert sorted(name for part in parts for name in part) == sorted(whole)
    assert min(map(len, parts)) > 0
    assert not set(collected("-k", "not triton")) & set(whole)


def test_what_takes_too_long_ends_with_all_that_it_began(tmp_path):
    child = "import time; time.sleep(60)"
    parent = (
        f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {child!r}]); "
        "print(p.pid, flush=True); p.wait()"
    )
    done = gpu.execute([sys.executable, "-c", parent], tmp_path / "log", 2.0)
    assert done["exit"] == 124
    process = Path(f"/proc/{int(done['last'])}/stat")
    for _ in range(500):  # until who has adopted it has seen it end
        if not process.exists() or process.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.01)
    pytest.fail("the child still runs")


# ----- what it needs ------------------------------------------------------------------------------

ALLOWED = {"torch", "numpy", "pybind11", "pytest", "triton"}


def imports(path: Path, seen: dict[Path, set[str]]) -> dict[Path, set[str]]:
    """The packages that a file imports anywhere, and those that ours do which it imports."""
    seen[path] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        else:
            continue
        for name in names:
            if name.startswith("device."):  # of tests without a GPU alone
                continue
            file = Path(*name.split(".")).with_suffix(".py")
            ours = [ROOT / room / file for room in ("tests", "benchmarks")]
            found = next((each for each in ours if each.exists()), None)
            if found is None:
                seen[path].add(name.split(".")[0])
            elif found not in seen:
                imports(found, seen)
    return seen


def test_no_file_that_it_runs_needs_another_package():
    seen: dict[Path, set[str]] = {}
    for name in ("benchmarks/gpu.py", "benchmarks/gpu_models.py", *gpu.TESTS, "tests/conftest.py"):
        imports(ROOT / name, seen)
    for name in ("tests/cases.py", "tests/device_on_cpu.py", "benchmarks/shapes.py"):
        assert ROOT / name in seen
    known = {*sys.stdlib_module_names, *ALLOWED, "pyupdate"}
    # The truth of some rules in other tests, which is imported when it is asked for.
    assert seen.pop(ROOT / "tests" / "peer_rules.py") - known == {"pytorch_optimizer"}
    more = {str(path): names - known for path, names in seen.items() if names - known}
    assert not more
    # Nor does the package itself, of what it imports at once.
    code = "import sys, pyupdate, pyupdate.native, pyupdate.nvcc; print(*sys.modules)"
    told = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    tops = {name.split(".")[0] for name in told}
    assert not tops & {"hypothesis", "pytorch_optimizer", "matplotlib", "tensorflow", "keras"}


# Of dir(triton.language) in Triton 3.6.0, what kernels may name: it is what PyTorch 2.11 brings,
# and the tests here run another one, whose `tl.to_tensor` was missing there.
TRITON_3_6 = """
    arange atomic_add bfloat16 broadcast_to cast cdiv constexpr core debug_barrier div_rn exp
    expand_dims float16 float32 float64 floor full int32 int64 join load log max maximum minimum
    multiple_of num_programs permute pointer_type program_id range reduce reshape sqrt sqrt_rn
    split static_assert static_range store sum tensor trans uint16 uint32 uint64 where zeros
"""


def test_kernels_name_what_triton_3_6_has():
    named = {
        (path.name, name)
        for path in (ROOT / "kernels").rglob("*.py")
        for name in re.findall(r"\btl\.([a-z]\w*)", path.read_text())
    }
    has = set(TRITON_3_6.split())
    assert ("triton_passes.py", "load") in named
    assert not {each for each in named if each[1] not in has}


def test_every_test_that_the_documentation_names_is_there():
    text = (ROOT / "docs" / "gpu_suite.md").read_text()
    named = re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", text)
    assert len(named) >= 15
    for file, test in named:
        assert f"def {test}" in (ROOT / "tests" / file).read_text(), f"{file}::{test}"
