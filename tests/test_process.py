# SPDX-License-Identifier: Apache-2.0
"""Forked and spawned processes, threads of Python, threads of the passes, and the GIL."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from cases import FULL
from torch import nn
from ways import WAYS, optimizer_of, ways

import pyupdate

ADAMW = next(case for case in FULL if case.name == "adamw")
WATCHDOG = 30.0  # seconds

LARGE = 1_900_000  # elements: seven threads' worth (csrc/cpu/run.cpp)


def trained(way: str, steps: int, size: int = LARGE, seed: int = 0) -> torch.optim.Optimizer:
    generator = torch.Generator().manual_seed(seed)
    params = [nn.Parameter(torch.randn(n, generator=generator)) for n in (size, 3, 70_000)]
    optimizer = optimizer_of(way, ADAMW, params, max_norm=1.0)
    go_on(optimizer, steps, seed)
    return optimizer


def go_on(optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(100 + seed)
    for _ in range(steps):
        for param in optimizer.param_groups[0]["params"]:
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()


def fingerprint(optimizer: torch.optim.Optimizer) -> list[int]:
    """Of all bits of the parameters and their state; no library's threads are needed for it."""
    found = []
    for param in optimizer.param_groups[0]["params"]:
        for value in (param.detach(), *optimizer.state[param].values()):
            found.append(zlib.crc32(value.reshape(-1).view(torch.uint8).numpy().tobytes()))
    return found


def in_a_child(work: Callable[[], Any]) -> Any:
    """What the function returns in a forked child; fails if the child does not end."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:  # no pytest in here: no return, no exception
        try:
            answer = repr(work())
        except BaseException as error:
            answer = repr(f"{type(error).__name__}: {error}")
        with os.fdopen(writing, "w") as pipe:
            pipe.write(answer)
        os._exit(0)
    os.close(writing)
    watchdog = threading.Timer(WATCHDOG, os.kill, (child, 9))
    watchdog.start()
    with os.fdopen(reading) as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    watchdog.cancel()
    assert status == 0, f"the child did not end by itself: status {status}"
    return eval(answer, {"__builtins__": {}})


forks = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


@forks
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@ways
def test_a_step_in_a_forked_child(way, backend, two_threads):
    with torch.no_grad():
        optimizer = trained(way, 2)  # a parallel region has run before the fork
        before = fingerprint(optimizer)

        def work() -> list[int]:
            go_on(optimizer, 2)
            return fingerprint(optimizer)

        theirs = in_a_child(work)
        assert fingerprint(optimizer) == before  # the child's memory is its own
        assert theirs == work() != before


@forks
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_first_step_in_a_child_and_in_its_child(backend, two_threads):
    # New state is made there, by torch's own operations.
    expected = fingerprint(trained("ours", 2))
    here = torch.get_num_threads()

    def work() -> Any:
        first = fingerprint(trained("ours", 2))
        return [first, torch.get_num_threads(), in_a_child(lambda: fingerprint(trained("ours", 2)))]

    assert in_a_child(work) == [expected, here, expected]


@forks
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_runs_the_passes_on_threads_of_its_own(compiled):
    assert compiled.build_info()["threading"] in ("OpenMP", "threads")
    told = in_a_child(lambda: compiled.build_info()["threading"])
    assert told in ("threads (forked child)", "threads")


def in_a_spawned_process(answers: Any) -> None:
    answers.put([fingerprint(trained(way, 3, size=1000)) for way in WAYS])


@pytest.mark.slow_reference
def test_a_spawned_process(backend, monkeypatch):
    monkeypatch.setenv("PYUPDATE_BACKEND", backend)
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=in_a_spawned_process, args=(answers,))
    process.start()
    found = answers.get(timeout=4 * WATCHDOG)
    process.join(WATCHDOG)
    assert process.exitcode == 0
    assert found == [fingerprint(trained(way, 3, size=1000)) for way in WAYS]


# ----- threads of Python --------------------------------------------------------------------------


def together(*works: Callable[[], None]) -> list[BaseException]:
    """Run all at once; what they raised."""
    raised: list[BaseException] = []
    start = threading.Barrier(len(works))

    def guarded(work: Callable[[], None]) -> None:
        try:
            start.wait()
            work()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(4 * WATCHDOG)
        assert not thread.is_alive()
    return raised


@ways
def test_threads_step_different_optimizers(way, compiled, monkeypatch, two_threads):
    # A thread starts with an empty context, so the choice comes from the environment.
    monkeypatch.setenv("PYUPDATE_BACKEND", "cpu")
    expected = [fingerprint(trained(way, 6, 700_000, seed)) for seed in range(3)]
    found: dict[int, list[int]] = {}

    def work(seed: int) -> Callable[[], None]:
        def run() -> None:
            torch.set_num_threads(2)
            found[seed] = fingerprint(trained(way, 6, 700_000, seed))

        return run

    assert together(*(work(seed) for seed in range(3))) == []
    assert [found[seed] for seed in range(3)] == expected


@ways
def test_threads_step_the_same_optimizer(way, backend, monkeypatch, two_threads):
    # Right or refused: as many steps as did not raise, and every bit as if one thread made them.
    monkeypatch.setenv("PYUPDATE_BACKEND", backend)
    optimizer = trained(way, 1)
    for param in optimizer.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    made: list[int] = []

    def work() -> None:
        for _ in range(12):
            try:
                optimizer.step()
            except RuntimeError as error:
                assert str(error) == "this optimizer is being stepped by another thread"
            else:
                made.append(1)

    assert together(work, work, work) == []
    truth = trained(way, 1)
    for param in truth.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    for _ in made:
        truth.step()
    assert len(made) >= 12  # somebody always gets on
    assert fingerprint(optimizer) == fingerprint(truth)
    for param in optimizer.param_groups[0]["params"]:
        assert float(optimizer.state[param]["step"]) == 1 + len(made)


@pytest.mark.parametrize("max_norm", [None, 1e9], ids=["apply", "reduce and apply"])
def test_the_gil_is_free_during_a_long_step(max_norm, compiled):
    # All elements get one value, so who sees two different ones has run in the middle of a pass.
    param = nn.Parameter(torch.zeros(48_000_000))
    param.grad = torch.ones_like(param)
    values = param.detach().numpy()
    optimizer = pyupdate.optim.SGD([param], lr=0.5, max_norm=max_norm)
    seen, stop = [], threading.Event()

    def watch() -> None:
        while not stop.is_set():
            if values[0] != values[-1]:
                seen.append(stop.is_set())
            os.sched_yield()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with pyupdate.use_backend("cpu"):
            for _ in range(20):
                optimizer.step()
                if seen:
                    break
    finally:
        stop.set()
        watcher.join()
    assert seen
    assert values[0] == values[-1] != 0.0


# ----- threads of the passes ----------------------------------------------------------------------

_THREADS = """
import os, sys
import torch, pyupdate
wanted = int(sys.argv[1])
torch.set_num_threads(1)
param = torch.nn.Parameter(torch.zeros(3_000_000))
param.grad = torch.zeros(3_000_000)
optimizer = pyupdate.optim.AdamW([param], max_norm=1.0)
for _ in range(2):
    optimizer.step()
