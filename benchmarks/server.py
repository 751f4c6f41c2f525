# SPDX-License-Identifier: Apache-2.0
"""Processes that have imported torch already: one for each cell, without those seconds.

Half of the time of `make bench` would be imports. So one process imports what every cell needs and
computes nothing; for each question it forks a child, which answers and ends. No parallel region has
run before the fork, so a child has its own threads; nor has numpy's BLAS any there, so that
pyupdate/forks.py sees as much. What aborts beside another library (`apart.py`)
or is to see the whole of a start (`costs.py`) still gets a new Python.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

Answer = dict[str, Any]
OF_TARGET_S = 180.0
"""At most; it takes two to ten."""


class Server:
    """A process to ask, started when it is asked first; a context manager ends it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> int | None:
        """Let the process end; its exit status, None if there was none."""
        process, self._process = self._process, None
        if process is None:
            return None
        with process:  # closes its pipes, which ends it, and waits
            pass
        return process.returncode

    def ask(self, question: str, *, limit: float, **given: Any) -> Answer:
        """What a child finds.

        Args:
            question: one of `QUESTIONS`.
            limit: seconds after which the child is killed.
            given: what the question takes, as JSON has it.

        Raises:
            RuntimeError: the child failed, with the last line of what it said, or took too long.
        """
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
                text=True,
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        asked = {"question": question, "limit": limit, "given": given}
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            message = f"the process that forks others ended with {self.end()}"
            raise RuntimeError(message)
        found: Answer = json.loads(line)
        if "error" in found:
            raise RuntimeError(found["error"])
        return found

    def target(self, workload: str, kind: str, *, seconds: float, bare: bool = False) -> Answer:
        """What `ratios.measure` finds in a child, by the names of a workload and a kind."""
        told = {"workload": workload, "kind": kind, "seconds": seconds, "bare": bare}
        return self.ask("target", limit=OF_TARGET_S, **told)


def of_cell(key: str, seconds: float, scale: float, with_peers: bool) -> Answer:
    """The record of a cell."""
    import matrix
    import measured

    cell = next((cell for cell in matrix.cells() if cell.key == key), None)
    if cell is None:
        message = f"there is no cell {key!r}"
        raise ValueError(message)
    return measured.measured(cell, seconds=seconds, scale=scale, with_peers=with_peers)


def of_target(workload: str, kind: str, seconds: float, bare: bool) -> Answer:
    """A process's answer for a target."""
    import ratios

    return ratios.measure(ratios.EVERY[workload], kind, seconds=seconds, bare=bare)


QUESTIONS: dict[str, Callable[..., Answer]] = {"cell": of_cell, "target": of_target}


def answered(question: str, limit: float, given: dict[str, Any]) -> Answer:
    """Fork, wait for the child's answer, and kill it where it takes too long."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        try:
            found = QUESTIONS[question](**given)
        except BaseException as error:  # whatever a library raises: it is said, and the child ends
            said = traceback.format_exception_only(error)[-1].strip().splitlines()
            found = {"error": said[-1] if said else type(error).__name__}
        with os.fdopen(write, "w") as file:
            json.dump(found, file)
        os._exit(0)
    os.close(write)
    end = time.monotonic() + limit
    text = bytearray()
    while True:
        left = end - time.monotonic()
        ready, _, _ = select.select([read], [], [], max(0.0, left))
        if not ready:
            os.kill(pid, 9)
            text = bytearray(json.dumps({"error": f"it took more than {limit:.0f} s"}).encode())
            break
        piece = os.read(read, 1 << 16)
        if not piece:
            break
        text += piece
    os.close(read)
    _, status = os.waitpid(pid, 0)
    if not text:
        return {"error": f"it ended with {os.waitstatus_to_exitcode(status)}"}
    found: Answer = json.loads(text)
    return found


def main() -> int:
    """Import, then answer a question a line, until there are no more."""
    answers = os.dup(1)
    os.dup2(2, 1)  # what a library prints is no answer
    import measured  # noqa: F401 - for the children
    import ratios  # noqa: F401
    import torch._dynamo  # noqa: F401 - an optimizer's first group imports it

    with os.fdopen(answers, "w") as file:
        for line in sys.stdin:
            asked = json.loads(line)
            file.write(json.dumps(answered(**asked)) + "\n")
            file.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
