# SPDX-License-Identifier: Apache-2.0
"""Tests of the TensorFlow half run in a process of their own (``make test-tensorflow``).

Each file asks for tensorflow by ``pytest.importorskip``, so a machine without it skips them and
says why. Here are two logical CPU devices, which must be made before anything runs, and a strategy
on both: one for all, as its pool of threads warns when it is collected.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

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
