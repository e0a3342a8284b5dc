"""A guest in somebody's process: stderr is not ours, and what others write there arrives."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def stderr_of(exported):
    """`stderr_of(code)`: what a process with `PATH`, a .tflite file, says there."""
    _, runtime = exported("int8")

    def run(code: str) -> str:
        code = f"PATH = {str(runtime.path)!r}\n" + textwrap.dedent(code)
        child = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            capture_output=True,
            text=True,
            env={"PYTHONPATH": str(REPOSITORY), "PATH": ""},
            timeout=120,
        )
        assert child.returncode == 0, child.stderr
        return child.stderr

    return run


def test_loading_in_threads_leaves_stderr_where_it_was(stderr_of):
    said = stderr_of(
        """
        import os, subprocess, sys, threading
        from tf_gptopt.tflite.runtime import TFLiteGPT

        def place():
            return os.fstat(2).st_dev, os.fstat(2).st_ino

        before, moved, done = place(), [], threading.Event()

        def write():
            number = 0
            while not done.is_set() or number < 100:
                print("line", number, file=sys.stderr)
                os.write(2, b"written\\n")
                moved.append(place() != before)
                number += 1
            subprocess.run(["/bin/sh", "-c", "echo a child >&2"])
            print("lines", number, file=sys.stderr)

        def load():
            for _ in range(4):
                TFLiteGPT(PATH, threads=1).generate([1, 2], 2)

        sys.setswitchinterval(1e-5)
        threads = [threading.Thread(target=f) for f in (write, load, load)]
        for thread in threads:
            thread.start()
        for thread in threads[1:]:
            thread.join()
        done.set()
        threads[0].join()
        print(place() == before, any(moved), file=sys.stderr)
        """
    ).splitlines()
    assert said[-1] == "True False"
    count = int(said[-2].removeprefix("lines "))
    assert said[-3] == "a child"
    assert said[:-3] == [line for i in range(count) for line in (f"line {i}", "written")]


def test_the_last_words_of_a_process_are_heard(stderr_of):
    said = stderr_of(
        """
        import atexit, os, sys
        atexit.register(lambda: print("a handler from before", file=sys.stderr))
        from tf_gptopt.tflite.runtime import TFLiteGPT
        TFLiteGPT(PATH, threads=1)
        atexit.register(lambda: os.write(2, b"a handler from behind\\n"))

        class Last:
            def __del__(self):
                os.write(2, b"a destructor\\n")

        last = Last()
        """
    )
    assert said.splitlines() == ["a handler from behind", "a handler from before", "a destructor"]


def test_a_fork_while_another_thread_loads(stderr_of):
    said = stderr_of(
        """
        import ctypes, os, sys, threading
        from tf_gptopt.tflite.runtime import TFLiteGPT
        from tf_gptopt.tflite.quiet import native_output

        libc, done = ctypes.CDLL(None), threading.Event()
        variable = ctypes.c_void_p.in_dll(libc, "stderr")

        def speak():
            with native_output():
                libc.fputs(b"INFO: kept\\n", variable)

        def load():
            while not done.is_set():
                speak()

        speak()
        sys.setswitchinterval(1e-5)
        thread = threading.Thread(target=load)
        thread.start()
        for number in range(20):
            child = os.fork()
            if not child:
                libc.fputs(b"child\\n", variable)
                speak()
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
        done.set()
        thread.join()
        TFLiteGPT(PATH, threads=1)
        """
    )
    assert said.splitlines() == ["child"] * 20


def test_what_other_libraries_write_comes_out(stderr_of):
    said = stderr_of(
        """
        import ctypes, sys
        from tf_gptopt.tflite.quiet import native_output

        libc = ctypes.CDLL(None)
        stderr = ctypes.c_void_p.in_dll(libc, "stderr")
        for _ in range(2):
            with native_output() as heard:
                libc.fputs("INFO: from LiteRT\\n└ and more\\nsomebody else\\n".encode(), stderr)
                libc.fputs(b"ERROR: broken\\n", stderr)
                print("python", file=sys.stderr)
                assert "INFO: from LiteRT" in heard() and "ERROR: broken" in heard()
        libc.fputs(b"afterwards\\n", stderr)
        """
    )
    assert said.splitlines() == ["python", "somebody else"] * 2 + ["afterwards"]


def test_a_file_that_is_refused_says_why(tmp_path):
    from tf_gptopt._errors import UserError
    from tf_gptopt.tflite.flatbuffer import Model
    from tf_gptopt.tflite.litert import load_litert

    (tmp_path / "bad.tflite").write_bytes(Model().to_bytes())
    with pytest.raises(UserError, match=r"cannot load .*\(.* ERROR: "):
        load_litert(tmp_path / "bad.tflite", 1, "x")
