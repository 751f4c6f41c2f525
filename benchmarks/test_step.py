# SPDX-License-Identifier: Apache-2.0
"""Every contestant on every workload, with pytest-benchmark: absolute times, a group a workload.

    pytest benchmarks --benchmark-only

One after another, so drift of the machine enters the comparison; `ratios.py` interleaves.
"""

from __future__ import annotations

from typing import Any

import pytest
from workloads import KINDS, OPTIMIZERS, WORKLOADS, Contestant, check_alike

LONG = 10_000_000  # elements; steps of more take tenths of a second


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workload", WORKLOADS)
def test_step(benchmark: Any, workload: str, kind: str, name: str) -> None:
    benchmark.group = f"{kind}: {workload}"
    chosen = WORKLOADS[workload]
    contestant = Contestant(name, chosen, kind)
    if name != "torch fused":
        check_alike(contestant, Contestant("torch fused", chosen, kind))
    benchmark.pedantic(
        contestant.run,
        setup=contestant.prepare,
        rounds=15 if chosen.elements > LONG else 100,
        warmup_rounds=3,
    )
