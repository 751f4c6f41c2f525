# SPDX-License-Identifier: Apache-2.0
"""Several processes of one gloo group, and what each of them answers."""

from __future__ import annotations

import os
import queue
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

WATCHDOG = 120.0  # seconds after which a rank is taken to be lost

distributed = pytest.mark.skipif(
    not torch.distributed.is_available() or sys.platform == "win32",
    reason="torch has no distributed with gloo",
)


def answers_of(work: Callable[[int], Any], count: int, folder: Path) -> dict[int, Any]:
    """What ``work(rank)``, a function of a module, returns in each of so many processes.

    Args:
        work: what a rank does, in the process group.
        count: how many ranks.
        folder: an empty one, where they meet.
    """
    context = torch.multiprocessing.get_context("spawn")
    answers = context.Queue()
    address = f"file://{folder}/store"
    children = [
        context.Process(target=_on_rank, args=(work, rank, count, address, answers))
        for rank in range(count)
    ]
    for child in children:
        child.start()
    found: dict[int, Any] = {}
    lost = ""
    try:
        while len(found) < count and not lost:
            rank, answer, lost = answers.get(timeout=WATCHDOG)
            found[rank] = answer
    except queue.Empty:
        lost = f"nothing came within {WATCHDOG} s"
    finally:
        for child in children:
            child.join(5.0)
            child.kill()
    assert not lost, lost
    return found


def _on_rank(work: Callable[[int], Any], rank: int, count: int, address: str, answers: Any) -> None:
    try:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
        torch.set_num_threads(1)
        torch.distributed.init_process_group(
            "gloo", init_method=address, rank=rank, world_size=count
        )
        found = work(rank)
        torch.distributed.destroy_process_group()
    except BaseException as error:
        answers.put((rank, None, f"rank {rank}: {type(error).__name__}: {error}"))
        raise
    answers.put((rank, found, ""))
