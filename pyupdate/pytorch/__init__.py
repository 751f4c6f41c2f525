# SPDX-License-Identifier: Apache-2.0
"""The PyTorch front end. Only what is imported from here may import torch."""
