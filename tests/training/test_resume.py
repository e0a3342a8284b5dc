"""A run that is killed and started again ends with the very weights of an undisturbed one."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

RUN = """
import hashlib, json, sys
import tensorflow as tf
from tf_gptopt._keras import keras
from tf_gptopt.models.gpt import GPTModel
from tf_gptopt.training.config import TrainConfig
from tf_gptopt.training.trainer import fit

class Noise:
    sequence_length = 32
    def batches(self, split, batch_size, seed=0, start_step=0):
        def batch(step):
            shape = [batch_size, 33]
            ids = tf.random.stateless_uniform(shape, [seed, step], maxval=97, dtype=tf.int32)
            return ids[:, :-1], ids[:, 1:]
        return tf.data.Dataset.range(start_step, 2**40).map(batch)

keras.utils.set_random_seed(1)
model = GPTModel(97, 48, 2, 4, max_sequence_length=32, dropout=0.1)
config = TrainConfig(120, 8, learning_rate=3e-3, log_every=4, checkpoint_every=1e-9)
report = lambda r: print("step", r.step, flush=True)
metrics = fit(model, Noise(), config, sys.argv[1] if len(sys.argv) > 1 else None, [], report)
weights = b"".join(weight.tobytes() for weight in model.get_weights())
print("end", json.dumps([hashlib.sha256(weights).hexdigest(), metrics["loss"], metrics["tokens"]]))
"""


def start(*arguments):
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, "-c", RUN, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def test_kill_9_changes_nothing(tmp_path):
    undisturbed, _ = start().communicate(timeout=300)
    want = undisturbed.splitlines()[-1]
    assert want.startswith("end")
    chance = random.Random()
    begun = []
    for _ in range(2):
        child = start(tmp_path)
        begun.append(child.stdout.readline())  # the first report of this process
        for _ in range(chance.randint(1, 8)):
            child.stdout.readline()
        time.sleep(chance.random() * 0.03)
        child.kill()  # amid a step, a report or the writing of a checkpoint
        child.communicate()
    rest, _ = start(tmp_path).communicate(timeout=300)
    begun.append(rest.splitlines()[0])
    assert len(set(begun)) == 3, begun  # each went on from a later checkpoint
    assert rest.splitlines()[-1] == want
    assert not list(tmp_path.glob(".writing-*"))


@pytest.mark.parametrize("kind", ["pruned", "quantized", "distilled"])
def test_compressed_models_go_on_as_well(kind, tmp_path):
    import numpy as np
    import tensorflow as tf

    from tf_gptopt._keras import keras
    from tf_gptopt.compression.distillation.distiller import Distiller
    from tf_gptopt.compression.pruning.callbacks import pruning_callbacks
    from tf_gptopt.compression.pruning.config import PruneConfig
    from tf_gptopt.compression.pruning.pruner import prune
    from tf_gptopt.compression.quantization.qat import quantize_aware
    from tf_gptopt.models.gpt import GPTModel
    from tf_gptopt.training.config import TrainConfig
    from tf_gptopt.training.trainer import fit

    class Noise:
        sequence_length = 8

        def batches(self, split, batch_size, seed=0, start_step=0):
            def batch(step):
                shape = [batch_size, 9]
                ids = tf.random.stateless_uniform(shape, [seed, step], maxval=31, dtype=tf.int32)
                return ids[:, :-1], ids[:, 1:]

            return tf.data.Dataset.range(start_step, 2**40).map(batch)

    class Crash(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 12:
                raise InterruptedError

    def build():
        keras.utils.set_random_seed(2)
        gpt, teacher = (
            GPTModel(31, 16, 1, 2, max_sequence_length=8, dropout=0.1) for _ in range(2)
        )
        if kind == "pruned":
            sparse = prune(gpt, PruneConfig(sparsity=0.5, end_step=20, frequency=2))
            return sparse, pruning_callbacks(sparse)
        if kind == "quantized":
            return quantize_aware(gpt), []
        return Distiller(student=gpt, teacher=teacher), []

    config = TrainConfig(steps=24, batch_size=4, log_every=4, checkpoint_every=1e-9)
    whole, callbacks = build()
    expected = fit(whole, Noise(), config, None, callbacks, lambda report: None)
    model, callbacks = build()
    with pytest.raises(InterruptedError):
        fit(model, Noise(), config, tmp_path, [*callbacks, Crash()], lambda report: None)
    model, callbacks = build()
    first = []
    metrics = fit(model, Noise(), config, tmp_path, callbacks, first.append)
    assert first[0].step == 16
    assert metrics["loss"] == expected["loss"]
    for a, b in zip(model.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
