"""What report.md shows of a held-out text, and the losses that a stage keeps."""

import csv

import pytest

from tf_gptopt.data.corpus import Document
from tf_gptopt.data.packing import write_dataset
from tf_gptopt.recipes.loss_log import LossLog
from tf_gptopt.recipes.run_page import Sample, _sample, held_out_sample
from tf_gptopt.training.callbacks import Progress

NOVEL = "Früh am Morgen, als der Nebel noch über den Wiesen lag, ging Änne hinab zum Fluss. " * 4


def texts(*held_out):
    return [Document(str(i), text) for i, text in enumerate(held_out)]


def test_the_sample_is_the_beginning_of_a_held_out_text(tiny_tokenizer, tmp_path):
    training = texts("nothing to see here, and more of it. " * 50)
    write_dataset(training, tiny_tokenizer, tmp_path, 16, valid=texts("Kurz.", NOVEL))
    tiny_tokenizer.save(tmp_path)
    sample = held_out_sample(tmp_path)
    assert NOVEL.startswith(sample.prompt + sample.following)  # not the one that is too short
    assert 4 < len(sample.prompt) < len(sample.following)
    assert "\ufffd" not in sample.prompt
    page = _sample(Sample(sample.prompt, "~~~ said", sample.following))
    assert page.count("~~~~text\n") == 1  # a fence that the text cannot end
    assert "held out" in page
    assert "where the text goes on" in page
    assert "held out" not in _sample(Sample("def ", "x"))


def report(step, loss):
    return Progress(step, 100, loss, 1234.5, 1.0, 1e-3)


def test_losses_go_on_where_the_training_does(tmp_path):
    seen = []
    log = LossLog(tmp_path, goes_on=False, then=seen.append)
    for step in (10, 20, 30):
        log(report(step, 5.0 - step / 100))
    assert [one.step for one in seen] == [10, 20, 30]
    with open(tmp_path / "losses.csv", "a") as file:
        file.write("40,4.")  # killed while it wrote
    resumed = LossLog(tmp_path, goes_on=True, then=seen.append)  # from a checkpoint of step 25
    resumed(report(30, 4.65))
    resumed(report(40, 4.5))
    rows = list(csv.DictReader(open(tmp_path / "losses.csv")))  # noqa: SIM115
    assert [int(row["step"]) for row in rows] == [10, 20, 30, 40]
    assert [float(row["loss"]) for row in rows] == pytest.approx([4.9, 4.8, 4.65, 4.5])
    assert float(rows[0]["learning_rate"]) == 1e-3
    assert float(rows[0]["tokens_per_second"]) == 1234.5

    LossLog(tmp_path, goes_on=False, then=seen.append)(report(10, 6.0))  # another training
    assert len((tmp_path / "losses.csv").read_text().splitlines()) == 2
