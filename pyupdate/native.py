# SPDX-License-Identifier: Apache-2.0
"""Runs CMake for whoever builds a compiled module: the install, and ``python -m pyupdate.compile``.

Nothing here is called while a program trains.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# CMake finds one of these by itself; named here so that their absence is a reason in plain words.
COMPILERS = ("c++", "g++", "clang++", "icpx", "nvc++")
# Loads a module by its path, as a user's process will, and shows what is compiled into it.
TRY_IT = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location(sys.argv[1], sys.argv[2])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(json.dumps({**module.build_info(), "digests": module.digests()}))
"""


class BuildFailedError(Exception):
    """A compiled module could not be built; the text is the reason."""


def build(
    source: Path,
    folder: Path,
    module: str,
    definitions: Mapping[str, str],
    *,
    target: str | None = None,
) -> Path:
    """Configure and build one extension module.

    Args:
        source: where CMakeLists.txt lies: the checkout, or the package.
        folder: of the build; should be empty.
        module: the name of the module.
        definitions: what CMake is told besides, by the names of CMakeLists.txt.
        target: the module's, where it is another one than that of the CPU passes.

    Returns:
        The module's file, in `folder`.

    Raises:
        BuildFailedError: a tool is missing, or failed; its output has gone to stderr.
    """
    cmake = tool("cmake", "CMAKE_BIN_DIR")
    if cmake is None:
        raise BuildFailedError("cmake was not found (pip install cmake)")
    if importlib.util.find_spec("pybind11") is None:
        raise BuildFailedError("pybind11 was not found (pip install pybind11)")
    if not os.environ.get("CXX") and not any(map(shutil.which, COMPILERS)):
        names = ", ".join(COMPILERS)
        raise BuildFailedError(f"no C++ compiler was found (CXX is not set; no {names} on PATH)")
    configure = [
        *(cmake, "-S", str(source)),
        f"-DPython_EXECUTABLE={sys.executable}",
        *(() if target else (f"-DPYUPDATE_MODULE={module}",)),
        *(f"-D{name}={value}" for name, value in definitions.items()),
    ]
    ninja = tool("ninja", "BIN_DIR")
    if ninja is not None:
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    execute([*configure, "-B", str(folder)])
    only = ("--target", target) if target else ()
    execute([cmake, "--build", str(folder), *only, "--parallel", str(os.cpu_count() or 1)])
    built = sorted(folder.glob(f"{module}.*"))
    if not built:
        raise BuildFailedError(f"the build made no {module}")
    return built[0]


def try_module(name: str, path: Path) -> dict[str, Any]:
    """Load a built module in another process; what it says of its build and its rules.

    Raises:
        BuildFailedError: it does not load.
    """
    told = execute([sys.executable, "-c", TRY_IT, name, str(path)]).splitlines()[-1]
    found: dict[str, Any] = json.loads(told)
    return found


def cmake_version() -> str | None:
    """What CMake calls itself, None where there is none."""
    cmake = tool("cmake", "CMAKE_BIN_DIR")
    return None if cmake is None else execute([cmake, "--version"]).split("\n", 1)[0]


def passes_digest() -> str:
    """What the sources of the passes come to: a module made of others does not fit."""
    package = Path(__file__).parent
    files = sorted(path for path in (package / "csrc").rglob("*") if path.suffix in (".h", ".cpp"))
    whole = hashlib.sha256()
    for path in (*files, package / "kernels" / "emit_cpp.py"):
        whole.update(path.read_bytes())
    return whole.hexdigest()[:32]


def tool(name: str, folder: str) -> str | None:
    """A build tool: the package of that name if this Python has it, else the one on PATH."""
    try:
        package = __import__(name)
    except ImportError:
        return shutil.which(name)
    return shutil.which(name, path=getattr(package, folder)) or shutil.which(name)


def execute(command: list[str]) -> str:
    """The stdout of a command that must succeed; a failed one's output goes to stderr."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    if done.returncode == 0:
        return done.stdout
    sys.stderr.write(done.stdout)
    name = Path(command[0]).name
    raise BuildFailedError(f"{name} failed with exit code {done.returncode}: {gist(done.stdout)}")


def gist(output: str) -> str:
    """The few lines of a failed tool's output that say what was wrong."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for number, line in enumerate(lines):
        if line.startswith("CMake Error"):  # only says where in CMake's own files; what, is below
            lines = lines[number + 1 :]
            break
        if "error:" in line:
            lines = lines[number:]
            break
    else:
        lines = lines[-3:]
    return " ".join(lines[:3])[:500] or "no output"
