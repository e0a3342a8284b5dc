"""The command line from outside: real processes, their output, exit codes and their haste."""

import os
import shlex
import subprocess
import sys

import pytest

from tf_gptopt.cli import COMMANDS

ERROR = "tf-gptopt: error: "


def tf_gptopt(*words, cwd=None, timeout=120, **env):
    return subprocess.run(
        [sys.executable, "-m", "tf_gptopt", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=timeout,
        env={**os.environ, **env},
    )


def assert_mistake(done, *parts):
    """Exit code 2 and one line on stderr with all of `parts`; no traceback."""
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith(ERROR)]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    for part in parts:
        assert part in lines[0]


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_needs_no_tensorflow(command):
    words = [command, "--help"] if command else ["--help"]
    done = tf_gptopt(*words, PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0, done.stderr
    assert "usage: tf-gptopt" in done.stdout
    assert "tf_gptopt.cli" in done.stderr
    assert "tensorflow" not in done.stderr


def test_help_lists_every_command():
    done = tf_gptopt()
    assert done.returncode == 0
    assert all(f"  {name} " in done.stdout for name in COMMANDS)


def test_version():
    import tf_gptopt as package

    assert tf_gptopt("--version").stdout.strip() == package.__version__


def test_mistyped_names_are_answered_with_the_near_one():
    assert_mistake(tf_gptopt("prun"), "Unknown command 'prun'", "Did you mean 'prune'?")
    assert_mistake(tf_gptopt("run", "--dta", "x"), "--dta", "Did you mean '--data'?")
    assert_mistake(tf_gptopt("run", "--set", "train.fit.step=3"), "Did you mean 'train.fit.steps'")
    assert_mistake(tf_gptopt("run", "quik"), "Did you mean 'quick'?")


def test_mistakes_in_values():
    assert_mistake(tf_gptopt("run", "--set", "train.fit.steps=-1"), "steps")
    assert_mistake(tf_gptopt("generate", "--max-new-tokens", "many", "x"), "max_new_tokens")
    assert_mistake(tf_gptopt("generate"), "prompt")
    assert_mistake(tf_gptopt("generate", "x", "--logit-bias", "13"), "13:-2.5", "Received: '13'")
    assert_mistake(tf_gptopt("generate", "x", "--min-p", "2"), "min_p must be in (0, 1]")
    assert_mistake(tf_gptopt("generate", "x", "--overflow", "slid"), "Did you mean 'slide'")
    assert_mistake(tf_gptopt("generate", "x", "--keep", "4"), 'overflow="slide"')
    assert_mistake(tf_gptopt("generate", "nowhere.tflite", "x"), "nowhere.tflite")
    assert_mistake(tf_gptopt("evaluate", "nowhere", "--dataset", "x"), "nowhere does not exist")


def test_mistakes_in_a_section_of_a_section(tmp_path):
    folders = ("--model", tmp_path, "--dataset", tmp_path, "--out", tmp_path / "out")
    assert_mistake(tf_gptopt("shrink", *folders), "--target.parameters 0.67")
    wrong = tf_gptopt("shrink", *folders, "--target.parameters", 1.5)
    assert_mistake(wrong, "error: parameters must be a fraction", "parameters=1.5")
    assert len(wrong.stderr.splitlines()[-1]) < 200  # and not all that jsonargparse knows of it
    both = ("--target.parameters", 0.5, "--target.layers", 1)
    assert_mistake(tf_gptopt("shrink", *folders, *both), "one target")
    assert_mistake(tf_gptopt("prune", *folders, "--pruning.score", "wandaa"), "mean 'wanda'")
    teacher = ("--teacher", *folders[1:], "--student.parameters", 0.3, "--rounds", 2)
    assert_mistake(tf_gptopt("distill", *teacher), "Take rounds=3")
    assert not (tmp_path / "out").exists()


def test_generate_keeps_packed_weights_where_it_is_told(tmp_path):
    words = ("generate", "def main", "--seed", 0, "--max-new-tokens", 4)
    plain, first, second = (
        tf_gptopt(*words, *cache)
        for cache in ((), ("--weight-cache", tmp_path), ("--weight-cache", tmp_path))
    )
    assert plain.returncode == 0, plain.stderr
    assert plain.stdout == first.stdout == second.stdout
    assert [file.suffix for file in tmp_path.iterdir()] == [".xnnpack"]
    (tmp_path / "config.json").touch()
    keras_folder = tf_gptopt("generate", tmp_path, "x", "--weight-cache", tmp_path)
    assert_mistake(keras_folder, "a weight cache", "Export them first")


def test_recipes_are_explained_in_a_line_each():
    from tf_gptopt.compression.quantization.config import RECIPES
    from tf_gptopt.recipes.explain import describe_runs

    done = tf_gptopt("recipes", PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0, done.stderr
    assert "tensorflow" not in done.stderr
    for name, line in [*((k, v[1]) for k, v in RECIPES.items()), *describe_runs().items()]:
        assert any(f" {name} " in row and line in row for row in done.stdout.splitlines()), name


def test_mistakes_about_quantization(tmp_path):
    folders = ("--model", tmp_path, "--out", tmp_path / "out")
    wrong = ("--quantization", "int4-gtpq")
    assert_mistake(tf_gptopt("export", *folders, *wrong), "Did you mean 'int4-gptq'?")
    wrong = ("--quantization", "int8-static", "--quantization.granularity", 32)
    assert_mistake(tf_gptopt("quantize", *folders, *wrong), "Blocks are for int4")
    absent = ("sensitivity", tmp_path / "absent", "--data", tmp_path)
    assert_mistake(tf_gptopt(*absent), "absent does not exist")
    assert_mistake(tf_gptopt(*absent, "--bytes", 1.0, "--loss", 0.1), "one budget")
    assert not (tmp_path / "out").exists()


def test_bad_corpora(tmp_path):
    out = ["--out", tmp_path / "run", "quick"]
    (tmp_path / "empty.txt").write_text("")
    assert_mistake(tf_gptopt("run", *out, "--data", tmp_path / "empty.txt"), "empty")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 50)
    assert_mistake(tf_gptopt("run", *out, "--data", tmp_path / "binary.txt"), "binary.txt")
    assert_mistake(tf_gptopt("run", *out, "--data", tmp_path / "absent.txt"), "absent.txt")
    (tmp_path / "short.txt").write_text("too short to fill one context.\n")
    assert_mistake(tf_gptopt("run", *out, "--data", tmp_path / "short.txt"), "too small")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_folder_as_a_user(tmp_path):
    tmp_path.chmod(0o500)
    assert_mistake(tf_gptopt("run", "--out", tmp_path / "run"), str(tmp_path))


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    assert_mistake(tf_gptopt("run", "--out", tmp_path / "file" / "run"), "file")


def test_full_disk(tmp_path):
    """The disk fills up while the stage writes: the sync that precedes every rename fails."""
    code = (
        "import errno, os, sys\n"
        "from tf_gptopt import _files\n"
        "from tf_gptopt.cli import main\n"
        "def full(handle): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))\n"
        "_files.os.fsync = full\n"
        f"out = {str(tmp_path / 'out')!r}\n"
        "sys.exit(main(['tokenizer', '--out', out, '--vocab_size', '300']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert_mistake(done, "No space left", "Free some room")
    assert not list((tmp_path / "out").glob("tokenizer.json"))


def test_a_dataset_with_a_split_of_its_own(tmp_path):
    from tf_gptopt.data.packing import DatasetInfo
    from tf_gptopt.recipes.runner import stage_key
    from tf_gptopt.recipes.sections import CorpusSection

    for name in ("train", "valid"):
        text = "\n\n".join(f"{name} {i}: the quick brown fox jumps." for i in range(60))
        (tmp_path / f"{name}.txt").write_text(text)
    train, valid = ("--data", tmp_path / "train.txt"), ("--valid", tmp_path / "valid.txt")
    encoder = ("--tokenizer", tmp_path / "bpe")
    tf_gptopt("tokenizer", *train, "--vocab_size", 300, "--out", tmp_path / "bpe")
    length = ("--sequence_length", 8)
    done = tf_gptopt("dataset", *train, *valid, *encoder, *length, "--out", tmp_path / "data")
    assert done.returncode == 0, done.stderr
    info = DatasetInfo.load(tmp_path / "data")
    sizes = [len((tmp_path / f"{name}.txt").read_bytes()) for name in ("train", "valid")]
    assert [info.train.text_bytes, info.valid.text_bytes] == sizes
    files = [str(tmp_path / f"{name}.txt") for name in ("train", "valid")]
    corpora = [
        CorpusSection(tuple(files[:1])),
        CorpusSection(tuple(files)),
        CorpusSection(tuple(files[:1]), valid=tuple(files[1:])),
    ]
    assert len({stage_key("dataset", None, {"corpus": corpus}, 0) for corpus in corpora}) == 3


def test_options_of_training_may_be_written_short():
    from tf_gptopt._options import spelt_out
    from tf_gptopt.recipes.sections import ExportSection, PruneSection, TrainSection

    given = "--data D --seed 3 --mesh batch=2,model=2 --batch-size=8 --profile --out O --recompute"
    want = (
        "--data D --seed 3 --fit.mesh batch=2,model=2 --fit.batch_size=8 --fit.profile true "
        "--out O --fit.recompute true"
    )
    assert spelt_out(given.split(), TrainSection) == want.split()
    assert spelt_out(["--profile", "false", "--tensorboard=true"], TrainSection) == [
        "--fit.profile",
        "false",
        "--fit.tensorboard=true",
    ]
    assert spelt_out(["--steps", "3"], ExportSection) == ["--steps", "3"]
    given = "--one-shot --calibration 8 --steps 3 --pruning.score wanda"
    want = "--one_shot true --calibration 8 --fit.steps 3 --pruning.score wanda"
    assert spelt_out(given.split(), PruneSection) == want.split()


def test_a_scheme_may_be_named_and_changed():
    from tf_gptopt._options import Options
    from tf_gptopt.compression.quantization.config import QuantConfig
    from tf_gptopt.recipes.sections import ExportSection, QatSection
    from tf_gptopt.recipes.stage_command import schemes_read

    def parsed(words, section):
        options = Options("x", "y")
        options.section(section)
        return options.parse(schemes_read(words.split()), section)[1].quantization

    for section in (ExportSection, QatSection):
        named = parsed("--quantization int4-gptq --quantization.granularity 64", section)
        assert named == QuantConfig.from_recipe("int4-gptq", granularity=64)
        named = parsed("--calibration 3 --quantization=int8-static", section)
        assert named == QuantConfig.from_recipe("int8-static")
        fields = parsed("--quantization.weights int4 --quantization.kv_cache int8", section)
        assert fields == QuantConfig("int4", kv_cache="int8")


def shell(script, **env):
    """`script` in a shell, where `tf-gptopt` is this program."""
    program = f"{shlex.quote(sys.executable)} -m tf_gptopt"
    return subprocess.run(
        ["bash", "-c", script.replace("tf-gptopt", program)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **env},
    )


def test_a_terminal_that_is_not_utf8():
    """What it cannot show is written in its code, and ends nothing."""
    words = "generate '\u4e2d\u6587 \u00e9' --max-new-tokens 2 --seed 0"
    done = shell(f"tf-gptopt {words}", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(r"\u4e2d\u6587 \xe9")
    table = shell("tf-gptopt recipes", PYTHONIOENCODING="ascii")
    assert table.returncode == 0, table.stderr


def test_streams_that_are_closed_or_full(tmp_path):
    for streams in (">&-", ">&- 2>&- <&-", "| true", "| head -1"):
        done = shell(f"set -o pipefail; tf-gptopt recipes {streams}")
        assert done.returncode == 0, (streams, done.stderr)
        assert "Traceback" not in done.stderr
        assert "Exception ignored" not in done.stderr
    # a file that got the number of a closed stream would receive what is printed
    corpus, out = tmp_path / "a.txt", tmp_path / "bpe"
    corpus.write_text("some text, " * 99)
    done = shell(f"tf-gptopt tokenizer --data {corpus} --vocab-size 300 --out {out} >&-")
    assert done.returncode == 0, done.stderr
    assert (out / ".lock").read_bytes() == b""
    done = shell("tf-gptopt recipes > /dev/full")
    assert_mistake(done, "No space left", "Free some room")
    assert "Exception ignored" not in done.stderr
