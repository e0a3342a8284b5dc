"""Text as its tokens come: the same as all of it decoded at once, whatever the decoder looks at."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models
from tokenizers import Tokenizer as Backend

from tf_gptopt._tokenizer import Tokenizer
from tf_gptopt.models.text_stream import TextStream, open_stream, text_after

BYTES = [f"<0x{byte:02X}>" for byte in (0xE4, 0xBD, 0xA0, 0xC3, 0xA9, 0xFF, 0x0A, 0x41, 0xF0, 0x9F)]
SPACED = ["▁", "▁▁", "▁a", "b", "▁b", "é", "你", "a▁", "</s>", ".", "▁.", "e\u0301"]
WORDS = [
    "a",
    "##b",
    "##é",
    "你",
    ".",
    ",",
    "n't",
    "##.",
    "do",
    "b</w>",
    "é</w>",
    "[UNK]",
    "'s",
    "|",
]
RAW = ["a", "Ġ", "Ġb", "Ã", "©", "Ã©", "ä½", "ł", "ä", "½", "ÿ", "ðŁ", "ĺ", "Ģ", "aðŁ", "ĺĢb"]

replace = decoders.Replace("▁", " ")
LLAMA = [replace, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
KINDS: dict[str, tuple[Any, list[str]]] = {
    "none": (None, WORDS),
    "byte-level": (decoders.ByteLevel(), [*RAW, "<|endoftext|>", "\ufffd"]),
    "Llama": (decoders.Sequence(LLAMA), SPACED + BYTES),
    "Gemma": (decoders.Sequence(LLAMA[:3]), SPACED + BYTES),
    "bytes alone": (decoders.ByteFallback(), SPACED + BYTES),
    "Metaspace": (decoders.Metaspace(), SPACED),
    "Metaspace, never": (decoders.Metaspace(prepend_scheme="never"), SPACED),
    "bytes, Metaspace": (
        decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
        SPACED + BYTES,
    ),
    "WordPiece": (decoders.WordPiece(), WORDS),
    "WordPiece, raw": (decoders.WordPiece(cleanup=False), WORDS),
    "BPE": (decoders.BPEDecoder(), WORDS),
    "CTC": (decoders.CTC(pad_token="a", word_delimiter_token="|"), WORDS),
    "Metaspace, CTC": (
        decoders.Sequence([decoders.Metaspace(), decoders.CTC(pad_token="b")]),
        SPACED,
    ),
    "wide strips": (
        decoders.Sequence([replace, decoders.Fuse(), decoders.Strip(" ", 3, 0)]),
        SPACED,
    ),
    "strips a token": (decoders.Sequence([replace, decoders.Strip(" ", 1, 0)]), SPACED),
    "regex in a token": (
        decoders.Sequence([decoders.Replace(Regex("[ab]|▁b"), "X"), decoders.Fuse()]),
        SPACED,
    ),
    "regex in the text": (
        decoders.Sequence([decoders.Fuse(), decoders.Replace(Regex("ab|b$"), "X")]),
        SPACED,
    ),
    "byte-level, replaced": (
        decoders.Sequence([decoders.ByteLevel(), decoders.Replace("\ufffd", "")]),
        RAW,
    ),
    "replaced bytes": (
        decoders.Sequence([decoders.Replace("▁", "<0x41>"), decoders.ByteFallback()]),
        SPACED + BYTES,
    ),
    "BPE, WordPiece": (
        decoders.Sequence([decoders.BPEDecoder(), decoders.WordPiece()]),
        [*WORDS, " .", "x .</w>"],
    ),
}


def make(kind: str) -> Tokenizer:
    decoder, tokens = KINDS[kind]
    backend = Backend(models.WordLevel({token: i for i, token in enumerate(tokens)}, "[UNK]"))
    if decoder is not None:
        backend.decoder = decoder
    return Tokenizer(backend.to_str(), "</s>")


TOKENIZERS = {kind: make(kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_pieces_join_to_the_decoded_text(kind: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=14))
    stream = open_stream(tokenizer)
    pieces = [stream.push(token) for token in ids]
    assert "".join([*pieces, stream.finish()]) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_it_goes_on_after_a_prompt(kind: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[kind]
    some = st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=8)
    before, new = data.draw(some), data.draw(some)
    text, whole = tokenizer.decode(before), tokenizer.decode(before + new)
    if whole.startswith(text):  # else the new tokens change what the prompt said
        assert text + text_after(tokenizer, before, new) == whole


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_stop_string_ends_it_where_the_text_first_has_it(kind: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=10))
    stop = data.draw(st.text(alphabet="ab .é你\n", min_size=1, max_size=2))
    stream, text = open_stream(tokenizer, stop), ""
    for count, token in enumerate(ids, 1):
        text += stream.push(token)
        so_far = tokenizer.decode(ids[:count])
        assert stream.stopped == (stop in so_far)  # at once, not a token late
        if stream.stopped:
            assert text == so_far[: so_far.find(stop)]
            return
    assert text + stream.finish() == tokenizer.decode(ids).partition(stop)[0]


def test_spaces_and_characters_come_as_soon_as_they_are_certain() -> None:
    tokenizer = TOKENIZERS["Llama"]
    names = [*SPACED, *BYTES]
    tokens = ["▁a", "▁b", "<0xE4>", "<0xBD>", "<0xA0>", "<0x0A>", "b", "▁▁", "b"]
    stream = open_stream(tokenizer)
    pieces = [stream.push(names.index(token)) for token in tokens]
    # bytes go out when their row is over: another byte could still make it no UTF-8
    assert [*pieces, stream.finish()] == ["a", " b", "", "", "", "", "你\nb", "  ", "b", ""]


def test_a_new_line_of_bytes_stops_at_once() -> None:
    tokenizer = TOKENIZERS["Llama"]
    names = [*SPACED, *BYTES]
    stream = open_stream(tokenizer, "\n")
    assert stream.push(names.index("b")) == "b"
    assert (stream.push(names.index("<0x0A>")), stream.stopped) == ("", True)


def test_the_end_of_a_long_text_costs_what_its_beginning_does() -> None:
    for kind in ("byte-level", "Llama", "Metaspace", "WordPiece"):
        tokenizer = TOKENIZERS[kind]
        seen = []

        def decode(ids: list[int], tokenizer: Any = tokenizer, seen: Any = seen) -> str:
            seen.append(len(ids))
            return tokenizer.decode(ids)

        stream = TextStream(decode, changes=tokenizer.may_change)
        for token in (0, 1) * 200:
            stream.push(token)
        assert max(seen) <= 4


def test_a_decoder_of_a_kind_that_is_not_known_holds_everything_back() -> None:
    from tf_gptopt._decoders import Changes, changes_of

    assert changes_of({"type": "Rot13"}) is Changes.ALWAYS
    assert changes_of(json.loads(TOKENIZERS["Llama"]._json)["decoder"]) is Changes.BYTES
