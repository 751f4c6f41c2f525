# SPDX-License-Identifier: Apache-2.0
"""Trains a small convolutional network on handwritten digits through ``pyupdate.update_model``.

The data are scikit-learn's 1,797 bundled images of 8 x 8 pixels: nothing is downloaded. A twin of
the network is trained by ``torch.optim.AdamW``'s plain loop from the same weights on the same
batches, to show that the weights agree; then the optimizers are timed on this very model.

    python examples/digits.py        # exits 1 below 97 % accuracy, or where the weights disagree
    PYUPDATE_BACKEND=reference python examples/digits.py
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Iterator

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

import pyupdate
from pyupdate import backends, info

SEED = 7
EPOCHS = 12
IMAGES = 1_347  # of 1,797; the others are for the test
BATCH = 32
LR = 4e-3  # at its highest
ACCURACY = 97.0  # percent of the test images that must be recognised
ONE_STEP = 8.0  # eps: how far one step may be from torch's, the bound that the tests hold
ROUNDS = 210  # of timing, less where they take longer than SECONDS
SECONDS = 5.0
WARM = 10
STEPS = EPOCHS * -(-IMAGES // BATCH)
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


def digits() -> tuple[Images, Images]:
    """Training and test images, scaled to [0, 1], with their labels."""
    data, labels = load_digits(return_X_y=True)
    parts = train_test_split(data, labels, train_size=IMAGES, random_state=SEED, stratify=labels)
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


def step_times(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    """The median time of one optimizer step in microseconds, the three taken in turn."""
    kinds = {
        "pyupdate": lambda p: pyupdate.optim.AdamW(p, lr=LR),
        "torch.optim.AdamW": lambda p: torch.optim.AdamW(p, lr=LR),
        "torch.optim.AdamW(fused=True)": lambda p: torch.optim.AdamW(p, lr=LR, fused=True),
    }
    optimizers = {}
    for name, kind in kinds.items():
        copied = copy.deepcopy(model)
        nn.functional.cross_entropy(copied(images), labels).backward()
        optimizers[name] = kind(copied.parameters())
    times: dict[str, list[float]] = {name: [] for name in kinds}
    end = time.perf_counter() + SECONDS
    for turn in range(ROUNDS):
        for name in list(kinds)[:: 1 if turn % 2 else -1]:
            start = time.perf_counter()
            optimizers[name].step()
            times[name].append(time.perf_counter() - start)
        if time.perf_counter() > end and turn >= 2 * WARM:
            break
    return {name: 1e6 * statistics.median(values[WARM:]) for name, values in times.items()}


def where_it_runs() -> str:
    name = backends.backend_for("cpu").name
    if name == "cpu":
        name += f", instruction set {info.instruction_sets()['chosen']}"
    return f"{name}, threads: {torch.get_num_threads()}"


def train(model: nn.Module, twin: Twin, images: Images, test: Images) -> float:
    """Train both; the largest difference that one step made, looked at once an epoch."""
    shuffle = torch.Generator().manual_seed(SEED)
    on_terminal = sys.stderr.isatty()
    worst = 0.0
    schedule_of_model = schedule(model.current_optimizer)
    with tqdm(total=STEPS, unit="step", disable=not on_terminal) as bar:
        for epoch in range(1, EPOCHS + 1):
            total = 0.0
            for batch, labels in batches(*images, shuffle):
                # One number an image: update_model differentiates the mean.
                losses = nn.functional.cross_entropy(model(batch), labels, reduction="none")
                pyupdate.update_model(model, losses, retain_graph=False)
                schedule_of_model.step()
                twin.train(batch, labels)
                total += float(losses.detach().sum())
                bar.update()
            worst = max(worst, one_step_apart(model, batch, labels))
            said = (
                f"loss {total / len(images[0]):.4f}, test accuracy {accuracy(model, *test):.1f} %"
            )
            bar.set_postfix_str(said)
            if not on_terminal:
                print(f"epoch {epoch:2d} of {EPOCHS}: {said}", flush=True)
    return worst


def main() -> int:
    torch.manual_seed(SEED)
    images, test = digits()
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
    print(
        f"\ntest accuracy      {reached:.2f} % (torch's twin {accuracy(twin.model, *test):.2f} %)"
    )
    print(f"trained in         {seconds:.1f} s, the twin included")
    print(f"trained on         back end {where_ran}")
    print(f"weights, one step  at most {one_step:.2f} eps from torch's (the bound is {ONE_STEP:g})")
    print(
        f"weights, the end   {twin.apart(model):.4f} % from the twin's: training adds up rounding"
    )
    print(f"time of one optimizer step on this model, median, threads: {threads}")
    times = step_times(model, test[0][:BATCH], test[1][:BATCH])
    for name, micros in times.items():
        ratio = micros / times["pyupdate"]
        print(f"  {name:<30} {micros:8.0f} us" + (f"   {ratio:.1f} x" if ratio != 1.0 else ""))

    failures = []
    if not reached >= ACCURACY:
        failures.append(f"the accuracy is below {ACCURACY:g} %")
    if not one_step <= ONE_STEP:
        failures.append("the weights do not agree with torch's")
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
