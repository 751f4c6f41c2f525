# SPDX-License-Identifier: Apache-2.0
"""The mathematics of pyupdate: every update rule once, and its way to each library."""
