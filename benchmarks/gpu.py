# SPDX-License-Identifier: Apache-2.0
"""All that waits for a GPU: builds, tests, sanitizers, benchmarks; one JSON and one SVG.

    python benchmarks/gpu.py [--results build/gpu]      (make gpu RESULTS=...)

Needs what is in the checkout, nvcc, a C++ compiler, CMake, ninja and a Python with torch (2.11 will
do), numpy, pybind11 and pytest; no network. It makes no environment and builds for the GPUs that
are there alone. Without a GPU it says so and succeeds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "benchmarks"))

from pyupdate import native, nvcc  # noqa: E402 - the checkout, not what is installed

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
LIMIT_S = 540
"""For all of it; what does not begin before is listed as left out."""
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
    result: dict[str, Any] = {"build_seconds": timed(build)}
    result["machine"] = machine()
    result["steps"] = {}
    failed = False
    for name, command in steps().items():
        if time.monotonic() - start > LIMIT_S:
            result["steps"][name] = {"left out": "no time was left"}
            continue
        done = execute(command, folder / f"{name}.log", LIMIT_S - (time.monotonic() - start))
        failed = failed or done["exit"] != 0
        result["steps"][name] = done
        print(f"{name}: {'passed' if done['exit'] == 0 else 'FAILED'} ({done['last']})", flush=True)
    if time.monotonic() - start < LIMIT_S:
        result["milliseconds"] = benchmarks(start)
        (folder / "gpu.svg").write_text(drawn(result["milliseconds"]))
    (folder / "gpu.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"make gpu: {'FAILED' if failed else 'all that ran has held'}; see {folder}/gpu.json")
    return 1 if failed else 0


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
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None and (compiler := nvcc.compiler(os.environ)):
        beside = Path(compiler).resolve().with_name("compute-sanitizer")
        sanitizer = str(beside) if beside.exists() else None
    for tool in TOOLS if sanitizer else ():
        start = [str(sanitizer), "--tool", tool, "--error-exitcode", "9"]
        found[tool] = [*start, *python, tests, "-k", "sanitizer"]
    return found


def execute(command: list[str], log: Path, seconds: float) -> dict[str, Any]:
    """Run a command; its exit status, its seconds and the last line that it printed."""
    start = time.monotonic()
    with log.open("w") as out:
        try:
            status = subprocess.run(
                command,
                cwd=ROOT,
                stdout=out,
                stderr=subprocess.STDOUT,
                timeout=max(1.0, seconds),
                check=False,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
            ).returncode
        except subprocess.TimeoutExpired:
            status = 124
    lines = log.read_text().strip().splitlines()
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


def benchmarks(start: float) -> dict[str, Any]:
    """A model each: the median milliseconds of a step, and the bytes that it reads and writes."""
    import torch
    from shapes import MODELS as shapes

    found: dict[str, Any] = {}
    for name in MODELS:
        for clips in (False, True):
            if time.monotonic() - start > LIMIT_S:
                return found
            try:
                found[f"{name}{', clipped' if clips else ''}"] = of_model(
                    shapes[name].make(1.0), clips
                )
            except torch.cuda.OutOfMemoryError:
                found[name] = {"left out": "the GPU has too little memory"}
            torch.cuda.empty_cache()
    return found


def of_model(shapes: list[tuple[int, ...]], clips: bool) -> dict[str, Any]:
    """Times of AdamW on float32 tensors of these shapes, contestants in turns."""
    import torch

    import pyupdate

    params = [torch.nn.Parameter(torch.randn(shape, device="cuda")) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    runs = contestants(params, clips)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in list(runs.values()) * 5:
        run()
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
    }


def contestants(params: list[Any], clips: bool) -> dict[str, Callable[[], object]]:
    """A step each: ours by its back ends, torch's ways, and fused after a norm as apex has it."""
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
    if len(params) <= 500:  # it compiles for minutes beyond
        lr = torch.tensor(1e-3, device="cuda")
        made = torch.optim.AdamW(params, lr=lr, foreach=True, capturable=True)
        runs["torch compiled"] = theirs(torch.compile(made.step, fullgraph=False))
    return runs


def drawn(results: dict[str, Any]) -> str:
    """Bars: the milliseconds of every contestant, model by model."""
    rows, y, lines = 0, 30, []
    for model, found in results.items():
        times = found.get("milliseconds", {})
        if not times:
            continue
        y += 26
        lines.append(f'<text x="10" y="{y}" font-weight="bold">{model}</text>')
        longest = max(times.values())
        for name, ms in times.items():
            y += 18
            rows += 1
            width = 400.0 * ms / longest
            colour = "#1f77b4" if name.startswith("pyupdate") else "#aaaaaa"
            lines.append(f'<text x="10" y="{y}">{name}</text>')
            lines.append(
                f'<rect x="150" y="{y - 11}" width="{width:.1f}" height="13" fill="{colour}"/>'
            )
            lines.append(f'<text x="{156 + width:.1f}" y="{y}">{ms:.3f} ms</text>')
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="660" height="{y + 20}" '
        'font-family="sans-serif" font-size="12">'
    )
    title = '<text x="10" y="20" font-size="15">A step of AdamW, float32 (median)</text>'
    return "\n".join([head, title, *lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
