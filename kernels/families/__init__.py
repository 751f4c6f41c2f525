# SPDX-License-Identifier: Apache-2.0
"""The update rules by family, one file each; `kernels/rules.py` is their one table.

A file says where its mathematics comes from and states the formula in the code's own order. A rule
gets the gradient after it was multiplied (unscale x clip x sign of `maximize`), the state of one
element and the hypers that its `prepare` made in fp64. Compute type: fp64 for fp64 storage, fp32
for the others; every operation is rounded once. `language.py` says what may be written here.

Where torch leaves out a term whose factor is zero (weight decay), so does the rule: an infinite
parameter must not make a nan of 0 * inf.
"""
