# SPDX-License-Identifier: Apache-2.0
"""CI's compiler launcher: the compiler's own bytes, from its store where nothing differs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from compiling import ROOT, compiler

TEXT = (
    '#include "value.h"\nconst char* file() { return __FILE__; }\nint value() { return VALUE; }\n'
)


class Checkout:
    """A folder with the launcher, sources and a compiler that counts its compilations."""

    def __init__(self, folder: Path, launcher: Path) -> None:
        self.folder, self.launcher = folder, launcher
        (folder / "build").mkdir(parents=True)
        self.write("value.cpp", TEXT)
        self.write("value.h", "#define VALUE 3\n")
        self.compiler = launcher.parent / "counted"
        self.calls = launcher.parent / "calls"

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)

    def compile(self, *flags: str, through: bool = True) -> tuple[int, bytes]:
        """The status of one command, and the object; the folders differ as CMake's do."""
        made = self.folder / "build" / "value.o"
        made.unlink(missing_ok=True)
        command = [
            *((sys.executable, str(self.launcher)) if through else ()),
            *(str(self.compiler), f"-ffile-prefix-map={self.folder}=.", *flags),
            *("-MD", "-MT", "value.o", "-MF", "value.o.d", "-o", str(made)),
            *("-c", str(self.folder / "value.cpp")),
        ]
        cwd = self.folder / "build"
        status = subprocess.run(command, cwd=cwd, capture_output=True, check=False).returncode
        return status, made.read_bytes() if made.exists() else b""

    def compilations(self) -> int:
        return len(self.calls.read_text().splitlines()) if self.calls.exists() else 0


@pytest.fixture
def checkouts(tmp_path) -> list[Checkout]:
    """Two of them, which share a launcher and its store."""
    launcher = tmp_path / ".ci" / "compile_once.py"
    launcher.parent.mkdir()
    shutil.copy(ROOT / ".ci" / "compile_once.py", launcher)
    counted = launcher.parent / "counted"
    counted.write_text(
        f'#!/bin/sh\nfor word; do [ "$word" = -c ] && echo . >> {launcher.parent}/calls; done\n'
        f'exec {compiler()} "$@"\n'
    )
    counted.chmod(0o755)
    return [Checkout(tmp_path / name, launcher) for name in ("one", "another")]


def test_another_folder_gets_the_compilers_own_bytes_without_compiling(checkouts):
    one, another = checkouts
    assert one.compile()[0] == 0
    assert one.compilations() == 1
    status, stored = another.compile()
    assert (status, another.compilations()) == (0, 1)
    assert stored == another.compile(through=False)[1] != b""
    dependencies = (another.folder / "build" / "value.o.d").read_text()
    assert str(another.folder / "value.h") in dependencies


def test_of_two_at_a_time_the_second_waits_for_what_the_first_makes(checkouts):
    with ThreadPoolExecutor(2) as pool:
        (one, first), (another, second) = pool.map(Checkout.compile, checkouts)
    assert one == another == 0
    assert first == second != b""
    assert checkouts[0].compilations() == 1


def test_what_differs_is_compiled(checkouts):
    one, another = checkouts
    seen = {one.compile()[1]}
    another.write("value.h", "#define VALUE 4\n")
    seen.add(another.compile()[1])
    seen.add(one.compile("-O2")[1])
    assert one.compilations() == 3
    os.utime(one.compiler, (1, 1))  # another compiler
    one.compile()
    assert one.compilations() == 4
    assert len(seen) == 3


def test_a_macro_and_a_folder_of_headers_count_where_the_text_sees_them(checkouts):
    one, another = checkouts
    headers = another.folder / "headers"
    headers.mkdir()
    assert one.compile("-DNAME=one")[0] == 0
    for flags in (("-DNAME=two",), (f"-I{headers}",), ("-isystem", str(headers))):
        status, stored = another.compile(*flags)
        assert (status, another.compilations()) == (0, 1)
        assert stored == another.compile(*flags, through=False)[1]
        another.calls.write_text(".\n")  # without the one that did not go through it
    another.write("value.h", "#define VALUE NAME\n")
    seen = {another.compile(f"-DNAME={number}")[1] for number in (1, 2)}
    assert another.compilations() == 3
    assert len(seen) == 2


def test_a_failure_and_a_warning_are_met_every_time(checkouts):
    one, another = checkouts
    one.write("value.cpp", TEXT + "int missing() {}\n")
    another.write("value.cpp", TEXT + "int missing() {}\n")
    warned = ("-Wall", "-Wextra")
    assert one.compile(*warned)[0] == 0
    for checkout in (one, another):
        assert checkout.compile(*warned, "-Werror")[0] != 0
    assert another.compile(*warned)[0] == 0
    assert one.compilations() == 3
    # What passed under -Werror serves those who do not ask for it.
    one.write("value.cpp", TEXT)
    assert one.compile(*warned, "-Werror")[0] == one.compile(*warned)[0] == 0
    assert one.compilations() == 4
    one.write("value.cpp", "int value( {}\n")
    assert one.compile()[0] == one.compile()[0] != 0
