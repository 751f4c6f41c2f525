#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""CMake's compiler launcher in CI: one text with one set of flags is compiled once in a run.

CI builds the module for the checkout and for the wheel, and the tests build it with other rules;
five sixths of that are the same files. An object is found by the compiler, its flags and the
preprocessed text, with what `-ffile-prefix-map` says of folders done to both: the bytes of an
object do not depend on more. (ccache finds nothing here: it tells folders apart.) What fails to
compile is compiled again.
"""

from __future__ import annotations

import fcntl
import hashlib
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

STORE = Path(__file__).resolve().parent.parent / "build" / "compiled"
MAP = "-ffile-prefix-map="
# What these say is in the preprocessed text or not in the object: two modules have other macros
# and other folders of headers, of which most of their files see nothing.
BEFORE_A_PLACE = ("-o", "-MF", "-MT", "-isystem")
LEFT_OUT = ("-Werror", *BEFORE_A_PLACE)
LEFT_OUT_WITH_THEIR_VALUE = ("-D", "-I", MAP)
MARKER = re.compile(rb'^# \d+ "[^"]*"', re.MULTILINE)


def main(command: list[str]) -> int:
    """Run a compiler's command line, or put in place what it made before."""
    if "-c" not in command or "-o" not in command:
        return subprocess.run(command, check=False).returncode
    made = Path(command[command.index("-o") + 1])
    text = preprocessed(command)
    if text is None:  # the compiler itself says why
        return subprocess.run(command, check=False).returncode
    name = digest(command, text)
    STORE.mkdir(parents=True, exist_ok=True)
    with (STORE / f"{name}.lock").open("w") as lock:  # who comes second waits for the first
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Who does not ask for -Werror may have what was made under it.
        strict, any_ = STORE / f"{name}.werror", STORE / name
        for stored in (strict,) if "-Werror" in command else (strict, any_):
            if stored.exists():
                shutil.copyfile(stored, made)
                return 0
        status = subprocess.run(command, check=False).returncode
        if status == 0:
            unfinished = STORE / f"{name}.unfinished"
            shutil.copyfile(made, unfinished)
            unfinished.replace(strict if "-Werror" in command else any_)
        return status


def preprocessed(command: list[str]) -> bytes | None:
    """The text that is compiled; its dependencies are written where the command wants them."""
    at = command.index("-o")
    only = [*command[:at], *command[at + 2 :]]
    only[only.index("-c")] = "-E"
    done = subprocess.run(only, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
    return done.stdout if done.returncode == 0 else None


def digest(command: list[str], text: bytes) -> str:
    """What decides about the object: the compiler, the flags and the text, folders mapped."""
    maps = [word.removeprefix(MAP).split("=", 1) for word in command if word.startswith(MAP)]
    maps.reverse()  # the last one that fits is the compiler's choice

    def mapped(word: str) -> str:
        for old, new in maps:
            word = word.replace(old, new)
        return word

    compiler = Path(shutil.which(command[0]) or command[0]).resolve()
    words = [str(compiler), str(compiler.stat().st_mtime_ns)]
    for before, word in pairwise(command):
        if before in BEFORE_A_PLACE or word in LEFT_OUT:
            continue
        if not word.startswith(LEFT_OUT_WITH_THEIR_VALUE):
            words.append(mapped(word))
    whole = hashlib.sha256("\0".join(words).encode())
    whole.update(MARKER.sub(lambda found: mapped(found[0].decode()).encode(), text))
    return whole.hexdigest()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
