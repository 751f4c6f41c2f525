# SPDX-License-Identifier: Apache-2.0
"""Trains the network of ``digits.py`` in Keras, on the same digits, through ``update_model``.

A twin of the network is trained by Keras's own ``AdamW.apply`` from the same weights on the same
batches, to show that the weights agree; then ``apply`` is timed on this very model: eager, in a
``tf.function``, and compiled.

    python examples/digits_keras.py  # exits 1 below 97 % accuracy, or where the weights disagree
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import handwritten
import keras
import numpy as np
import tensorflow as tf
from handwritten import BATCH, EPOCHS, LR, SEED, STEPS

import pyupdate
from pyupdate.tensorflow.update import path_of

EPS = float(np.finfo(np.float32).eps)
BATCHES = (tf.TensorSpec([None, 8, 8, 1]), tf.TensorSpec([None], tf.int64))  # the last is shorter

BETAS = 0.90625, 1.0 - 2.0**-10
"""Close to the usual ones, and exact in float32, to which Keras rounds them in its bias correction:
with 0.999 that takes each of its steps some 50 eps away from Adam's, in float64 too."""

Images = tuple[Any, Any]
Step = Callable[[Any, Any], Any]


def network() -> keras.Model:
    """8 x 8 pixels -> 10 digits, 45,162 weights."""
    layers = keras.layers
    return keras.Sequential(
        [
            layers.Input((8, 8, 1)),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(64, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(64, activation="relu"),
            layers.Dense(10),
        ]
    )


def optimizer() -> keras.optimizers.Optimizer:
    """The learning rate up to LR, then down to nothing: any schedule of Keras's works."""
    up = STEPS * 3 // 10
    rate = keras.optimizers.schedules.CosineDecay(
        LR / 25, STEPS - up, warmup_target=LR, warmup_steps=up
    )
    return keras.optimizers.AdamW(rate, weight_decay=0.01, beta_1=BETAS[0], beta_2=BETAS[1])


def tensors(part: handwritten.Images) -> Images:
    images, labels = map(tf.constant, part)
    return images[..., None], labels


def batches(images: Any, labels: Any, shuffle: np.random.Generator) -> Iterator[Images]:
    order = shuffle.permutation(len(images))
    for start in range(0, len(order), BATCH):
        index = order[start : start + BATCH]
        yield tf.gather(images, index), tf.gather(labels, index)


def accuracy(model: keras.Model, images: Any, labels: Any) -> float:
    found = tf.argmax(model(images), axis=1)
    return 100.0 * float(tf.reduce_mean(tf.cast(found == labels, tf.float64)))


def losses(model: keras.Model, images: Any, labels: Any) -> Any:
    """One number an image."""
    return tf.nn.sparse_softmax_cross_entropy_with_logits(labels, model(images, training=True))


def training_step(model: keras.Model) -> Step:
    @tf.function(input_signature=BATCHES)
    def step(images: Any, labels: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = losses(model, images, labels)  # update_model differentiates the mean
            pyupdate.update_model(model, loss, tape=tape)
        return tf.reduce_sum(loss)

    return step


def twins_step(twin: keras.Model) -> Step:
    @tf.function(input_signature=BATCHES)
    def step(images: Any, labels: Any) -> None:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(losses(twin, images, labels))
        grads = tape.gradient(loss, twin.trainable_variables)
        twin.optimizer.apply(grads, twin.trainable_variables)

    return step


def twin_of(model: keras.Model) -> keras.Model:
    """The same network with the same weights, for Keras's own loop."""
    twin = network()
    twin.set_weights(model.get_weights())
    twin.optimizer = optimizer()
    twin.optimizer.build(twin.trainable_variables)
    return twin


def gradients(model: keras.Model, images: Any, labels: Any) -> list[Any]:
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(losses(model, images, labels))
    return tape.gradient(loss, model.trainable_variables)


def given(model: keras.Model, grads: Sequence[Any], **options: Any) -> None:
    """An update by gradients that are there: the loss is the sum of their products."""
    with tf.GradientTape() as tape:
        pairs = zip(model.trainable_variables, grads, strict=True)
        loss = tf.add_n([tf.reduce_sum(variable.value * grad) for variable, grad in pairs])
    pyupdate.update_model(model, loss, tape=tape, **options)


class OneStep:
    """A copy of a model, and its weights in float64; how far one step takes them apart.

    Keras steps those: in float32 the powers of its bias correction are rounded.
    """

    def __init__(self, model: keras.Model) -> None:
        self.ours = pyupdate.build(twin_of(model), optimizer())
        self.wide = [keras.Variable(v, dtype="float64") for v in model.trainable_variables]
        self.theirs = optimizer()
        self.theirs.build(self.wide)

    def apart(self, model: keras.Model, images: Any, labels: Any) -> float:
        """The largest difference from the same state, in fp32 eps x max(|weight|, lr)."""
        state = [*model.trainable_variables, *model.current_optimizer.variables]
        ours = [*self.ours.trainable_variables, *self.ours.current_optimizer.variables]
        theirs = [*self.wide, *self.theirs.variables]
        for value, own, wide in zip(state, ours, theirs, strict=True):
            own.assign(value)
            wide.assign(tf.cast(value, wide.dtype))
        grads = gradients(model, images, labels)
        given(self.ours, grads)
        self.theirs.apply([tf.cast(grad, tf.float64) for grad in grads], self.wide)
        pairs = [
            (a.numpy(), b.numpy())
            for a, b in zip(self.ours.trainable_variables, self.wide, strict=True)
        ]
        parts = [np.max(np.abs(a - b) / (EPS * np.maximum(np.abs(b), LR))) for a, b in pairs]
        return float(max(parts))


def apart(model: keras.Model, twin: keras.Model) -> float:
    """The distance between the two after all these steps, in percent of their length."""
    ours, theirs = (
        np.concatenate([np.ravel(part) for part in m.get_weights()]) for m in (model, twin)
    )
    return 100.0 * float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def steps(model: keras.Model, images: Any, labels: Any) -> dict[str, Callable[[], object]]:
    """The step of each way that is timed, on a copy of this model with the same gradients."""
    grads = gradients(model, images, labels)

    def kerass(wrap: Callable[[Any], Any]) -> Callable[[], object]:
        copied = twin_of(model)
        apply = wrap(lambda grads: copied.optimizer.apply(grads, copied.trainable_variables))
        return lambda: apply(grads)

    ours = pyupdate.build(twin_of(model), optimizer(), model_name="timed")
    deferred: dict[str, Any] = {}
    given(ours, grads, defer=True, deferred=deferred)  # may be called again and again
    return {
        "pyupdate": deferred["timed"][0],
        "Keras apply, eager": kerass(lambda apply: apply),
        "Keras apply in a tf.function": kerass(tf.function),
        "Keras apply, jit_compile=True": kerass(lambda apply: tf.function(apply, jit_compile=True)),
    }


def train(model: keras.Model, twin: keras.Model, images: Images, test: Images) -> float:
    """Train both; the largest difference that one step made, looked at once an epoch."""
    shuffle = np.random.default_rng(SEED)
    step, step_of_twin, one_step = training_step(model), twins_step(twin), OneStep(model)
    worst = 0.0
    with handwritten.Progress() as progress:
        for epoch in range(1, EPOCHS + 1):
            total = 0.0
            for batch, labels in batches(*images, shuffle):
                total += float(step(batch, labels))
                step_of_twin(batch, labels)
                progress.step()
            worst = max(worst, one_step.apart(model, batch, labels))
            progress.epoch(epoch, total / len(images[0]), accuracy(model, *test))
    return worst


def main() -> int:
    keras.utils.set_random_seed(SEED)
    images, test = map(tensors, handwritten.digits())
    model = pyupdate.build(network(), optimizer(), model_name="digits")
    twin = twin_of(model)
    print(f"TensorFlow {tf.__version__}, Keras {keras.__version__}")
    start = time.perf_counter()
    one_step = train(model, twin, images, test)
    seconds = time.perf_counter() - start

    reached = accuracy(model, *test)
    handwritten.report(
        "Keras",
        accuracy=reached,
        twin=accuracy(twin, *test),
        seconds=seconds,
        ran_on=f"{path_of(model)}, in a tf.function",
        one_step=one_step,
        apart=apart(model, twin),
    )
    print("time of one optimizer step on this model, median, given its gradients")
    contestants = steps(model, test[0][:BATCH], test[1][:BATCH])
    handwritten.report_times(*handwritten.timed(contestants))
    return handwritten.verdict("Keras", reached, one_step)


if __name__ == "__main__":
    sys.exit(main())
