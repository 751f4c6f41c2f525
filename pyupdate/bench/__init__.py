# SPDX-License-Identifier: Apache-2.0
"""Benchmarks (``python -m pyupdate bench``): who is compared, is proven right, and is timed."""
