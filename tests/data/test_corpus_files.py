"""Which files of a folder are read, as what, and what is said of those that are not."""
# ruff: noqa: RUF001 (letters of other alphabets are meant)

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tf_gptopt._errors import UserError
from tf_gptopt.data.corpus import left_out, load_corpus
from tf_gptopt.data.files import file_kind
from tf_gptopt.data.unreadable import advice, guess_encoding

ROWS = [{"text": "first row"}, {"text": "zweite Zeile"}]
LINES = "\n".join(json.dumps(row) for row in ROWS) + "\n"


def texts(source, **options) -> list[str]:
    return [document.text for document in load_corpus(source, **options)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.JSONL", LINES),
        ("a.ndjson", LINES),
        ("a.NDJSON", LINES),
        ("a.jl", LINES),
        ("a.json", LINES),
        ("a.json", json.dumps(ROWS, indent=1)),
        ("a.Json", json.dumps(ROWS)),
    ],
)
def test_json_by_every_name(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    for source in (tmp_path / name, tmp_path):
        assert texts(source) == ["first row", "zweite Zeile"]


def test_one_json_object_is_one_document(tmp_path):
    (tmp_path / "a.json").write_text('{"id": 1, "body": "alone"}')
    assert texts(tmp_path / "a.json", text_field="body") == ["alone"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"title": "x"}', r"entry 1 has no field 'text'. Its fields: 'title'"),
        ('[{"text": "x"}, 5]', r"entry 2 holds a int"),
        ('{"text": ["x"]}', r"'text' holds a list"),
        ("{broken", r"is not JSON.*plain text"),
        ("[" * 100_000, r"is not JSON"),
        ('{"text": ' + "1" * 5000 + "}", r"is not JSON"),
    ],
)
def test_json_that_is_no_text(tmp_path, content, message):
    """Named, it is a mistake; in a folder, where settings are JSON as well, it is left out."""
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=message):
        load_corpus(tmp_path / "a.json")
    (tmp_path / "b.txt").write_text("prose")
    corpus = load_corpus(tmp_path)
    assert [document.text for document in corpus] == ["prose"]
    assert list(corpus.skipped.values()) == ["JSON without text in 'text'"]


def test_endings_that_only_begin_like_json(tmp_path):
    (tmp_path / "a.json5").write_text("{// plain text\n}")
    assert texts(tmp_path) == ["{// plain text\n}"]


def zstd(data: bytes) -> bytes:
    import zstandard

    half = len(data) // 2  # two frames, as `cat a.zst b.zst` makes them
    return b"".join(zstandard.compress(part) for part in (data[:half], data[half:]))


PACKED = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


@pytest.mark.parametrize("ending", PACKED)
def test_packed_files_are_read_as_what_they_hold(tmp_path, ending):
    if ending == ".zst":
        pytest.importorskip("zstandard")
    (tmp_path / f"a.jsonl{ending.upper()}").write_bytes(PACKED[ending](LINES.encode()))
    (tmp_path / f"b.txt{ending}").write_bytes(PACKED[ending]("Prosa für alle.".encode()))
    assert texts(tmp_path) == ["first row", "zweite Zeile", "Prosa für alle."]
    whole = PACKED[ending](os.urandom(3000).hex().encode())
    for name, data in {"cut": whole[:-900], "other": b"no such thing" * 9}.items():
        (tmp_path / f"{name}.txt{ending}").write_bytes(data)
        with pytest.raises(UserError, match="is damaged, or no"):
            load_corpus(tmp_path / f"{name}.txt{ending}")
    assert list(load_corpus(tmp_path).skipped.values()) == ["damaged", "damaged"]
    (tmp_path / f"bytes{ending}").write_bytes(PACKED[ending](b"\0\1" * 50))
    with pytest.raises(UserError, match="is not UTF-8 text"):
        load_corpus(tmp_path / f"bytes{ending}")


