"""What LiteRT cannot run is found in a child process, said clearly, and leaves nothing behind."""

from __future__ import annotations

import runpy
import subprocess
import sys
import warnings

import numpy as np
import pytest

from tf_gptopt._errors import UserError
from tf_gptopt.compression.quantization.config import QuantConfig
from tf_gptopt.tflite import trial
from tf_gptopt.tflite.convert import export_tflite
from tf_gptopt.tflite.flatbuffer import Model
from tf_gptopt.tflite.trial import read_logits, try_file

EXOTIC = QuantConfig(kv_cache="int8")


def write(tmp_path, build):
    model = Model()
    graph = model.graph("decode")
    build(graph, graph.reshape(graph.input("x", [4]), [1, 4]))
    path = tmp_path / "model.tflite"
    path.write_bytes(model.to_bytes())
    return path


def test_a_file_that_runs_passes(tmp_path):
    try_file(write(tmp_path, lambda g, x: g.output("y", g.softmax(x))), "good")


def test_an_operation_that_is_not_there_is_named_with_its_signature(tmp_path):
    def build(g, x):  # there is no softmax of integers
        g.output("y", g._op("SOFTMAX", [g.cast(x, np.int32)], (1, 4), np.int32, options="Softmax"))

    with pytest.raises(UserError, match=r"scheme 'odd': an error at 'decode'\. It said: .*error"):
        try_file(write(tmp_path, build), "odd")


def test_numbers_that_are_none_are_noticed(tmp_path):
    def build(g, x):
        g.output("y", x / g.model.constant(np.zeros(1, np.float32)))

    with pytest.raises(UserError, match="y is not finite"):
        try_file(write(tmp_path, build), "odd")


def test_a_damaged_file_is_an_error_at_loading(tmp_path):
    path = write(tmp_path, lambda g, x: g.output("y", g.softmax(x)))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match="an error at loading"):
        try_file(path, "cut")


def test_a_file_that_does_not_come_back_is_given_up(tmp_path, monkeypatch):
    code = "import time; print(\"trying 'decode'\", flush=True); time.sleep(60)"
    monkeypatch.setattr(trial, "COMMAND", ("-c", code))
    monkeypatch.setattr(trial, "_SECONDS", 1.0)
    path = write(tmp_path, lambda g, x: g.output("y", g.softmax(x)))
    with pytest.raises(UserError, match=r"no answer in time at 'decode'\. It said: nothing"):
        try_file(path, "slow")


def test_the_command_says_how_it_went(tmp_path, capsys, monkeypatch):
    path = write(tmp_path, lambda g, x: g.output("y", g.softmax(x)))

    def command():
        monkeypatch.setattr(sys, "argv", ["trial", str(path)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_module("tf_gptopt.tflite.trial", run_name="__main__")
        return ended.value.code, capsys.readouterr().out

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # runpy's, of a module that is imported
        assert command() == (None, f"{path} runs: 1 signatures, on zeros.\n")
        path.write_bytes(b"hello")
        code, out = command()
        assert (out, code.startswith(f"{path} does not run: an error at loading. It said: ")) == (
            "",
            True,
        )
        died = subprocess.CompletedProcess(
            [], -11, "trying loading\ntrying 'decode'\n", "INFO: [x.cc:1] so\nF00 Check failed\n"
        )
        monkeypatch.setattr("tf_gptopt.tflite.child.run_child", lambda *a, **k: died)
        assert command()[0] == (
            f"{path} does not run: the process was ended by signal 11 at 'decode'. "
            "It said: F00 Check failed."
        )


def test_an_abort_costs_an_error_and_nothing_else(
    tmp_path, tiny_model, tiny_tokenizer, monkeypatch
):
    code = (
        "import os, sys\n"
        "print('trying loading')\n"
        "print(\"trying 'prefill_16'\", flush=True)\n"
        "print('F0000 Check failed: kernel', file=sys.stderr, flush=True)\n"
        "os.abort()"
    )
    monkeypatch.setattr(trial, "COMMAND", ("-c", code))
    path = tmp_path / "model.tflite"
    path.write_bytes(b"of yesterday")
    with pytest.raises(UserError) as caught:
        export_tflite(tiny_model(vocab_size=300), path, EXOTIC, tokenizer=tiny_tokenizer)
    for part in ("'int8 dynamic int8 cache'", "signal 6", "'prefill_16'", "Check failed: kernel"):
        assert part in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["model.tflite"]
    assert path.read_bytes() == b"of yesterday"
    # schemes that LiteRT has run for years are not tried
    export_tflite(tiny_model(), path, QuantConfig("int8"))
    export_tflite(tiny_model(), path, QuantConfig("float16", float_layers=("block_0_*",)))


def test_the_child_reads_what_this_process_reads(exported):
    _, runtime = exported("int8", max_sequence_length=96)
    ids = np.random.default_rng(0).integers(0, 61, 72, np.int32)
    here, there = read_logits(runtime.path, ids), try_file(runtime.path, "int8", ids)
    for mine, its in zip(here, there, strict=True):
        np.testing.assert_array_equal(mine, its)
    assert here.at_once.shape == (72, 61)
    assert here.rows.tolist() == [35, 59, *range(60, 72)]
    np.testing.assert_allclose(here.pieces, here.at_once[here.rows], atol=0.02)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_short_contexts_are_read_in_pieces_too(exported, count):
    _, runtime = exported("float32", max_sequence_length=count)
    logits = read_logits(runtime.path, np.arange(count))
    assert logits.rows[-1] == count - 1
    np.testing.assert_allclose(logits.pieces, logits.at_once[logits.rows], atol=1e-4)


def test_the_trial_needs_no_tensorflow(run_child, tmp_path):
    path = write(tmp_path, lambda g, x: g.output("y", g.softmax(x)))
    out = run_child(
        f"""
        import sys
        from pathlib import Path
        from tf_gptopt.tflite.trial import run_all
        run_all(Path({str(path)!r}))
        print(sorted({{"tensorflow", "tf_keras", "torch"}} & set(sys.modules)))
        """,
        devices=0,
    )
    assert out.splitlines() == ["trying loading", "trying 'decode'", "[]"]
