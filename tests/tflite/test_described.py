"""What a file says about itself, edited and sealed again: refused in a sentence, or true."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest

from tf_gptopt._errors import UserError
from tf_gptopt.compression.quantization.config import QuantConfig
from tf_gptopt.models.checkpoints import weight_shapes
from tf_gptopt.models.config import GPTConfig
from tf_gptopt.tflite import metadata
from tf_gptopt.tflite.convert import build_tflite
from tf_gptopt.tflite.runtime import TFLiteGPT

CONFIG = GPTConfig(61, 24, 2, (1, 3), intermediate_dim=(7, 40), head_dim=8, max_sequence_length=64)
FILES = {
    "float32": (QuantConfig("float32"), {}),
    "int8 cache": (QuantConfig(kv_cache="int8"), {}),
    "fixed sizes": (QuantConfig(), {"prefill_lengths": [8], "decode_capacities": [32]}),
}
WRONG = [None, True, -1, 0, 1, 33, 64, 10**9, 10**30, 1.5, float("inf"), "x", [], {}, [1, 3]]
WRONG += ["int8", "decode", "logits"]
ROOM = 4000
json_text = json.dumps


@pytest.fixture(scope="module")
def build():
    """`build(name, change)`: a file's bytes whose description was changed, and then sealed."""
    rng = np.random.default_rng(0)
    weights = {
        name: rng.normal(name.endswith("gamma"), 0.2, shape).astype(np.float32)
        for name, shape in weight_shapes(CONFIG).items()
    }
    described: dict[str, Any] = {}
    for name, (quant, sizes) in FILES.items():
        with pytest.MonkeyPatch.context() as m:  # room for descriptions that are longer
            m.setattr(metadata.json, "dumps", lambda values: json_text(values).ljust(ROOM))
            data, _ = build_tflite(CONFIG, weights, quant, **sizes)
        text = metadata._buffers(data)[b"tf_gptopt.json"].tobytes()
        described[name] = bytes(data), data.index(text), json.loads(text)

    def make(name: str, change: Any) -> bytes:
        data, at, values = described[name]
        new = json_text(change(copy.deepcopy(values))).encode()
        changed = bytearray(data)
        changed[at : at + ROOM] = new.ljust(ROOM)
        assert len(changed) == len(data)
        metadata.seal(changed)
        return bytes(changed)

    make.described = {name: values for name, (_, _, values) in described.items()}
    return make


def edits(values: Any, path: tuple[Any, ...] = ()) -> Any:
    """Each value of the description: where it stands."""
    items = values.items() if isinstance(values, dict) else list(enumerate(values))[:3]
    for key, value in items:
        if path and path[0] == "quantization":
            continue
        yield (*path, key)
        if isinstance(value, (dict, list)):
            yield from edits(value, (*path, key))


def put(path: tuple[Any, ...], value: Any) -> Any:
    def change(values: Any) -> Any:
        at = values
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value
        return values

    return change


# what the runtime makes no use of, or what may well be so
HARMLESS = {"parameters", "quantization", "dropout", "layer_norm_epsilon", "intermediate_dim"}
HARMLESS |= {"tie_embeddings", "vocab_size", "eot_id", "fingerprint", "tokenizer", "verify"}
HARMLESS |= {"format_version", "layout"}


@pytest.mark.parametrize("name", FILES)
def test_whatever_is_edited_is_refused_or_true(build, name, tmp_path):
    file, accepted, tried = tmp_path / "m.tflite", [], 0
    values = build.described[name]
    for path in edits(values):
        before = values
        for key in path:
            before = before[key]
        for wrong in WRONG:
            if wrong == before and type(wrong) is type(before):
                continue
            file.write_bytes(build(name, put(path, wrong)))
            tried += 1
            try:
                metadata.start_reading(file)[1].wait()
            except UserError:
                continue
            accepted.append((path, wrong))
    assert tried > 500
    free = set() if name == "fixed sizes" else {"tokens", "rows"}  # how far, of what is free
    assert not [(path, wrong) for path, wrong in accepted if not (HARMLESS | free) & {*path}]
    expected = None
    for path, wrong in [(("parameters",), values["parameters"]), *accepted[::4]]:
        file.write_bytes(build(name, put(path, wrong)))
        gpt = TFLiteGPT(file, threads=1)
        ids = gpt.generate([1, 2, 3], 30)
        expected = expected or ids
        assert ids == expected, (path, wrong)


@pytest.mark.parametrize(
    "change",
    [
        lambda values: [],
        lambda values: "x",
        lambda values: None,
        lambda values: {},
        lambda values: {k: v for k, v in values.items() if k != "buckets"},
        lambda values: {k: v for k, v in values.items() if k != "cache"},
        lambda values: {k: v for k, v in values.items() if k != "tokenizer"},
        lambda values: {**values, "buckets": values["buckets"][:1]},
        lambda values: {**values, "buckets": values["buckets"][1:]},
        lambda values: {**values, "buckets": [{**b, "new": 1} for b in values["buckets"]]},
    ],
)
def test_what_is_missing_is_said(build, tmp_path, change):
    (tmp_path / "m.tflite").write_bytes(build("float32", change))
    with pytest.raises(UserError, match="damaged"):
        TFLiteGPT(tmp_path / "m.tflite", threads=1)


def test_the_error_names_what_does_not_fit(build, tmp_path):
    for path, wrong, says in [
        (("gpt", "embedding_dim"), 48, r"hidden is \[16, 24\]"),
        (("gpt", "num_layers"), 10**9, "num_layers is 1000000000"),
        (("cache", "dtype"), "int8", r"k_0 is \[256\], \[-1\]"),
        (("buckets", 1, "signature"), "nope", "signature is nope"),
        (("logits", "rows"), -1, "rows is -1"),
    ]:
        (tmp_path / "m.tflite").write_bytes(build("float32", put(path, wrong)))
        with pytest.raises(UserError, match=f"does not fit .*{says}"):
            TFLiteGPT(tmp_path / "m.tflite", threads=1)