alone = len(os.listdir("/proc/self/task"))
torch.set_num_threads(wanted)
for _ in range(3):
    optimizer.step()
print(len(os.listdir("/proc/self/task")) - alone)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no /proc/self/task")
@pytest.mark.parametrize("wanted", [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2)), 5])
def test_torchs_number_of_threads_is_honoured(wanted, compiled):
    if compiled.build_info()["threading"] != "OpenMP":
        pytest.skip("the threads of this build end with each step")
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _THREADS, str(wanted)],
        env={**os.environ, "PYUPDATE_BACKEND": "cpu", "OMP_DYNAMIC": "false"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert out.returncode == 0, out.stderr
    assert int(out.stdout) == wanted - 1


def test_the_bits_do_not_depend_on_threads(compiled, threads):
    def result(count: int) -> list[int]:
        torch.set_num_threads(count)
        return fingerprint(trained("ours", 2))

    with pyupdate.use_backend("cpu"):
        expected = result(threads[0])
        for count in threads[1:]:
            assert result(count) == expected, f"{count} threads"
        torch.set_num_threads(2)
        optimizer = trained("ours", 1)
        torch.set_num_threads(3)  # between two steps of one plan
        go_on(optimizer, 1)
        twin = trained("ours", 1)
        go_on(twin, 1)
        for a, b in zip(
            optimizer.param_groups[0]["params"], twin.param_groups[0]["params"], strict=True
        ):
            assert_same_bits(a, b, "threads")
