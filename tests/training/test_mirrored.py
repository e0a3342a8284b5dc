"""Two replicas train as one device does, with padding spread unevenly, and go on after a crash."""

CODE = """
import tempfile
import numpy as np
from tf_gptopt._keras import keras
from tf_gptopt.models.gpt import GPTModel
from tf_gptopt.training.config import TrainConfig
from tf_gptopt.training.trainer import fit

class Padded:
    sequence_length = 16
    def batches(self, split, batch_size, seed=0, start_step=0):
        def batch(step):
            shape = [batch_size, 17]
            ids = tf.random.stateless_uniform(shape, [seed, step], maxval=41, dtype=tf.int32)
            keep = tf.random.stateless_uniform([batch_size, 16], [seed + 1, step]) < 0.7
            first_half = tf.range(batch_size)[:, None] < batch_size // 2  # the first replica's
            return ids[:, :-1], tf.where(keep | first_half, ids[:, 1:], -1)
        return tf.data.Dataset.range(start_step, 2**40).map(batch)

class Crash(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if batch == 8:
            raise InterruptedError

two = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
assert two.num_replicas_in_sync == 2

def train(strategy, policy="float32", dropout=0.0, folder=None, callbacks=()):
    keras.mixed_precision.set_global_policy(policy)
    keras.utils.set_random_seed(3)
    with strategy.scope():
        model = GPTModel(41, 24, 2, 3, max_sequence_length=16, dropout=dropout)
    losses = []
    config = TrainConfig(12, 8, log_every=2, learning_rate=1e-2, checkpoint_every=1e-9)
    fit(model, Padded(), config, folder, callbacks, lambda report: losses.append(report.loss))
    return np.array(losses), model.get_weights()

one_losses, one_weights = train(tf.distribute.get_strategy())
two_losses, two_weights = train(two)
np.testing.assert_allclose(two_losses, one_losses, rtol=1e-4)
for a, b in zip(one_weights, two_weights):
    np.testing.assert_allclose(a, b, atol=3e-3)

losses, _ = train(two, "mixed_bfloat16")
np.testing.assert_allclose(losses, one_losses, rtol=3e-2)
losses, _ = train(two, "mixed_float16")
np.testing.assert_allclose(losses, one_losses, rtol=3e-2)

_, whole = train(two, dropout=0.2)
folder = tempfile.mkdtemp()
try:
    train(two, dropout=0.2, folder=folder, callbacks=[Crash()])
except InterruptedError:
    pass
losses, resumed = train(two, dropout=0.2, folder=folder)
assert len(losses) == 2, losses  # steps 10 and 12
for a, b in zip(whole, resumed):
    np.testing.assert_array_equal(a, b)
print("same")
"""


def test_two_replicas_train_as_one(run_child):
    assert run_child(CODE, devices=2).endswith("same\n")
