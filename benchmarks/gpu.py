# SPDX-License-Identifier: Apache-2.0
"""All that waits for a GPU: builds, tests, sanitizers, benchmarks; one JSON and one SVG.

    python benchmarks/gpu.py [--results build/gpu]      (make gpu RESULTS=...)

Needs what is in the checkout, nvcc, a C++ compiler, CMake, ninja and a Python with torch (2.11 will
do), numpy, pybind11 and pytest; no network. It makes no environment and builds for the GPUs that
are there alone. Without a GPU it says so and succeeds; with one, what cannot run is a failure. The
GPU is used by processes of this one, each with an end: one that hangs or dies costs its own part.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "benchmarks"))

from gpu_models import COMPILED, MANY, NO_TIME, WHAT_THEY_ARE, said  # noqa: E402
from gpu_picture import drawn  # noqa: E402

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
TESTS = tuple(f"tests/test_gpu{part}.py" for part in ("", "_layouts", "_streams", "_training"))
TRITON_PARTS = 4
"""Processes that share the tests of `triton`, most of whose time is Triton's compiler's."""
NEEDED = ("torch", "numpy", "pybind11", "pytest")
LIMIT_S = 540
"""For all of it; what does not begin before is listed as left out."""
BUILD_S = 200
"""A build for one architecture took one minute on two cores; this is a hard stop."""
BENCHMARKS_S = 180
"""Of `LIMIT_S`, what the tests leave to the benchmarks."""
COMPILING_S = 45
"""What torch.compile needs for a step of 161 tensors: it is left out where less is left."""
GRACE_S = 15.0
"""After its time a model is asked to begin no other contestant; so much later it is ended."""
MODELS = ("ResNet-50", "GPT-2 124M", "Llama 1B", "1,000 tiny")


def main() -> int:
    """Run it; 0 where all that ran has held, or there is no GPU."""
    parser = argparse.ArgumentParser(description="All that waits for a GPU.")
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "gpu")
    parser.add_argument("--build", metavar="ARCHITECTURES", help="build the modules, nothing else")
    arguments = parser.parse_args()
    if arguments.build:
        build(arguments.build)
        return 0
    folder: Path = arguments.results
    start = time.monotonic()
    archs = architectures()
    if not archs:
        print(f"make gpu: SKIPPED: {NO_GPU}")
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {}
    reason = why_not()
    good = reason is None
    if reason is not None:
        print(f"make gpu: there is a GPU, but nothing can run: {reason}", flush=True)
        result["cannot run"] = reason
    for part in parts(result, folder, start, archs) if good else ():
        good &= part
        keep(result, folder)
    keep(result, folder)
    for name, why in result.get("left out", {}).items():
        print(f"left out: {name}: {why}", flush=True)
    print(f"make gpu: {'all that ran has held' if good else 'FAILED'}; see {folder}/gpu.json")
    return 0 if good else 1


def keep(result: dict[str, Any], folder: Path) -> None:
    """Write what there is, with all that was left out of it in one place."""
    found = {
        name: part["left out"]
        for kind in ("steps", "models")
        for name, part in result.get(kind, {}).items()
        if "left out" in part
    }
    for model, part in result.get("models", {}).items():
        for name, why in part.get("not timed", {}).items():
            found[f"{model}, {name}"] = why
    for name, part in result.get("steps", {}).items():
        for line in part.get("skipped", ()):
            found[f"{name}, {line}"] = "skipped by the test"
    if found:
        result["left out"] = found
    (folder / "gpu.json").write_text(json.dumps(result, indent=2) + "\n")


def parts(result: dict[str, Any], folder: Path, start: float, archs: str) -> Iterator[bool]:
    """Fill the result part by part, so that what ends one early loses no other; whether it held."""

    def left(kept: float = 0.0) -> float:
        return LIMIT_S - kept - (time.monotonic() - start)

    done = built(archs, folder)
    result["build"] = done
    if done["exit"] != 0:
        print(f"build: FAILED ({done['last']})", flush=True)
        yield False
        return
    try:
        result["machine"] = machine()
    except Exception as error:  # whatever it is, the file must say it
        print(f"the GPU: FAILED ({said(error)})", flush=True)
        result["machine"] = {"failed": said(error)}
        yield False
        return
    cannot = {name: why for name, why in result["machine"]["back ends"].items() if why is not None}
    for name, why in cannot.items():
        print(f"back end {name}: FAILED (it cannot run: {why})", flush=True)
    yield not cannot
    result["steps"] = {}
    commands = steps()
    for tool in TOOLS:
        if tool not in commands:
            result["steps"][tool] = {"left out": NO_SANITIZER}
    for stage in ([n for n in commands if n not in TOOLS], [n for n in commands if n in TOOLS]):
        yield at_once({name: commands[name] for name in stage}, folder, left, result["steps"])
    result["models"] = {}
    result["contestants"] = WHAT_THEY_ARE
    for name, measured in benchmarks(left, folder):
        merge(result["models"].setdefault(name, {}), measured)
        (folder / "gpu.svg").write_text(drawn(result["models"]))
        failed = measured.get("failed", {})
        for what, why in failed.items():
            print(f"{name}, {what}: FAILED ({why})", flush=True)
        # Theirs is not for us to mend.
        yield not any(what.startswith(("pyupdate", "the model")) for what in failed)


def at_once(
    commands: dict[str, list[str]],
    folder: Path,
    left: Callable[..., float],
    results: dict[str, Any],
) -> bool:
    """Run commands that do not time anything beside each other; whether all have held."""
    if left(BENCHMARKS_S) <= 0:
        results.update({name: {"left out": NO_TIME} for name in commands})
        return True
    good = True
    with ThreadPoolExecutor(max(1, len(commands))) as pool:
        running = {
            name: pool.submit(
                execute, command, folder / f"{name.replace(' ', '-')}.log", left(BENCHMARKS_S)
            )
            for name, command in commands.items()
        }
        for name, future in running.items():
            done = results[name] = future.result()
            held = done["exit"] == 0 and done["passed"] > 0
            why = done["last"] if done["passed"] or done["exit"] else f"nothing ran: {done['last']}"
            print(f"{name}: {'passed' if held else 'FAILED'} ({why})", flush=True)
            good &= held
    return good


# ----- what there is ------------------------------------------------------------------------------

NO_GPU = "no CUDA device: nvidia-smi is not there, or shows none, and torch sees none"
NO_SANITIZER = "no compute-sanitizer on PATH, in CUDA_HOME or beside nvcc"


def architectures() -> str:
    """The architectures of the GPUs that are there, by nvidia-smi or torch; "" without one."""
    from pyupdate import nvcc

    found = nvcc.of_present_gpus(os.environ)
    if found or importlib.util.find_spec("torch") is None:
        return found
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # why there is none is `why_not`'s
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    seen = {torch.cuda.get_device_capability(i) for i in range(count)}
    return ";".join(f"{major}{minor}-real" for major, minor in sorted(seen))


def why_not() -> str | None:
    """Why nothing of this can run where there is a GPU, None if it can."""
    from pyupdate import nvcc

    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        return f"{sys.executable} has no {', '.join(missing)}; PYTHON=... chooses another"
    if nvcc.compiler(os.environ) is None:
        return "no nvcc on PATH or in CUDA_HOME"
    import torch

    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return None
    why = [str(each.message).strip() for each in heard]
    return "; ".join([f"torch {torch.__version__} sees no CUDA device", *why])


def machine() -> dict[str, Any]:
    """What `gpu_models.about` says of it, in a process that sees what was just built."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu_models.py"), "--about"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["it died"])[-1])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# ----- what it runs -------------------------------------------------------------------------------


