"""Files of every kind become documents, whole and once, or a clear error."""

from __future__ import annotations

import json
import os
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tf_gptopt._errors import UserError
from tf_gptopt.data.corpus import SEPARATOR, Document, corpus_files, load_corpus, split_text

# Text with every kind of boundary that a cut may fall on, and none at all
prose = st.lists(
    st.sampled_from(["\n", "\n\n", "\r\n", " \n \n", " ", "word", "字", "🙂", "x" * 40, "\u2028"])
).map("".join)


@given(prose, st.integers(1, 60))
def test_split_text_loses_and_doubles_nothing(text: str, section: int) -> None:
    pieces = list(split_text(text, section))
    assert "".join(pieces) == text
    assert all(len(piece) <= 2 * section for piece in pieces)
    assert all(len(piece) >= section for piece in pieces[:-1])


def test_cuts_fall_after_blank_lines() -> None:
    text = "".join(f"Paragraph {i}.\nIts second line.\n\n" for i in range(50))
    pieces = list(split_text(text, 200))
    assert len(pieces) > 5
    assert all(p.startswith("Paragraph") and p.endswith("line.\n\n") for p in pieces)


def test_a_long_text_without_a_single_space_is_cut_too() -> None:
    assert {len(piece) for piece in split_text("字" * 1000, 100)} == {200}


def test_standard_library_is_the_default() -> None:
    corpus = load_corpus()
    names = [document.name for document in corpus]
    size = sum(len(document.text) for document in corpus)
    assert 400 < len(corpus) < 900
    assert 5e6 < size < 2e7
    assert {"os.py", "json/decoder.py", "asyncio/base_events.py"} <= set(names)
    assert all(name.endswith(".py") for name in names)
    parts = {part for name in names for part in Path(name).parts}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings"}
    assert names == [document.name for document in load_corpus()]
    assert len(corpus_files()) == len(corpus) + corpus.duplicates + _blank(corpus_files())


def _blank(files: list[Path]) -> int:
    return sum(not path.read_text("utf-8").strip() for path in files)


def test_standard_library_in_a_zip_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "python311.zip"))
    with pytest.raises(UserError, match=r"zipped or was removed.*Name your own text"):
        load_corpus()


def test_folder_is_read_in_order_and_binaries_are_counted(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.md").write_text("two")
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "c").write_text("three, without a suffix")
    (tmp_path / "config-1.ini").write_text("four: nothing is special about a user's names")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00")
    (tmp_path / "old.txt").write_bytes("naïve".encode("latin-1"))
    (tmp_path / ".hidden").write_text("not read")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("not read")
    corpus = load_corpus(tmp_path)
    assert [d.text.split()[0] for d in corpus] == ["one", "three,", "four:", "two"]
    assert [Path(name).name for name in corpus.skipped] == ["image.png", "old.txt"]


def test_copies_and_blank_files_are_dropped(tmp_path: Path) -> None:
    for name, text in {"a": "same", "b": "same", "c": " \n\t", "d": "", "e": "other"}.items():
        (tmp_path / name).write_text(text)
    corpus = load_corpus([tmp_path, tmp_path / "a"])
    assert [document.text for document in corpus] == ["same", "other"]
    assert corpus.duplicates == 1  # the file that was named twice was read once


def test_jsonl_takes_the_named_field(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"body": "first\u2028row", "id": 1}, {"body": "zweite Zeile", "text": "no"}]
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n")
    corpus = load_corpus([str(path)], text_field="body")
    assert [document.text for document in corpus] == ["first\u2028row", "zweite Zeile"]
    assert corpus[1].name.endswith("rows.jsonl:3")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"body": "x", "title": "y"}', r"line 2 has no field 'text'.*'body', 'title'"),
        ("{}", r"line 2 has no field 'text'.*none"),
        ("plain text", r"line 2 is not JSON.*rename"),
        ("[1, 2]", r"line 2 holds a list"),
        ('{"text": 5}', r"line 2: field 'text' holds a int"),
        ('{"text": "\\ud800"}', r"line 2.*surrogate"),
    ],
)
def test_bad_jsonl_names_the_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    for source in (path, tmp_path):  # in a folder it is a mistake as well
        with pytest.raises(UserError, match=message):
            load_corpus(source)


def test_separators_end_documents(tmp_path: Path) -> None:
    path = tmp_path / "stories.txt"
    path.write_text(f"One.\n\nStill one.\n{SEPARATOR}\nTwo.{SEPARATOR}Three.\n\n{SEPARATOR}\n")
    texts = [document.text for document in load_corpus(path)]
    assert texts == ["One.\n\nStill one.", "Two.", "Three.\n"]


def test_a_lone_file_becomes_several_documents(tmp_path: Path) -> None:
    text = "".join(f"Line {i} of a short text.\n" for i in range(1000))
    (tmp_path / "only.txt").write_text(text)
    corpus = load_corpus(tmp_path)
    assert len(corpus) > 10
    assert "".join(document.text for document in corpus) == text
    (tmp_path / "other.txt").write_text("Two files of usual size are two documents.")
    assert len(load_corpus(tmp_path)) == 2


def test_line_ends_and_byte_order_marks(tmp_path: Path) -> None:
    (tmp_path / "windows.txt").write_bytes("\ufeffone\r\ntwo\rthree\n".encode())
    assert load_corpus(tmp_path)[0].text == "one\r\ntwo\rthree\n"


def test_bad_files_are_user_errors(tmp_path: Path) -> None:
    latin = tmp_path / "latin.txt"
    latin.write_bytes("12345 naïve".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin.txt is not UTF-8.*0xef at offset 8.*iconv"):
        load_corpus(latin)
    zeros = tmp_path / "zeros.bin"
    zeros.write_bytes(b"abc\0def")
    with pytest.raises(UserError, match=r"zero byte at offset 3"):
        load_corpus([zeros])
    with pytest.raises(UserError, match="does not exist"):
        load_corpus(tmp_path / "absent.txt")
    with pytest.raises(UserError, match="does not exist"):
        load_corpus("x" * 5000)
    with pytest.raises(UserError, match="No paths"):
        load_corpus([])
    blank = tmp_path / "blank"
    blank.mkdir()
    with pytest.raises(UserError, match="There is no text in"):
        load_corpus(blank)
    (blank / "a.txt").write_text(" \n\n ")
    (blank / "b.bin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8 text: 1"):
        load_corpus(blank)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_an_unreadable_file_is_a_user_error(tmp_path: Path) -> None:
    path = tmp_path / "secret.txt"
    path.write_text("text")
    path.chmod(0)
    with pytest.raises(UserError, match="cannot be read"):
        load_corpus(path)


@given(st.binary(max_size=60))
def test_any_bytes_are_text_or_a_user_error(data: bytes) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "file.txt")
        path.write_bytes(data)
        try:
            text = "".join(document.text for document in load_corpus(path))
        except UserError:
            return
        assert text == data.decode("utf-8").removeprefix("\ufeff")


def test_chinese(shared_data: Path) -> None:
    path = shared_data / "chinese" / "zh_classics_simplified.txt"
    corpus = load_corpus(path)
    assert len(corpus) > 300
    assert corpus[0] == Document(f"{path}#0", corpus[0].text)
    assert corpus[0].text.startswith("关雎")
    text = "".join(document.text for document in corpus)
    assert corpus.duplicates == 0
    assert text == path.read_bytes().decode()
