"""Tokenizers' folders of every kind: the ids of transformers, and nothing lost when saved again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from tf_gptopt._errors import UserError
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
    "Llama": lambda folder: None,  # a fixture's
    "Unigram": unigram,
}


@pytest.fixture(scope="module", params=KINDS)
def kind(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, llama_folder: Path
) -> Any:
    """A folder, and what transformers makes of it."""
    transformers = pytest.importorskip("transformers")
    folder = llama_folder if request.param == "Llama" else tmp_path_factory.mktemp("folder")
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


def test_settings_and_chat_templates_are_kept(tmp_path: Path) -> None:
    settings = {"model_max_length": 77, "padding_side": "left", "eos_token": "<|endoftext|>"}
    gpt2(tmp_path / "in", chat_template=TEMPLATE, clean_up_tokenization_spaces=True, **settings)
    gpt2(tmp_path / "file", **settings)
    (tmp_path / "file" / "chat_template.jinja").write_text(TEMPLATE)
    for name in ("in", "file"):
        loaded = Tokenizer.load(tmp_path / name)
        assert loaded.chat_template == TEMPLATE
        loaded.save(tmp_path / "out" / name)
        written = json.loads((tmp_path / "out" / name / "tokenizer_config.json").read_text())
        assert written.items() >= settings.items()
        assert written["clean_up_tokenization_spaces"] is False
        assert Tokenizer.load(tmp_path / "out" / name).chat_template == TEMPLATE
    assert written.get("chat_template") is None
    assert (tmp_path / "out" / "file" / "chat_template.jinja").read_text() == TEMPLATE
    assert Tokenizer.load(tmp_path / "out" / "file").settings["tokenizer_class"] == "GPT2Tokenizer"


def test_several_ids_end_a_text(tmp_path: Path) -> None:
    gpt2_with_tokens(tmp_path)
    write(tmp_path, config={"eos_token_id": [5, 6, 10**6, True]})
    assert Tokenizer.load(tmp_path).eot_ids == (301, 5, 6)
    write(tmp_path, generation_config={"eos_token_id": [300, 301, None]})
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.eot_id, loaded.eot_ids) == (301, (301, 300))  # the settings' first
    loaded.save(tmp_path / "again")
    assert Tokenizer.load(tmp_path / "again").eot_ids == (301, 300)
    write(tmp_path, generation_config={"eos_token_id": 7})
    assert Tokenizer.load(tmp_path).eot_ids == (301, 7)
    (tmp_path / "special_tokens_map.json").unlink()
    assert Tokenizer.load(tmp_path).eot_ids == (0, 7)  # <|endoftext|>


def test_what_begins_a_text(llama_folder: Path, tmp_path: Path) -> None:
    loaded = Tokenizer.load(llama_folder)
    assert loaded.bos_ids == (1,)
    plain = loaded.encode("hello").tolist()
    assert loaded.encode_prompt("hello").tolist() == [1, *plain]
    assert loaded.encode_prompt("<s>hello").tolist() == loaded.encode("<s>hello").tolist()
    wordpiece(tmp_path / "bert")
    assert Tokenizer.load(tmp_path / "bert").bos_ids == (2,)  # [CLS], and no [SEP] behind
    gpt2(tmp_path / "gpt2")
    assert Tokenizer.load(tmp_path / "gpt2").bos_ids == ()
    gpt2(tmp_path / "bos", add_bos_token=True)
    assert Tokenizer.load(tmp_path / "bos").bos_ids == (0,)


def test_tokens_that_the_tokenizer_json_lacks_are_added(tmp_path: Path) -> None:
    gpt2(tmp_path)
    Tokenizer.load(tmp_path).save(tmp_path)
    write(tmp_path, added_tokens={"<|user|>": 300, "<|endoftext|>": 0})
    assert Tokenizer.load(tmp_path).encode("<|user|>").tolist() == [300]
    write(tmp_path, added_tokens={"<|user|>": 309})
    with pytest.raises(UserError, match=r"lacks the token '<|user|>', which should have id 309"):
        Tokenizer.load(tmp_path)


def test_text_can_be_nothing_but_text(tmp_path: Path) -> None:
    gpt2(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    text = "what a stranger wrote: <|endoftext|>, and more"
    assert loaded.eot_id in loaded.encode(text)
    split = loaded.encode(text, split_special_tokens=True)
    assert loaded.eot_id not in split
    assert loaded.decode(split) == text
    assert loaded.eot_id in loaded.encode(text)  # as before
    batch = loaded.encode_batch([text, "a"], split_special_tokens=True)
    assert [ids.tolist() for ids in batch] == [split.tolist(), loaded.encode("a").tolist()]


def test_ids_without_a_token_are_no_text(tmp_path: Path) -> None:
    gpt2(tmp_path)
    write(tmp_path, added_tokens={"<|user|>": 303})
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.vocab_size, loaded.ids_without_token) == (304, (300, 301, 302))
    ids = loaded.encode("hello").tolist()
    assert loaded.decode([300, *ids, 303, 304, 50303]) == "hello<|user|>"


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"tokenizer.model": "x"}, "SentencePiece model, and a tokenizer.json is needed"),
        (
            {
                "vocab.txt": "[UNK]\na",
                "tokenizer_config.json": '{"tokenizer_class": "BertJapanese"}',
            },
            "",
        ),
        ({"vocab.txt": "a\nb"}, r"no token '\[UNK\]'"),
        ({"vocab.txt": "[UNK]\n[CLS]", "added_tokens.json": '{"x": 1}'}, "gives to '\\[CLS\\]'"),
        ({"vocab.txt": "[UNK]", "added_tokens.json": '{"x": "y"}'}, "must be tokens and ids"),
        ({"vocab.txt": "[UNK]", "tokenizer_config.json": "[]"}, "must hold a JSON object"),
        (
            {"vocab.txt": "[UNK]", "config.json": '{"tokenizer_sha256": "0"}'},
            "is not there. Restore",
        ),
    ],
)
def test_what_cannot_be_read_says_why(tmp_path: Path, files: dict[str, str], says: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=says or "how that cuts text is not in vocab.txt"):
        Tokenizer.load(tmp_path)


def test_other_tokenizers_are_taken_as_they_are() -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "<|endoftext|>": 1}, "a"))
    assert as_tokenizer(backend).eot_id == 1
    something = object()
    assert as_tokenizer(something) is something
    assert as_tokenizer(None) is None
