"""Files of earlier versions, as these wrote them, go on saying what they said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tf_gptopt.compression.quantization.config import QuantConfig
from tf_gptopt.models.checkpoints import weight_shapes
from tf_gptopt.models.config import GPTConfig
from tf_gptopt.tflite.imitation import Imitation
from tf_gptopt.tflite.inspecting import inspect_tflite
from tf_gptopt.tflite.metadata import read_metadata
from tf_gptopt.tflite.reading import held_weights, read_weights
from tf_gptopt.tflite.runtime import TFLiteGPT

# int8; from format 2 on with an int8 cache, in format 3 by groups of heads. Weights are normal, of
# deviation 0.2; the seed is the format.
FOLDER = Path(__file__).parent / "old_formats"
VERSIONS = [1, 2, 3]


@pytest.mark.parametrize("version", VERSIONS)
def test_an_old_file_computes_what_it_holds(version, relative_error, some_ids):
    path = FOLDER / f"format_{version}.tflite"
    said = read_metadata(path)
    assert said["format_version"] == version
    config = GPTConfig.from_dict(said["gpt"])
    held = held_weights(read_weights(path.read_bytes()), weight_shapes(config))
    table = held["token_embedding/embeddings"]
    drawn = np.random.default_rng(version).normal(0, 0.2, table.shape)
    assert np.abs(table - drawn).max() < np.abs(drawn).max() / 127
    if version == 1:  # the scale of attention's scores lay in its weights
        queries = config.num_heads * config.head_dim
        for i in range(config.num_layers):
            for name in (f"block_{i}_qkv/kernel", f"block_{i}_qkv/bias"):
                held[name] = held[name].copy()
                held[name][..., :queries] *= config.head_dim**0.5
    quant = QuantConfig(kv_cache="int8" if version > 1 else "float32")
    ids, gpt = some_ids(60), TFLiteGPT(path, threads=1)
    logits = gpt.logits(ids)
    assert relative_error(logits, Imitation(config, held, quant).logits(ids)) < 0.01
    gpt.reset()
    gpt.prefill(ids[:5])  # and token by token over a cache of 32 rows, then 64
    decoded = np.array([gpt.decode(token) for token in ids[5:]])
    assert relative_error(decoded, logits[5:]) < 0.03
    plain = gpt.new_conversation().generate([1, 2, 3, 1, 2, 3], 40)
    assert gpt.generate([1, 2, 3, 1, 2, 3], 40, draft="lookup") == plain


@pytest.mark.parametrize("version", VERSIONS)
def test_an_old_file_can_be_looked_into(version):
    found = inspect_tflite(FOLDER / f"format_{version}.tflite", run=False)
    assert (found.is_ours, found.checksum, found.files) == (True, "ok", {})
    assert found.scheme == "int8" if version == 1 else "int8 dynamic int8 cache"
    assert found.parameters == (41736 if version == 3 else 17496)