def test_zstd_without_its_package_says_which(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "a.zst").write_bytes(b"x")
    (tmp_path / "b.txt").write_text("text")
    for source in (tmp_path / "a.zst", tmp_path):  # not left out: all of the text may be in there
        with pytest.raises(UserError, match="pip install zstandard"):
            load_corpus(source)


def test_kinds_tell_files_of_equal_content_apart():
    names = ["a.txt", "a.jsonl", "a.json", "a.jsonl.gz", "a.txt.gz", "a.gz", "a.py", "a", "a.json5"]
    assert len({file_kind(Path(name)) for name in names}) == len(names)
    for same in ("b.JSONL", "b.ndjson", "x/y.jl"):
        assert file_kind(Path(same)) == ".jsonl"


def test_links_are_followed_and_end(tmp_path):
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    (data / "sub").mkdir(parents=True)
    elsewhere.mkdir()
    (elsewhere / "far.txt").write_text("behind a link")
    (data / "sub" / "near.txt").write_text("near")
    (data / "linked").symlink_to(elsewhere, target_is_directory=True)
    (data / "again").symlink_to(data / "sub", target_is_directory=True)
    (data / "sub" / "loop").symlink_to(data, target_is_directory=True)
    (data / "nowhere.txt").symlink_to(tmp_path / "absent")
    os.mkfifo(data / "pipe")
    corpus = load_corpus(data)
    assert sorted(document.text for document in corpus) == ["behind a link", "near"]
    assert corpus.duplicates == 0
    reasons = {Path(name).name: why for name, why in corpus.skipped.items()}
    assert reasons == {"nowhere.txt": "a link to nothing", "pipe": "a pipe or a device"}
    assert texts(data / "linked") == ["behind a link"]
    for source in (data / "pipe", "/dev/null"):
        with pytest.raises(UserError, match=r"more than once. Save it to a file"):
            load_corpus(source)


@pytest.fixture
def open_path():
    """A folder that every user reaches, unlike `tmp_path`."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


def test_what_may_not_be_read_is_named(open_path):
    """As a user who may not read everything; root, which may, becomes one."""
    data = open_path / "data"
    (data / "private").mkdir(parents=True)
    (data / "a.txt").write_text("readable")
    (data / "b.txt").write_text("secret")
    (data / "private" / "c.txt").write_text("secret too")
    code = f"""
import os, json
from tf_gptopt.data.corpus import load_corpus
from tf_gptopt.recipes.runner import stage_key
from tf_gptopt.recipes.sections import CorpusSection
from tf_gptopt._errors import UserError
if os.geteuid() == 0:
    os.setresgid(65534, 65534, 65534); os.setgroups([]); os.setresuid(65534, 65534, 65534)
corpus = load_corpus({str(data)!r})
stage_key("tokenizer", None, {{"corpus": CorpusSection(({str(data)!r},))}}, 0)
errors = []
for name in ("b.txt", "private"):
    try:
        load_corpus(os.path.join({str(data)!r}, name))
    except UserError as error:
        errors.append(str(error))
