# SPDX-License-Identifier: Apache-2.0
"""Every contestant on every workload, with pytest-benchmark: absolute times, a group a workload.

    pytest benchmarks --benchmark-only

One after another, so drift of the machine enters the comparison; `ratios.py` interleaves.
"""

from __future__ import annotations

from typing import Any

import pytest
from workloads import BASELINE, KINDS, WORKLOADS, Contestant, check_alike, optimizers

LONG = 10_000_000  # elements; steps of more take tenths of a second


@pytest.mark.parametrize("name", optimizers("step"))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workload", WORKLOADS)
def test_step(benchmark: Any, workload: str, kind: str, name: str) -> None:
    benchmark.group = f"{kind}: {workload}"
    chosen = WORKLOADS[workload]
    contestant = Contestant(name, chosen, kind)
    if name != BASELINE:
        check_alike(contestant, Contestant(BASELINE, chosen, kind))
    benchmark.pedantic(
        contestant.run,
        setup=contestant.prepare,
        rounds=15 if chosen.elements > LONG else 100,
        warmup_rounds=3,
    )
