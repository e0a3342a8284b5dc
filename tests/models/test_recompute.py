"""Recomputed activations: the same losses and weights, to the last bit, and less memory."""

import pytest

from tf_gptopt._errors import UserError

CODE = """
import numpy as np
from tf_gptopt._keras import keras
from tf_gptopt.compression.pruning.pruner import prune
from tf_gptopt.compression.quantization.qat import quantize_aware
from tf_gptopt.models.gpt import GPTModel
from tf_gptopt.training.loss import NextTokenLoss

ids = np.random.default_rng(0).integers(0, 61, (16, 17))

def train(recompute, strategy, wrap, tied):
    keras.utils.set_random_seed(0)
    with strategy.scope():
        model = wrap(GPTModel(61, 24, 3, 3, max_sequence_length=16, tie_embeddings=tied))
        model.recompute = recompute
        model.compile(keras.optimizers.AdamW(1e-2), NextTokenLoss())
    model.fit(ids[:, :-1], ids[:, 1:], batch_size=8, epochs=2, shuffle=False, verbose=0)
    return model.get_weights()

two = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
for case in [(tf.distribute.get_strategy(), quantize_aware, True), (two, prune, False)]:
    plain, again = (train(recompute, *case) for recompute in (False, True))
    for a, b in zip(plain, again):
        np.testing.assert_array_equal(a, b)
print("same")
"""

PEAK = """
from pathlib import Path

def peak_kb():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])
"""

MEMORY = """
import numpy as np
from tf_gptopt._keras import keras
from tf_gptopt.models.gpt import GPTModel
from tf_gptopt.training.loss import NextTokenLoss

model = GPTModel(512, 128, 10, 4, max_sequence_length=256)
model.recompute = {recompute}
model.compile(keras.optimizers.SGD(1e-2), NextTokenLoss())
ids = np.random.default_rng(0).integers(0, 512, (16, 257))
before = peak_kb()
model.fit(ids[:, :-1], ids[:, 1:], batch_size=16, verbose=0)
print((peak_kb() - before) // 1024)
"""


def test_losses_and_weights_are_the_same_to_the_last_bit(run_child):
    assert run_child(CODE, devices=2).endswith("same\n")


def test_the_peak_falls(run_child):
    plain, again = (
        int(run_child(PEAK + MEMORY.format(recompute=recompute), devices=1))
        for recompute in (False, True)
    )
    assert again < plain - 300, (plain, again)  # MB; ten blocks keep some 45 each


def test_dropout_is_refused(tiny_model):
    model = tiny_model(dropout=0.1)
    model.recompute = False
    with pytest.raises(UserError, match="dropout=0"):
        model.recompute = True
