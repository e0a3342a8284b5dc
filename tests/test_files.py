"""Files are whole or absent: whatever happens while one is written, its final name never lies."""

import os
import signal
import subprocess
import sys

import pytest

from tf_gptopt._errors import UserError, suggest
from tf_gptopt._files import (
    atomic_path,
    check_seal,
    read_json,
    sealed,
    write_bytes,
    write_json,
)


def test_writes_and_reads_back(tmp_path):
    write_json(tmp_path / "deep" / "x.json", {"a": ["ü", 1]})
    assert read_json(tmp_path / "deep" / "x.json") == {"a": ["ü", 1]}
    assert os.listdir(tmp_path / "deep") == ["x.json"]


def test_an_error_while_writing_keeps_the_old_file(tmp_path):
    path = tmp_path / "x.bin"
    write_bytes(path, b"old")

    def fail_half_way():
        with atomic_path(path) as temporary:
            temporary.write_bytes(b"half of the n")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x.bin"]


def test_kill_while_writing_keeps_the_old_file(tmp_path):
    path = tmp_path / "x.bin"
    write_bytes(path, b"old")
    code = (
        "import sys, time; from tf_gptopt._files import atomic_path\n"
        f"with atomic_path({str(path)!r}) as temporary:\n"
        "    temporary.write_bytes(b'half'); print('writing', flush=True); time.sleep(60)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"writing\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert path.read_bytes() == b"old"


def test_permissions_follow_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        write_bytes(tmp_path / "x", b"")
    finally:
        os.umask(old)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe"])
def test_broken_json_names_the_file(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.json is not valid JSON"):
        read_json(tmp_path / "x.json")
    with pytest.raises(UserError, match="does not exist"):
        read_json(tmp_path / "y.json")


def test_suggest():
    assert suggest("prun", ["prune", "train"]) == " Did you mean 'prune'?"
    assert suggest("zzz", ["prune", "train"]) == " Known: prune, train."


def test_damage_that_is_still_json_is_noticed(tmp_path):
    path = tmp_path / "x.json"
    value = {"b": {2: [1, "ü"]}, "a": 0.1, "other_sha256": "1"}
    write_json(path, sealed(value))
    text = path.read_text()
    check_seal(path, read_json(path))
    check_seal(path, value)  # of an earlier version, without a seal
    for before, after in (("0.1", "0.3"), ('"2"', '"3"'), ("ü", "u")):
        path.write_text(text.replace(before, after))
        with pytest.raises(
            UserError, match=r"x\.json has been damaged or changed.*remove 'sha256'"
        ):
            check_seal(path, read_json(path))


def test_what_is_no_description_is_refused_at_once(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "fifo.json")  # opening it would wait for a writer
    (tmp_path / "digits.json").write_text("[" + "9" * 5000 + "]")
    (tmp_path / "deep.json").write_text("[" * 200_000)
    (tmp_path / "long.json").write_text('"' + "x" * 2000 + '"')
    monkeypatch.setattr("tf_gptopt._files._MOST_TEXT", 1_000_000)
    for name, said in (
        ("fifo", "is not a file"),
        ("digits", "not valid JSON"),
        ("deep", "not valid JSON"),
    ):
        with pytest.raises(UserError, match=said):
            read_json(tmp_path / f"{name}.json")
    with pytest.raises(UserError, match="is not a file"):
        read_json(tmp_path)
    with pytest.raises(UserError, match="is not a file"):
        read_json("/dev/zero")
    monkeypatch.setattr("tf_gptopt._files._MOST_TEXT", 1_000)
    with pytest.raises(UserError, match="has 2,002 bytes"):
        read_json(tmp_path / "long.json")
