# SPDX-License-Identifier: Apache-2.0
"""Trains a small convolutional network on handwritten digits through ``pyupdate.update_model``.

A twin of the network is trained by ``torch.optim.AdamW``'s plain loop from the same weights on the
same batches, to show that the weights agree; then the optimizers are timed on this very model.
``digits_keras.py`` is the same demo of a Keras model.

    python examples/digits.py        # exits 1 below 97 % accuracy, or where the weights disagree
    PYUPDATE_BACKEND=reference python examples/digits.py
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Iterator

import handwritten
import torch
from handwritten import BATCH, EPOCHS, LR, SEED, STEPS
from torch import Tensor, nn

import pyupdate
from pyupdate import backends, info

EPS = torch.finfo(torch.float32).eps

Images = tuple[Tensor, Tensor]


def network() -> nn.Module:
    """8 x 8 pixels -> 10 digits, 45,162 weights."""
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


def tensors(part: handwritten.Images) -> Images:
    images, labels = map(torch.from_numpy, part)
    return images[:, None], labels


def batches(images: Tensor, labels: Tensor, shuffle: torch.Generator) -> Iterator[Images]:
    for index in torch.randperm(len(images), generator=shuffle).split(BATCH):
        yield images[index], labels[index]


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        found = model(images).argmax(dim=1)
    return 100.0 * float((found == labels).double().mean())


def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate up to LR, then down to nothing: any scheduler of torch's works."""
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=LR, total_steps=STEPS, cycle_momentum=False
    )


class Twin:
    """The same network, trained by torch's plain loop; how far the two are apart."""

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR, foreach=False)
        self.schedule = schedule(self.optimizer)

    def train(self, images: Tensor, labels: Tensor) -> None:
        loss = nn.functional.cross_entropy(self.model(images), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()

    @torch.no_grad()
    def apart(self, model: nn.Module) -> float:
        """The distance between the two after all these steps, in percent of their length."""
        ours = nn.utils.parameters_to_vector(model.parameters())
        theirs = nn.utils.parameters_to_vector(self.model.parameters())
        return 100.0 * float((ours - theirs).norm() / theirs.norm())


def one_step_apart(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The largest difference after one step from the same weights, state and gradients.

    In fp32 eps x max(|weight|, lr). The state moves to torch's optimizer as a checkpoint does.
    """
    ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=LR, foreach=False)
    optimizer.load_state_dict(copy.deepcopy(model.current_optimizer.state_dict()))
    accelerated = pyupdate.optim.AdamW(ours.parameters(), lr=LR)
    accelerated.load_state_dict(copy.deepcopy(model.current_optimizer.state_dict()))
    nn.functional.cross_entropy(ours(images), labels).backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        b.grad = None if a.grad is None else a.grad.clone()
    accelerated.step()
    optimizer.step()
    with torch.no_grad():
        pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
        parts = [((a - b).abs() / (EPS * b.abs().clamp(min=LR))).max() for a, b in pairs]
    return float(torch.stack(parts).max())


def steps(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Callable[[], object]]:
    """The step of each optimizer that is timed, on a copy of this model with its gradients."""
    kinds = {
        "pyupdate": lambda p: pyupdate.optim.AdamW(p, lr=LR),
        "torch.optim.AdamW": lambda p: torch.optim.AdamW(p, lr=LR),
        "torch.optim.AdamW(fused=True)": lambda p: torch.optim.AdamW(p, lr=LR, fused=True),
    }
    made = {}
    for name, kind in kinds.items():
        copied = copy.deepcopy(model)
        nn.functional.cross_entropy(copied(images), labels).backward()
        made[name] = kind(copied.parameters()).step
    return made


def where_it_runs() -> str:
    name = backends.backend_for("cpu").name
    if name == "cpu":
        name += f", instruction set {info.instruction_sets()['chosen']}"
    return f"{name}, threads: {torch.get_num_threads()}"


def train(model: nn.Module, twin: Twin, images: Images, test: Images) -> float:
    """Train both; the largest difference that one step made, looked at once an epoch."""
    shuffle = torch.Generator().manual_seed(SEED)
    worst = 0.0
    schedule_of_model = schedule(model.current_optimizer)
    with handwritten.Progress() as progress:
        for epoch in range(1, EPOCHS + 1):
            total = 0.0
            for batch, labels in batches(*images, shuffle):
                # One number an image: update_model differentiates the mean.
                losses = nn.functional.cross_entropy(model(batch), labels, reduction="none")
                pyupdate.update_model(model, losses, retain_graph=False)
                schedule_of_model.step()
                twin.train(batch, labels)
                total += float(losses.detach().sum())
                progress.step()
            worst = max(worst, one_step_apart(model, batch, labels))
            progress.epoch(epoch, total / len(images[0]), accuracy(model, *test))
    return worst


def main() -> int:
    torch.manual_seed(SEED)
    images, test = map(tensors, handwritten.digits())
    model = pyupdate.build(network, lambda p: pyupdate.optim.AdamW(p, lr=LR), model_name="digits")
    twin = Twin(model)
    threads = torch.get_num_threads()
    # For so small a network one thread is as fast as two (3.0 and 2.2 s), and two that must wait
    # for each other took 87 s where other programs kept both cores busy.
    torch.set_num_threads(1)
    print(f"torch {torch.__version__} ({info.torch_build()}); back end {where_it_runs()}")
    where_ran = where_it_runs()
    start = time.perf_counter()
    one_step = train(model, twin, images, test)
    seconds = time.perf_counter() - start
    torch.set_num_threads(threads)

    reached = accuracy(model, *test)
    handwritten.report(
        "torch",
        accuracy=reached,
        twin=accuracy(twin.model, *test),
        seconds=seconds,
        ran_on=f"back end {where_ran}",
        one_step=one_step,
        apart=twin.apart(model),
    )
    print(f"time of one optimizer step on this model, median, threads: {threads}")
    contestants = steps(model, test[0][:BATCH], test[1][:BATCH])
    handwritten.report_times(*handwritten.timed(contestants))
    return handwritten.verdict("torch", reached, one_step)


if __name__ == "__main__":
    sys.exit(main())
