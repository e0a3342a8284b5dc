"""Samplers choose what their names say, and text streams lose and invent no character."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tf_gptopt._errors import UserError
from tf_gptopt.models.sampling import (
    GreedySampler,
    RandomSampler,
    TextStream,
    TopKSampler,
    TopPSampler,
    get_sampler,
    make_sampler,
)

LOGITS = np.log(np.array([[0.05, 0.5, 0.15, 0.3], [0.4, 0.1, 0.2, 0.3]], np.float32))


def shares(sampler, logits=LOGITS, draws=4000):
    """How often each token of the first row is drawn."""
    rng = np.random.default_rng(0)
    many = np.repeat(logits[:1], draws, axis=0)
    return np.bincount(sampler(many, rng), minlength=logits.shape[-1]) / draws


def test_greedy_takes_the_largest_of_each_row():
    assert GreedySampler()(LOGITS, None).tolist() == [1, 0]


def test_random_draws_in_proportion():
    np.testing.assert_allclose(shares(RandomSampler()), [0.05, 0.5, 0.15, 0.3], atol=0.03)


def test_temperature_sharpens_and_flattens():
    squared = np.array([0.05, 0.5, 0.15, 0.3]) ** 2
    np.testing.assert_allclose(
        shares(RandomSampler(temperature=0.5)), squared / squared.sum(), atol=0.03
    )
    assert shares(RandomSampler(temperature=100.0)).min() > 0.2


def test_top_k_draws_from_the_k_largest():
    np.testing.assert_allclose(shares(TopKSampler(k=2)), [0, 0.625, 0, 0.375], atol=0.03)
    np.testing.assert_allclose(shares(TopKSampler(k=99)), shares(RandomSampler()), atol=0.03)


def test_top_p_draws_from_the_fewest_that_reach_p():
    np.testing.assert_allclose(shares(TopPSampler(p=0.8)), [0, 0.625, 0, 0.375], atol=0.03)
    np.testing.assert_allclose(shares(TopPSampler(p=0.5)), [0, 1, 0, 0], atol=0)
    np.testing.assert_allclose(shares(TopPSampler(p=0.51)), [0, 0.625, 0, 0.375], atol=0.03)
    np.testing.assert_allclose(shares(TopPSampler(p=1.0)), shares(RandomSampler()), atol=0.03)
    np.testing.assert_allclose(shares(TopPSampler(p=0.9, k=1)), [0, 1, 0, 0], atol=0)


@given(st.floats(0.01, 1.0), st.integers(0, 99))
def test_top_p_agrees_with_its_definition_in_large_vocabularies(p, seed):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, rng.choice([0.1, 1.0, 5.0]), (1, 2000)).astype(np.float32)
    drawn = set(TopPSampler(p=p)(np.repeat(logits, 200, 0), rng).tolist())
    order = np.argsort(-logits[0], kind="stable")
    chances = np.exp(logits[0, order].astype(np.float64))
    chances /= chances.sum()
    nucleus = int((np.cumsum(chances) - chances < p - 1e-9).sum())
    assert drawn <= set(order[: nucleus + 1].tolist())


def test_a_seed_repeats_the_draws():
    def draw(seed):
        return tuple(RandomSampler()(np.repeat(LOGITS, 20, 0), np.random.default_rng(seed)))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_make_sampler_reads_the_numbers():
    assert make_sampler() == GreedySampler()
    assert make_sampler(temperature=0) == GreedySampler()
    assert make_sampler(temperature=0.7) == RandomSampler(0.7)
    assert make_sampler(top_k=3) == TopKSampler(3, 1.0)
    assert make_sampler(0.5, 3, 0.8) == TopPSampler(0.8, 3, 0.5)


def test_get_sampler_takes_names_dictionaries_and_objects():
    assert get_sampler("greedy") == GreedySampler()
    assert get_sampler({"name": "top_k", "k": 7}) == TopKSampler(7)
    sampler = TopPSampler(0.3)
    assert get_sampler(sampler) is sampler


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: get_sampler("gredy"), "Did you mean 'greedy'"),
        (lambda: get_sampler({"name": "top_k", "kk": 3}), "Did you mean 'k'"),
        (lambda: get_sampler({"name": "greedy", "k": 3}), "It takes none"),
        (lambda: get_sampler(3), "A sampler is a name"),
        (lambda: TopKSampler(k=0), "positive integer"),
        (lambda: TopPSampler(p=0.0), r"in \(0, 1\]"),
        (lambda: TopPSampler(p=1.5), r"in \(0, 1\]"),
        (lambda: RandomSampler(temperature=-1.0), "above 0"),
        (lambda: RandomSampler(temperature=float("nan")), "above 0"),
        (lambda: make_sampler(temperature=0, top_k=3), "have no effect"),
        (lambda: TextStream(str, stop=""), "non-empty strings"),
    ],
)
def test_impossible_choices_say_what_would_do(make, says):
    with pytest.raises(UserError, match=says):
        make()


@pytest.mark.parametrize("sampler", [GreedySampler(), TopKSampler(2), TopPSampler(0.5)])
def test_logits_that_are_no_numbers_are_an_error(sampler):
    broken = LOGITS.copy()
    broken[1, 2] = np.nan
    with pytest.raises(UserError, match="NaN"):
        sampler(broken, np.random.default_rng(0))


# Text


def from_bytes(tokens):
    """A decoder whose tokens are bytes: every character of several bytes spans tokens."""
    return bytes(tokens).decode("utf-8", "replace")


@given(st.text())
def test_pieces_join_to_the_text(text):
    stream = TextStream(from_bytes)
    pieces = [stream.push(byte) for byte in text.encode()]
    assert "".join(pieces) + stream.finish() == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@given(st.binary(max_size=30))
def test_pieces_join_to_what_decoding_all_bytes_gives(data):
    stream = TextStream(from_bytes)
    assert "".join(map(stream.push, data)) + stream.finish() == from_bytes(data)


def test_a_piece_never_holds_half_a_character():
    stream = TextStream(from_bytes)
    assert [stream.push(byte) for byte in "é😀a".encode()] == ["", "é", "", "", "", "😀", "a"]


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_stop_strings_end_the_text_at_the_first_of_them(text, stop):
    stream, out = TextStream(from_bytes, stop), ""
    for byte in text.encode():
        out += stream.push(byte)
        if stream.stopped:
            break
    out += stream.finish()
    # the first to be complete stops the text: the one that ends earliest
    ends = [text.index(s) + len(s) for s in stop if s in text]
    if ends:
        seen = text[: min(ends)]
        expected = seen[: min(seen.index(s) for s in stop if s in seen)]
    else:
        expected = text
    assert out == expected
    assert stream.stopped == bool(ends)


def test_text_that_might_become_a_stop_string_is_held_back():
    stream = TextStream(from_bytes, stop="END")
    assert [stream.push(byte) for byte in b"aENxEN"] == ["a", "", "", "ENx", "", ""]
    assert stream.finish() == "EN"


def test_streaming_a_real_tokenizer_gives_its_text(tiny_tokenizer):
    text = "def naïve(x):\n    return '日本語 😀'\n"
    stream = TextStream(tiny_tokenizer.decode)
    out = "".join(stream.push(token) for token in tiny_tokenizer.encode(text))
    assert out + stream.finish() == text


def test_sampling_needs_no_tensorflow(run_child):
    code = "import sys, tf_gptopt.models.sampling; print('tensorflow' in sys.modules)"
    assert run_child(code, devices=0).split() == ["False"]
