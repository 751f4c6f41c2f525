# SPDX-License-Identifier: Apache-2.0
"""In a process of its own for `gpu.py`: what the GPU is, and AdamW's step on one model's shapes.

    python benchmarks/gpu_models.py --about                        # a JSON on stdout
    python benchmarks/gpu_models.py "GPT-2 124M" FILE SECONDS      # FILE is written after each
    python benchmarks/gpu_models.py "GPT-2 124M" FILE SECONDS --compiled

Contestants come one after the other, each made, timed and dropped: beside the tensors one's state
alone is in memory, and what is too large for the GPU is left out by itself. They come twice, the
second time backwards, so that a clock that drifts favours none.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
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

DEVICE = "cuda"
FLASH = "flashoptim"
COMPILED = "torch compiled"
APEX = "torch apex-like"
ROUNDS = 30
WARMING = 5
MANY = 500
"""Beyond so many tensors torch.compile works for minutes."""
NO_TIME = "no time was left"
NO_MEMORY = "the GPU has too little memory"
WHAT_THEY_ARE = {
    "torch fused": "torch.optim.AdamW(fused=True); where it is clipped, behind clip_grad_norm_",
    "torch foreach": "the same with foreach=True",
    COMPILED: "the step of torch.optim.AdamW(foreach=True, capturable=True) by torch.compile",
    APEX: "three multi-tensor passes as apex makes them, by torch's kernels, not by apex: all "
    "gradients unscaled and checked, clip_grad_norm_(foreach=True), AdamW(fused=True)",
}
Maker = Callable[[], Callable[[], object]]


def said(error: BaseException) -> str:
    """An error in a line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def about() -> dict[str, Any]:
    """Which GPU, what drives it, of which sources the figures are, and which back ends can run."""
    import os

    import torch
    from stamp import stamp

    import pyupdate
    from pyupdate import nvcc
    from pyupdate.backends import available

    one = torch.cuda.get_device_properties(0)
    triton = importlib.import_module("triton") if importlib.util.find_spec("triton") else None
    return {
        "gpu": one.name,
        "gpus": torch.cuda.device_count(),
        "architecture": f"{one.major}.{one.minor}",
        "memory": one.total_memory,
        "driver": driver(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton and triton.__version__,
        "nvcc": told(nvcc.compiler(os.environ), "--version", key="release"),
        "python": sys.version.split()[0],
        "pyupdate": pyupdate.__version__,
        **stamp(),
        "back ends": {
            name: reason for name, reason in available() if name in ("cuda", "triton", "cpu")
        },
    }


def driver() -> str | None:
    """The version of NVIDIA's driver: nvidia-smi's, else the kernel module's own."""
    found = told("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    loaded = Path("/proc/driver/nvidia/version")
    return found or (loaded.read_text().splitlines()[0] if loaded.exists() else None)


def told(program: str | None, *arguments: str, key: str = "") -> str | None:
    """The first line with `key` of what a program prints; None where it cannot be asked."""
    path = program and shutil.which(program)
    if not path:
        return None
    try:
        done = subprocess.run(
            [path, *arguments], capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return next((line.strip() for line in done.stdout.splitlines() if key in line), None)


# ----- contestants --------------------------------------------------------------------------------


def contestants(params: list[Any], clips: bool) -> dict[str, Maker]:
    """How a step of each is made: ours by its back ends, torch's ways, others' if installed."""
    import torch

    import pyupdate
    from pyupdate.backends import available

    makers: dict[str, Maker] = {}

    def ours(backend: str) -> Maker:
        def make() -> Callable[[], object]:
            optimizer = pyupdate.optim.AdamW(params, lr=1e-3, max_norm=1.0 if clips else None)

            def run() -> None:
                with pyupdate.use_backend(backend):
                    optimizer.step()

            return run

        return make

    for backend, reason in available():
        if backend in ("cuda", "triton") and reason is None:
            makers[f"pyupdate {backend}"] = ours(backend)

    def theirs(make: Maker, *, unscales: bool = False) -> Maker:
        def made() -> Callable[[], object]:
            step = make()
            found_inf, inverse = torch.zeros(1, device=DEVICE), torch.ones(1, device=DEVICE)
            grads = [param.grad for param in params]

            def run() -> None:
                if unscales:
                    torch._amp_foreach_non_finite_check_and_unscale_(grads, found_inf, inverse)
                if clips:
                    torch.nn.utils.clip_grad_norm_(params, 1.0, foreach=True)
                step()

            return run

        return made

    def of_torch(**way: bool) -> Maker:
        return lambda: torch.optim.AdamW(params, lr=1e-3, **way).step

    makers["torch fused"] = theirs(of_torch(fused=True))
    makers["torch foreach"] = theirs(of_torch(foreach=True))
    if clips:
        makers[APEX] = theirs(of_torch(fused=True), unscales=True)
    if importlib.util.find_spec(FLASH):  # a peer that needs a GPU, where somebody has installed it
        makers[FLASH] = theirs(
            lambda: importlib.import_module(FLASH).FlashAdamW(params, lr=1e-3).step
        )
    return makers


def compiled(params: list[Any]) -> dict[str, Maker]:
    """Torch's step by torch.compile alone."""
    import torch

    def make() -> Callable[[], object]:
        lr = torch.tensor(1e-3, device=DEVICE)
        made = torch.optim.AdamW(params, lr=lr, foreach=True, capturable=True)
        return torch.compile(made.step, fullgraph=False)

    return {COMPILED: make}


# ----- timing -------------------------------------------------------------------------------------


def of_model(
    shapes: list[tuple[int, ...]],
    clips: bool,
    left: Callable[[], float],
    keep: Callable[[dict[str, Any]], object] = dict,
    *,
    compiles: bool = False,
) -> dict[str, Any]:
    """Times of AdamW on float32 tensors of these shapes; `keep` gets what there is after each."""
    import torch

    import pyupdate

    try:
        params = [torch.nn.Parameter(torch.randn(shape, device=DEVICE)) for shape in shapes]
        for param in params:
            param.grad = torch.randn_like(param)
    except torch.cuda.OutOfMemoryError:
        return {"left out": NO_MEMORY}
    moved = pyupdate.bytes_per_parameter(
        pyupdate.optim.AdamW(params, max_norm=1.0 if clips else None)
    ) * sum(param.numel() for param in params)
    makers = compiled(params) if compiles else contestants(params, clips)
    times: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    missing: dict[str, str] = {}

    def found() -> dict[str, Any]:
        medians = {name: statistics.median(times[name]) for name in makers if name in times}
        rates = {name: round(moved / ms / 1e6, 1) for name, ms in medians.items()}
        return {
            "tensors": len(params),
            "bytes of ours": moved,
            "milliseconds": {name: round(ms, 4) for name, ms in medians.items()},
            "GB/s of those bytes": rates,
            **({"failed": dict(failed)} if failed else {}),
            **({"not timed": dict(missing)} if missing else {}),
        }

    rounds = ROUNDS if compiles else -(-ROUNDS // 2)
    for name in makers if compiles else (*makers, *reversed(makers)):
        if name in failed or name in missing:
            continue
        if left() <= 0:
            if name not in times:
                missing[name] = NO_TIME
        else:
            try:
                times.setdefault(name, []).extend(timed(makers[name](), rounds))
            except torch.cuda.OutOfMemoryError:
                missing[name] = NO_MEMORY
            except Exception as error:  # theirs may fail for reasons of theirs: others are timed
                failed[name] = said(error)
            if not times.get(name) or name in failed or name in missing:
                times.pop(name, None)
            gc.collect()
            if DEVICE == "cuda":
                torch.cuda.empty_cache()
        keep(found())
    return found()


def timed(run: Callable[[], object], rounds: int) -> list[float]:
    """Milliseconds of so many runs, each between two events."""
    import torch

    for _ in range(WARMING):
        run()
    torch.cuda.synchronize()
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return times


def write(file: Path, found: dict[str, Any]) -> None:
    """Whole or not at all: whoever reads it may have ended this process."""
    unfinished = file.with_name(file.name + ".new")
    unfinished.write_text(json.dumps(found))
    unfinished.replace(file)


def main(arguments: list[str]) -> None:
    if arguments == ["--about"]:
        print(json.dumps(about()))
        return
    from shapes import MODELS

    model, name, seconds, *compiles = arguments
    file, end = Path(name), time.monotonic() + float(seconds)
    shapes = MODELS[model].make(1.0)
    whole: dict[str, Any] = {}
    for clips in (False,) if compiles else (False, True):
        variant = f"{model}{', clipped' if clips else ''}"

        def keep(found: dict[str, Any], variant: str = variant) -> None:
            write(file, {**whole, variant: found})

        whole[variant] = of_model(
            shapes, clips, lambda: end - time.monotonic(), keep, compiles=bool(compiles)
        )
        write(file, whole)


if __name__ == "__main__":
    main(sys.argv[1:])
