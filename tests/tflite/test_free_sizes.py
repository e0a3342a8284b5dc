"""One signature for every size: whatever grew or shrank before, the logits are the same.

XNNPACK changes its plan of a graph as sizes change, and is not right about all graphs when they
grow back: these are what says that it is about ours.
"""

from __future__ import annotations

import numpy as np
import pytest

from tf_gptopt.compression.quantization.config import QuantConfig
from tf_gptopt.models.checkpoints import weight_shapes
from tf_gptopt.models.config import GPTConfig
from tf_gptopt.tflite import program
from tf_gptopt.tflite.convert import build_tflite
from tf_gptopt.tflite.runtime import TFLiteGPT

SCHEMES = {
    "float32": QuantConfig("float32"),
    "float16": QuantConfig("float16"),
    "int8": QuantConfig("int8", kv_cache="float32"),
    "int8, cache": QuantConfig("int8", kv_cache="int8"),
    "int8, weight-only": QuantConfig("int8", activations="float"),
    "int4": QuantConfig("int4"),
    "int4, odd rows": QuantConfig("int4"),
}
CONTEXT = 600


def build(folder, scheme, heads, head_dim, seed=0):
    width = 27 if "odd" in scheme else 32
    config = GPTConfig(61, width, 2, heads, head_dim=head_dim, max_sequence_length=CONTEXT)
    rng = np.random.default_rng(seed)
    weights = {
        name: rng.normal(name.endswith("gamma"), 0.15, shape).astype(np.float32)
        for name, shape in weight_shapes(config).items()
    }
    data, info = build_tflite(config, weights, SCHEMES[scheme])
    (folder / "model.tflite").write_bytes(data)
    return TFLiteGPT(folder / "model.tflite", threads=1), info


@pytest.mark.parametrize(("heads", "head_dim"), [(3, 8), ((6, 2), 64)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_any_order_of_sizes(tmp_path, monkeypatch, scheme, heads, head_dim):
    """Three conversations of different lengths in turn, through every length of a prefill."""
    monkeypatch.setattr(program, "_size", lambda count: count)  # each number is one of its own
    gpt, _ = build(tmp_path, scheme, heads, head_dim)
    rng = np.random.default_rng(1)
    ids = rng.integers(0, 61, CONTEXT)
    expected = TFLiteGPT(gpt.path, threads=1).logits(ids)
    conversations = [gpt.new_conversation() for _ in range(3)]
    differences = []
    for _ in range(90):
        one = conversations[rng.integers(3)]
        if rng.random() < 0.2 or one.length > CONTEXT - 40:
            one.reset()
        count = int(rng.choice([1, 1, 1, 2, 3, 5, 9, 16, 17, 33, 70, 130, 256]))
        count = min(count, CONTEXT - one.length)
        start = one.length
        logits = one.prefill(ids[start : start + count])
        differences.append(np.abs(logits - expected[start + count - 1]).max())
    # an int8 activation between two integers may fall to either side; nonsense differs by 1 or so
    assert np.median(differences) < 1e-5
    assert max(differences) < (1e-4 if "float" in scheme or "only" in scheme else 0.1)
    np.testing.assert_allclose(gpt.logits(ids), expected, atol=1e-6)


@pytest.mark.parametrize("heads", [16, (16, 5)])
@pytest.mark.parametrize("scheme", ["int8", "int8, cache"])
def test_decoding_to_the_end_and_back(tmp_path, scheme, heads):
    """Through every capacity, at one token a step, with signatures for one and for two groups."""
    gpt, info = build(tmp_path, scheme, heads, head_dim=64)
    assert info.signatures == ("prefill", "decode_512", "decode", "logits")
    ids = np.random.default_rng(2).integers(0, 61, CONTEXT)
    expected = gpt.logits(ids)
    for start in (1, 250, 40):
        gpt.reset()
        gpt.prefill(ids[:start])
        for position in range(start, CONTEXT):
            logits = gpt.decode(ids[position])
            np.testing.assert_allclose(logits, expected[position], atol=0.1)
    assert gpt.length == CONTEXT


def test_the_cache_follows_what_is_in_it(tmp_path):
    gpt, _ = build(tmp_path, "int8", heads=3, head_dim=8)
    ids = np.random.default_rng(3).integers(0, 61, CONTEXT)
    sizes = []
    for length in (1, 20, 40, 100, 300, 599, 60, 1):
        gpt.reset()
        gpt.prefill(ids[:length])
        gpt.decode(ids[length])
        assert gpt.length == length + 1
        sizes.append(gpt._cache.capacity)
        assert length + 1 <= sizes[-1] <= max(96, 1.3 * length)
    assert sizes[0] < sizes[2] < sizes[3] < sizes[4]
    assert sizes[-1] <= 64  # a short text after a long one is read as a short one
