"""The report: what it recommends and why, and that its three forms say the same."""

import json

import pytest
from rich.console import Console

from tf_gptopt.evaluation.report import (
    Report,
    Row,
    cells,
    human_bytes,
    markdown,
    recommend,
    rich_table,
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
            assert cell in table
    assert "| **small** |" in page
    assert "4,096 held-out tokens" in page


def test_json_round_trip(report):
    assert Report.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_human_bytes():
    assert human_bytes(1_234_567) == "1.23 MB"
    assert human_bytes(12_345) == "12 kB"
