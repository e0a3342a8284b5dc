"""Samplers choose what their names say, and text streams lose and invent no character."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tf_gptopt._errors import UserError
from tf_gptopt.models.choosing import make_generators, read_options
from tf_gptopt.models.penalties import Penalties
from tf_gptopt.models.sampling import (
    BeamSampler,
    GreedySampler,
    MinPSampler,
    RandomSampler,
    TopKSampler,
    TopPSampler,
    get_sampler,
    log_softmax,
    make_sampler,
)
from tf_gptopt.models.text_stream import TextStream

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


def test_min_p_draws_from_those_near_the_likeliest():
    np.testing.assert_allclose(shares(MinPSampler(p=0.5)), [0, 0.625, 0, 0.375], atol=0.03)
    np.testing.assert_allclose(shares(MinPSampler(p=0.65)), [0, 1, 0, 0], atol=0)
    np.testing.assert_allclose(shares(MinPSampler(p=0.05)), shares(RandomSampler()), atol=0.03)
    # (0.3 / 0.5) ** 2 = 0.36: a temperature below 1 comes first and lets fewer through
    np.testing.assert_allclose(shares(MinPSampler(p=0.5, temperature=0.5)), [0, 1, 0, 0], atol=0)
    np.testing.assert_allclose(shares(TopPSampler(p=1.0, min_p=0.65)), [0, 1, 0, 0], atol=0)
    np.testing.assert_allclose(
        shares(TopPSampler(p=1.0, k=3, min_p=0.2)), [0, 10 / 19, 3 / 19, 6 / 19], atol=0.03
    )


@settings(deadline=None, max_examples=30)
@given(st.floats(0.01, 1.0), st.floats(0.3, 3.0), st.integers(0, 99))
def test_min_p_keeps_what_transformers_keeps(p, temperature, seed):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1.0, (3, 50)).astype(np.float32)
    scores = torch.tensor(logits) / temperature
    theirs = transformers.MinPLogitsWarper(min_p=p)(None, scores).isfinite().numpy()
    for row, allowed in zip(logits, theirs, strict=True):
        drawn = set(MinPSampler(p, temperature)(np.repeat(row[None], 400, 0), rng).tolist())
        ties = np.isclose(row, row.max() + temperature * np.log(p), atol=1e-4)
        assert drawn <= set(np.flatnonzero(allowed | ties))
        likely = np.exp(row / temperature) / np.exp(row[allowed] / temperature).sum() > 0.05
        assert set(np.flatnonzero(allowed & likely & ~ties)) <= drawn


@settings(deadline=None, max_examples=30)
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
    assert make_sampler(min_p=0.1) == MinPSampler(0.1, 1.0)
    assert make_sampler(0.5, 3, 0.8, 0.1) == TopPSampler(0.8, 3, 0.5, 0.1)
    assert make_sampler(top_k=3, min_p=0.1) == TopPSampler(1.0, 3, 1.0, 0.1)


def test_options_become_penalties_and_a_sampler():
    chooser = read_options({"top_k": 3, "logit_bias": {1: 2.0}, "presence_penalty": None})
    assert chooser.sampler == TopKSampler(3)
    assert chooser.penalties == Penalties(logit_bias={1: 2.0})
    assert read_options({}, "random").sampler == RandomSampler()
    assert read_options({"sampler": "min_p"}, "random").sampler == MinPSampler()
    assert read_options({"sampler": "beam"}, beams=True).sampler == BeamSampler()
    biased = read_options({"logit_bias": {2: 9.0}})
    assert biased(LOGITS[0].copy(), np.array([], np.int32), None) == 2


def test_a_place_has_the_same_numbers_in_any_batch():
    def draws(count):
        return [rng.random() for rng in make_generators(7, count)]

    assert draws(1) == draws(3)[:1]
    assert draws(3)[:2] == draws(2)
    assert len({*draws(3)}) == 3
    assert make_generators(None, 1)[0].random() != make_generators(None, 1)[0].random()


def test_log_softmax_is_that_of_torch():
    torch = pytest.importorskip("torch")
    logits = np.random.default_rng(0).normal(0, 9, (3, 50)).astype(np.float32)
    logits[1] += 1e4
    logits[2, :3] = -np.inf
    expected = torch.log_softmax(torch.tensor(logits, dtype=torch.float64), -1).numpy()
    np.testing.assert_allclose(log_softmax(logits), expected, atol=1e-12)


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
        (lambda: MinPSampler(p=0.0), r"min_p must be in \(0, 1\]"),
        (lambda: make_sampler(top_p=0.5, min_p=0), r"min_p must be in \(0, 1\]"),
        (lambda: make_sampler(temperature=0, min_p=0.1), "have no effect"),
        (lambda: BeamSampler(num_beams=1.5), "num_beams must be a positive integer"),
        (lambda: BeamSampler(length_penalty=float("nan")), "length_penalty must be a finite"),
        (lambda: read_options({"min_q": 0.5}), "'min_q'. Did you mean 'min_p'"),
        (lambda: read_options({"sampler": "greedy", "min_p": 0.5}), "not both"),
        (lambda: read_options({"sampler": "beam"}), "Beam search"),
        (lambda: make_generators(-1, 1), "seed must be an integer"),
        (lambda: make_generators("1", 1), "seed must be an integer"),
        (lambda: TextStream(str, stop=""), "non-empty strings"),
        (lambda: TextStream(str, stop=np.array(3)), "non-empty strings"),
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
    code = "import sys, tf_gptopt.models.choosing; print('tensorflow' in sys.modules)"
    assert run_child(code, devices=0).split() == ["False"]
