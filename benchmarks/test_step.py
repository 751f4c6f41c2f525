# SPDX-License-Identifier: Apache-2.0
"""Torch's ways and ours on every workload, with pytest-benchmark: absolute times, in groups.

    pytest benchmarks --benchmark-only

One after another, so drift of the machine enters the comparison; `ratios.py` interleaves.
"""

from __future__ import annotations

from typing import Any

import pytest
from workloads import WORKLOADS

from pyupdate import optim
from pyupdate.bench.contestants import KINDS, Contestant, of_torch
from pyupdate.bench.truth import check

LONG = 10_000_000  # elements; steps of more take tenths of a second


@pytest.mark.parametrize("name", of_torch("step"))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workload", WORKLOADS)
def test_step(benchmark: Any, workload: str, kind: str, name: str) -> None:
    benchmark.group = f"{kind}: {workload}"
    chosen = WORKLOADS[workload]
    contestant = Contestant(name, chosen, kind, of_torch(kind)[name])
    check(contestant, optim.AdamW(contestant.params))
    benchmark.pedantic(
        contestant.run,
        setup=contestant.prepare,
        rounds=15 if chosen.elements > LONG else 100,
        warmup_rounds=3,
    )
