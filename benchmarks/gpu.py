# SPDX-License-Identifier: Apache-2.0
"""All that waits for a GPU: builds, tests, sanitizers, benchmarks; one JSON and one SVG.

    python benchmarks/gpu.py [--results build/gpu]      (make gpu RESULTS=...)

Needs what is in the checkout, nvcc, a C++ compiler, CMake, ninja and a Python with torch (2.11 will
do), numpy, pybind11 and pytest; no network. It makes no environment and builds for the GPUs that
are there alone. Without a GPU it says so and succeeds.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "benchmarks"))

from pyupdate import native, nvcc  # noqa: E402 - the checkout, not what is installed

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
LIMIT_S = 540
"""For all of it; what does not begin before is listed as left out."""
BENCHMARKS_S = 180
"""Of these, what the tests leave to the benchmarks."""
COMPILING_S = 90
"""What torch.compile may take for a step of 161 tensors: it is left out where less is left."""
DEVICE = "cuda"
FLASH = "flashoptim"
ROUNDS = 30
MODELS = ("ResNet-50", "GPT-2 124M", "Llama 1B", "1,000 tiny")


def main() -> int:
    """Run it; 0 where all that ran has held, or nothing can run here."""
    parser = argparse.ArgumentParser(description="All that waits for a GPU.")
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "gpu")
    folder: Path = parser.parse_args().results
    start = time.monotonic()
    reason = why_not()
    if reason is not None:
        print(f"make gpu: SKIPPED: {reason}")
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {}
    good = True
    for part in parts(result, folder, start):
        good &= part
        (folder / "gpu.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"make gpu: {'all that ran has held' if good else 'FAILED'}; see {folder}/gpu.json")
    return 0 if good else 1


def parts(result: dict[str, Any], folder: Path, start: float) -> Iterator[bool]:
    """Fill the result part by part, so that what ends one early loses no other; whether it held."""

    def left(kept: float = 0.0) -> float:
        return LIMIT_S - kept - (time.monotonic() - start)

    try:
        result["build_seconds"] = timed(build)
        result["machine"] = machine()
    except Exception as error:  # whatever it is, the file must say it
        print(f"build: FAILED ({said(error)})", flush=True)
        result["build"] = {"failed": said(error)}
        yield False
        return
    yield True
    result["steps"] = {}
    for name, command in steps().items():
        if left(BENCHMARKS_S) <= 0:
            result["steps"][name] = {"left out": "no time was left"}
            yield True
            continue
        done = execute(command, folder / f"{name}.log", left(BENCHMARKS_S))
        result["steps"][name] = done
        held = done["exit"] == 0
        print(f"{name}: {'passed' if held else 'FAILED'} ({done['last']})", flush=True)
        yield held
    result["models"] = {}
    for name, measured in benchmarks(left):
        result["models"][name] = measured
        (folder / "gpu.svg").write_text(drawn(result["models"]))
        failed = measured.get("failed", {})
        for what, why in failed.items():
            print(f"{name}, {what}: FAILED ({why})", flush=True)
        yield all(
            what.startswith(("torch", FLASH)) for what in failed
        )  # theirs is not for us to mend


def said(error: BaseException) -> str:
    """An error in a line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def why_not() -> str | None:
    """Why nothing of this can run here, None if it can."""
    if not nvcc.of_present_gpus(os.environ):
        return "no CUDA device: nvidia-smi is not there, or shows none"
    if nvcc.compiler(os.environ) is None:
        return "no nvcc on PATH or in CUDA_HOME"
    import torch

    return None if torch.cuda.is_available() else f"torch {torch.__version__} sees no CUDA device"


def timed(run: Callable[[], None]) -> float:
    """The seconds that it takes."""
    start = time.monotonic()
    run()
    return round(time.monotonic() - start, 1)


