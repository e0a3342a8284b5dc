"""The estimate of a step's memory is held against what TensorFlow's allocator counts."""

import dataclasses
import json

import pytest

from tf_gptopt._errors import UserError
from tf_gptopt.models.config import PRESETS, GPTConfig, preset
from tf_gptopt.training import memory
from tf_gptopt.training.memory import Share, Step, count_weights, parse_bytes, step_memory
from tf_gptopt.training.plan import plan, schemes

MEASURE = """
import json
import tensorflow as tf
from tf_gptopt._keras import keras
from tf_gptopt.models import attention, linear_cross_entropy
from tf_gptopt.models.gpt import GPTModel
from tf_gptopt.training.loss import NextTokenLoss
from tf_gptopt.training.optimizer import adamw
from tf_gptopt.training.parallel.pipeline import pipeline

CPU = "CPU:0"  # its allocator is the one of GPUs here, which counts
tf.config.experimental.get_memory_info(CPU)

def nbytes(variables):
    return sum(v.shape.num_elements() * v.dtype.size for v in variables if v.shape.rank)

def measure(vocab, width, layers, heads, time, batch, precision, accumulate=1, stages=1):
    keras.backend.clear_session()
    keras.mixed_precision.set_global_policy(precision)
    model = GPTModel(vocab, width, layers, heads, max_sequence_length=time)
    if stages > 1:
        model = pipeline(model, stages, microbatches=batch // 2)
    optimizer = adamw(100, warmup_steps=1, accumulate=accumulate)
    optimizer.build(model.trainable_variables)
    model.compile(optimizer, loss=NextTokenLoss())
    weights, kept = nbytes(model.weights), nbytes(optimizer.variables)
    ids = tf.random.uniform([batch // accumulate, time], maxval=vocab, dtype=tf.int32)
    batches = iter(tf.data.Dataset.from_tensors((ids, ids)).repeat())
    step, grown = model.make_train_function(), []
    for i in range(3 * accumulate):
        tf.config.experimental.reset_memory_stats(CPU)
        before = tf.config.experimental.get_memory_info(CPU)["current"]
        step(batches)
        grown.append(tf.config.experimental.get_memory_info(CPU)["peak"] - before)
    # The first update compiles. A block of memory that is too large for its tensor counts whole, so
    # of two later updates the one that finds the better blocks.
    most = min(max(grown[i : i + accumulate]) for i in (accumulate, 2 * accumulate))
    return {"weights": weights, "kept": kept, "most": weights + kept + most}
"""

SHAPES = {
    "vocabulary": (16384, 128, 1, 2, 128, 32, "float32"),
    "microbatches": (512, 128, 4, 4, 128, 16, "float32", 2),
    "long context, 16 bits": (512, 96, 2, 3, 512, 4, "mixed_bfloat16"),
}
PIPED = (512, 128, 4, 4, 128, 16, "float32")  # over two devices, eight microbatches of two
TOLERANCE = 0.15


@pytest.fixture
def gpt2():
    return PRESETS["gpt2"]


