# SPDX-License-Identifier: Apache-2.0
"""What tests compile: the project's own CMake build with other rules, and small C++ files."""

from __future__ import annotations

import ctypes
import fcntl
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType

import pytest

from pyupdate.kernels import emit_cpp
from pyupdate.kernels.language import Rule

ROOT = Path(__file__).resolve().parent.parent
TOY_MODULE = "_toy"

# Those of every file in CMakeLists.txt that bear on results.
FLAGS = ("-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off")


def compiler() -> str:
    """The C++ compiler; the test is skipped where there is none."""
    found = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if found is None:
        pytest.skip("no C++ compiler on PATH")
    return found


def launcher() -> list[str]:
    """What CMake would put before the compiler's name; CI has one."""
    return shlex.split(os.environ.get("CMAKE_CXX_COMPILER_LAUNCHER", ""))


def tool(name: str) -> str:
    """A program beside this Python or on PATH; the test is skipped where there is none."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    found = shutil.which(name, path=path)
    if found is None:
        pytest.skip(f"no {name} on PATH")
    return found


def program(path: Path, text: str) -> Path:
    """A shell script in the place of a tool."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def run(*command: object, cwd: Path = ROOT) -> str:
    """What a command prints; a failure fails the test with it."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    if done.returncode != 0:
        pytest.fail(f"{shlex.join(map(str, command))} failed:\n{done.stdout[-4000:]}")
    return done.stdout


def shared_library(source: str, folder: Path, *flags: str) -> ctypes.CDLL:
    """A C++ text compiled with our flags, loaded; it may include what csrc/ and `folder` hold."""
    text, library = folder / "library.cpp", folder / "library.so"
    text.write_text(source)
    includes = (f"-I{ROOT / 'csrc'}", f"-I{folder}")
    run(compiler(), *FLAGS, *flags, "-shared", "-fPIC", *includes, text, "-o", library)
    return ctypes.CDLL(str(library))


# ----- rules files

RULES_HEAD = """\
from pyupdate.kernels.language import divide, maximum, rule, sqrt, where
from pyupdate.kernels.scalar import integer_power

def prepare(step, lr, eps):
    return lr, eps

def pair(a, b):
    c = a + b
    d = a - b
    return c, d

def half(a):
    return a * 0.5

another_name = half
"""


def rules_of(text: str, folder: Path) -> Mapping[str, Rule]:
    """The RULES of a file with this text after `RULES_HEAD`."""
    path = folder / "bad.py"
    path.write_text(RULES_HEAD + textwrap.dedent(text))
    return emit_cpp.load_rules(path)


# ----- the module of toys


@dataclass(frozen=True)
class Build:
    """The CMake build of tests/toy_rules.py: the shipped rules and the toys."""

    folder: Path

    def module(self) -> ModuleType:
        """The extension, loaded from where it was built."""
        (path,) = self.folder.glob(f"{TOY_MODULE}.*so")
        return load_module(TOY_MODULE, path)

    @cached_property
    def objects(self) -> dict[str, Path]:
        """The object of csrc/cpu/passes.cpp by instruction set."""
        listed = json.loads((self.folder / "compile_commands.json").read_text())
        found = {}
        for entry in listed:
            words = shlex.split(entry["command"])
            isas = [word.removeprefix("-DPYUPDATE_ISA=") for word in words if "_ISA=" in word]
            if isas:
                where = words[words.index("-o") + 1]
                found[isas[0]] = Path(entry["directory"], where)
        return found


def build_toys() -> Build:
    """Run CMake as setup.py does, for other rules and under another name."""
    with kept_folder("toys") as folder:
        cmake(
            folder,
            f"-DPYUPDATE_RULES={ROOT / 'tests' / 'toy_rules.py'}",
            f"-DPYUPDATE_MODULE={TOY_MODULE}",
            "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON",
        )
    return Build(folder)


# ----- what tests/device builds


def device_module(name: str) -> ModuleType:
    """A module of tests/device/CMakeLists.txt, built where it is not as its sources."""
    with device_build(name) as folder:
        (path,) = folder.glob(f"{name}.*so")
        return load_module(name, path)


def device_program(name: str, copy: Path) -> Path:
    """A program of tests/device/CMakeLists.txt, built likewise and copied to this folder."""
    with device_build(name) as folder:
        return Path(shutil.copy(folder / "tests" / "device" / name, copy))


@contextmanager
def device_build(target: str) -> Iterator[Path]:
    """The folder of tests/device's build, with this target in it, for this process alone."""
    with kept_folder("cuda_on_cpu") as folder:
        cmake(folder, "-DPYUPDATE_CUDA_ON_CPU=ON", target=target)
        yield folder


# ----- builds


@contextmanager
def kept_folder(name: str) -> Iterator[Path]:
    """A folder of build/ that this process alone has: tests run side by side.

    It is kept between runs, for a build takes a minute.
    """
    folder = ROOT / "build" / name
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


def cmake(folder: Path, *definitions: str, target: str = "all") -> None:
    """Build in this folder what is not as its sources."""
    program, ninja = tool("cmake"), tool("ninja")
    run(
        program,
        *("-S", ROOT, "-B", folder, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"),
        f"-DCMAKE_CXX_COMPILER={compiler()}",
        f"-DPython_EXECUTABLE={sys.executable}",
        *definitions,
    )
    run(program, "--build", folder, "--target", target, "--parallel", "2")


def load_module(name: str, path: Path) -> ModuleType:
    """An extension, loaded from where it was built."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
