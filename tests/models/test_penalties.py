"""Penalties and biases change the logits they name, by their definitions, and no others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tf_gptopt._errors import UserError
from tf_gptopt.models.penalties import Penalties

VOCAB = 40
HISTORIES = [[3, 3, 3, 7, 0], [], [39]]


def some_logits(seed: int = 0, batch: int = len(HISTORIES)) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, (batch, VOCAB)).astype(np.float32)


def by_definition(
    logits: np.ndarray, histories: list[list[int]], penalties: Penalties, prompt: int = 0
) -> Any:
    """Token by token, in float64."""
    expected = logits.astype(np.float64)
    for row, history in zip(expected, histories, strict=True):
        places = range(len(history))[-(penalties.penalty_window or VOCAB) :]
        held = [history[place] for place in places]
        said = [history[place] for place in places if place >= prompt]
        for token in range(VOCAB):
            row[token] += penalties.logit_bias.get(token, 0.0)
            if token in held:
                row[token] *= penalties.repetition_penalty ** (-1 if row[token] > 0 else 1)
            row[token] -= said.count(token) * penalties.frequency_penalty
            row[token] -= (token in said) * penalties.presence_penalty
    return expected


@settings(deadline=None)
@given(
    repetition=st.floats(0.1, 5),
    frequency=st.floats(-2, 2),
    presence=st.floats(-2, 2),
    bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100), max_size=5),
    histories=st.lists(st.lists(st.integers(0, VOCAB - 1), max_size=30), min_size=1, max_size=3),
    window=st.none() | st.integers(1, 31),
    prompt=st.integers(0, 12),
    seed=st.integers(0, 9),
)
def test_they_follow_their_definitions(
    repetition, frequency, presence, bias, histories, window, prompt, seed
):
    logits = some_logits(seed, len(histories))
    before = logits.copy()
    penalties = Penalties(repetition, frequency, presence, bias, window)
    expected = by_definition(logits, histories, penalties, prompt)
    prompts = [prompt] * len(histories)
    changed = penalties(logits, histories, prompts=prompts)
    np.testing.assert_allclose(changed, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(logits, before)
    assert penalties(logits, histories, out=logits, prompts=prompts) is logits
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("penalty", [0.5, 1.3, 7.0])
def test_repetition_equals_transformers(penalty):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    history = np.random.default_rng(1).integers(0, VOCAB, (3, 12))
    logits = some_logits()
    processor = transformers.RepetitionPenaltyLogitsProcessor(penalty)
    theirs = processor(torch.tensor(history), torch.tensor(logits)).numpy()
    ours = Penalties(repetition_penalty=penalty)(logits, history)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_bias_then_repetition_equals_transformers():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    history = np.random.default_rng(1).integers(0, VOCAB, (3, 12))
    bias = {int(history[0, 0]): 20.0, int(history[1, 0]): -4.5, 5: -float("inf")}
    logits = some_logits()
    processors = transformers.LogitsProcessorList(
        [
            transformers.SequenceBiasLogitsProcessor({(t,): v for t, v in bias.items()}),
            transformers.RepetitionPenaltyLogitsProcessor(1.3),
        ]
    )
    theirs = processors(torch.tensor(history), torch.tensor(logits)).numpy()
    ours = Penalties(repetition_penalty=1.3, logit_bias=bias)(logits, history)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    assert np.isneginf(ours[:, 5]).all()


def test_neutral_ones_hand_back_the_logits_themselves():
    logits = some_logits()
    assert Penalties()(logits, HISTORIES) is logits
    no_tokens_yet = Penalties(1.3, 0.5, 0.5)(logits, [[], [], []])
    np.testing.assert_array_equal(no_tokens_yet, logits)


def test_forbidden_tokens_stay_forbidden():
    logits = some_logits()
    logits[:, 3] = -np.inf
    changed = Penalties(2.0, -1.0, -1.0, {3: 50.0})(logits, HISTORIES)
    assert np.isneginf(changed[:, 3]).all()
    assert np.isfinite(changed[:, 4:]).all()


def test_later_changes_of_the_dictionary_change_nothing():
    bias = {1: 5.0}
    penalties = Penalties(logit_bias=bias)
    bias[1] = 7.0
    assert penalties(np.zeros((1, 4), np.float32), [[]])[0].tolist() == [0, 5, 0, 0]


@pytest.mark.parametrize(
    "penalties",
    [
        Penalties(logit_bias={token: -float("inf") for token in range(VOCAB)}),
        Penalties(logit_bias={0: 1e39}),
        Penalties(repetition_penalty=1e-39),
    ],
)
def test_when_no_token_is_left_it_says_so(penalties):
    with pytest.raises(UserError, match="leave no token to choose"):
        penalties(some_logits(), [list(range(VOCAB))] * 3)


def test_diverged_logits_are_left_to_the_sampler():
    logits = some_logits()
    logits[0, 0] = np.nan
    assert np.isnan(Penalties(1.2)(logits, HISTORIES)[0, 0])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        ({"repetition_penalty": 0}, "above 0"),
        ({"repetition_penalty": -1.2}, "above 0"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty must be a finite number"),
        ({"frequency_penalty": "0.5"}, "frequency_penalty must be a finite number"),
        ({"presence_penalty": True}, "presence_penalty must be a finite number"),
        ({"presence_penalty": float("inf")}, "presence_penalty must be a finite number"),
        ({"logit_bias": [(1, 2.0)]}, "a dictionary"),
        ({"logit_bias": {"the": 2.0}}, "'the', which is no token id"),
        ({"logit_bias": {-1: 2.0}}, "no token id"),
        ({"logit_bias": {1.0: 2.0}}, "no token id"),
        ({"logit_bias": {1: float("inf")}}, "must be finite"),
        ({"logit_bias": {1: float("nan")}}, "must be finite"),
        ({"logit_bias": {1: None}}, "must be finite"),
    ],
)
def test_impossible_ones_are_refused(make, says):
    with pytest.raises(UserError, match=says):
        Penalties(**make)


@pytest.mark.parametrize("history", [[0, VOCAB], [-1], [0.5], ["a"]])
def test_sequences_of_other_ids_are_refused(history):
    with pytest.raises(UserError, match="The sequence has token ids that are no integers from 0"):
        Penalties(presence_penalty=1.0)(some_logits(batch=1), [history])


def test_biases_outside_the_vocabulary_are_refused():
    with pytest.raises(UserError, match=r"logit_bias has token ids .* to 39"):
        Penalties(logit_bias={VOCAB: 1.0})(some_logits(), HISTORIES)
