# SPDX-License-Identifier: Apache-2.0
"""Tests of the TensorFlow half run in a process of their own (``make test-tensorflow``).

Each file asks for tensorflow by ``pytest.importorskip``, so a machine without it skips them and
says why. Here are two logical CPU devices, which must be made before anything runs, and a strategy
on both: one for all, as its pool of threads warns when it is collected.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from all_pairs import leave_what_repeats

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    leave_what_repeats(items)


try:
    import tensorflow as tf
except ModuleNotFoundError:
    pass
else:
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
    )

    @pytest.fixture(scope="session")
    def strategy() -> Any:
        return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
