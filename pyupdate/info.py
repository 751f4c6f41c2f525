# SPDX-License-Identifier: Apache-2.0
"""The doctor's questions: what is installed, what can run here, what cannot and why.

Every probe is guarded, and only the standard library is imported here: a broken install is what the
doctor is for. Torch and the compiled module are first imported in a child process, so that one
which kills its process (a truncated file, an illegal instruction) is reported like any other. A
child that lives through that goes on as the doctor, for importing torch a second time takes as long
as all the rest.
"""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch",
    "numpy",
    "triton",
    "tensorflow",
    "tensorflow-cpu",
    "keras",
    "tf-keras",
    "pybind11",
)
"""Shown with their versions, which are read without importing them."""
TENSORFLOWS = ("tensorflow", "tensorflow-cpu")
KERASES = ("keras", "tf-keras")
FRAGILE = ("numpy", "torch", "pyupdate._C")
"""Imported in a child process first, each without those before it that end one."""
TRY_THEM = """
import sys
killers, names = (one.split() for one in sys.argv[1:])
sys.modules.update(dict.fromkeys(killers))
for name in names:
    print(name, flush=True)
    try:
        __import__(name)
    except BaseException:
        pass
print("-", flush=True)
"""
DONE, RAISED = "-", "!"
"""What a child says after the names."""
PREFIX = "PYUPDATE_"

Report = dict[str, Any]


def report(killers: Mapping[str, str] | None = None) -> Report:
    """What there is to know, as plain data. Never raises.

    Args:
        killers: what `in_a_child` returned; None to look for them in processes that end.

    Returns:
        A dict that ``json`` takes. ``backend`` is the name of the back end that steps a parameter
        on the CPU, None if none can; ``problems`` maps a probe that failed to its error.
    """
    problems: dict[str, str] = {}

    def ask(name: str, probe: Callable[[], Any]) -> Any:
        try:
            return probe()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # an import may raise SystemExit
            problems[name] = f"{type(error).__name__}: {error}"
            return None

    if killers is None:
        killers = ask("imports", imports_that_kill) or {}
    _hide(killers)
    problems |= {f"import of {name}": how for name, how in killers.items()}
    found: Report = {
        "pyupdate": ask("version", _version),
        "folder": str(Path(__file__).parent),
        "python": f"{platform.python_version()} ({sys.executable})",
        "machine": ask("machine", _machine),
        "packages": {name: ask(name, partial(_installed, name)) for name in PACKAGES},
        "torch_build": ask("torch", torch_build),
        "backends": ask("back ends", lambda: back_ends(killers)) or [],
        "choice": ask("choice", _choice),
    }
    found["keras_models"] = ask("Keras models", keras_models)
    found["backend"] = ask("back end in force", lambda: backend_in_force(found["backends"]))
    found["instruction_sets"] = ask("instruction sets", instruction_sets)
    found["threads"] = ask("threads", threads)
    found["threading"] = ask("threading", threading)
    found["build"] = ask("build", build)
    found["environment"] = {k: v for k, v in sorted(os.environ.items()) if k.startswith(PREFIX)}
    found["problems"] = problems
    return found


def in_a_child() -> dict[str, str] | None:
    """Go on in a child process that has imported what may kill one; this one ends as that one does.

    Returns:
        The imports that ended a child, with how. None, and in this process, where there is no fork
        or an import raises: a second attempt in the child would fail for other reasons.
    """
    if not hasattr(os, "fork"):
        return None
    killers: dict[str, str] = {}
    names = list(FRAGILE)
    while True:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            _hide(killers)
            if not _imported(names, writing):
                os._exit(0)
            return killers
        os.close(writing)
        with os.fdopen(reading) as told:
            last = told.read().split()[-1:]
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if last == [RAISED]:
            return None
        if last in ([], [DONE]):
            if status < 0:
                name = signal.Signals(-status).name
                sys.stderr.write(f"python -m pyupdate was ended by {name}\n")
            os._exit(status if status >= 0 else 128 - status)
        killers[last[0]] = _killed(last[0], status)
        names = names[names.index(last[0]) + 1 :]