def shares(shape):
    vocab, width, layers, heads, time, batch, precision, *accumulate = shape
    (passes,) = accumulate or [1]
    config = GPTConfig(vocab, width, layers, heads, max_sequence_length=time)
    step = Step(batch, time, precision, accumulate=passes)
    return Share(config, batch // passes, passes=passes), step


def test_estimates_are_what_is_measured(run_child):
    code = MEASURE + f"measured = [measure(*shape) for shape in {list(SHAPES.values())}]"
    code += f"\npiped = measure(*{PIPED}, stages=2)"
    code += "\nprint(json.dumps([measured, piped, attention.BLOCK, linear_cross_entropy.CHUNK]))"
    printed = run_child(code, devices=2, TF_CPU_ALLOCATOR_USE_BFC="true")
    found, piped, *constants = json.loads(printed)
    assert constants == [memory.ATTENTION_BLOCK, memory.CHUNK]
    share, step = shares(PIPED)
    *_, pipeline = schemes(share.config, 2)
    stages = [step_memory(stage, step) for stage in pipeline.shares(step)]
    assert piped["weights"] == sum(stage.gradients for stage in stages)
    assert piped["kept"] == sum(stage.optimizer for stage in stages)
    assert piped["most"] == pytest.approx(sum(stage.total for stage in stages), rel=TOLERANCE)
    for (name, shape), measured in zip(SHAPES.items(), found, strict=True):
        share, step = shares(shape)
        estimate = step_memory(share, step)
        weights = 4 * count_weights(share)
        assert measured["weights"] == estimate.gradients == weights, name
        sums = weights if step.accumulate > 1 else 0
        assert measured["kept"] == estimate.optimizer + sums, name
        assert measured["most"] == pytest.approx(estimate.total, rel=TOLERANCE), name
    assert memory.MARGIN >= TOLERANCE


@pytest.mark.parametrize(("name", "count"), [("gpt2", 124_439_808), ("gpt2-xl", 1_557_611_200)])
def test_weights_are_counted_exactly(name, count):
    """The published numbers; and stages have them all between them."""
    table = 50257 * preset(name).embedding_dim
    for config, whole in (
        (preset(name), count),
        (preset(name, tie_embeddings=False), count + table),
    ):
        assert count_weights(Share(config, 1)) == whole
        stages = memory.split_blocks(config.num_layers, 5)
        assert sum(count_weights(Share(config, 1, blocks)) for blocks in stages) == whole


def test_what_makes_a_step_smaller():
    step = Step(8, 1024)
    config = preset("gpt2-xl")
    plain = step_memory(Share(config, 8), step)
    recomputed = step_memory(Share(config, 8), dataclasses.replace(step, recompute=True))
    assert recomputed.activations < plain.activations / 8
    halves = step_memory(Share(config, 8), dataclasses.replace(step, precision="mixed_bfloat16"))
    assert halves.activations < 0.55 * plain.activations
    assert halves.parameters == 1.5 * plain.parameters  # and a 16-bit copy of each weight
    parts = step_memory(Share(config, 2, passes=4), step)
    assert parts.activations < plain.activations / 3
    columns = step_memory(Share(config, 8, split=4, mesh=True), step)
    assert columns.optimizer == pytest.approx(plain.optimizer / 4, rel=0.05)
    rows = step_memory(Share(config, 8, replicas=4, mesh=True), step)
    assert rows.optimizer == pytest.approx(plain.optimizer / 4, rel=1e-6)
    # Korthikanti et al.: activations grow with the tokens, those of attention with their square
    longer = step_memory(Share(config, 8), dataclasses.replace(step, sequence_length=2048))
    assert 2.2 * plain.activations < longer.activations < 4 * plain.activations


@pytest.mark.parametrize(
    ("text", "count"),
    [("16GB", 16 * 10**9), ("80 GiB", 80 * 2**30), ("1.5tb", 15 * 10**11), ("512mib", 2**29)],
)
def test_sizes(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["16 apples", "GB", "", "-3GB", "0GB", "16", "1e3GB"])
def test_sizes_that_are_none(text):
    with pytest.raises(UserError, match="Write for example 16GB"):
        parse_bytes(text)


def test_a_plan_is_right_about_what_it_says():
    found = plan(preset("gpt2-xl"), Step(8, 1024), 8, 16 * 10**9)
    for row in found.rows:
        assert row.fits == (row.memory.total * (1 + memory.MARGIN) <= found.device_memory)
        assert row.fits == (row.largest_batch >= 8)
        parts = row.memory.parameters + row.memory.optimizer
        assert parts < row.memory.total <= parts + 2 * row.memory.gradients + row.memory.activations
    assert found.recommended == "pipeline of 8"
    assert "--fit.pipeline 8" in found.command


def test_the_largest_batch_fits_and_the_next_does_not(gpt2):
    largest = plan(gpt2, Step(1, 1024), 4, 16 * 10**9)
    for row in largest.rows:
        again = {
            size: plan(gpt2, Step(size, 1024), 4, 16 * 10**9)
            for size in (row.largest_batch, row.largest_batch + 4)
        }
        fits = [next(r.fits for r in p.rows if r.scheme == row.scheme) for p in again.values()]
        assert fits == [True, False], row.scheme


def test_recommendations(gpt2):
    assert plan(gpt2, Step(1, 256), 1, 80 * 10**9).recommended == "one device"
    assert plan(gpt2, Step(8, 256), 4, 80 * 10**9).recommended == "data parallel over 4"
    tight = plan(gpt2, Step(32, 1024), 1, 6 * 10**9)
    assert "--fit.accumulate" in tight.command
    assert "As asked, nothing fits" in tight.why
    tighter = plan(preset("gpt2-medium"), Step(1, 1024), 1, 75 * 10**8)
    assert "--fit.recompute true" in tighter.command
    nothing = plan(preset("gpt2-xl"), Step(8, 1024), 1, 10**9)
    assert nothing.recommended is None
    assert "Take more devices" in nothing.why
