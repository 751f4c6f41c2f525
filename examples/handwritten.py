# SPDX-License-Identifier: Apache-2.0
"""What the demos of both frameworks share: the digits, how training is shown, how steps are timed.

The data are scikit-learn's 1,797 bundled images of 8 x 8 pixels: nothing is downloaded.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from types import TracebackType

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

SEED = 7
EPOCHS = 12
IMAGES = 1_347  # of 1,797; the others are for the test
BATCH = 32
STEPS = EPOCHS * -(-IMAGES // BATCH)
LR = 4e-3  # at its highest
ACCURACY = 97.0  # percent of the test images that must be recognised
ONE_STEP = 8.0  # eps: how far one step may be from the framework's, the bound that the tests hold
ROUNDS = 210  # of timing, less where they take longer than SECONDS
SECONDS = 5.0
WARM = 10

Images = tuple[np.ndarray, np.ndarray]


def digits() -> tuple[Images, Images]:
    """Training and test images, scaled to [0, 1], with their labels."""
    data, labels = load_digits(return_X_y=True)
    parts = train_test_split(data, labels, train_size=IMAGES, random_state=SEED, stratify=labels)
    train, test = (part.astype(np.float32).reshape(-1, 8, 8) / 16 for part in parts[:2])
    train_labels, test_labels = (part.astype(np.int64) for part in parts[2:])
    return (train, train_labels), (test, test_labels)


class Progress:
    """A bar on a terminal, else a line an epoch."""

    def __init__(self) -> None:
        self.on_terminal = sys.stderr.isatty()
        self.bar = tqdm(total=STEPS, unit="step", disable=not self.on_terminal)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.close()

    def step(self) -> None:
        self.bar.update()

    def epoch(self, number: int, loss: float, accuracy: float) -> None:
        said = f"loss {loss:.4f}, test accuracy {accuracy:.1f} %"
        self.bar.set_postfix_str(said)
        if not self.on_terminal:
            print(f"epoch {number:2d} of {EPOCHS}: {said}", flush=True)


def step_times(contestants: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """The median time of one step in microseconds, the contestants taken in turn."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    end = time.perf_counter() + SECONDS
    for turn in range(ROUNDS):
        for name in list(contestants)[:: 1 if turn % 2 else -1]:
            start = time.perf_counter()
            contestants[name]()
            times[name].append(time.perf_counter() - start)
        if time.perf_counter() > end and turn >= 2 * WARM:
            break
    return {name: 1e6 * statistics.median(values[WARM:]) for name, values in times.items()}


def timed(contestants: Mapping[str, Callable[[], object]]) -> tuple[dict[str, float], str | None]:
    """The times of a step, and what the machine did meanwhile that they say little for.

    The gauge is torch's; where only TensorFlow is installed, nobody looks.
    """
    if find_spec("torch") is None:
        return step_times(contestants), None
    from pyupdate.bench import timing, watch

    gauge = watch.Gauge()
    before, taken = gauge.read(), timing.others()
    times = step_times(contestants)
    others = taken()
    moved = timing.moved(before, gauge.read())
    if not timing.disturbed({"moved": moved, "others": others}):
        return times, None
    if others is not None and others > timing.OTHERS:
        return times, f"others took {100.0 * others:.0f} % of the processors meanwhile"
    return times, f"the speed of memory changed by {100.0 * moved:.0f} % meanwhile"


def report(
    framework: str,
    *,
    accuracy: float,
    twin: float,
    seconds: float,
    ran_on: str,
    one_step: float,
    apart: float,
) -> None:
    """Say what training came to, beside the twin that the framework's own loop trained."""
    print(f"\ntest accuracy      {accuracy:.2f} % ({framework}'s twin {twin:.2f} %)")
    print(f"trained in         {seconds:.1f} s, the twin included")
    print(f"trained on         {ran_on}")
    print(
        f"weights, one step  at most {one_step:.2f} eps from {framework}'s "
        f"(the bound is {ONE_STEP:g})"
    )
    print(f"weights, the end   {apart:.4f} % from the twin's: training adds up rounding")


def report_times(times: Mapping[str, float], disturbed: str | None = None) -> None:
    """Say how long each contestant's step takes, beside ours, and what made it say little."""
    for name, micros in times.items():
        ratio = micros / times["pyupdate"]
        said = "" if ratio == 1.0 else f"   {ratio:.1f} x"
        if said and disturbed is not None:
            said += f"   (says little: {disturbed})"
        print(f"  {name:<30} {micros:8.0f} us{said}")


def verdict(framework: str, accuracy: float, one_step: float) -> int:
    """The exit status: 1 where what was promised does not hold, which is said."""
    failures = []
    if not accuracy >= ACCURACY:
        failures.append(f"the accuracy is below {ACCURACY:g} %")
    if not one_step <= ONE_STEP:
        failures.append(f"the weights do not agree with {framework}'s")
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    return 1 if failures else 0
