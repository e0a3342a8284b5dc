"""The runtime says what the model says, token by token, and why it stops or refuses."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tf_gptopt._errors import UserError
from tf_gptopt.compression.quantization.config import QuantConfig
from tf_gptopt.tflite.convert import export_tflite
from tf_gptopt.tflite.runtime import TFLiteGPT


def some_ids(count, vocab_size=61, seed=0):
    return np.random.default_rng(seed).integers(0, vocab_size, count)


# Invariant 1: cached decoding is the uncached forward pass


@pytest.mark.parametrize(("scheme", "most"), [("float32", 1e-4), ("float16", 1e-4), ("int8", 0.02)])
def test_decoding_agrees_with_keras_at_every_position(exported, scheme, most):
    """140 positions: across the capacities 64, 128 and 140."""
    model, runtime = exported(scheme, max_sequence_length=140)
    ids = some_ids(140)
    whole = runtime.logits(ids)
    if scheme == "float32":
        np.testing.assert_allclose(whole, model(ids[None])[0], atol=1e-4)
    for position in range(140):
        np.testing.assert_allclose(runtime.decode(ids[position]), whole[position], atol=most)


def test_an_int8_cache_decodes_what_it_prefills_at_every_position(exported):
    """Across the capacities 64, 128 and 140, and in pieces of every size."""
    exact = QuantConfig(activations="float", kv_cache="int8")  # no other rounding hides a mistake
    model, runtime = exported(exact, max_sequence_length=140, num_heads=(1, 4), head_dim=8)
    ids = some_ids(140)
    whole = runtime.logits(ids)
    near = model(ids[None])[0].numpy()
    assert 1e-4 < np.abs(whole - near).max() < 0.1  # rounded, and not by much
    for position in range(140):
        np.testing.assert_allclose(runtime.decode(ids[position]), whole[position], atol=1e-4)
    for cut in (1, 17, 63, 64, 65, 100, 128, 139):
        runtime.reset()
        runtime.prefill(ids[:cut])
        np.testing.assert_allclose(runtime.prefill(ids[cut:]), whole[-1], atol=1e-4)


def test_an_int8_cache_takes_a_quarter_and_its_scales(exported):
    sizes = {}
    for cache in ("float32", "int8"):
        _, runtime = exported(QuantConfig(kv_cache=cache), num_heads=16, head_dim=8)
        runtime.prefill(some_ids(20))
        sizes[cache] = runtime._cache.nbytes
    rows = 2 * 2 * 16 * 32  # of keys and of values, in two blocks of sixteen heads
    assert sizes == {"float32": rows * 8 * 4, "int8": rows * (8 + 4)}


def test_integers_in_and_out_mean_the_same_numbers(exported, tiny_model):
    calibration = np.stack([some_ids(32, seed=seed) for seed in range(4)])
    files = {}
    for io in ("float32", "int8"):
        config = QuantConfig(activations="static", io=io)
        _, files[io] = exported(config, calibration=calibration, num_heads=8, head_dim=8)
    ids = some_ids(32)
    np.testing.assert_array_equal(files["int8"].logits(ids), files["float32"].logits(ids))
    assert files["int8"].generate(ids[:5], 20) == files["float32"].generate(ids[:5], 20)
    cache, logits = (files["int8"].metadata[part] for part in ("cache", "logits"))
    assert (cache["dtype"], cache["scales"], logits["dtype"]) == ("int8", False, "int8")
    assert files["int8"]._cache.nbytes * 4 == files["float32"]._cache.nbytes
    steps = files["int8"].decode(3) / logits["scale"] + logits["zero_point"]
    np.testing.assert_allclose(steps, np.rint(steps), atol=1e-3)


@pytest.mark.parametrize(
    "shape",
    [
        {"num_heads": (1, 4), "intermediate_dim": (5, 50), "head_dim": 8},
        {"tie_embeddings": False},
    ],
)
def test_decoding_agrees_for_other_models(exported, shape):
    model, runtime = exported("float32", **shape)
    ids = some_ids(32)
    expected = model(ids[None])[0]
    runtime.prefill(ids[:5])
    for position in range(5, 32):
        np.testing.assert_allclose(runtime.decode(ids[position]), expected[position], atol=1e-4)


def test_heads_in_groups_agree(exported):
    """At capacity 1,100 five heads of 64 are done two, two and one at a time."""
    model, runtime = exported(
        "float32",
        num_layers=1,
        num_heads=5,
        head_dim=64,
        max_sequence_length=1100,
        prefill_lengths=[256],
        decode_capacities=[1100],
    )
    ids = some_ids(1000)
    expected = model(ids[None])[0]
    runtime.prefill(ids[:998])
    np.testing.assert_allclose(runtime.decode(ids[998]), expected[998], atol=1e-4)
    np.testing.assert_allclose(runtime.decode(ids[999]), expected[999], atol=1e-4)


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(cuts=st.lists(st.integers(1, 149), max_size=6, unique=True), one=st.booleans())
def test_reading_in_pieces_agrees(exported, cuts, one):
    _, runtime = exported("float32", max_sequence_length=150)
    ids = some_ids(150)
    whole = runtime.logits(ids)
    start = 0
    for end in [*sorted(cuts), 150]:
        logits = runtime.decode(ids[start]) if one else None
        if not one or end > start + 1:
            logits = runtime.prefill(ids[start + one : end])
        np.testing.assert_allclose(logits, whole[end - 1], atol=1e-4)
        start = end
        assert runtime.length == end


def test_a_shorter_text_after_a_longer_one_is_not_disturbed(exported):
    _, runtime = exported("float32", max_sequence_length=140)
    ids = some_ids(140)
    runtime.prefill(ids)
    runtime.reset()
    expected = runtime.logits(ids[:9])
    runtime.prefill(ids[:8])
    np.testing.assert_allclose(runtime.decode(ids[8]), expected[-1], atol=1e-4)


def test_any_choice_of_signatures_gives_the_same_logits(exported):
    ids = some_ids(30)
    expected = None
    for options in (
        {},
        {"prefill_lengths": [1], "decode_capacities": [32]},
        {"prefill_lengths": [7], "decode_capacities": [3, 5, 32]},
        {"prefill_lengths": [32], "decode_capacities": [1]},
    ):
        _, runtime = exported("float32", **options)
        logits = runtime.logits(ids)
        expected = logits if expected is None else expected
        np.testing.assert_allclose(logits, expected, atol=1e-4)
        runtime.prefill(ids[:12])
        np.testing.assert_allclose(runtime.decode(ids[12]), expected[12], atol=1e-4)


def test_threads_do_not_change_the_result(exported, tmp_path):
    _, runtime = exported("int8")
    two = TFLiteGPT(runtime.path, threads=2)
    assert (runtime.threads, two.threads) == (1, 2)
    np.testing.assert_allclose(two.logits(some_ids(32)), runtime.logits(some_ids(32)), atol=1e-5)


# Invariant 3: the file generates what Keras does, up to the first near-tie


@pytest.mark.parametrize(("scheme", "tie"), [("float32", 1e-3), ("int8", 0.3)])
def test_greedy_generation_is_that_of_keras(exported, scheme, tie):
    model, runtime = exported(scheme, max_sequence_length=100)
    prompt = some_ids(7).tolist()
    ours = runtime.generate(prompt, 80)
    keras = model.generate(prompt, max_new_tokens=80)
    assert len(ours) == len(keras) == 87
    for position in range(7, 87):
        if ours[position] != keras[position]:
            logits = model(np.array([keras[:position]]))[0, -1].numpy()
            gap = logits[keras[position]] - logits[ours[position]]
            assert gap < tie, f"at {position} {gap:.3f} apart"
            break
    else:
        return
    assert position > 8


def test_a_seed_repeats_what_is_drawn(exported):
    _, runtime = exported("float32")
    draws = [runtime.generate([1, 2], 20, temperature=1.0, seed=seed) for seed in (3, 3, 4)]
    assert draws[0] == draws[1] != draws[2]
    assert runtime.generate([1, 2], 20, top_k=1) == runtime.generate([1, 2], 20)
    named = runtime.generate([1, 2], 20, sampler={"name": "top_k", "k": 5}, seed=3)
    assert named == runtime.generate([1, 2], 20, top_k=5, seed=3)


def test_generation_ends_where_the_context_does(exported):
    _, runtime = exported("float32")
    assert len(runtime.generate(some_ids(30))) == 32
    assert runtime.finish_reason == "context"
    assert len(runtime.generate(some_ids(30), 99)) == 32
    assert runtime.finish_reason == "context"
    assert len(runtime.generate(some_ids(30), 1)) == 31
    assert runtime.finish_reason == "length"
    assert len(runtime.generate(some_ids(32), 5)) == 32
    assert runtime.finish_reason == "context"
    assert runtime.generate(some_ids(3), 0) == some_ids(3).tolist()
    assert runtime.finish_reason == "length"


# Text


@pytest.fixture
def speaking(exported, tiny_tokenizer):
    _, runtime = exported("float32", vocab_size=300, tokenizer=tiny_tokenizer)
    return runtime


def test_text_in_text_out(speaking):
    text = speaking.generate("import os", 12)
    ids = speaking.tokenizer.encode("import os").tolist()
    assert text.startswith("import os")
    assert text == speaking.tokenizer.decode(speaking.generate(ids, 12))
    assert speaking.finish_reason == "length"


def test_pieces_join_to_the_text(speaking):
    pieces = list(speaking.stream("import os", 15, temperature=1.5, seed=5))
    whole = speaking.generate("import os", 15, temperature=1.5, seed=5)
    assert "import os" + "".join(pieces) == whole
    assert len(pieces) > 3


def test_stop_strings_end_the_text(speaking):
    whole = speaking.generate("import os", 15)[len("import os") :]
    stop = whole[4:6]
    assert speaking.generate("import os", 15, stop=stop) == "import os" + whole[: whole.index(stop)]
    assert speaking.finish_reason == "stop"
    ids = speaking.generate(speaking.tokenizer.encode("import os"), 15, stop=[stop, "never"])
    assert stop in speaking.tokenizer.decode(ids)
    assert speaking.finish_reason == "stop"


def test_the_end_of_text_token_ends_the_text(exported, tiny_tokenizer, tiny_model):
    model = tiny_model(vocab_size=300, tie_embeddings=False)
    head = model.base_layer("token_logits").kernel
    _, runtime = exported("float32", model=model, tokenizer=tiny_tokenizer)
    third = runtime.generate([5, 6], 3)[-1]
    kernel = head.numpy()  # exchange the third token's logit with end-of-text's
    kernel[:, [third, tiny_tokenizer.eot_id]] = kernel[:, [tiny_tokenizer.eot_id, third]]
    head.assign(kernel)
    _, runtime = exported("float32", model=model, tokenizer=tiny_tokenizer)
    ids = runtime.generate([5, 6], 20)
    assert ids[-1] == runtime.eot_id == tiny_tokenizer.eot_id
    assert len(ids) <= 5
    assert runtime.finish_reason == "eot"
    assert "endoftext" not in "".join(runtime.stream([5, 6], 20))


# Mistakes


def test_prompts_that_cannot_be_read_are_refused(exported):
    _, runtime = exported("float32")
    for prompt, says in [
        (some_ids(33), "33 tokens do not fit: the model's context is 32 tokens"),
        ([], "at least one token id"),
        ([[[1, 2]]], "at least one token id"),
        ([1.5], "at least one token id"),
        ([1, 61], "Token id 61 is outside the vocabulary of 61"),
        ([-1], "Token id -1"),
        ([True], "at least one token id"),
    ]:
        for call in (runtime.generate, runtime.prefill, runtime.logits):
            with pytest.raises(UserError, match=says):
                call(prompt)


def test_decoding_past_the_context_is_refused_and_changes_nothing(exported):
    _, runtime = exported("float32")
    ids = some_ids(32)
    runtime.prefill(ids[:31])
    with pytest.raises(UserError, match="of which 31 are used"):
        runtime.prefill([1, 2])
    last = runtime.decode(ids[31])
    with pytest.raises(UserError, match="1 tokens do not fit"):
        runtime.decode(1)
    np.testing.assert_allclose(last, runtime.logits(ids)[-1], atol=1e-4)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_new_tokens": -1}, "must not be negative"),
        ({"temperature": -0.5}, "above 0"),
        ({"temperature": 0, "top_k": 5}, "have no effect"),
        ({"sampler": "gredy"}, "Did you mean 'greedy'"),
        ({"sampler": "greedy", "top_k": 3}, "not both"),
    ],
)
def test_impossible_numbers_are_refused(exported, options, says):
    _, runtime = exported("float32")
    with pytest.raises(UserError, match=says):
        runtime.generate([1], **options)


def test_threads_must_be_positive(exported):
    _, runtime = exported("float32")
    with pytest.raises(UserError, match="threads must be a positive integer"):
        TFLiteGPT(runtime.path, threads=0)


def test_text_without_a_tokenizer_is_refused(exported):
    _, runtime = exported("float32")
    with pytest.raises(UserError, match=r"no tokenizer\.json beside"):
        runtime.generate("text")
    with pytest.raises(UserError, match=r"no tokenizer\.json beside"):
        runtime.generate([1], stop="x")


def test_another_tokenizer_is_refused(speaking, tmp_path):
    from tf_gptopt.data.tokenizer import train_tokenizer

    other = train_tokenizer(["some other text, and more of it, " * 9], 280)
    with pytest.raises(UserError, match="fingerprint"):
        TFLiteGPT(speaking.path, tokenizer=other)
    other.save(tmp_path)
    # the file carries its own: what lies beside it has no say
    assert TFLiteGPT(speaking.path).generate("text", 3) == speaking.generate("text", 3)
    larger = train_tokenizer([Path(__file__).read_text()], 400)
    speaking.metadata["tokenizer"] = None  # as of a file that was exported without one
    with pytest.raises(UserError, match="only 300"):
        speaking._vocabulary._check(larger)


# Files


def test_other_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        TFLiteGPT(tmp_path / "no.tflite")
    for content in (b"", b"TFL3", b"hello, this is some text", bytes(1000)):
        (tmp_path / "text.tflite").write_bytes(content)
        with pytest.raises(UserError, match=r"not a \.tflite file"):
            TFLiteGPT(tmp_path / "text.tflite")


def test_a_tflite_file_of_another_maker_is_refused(tmp_path):
    from tf_gptopt.tflite.flatbuffer import Model

    model = Model()
    graph = model.graph("f")
    graph.output("y", graph.softmax(graph.input("x", [1, 4])))
    (tmp_path / "model.tflite").write_bytes(model.to_bytes())
    with pytest.raises(UserError, match="not one that tf_gptopt wrote"):
        TFLiteGPT(tmp_path / "model.tflite")


def test_a_newer_format_is_refused(tmp_path, tiny_model, monkeypatch):
    from tf_gptopt.tflite import metadata

    export_tflite(tiny_model(), tmp_path / "new.tflite", QuantConfig("float32"))
    TFLiteGPT(tmp_path / "new.tflite")
    monkeypatch.setattr(metadata, "FORMAT_VERSION", 3)
    with pytest.raises(UserError, match="has format 4"):
        TFLiteGPT(tmp_path / "new.tflite")


@pytest.fixture(scope="module")
def good_file(tmp_path_factory):
    """A small .tflite file."""
    from tf_gptopt.models.gpt import GPTModel

    path = tmp_path_factory.mktemp("good") / "model.tflite"
    model = GPTModel(61, 24, 2, 3, max_sequence_length=32)
    export_tflite(model, path, prefill_lengths=[8], decode_capacities=[32])
    return path


@pytest.mark.parametrize("share", [0.0005, 0.01, 0.3, 0.7, 0.99, 0.99999])
def test_a_file_cut_short_is_refused(good_file, tmp_path, share):
    content = good_file.read_bytes()
    (tmp_path / "cut.tflite").write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match=r"damaged|cut short"):
        TFLiteGPT(tmp_path / "cut.tflite")


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_flipped_byte_is_noticed(good_file, tmp_path, data):
    flipped = bytearray(good_file.read_bytes())
    at = data.draw(st.integers(0, len(flipped) - 1))
    flipped[at] ^= data.draw(st.integers(1, 255))
    (tmp_path / "flipped.tflite").write_bytes(flipped)
    with pytest.raises(UserError, match=r"damaged|not a \.tflite|not one that|has format"):
        TFLiteGPT(tmp_path / "flipped.tflite")


def test_the_weight_cache_is_filled_once_and_changes_nothing(exported, tmp_path):
    _, runtime = exported("int8")
    expected = runtime.logits(some_ids(32))
    cache = tmp_path / "cache"
    for _ in range(2):
        cached = TFLiteGPT(runtime.path, threads=1, weight_cache=cache)
        np.testing.assert_array_equal(cached.logits(some_ids(32)), expected)
        files = [(p.name, p.stat().st_mtime_ns, p.stat().st_ino) for p in cache.iterdir()]
        assert len(files) == 1
    _, other = exported("int8", seed=1)
    cached = TFLiteGPT(other.path, threads=1, weight_cache=cache)
    np.testing.assert_array_equal(cached.logits(some_ids(32)), other.logits(some_ids(32)))
    assert len(list(cache.iterdir())) == 2
    assert files[0] in [(p.name, p.stat().st_mtime_ns, p.stat().st_ino) for p in cache.iterdir()]


def test_a_weight_cache_that_cannot_be_written_is_refused(exported, tmp_path):
    _, runtime = exported("int8")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        TFLiteGPT(runtime.path, weight_cache=tmp_path / "file")


# What it needs


def test_the_runtime_needs_no_tensorflow_and_says_nothing(speaking, tmp_path):
    import subprocess
    import sys

    code = f"""
import sys
from tf_gptopt.tflite.runtime import TFLiteGPT
gpt = TFLiteGPT({str(speaking.path)!r})
text = "".join(gpt.stream("import os", max_new_tokens=5))
print(gpt.logits([1, 2, 3]).shape)
heavy = {{"tensorflow", "tf_keras", "keras", "torch", "tensorflow_model_optimization"}}
print(sorted(heavy & set(sys.modules)))
"""
    child = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": ""},
        timeout=60,
    )
    assert (child.stdout, child.stderr) == ("(3, 300)\n[]\n", "")


def test_the_file_can_be_moved(speaking, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    for name in (speaking.path.name, "tokenizer.json"):
        shutil.copy(speaking.path.parent / name, tmp_path / "elsewhere" / name)
    moved = TFLiteGPT(tmp_path / "elsewhere" / speaking.path.name)
    assert moved.generate("import os", 5) == speaking.generate("import os", 5)
