"""The runtime chooses tokens as Keras models do, scores text, and never lets a stop string out."""

from __future__ import annotations

import numpy as np
import pytest

from tf_gptopt._errors import UserError
from tf_gptopt.models.sampling import log_softmax


@pytest.fixture
def keras_and_file(exported):
    return exported("float32")


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.4},
        {"frequency_penalty": 0.7, "presence_penalty": 0.5},
        {"temperature": 1.5, "seed": 3},
        {"min_p": 0.05, "temperature": 1.3, "repetition_penalty": 1.2, "seed": 5},
        {"top_k": 20, "top_p": 0.95, "min_p": 0.01, "logit_bias": {7: 3.0, 8: -9.0}, "seed": 7},
    ],
)
def test_options_and_seeds_give_what_keras_gives(keras_and_file, options):
    model, runtime = keras_and_file
    ours = runtime.generate([1, 2, 3], 25, **options)
    assert ours == runtime.generate([1, 2, 3], 25, **options)
    assert ours == model.generate([1, 2, 3], max_new_tokens=25, **options)
    assert ours != runtime.generate([1, 2, 3], 25)


def test_penalties_see_prompt_and_completion(keras_and_file):
    _, runtime = keras_and_file
    # the prompt's tokens are held by the repetition penalty alone
    assert len(set(runtime.generate([1, 2, 3], presence_penalty=1e4)[3:])) == 29
    assert len(set(runtime.generate([1, 2, 3], 9, frequency_penalty=-1e4)[3:])) == 1
    assert len(set(runtime.generate([1, 2, 3], 9, repetition_penalty=1e4))) == 12
    only = {token: -float("inf") for token in range(61) if token != 9}
    assert runtime.generate([1], 3, temperature=2.0, logit_bias=only) == [1, 9, 9, 9]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"sampler": "beam"}, r"only generate\(\) of a Keras model has it"),
        ({"min_p": 2.0}, "min_p must be in"),
        ({"repetition_penalty": 0.0}, "above 0"),
        ({"repitition_penalty": 1.2}, "Did you mean 'repetition_penalty'"),
        ({"logit_bias": {61: 1.0}}, "from 0 to 60"),
        ({"logit_bias": {token: -float("inf") for token in range(61)}}, "leave no token"),
        ({"seed": -3}, "seed must be"),
    ],
)
def test_impossible_options_are_refused(keras_and_file, options, says):
    with pytest.raises(UserError, match=says):
        keras_and_file[1].generate([1, 2], **options)


# Scores


def test_scores_are_those_of_keras(exported):
    model, runtime = exported("float32", max_sequence_length=140)
    ids = np.random.default_rng(0).integers(0, 61, 141)  # the last is scored, and never read
    expected = log_softmax(model(ids[None, :140])[0].numpy())[np.arange(140), ids[1:]]
    score = runtime.score(ids)
    assert score.log_probs.dtype == np.float32
    np.testing.assert_array_equal(score.token_ids, ids[1:])
    np.testing.assert_allclose(score.log_probs, expected, atol=1e-4)
    assert score.total == pytest.approx(expected.sum(), abs=1e-3)
    assert runtime.length == 140
    for cut in (1, 139, 140):
        after = runtime.score(ids[cut:].tolist(), prompt=ids[:cut])
        np.testing.assert_allclose(after.log_probs, expected[cut - 1 :], atol=1e-4)


def test_scores_of_text_are_those_of_its_tokens(speaking):
    ids = [speaking.tokenizer.encode(text) for text in ("import os\n", "import sys")]
    by_text = speaking.score("import sys", prompt="import os\n")
    np.testing.assert_array_equal(by_text.token_ids, ids[1])
    by_ids = speaking.score(ids[1], ids[0])  # the prompt is in the cache by now: up to rounding
    np.testing.assert_allclose(by_text.log_probs, by_ids.log_probs, atol=1e-4)
    likely = speaking.generate(ids[0].tolist(), 1)[-1:]
    best = speaking.score(likely, prompt=ids[0]).total
    others = [speaking.score([other], prompt=ids[0]).total for other in range(300)]
    assert max(others) == pytest.approx(best, abs=1e-4)


def test_what_cannot_be_scored_is_refused(keras_and_file):
    _, runtime = keras_and_file
    for text, prompt, says in [
        ([5], None, "One token alone"),
        ([], [1], "at least one token id"),
        ([1], [], "at least one token id"),
        ([1] * 34, None, "33 tokens do not fit"),
        ([1] * 31, [1] * 3, "33 tokens do not fit"),
        ([1, 61], None, "Token id 61"),
        ("text", None, "no tokenizer"),
    ]:
        with pytest.raises(UserError, match=says):
            runtime.score(text, prompt)


# Stop strings


def test_no_part_of_a_stop_string_is_ever_streamed(speaking):
    decode = speaking.tokenizer.decode
    parts = [i for i in range(300) if "\ufffd" in decode([i])]  # of characters
    forbidden = dict.fromkeys([*parts, speaking.eot_id], -float("inf"))
    options = {"temperature": 1.5, "seed": 5, "logit_bias": forbidden}
    prompt = speaking.tokenizer.encode("import os").tolist()
    new = speaking.generate(prompt, 20, **options)[len(prompt) :]
    texts = [speaking.tokenizer.decode(new[:count]) for count in range(1, 21)]
    whole, spanning = texts[-1], 0
    for text in texts[:-1]:
        stop = whole[len(text) - 1 : len(text) + 1]  # a token's last character, the next's first
        if "\ufffd" in stop:
            continue
        spanning += 1
        expected, said = whole[: whole.index(stop)], ""
        for piece in speaking.stream("import os", 20, stop=stop, **options):
            said += piece
            assert expected.startswith(said)
        assert said == expected
        assert speaking.finish_reason == "stop"
    assert spanning > 15
