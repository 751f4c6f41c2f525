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
import xml.etree.ElementTree as ElementTree
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from compiling import ROOT
from device_on_cpu import cuda_on_cpu

import pyupdate
from pyupdate import backends

sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu
import shapes

SHAPES = [(70,), (33, 5), (1,)]
ELEMENTS = 70 + 33 * 5 + 1
MACHINE = {"gpu": "NVIDIA H200", "architecture": "9.0", "torch": "2.11.0"}
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
    """Everything that `benchmarks` asks of a GPU, on the CPU."""
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "ROUNDS", 3)
    monkeypatch.setattr(gpu, "MODELS", ("few",))
    monkeypatch.setitem(shapes.MODELS, "few", shapes.Model("few", lambda depth: list(SHAPES)))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    # Uncompiled, a capturable step refuses parameters on the CPU.
    monkeypatch.setattr(torch, "compile", lambda step, fullgraph: lambda: None)
    monkeypatch.setattr(backends, "available", lambda: [("cuda", None), ("triton", "not here")])
    monkeypatch.setattr(pyupdate, "use_backend", lambda name: cuda_on_cpu(cuda_module))


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Runs `main` with what it would build and run replaced; its status, the JSON and the SVG."""

    def run(**replaced):
        replaced = {
            "why_not": lambda: None,
            "build": lambda: None,
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
        assert set(found["milliseconds"]) == ways | (
            {"torch compiled"} if name == "few" else set()
        ), name
        assert set(found["milliseconds"].values()) == {0.002}
        assert set(found["GB/s of those bytes"].values()) == {round(each * ELEMENTS / 2e3, 1)}
        assert "failed" not in found
    assert "few" in texts(svg) and "few, clipped" in texts(svg)
    assert texts(svg).count("pyupdate cuda") == 2


def test_a_step_that_fails_fails_the_command_and_the_others_run(command, emulated):
    steps = {
        "memcheck": [sys.executable, "-c", "print('an error'); raise SystemExit(9)"],
        "racecheck": [sys.executable, "-c", "print('fine')"],
    }
    status, result, _ = command(steps=lambda: steps)
    assert status == 1
    assert [step["exit"] for step in result["steps"].values()] == [9, 0]
    assert result["steps"]["memcheck"]["last"] == "an error"
    assert result["models"]["few"]["milliseconds"]


def test_a_build_that_fails_is_in_the_json(command):
    def build():
        raise RuntimeError("nvcc failed\nwith many lines")

    status, result, svg = command(build=build)
    assert status == 1
    assert result == {"build": {"failed": "RuntimeError: nvcc failed"}}
    assert svg is None


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


def test_a_gpu_with_too_little_memory_leaves_a_model_out(command, emulated, monkeypatch):
    made = gpu.of_model

    def of_model(shapes, clips, compiles):
        if clips:
            raise torch.cuda.OutOfMemoryError("so large")
        return made(shapes, clips, compiles)

    monkeypatch.setattr(gpu, "of_model", of_model)
    status, result, svg = command()
    assert status == 0
    assert result["models"]["few, clipped"] == {"left out": "the GPU has too little memory"}
    assert result["models"]["few"]["milliseconds"]
    assert "few, clipped" not in texts(svg)


def test_what_there_is_no_time_for_is_said(command, emulated, monkeypatch):
    monkeypatch.setattr(gpu, "LIMIT_S", 0)
    status, result, _ = command()
    assert status == 0
    for part in (*result["steps"].values(), *result["models"].values()):
        assert part == {"left out": "no time was left"}
    assert len(result["models"]) == 2


def test_bars_are_as_long_as_the_times():
    rates = {"pyupdate cuda": 1400.0, "torch <fused>": 700.0}
    svg = ElementTree.fromstring(
        gpu.drawn(
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
        "make gpu: SKIPPED: no CUDA device: nvidia-smi is not there, or shows none\n"
    )
    assert not (tmp_path / "results").exists()


def test_a_gpu_without_nvcc_or_torchs_cuda_is_told(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    program(tmp_path / "nvidia-smi", "echo 9.0")
    assert gpu.why_not() == "no nvcc on PATH or in CUDA_HOME"
    program(tmp_path / "nvcc", "exit 0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.why_not() == f"torch {torch.__version__} sees no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert gpu.why_not() is None


@pytest.mark.parametrize("where", ["path", "home/bin", "beside/bin", "home/compute-sanitizer"])
def test_the_sanitizers_run_the_small_test(tmp_path, monkeypatch, where):
    # One that checks what it is told, as compute-sanitizer has it, and runs the rest.
    told = '[ "$1 $3 $4" = "--tool --error-exitcode 9" ] || exit 7\nshift 4\nexec "$@" --co'
    tool = program(tmp_path / where / "compute-sanitizer", told)
    program(tmp_path / "beside" / "bin" / "nvcc", "exit 0")
    (tmp_path / "path").mkdir(exist_ok=True)
    (tmp_path / "path" / "nvcc").symlink_to(tmp_path / "beside" / "bin" / "nvcc")
    monkeypatch.setenv("PATH", f"{tmp_path / 'path'}:/usr/bin:/bin")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PYUPDATE_TEST_DEVICE", "cpu")
    found = gpu.steps()
    assert list(found) == ["correctness", *gpu.TOOLS]
    for name in gpu.TOOLS:
        assert found[name][:3] == [str(tool), "--tool", name]
    if where != "path":
        return
    done = gpu.execute(found["memcheck"], tmp_path / "log", 60)
    log = (tmp_path / "log").read_text()
    assert done["exit"] == 0, log
    assert "test_a_small_run_for_the_sanitizer" in log
    assert done["last"].startswith("1/"), log


def test_without_sanitizers_only_the_tests_run(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "compute_sanitizer", lambda environment: None)
    assert list(gpu.steps()) == ["correctness"]


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
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            continue
        for name in names:
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
    for name in ("benchmarks/gpu.py", "tests/test_gpu.py", "tests/conftest.py"):
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
