"""Speculative decoding says what plain decoding says, whatever is drafted, and leaves no trace."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tf_gptopt.compression.quantization.config import QuantConfig
from tf_gptopt.models.choosing import make_generators, read_options
from tf_gptopt.tflite.drafting import DraftModel, PromptLookup
from tf_gptopt.tflite.generating import History, next_tokens
from tf_gptopt.tflite.pacing import Pace
from tf_gptopt.tflite.speculative import DraftStats, Speculation, speculated_tokens

SAMPLED = {"temperature": 1.2, "top_k": 20, "repetition_penalty": 1.3, "logit_bias": {5: 1.0}}


class Foreseeing:
    """Knows what comes, and proposes it `right` times out of ten; other tokens the other times."""

    def __init__(self, future, right, vocab_size=61, seed=0):
        self._future, self._right, self._size = list(future), right, vocab_size
        self._rng = np.random.default_rng(seed)

    def propose(self, tokens, count):
        if self._right not in (0, 10):
            count = self._rng.integers(0, count + 1)
        ids = np.array(self._future[len(tokens) : len(tokens) + count], np.int32)
        wrong = self._rng.random(len(ids)) >= self._right / 10
        return np.where(wrong, (ids + 1) % self._size, ids)


class Always(Pace):
    """Drafts as much as it may, however long that takes."""

    def choose(self):
        return self.most


def tokens_of(runtime, prompt, count, drafter=None, seed=0, **options):
    """Prompt and completion, the stats and the cache."""
    program, cache = runtime._program, runtime._program.new_cache()
    history = History(np.array(prompt, np.int32), runtime.config.max_sequence_length)
    (rng,) = make_generators(seed, 1)
    source = program, cache, history, read_options(options), rng
    if drafter is None:
        list(itertools.islice(next_tokens(*source), count))
        return history.tokens.tolist(), None, cache
    speculation = Speculation(program, drafter)
    speculation.pace = Always(program.verify_lengths)
    list(itertools.islice(speculated_tokens(*source, speculation), count))
    return history.tokens.tolist(), speculation.stats, cache


def first_difference(ours, plain):
    pairs = enumerate(zip(ours, plain, strict=True))
    return next((place for place, (a, b) in pairs if a != b), None)


SCHEMES = {
    "float32": QuantConfig("float32"),
    "int8": QuantConfig("int8"),
    "int8 cache": QuantConfig("int8", kv_cache="int8"),
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_tokens_are_those_of_plain_decoding(exported, scheme):
    """Across the capacities 64, 128 and 150, greedy and drawn, for drafts of every kind."""
    _, small = exported("float32", num_layers=1, seed=4, max_sequence_length=150)
    _, runtime = exported(SCHEMES[scheme], max_sequence_length=150)
    rng = np.random.default_rng(0)
    whole = DraftStats()
    for round_ in range(10):
        prompt = rng.integers(0, 61, rng.integers(1, 70)).tolist()
        count = int(rng.integers(1, 150 - len(prompt)))
        options = {"seed": round_, **(SAMPLED if round_ % 2 else {})}
        plain, _, cache = tokens_of(runtime, prompt, count, **options)
        drafters = {
            "right": Foreseeing(plain, 10),
            "wrong": Foreseeing(plain, 0),
            "changing": Foreseeing(plain, 7, seed=round_),
            "lookup": PromptLookup(shortest=1),
            "model": DraftModel(small._program, least=0.0),
            "itself": DraftModel(runtime._program, least=0.0),
        }
        for name, drafter in drafters.items():
            ours, stats, own_cache = tokens_of(runtime, prompt, count, drafter, **options)
            if (place := first_difference(ours, plain)) is not None:  # rounding may decide a tie
                assert scheme != "float32", (name, place)
                logits = np.sort(runtime.logits(plain[:place])[-1])
                assert round_ % 2 or logits[-1] - logits[-2] < 0.05, (name, place)
                continue
            np.testing.assert_array_equal(own_cache.tokens[: own_cache.length], plain[:-1])
            assert own_cache.length == cache.length
            whole += stats
            if name == "right":
                assert stats.acceptance_rate == 1.0 or not stats.proposed
            if name == "wrong":
                assert stats.accepted == 0
                assert stats.tokens_per_call == 1.0
    assert whole.accepted > 500
    assert whole.proposed - whole.accepted > 500


def test_a_right_draft_takes_a_fifth_of_the_calls(exported):
    _, runtime = exported("float32", max_sequence_length=150)
    plain, _, _ = tokens_of(runtime, [1, 2, 3], 101)
    _, stats, _ = tokens_of(runtime, [1, 2, 3], 101, Foreseeing(plain, 10))
    assert (stats.proposed, stats.accepted, stats.calls, stats.tokens) == (80, 80, 20, 100)
    assert (stats.acceptance_rate, stats.tokens_per_call) == (1.0, 5.0)


def test_a_verify_is_as_many_decodes(exported):
    """At every length, up to the last token of the context, also where no signature is for it."""
    for options in ({}, {"verify_lengths": ()}, {"verify_lengths": [3, 7]}):
        _, runtime = exported("float32", max_sequence_length=140, **options)
        program, cache = runtime._program, runtime._program.new_cache()
        ids = np.random.default_rng(1).integers(0, 61, 140).astype(np.int32)
        whole = runtime.logits(ids)
        for start in (0, 1, 58, 61, 64, 120, 126, 128, 133, 135, 137, 139):
            for count in range(1, min(8, 141 - start)):
                cache.length = 0
                if start:
                    program.read(cache, ids[:start])
                logits = program.verify(cache, ids[start : start + count])
                np.testing.assert_allclose(logits, whole[start : start + count], atol=1e-4)
                assert cache.length == start + count


def test_a_stop_at_any_token_leaves_the_cache_of_plain_decoding(exported):
    _, runtime = exported("float32", max_sequence_length=140)
    prompt = np.random.default_rng(0).integers(0, 61, 55).tolist()
    plain, _, _ = tokens_of(runtime, prompt, 30)
    whole = runtime.logits(plain)
    for count in range(1, 30):
        _, _, cache = tokens_of(runtime, prompt, count, Foreseeing(plain, 8, seed=count))
        assert cache.length == 55 + count - 1
        for place in range(cache.length, cache.length + 2):  # and goes on from there
            logits = runtime._program.read(cache, np.array(plain[place : place + 1], np.int32))
            np.testing.assert_allclose(logits, whole[place], atol=1e-4)


# generate and stream


@pytest.fixture
def always(monkeypatch):
    """`generate` drafts at every token: otherwise the clock decides."""
    monkeypatch.setattr(Pace, "choose", Always.choose)


def test_stop_strings_and_limits_end_a_draft_where_they_end_plain_text(speaking, always):
    prompt = speaking.tokenizer.encode("import os").tolist()
    ids = speaking.generate(prompt)
    future = Foreseeing(ids, 10, 300)
    text = speaking.tokenizer.decode(ids[len(prompt) :])
    for stop in {text[at : at + 2] for at in range(1, len(text) - 2)}:
        if "\ufffd" in stop:
            continue
        plain = speaking.generate("import os", stop=stop)
        reason, length = speaking.finish_reason, speaking.length
        assert speaking.generate("import os", stop=stop, draft=future) == plain
        assert (speaking.finish_reason, speaking.length) == (reason, length) == ("stop", length)
        assert "".join(speaking.stream("import os", stop=stop, draft=future)) == plain[9:]
    for count in range(12):
        assert speaking.generate(prompt, count, draft=future) == ids[: len(prompt) + count]
        assert speaking.finish_reason == "length"
    assert speaking.generate(prompt, draft=future) == ids
    assert (speaking.finish_reason, len(ids)) == ("context", 32)
    assert speaking.draft_stats.acceptance_rate == 1.0
    assert speaking.generate(prompt, 3) == ids[: len(prompt) + 3]
    assert speaking.draft_stats is None


def test_the_end_of_text_token_ends_an_accepted_draft(speaking, always, monkeypatch):
    prompt = speaking.tokenizer.encode("import os").tolist()
    ids = speaking.generate(prompt, 12)
    for token in set(ids[len(prompt) :]):
        monkeypatch.setattr(speaking.tokenizer, "eot_id", token)  # any token may be the one
        plain = speaking.generate(prompt, 12)
        drafted = speaking.generate(prompt, 12, draft=Foreseeing(ids, 10, 300))
        assert drafted == plain
        assert (drafted[-1], speaking.finish_reason) == (token, "eot")
        assert speaking.length == len(plain) - 1


def test_a_window_slides_under_drafts(exported, always):
    _, runtime = exported("float32")
    options = {"overflow": "slide", "keep": 3}
    plain = runtime.generate([1, 2, 3], 120, **options)
    fresh = runtime.new_conversation()
    assert fresh.generate([1, 2, 3], 120, draft="lookup", **options) == plain
    assert fresh.draft_stats.accepted > 10


def test_the_clock_decides_about_time_alone(exported):
    """Adaptive drafting, over several calls of one conversation."""
    _, runtime = exported("float32", max_sequence_length=150)
    _, small = exported("int8", num_layers=1, max_sequence_length=100)
    plain, drafted = runtime.new_conversation(), runtime.new_conversation()
    rng = np.random.default_rng(0)
    for seed, draft in itertools.product(range(4), ("lookup", small, small.path)):
        prompt = rng.integers(0, 61, rng.integers(1, 60)).tolist()
        options = {"seed": seed, **(SAMPLED if seed % 2 else {})}
        expected = plain.generate(prompt, **options)
        assert drafted.generate(prompt, draft=draft, **options) == expected
        assert drafted.draft_stats.tokens == len(expected) - len(prompt) - 1
    first = drafted._speculation
    drafted.generate(prompt, 3, draft=small.path)
    assert drafted._speculation is first  # loaded once, and what was learned stays


def test_drawn_tokens_have_the_distribution_of_the_model(exported):
    """Chi-square over all pairs of tokens after a prompt, against the model's own probabilities."""
    _, runtime = exported("float32", vocab_size=6, max_sequence_length=16)
    prompt, draws = [1, 4], 4000

    def probabilities(ids):
        logits = runtime.logits(ids)[-1].astype(np.float64)
        return np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()

    first = probabilities(prompt)
    expected = draws * np.array(
        [[first[a] * p for p in probabilities([*prompt, a])] for a in range(6)]
    )
    program, cache = runtime._program, runtime._program.new_cache()
    likely = np.argmax(first)
    then = int(np.argmax(probabilities([*prompt, likely])))

    class Likeliest:
        def propose(self, tokens, count):
            return np.array([likely, then, 0, 0][:count], np.int32)

    speculation = Speculation(program, Likeliest())
    speculation.pace = Always(program.verify_lengths)
    counts = np.zeros((6, 6))
    history_ids = np.array(prompt, np.int32)
    chooser = read_options({"temperature": 1.0})
    for seed in range(draws):
        cache.length = 0
        program.read(cache, history_ids[:-1])  # so that the first token is drafted too
        history = History(history_ids, 16)
        rng = np.random.default_rng(seed)
        source = program, cache, history, chooser, rng, speculation
        a, b = itertools.islice(speculated_tokens(*source), 2)
        counts[a, b] += 1
    assert expected.min() > 5
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 66.6  # with 35 degrees of freedom 1 in 1,000 is beyond
    assert speculation.stats.accepted > 500