def build() -> None:
    """Both modules, put beside the sources."""
    folder = ROOT / "build" / "gpu-modules"
    compiler = nvcc.compiler(os.environ)
    definitions = {
        "PYUPDATE_CUDA": "ON",
        "PYUPDATE_CUDA_ARCHS": nvcc.of_present_gpus(os.environ),
        "CMAKE_CUDA_COMPILER": str(compiler),
    }
    for module, target in (("_C", None), ("_cuda", "_cuda")):
        made = native.build(
            ROOT, folder / module, module, definitions if target else {}, target=target
        )
        unfinished = ROOT / "pyupdate" / f"{made.name}.{os.getpid()}"
        shutil.copy2(made, unfinished)
        unfinished.replace(ROOT / "pyupdate" / made.name)


def steps() -> dict[str, list[str]]:
    """What must hold, by name: the command."""
    python, tests = (
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        "tests/test_gpu.py",
    )
    found = {"correctness": [*python, tests]}
    sanitizer = compute_sanitizer(os.environ)
    for tool in TOOLS if sanitizer else ():
        start = [str(sanitizer), "--tool", tool, "--error-exitcode", "9"]
        found[tool] = [*start, *python, tests, "-k", "sanitizer"]
    return found


def compute_sanitizer(environment: Mapping[str, str]) -> str | None:
    """Where it is: on PATH, in CUDA_HOME, beside nvcc, or where CUDA is put; None if nowhere."""
    folders = [environment.get("PATH", "")]
    homes = [environment[key] for key in ("CUDA_HOME", "CUDA_PATH") if environment.get(key)]
    compiler = nvcc.compiler(environment)
    beside = [str(Path(compiler).resolve().parent.parent)] if compiler else []
    for home in (*homes, *beside, "/usr/local/cuda"):
        folders += [f"{home}/bin", f"{home}/compute-sanitizer"]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def execute(command: list[str], log: Path, seconds: float) -> dict[str, Any]:
    """Run a command; its exit status (124: no time was left), seconds and last line."""
    start = time.monotonic()
    with log.open("w") as out:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            start_new_session=True,
        )
        try:
            status = process.wait(max(1.0, seconds))
        except subprocess.TimeoutExpired:
            status = 124
        finally:
            # All that it began: a sanitizer's child would go on, and slow what is timed later.
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    lines = log.read_text(errors="replace").strip().splitlines()
    took = round(time.monotonic() - start, 1)
    return {"exit": status, "seconds": took, "last": lines[-1] if lines else ""}


# ----- benchmarks ---------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Which GPU, and what drives it."""
    import torch

    import pyupdate

    one = torch.cuda.get_device_properties(0)
    return {
        "gpu": one.name,
        "architecture": f"{one.major}.{one.minor}",
        "memory": one.total_memory,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
        "pyupdate": pyupdate.__version__,
    }


