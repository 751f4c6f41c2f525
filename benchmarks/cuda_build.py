# SPDX-License-Identifier: Apache-2.0
"""Builds the CUDA module in a checkout, and says how long that took and how large it is.

    make cuda

It is what `PYUPDATE_CUDA=1` has an install build, for every architecture or for those that
`PYUPDATE_CUDA_ARCHS` names, and lies beside the sources afterwards. Beyond `MOST_BYTES` it fails.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import sysconfig
import time
from collections.abc import Mapping
from pathlib import Path

from pyupdate import native, nvcc

ROOT = Path(__file__).resolve().parents[1]
MOST_BYTES = 40_000_000
"""Of the module: it is in everybody's wheel, whichever GPU is theirs."""


def build(
    folder: Path,
    place: Path,
    environment: Mapping[str, str],
    definitions: Mapping[str, str] | None = None,
) -> int:
    """Build the module in `folder` and put it into `place`; the exit status.

    Args:
        folder: of the build; a time is told of what is not there yet.
        place: the package's folder, or another one.
        environment: where nvcc is, and for what it is asked.
        definitions: what CMake is told besides.
    """
    wanted = nvcc.wanted({**environment, "PYUPDATE_CUDA": "1"})
    began = time.monotonic()
    try:
        built, record = nvcc.build(ROOT, folder, wanted, definitions)
    except native.BuildFailedError as error:
        print(f"cuda: FAILED: {error}", file=sys.stderr)
        return 1
    seconds = time.monotonic() - began
    size = built.stat().st_size
    module = place / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    nvcc.put(built, module)
    noted = place / "_build_info.json"
    if noted.exists():
        noted.write_text(json.dumps(json.loads(noted.read_text()) | {"cuda": record}, indent=2))
    print(
        f"cuda: {module}\ncuda: {record['compiler']} for {wanted.architectures}: "
        f"{seconds:.0f} s on {len(os.sched_getaffinity(0))} cores, {size / 1e6:.1f} MB"
    )
    if size > MOST_BYTES:
        print(
            f"cuda: FAILED: {size:,} bytes are more than the {MOST_BYTES:,} that the module may "
            "have: build for fewer architectures (PYUPDATE_CUDA_ARCHS), or by nvcc 12.8 or newer, "
            "which compresses",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    shutil.rmtree(ROOT / "build" / "cuda", ignore_errors=True)
    sys.exit(build(ROOT / "build" / "cuda", ROOT / "pyupdate", os.environ))
