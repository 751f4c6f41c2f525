# SPDX-License-Identifier: Apache-2.0
"""The TensorFlow half of pyupdate: Keras models, stepped in compiled functions."""