def built(archs: str, folder: Path) -> dict[str, Any]:
    """`build` in a process that has an end."""
    command = [sys.executable, str(Path(__file__).resolve()), "--build", archs]
    done = execute(command, folder / "build.log", BUILD_S)
    if done["exit"] == 124:
        done["last"] = f"it took longer than {BUILD_S} s: {done['last']}"
    return done


def build(archs: str) -> None:
    """Both modules, put beside the sources."""
    from pyupdate import native, nvcc

    folder = ROOT / "build" / "gpu-modules"
    definitions = {
        "PYUPDATE_CUDA": "ON",
        "PYUPDATE_CUDA_ARCHS": archs,
        "CMAKE_CUDA_COMPILER": str(nvcc.compiler(os.environ)),
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
    # A warning of torch or Triton that only that day brings is for the log, and fails nothing.
    python = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default"]
    found = {"correctness": [*python, *TESTS, "-k", "not triton"]}
    for part in range(TRITON_PARTS):
        share = ["env", f"PYUPDATE_TEST_PART={part}/{TRITON_PARTS}"]
        found[f"triton {part + 1}"] = [*share, *python, *TESTS, "-k", "triton"]
    sanitizer = compute_sanitizer(os.environ)
    for tool in TOOLS if sanitizer else ():
        start = [str(sanitizer), "--tool", tool, "--error-exitcode", "9"]
        if tool == "memcheck":  # torch asks for what may fail, and looks at the answer
            start += ["--report-api-errors", "no"]
        found[tool] = [*start, *python, TESTS[0], "-k", "sanitizer"]
    return found


def compute_sanitizer(environment: Mapping[str, str]) -> str | None:
    """Where it is: on PATH, in CUDA_HOME, beside nvcc, or where CUDA is put; None if nowhere."""
    from pyupdate import nvcc

    folders = [environment.get("PATH", "")]
    homes = [environment[key] for key in ("CUDA_HOME", "CUDA_PATH") if environment.get(key)]
    compiler = nvcc.compiler(environment)
    beside = [str(Path(compiler).resolve().parent.parent)] if compiler else []
    for home in (*homes, *beside, "/usr/local/cuda"):
        folders += [f"{home}/bin", f"{home}/compute-sanitizer"]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def execute(command: list[str], log: Path, seconds: float) -> dict[str, Any]:
    """Run a command: exit status (124: no time was left), seconds, last line, what pytest says."""
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
            end(process)
    lines = log.read_text(errors="replace").strip().splitlines()
    took = round(time.monotonic() - start, 1)
    found = {"exit": status, "seconds": took, "last": lines[-1] if lines else ""}
    skipped = [line for line in lines if line.startswith("SKIPPED [")]
    counts = [
        int(word)
        for line in lines
        for word, what in zip(line.split(), line.split()[1:], strict=False)
        if what.rstrip(",") == "passed" and word.isdigit()
    ]
    found["passed"] = counts[-1] if counts else 0
    return found | ({"skipped": skipped} if skipped else {})


def end(process: subprocess.Popen[bytes]) -> None:
    """All that it began: a sanitizer's child would go on, and slow what is timed later.

    First by SIGTERM, which ninja hands on to compilers that are in groups of their own.
    """
    for how in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        os.killpg(process.pid, how)
        try:
            process.wait(5.0)
        except subprocess.TimeoutExpired:
            continue


# ----- benchmarks ---------------------------------------------------------------------------------


def benchmarks(left: Callable[..., float], folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The models in turn, plain and clipped; then, in what time is left, torch compiled."""
    from shapes import MODELS as shapes

    for place, model in enumerate(MODELS):
        names = (model, f"{model}, clipped")
        if left() <= 0:
            yield from ((name, {"left out": NO_TIME}) for name in names)
            continue
        seconds = left() / (len(MODELS) - place)
        found = apart(model, folder, seconds, seconds + GRACE_S)
        died = found.pop("failed", None)
        for name in names:
            part = found.get(name, {} if died else {"left out": NO_TIME})
            if died and (name not in found or name == list(found)[-1]):
                part = {**part, "failed": {"the model": died}}
            yield name, part
    for model in MODELS:
        if len(shapes[model].make(1.0)) > MANY:
            yield model, {"not timed": {COMPILED: f"more than {MANY} tensors: it takes minutes"}}
        elif left() < COMPILING_S:
            yield model, {"not timed": {COMPILED: f"{NO_TIME}: {COMPILING_S} s are needed"}}
        else:
            found = apart(model, folder, left(), left(), compiles=True)
            why = found.pop("failed", NO_TIME)
            yield model, found.get(model, {"not timed": {COMPILED: why}})


def apart(
    model: str, folder: Path, seconds: float, limit: float, *, compiles: bool = False
) -> dict[str, Any]:
    """What `gpu_models` finds of a model in a process of its own, as far as it comes."""
    file = folder / "model.json"
    file.unlink(missing_ok=True)
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_models.py"), model, str(file)]
    done = execute(
        [*command, str(seconds), *(["--compiled"] if compiles else [])],
        folder / "model.log",
        limit,
    )
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    if done["exit"] == 124:
        found["failed"] = f"ended after {done['seconds']} s"
    elif done["exit"]:
        found["failed"] = f"exit {done['exit']}: {done['last'][:300]}"
    return found


def merge(into: dict[str, Any], more: dict[str, Any]) -> None:
    """Add to a model what was measured later."""
    for key, value in more.items():
        if isinstance(value, dict):
            into.setdefault(key, {}).update(value)
        else:
            into[key] = value


if __name__ == "__main__":
    sys.exit(main())