def benchmarks(left: Callable[..., float]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The models in turn: what `of_model` finds, or why it could not."""
    import torch
    from shapes import MODELS as shapes

    for model in MODELS:
        for clips in (False, True):
            name = f"{model}{', clipped' if clips else ''}"
            if left() <= 0:
                yield name, {"left out": "no time was left"}
                continue
            try:
                compiles = not clips and left() > COMPILING_S
                yield name, of_model(shapes[model].make(1.0), clips, compiles)
            except torch.cuda.OutOfMemoryError:
                yield name, {"left out": "the GPU has too little memory"}
            except Exception as error:  # the models before it are kept
                yield name, {"failed": {"the model": said(error)}}
            torch.cuda.empty_cache()


def of_model(shapes: list[tuple[int, ...]], clips: bool, compiles: bool) -> dict[str, Any]:
    """Times of AdamW on float32 tensors of these shapes, contestants in turns."""
    import torch

    import pyupdate

    params = [torch.nn.Parameter(torch.randn(shape, device=DEVICE)) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    runs, failed = {}, {}
    for name, run in contestants(params, clips, compiles).items():
        try:
            for _ in range(5):
                run()
            torch.cuda.synchronize()
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # theirs may fail for reasons of theirs: the others are timed
            failed[name] = said(error)
        else:
            runs[name] = run
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(ROUNDS):
        for name, run in runs.items() if turn % 2 == 0 else reversed(runs.items()):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
            run()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end))
    moved = pyupdate.bytes_per_parameter(
        pyupdate.optim.AdamW(params, max_norm=1.0 if clips else None)
    ) * sum(param.numel() for param in params)
    medians = {name: statistics.median(found) for name, found in times.items()}
    return {
        "tensors": len(params),
        "bytes of ours": moved,
        "milliseconds": {name: round(ms, 4) for name, ms in medians.items()},
        "GB/s of those bytes": {name: round(moved / ms / 1e6, 1) for name, ms in medians.items()},
        **({"failed": failed} if failed else {}),
    }


def contestants(params: list[Any], clips: bool, compiles: bool) -> dict[str, Callable[[], object]]:
    """A step each: ours by its back ends, torch's ways, fused after a norm as apex has it, others'.

    Others' is flashoptim's, if it is installed.
    """
    import torch

    import pyupdate
    from pyupdate.backends import available

    runs: dict[str, Callable[[], object]] = {}

    def ours(backend: str) -> Callable[[], object]:
        optimizer = pyupdate.optim.AdamW(params, lr=1e-3, max_norm=1.0 if clips else None)

        def run() -> None:
            with pyupdate.use_backend(backend):
                optimizer.step()

        return run

    for backend, reason in available():
        if backend in ("cuda", "triton") and reason is None:
            runs[f"pyupdate {backend}"] = ours(backend)

    def theirs(step: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            if clips:
                torch.nn.utils.clip_grad_norm_(params, 1.0, foreach=True)
            step()

        return run

    for name, way in (("fused", {"fused": True}), ("foreach", {"foreach": True})):
        runs[f"torch {name}"] = theirs(torch.optim.AdamW(params, lr=1e-3, **way).step)
    if compiles and len(params) <= 500:  # it compiles for minutes beyond
        lr = torch.tensor(1e-3, device=DEVICE)
        made = torch.optim.AdamW(params, lr=lr, foreach=True, capturable=True)
        runs["torch compiled"] = theirs(torch.compile(made.step, fullgraph=False))
    if importlib.util.find_spec(FLASH):  # a peer that needs a GPU, where somebody has installed it
        runs[FLASH] = theirs(flash(params))
    return runs


def flash(params: list[Any]) -> Callable[[], object]:
    """The step of flashoptim's AdamW, whose state is quantised.

    It is made at the first call, where what it refuses is listed as its own failure.
    """
    made: list[Any] = []

    def run() -> None:
        if not made:
            made.append(importlib.import_module(FLASH).FlashAdamW(params, lr=1e-3))
        made[0].step()

    return run


def drawn(results: dict[str, Any]) -> str:
    """Bars: the milliseconds of every contestant, model by model."""
    y, lines = 30, []
    for model, found in results.items():
        times = found.get("milliseconds", {})
        if not times:
            continue
        y += 26
        lines.append(f'<text x="10" y="{y}" font-weight="bold">{escape(model)}</text>')
        longest = max(times.values())
        for name, ms in times.items():
            y += 18
            width = 400.0 * ms / longest
            colour = "#1f77b4" if name.startswith("pyupdate") else "#aaaaaa"
            rate = f"{ms:.3f} ms, {found['GB/s of those bytes'][name]:,.0f} GB/s"
            lines.append(f'<text x="10" y="{y}">{escape(name)}</text>')
            lines.append(
                f'<rect x="150" y="{y - 11}" width="{width:.1f}" height="13" fill="{colour}"/>'
            )
            lines.append(f'<text x="{156 + width:.1f}" y="{y}">{rate}</text>')
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="720" height="{y + 20}" '
        'font-family="sans-serif" font-size="12">'
    )
    title = "A step of AdamW, float32: median, and the bytes of ours by it"
    top = ['<rect width="100%" height="100%" fill="white"/>']
    top.append(f'<text x="10" y="20" font-size="15">{title}</text>')
    return "\n".join([head, *top, *lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
