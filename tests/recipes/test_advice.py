"""Advice where text, vocabulary and length of a training do not go together, and none elsewhere."""

from __future__ import annotations

import random

import pytest

from tf_gptopt.cli import main
from tf_gptopt.data.corpus import Document
from tf_gptopt.data.packing import DatasetInfo, SplitInfo
from tf_gptopt.data.tokenizer import train_tokenizer
from tf_gptopt.recipes.advice import fragment_share, on_held_out, on_length, on_vocabulary
from tf_gptopt.training.config import TrainConfig


@pytest.fixture(scope="module")
def chinese():
    """2,000 characters in use, some far more often than others, as in any such text."""
    draw = random.Random(0)
    ranks = [1 / (i + 1) for i in range(2000)]
    return [
        Document(f"{i}", "".join(chr(0x4E00 + c) for c in draw.choices(range(2000), ranks, k=900)))
        for i in range(60)
    ]


def test_a_vocabulary_too_small_for_its_characters(chinese):
    texts = [document.text for document in chinese]
    for size, expected in ((600, True), (4096, False)):
        encoder = train_tokenizer(texts, size)
        tokens = encoder.encode("".join(texts))
        whole = sum(len(encoder.decode([int(i)]).strip("\ufffd")) > 0 for i in tokens)
        share = fragment_share(tokens, encoder)
        assert share == pytest.approx(1 - whole / len(tokens))
        said = on_vocabulary(chinese, share, encoder.vocab_size)
        assert bool(said) == expected, (size, share)
    share = fragment_share(
        train_tokenizer(texts, 600).encode(texts[0]), train_tokenizer(texts, 600)
    )
    (said,) = on_vocabulary(chinese, share, 600)
    assert said.startswith(f"{share:.0%} of the tokens are fragments of characters")
    advised = int(said.partition("vocab_size=")[2].rstrip("."))
    better = train_tokenizer(texts, advised)
    assert not on_vocabulary(chinese, fragment_share(better.encode(texts[0]), better), advised)


def test_no_fragments_in_plain_ascii():
    texts = ["def main(self): return 1\n" * 50]
    encoder = train_tokenizer(texts, 300)
    assert fragment_share(encoder.encode(texts[0]), encoder) == 0.0


def info(valid: int) -> DatasetInfo:
    split = SplitInfo(valid, 1, valid * 4, "")
    return DatasetInfo(split, split, "uint16", 300, 0, 16, "", 0.05, 0)


def test_a_held_out_split_of_few_tokens():
    assert not on_held_out(info(20_000))
    (said,) = on_held_out(info(400))
    assert said.startswith("400 held-out tokens")
    assert "0.12" in said  # 2.5 nats / 20


@pytest.mark.parametrize(
    ("steps", "text", "parameters", "words"),
    [
        (100, 10_000, 5_000, "That is long"),  # 25 passes
        (100, 100_000, 10_000_000, "That is short"),  # a fortieth of a token a parameter
        (100, 100_000, 200_000, None),
        (100, 20_000, 10_000_000, None),  # more steps would only repeat the text
    ],
)
def test_the_length_of_a_training(steps, text, parameters, words):
    fit = TrainConfig(steps=steps, batch_size=8)
    passes, said = on_length(fit, 320, text, parameters)
    assert passes == pytest.approx(steps * 8 * 320 / text)
    assert said[0].startswith("256,000 tokens to train on")
    assert len(said) == (2 if words else 1)
    if words:
        assert said[1].startswith(words)


def test_the_stages_say_it(tmp_path, capsys, chinese):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for document in chinese:
        (corpus / f"{document.name}.txt").write_text(document.text)
    words = ["--data", str(corpus), "--out"]
    assert main(["tokenizer", *words, str(tmp_path / "bpe"), "--vocab-size", "600"]) == 0
    tokenizer = ["--tokenizer", str(tmp_path / "bpe"), "--sequence-length", "32"]
    assert main(["dataset", *words, str(tmp_path / "data"), *tokenizer]) == 0
    said = capsys.readouterr().out
    assert "fragments of characters" in said
    assert "held out (5." in said or "held out (4." in said
    assert "make a rough loss" in said
