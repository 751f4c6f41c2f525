# SPDX-License-Identifier: Apache-2.0
"""`make gpu` where there is no GPU: what it says, runs, times and writes.

Its GPU is the CPU's run of the CUDA kernels (tests/device), with clocks that say 2 microseconds.
"""

from __future__ import annotations

import json
import os
import sys
import weakref
import xml.etree.ElementTree as ElementTree
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from compiling import ROOT, program
from device_on_cpu import cuda_on_cpu

import pyupdate
from pyupdate import backends

sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu
import gpu_models
import gpu_picture
import shapes

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


@pytest.mark.parametrize("name", ["cuda", pytest.param("triton", marks=pytest.mark.slow)])
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_where_ours_fails_the_command_fails(command, emulated, monkeypatch):
    def refused(name):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(pyupdate, "use_backend", refused)
    status, result, _ = command()
    assert status == 1
    assert result["models"]["few"]["failed"] == {"pyupdate cuda": "RuntimeError: no kernel image"}


@pytest.mark.slow
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


@pytest.mark.slow
def test_without_sanitizers_the_tests_run_and_they_are_listed(command, emulated, monkeypatch):
    monkeypatch.setattr(gpu, "compute_sanitizer", lambda environment: None)
    assert not set(gpu.TOOLS) & set(gpu.steps())
    status, result, _ = command()
    assert status == 0
    for tool in gpu.TOOLS:
        assert result["left out"][tool] == gpu.NO_SANITIZER
