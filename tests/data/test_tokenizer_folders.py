"""Tokenizers' folders of every kind: the ids are those of transformers, and what is saved is whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from tf_gptopt._tokenizer import Tokenizer, as_tokenizer, has_tokenizer

CORPUS = [
    "hello world, how are you user assistant",
    "the quick brown fox",
    "Ünïcode 你好 naïve",
] * 9
TEXTS = [
    "hello world",
    " hello  world, you",
    "The QUICK brown fox\n\n你好, naïve Ünïcode!",
    "<|user|>hello world<|bot|>hello",
    "x<|endoftext|>y [SEP] a</s>",
    "🙂\t  ",
]
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def write(folder: Path, **files: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def bpe_files(folder: Path, end: str = "<|endoftext|>") -> int:
    """vocab.json and merges.txt; returns the number of tokens."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=[end], show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    backend.model.save(str(folder))
    return backend.get_vocab_size()


def gpt2(folder: Path, **settings: Any) -> None:
    bpe_files(folder)
    write(folder, tokenizer_config={"tokenizer_class": "GPT2Tokenizer", **settings})


def gpt2_with_tokens(folder: Path) -> None:
    count = bpe_files(folder)
    write(
        folder,
        added_tokens={"<|user|>": count, "<|bot|>": count + 1},
        special_tokens_map={
            "bos_token": "<|endoftext|>",
            "eos_token": {"content": "<|bot|>", "lstrip": False, "rstrip": False},
            "unk_token": "<|endoftext|>",
            "additional_special_tokens": ["<|user|>"],
        },
        tokenizer_config={"tokenizer_class": "GPT2Tokenizer", "model_max_length": 1024},
    )


def gpt2_described(folder: Path) -> None:
    count = bpe_files(folder)
    described = {"lstrip": True, "rstrip": True, "single_word": False, "normalized": False}
    tokens = {
        str(count): {"content": "<|user|>", "special": True, **described},
        str(count + 1): {"content": "<|bot|>", "special": False, **described},
    }
    settings = {"tokenizer_class": "GPT2Tokenizer", "added_tokens_decoder": tokens}
    write(folder, tokenizer_config={**settings, "eos_token": "<|bot|>"})


def wordpiece(folder: Path, **settings: Any) -> None:
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=settings.get("do_lower_case", True))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=90, special_tokens=special, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    backend.model.save(str(folder))
    write(folder, tokenizer_config={"tokenizer_class": "BertTokenizer", **settings})


def llama(folder: Path) -> None:
    special = ["<unk>", "<s>", "</s>"]
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[*special, *(f"<0x{i:02X}>" for i in range(256))],
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS[:18], trainer)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    backend.post_processor = processors.TemplateProcessing(
        "<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    write(folder, tokenizer_config={**settings, "bos_token": "<s>"})
    backend.save(str(folder / "tokenizer.json"))


def unigram(folder: Path) -> None:
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=90, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    write(folder, tokenizer_config=settings)
    backend.save(str(folder / "tokenizer.json"))


KINDS: dict[str, Callable[[Path], None]] = {
    "vocab and merges": gpt2,
    "with a space before": lambda folder: gpt2(folder, add_prefix_space=True),
    "added tokens": gpt2_with_tokens,
    "described tokens": gpt2_described,
    "vocab.txt": wordpiece,
    "vocab.txt, cased": lambda folder: wordpiece(folder, do_lower_case=False),
    "Llama": llama,
    "Unigram": unigram,
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder, and what transformers makes of it."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("folder")
    KINDS[request.param](folder)
    assert has_tokenizer(folder)
    return folder, transformers.AutoTokenizer.from_pretrained(folder)


def same(ours: Tokenizer, theirs: Any) -> None:
    for text in TEXTS:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text).tolist() == ids, text
        if all(token.special for token in theirs.added_tokens_decoder.values()) or "<" not in text:
            # (of "additional" tokens, transformers 5 forgets that they are special)
            split = theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
            assert ours.encode(text, split_special_tokens=True).tolist() == split, text
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)
    assert (ours.vocab_size, ours.eot_token) == (len(theirs), theirs.eos_token)


def test_ids_are_those_of_transformers(kind: Any, tmp_path: Path) -> None:
    folder, theirs = kind
    ours = Tokenizer.load(folder)
    same(ours, theirs)
    same(as_tokenizer(theirs), theirs)  # handed over as it is
    text = "hello world"
    added = theirs.encode(text)
    assert ours.encode_prompt(text).tolist() == added[: len(ours.bos_ids) + len(ours.encode(text))]


def test_what_is_saved_is_read_alike(kind: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder, theirs = kind
    ours = Tokenizer.load(folder)
    ours.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert (again.fingerprint, again.eot_ids) == (ours.fingerprint, ours.eot_ids)
    same(again, theirs)
    same(again, AutoTokenizer.from_pretrained(tmp_path))
