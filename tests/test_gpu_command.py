# SPDX-License-Identifier: Apache-2.0
"""`make gpu` where there is no GPU: what it says, runs, times and writes.

Its GPU is the CPU's run of the CUDA kernels (tests/device), with clocks that say 2 microseconds.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import time
import warnings
import weakref
import xml.etree.ElementTree as ElementTree
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from compiling import ROOT
from device_on_cpu import cuda_on_cpu

import pyupdate
from pyupdate import backends

sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu
import gpu_models
import gpu_picture
import shapes
import stamp

SHAPES = [(70,), (33, 5), (1,)]
ELEMENTS = 70 + 33 * 5 + 1
MACHINE = {
    "gpu": "NVIDIA H200",
    "architecture": "9.0",
    "torch": "2.11.0",
    "back ends": {"cuda": None, "triton": None},
}
BUILT = {"exit": 0, "seconds": 1.0, "last": ""}
SVG = "{http://www.w3.org/2000/svg}"


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


class Event:
    """A CUDA event, and between any two of them are 2 microseconds."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: Event) -> float:
        return 0.002


@pytest.fixture
def emulated(cuda_module, monkeypatch):
    """Everything that `benchmarks` asks of a GPU, on the CPU and in this process."""
    monkeypatch.setattr(gpu_models, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_models, "ROUNDS", 4)
    monkeypatch.setattr(gpu, "MODELS", ("few",))
    monkeypatch.setitem(shapes.MODELS, "few", shapes.Model("few", lambda depth: list(SHAPES)))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    # Uncompiled, a capturable step refuses parameters on the CPU.
    monkeypatch.setattr(torch, "compile", lambda step, fullgraph: lambda: None)
    monkeypatch.setattr(backends, "available", lambda: [("cuda", None), ("triton", "not here")])
    monkeypatch.setattr(pyupdate, "use_backend", lambda name: cuda_on_cpu(cuda_module))

    def apart(model, folder, seconds, limit, *, compiles=False):
        gpu_models.main([model, str(folder / "m"), str(seconds), *["--compiled"] * compiles])
        return json.loads((folder / "m").read_text())

    monkeypatch.setattr(gpu, "apart", apart)


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Runs `main` with what it would build and run replaced; its status, the JSON and the SVG."""

    def run(**replaced):
        replaced = {
            "architectures": lambda: "90-real",
            "why_not": lambda: None,
            "built": lambda archs, folder: BUILT,
            "machine": lambda: MACHINE,
            "steps": lambda: {"correctness": [sys.executable, "-c", "print('164 passed')"]},
        } | replaced
        for name, value in replaced.items():
            monkeypatch.setattr(gpu, name, value)
        folder = tmp_path / "results"
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--results", str(folder)])
        status = gpu.main()
        drawn = folder / "gpu.svg"
        svg = ElementTree.parse(drawn).getroot() if drawn.exists() else None
        return status, json.loads((folder / "gpu.json").read_text()), svg

    return run


def texts(svg: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in svg.iter(f"{SVG}text")]


# ----- the whole of it ----------------------------------------------------------------------------


def test_all_of_it_leaves_a_json_and_an_svg(command, emulated):
    status, result, svg = command()
    assert status == 0
    assert result["machine"] == MACHINE
    step = result["steps"]["correctness"]
    assert (step["exit"], step["last"]) == (0, "164 passed")
    assert set(result["models"]) == {"few", "few, clipped"}
    # fp32 AdamW: 28 bytes a parameter, and 4 where its gradient is read once more for the norm.
    for name, each in (("few", 28), ("few, clipped", 32)):
        found = result["models"][name]
        assert found["tensors"] == 3
        assert found["bytes of ours"] == each * ELEMENTS
        ways = {"pyupdate cuda", "torch fused", "torch foreach"}
        ways.add(gpu_models.COMPILED if name == "few" else gpu_models.APEX)
        assert set(found["milliseconds"]) == ways, name
        assert set(found["milliseconds"].values()) == {0.002}
        assert set(found["GB/s of those bytes"].values()) == {round(each * ELEMENTS / 2e3, 1)}
        assert "failed" not in found
    assert "few" in texts(svg) and "few, clipped" in texts(svg)
    assert texts(svg).count("pyupdate cuda") == 2


def test_a_step_that_fails_fails_the_command_and_the_others_run(command, emulated):
    steps = {
        "memcheck": [sys.executable, "-c", "print('1 passed, an error'); exit(9)"],
        "racecheck": [sys.executable, "-c", "print('1 passed in 2.00s')"],
    }
    status, result, _ = command(steps=lambda: steps)
    assert status == 1
    assert [result["steps"][name]["exit"] for name in steps] == [9, 0]
    assert result["steps"]["memcheck"]["last"] == "1 passed, an error"
    assert result["left out"]["synccheck"] == gpu.NO_SANITIZER
    assert result["models"]["few"]["milliseconds"]


@pytest.mark.parametrize("sleeps", [False, True])
def test_a_build_that_fails_or_hangs_is_in_the_json(command, monkeypatch, tmp_path, sleeps):
    # A CMake that fails, or does not end; the build is `built`'s own process.
    text = "sleep 60" if sleeps else "echo CMake Error: no nvcc; exit 3"
    monkeypatch.setenv("PATH", f"{program(tmp_path / 'bin' / 'cmake', text).parent}:/usr/bin:/bin")
    monkeypatch.setitem(os.environ, "PYTHONPATH", str(ROOT))
    program(tmp_path / "bin" / "nvcc", "exit 0")
    (tmp_path / "cmake.py").write_text(f"CMAKE_BIN_DIR = {str(tmp_path / 'bin')!r}\n")
    made = gpu.execute

    def execute(command, log, seconds):
        if sleeps:
            seconds = 8.0
        code = (
            f"import sys, runpy; sys.path.insert(0, {str(tmp_path)!r}); sys.argv = "
            f"{command[1:]!r}; runpy.run_path({command[1]!r}, run_name='__main__')"
        )
        return made([command[0], "-c", code], log, seconds)

    monkeypatch.setattr(gpu, "execute", execute)
    status, result, svg = command(built=gpu.built)
    assert status == 1
    assert set(result) == {"build"} and svg is None
    assert result["build"]["exit"] == (124 if sleeps else 1)
    why = f"it took longer than {gpu.BUILD_S} s" if sleeps else "cmake failed with exit code 3"
    assert why in result["build"]["last"]


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_back_end_that_cannot_run_fails_though_its_tests_are_skipped(
    command, emulated, capsys, name
):
    why = "no CUDA device: the driver is too old"
    machine = {**MACHINE, "back ends": MACHINE["back ends"] | {name: why}}
    status, result, _ = command(machine=lambda: machine)
    assert status == 1
    assert result["machine"]["back ends"][name] == why
    assert f"back end {name}: FAILED (it cannot run: {why})" in capsys.readouterr().out


def test_tests_that_are_all_skipped_are_no_success(command, emulated, capsys):
    said = "SKIPPED [9] tests/test_gpu.py:30: back end cuda: not built"
    code = f"print({said!r}); print('9 skipped in 0.10s')"
    status, result, _ = command(steps=lambda: {"correctness": [sys.executable, "-c", code]})
    assert status == 1
    assert result["steps"]["correctness"]["skipped"] == [said]
    assert f"correctness, {said}" in result["left out"]
    assert "correctness: FAILED (nothing ran: 9 skipped in 0.10s)" in capsys.readouterr().out


def test_a_gpu_where_nothing_can_run_fails_with_the_reason(command, capsys):
    status, result, _ = command(why_not=lambda: "no nvcc on PATH or in CUDA_HOME")
    assert status == 1
    assert result == {"cannot run": "no nvcc on PATH or in CUDA_HOME"}
    assert "nothing can run: no nvcc on PATH" in capsys.readouterr().out


def test_where_theirs_fails_the_others_are_timed(command, emulated, monkeypatch):
    def refused(step, fullgraph):
        def run():
            raise RuntimeError("no C compiler")

        return run

    monkeypatch.setattr(torch, "compile", refused)
    status, result, _ = command()
    assert status == 0
    found = result["models"]["few"]
    assert found["failed"] == {"torch compiled": "RuntimeError: no C compiler"}
    assert set(found["milliseconds"]) == {"pyupdate cuda", "torch fused", "torch foreach"}


@pytest.mark.parametrize("takes", [True, False])
def test_flashoptim_takes_part_where_it_is_installed(command, emulated, monkeypatch, takes):
    class FlashAdamW(torch.optim.SGD):
        def __init__(self, params, lr):
            if not takes:
                raise ValueError("no float32")
            super().__init__(params, lr=lr)

    installed = ModuleType("flashoptim")
    installed.__spec__ = ModuleSpec("flashoptim", None)
    installed.FlashAdamW = FlashAdamW
    monkeypatch.setitem(sys.modules, "flashoptim", installed)
    status, result, _ = command()
    assert status == 0
    found = result["models"]["few"]
    assert ("flashoptim" in found["milliseconds"]) == takes
    assert found.get("failed") == (None if takes else {"flashoptim": "ValueError: no float32"})
    assert "pyupdate cuda" in found["milliseconds"]


def test_where_ours_fails_the_command_fails(command, emulated, monkeypatch):
    def refused(name):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(pyupdate, "use_backend", refused)
    status, result, _ = command()
    assert status == 1
    assert result["models"]["few"]["failed"] == {"pyupdate cuda": "RuntimeError: no kernel image"}


def test_too_little_memory_leaves_one_contestant_out(command, emulated, monkeypatch):
    made = torch.optim.AdamW.step

    def step(self, closure=None):
        if self.param_groups[0]["foreach"] and "max_norm" not in self.param_groups[0]:
            raise torch.cuda.OutOfMemoryError("so large")
        return made(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    status, result, _ = command()
    assert status == 0
    for name in ("few", "few, clipped"):
        found = result["models"][name]
        assert found["not timed"] == {"torch foreach": gpu_models.NO_MEMORY}
        assert {"pyupdate cuda", "torch fused"} < set(found["milliseconds"])
        assert result["left out"][f"{name}, torch foreach"] == gpu_models.NO_MEMORY


def test_too_little_memory_for_the_tensors_leaves_a_model_out(command, emulated, monkeypatch):
    def randn(*shape, **more):
        raise torch.cuda.OutOfMemoryError("so large")

    monkeypatch.setattr(torch, "randn", randn)
    status, result, _ = command()
    assert status == 0
    assert result["left out"]["few, clipped"] == gpu_models.NO_MEMORY


def test_a_contestant_is_dropped_before_the_next_is_made(emulated, monkeypatch):
    seen: list = []

    class One:
        pass

    def make():
        assert not [each for each in seen if each() is not None]
        one = One()
        seen.append(weakref.ref(one))
        return lambda: one

    monkeypatch.setattr(
        gpu_models, "contestants", lambda params, clips: {"torch a": make, "torch b": make}
    )
    found = gpu_models.of_model(SHAPES, False, lambda: 1.0)
    assert "failed" not in found
    assert set(found["milliseconds"]) == {"torch a", "torch b"}
    assert len(seen) == 4


def test_a_model_that_hangs_or_dies_is_ended_and_keeps_what_it_has(tmp_path, monkeypatch):
    code = (
        "import json, pathlib, sys, time\n"
        "pathlib.Path(sys.argv[2]).write_text(json.dumps({'few': {'tensors': 3}}))\n"
        "if sys.argv[1] == 'hangs': time.sleep(60)\n"
        "print('Segmentation fault'); sys.exit(139)\n"
    )
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "gpu_models.py").write_text(code)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    died = gpu.apart("dies", tmp_path, 5.0, 20.0)
    assert died == {"few": {"tensors": 3}, "failed": "exit 139: Segmentation fault"}
    hung = gpu.apart("hangs", tmp_path, 1.0, 2.0)
    assert hung["few"] == {"tensors": 3} and hung["failed"].startswith("ended after ")
    monkeypatch.setattr(gpu, "MODELS", ("few",))
    monkeypatch.setattr(gpu, "apart", lambda *given, **more: dict(died))
    monkeypatch.setitem(shapes.MODELS, "few", shapes.Model("few", lambda depth: list(SHAPES)))
    told = [(name, part.get("failed")) for name, part in gpu.benchmarks(lambda: 99.0, tmp_path)]
    why = {"the model": died["failed"]}
    assert told == [("few", why), ("few, clipped", why), ("few", None)]


def test_what_there_is_no_time_for_is_said(command, emulated, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "LIMIT_S", 0)
    status, result, _ = command()
    assert status == 0
    assert set(result["models"]) == {"few", "few, clipped"}
    out = capsys.readouterr().out
    for name in ("correctness", "few", "few, clipped"):
        assert result["left out"][name] == gpu_models.NO_TIME
        assert f"left out: {name}: {gpu_models.NO_TIME}" in out
    assert gpu_models.NO_TIME in result["left out"][f"few, {gpu_models.COMPILED}"]


def test_a_contestant_whose_time_has_come_is_named(emulated):
    turns = iter([1.0, 0.0, 0.0, 0.0])
    found = gpu_models.of_model(SHAPES, False, lambda: next(turns, 0.0))
    assert set(found["milliseconds"]) == {"pyupdate cuda"}
    late = {"torch fused", "torch foreach"}
    assert found["not timed"] == dict.fromkeys(late, gpu_models.NO_TIME)


def test_bars_are_as_long_as_the_times():
    rates = {"pyupdate cuda": 1400.0, "torch <fused>": 700.0}
    svg = ElementTree.fromstring(
        gpu_picture.drawn(
            {
                "GPT-2 124M": {
                    "milliseconds": {"pyupdate cuda": 2.5, "torch <fused>": 5.0},
                    "GB/s of those bytes": rates,
                },
                "Llama 1B": {"left out": "no time was left"},
            }
        )
    )
    bars = [each for each in svg.iter(f"{SVG}rect") if each.get("x") is not None]
    ours, theirs = (float(bar.attrib["width"]) for bar in bars)
    assert ours * 2 == theirs
    assert "2.500 ms, 1,400 GB/s" in texts(svg) and "torch <fused>" in texts(svg)
    assert "Llama 1B" not in texts(svg)
    height = float(svg.attrib["height"])
    assert all(float(each.attrib["y"]) < height for each in svg.iter(f"{SVG}text"))


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


def test_without_sanitizers_the_tests_run_and_they_are_listed(command, emulated, monkeypatch):
    monkeypatch.setattr(gpu, "compute_sanitizer", lambda environment: None)
    assert not set(gpu.TOOLS) & set(gpu.steps())
    status, result, _ = command()
    assert status == 0
    for tool in gpu.TOOLS:
        assert result["left out"][tool] == gpu.NO_SANITIZER


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
