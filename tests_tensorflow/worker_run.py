# SPDX-License-Identifier: Apache-2.0
"""One of two workers that train by given gradients; a program, for processes of its own.

python worker_run.py NUMBER PORT PORT   # prints weights, loss scale, path and whether it skipped;
                                        # then likewise with micro-batches: weights and averages
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def main(number: str, *ports: str) -> None:
    cluster = {"worker": [f"localhost:{port}" for port in ports]}
    task = {"type": "worker", "index": int(number)}
    os.environ["TF_CONFIG"] = json.dumps({"cluster": cluster, "task": task})

    import tensorflow as tf

    strategy = tf.distribute.MultiWorkerMirroredStrategy()  # before anything else runs

    import keras
    from training import Known

    import pyupdate
    from pyupdate.tensorflow.update import path_of

    for graph in (False, True):
        with strategy.scope():
            scaling = keras.optimizers.LossScaleOptimizer(
                keras.optimizers.SGD(1.0), initial_scale=256.0
            )
            model = pyupdate.build(Known([[1.0, 2.0]]), scaling, max_norm=1.0)

        def each(grads: Any, model: Any = model) -> None:
            replica = tf.distribute.get_replica_context().replica_id_in_sync_group
            with tf.GradientTape() as tape:
                loss = model([tf.gather(grads, replica)])
            pyupdate.update_model(model, loss, tape=tape)

        def step(grads: Any, each: Any = each) -> None:
            strategy.run(each, args=(grads,))

        called = tf.function(step) if graph else step
        for second in ([0.0, 8.0], [float("inf"), 0.0], [0.0, 8.0]):  # the mean: 3, 4
            called(tf.constant([[6.0, 0.0], second]))
            found = pyupdate.last_update(model)
            skipped = bool(found is not None and found.skipped)
            scale = float(scaling.dynamic_scale.numpy())
            weights = model.held[0].numpy().tolist()
            print(json.dumps([weights, scale, path_of(model), skipped]), flush=True)

        with strategy.scope():
            kept = pyupdate.build(
                Known([[1.0, 2.0]]),
                keras.optimizers.SGD(1.0),
                ema_decay=0.5,
                accumulation_steps=2,
                skip_nonfinite=True,
            )

        def micro(grads: Any, model: Any = kept, each: Any = each) -> None:
            strategy.run(each, args=(grads, model))

        called = tf.function(micro) if graph else micro
        for second in ([0.0, 2.0], [2.0, 0.0], [float("inf"), 0.0], [0.0, 2.0], [0.0, 0.0]):
            for part in (second, [0.0, 1.0]):
                called(tf.constant([[1.0, 0.0], part]))
            found = pyupdate.last_update(kept)
            skipped = bool(found is not None and found.skipped)
            weights = kept.held[0].numpy().tolist()
            with pyupdate.averaged_weights(kept):
                averages = kept.held[0].numpy().tolist()
            print(json.dumps([weights, averages, path_of(kept), skipped]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