def _imported(names: list[str], telling: int) -> bool:
    """Import them, silently, each named before it; whether all could be."""
    errors, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    found = DONE
    try:
        for name in names:
            os.write(telling, f"{name}\n".encode())
            __import__(name)
    except KeyboardInterrupt:
        raise
    except BaseException:  # the probes of the report say what it is
        found = RAISED
    finally:
        os.dup2(errors, 2)
    os.write(telling, f"{found}\n".encode())
    for descriptor in (errors, nowhere, telling):
        os.close(descriptor)
    return found == DONE


def _hide(killers: Iterable[str]) -> None:
    """Make importing them an ImportError."""
    for name in killers:
        sys.modules[name] = None  # type: ignore[assignment]


def _killed(name: str, status: int) -> str:
    how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
    return f"importing {name} kills the process ({how})"


def imports_that_kill() -> dict[str, str]:
    """The imports that end a process, by name, with the signal that they end it by."""
    killers: dict[str, str] = {}
    names = [name for name in FRAGILE if name not in sys.modules]
    while names:
        done = subprocess.run(
            [sys.executable, "-c", TRY_THEM, " ".join(killers), " ".join(names)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            timeout=300,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        reached = done.stdout.split()
        if not reached or reached[-1] == DONE:
            break
        killers[reached[-1]] = _killed(reached[-1], done.returncode)
        names = names[names.index(reached[-1]) + 1 :]
    return killers


def back_ends(killers: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """Every back end, with the reason why it cannot run here, or None."""
    from . import backends

    try:
        reasons = dict(backends.available())
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # an import that fails with more than an ImportError
        why = f"{type(error).__name__}: {error}"
        reasons = {row.name: why for row in backends.BACKENDS}
    killed = killers or {}
    if "torch" in killed:
        reasons = dict.fromkeys(reasons, killed["torch"])
    elif "pyupdate._C" in killed:
        reasons["cpu"] = killed["pyupdate._C"]
    if "numpy" in killed:  # what fails without it says so
        said = {name: why for name, why in reasons.items() if why and "numpy" in why}
        reasons |= dict.fromkeys(said, killed["numpy"])
    return [
        {"name": row.name, "summary": row.summary, "runs": not why, "reason": why}
        for row in backends.BACKENDS
        for why in [reasons[row.name]]
    ]


def keras_models() -> dict[str, Any]:
    """Whether Keras models can be stepped, as far as it is seen without importing TensorFlow.

    Importing it takes seconds, and after Triton in one process it aborts.
    """
    reason = None
    chosen = os.environ.get("KERAS_BACKEND", "tensorflow")
    if not any(map(_installed, TENSORFLOWS)):
        reason = "TensorFlow is not installed: pip install 'pyupdate[tensorflow]'"
    elif not any(map(_installed, KERASES)):
        reason = "neither keras nor tf-keras is installed: pip install 'pyupdate[tensorflow]'"
    elif _installed("keras") and chosen != "tensorflow":
        reason = f"KERAS_BACKEND={chosen}: set it to tensorflow before Keras is imported"
    return {"runs": reason is None, "reason": reason}


def backend_in_force(rows: list[dict[str, Any]]) -> str | None:
    """The name of the back end that steps a parameter on the CPU; None if that one cannot run.

    Raises:
        ValueError, RuntimeError: the explicit choice is unknown or cannot run.
    """
    from . import backends

    name = backends.backend_for("cpu").name
    return name if any(row["name"] == name and row["runs"] for row in rows) else None


def torch_build() -> str | None:
    """Which torch this is: for the CPU, for CUDA or for ROCm; None where there is none."""
    if _installed("torch") is None:
        return None
    import torch

    version: Any = torch.version
    for name, found in (("CUDA", version.cuda), ("ROCm", getattr(version, "hip", None))):
        if found:
            seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
            return f"{name} {found} build, {seen} GPU{'' if seen == 1 else 's'} usable"
    return "CPU build"


def instruction_sets() -> dict[str, Any]:
    """Which builds of the compiled passes this processor can run, and which one is in force."""
    _load_torch_first()
    from .backends import cpu

    if cpu.why_not() is not None:
        return {"chosen": None, "available": []}
    from . import _C

    return {"chosen": _C.isa(), "available": _C.isas()}


def threads() -> dict[str, Any]:
    """How many threads a step takes, of how many processors."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found: dict[str, Any] = {"processors": usable, "step": None}
    if _installed("torch") is not None:
        import torch

        found["step"] = torch.get_num_threads()
    return found


def threading() -> dict[str, Any]:
    """What runs the threads of a compiled step, and whether torch's are the same ones."""
    _load_torch_first()
    try:
        from . import _C
    except ImportError:
        return {"kind": None, "libgomp": [], "shared_with_torch": None}
    kind = _C.build_info()["threading"]
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return {"kind": kind, "libgomp": [], "shared_with_torch": None}
    lines = (line.split(maxsplit=5) for line in maps.read_text().splitlines())
    files = {line[5] for line in lines if len(line) == 6}
    libraries = sorted(path for path in files if "libgomp" in Path(path).name)
    torch_is_there = sys.modules.get("torch") is not None
    shared = len(libraries) == 1 if torch_is_there and kind == "OpenMP" else None
    return {"kind": kind, "libgomp": libraries, "shared_with_torch": shared}


def build() -> dict[str, Any]:
    """The build's own record, with what the compiled module itself says where it loads."""
    from . import build_info

    found = dict(build_info.build_info())
    try:
        _load_torch_first()
        from . import _C

        found |= {"compiled": True, **_C.build_info()}
    except KeyboardInterrupt:
        raise
    except BaseException:  # the back ends say why
        found.setdefault("compiled", False)
        found.setdefault("reason", build_info.reason_not_compiled())
    return found


def _load_torch_first() -> None:
    """So that the compiled module finds torch's libgomp and shares its threads."""
    if _installed("torch") is not None:
        import torch  # noqa: F401


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _machine() -> str:
    """The system and the processor, by the name that Linux gives it."""
    system = f"{platform.system()} {platform.machine()}"
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text().splitlines() if listed.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return ", ".join([system, *names[:1]])


def _version() -> str:
    from . import __version__

    return __version__


def _choice() -> str:
    from .backends import choice

    return choice()


# ----- as text -----------------------------------------------------------------------------------


def as_text(found: Report) -> str:
    """A report for a reader."""
    versions = (f"{name} {version}" for name, version in found["packages"].items() if version)
    lines = [
        f"pyupdate     {found['pyupdate']} in {found['folder']}",
        f"python       {found['python']}",
        f"machine      {found['machine']}",
        f"packages     {', '.join(versions) or 'none of those that matter'}",
        f"torch        {found['torch_build'] or 'cannot be used'}",
    ]
    for row in found["backends"]:
        state = "can run" if row["runs"] else f"CANNOT RUN: {row['reason']}"
        lines.append(f"back end     {row['name']}: {state} ({row['summary']})")
    if keras := found["keras_models"]:
        state = "can run, compiled by XLA" if keras["runs"] else f"CANNOT RUN: {keras['reason']}"
        lines.append(f"Keras models {state}")
    force = found["backend"] or "NONE"
    lines.append(f"in force     {force}, chosen by '{found['choice']}', for parameters on the CPU")
    lines += _compiled_lines(found)
    for name, value in found["environment"].items():
        lines.append(f"environment  {name}={value}")
    for probe, error in found["problems"].items():
        lines.append(f"PROBLEM      {probe}: {error}")
    return "\n".join(lines) + "\n"


def _compiled_lines(found: Report) -> list[str]:
    sets, count, kind = found["instruction_sets"], found["threads"], found["threading"]
    lines = []
    if sets and sets["chosen"]:
        others = ", ".join(sets["available"])
        lines.append(f"instructions {sets['chosen']} (this processor can run: {others})")
    if count:
        lines.append(f"threads      {count['step']} a step, {count['processors']} processors")
    if kind and kind["kind"]:
        shared = {True: ", the same threads as torch's", False: ", NOT torch's: they may compete"}
        lines.append(f"threading    {kind['kind']}{shared.get(kind['shared_with_torch'], '')}")
    made = found["build"] or {}
    if made.get("compiled"):
        lines.append(f"compiler     {made.get('compiler') or 'unrecorded'}")
        lines.append(f"flags        {made.get('flags') or 'unrecorded'}")
    elif made.get("reason"):
        lines.append(f"build        no compiled module: {made['reason']}")
    return lines
