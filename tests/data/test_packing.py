"""Documents become two streams of ids: all of them, once, and none in both."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import resource
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tf_gptopt._errors import UserError
from tf_gptopt.data.corpus import Document, load_corpus
from tf_gptopt.data.packing import DatasetInfo, write_dataset
from tf_gptopt.data.tokenizer import END_OF_TEXT, Tokenizer, train_tokenizer

WORDS = [
    "the",
    "cat",
    "sat on",
    "a mat.",
    "said:",
    "def",
    "f(x):",
    "return",
    "字",
    "🙂",
    "\n\n",
    "\t",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([" ".join(WORDS) * 20], 300)


def documents(count: int, words: int = 30, seed: int = 0) -> list[Document]:
    rng = np.random.default_rng(seed)
    return [Document(f"{i}", f"{i} " + " ".join(rng.choice(WORDS, words))) for i in range(count)]


def read(folder: Path, split: str, tokenizer: Tokenizer) -> list[str]:
    """The documents of a stream, from the files alone."""
    dtype = json.loads((folder / "dataset.json").read_text())["dtype"]
    ids = np.fromfile(folder / f"{split}.bin", dtype)
    assert ids[-1] == tokenizer.eot_id
    ends = np.flatnonzero(ids == tokenizer.eot_id)
    starts = [0, *(ends[:-1] + 1)]
    return [tokenizer.decode(ids[a:b]) for a, b in zip(starts, ends, strict=True)]


texts = st.lists(
    st.text(alphabet=st.characters(codec="utf-8"), min_size=1, max_size=60)
    | st.sampled_from(["def f(x):\n    return x\n", "the cat", "字🙂", " \n "]),
    min_size=2,
    max_size=25,
    unique=True,
)


@settings(max_examples=60, deadline=None)
@given(texts=texts, fraction=st.floats(0.01, 0.9), seed=st.integers(-3, 2**70))
def test_streams_hold_every_document_once(
    tokenizer: Tokenizer, texts: list[str], fraction: float, seed: int
) -> None:
    given_documents = [Document(str(i), text) for i, text in enumerate(texts)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lengths = [len(ids) + 1 for ids in tokenizer.encode_batch(texts)]
        if min(lengths) * 2 > sum(lengths):  # the half of the corpus that validation may have
            with pytest.raises(UserError, match="too small"):
                write_dataset(given_documents, tokenizer, folder, 1, fraction, seed)
            assert not list(folder.iterdir())
            return
        info = write_dataset(given_documents, tokenizer, folder, 1, fraction, seed)
        train, valid = (read(folder, split, tokenizer) for split in ("train", "valid"))
        assert sorted(train + valid) == sorted(texts)
        assert (len(train), len(valid)) == (info.train.documents, info.valid.documents)
        assert min(len(train), len(valid)) >= 1
        size = sum(len(text.encode()) for text in texts)
        assert info.train.text_bytes + info.valid.text_bytes == size


def test_info_describes_the_files(tokenizer: Tokenizer, tmp_path: Path) -> None:
    progress: list[tuple[int, int]] = []
    info = write_dataset(
        documents(200),
        tokenizer,
        tmp_path,
        16,
        0.1,
        seed=3,
        on_progress=lambda *a: progress.append(a),
    )
    assert DatasetInfo.load(tmp_path) == info
    for name in ("train", "valid"):
        data = (tmp_path / f"{name}.bin").read_bytes()
        split = info.split(name)
        assert len(data) == 2 * split.tokens
        assert hashlib.sha256(data).hexdigest() == split.sha256
    assert (info.train_tokens, info.valid_tokens) == (info.train.tokens, info.valid.tokens)
    assert info.dtype == "uint16"
    assert info.tokenizer_fingerprint == tokenizer.fingerprint
    assert (info.vocab_size, info.eot_id) == (tokenizer.vocab_size, 0)
    assert 0.03 < info.valid.documents / 200 < 0.2
    total = info.train.text_bytes + info.valid.text_bytes
    assert progress[-1] == (total, total)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "dataset.json",
        "train.bin",
        "valid.bin",
    ]
    with pytest.raises(UserError, match="'test'"):
        info.split("test")


def test_split_is_stable_and_seeded(tokenizer: Tokenizer, tmp_path: Path) -> None:
    def valid(count: int, seed: int = 0, rename: str = "", reverse: bool = False) -> set[str]:
        rows = [dataclasses.replace(d, name=rename + d.name) for d in documents(count)]
        write_dataset(rows[::-1] if reverse else rows, tokenizer, tmp_path, 8, 0.1, seed)
        return set(read(tmp_path, "valid", tokenizer))

    few, many = valid(200), valid(400)
    assert few <= many
    assert few == valid(200, rename="other/") == valid(200, reverse=True)
    assert few != valid(200, seed=1)


@pytest.mark.parametrize("fraction", [0.03, 0.1, 0.3, 0.6])
@pytest.mark.parametrize("count", [25, 130])
def test_the_share_that_was_asked_for(
    tokenizer: Tokenizer, tmp_path: Path, count: int, fraction: float
) -> None:
    """In whatever order the hash puts few documents, of equal length or not."""
    total = count * (count + 1) / 2
    for seed in range(4):
        for sizes in ([30] * count, range(1, count + 1)):
            rows = [
                Document(f"{i}", f"{seed} {i} " + "the cat sat " * words)
                for i, words in enumerate(sizes)
            ]
            info = write_dataset(rows, tokenizer, tmp_path, 1, fraction, seed)
            share = info.valid_tokens / (info.train_tokens + info.valid_tokens)
            finest = 1 / count if sizes[0] == 30 else count / total  # half of a document either way
            assert abs(share - fraction) <= max(0.2 * fraction, 0.75 * finest), (seed, share)


def test_a_long_document_first_in_order_does_not_end_the_choice(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    large = Document("large", "the cat sat on a mat. " * 3000)  # a third of all
    for seed in range(6):
        info = write_dataset([large, *documents(600)], tokenizer, tmp_path, 8, 0.05, seed)
        share = info.valid_tokens / (info.train_tokens + info.valid_tokens)
        assert 0.04 <= share <= 0.06


def test_same_input_gives_the_same_bytes(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for name in ("a", "b"):
        rows = documents(100)[:: 1 if name == "a" else -1]
        write_dataset(rows, tokenizer, tmp_path / name, 8)
    for file in ("train.bin", "valid.bin", "dataset.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_copies_land_on_one_side(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [Document(f"{copy}/{d.name}", d.text) for d in documents(60) for copy in range(3)]
    write_dataset(rows, tokenizer, tmp_path, 8, 0.3)
    train, valid = (set(read(tmp_path, split, tokenizer)) for split in ("train", "valid"))
    assert not train & valid


def test_a_split_that_the_corpus_brings(tokenizer: Tokenizer, tmp_path: Path) -> None:
    train, valid = documents(20), documents(4, seed=1)
    info = write_dataset([*train, valid[0]], tokenizer, tmp_path, 16, valid=valid)
    assert sorted(read(tmp_path, "train", tokenizer)) == sorted(d.text for d in train)
    assert sorted(read(tmp_path, "valid", tokenizer)) == sorted(d.text for d in valid)
    assert info.valid_fraction == 4 / 24
    with pytest.raises(UserError, match="0 for validation"):
        write_dataset(train, tokenizer, tmp_path, 16, valid=[])


def test_standard_library_does_not_leak(tokenizer: Tokenizer, tmp_path: Path) -> None:
    corpus = [d for d in load_corpus() if d.name.startswith(("json", "email", "http", "re"))]
    info = write_dataset(corpus, tokenizer, tmp_path, 64, 0.2)
    train, valid = (set(read(tmp_path, split, tokenizer)) for split in ("train", "valid"))
    assert train | valid == {document.text for document in corpus}
    assert not train & valid
    assert info.valid.tokens > 64


def test_large_vocabularies_take_four_bytes(tokenizer: Tokenizer, tmp_path: Path) -> None:
    content = json.loads(tokenizer._json)
    content["model"]["vocab"]["far"] = 70_000
    far = Tokenizer(json.dumps(content))
    assert far.vocab_size == 70_001
    info = write_dataset(documents(40), far, tmp_path, 8)
    assert info.dtype == "uint32"
    assert sorted(read(tmp_path, "train", far) + read(tmp_path, "valid", far)) == sorted(
        document.text for document in documents(40)
    )


def test_two_documents_of_unequal_size_train_on_the_large_one(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    large = Document("large", "the cat sat on a mat. " * 500)
    for i in range(8):  # whatever the hash says
        info = write_dataset(
            [large, Document("small", f"the cat {i}")], tokenizer, tmp_path, 2, seed=i
        )
        assert info.train.text_bytes == len(large.text)


@pytest.mark.parametrize("rows", [[], documents(1), documents(2, words=3)])
def test_too_small_a_corpus(tokenizer: Tokenizer, tmp_path: Path, rows: list[Document]) -> None:
    with pytest.raises(UserError, match=r"too small: it has \d documents.*at least 129.*Give more"):
        write_dataset(rows, tokenizer, tmp_path / "out", 128)
    assert not (tmp_path / "out").exists()


def test_impossible_settings(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = documents(20)
    with pytest.raises(UserError, match="sequence_length must be positive"):
        write_dataset(rows, tokenizer, tmp_path, 0)
    for fraction in (0, 1, -0.1, float("nan")):
        with pytest.raises(UserError, match="valid_fraction must be between"):
            write_dataset(rows, tokenizer, tmp_path, 8, fraction)
    silent = Tokenizer(tokenizer._json.replace(END_OF_TEXT, "</s>"))
    with pytest.raises(UserError, match="no end-of-text token"):
        write_dataset(rows, silent, tmp_path, 8)


def test_a_disk_that_fills_up_loses_nothing(tokenizer: Tokenizer, tmp_path: Path) -> None:
    old = write_dataset(documents(50), tokenizer, tmp_path, 8)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises((OSError, UserError), match="large"):
            write_dataset(documents(90), tokenizer, tmp_path, 8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert DatasetInfo.load(tmp_path) == old


def test_death_at_a_rename_leaves_a_whole_dataset(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = write_dataset(documents(50), tokenizer, tmp_path / "a", 8)
    new = write_dataset(documents(90), tokenizer, tmp_path / "b", 8)
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    replace, rename = os.replace, os.rename

    def die(renamed: Any) -> Any:
        def dying(source: str, target: Path) -> None:
            renamed(source, target)
            raise KeyboardInterrupt

        return dying

    monkeypatch.setattr(os, "replace", die(replace))  # the description's, before anything counts
    with pytest.raises(KeyboardInterrupt):
        write_dataset(documents(90), tokenizer, tmp_path / "a", 8)
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(os, "rename", die(rename))  # the one that decides
    with pytest.raises(KeyboardInterrupt):
        write_dataset(documents(90), tokenizer, tmp_path / "c", 8)
    for folder, info in (("a", old), ("c", new)):
        assert DatasetInfo.load(tmp_path / folder) == info
        for split in ("train", "valid"):
            data = (tmp_path / folder / f"{split}.bin").read_bytes()
            assert hashlib.sha256(data).hexdigest() == info.split(split).sha256


def test_bad_descriptions(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no dataset in"):
        DatasetInfo.load(tmp_path)
    for content in ("[]", "{}", '{"format": "other"}', '{"format": "tf_gptopt.dataset.1"}'):
        (tmp_path / "dataset.json").write_text(content)
        with pytest.raises(UserError, match="Make the dataset again"):
            DatasetInfo.load(tmp_path)
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        DatasetInfo.load(tmp_path)


@pytest.mark.parametrize("given_documents", ["a text", ["a text", "another"]])
def test_texts_are_no_documents(tokenizer: Tokenizer, tmp_path: Path, given_documents) -> None:
    with pytest.raises(UserError, match=r"Document\(name, text\)\. Received: str"):
        write_dataset(given_documents, tokenizer, tmp_path, 4)
