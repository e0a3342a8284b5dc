"""Drafters propose what is likely to follow, cheaply, and refuse what cannot be a draft."""

from __future__ import annotations

import time

import numpy as np
import pytest

from tf_gptopt._errors import UserError
from tf_gptopt.tflite.drafting import DraftModel, PromptLookup
from tf_gptopt.tflite.pacing import Pace


def lookup_slowly(tokens, count, shortest, longest):
    """Prompt lookup as its definition says it, one position after the other."""
    best, size = None, shortest - 1
    for end in range(len(tokens) - 1):
        match = 0
        while match < min(longest, end + 1) and tokens[end - match] == tokens[-1 - match]:
            match += 1
        if match >= size and match >= shortest:
            best, size = end, match
    if best is None:
        return []
    extended = list(tokens)
    for _ in range(count):
        extended.append(extended[best + 1 + len(extended) - len(tokens)])
    return extended[len(tokens) :]


def test_lookup_proposes_what_followed_the_longest_and_latest_match():
    rng = np.random.default_rng(0)
    proposals = 0
    for _ in range(400):
        tokens = rng.integers(0, 3, rng.integers(1, 30)).astype(np.int32)
        shortest, longest = rng.integers(1, 4), rng.integers(4, 6)
        found = PromptLookup(shortest, longest).propose(tokens, 4).tolist()
        assert found == lookup_slowly(tokens.tolist(), 4, shortest, longest)
        proposals += bool(found)
    assert 100 < proposals < 400


def test_lookup_goes_on_in_circles():
    tokens = np.array([9, 1, 2, 3, 1, 2, 3, 1, 2], np.int32)
    assert PromptLookup().propose(tokens, 7).tolist() == [3, 1, 2, 3, 1, 2, 3]


def test_lookup_takes_microseconds():
    tokens = np.random.default_rng(0).integers(0, 50, 1024).astype(np.int32)
    lookup, seconds = PromptLookup(), []
    for end in range(900, 1024):
        start = time.perf_counter()
        lookup.propose(tokens[:end], 4)
        seconds.append(time.perf_counter() - start)
    assert np.median(seconds) < 2e-4


def test_a_draft_model_proposes_its_own_greedy_continuation(exported):
    """Whatever was proposed before, and up to the end of its own context."""
    _, small = exported("float32", max_sequence_length=40)
    drafter = DraftModel(small._program, least=0.0)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 61, 12).astype(np.int32)
    for count in (4, 1, 3, 5, 2):
        expected = small.generate(tokens.tolist(), count)[len(tokens) :]
        assert drafter.propose(tokens, count).tolist() == expected
        tokens = np.append(tokens, rng.integers(0, 61, 3)).astype(np.int32)  # they were wrong
    tokens = rng.integers(0, 61, 38).astype(np.int32)
    whole = small.generate(tokens.tolist(), 9)  # ends at 40; one more is known then
    last = int(small.logits(whole)[-1].argmax())
    assert drafter.propose(tokens, 5).tolist() == [*whole[38:], last]
    assert not drafter.propose(np.append(tokens, tokens).astype(np.int32), 5).size


def test_a_draft_model_learns_how_often_it_is_right(exported):
    """It proposes more while it is right, nothing after it was wrong long enough, and tries again
    in the end."""
    _, small = exported("float32", max_sequence_length=400)
    start = np.arange(9, dtype=np.int32)
    right, tokens, sizes = DraftModel(small._program), start, []
    for _ in range(30):
        draft = right.propose(tokens, 4)
        sizes.append(len(draft))
        tokens = np.concatenate([tokens, draft])
    assert sizes[0] == 3  # an eighth is above a tenth
    assert set(sizes[5:]) == {4}
    wrong, tokens, sizes = DraftModel(small._program), start, []
    for _ in range(300):
        draft = wrong.propose(tokens, 4)
        sizes.append(len(draft))
        said = (draft[0] + 1) % 61 if len(draft) else 7
        tokens = np.append(tokens, said).astype(np.int32)
    assert sizes[0] == 3
    assert sizes.count(0) > 200
    assert any(sizes[100:])  # not for ever


def test_what_cannot_be_a_draft_is_refused(speaking, exported, tmp_path):
    _, other = exported("int8")
    for draft, says in [
        (other, "has 61 tokens and"),
        (tmp_path / "none.tflite", "there is no file"),
        ("lokup", "A draft is 'lookup' or a .tflite file"),
        (3, "draft must be 'lookup', a TFLiteGPT or the path"),
        ([1], "draft must be 'lookup', a TFLiteGPT or the path"),
    ]:
        with pytest.raises(UserError, match=says):
            speaking.generate([1, 2], 3, draft=draft)
    (tmp_path / "broken.tflite").write_bytes(b"no model")
    with pytest.raises(UserError, match="is not a"):
        list(speaking.stream([1, 2], 3, draft=tmp_path / "broken.tflite"))


def test_a_draft_of_another_tokenizer_is_refused(speaking, exported, tiny_tokenizer, tmp_path):
    from tokenizers import ByteLevelBPETokenizer

    from tf_gptopt._tokenizer import Tokenizer

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(["another text, other tokens " * 99], 300, show_progress=False)
    (tmp_path / "other").mkdir()
    trained.save(str(tmp_path / "other" / "tokenizer.json"))
    _, other = exported("int8", vocab_size=300, tokenizer=Tokenizer.load(tmp_path / "other"))
    with pytest.raises(UserError, match="exported with another tokenizer than"):
        speaking.generate([1, 2], 3, draft=other)


# How many tokens are drafted


def simulate(tokens, accepts, decode=1.0, verify=1.4, draft=0.2, seed=0):
    """What generating so many tokens takes, in decodes, where a guess is right this often."""
    pace, rng = Pace([5]), np.random.default_rng(seed)
    seconds, made = 0.0, 0
    while made < tokens:
        count = pace.choose()
        rate = accepts(made) if callable(accepts) else accepts
        accepted = int(np.argmin([*(rng.random(count) < rate), False]))
        if count:
            pace.saw_draft(count, count * draft)
            pace.saw_verify(count, accepted, verify)
        else:
            pace.saw_decode(decode)
        seconds += count * draft + (verify if count else decode)
        made += accepted + 1
    return seconds / made


def test_the_pace_is_fast_where_guesses_are_right_and_costs_little_where_not():
    assert simulate(1000, 0.0) < 1.03
    assert simulate(1000, 0.2) < 1.05
    best = (1.4 + 4 * 0.2) / sum(0.9**i for i in range(5))
    assert simulate(1000, 0.9) < 1.06 * best
    assert simulate(1000, 1.0, draft=0.0) < 1.4 / 5 * 1.1
    changing = simulate(2000, lambda made: 0.95 if 700 < made < 1700 else 0.0)
    assert changing < 0.82
    assert simulate(1000, 1.0, verify=9.0) < 1.06  # a verify that never pays


def test_the_pace_drafts_fewer_tokens_where_few_are_accepted():
    def usual(accepts, draft):
        pace = Pace([5])
        for _ in range(3):
            pace.saw_decode(1.0)
            pace.saw_draft(4, 4 * draft)
            pace.saw_verify(4, 4, 1.2)
        rng = np.random.default_rng(0)
        for _ in range(60):
            accepted = int(np.argmin([*(rng.random(4) < accepts), False]))
            pace.saw_verify(4, accepted, 1.2)
        return max(range(5), key=pace.rate)

    assert usual(0.95, 0.1) == 4
    assert 1 <= usual(0.6, 0.2) <= 2
    assert usual(0.6, 0.0) == 4
    assert usual(0.1, 0.2) == 0
