"""When the context is full: the text ends there, or goes on over a window that slides."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tf_gptopt._errors import UserError
from tf_gptopt.compression.quantization.config import QuantConfig
from tf_gptopt.tflite.convert import export_tflite
from tf_gptopt.tflite.generating import History
from tf_gptopt.tflite.runtime import TFLiteGPT

CONTEXT = 32
ENDLESS = {"overflow": "slide", "logit_bias": {0: -float("inf")}}  # no end-of-text token


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


@pytest.fixture
def keras_and_file(folder, tiny_model, tiny_tokenizer):
    model = tiny_model(vocab_size=300, tie_embeddings=False)
    if not (folder / "float.tflite").is_file():
        export_tflite(model, folder / "float.tflite", QuantConfig("float32"), tiny_tokenizer)
    return model, TFLiteGPT(folder / "float.tflite", threads=1)


def window_by_hand(tokens, keep):
    """Token after token: when the context is full and another comes, the first `keep` and the
    latest half of the others are left."""
    seen = []
    for token in tokens:
        if len(seen) == CONTEXT:
            rest = seen[keep:]
            seen = seen[:keep] + rest[len(rest) - len(rest) // 2 :]
        seen.append(token)
    return seen


@given(
    prompt=st.integers(1, 150), keep=st.integers(0, CONTEXT - 1), new=st.integers(0, 2 * CONTEXT)
)
def test_the_window_is_that_of_token_after_token(prompt, keep, new):
    tokens = np.arange(prompt + new, dtype=np.int32)
    history = History(tokens[:prompt], CONTEXT, keep)
    assert history.visible.tolist() == window_by_hand(tokens[:prompt], keep)
    for token in tokens[prompt:]:
        history.append(token)
    assert history.visible.tolist() == window_by_hand(tokens, keep)
    assert history.tokens.tolist() == tokens.tolist()
    assert len(history.visible) <= CONTEXT


@pytest.mark.parametrize(("prompt", "keep"), [(5, 0), (5, 4), (32, 7), (33, 0), (100, 10), (3, 31)])
def test_text_goes_on_as_the_model_says_it_over_the_window(keras_and_file, prompt, keep):
    """Against the uncached Keras model, token by token, across several slides."""
    model, runtime = keras_and_file
    ids = np.random.default_rng(prompt).integers(0, 300, prompt).tolist()
    said = runtime.generate(ids, 70, keep=keep, **ENDLESS)
    assert len(said) == prompt + 70
    assert runtime.finish_reason == "length"
    ends = range(prompt, prompt + 70)
    windows = [window_by_hand(said[:end], keep) for end in ends]
    padded = np.array([window + [0] * (CONTEXT - len(window)) for window in windows])
    every = model(padded).numpy()
    for end, window, rows in zip(ends, windows, every, strict=True):
        logits = rows[len(window) - 1]
        gap = logits[1:].max() - logits[said[end]]
        assert gap < 1e-3, f"token {end} is {gap} behind the likeliest"


def test_options_hold_across_slides(keras_and_file):
    _, runtime = keras_and_file
    options = {**ENDLESS, "keep": 3, "temperature": 1.0}
    draws = [runtime.generate([1, 2, 3, 4], 90, seed=seed, **options) for seed in (5, 5, 6)]
    assert draws[0] == draws[1] != draws[2]
    # penalties can see what the model has forgotten: 200 different tokens in a context of 32
    wide = {"presence_penalty": 1e4, "penalty_window": 1000, **ENDLESS}
    assert len(set(runtime.generate([1, 2, 3, 4], 200, **wide)[4:])) == 200
    # by default they look as far back as the context reaches, and so cost the same for ever
    said = runtime.generate([1, 2, 3, 4], 200, presence_penalty=1e4, **ENDLESS)[4:]
    assert all(len(set(said[at : at + 33])) == 33 for at in range(200 - 33))
    assert len(set(said)) < 200
    batch = runtime.generate([[1, 2, 3, 4], [7] * 50], 90, seed=5, **options)
    assert batch[0] == draws[0]
    assert [len(ids) for ids in batch] == [94, 140]


def test_text_stops_and_streams_across_slides(keras_and_file):
    _, runtime = keras_and_file
    options = {**ENDLESS, "temperature": 1.3, "seed": 2}
    text = runtime.generate("import os", 120, **options)
    new = text[len("import os") :]
    assert "".join(runtime.stream("import os", 120, **options)) == new
    ends = range(len(new) // 2, len(new) - 3)
    stop = next(new[at : at + 3] for at in ends if new.index(new[at : at + 3]) == at)
    cut = runtime.generate("import os", stop=stop, **options)
    assert cut == "import os" + new[: new.index(stop)]
    assert runtime.finish_reason == "stop"
    endless = runtime.stream("import os", **options)
    assert new.startswith("".join(itertools.islice(endless, 60)))


def test_integers_slide_too(folder, tiny_model):
    export_tflite(tiny_model(), folder / "int8.tflite", QuantConfig(kv_cache="int8"))
    runtime = TFLiteGPT(folder / "int8.tflite", threads=1)
    said = runtime.generate([1, 2, 3], 90, overflow="slide", keep=2)
    for end in (40, 50, 60, 92):
        logits = runtime.new_conversation().prefill(window_by_hand(said[:end], 2))
        assert logits.max() - logits[said[end]] < 0.05


def test_a_long_chat_is_read_again_only_where_it_slid(keras_and_file):
    """The window begins where it began before, until it slides: what is in the cache is reused."""
    _, runtime = keras_and_file
    chat, reused = [1, 2, 3], []
    for turn in range(12):
        chat = runtime.generate([*chat, turn, 5, 6], 3, keep=2, **ENDLESS)
        reused.append(runtime.reused)
    assert sum(count > 10 for count in reused) >= 6
    assert min(reused[1:]) >= 2  # what is kept is never read again


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"overflow": "slide"}, "may go on for ever"),
        ({"overflow": "slid"}, "Did you mean 'slide'"),
        ({"overflow": None}, "Unknown overflow"),
        ({"overflow": "slide", "keep": 32, "max_new_tokens": 3}, "keep must be an integer from 0"),
        ({"overflow": "slide", "keep": -1, "max_new_tokens": 3}, "keep must be"),
        ({"overflow": "slide", "keep": 1.5, "max_new_tokens": 3}, "keep must be"),
        ({"keep": 3}, "Give both"),
    ],
)
def test_impossible_limits_are_refused(keras_and_file, options, says):
    with pytest.raises(UserError, match=says):
        keras_and_file[1].generate([1], **options)


def test_without_sliding_the_text_ends_at_the_context(keras_and_file):
    _, runtime = keras_and_file
    assert len(runtime.generate([1, 2], 99, overflow="stop")) == CONTEXT
    assert runtime.finish_reason == "context"
    with pytest.raises(UserError, match=r'33 tokens do not fit.*overflow="slide"'):
        runtime.generate([1] * 33, 1)
