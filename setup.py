# SPDX-License-Identifier: Apache-2.0
"""Builds pyupdate._C with CMake, and pyupdate._cuda; installs without what cannot be built.

The metadata is in pyproject.toml. Of the CUDA module pyupdate/nvcc.py decides. Two environment
variables decide about the other one:
PYUPDATE_PURE_PYTHON=1 leaves it out, PYUPDATE_REQUIRE_COMPILED=1 turns a failed build into a failed
install; PYUPDATE_CUDA=1, which asks for both modules, fails it with either of the two. Without them
a failed build is reported on stderr and recorded in
pyupdate/_build_info.json, which ``python -m pyupdate`` shows, and every update runs in pure Python.

No half-built module can ever be imported: an older one is removed first, the new one is built in
the build folder, loaded once in another process, and put in its place by one rename.
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # an isolated build does not look here
from pyupdate import native, nvcc  # noqa: E402
from pyupdate.native import BuildFailedError  # noqa: E402

# What the package holds by a symbolic link to the repository.
LINKS = ("pyupdate/CMakeLists.txt", "pyupdate/csrc", "pyupdate/kernels")


class BuildExtension(build_ext):
    """Builds pyupdate._C, or leaves it out and records why."""

    def run(self) -> None:
        """Build into build/lib, or beside the sources for an editable install."""
        module = Path(self.get_ext_fullpath("pyupdate._C"))
        cuda = Path(self.get_ext_fullpath("pyupdate._cuda"))
        record = module.with_name("_build_info.json")
        module.parent.mkdir(parents=True, exist_ok=True)
        for stale in (*module.parent.glob(f"{module.name}*"), *cuda.parent.glob(f"{cuda.name}*")):
            stale.unlink()
        write_record(record, reason="the build was interrupted")
        asked_for_cuda = os.environ.get("PYUPDATE_CUDA", "").strip() == "1"
        try:
            if wanted("PYUPDATE_PURE_PYTHON"):
                raise BuildFailedError("PYUPDATE_PURE_PYTHON=1 was set when pyupdate was installed")
            built, info = self.build(module.name)
            of_cuda = self.build_cuda(cuda)
            unfinished = module.with_name(f"{module.name}.{os.getpid()}")  # no name to import it by
            shutil.copy2(built, unfinished)
            write_record(record, reason=None, cuda=of_cuda, **info)
            unfinished.replace(module)
        except (BuildFailedError, OSError) as error:
            write_record(record, reason=str(error))
            if asked_for_cuda:  # which is built behind this one, so it is not there either
                raise SystemExit(f"pyupdate: PYUPDATE_CUDA=1, but {error}") from error
            if wanted("PYUPDATE_REQUIRE_COMPILED"):
                raise SystemExit(f"pyupdate: PYUPDATE_REQUIRE_COMPILED=1, but {error}") from error
            sys.stderr.write(
                f"\npyupdate: installed without its compiled module, so updates run in pure Python"
                f" (slower).\n  Why: {error}\n  Shown again by: python -m pyupdate\n\n"
            )

    def build(self, file_name: str) -> tuple[Path, dict[str, str]]:
        """Run CMake and try the module; returns its path and what is recorded of the build."""
        # Emptied first: CMake keeps the compiler and the tools that it once found, and those may be
        # gone, as the tools of pip's isolated builds are, or not be what the environment asks for.
        folder = Path(self.build_temp, "cmake").resolve()
        shutil.rmtree(folder, ignore_errors=True)
        werror = "ON" if wanted("PYUPDATE_WERROR") else "OFF"
        built = native.build(ROOT, folder, "_C", {"PYUPDATE_WERROR": werror})
        if built.name != file_name:
            raise BuildFailedError(f"the build made {built.name}, not {file_name}")
        info = native.try_module("pyupdate._C", built)
        version = native.cmake_version() or ""
        return built, {"compiler": info["compiler"], "flags": info["flags"], "cmake": version}

    def build_cuda(self, place: Path) -> dict[str, Any]:
        """Build pyupdate._cuda where it is wanted; what is recorded of that."""
        wanted = nvcc.wanted(os.environ)
        try:
            folder = Path(self.build_temp, "cmake-cuda").resolve()
            shutil.rmtree(folder, ignore_errors=True)
            built, record = nvcc.build(ROOT, folder, wanted)
            nvcc.put(built, place)
        except (BuildFailedError, OSError) as error:
            if wanted.required:
                raise SystemExit(f"pyupdate: PYUPDATE_CUDA=1, but {error}") from error
            return {"built": False, "reason": str(error)}
        return record

    def get_source_files(self) -> list[str]:
        """Nothing: MANIFEST.in names what an sdist holds."""
        return []

    def get_outputs(self) -> list[str]:
        """What was really built."""
        module = Path(self.get_ext_fullpath("pyupdate._C"))
        cuda = Path(self.get_ext_fullpath("pyupdate._cuda"))
        record = module.with_name("_build_info.json")
        return [str(path) for path in (module, cuda, record) if path.exists()]

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
            place = Path(base_dir, link)
            place.unlink(missing_ok=True)
            place.symlink_to((ROOT / link).readlink(), target_is_directory=(ROOT / link).is_dir())


def wanted(variable: str) -> bool:
    """Whether an environment variable asks for something."""
    return os.environ.get(variable, "").strip().lower() not in ("", "0", "no", "off", "false")


def write_record(path: Path, *, reason: str | None, **build: Any) -> None:
    """Replace the record of the build that the doctor reads."""
    seconds = os.environ.get("SOURCE_DATE_EPOCH")  # set by whoever wants the same bytes twice
    when = datetime.datetime.fromtimestamp(float(seconds), datetime.UTC) if seconds else None
    record: dict[str, Any] = {
        "compiled": reason is None,
        "reason": reason,
        "compiler": build.get("compiler"),
        "flags": build.get("flags"),
        "cmake": build.get("cmake"),
        "cuda": build.get("cuda", {"built": False, "reason": reason}),
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
