# SPDX-License-Identifier: Apache-2.0
"""Data parallelism of two processes, one replica in each."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tensorflow", reason="tensorflow is not installed: pyupdate[tensorflow]")


def free_ports(count: int) -> list[str]:
    held = [socket.create_server(("localhost", 0)) for _ in range(count)]
    found = [str(server.getsockname()[1]) for server in held]
    for server in held:
        server.close()
    return found


@pytest.mark.slow
def test_two_workers_sum_first_then_check_and_clip() -> None:
    ports = free_ports(2)
    program = str(Path(__file__).with_name("worker_run.py"))
    workers = [
        subprocess.Popen(
            [sys.executable, program, str(number), *ports],
            env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    try:
        said = [worker.communicate(timeout=300) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], said
    (first, _), (second, _) = said
    assert first == second  # the same weights, to the bit
    rows = [json.loads(line) for line in first.splitlines()]
    # The mean's norm is 5, and is clipped to 1: twice, with a step left out between.
    true = [([0.4, 1.2], 256.0, False), ([0.4, 1.2], 128.0, True), ([-0.2, 0.4], 128.0, False)]
    averaged = micro_batches_by_hand()
    both = len(rows) // 2  # called eagerly and in a tf.function
    for half in (rows[:both], rows[both:]):
        for row, (weights, scale, skipped) in zip(half[:3], true, strict=True):
            assert np.max(np.abs(np.subtract(row[0], weights))) <= 2e-6
            assert row[1:] == [scale, "XLA", skipped]
        assert half[3:] == averaged  # in eighths: exact


def micro_batches_by_hand() -> list[list[object]]:
    """What the workers print of steps on two micro-batches: weights, averages, path, skipped."""
    weights, average, rows = np.array([1.0, 2.0]), np.array([1.0, 2.0]), []
    for second in ([0.0, 2.0], [2.0, 0.0], [np.inf, 0.0], [0.0, 2.0], [0.0, 0.0]):
        mean = (np.array([1.0, 0.0]) + second + [1.0, 0.0] + [0.0, 1.0]) / 4.0
        finite = bool(np.isfinite(mean).all())
        if finite:
            weights = weights - mean
            average = 0.5 * average + 0.5 * weights
        rows.append([weights.tolist(), average.tolist(), "XLA", not finite])
    return rows