print(json.dumps([[d.text for d in corpus], corpus.skipped, errors]))
"""
    (data / "b.txt").chmod(0)
    (data / "private").chmod(0)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    (data / "private").chmod(0o700)
    assert done.returncode == 0, done.stderr
    found, skipped, errors = json.loads(done.stdout)
    assert found == ["readable"]
    reasons = {Path(name).name: why for name, why in skipped.items()}
    denied = "cannot be read: Permission denied"
    assert reasons == {"private": denied, "b.txt": denied}
    assert all("Permission denied). Check its permissions" in error for error in errors)
    assert len(errors) == 2


def test_what_was_left_out_is_said_with_its_reason(tmp_path):
    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(b"\x89PNG\r\n\x1a\n\0")
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").write_text("text")
    (tmp_path / "c.txt").symlink_to("absent")
    assert left_out(load_corpus(tmp_path)) == (
        "; 1 exact copies left out; skipped, a link to nothing: 1 (c.txt); "
        "skipped, not UTF-8 text: 5 (0.png, 1.png, 2.png, ...)"
    )


OWN = {
    "dataset": ["dataset.json", "train.bin", "tokenizer.json"],
    "model": ["config.json", "model.safetensors", "tokenizer.json"],
    "file": ["config.json", "model.tflite", "tokenizer.json"],
    "stage": ["key.json", "metrics.json", "tokenizer.json"],
    "run": ["recipe.json", "tokenizer/tokenizer.json", "report.md"],
}


@pytest.mark.parametrize("kind", OWN)
def test_folders_of_tokens_and_models_are_no_text(tmp_path, kind):
    folder = tmp_path / "data" / kind
    for name in OWN[kind]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"text": "not to be learnt"}')
    with pytest.raises(UserError, match="--data takes text"):
        load_corpus(folder)
    (tmp_path / "data" / "a.txt").write_text("prose")
    corpus = load_corpus(tmp_path / "data")
    assert [document.text for document in corpus] == ["prose"]
    assert list(corpus.skipped) == [str(folder)]


JAPANESE = "むかしむかし、あるところにおじいさんとおばあさんがすんでいました。山へ行きました。"
RUSSIAN = "Жили-были старик со старухой у самого синего моря; они жили в ветхой землянке."
TEXTS = {
    "GB18030": "从前有一个国家，他们的国王是一个好人。他说：你们要到那里去，我们在这里等你。",
    "BIG5": "從前有一個國家，他們的國王是一個好人。他說：你們要到那裡去，我們在這裡等你。",
    "SHIFT-JIS": JAPANESE,
    "EUC-JP": JAPANESE,
    "EUC-KR": "옛날 옛적에 어느 마을에 나이 많은 할아버지와 할머니가 살고 있었습니다.",
    "CP1251": RUSSIAN,
    "KOI8-R": RUSSIAN,
    "ISO8859-7": "Μια φορά κι έναν καιρό ήταν ένας βασιλιάς που είχε τρεις κόρες και ζούσαν μαζί.",
    "CP1252": "Es war einmal ein König, der hätte gern größere Bäume – und süße Äpfel.",
    "UTF-16": "Any text with its mark.",
    "UTF-16LE": "Any text without its mark.",
    "UTF-16BE": "Any text without its mark.",
}


@pytest.mark.parametrize("encoding", TEXTS)
def test_an_encoding_is_named_where_the_text_shows_it(tmp_path, encoding):
    raw = (TEXTS[encoding] * 2).encode(encoding)
    assert guess_encoding(raw)[0] == encoding
    path = tmp_path / "text.txt"
    path.write_bytes(raw)
    with pytest.raises(UserError) as caught:
        load_corpus(path)
    command = str(caught.value).partition(": iconv")[2]
    assert command == f" -f {encoding} -t UTF-8 text.txt > utf8-text.txt"
    assert raw.decode(encoding).startswith(TEXTS[encoding])


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "pdftotext"),
        (b"\x89PNG\r\n\x1a\n\0\0", "a picture. Leave it out"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF", "a picture. Leave it out"),
        (b"PK\x03\x04\x14\0\x06\0", "pandoc"),
        (b"PAR1\x15\x04", "Parquet"),
        (b"\x1f\x8b\x08\0", "Name it with .gz"),
        (b"\0" * 257 + b"ustar\x0000", "tar -xf"),
        (bytes(range(256)) * 9, "no text at all"),
    ],
)
def test_advice_on_files_that_are_no_text_makes_no_garbage(raw, expected):
    said = advice("name", raw)
    assert expected in said
    assert "iconv" not in said


def test_no_encoding_is_guessed_from_little(tmp_path):
    assert guess_encoding(b"a\0b") is None
    assert guess_encoding(b"\x81\x8d ends oddly") is None
    assert "Find out its encoding" in advice("x.txt", b"\x81\x8d ends oddly")
