# SPDX-License-Identifier: Apache-2.0
"""Builds pyupdate._C with CMake, and installs without it where it cannot be built.

The metadata is in pyproject.toml. Two environment variables decide about the compiled module:
PYUPDATE_PURE_PYTHON=1 leaves it out, PYUPDATE_REQUIRE_COMPILED=1 turns a failed build into a failed
install. Without them a failed build is reported on stderr and recorded in
pyupdate/_build_info.json, which ``python -m pyupdate`` shows, and every update runs in pure Python.

No half-built module can ever be imported: an older one is removed first, the new one is built in
the build folder, loaded once in another process, and put in its place by one rename.
"""

from __future__ import annotations

import datetime
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
# Folders of the repository that the package holds by a symbolic link.
LINKS = ("pyupdate/csrc", "pyupdate/kernels")
# CMake finds one of these by itself; named here so that their absence is a reason in plain words.
COMPILERS = ("c++", "g++", "clang++", "icpx", "nvc++")
# Loads a module by its path, as a user's process will, and shows what is compiled into it.
TRY_IT = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("pyupdate._C", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(json.dumps(module.build_info()))
"""


class BuildFailedError(Exception):
    """The compiled module could not be built; the text is the reason."""


class BuildExtension(build_ext):
    """Builds pyupdate._C, or leaves it out and records why."""

    def run(self) -> None:
        """Build into build/lib, or beside the sources for an editable install."""
        module = Path(self.get_ext_fullpath("pyupdate._C"))
        record = module.with_name("_build_info.json")
        module.parent.mkdir(parents=True, exist_ok=True)
        for stale in module.parent.glob(f"{module.name}*"):
            stale.unlink()
        write_record(record, reason="the build was interrupted")
        try:
            if wanted("PYUPDATE_PURE_PYTHON"):
                raise BuildFailedError("PYUPDATE_PURE_PYTHON=1 was set when pyupdate was installed")
            built, info = self.build(module.name)
            unfinished = module.with_name(f"{module.name}.{os.getpid()}")  # no name to import it by
            shutil.copy2(built, unfinished)
            write_record(record, reason=None, **info)
            unfinished.replace(module)
        except (BuildFailedError, OSError) as error:
            write_record(record, reason=str(error))
            if wanted("PYUPDATE_REQUIRE_COMPILED"):
                raise SystemExit(f"pyupdate: PYUPDATE_REQUIRE_COMPILED=1, but {error}") from error
            sys.stderr.write(
                f"\npyupdate: installed without its compiled module, so updates run in pure Python"
                f" (slower).\n  Why: {error}\n  Shown again by: python -m pyupdate\n\n"
            )

    def build(self, file_name: str) -> tuple[Path, dict[str, str]]:
        """Run CMake and try the module; returns its path and what is recorded of the build."""
        cmake = tool("cmake", "CMAKE_BIN_DIR")
        if cmake is None:
            raise BuildFailedError("cmake was not found (pip install cmake)")
        if importlib.util.find_spec("pybind11") is None:
            raise BuildFailedError("pybind11 was not found (pip install pybind11)")
        if not os.environ.get("CXX") and not any(map(shutil.which, COMPILERS)):
            names = ", ".join(COMPILERS)
            raise BuildFailedError(
                f"no C++ compiler was found (CXX is not set; no {names} on PATH)"
            )
        configure = [
            *(cmake, "-S", str(ROOT)),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DPYUPDATE_WERROR={'ON' if wanted('PYUPDATE_WERROR') else 'OFF'}",
        ]
        ninja = tool("ninja", "BIN_DIR")
        if ninja is not None:
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        # Emptied first: CMake keeps the compiler and the tools that it once found, and those may be
        # gone, as the tools of pip's isolated builds are, or not be what the environment asks for.
        folder = Path(self.build_temp, "cmake").resolve()
        shutil.rmtree(folder, ignore_errors=True)
        execute([*configure, "-B", str(folder)])
        execute([cmake, "--build", str(folder), "--parallel", str(os.cpu_count() or 1)])
        built = folder / file_name
        if not built.exists():
            raise BuildFailedError(f"the build made no {file_name}")
        info = json.loads(execute([sys.executable, "-c", TRY_IT, str(built)]).splitlines()[-1])
        version = execute([cmake, "--version"]).split("\n", 1)[0]
        return built, {"compiler": info["compiler"], "flags": info["flags"], "cmake": version}

    def get_source_files(self) -> list[str]:
        """Nothing: MANIFEST.in names what an sdist holds."""
        return []

    def get_outputs(self) -> list[str]:
        """What was really built."""
        module = Path(self.get_ext_fullpath("pyupdate._C"))
        record = module.with_name("_build_info.json")
        return [str(path) for path in (module, record) if path.exists()]

    def get_output_mapping(self) -> dict[str, str]:
        """Nothing to link: an editable install has the module beside the sources."""
        return {}


class BuildPython(build_py):
    """Copies the Python files into an empty folder: no wheel holds what an old build left."""

    def run(self) -> None:
        """Empty the package's folder under build/lib, then copy."""
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib, "pyupdate"), ignore_errors=True)
        super().run()


class SourceArchive(sdist):
    """Keeps the symbolic links as links, so that an sdist too holds one text of each rule."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        """Copy everything but what lies behind a link, then the links."""
        behind = tuple(f"{link}/" for link in LINKS)
        super().make_release_tree(base_dir, [f for f in files if not f.startswith(behind)])
        for link in LINKS:
            Path(base_dir, link).symlink_to((ROOT / link).readlink(), target_is_directory=True)


def wanted(variable: str) -> bool:
    """Whether an environment variable asks for something."""
    return os.environ.get(variable, "").strip().lower() not in ("", "0", "no", "off", "false")


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


def write_record(path: Path, *, reason: str | None, **build: str) -> None:
    """Replace the record of the build that the doctor reads."""
    seconds = os.environ.get("SOURCE_DATE_EPOCH")  # set by whoever wants the same bytes twice
    when = datetime.datetime.fromtimestamp(float(seconds), datetime.UTC) if seconds else None
    record: dict[str, Any] = {
        "compiled": reason is None,
        "reason": reason,
        "compiler": build.get("compiler"),
        "flags": build.get("flags"),
        "cmake": build.get("cmake"),
        "python": sysconfig.get_config_var("SOABI"),
        "time": (when or datetime.datetime.now(datetime.UTC)).isoformat(timespec="seconds"),
    }
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(path)


setup(
    ext_modules=[Extension("pyupdate._C", sources=[])],
    cmdclass={"build_ext": BuildExtension, "build_py": BuildPython, "sdist": SourceArchive},
)
