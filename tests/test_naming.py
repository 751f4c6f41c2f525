# SPDX-License-Identifier: Apache-2.0
"""Names that C++ has another use for are refused when a function is analysed, with their line."""

from __future__ import annotations

import re
import subprocess

import pytest
from compiling import FLAGS, ROOT, compiler
from test_language import check_refused

from pyupdate.kernels import naming, rules
from pyupdate.kernels.language import analyse

HEAD = "@rule(state={}, prepare=prepare)\n"

PLACES = {
    "rule": ("def double(param, lr):  # <-\n    return param\n", "'double' is a keyword of C++"),
    "argument": (
        "def twice(x, switch):  # <-\n    return x\n"
        f"{HEAD}def bad(param, lr):\n    param = twice(param, lr)\n    return param\n",
        "'switch' is a keyword",
    ),
    "variable": (
        "def bad(param, lr):\n    errno = lr * lr  # <-\n    param = errno\n    return param\n",
        "'errno' may be a macro",
    ),
    "one-of-two": (
        "def bad(param, lr):\n    a, register = pair(param, lr)  # <-\n    return param\n",
        "'register' is a keyword",
    ),
    "capitals": (
        "def bad(param, lr):\n    T = lr  # <-\n    return param\n",
        "'T' begins with a capital",
    ),
    "reserved": (
        "def bad(param, lr):\n    _Lr = lr  # <-\n    return param\n",
        "'_Lr' is reserved",
    ),
    "letters": ("def bad(param, lr):\n    β = lr  # <-\n    return param\n", "'β' is not plain"),
    "cuda": ("def bad(param, cudaStream):  # <-\n    return param\n", "begins as names of CUDA do"),
    "prepare": (
        "def prepare_it(step, int):  # <-\n    return step, int\n"
        "@rule(state={}, prepare=prepare_it)\ndef bad(param, step):\n    return param\n",
        "'int' is a keyword",
    ),
    "member": ("def stage0(param, lr):  # <-\n    return param\n", "'stage0' is what the C++"),
    "shadow": (
        "def bad(param, half):\n    param = half(param)  # <-\n    return param\n",
        "'half' is a value here",
    ),
    "shadowed-primitive": (
        "def bad(param, lr):\n    sqrt = sqrt(lr)  # <-\n    return param\n",
        "'sqrt' is a value here",
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_name_that_cpp_cannot_take_is_refused_with_its_line(place, tmp_path):
    text, message = PLACES[place]
    check_refused(text if "@rule" in text else HEAD + text, message, tmp_path)


def test_every_macro_of_a_compiler_is_refused():
    ours = [path.read_text() for path in (ROOT / "csrc").rglob("*.h")]
    headers = set(re.findall(r"^#include (<[\w.]+>)", "".join(ours), re.MULTILINE))
    headers -= {"<omp.h>", "<Python.h>"}  # not of the passes, which alone hold what is emitted
    headers -= {"<cuda_runtime.h>"}  # nvcc's: all of its macros begin with cuda and a capital
    assert "<stdint.h>" in headers
    source = "".join(f"#include {header}\n" for header in sorted(headers))
    command = [compiler(), "-x", "c++", "-dM", "-E", "-include", ROOT / "csrc" / "types.h", "-"]
    for standard in ("-std=c++20", "-std=gnu++20"):  # nvcc compiles in GNU mode
        done = subprocess.run(
            [str(part) for part in (*command[:1], standard, *command[1:])],
            input=source,
            capture_output=True,
            text=True,
            check=True,
        )
        # A macro with arguments is none where no parenthesis follows, so not for a number's name.
        found = set(re.findall(r"^#define (\w+)(?=\s|$)", done.stdout, re.MULTILINE))
        assert len(found) > 300
        missing = sorted(name for name in found if naming.why_not_a_name(name) is None)
        assert not missing


@pytest.mark.parametrize("names", ["keywords", "free"])
def test_a_compiler_agrees_on_the_keywords(names, tmp_path):
    free = ("lr", "exp_avg", "beta1", "step", "where", "turn", "final", "override", "module")
    listed = naming._KEYWORDS.split() if names == "keywords" else free
    for name in listed:
        assert (naming.why_not_a_name(name) is not None) == (names == "keywords"), name
        source = tmp_path / "name.cpp"
        source.write_text(f"double f(double {name}) {{ return {name} * 0.5; }}\n")
        done = subprocess.run(
            [compiler(), *FLAGS, "-fsyntax-only", str(source)], capture_output=True, check=False
        )
        assert (done.returncode != 0) == (names == "keywords"), name


def test_shipped_names_pass():
    for rule in rules.RULES.values():
        assert naming.why_not_a_rule(rule.name) is None
        for function in (rule.prepare, *(stage.function for stage in rule.stages)):
            assert analyse(function.text) is function
