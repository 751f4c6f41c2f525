# SPDX-License-Identifier: Apache-2.0
"""Whether an install builds the CUDA module, and for which GPUs. Called while pyupdate is built.

``PYUPDATE_CUDA=auto`` (the default) builds it where there are nvcc and a GPU, for that GPU alone or
for what ``PYUPDATE_CUDA_ARCHS`` names: a build for every GPU takes minutes. ``PYUPDATE_CUDA=1``
builds it for all of `ALL`, or for what ``PYUPDATE_CUDA_ARCHS`` names, on any machine with nvcc, and
makes a failure a failed install; ``PYUPDATE_CUDA=0`` leaves it out.

`build` is the build itself, of an install and of ``make cuda``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import native

ALL = "80-real;86-real;89-real;90-real;100;120-real"
"""In CMake's words: machine code for A100 to B200, and PTX for what comes."""

_TIMEOUT_S = 30


@dataclass(frozen=True)
class Wanted:
    """What an install does about the CUDA module.

    Attributes:
        nvcc: the compiler; None where nothing is built.
        architectures: CMAKE_CUDA_ARCHITECTURES.
        reason: why nothing is built.
        required: whether a failure fails the install.
    """

    nvcc: str | None
    architectures: str = ""
    reason: str | None = None
    required: bool = False


def wanted(environment: Mapping[str, str]) -> Wanted:
    """Decide from the environment, the tools on PATH and the GPUs that the driver shows.

    Raises:
        ValueError: PYUPDATE_CUDA is none of 0, 1 and auto.
    """
    choice = environment.get("PYUPDATE_CUDA", "").strip().lower() or "auto"
    if choice not in ("0", "1", "auto"):
        message = f"PYUPDATE_CUDA must be 0, 1 or auto, but is {choice!r}"
        raise ValueError(message)
    if choice == "0":
        return Wanted(None, reason="PYUPDATE_CUDA=0 was set when pyupdate was installed")
    required = choice == "1"
    nvcc = compiler(environment)
    if nvcc is None:
        return Wanted(None, reason="no nvcc on PATH or in CUDA_HOME", required=required)
    named = environment.get("PYUPDATE_CUDA_ARCHS", "").strip()
    # Asked for though some are named: auto builds nothing without a GPU, whatever is named.
    present = "" if named and required else of_present_gpus(environment)
    if not required and not present:
        return Wanted(
            None, reason="there was no GPU when pyupdate was installed (PYUPDATE_CUDA=1 builds it)"
        )
    return Wanted(nvcc, named or present or ALL, required=required)


def compiler(environment: Mapping[str, str]) -> str | None:
    """The path of nvcc, None if there is none."""
    homes = [environment[key] for key in ("CUDA_HOME", "CUDA_PATH") if environment.get(key)]
    folders = [environment.get("PATH", ""), *(f"{home}/bin" for home in homes)]
    return shutil.which("nvcc", path=os.pathsep.join(folders))


def of_present_gpus(environment: Mapping[str, str]) -> str:
    """The architectures of the GPUs of this machine, "" where there are none."""
    tool = shutil.which("nvidia-smi", path=environment.get("PATH", ""))
    if tool is None:
        return ""
    try:
        told = subprocess.run(
            [tool, "--query-gpu=compute_cap", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
            timeout=_TIMEOUT_S,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    found = {line.strip().replace(".", "") for line in told.splitlines()}
    return ";".join(f"{number}-real" for number in sorted(found) if number.isdigit())


def build(
    source: Path, folder: Path, wanted: Wanted, definitions: Mapping[str, str] | None = None
) -> tuple[Path, dict[str, Any]]:
    """Compile the CUDA module, and load it once in another process.

    Args:
        source: where CMakeLists.txt lies.
        folder: of the build; should be empty.
        wanted: what is built.
        definitions: what CMake is told besides.

    Returns:
        The module's file, in `folder`, and what is recorded of the build.

    Raises:
        native.BuildFailedError: nothing is wanted, a tool failed, or the module does not load.
    """
    if wanted.nvcc is None:
        raise native.BuildFailedError(str(wanted.reason))
    given = {
        "PYUPDATE_CUDA": "ON",
        "PYUPDATE_CUDA_ARCHS": wanted.architectures,
        "CMAKE_CUDA_COMPILER": wanted.nvcc,
    }
    built = native.build(source, folder, "_cuda", {**given, **(definitions or {})}, target="_cuda")
    info = native.try_module("pyupdate._cuda", built)
    record = {"built": True, "reason": None, "compiler": info["compiler"], "flags": info["flags"]}
    return built, record


def put(built: Path, place: Path) -> None:
    """Put a module where it is imported from, by one rename: no half of it can be imported."""
    unfinished = place.with_name(f"{place.name}.{os.getpid()}")
    shutil.copy2(built, unfinished)
    unfinished.replace(place)
