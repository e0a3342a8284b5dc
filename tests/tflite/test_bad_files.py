"""Whatever comes in, files and arguments: a clear error, no crash and no silent nonsense."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tf_gptopt._errors import UserError
from tf_gptopt.compression.quantization.config import QuantConfig
from tf_gptopt.models.choosing import SamplingOptions
from tf_gptopt.tflite.convert import export_tflite
from tf_gptopt.tflite.metadata import seal, start_reading
from tf_gptopt.tflite.runtime import TFLiteGPT

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


@pytest.fixture
def path(folder, tiny_model, tiny_tokenizer):
    path = folder / "model.tflite"
    if not path.is_file():
        model = tiny_model(vocab_size=300)
        export_tflite(model, path, QuantConfig("float32"), tiny_tokenizer)
    return path


@pytest.fixture
def gpt(path):
    return TFLiteGPT(path, threads=1)


@pytest.fixture(scope="module")
def robustness():
    """benchmarks/robustness.py, which is no part of the package."""
    sys.path.insert(0, str(REPOSITORY))
    try:
        from benchmarks import robustness
    finally:
        sys.path.remove(str(REPOSITORY))
    return robustness


# Files


def test_mutated_files_are_refused_and_crash_nothing(robustness):
    """One or two children, some hundred files: all that keep their checksum are refused."""
    said = []
    result = robustness.run_files(128, said.append)
    assert sum(result["total"].values()) == 128
    for kind, outcomes in result["by_mutation"].items():
        if "as it was" in kind:
            assert set(outcomes) == {"refused"}, kind
    assert {kind.partition(",")[0] for kind in result["by_mutation"]} == set(robustness.MUTATIONS)
    # sealed anew some get past the checksum: a crash of LiteRT is counted, and the rest goes on
    outcomes = set(result["total"]) - {"refused", "ran alike", "ran otherwise"}
    assert all(outcome.startswith("crashed (-") for outcome in outcomes), outcomes
    assert "128 of 128 files" in said[-1]


def test_a_soak_is_flat(robustness, path):
    result = robustness.run_soak(path, 2000, lambda line: None)
    assert result["tokens"] >= 2000
    assert len(result["parts"]) >= 2
    assert result["rss_growth_mb"] < 20


@pytest.mark.parametrize(
    "change",
    [
        lambda said: said.pop("gpt"),
        lambda said: said.pop("logits"),
        lambda said: said["gpt"].pop("vocab_size"),
        lambda said: said.update(buckets=5),
        lambda said: said.update(gpt=None),
        lambda said: said["gpt"].update(vocab_size=-30),
        lambda said: said.update(tokenizer=7),
    ],
)
def test_a_file_that_says_something_else_about_itself_is_refused(path, tmp_path, change):
    content = path.read_bytes()
    found = re.search(rb'\{"format_version".*?\}\}(?=\x00)|\{"format_version".*\}', content)
    values = json.loads(found.group()) if found else None
    assert values
    change(values)
    text = json.dumps(values).encode()
    assert len(text) <= len(found.group())
    changed = bytearray(content)
    changed[found.start() : found.end()] = text.ljust(len(found.group()))
    seal(changed)
    (tmp_path / "changed.tflite").write_bytes(changed)
    with pytest.raises(UserError):
        TFLiteGPT(tmp_path / "changed.tflite", threads=1)


def test_damage_among_the_numbers_is_noticed(tmp_path, tiny_model):
    """A large table is compared beside the loading of packed weights, and what loads then is not
    handed out."""
    path, cache = tmp_path / "model.tflite", tmp_path / "cache"
    export_tflite(tiny_model(vocab_size=3000), path, QuantConfig("float32"))
    content = path.read_bytes()
    inside = _middle_of_the_largest_buffer(content)
    damaged = bytearray(content)
    damaged[inside] ^= 1
    path.write_bytes(damaged)
    values, verification = start_reading(path)
    assert values["gpt"]["vocab_size"] == 3000
    with pytest.raises(UserError, match="damaged"):
        verification.wait()
    for folder in (None, cache):
        with pytest.raises(UserError, match="damaged"):
            TFLiteGPT(path, weight_cache=folder)
    assert not list(cache.iterdir())  # nothing is kept under the name of what it should have been

    for place in (40, len(content) - 40):  # the structure, at both ends of the file
        damaged = bytearray(content)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="damaged"):
            start_reading(path)
    path.write_bytes(content)
    assert len(TFLiteGPT(path, weight_cache=cache).generate([1, 2], 3)) == 5
    damaged = bytearray(content)
    damaged[inside] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(UserError, match="damaged"):  # though the cache has what it should be
        TFLiteGPT(path, weight_cache=cache)


def test_a_file_may_be_replaced_while_it_is_in_use(path, tmp_path, tiny_model):
    copy = Path(shutil.copy(path, tmp_path / "model.tflite"))
    gpt = TFLiteGPT(copy, threads=1)
    expected = TFLiteGPT(path, threads=1).generate([1, 2, 3], 20)
    export_tflite(tiny_model(seed=1, vocab_size=300), copy, QuantConfig("float32"))
    assert gpt.generate([1, 2, 3], 20) == expected
    assert TFLiteGPT(copy, threads=1).generate([1, 2, 3], 20) != expected
    copy.unlink()
    assert gpt.generate([1, 2, 3], 20) == expected


def _middle_of_the_largest_buffer(content):
    model = schema.Model.GetRootAsModel(content, 0)
    buffers = (model.Buffers(i).DataAsNumpy() for i in range(model.BuffersLength()))
    largest = max((b for b in buffers if not isinstance(b, int)), key=len)
    return content.index(largest.tobytes()) + len(largest) // 2


def test_what_is_no_file_is_refused(path, tmp_path):
    for wrong, says in [
        (None, "path as text"),
        (5, "path as text"),
        (b"model.tflite", "path as text"),
        ("model\0.tflite", "path as text"),
        (tmp_path, "is a folder"),
        (tmp_path / "none.tflite", "does not exist"),
        ("/dev/null", "does not exist"),
    ]:
        with pytest.raises(UserError, match=says):
            TFLiteGPT(wrong)
    for wrong in (0, -1, 1.5, "2", True, 10**12, []):
        with pytest.raises(UserError, match="threads must be a positive integer"):
            TFLiteGPT(path, threads=wrong)
    for wrong in (5, "words", object()):
        with pytest.raises(UserError, match=r"encode\(text\) and decode"):
            TFLiteGPT(path, tokenizer=wrong)
    for wrong, says in [(5, "path as text"), ("a\0b", "path as text"), (path, "cannot be written")]:
        with pytest.raises(UserError, match=says):
            TFLiteGPT(path, weight_cache=wrong)
    assert TFLiteGPT(path, threads=np.int64(2)).threads == 2


# Arguments


ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=5),
    st.dictionaries(st.integers(), st.integers(), max_size=2),
    st.just(object()),
    st.sampled_from([np.nan, np.array(3), np.array([1.5]), np.array([None]), np.zeros((2, 2, 2))]),
)
IDS = st.one_of(
    ANYTHING,
    st.lists(ANYTHING, max_size=4),
    st.lists(st.integers(-2, 302), max_size=40),
    st.lists(st.lists(st.integers(-2, 302), max_size=3), max_size=3),
)
SAMPLING = list(SamplingOptions.__annotations__)
OPTIONS = st.dictionaries(
    st.sampled_from(["max_new_tokens", "seed", "stop", "overflow", "keep", *SAMPLING]),
    st.one_of(ANYTHING, st.lists(ANYTHING, max_size=2), st.floats(0, 2), st.integers(0, 9)),
    max_size=2,
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_anything_is_answered_or_clearly_refused(gpt, data):
    """After each call, whatever it was, the conversation says what it always says."""
    for _ in range(4):
        name = data.draw(
            st.sampled_from(["generate", "stream", "prefill", "decode", "logits", "score"])
        )
        arguments = [data.draw(IDS)]
        options = data.draw(OPTIONS) if name in ("generate", "stream") else {}
        if name == "score":
            arguments.append(data.draw(IDS))
        with contextlib.suppress(UserError):
            result = getattr(gpt, name)(*arguments, **options)
            if name == "stream":
                list(itertools.islice(result, 40))
        assert gpt.length <= 32
    gpt.reset()
    assert gpt.generate([5, 6, 7], 9) == gpt.new_conversation().generate([5, 6, 7], 9)


def test_what_are_no_ids_is_refused_alike_everywhere(gpt):
    ragged, letters, mixed, huge = [[1], [1, 2]], [b"a"], [1, None], [2**70]
    for ids in (ragged, letters, mixed, huge, 5, None, {1}, {1: 2}, iter([1]), b"abc", "", []):
        for call in (gpt.prefill, gpt.logits, gpt.score, lambda ids: list(gpt.stream(ids, 2))):
            with pytest.raises(UserError, match=r"A prompt is text or a list|There is no text"):
                call(ids)
    assert gpt.length == 0


@pytest.mark.parametrize("returned", [[300], [-1], None, ["a"], [], [1.5]])
def test_a_sampler_that_returns_no_token_is_named(gpt, returned):
    with pytest.raises(UserError, match="The sampler must return a token id"):
        gpt.generate([1, 2], 3, sampler=lambda logits, rng: returned)
    assert gpt.length == 2


def test_ids_of_any_integer_type_are_ids(gpt):
    expected = gpt.generate([3, 4], 5)
    for kind in ("int8", "uint8", "int16", "uint32", "int64", "uint64", ">i4"):
        assert gpt.generate(np.array([3, 4], kind), 5) == expected
    assert gpt.generate((3, 4), 5) == gpt.generate(range(3, 5), 5) == expected
    with pytest.raises(UserError, match="Token id 18446744073709551615"):
        gpt.generate(np.array([2**64 - 1], np.uint64), 5)
