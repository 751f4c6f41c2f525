# SPDX-License-Identifier: Apache-2.0
"""``python -m pyupdate.compile my_rules.py``: a file's rules as a package of compiled code.

The package is made once, ahead of time, with a C++ compiler; the program that trains imports it and
needs none. It holds no text of a rule: a rule is known again by its digest, and one that was
changed since is refused, never run as it was. docs/own_rules.md tells the whole way.
"""

from __future__ import annotations

import argparse
import keyword
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from . import __version__, native
from .kernels.emit_cpp import emit, load_rules
from .kernels.language import Rule, RuleError

_MODULE = "_compiled"

_INIT = '''\
# Written by python -m pyupdate.compile from {file}: compile again, do not edit.
"""Compiled update rules: {rules}.

Import this package before the first step of an optimizer that uses them.
"""

from pyupdate.backends import cpu  # imports torch, whose threads the module shares

from . import _compiled

RULES = {names!r}
cpu.register_module(_compiled, passes={passes!r})
'''

_PYPROJECT = """\
# Written by python -m pyupdate.compile: `pip install` or `pip wheel` this folder.
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "{name}"
version = "0"
description = "Update rules compiled for pyupdate: {rules}"
requires-python = "=={python}.*"
dependencies = ["pyupdate=={version}"]

[tool.setuptools]
packages = ["{name}"]
package-data = {{ {name} = ["*.so"] }}
"""

_SETUP = """\
from setuptools import Distribution, setup


class Binary(Distribution):
    def has_ext_modules(self):  # the wheel is for this platform alone
        return True


setup(distclass=Binary)
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile the rules of a file.

    Args:
        arguments: the command line after the program's name; None for this process's.

    Returns:
        The exit status: 0, or 1 where a rule or the build is at fault; stderr says why.
    """
    parser = argparse.ArgumentParser(
        prog="python -m pyupdate.compile",
        description="Compiles the update rules of a file into a package that a program imports.",
    )
    parser.add_argument("rules", type=Path, help="a Python file with functions of pyupdate.rule")
    parser.add_argument(
        "--name", help="of the package; without it that of the file, with _compiled behind it"
    )
    parser.add_argument(
        "--output", type=Path, help="the folder to make; without it, one of the package's name"
    )
    chosen = parser.parse_args(arguments)
    name = chosen.name or f"{chosen.rules.stem}_compiled"
    if not name.isidentifier() or keyword.iskeyword(name):
        parser.error(f"--name: {name!r} is no name of a package")
    try:
        rules = _rules_of(chosen.rules)
        _compile(chosen.rules, rules, name, chosen.output or Path(name))
    except (RuleError, native.BuildFailedError, OSError) as error:
        sys.stderr.write(f"pyupdate.compile: {error}\n")
        return 1
    return 0


def _rules_of(path: Path) -> Mapping[str, Rule]:
    """The rules of a file, with C++ written of them once to see that it can be."""
    if not path.is_file():
        raise RuleError(f"there is no file {path}")
    try:
        rules = load_rules(path.resolve())
        emit(rules)
    except RuleError:
        raise
    except Exception as error:
        raise RuleError(f"{path}: {type(error).__name__}: {error}") from error
    return rules


def _compile(path: Path, rules: Mapping[str, Rule], name: str, output: Path) -> None:
    listed = ", ".join(rules)
    _say(f"{path}: {len(rules)} rule{'s' * (len(rules) != 1)}: {listed}")
    package = output / name
    package.mkdir(parents=True, exist_ok=True)
    _say(f"compiling with {native.cmake_version()} (half a minute and more) ...")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="build-", dir=output) as folder:
        built = native.build(
            Path(__file__).parent,
            Path(folder).resolve(),
            _MODULE,
            {"PYUPDATE_RULES": str(path.resolve())},
        )
        info = native.try_module(_MODULE, built)
        if info["digests"] != {rule.name: rule.digest for rule in rules.values()}:
            message = f"{path} was changed while it was being compiled: run this again"
            raise native.BuildFailedError(message)
        unfinished = package / f"{built.name}.unfinished"  # no name to import it by
        shutil.copy2(built, unfinished)
        unfinished.replace(package / built.name)
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    values = {"file": path.name, "name": name, "rules": listed, "python": python}
    values |= {"version": __version__, "passes": native.passes_digest()}
    for file, text in (
        (package / "__init__.py", _INIT.format(names=tuple(rules), **values)),
        (output / "pyproject.toml", _PYPROJECT.format(**values)),
        (output / "setup.py", _SETUP),
    ):
        file.write_text(text, encoding="utf-8")
    _say(f"{package}: made in {time.monotonic() - began:.0f} s with {info['compiler']}")
    _say(
        f"install it by `pip install {output.resolve()}`, and `import {name}` before the first step"
    )


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
