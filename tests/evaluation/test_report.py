"""The report: what it recommends and why, and that its three forms say the same."""

import dataclasses
import json

import pytest
from rich.console import Console

from tf_gptopt.evaluation.report import (
    Report,
    Row,
    cells,
    human_bytes,
    markdown,
    narrow_cells,
    recommend,
    rich_table,
    three_digits,
)
from tf_gptopt.evaluation.size import Size
from tf_gptopt.evaluation.speed import Speed


def row(name, kind="keras", perplexity=10.0, gzip_bytes=1000, agreement=None, reference=None):
    size = Size(1000, 900, 4000 if kind == "keras" else 1100, gzip_bytes)
    speed = Speed(100.0 if kind == "keras" else 250.0, 1000.0, 32, 2)
    return Row(name, kind, size, speed, 2.3, perplexity, agreement, reference)


ROWS = (
    row("train", gzip_bytes=3500),
    row("big", "tflite", 10.1, gzip_bytes=900, agreement=0.9, reference="train"),
    row("small", "tflite", 10.9, gzip_bytes=500, agreement=0.8, reference="train"),
    row("tiny", "tflite", 12.0, gzip_bytes=200, agreement=0.6, reference="train"),
)


def test_the_smallest_file_that_is_good_enough_wins():
    name, why = recommend(ROWS, tolerance=0.1)
    assert name == "small"
    for factor in ("3.6x smaller", "7.0x after gzip", "2.5x as fast", "10.90 against 10.00"):
        assert factor in why
    assert recommend(ROWS, tolerance=0.01)[0] == "big"
    assert recommend(ROWS, tolerance=0.5)[0] == "tiny"


def test_no_file_is_recommended_when_none_is_good_enough():
    name, why = recommend(ROWS, tolerance=0.0)
    assert name is None
    assert "nearest is big" in why
    name, why = recommend(ROWS[:1], tolerance=0.1)
    assert name is None
    assert "export" in why


@pytest.fixture
def report():
    return Report(ROWS, 4096, *recommend(ROWS, 0.1))


def test_all_forms_say_the_same(report):
    page = markdown(report, "Title")
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(rich_table(report))
    table = console.export_text()
    for item in ROWS:
        for cell in cells(item):
            assert cell in page
        for cell in narrow_cells(item):
            assert cell in table
    assert "| **small** |" in page
    assert "4,096 held-out tokens" in page


@pytest.mark.parametrize("width", [80, 150])
def test_the_table_fits_a_terminal(width):
    """The widest numbers and names of a run, and paths as `evaluate` has them."""
    names = ("train", "quantize", "saved_models/python/export/model.tflite")
    size = Size(124_439_808, 124_439_808, 497_759_232, 462_345_678)
    rows = [
        Row(name, "keras", size, Speed(12_345.0, 1e5, 32, 2), 9.1, 12_345.67, 1.0, "train")
        for name in names
    ]
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(rich_table(Report(tuple(rows), 32768, "quantize", "why")))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    (line,) = [line for line in lines if "quantize" in line and "12,345.67" in line]
    assert line.split()[1:9] == ["124", "M", "124", "M", "498", "MB", "462", "MB"]


def test_bits_per_byte_follow_from_the_loss(report):
    assert report.bits_per_byte(ROWS[0]) is None
    assert "bits/byte" not in markdown(report, "Title")
    known = dataclasses.replace(report, bytes_per_token=4.0)
    assert known.bits_per_byte(ROWS[0]) == pytest.approx(2.3 / 0.693147 / 4.0, rel=1e-5)
    first = markdown(known, "Title").splitlines()[4]
    assert first.startswith("| train |")
    assert first.endswith("| 0.830 |")


def test_json_round_trip(report):
    known = dataclasses.replace(report, bytes_per_token=4.0)
    assert Report.from_dict(json.loads(json.dumps(known.to_dict()))) == known
    assert Report.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_human_bytes():
    assert human_bytes(1_234_567) == "1.23 MB"
    assert human_bytes(12_345) == "12 kB"
    numbers = (345, 12_345, 999_999, 1_234_567, 99_960_000, 2.5e9)
    expected = ["0.34 k", "12.3 k", "1.00 M", "1.23 M", "100 M", "2.50 G"]
    assert [three_digits(number) for number in numbers] == expected
