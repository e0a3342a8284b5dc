"""Sensitivity: every row against the model that really has that one layer changed."""

from __future__ import annotations

import dataclasses
import json
import sys

import numpy as np
import pytest
from rich.console import Console

from tf_gptopt._errors import UserError
from tf_gptopt.compression.pruning.config import PruneConfig
from tf_gptopt.compression.pruning.pruner import prune, strip_pruning
from tf_gptopt.compression.quantization.config import QuantConfig
from tf_gptopt.compression.quantization.mixed import matrix_bytes
from tf_gptopt.compression.quantization.ptq import quantize
from tf_gptopt.evaluation import sensitivity
from tf_gptopt.evaluation.quality import measure_quality
from tf_gptopt.evaluation.sensitivity import measure_sensitivity
from tf_gptopt.evaluation.sensitivity_table import (
    Sensitivity,
    SensitivityRow,
    plot,
    rich_table,
)

OPTIONS = ("int8", "int4", "int4:channel", "prune 50%")
BLOCK = [f"block_0_{name}" for name in ("qkv", "proj", "fc", "out")]


@pytest.fixture
def small(tiny_model):
    """Untied, one block, wide enough for blocks of 32."""
    return tiny_model(num_layers=1, embedding_dim=32, num_heads=4, tie_embeddings=False)


@pytest.fixture
def batches():
    ids = np.random.default_rng(0).integers(0, 61, (3, 2, 13)).astype("int32")
    return [(rows[:, :-1], rows[:, 1:]) for rows in ids]


def test_rows_are_what_the_changed_models_measure(small, batches):
    before = [weight.numpy() for weight in small.weights]
    table = measure_sensitivity(small, batches, OPTIONS)
    rows = {(row.layer, row.option): row for row in table.rows}
    assert len(rows) == 3 * 6 + 4  # the token table and the head are not pruned
    assert list(dict.fromkeys(row.layer for row in table.rows)) == [
        "token_embedding", *BLOCK, "token_logits",
    ]  # fmt: skip
    float_quality = measure_quality(small, batches)
    assert table.loss == pytest.approx(float_quality.loss, rel=1e-5)
    assert table.tokens == 3 * 2 * 12

    for layer, option in [
        ("token_embedding", "int4"),
        ("token_logits", "int4"),
        ("block_0_fc", "int4:channel"),
        ("block_0_out", "prune50"),
    ]:
        if option == "prune50":
            config = PruneConfig(0.5, schedule="constant", layers=(layer,))
            changed = strip_pruning(prune(small, config))
        else:
            changed = quantize(small, QuantConfig("float32", range="mse", layers={layer: option}))
        quality, row = measure_quality(changed, batches), rows[layer, option]
        assert row.loss == pytest.approx(quality.loss, rel=1e-5)
        assert row.loss != pytest.approx(table.loss, abs=1e-5)
        assert row.kl == pytest.approx(measure_quality(changed, batches, small).kl, rel=1e-3)
        assert row.agreement == pytest.approx(quality.agreement(float_quality))
    assert rows["token_embedding", "int4"].bytes == matrix_bytes(61, 32, "int4", 32)
    assert rows["token_logits", "int8"].bytes == matrix_bytes(61, 32, "int8", "channel")
    assert rows["block_0_out", "int4:channel"].bytes == matrix_bytes(32, 128, "int4", "channel")
    assert rows["block_0_out", "prune50"].bytes == 4 * rows["block_0_out", "int8"].weights
    for weight, old in zip(small.weights, before, strict=True):
        np.testing.assert_array_equal(weight.numpy(), old)


def test_coarser_is_worse(tiny_model, batches):
    model = tiny_model(num_layers=1)  # 24 wide: blocks of 32 become channels
    table = measure_sensitivity(model, batches[:1], ("int8", "int4", "prune80"))
    kl = {(row.layer, row.option): row.kl for row in table.rows}
    for layer in BLOCK:
        assert 0 <= kl[layer, "int8"] < kl[layer, "int4"] < kl[layer, "prune80"]


def test_the_graph_is_traced_once(small, batches, monkeypatch):
    probes = []

    class Seen(sensitivity._Probe):
        def __init__(self, *args):
            super().__init__(*args)
            probes.append(self)

    monkeypatch.setattr(sensitivity, "_Probe", Seen)
    measure_sensitivity(small, [batches[0], (batches[1][0][:1], batches[1][1][:1])])
    assert [probe._forward.experimental_get_tracing_count() for probe in probes] == [1]


class Interrupted(Exception):
    pass


def test_an_interrupted_measurement_goes_on(small, batches, tmp_path):
    out, calls = tmp_path / "table.json", []

    def stop(done, total, what):
        if done == 15:
            raise Interrupted

    def note(done, total, what):
        calls.append((done, total))

    whole = measure_sensitivity(small, batches)
    with pytest.raises(Interrupted):
        measure_sensitivity(small, batches, on_progress=stop, out=out)
    with pytest.raises(UserError, match="half measured"):
        Sensitivity.load(out)
    table = measure_sensitivity(small, batches, on_progress=note, out=out)
    assert calls == [(done, 36) for done in range(16, 37)]  # nothing is measured twice
    assert table == whole == Sensitivity.load(out)

    calls.clear()
    assert measure_sensitivity(small, batches, on_progress=note, out=out) == whole
    assert calls == []
    more = measure_sensitivity(small, batches, ("int8", "int4:32"), on_progress=note, out=out)
    assert calls == [(done, 36) for done in range(19, 37)]  # int8 is there
    assert [row for row in more.rows if row.option == "int8"] == [
        row for row in whole.rows if row.option == "int8"
    ]


def test_other_tokens_or_weights_start_again(small, batches, tmp_path):
    out, calls = tmp_path / "table.json", []
    count = lambda done, total, what: calls.append(done)  # noqa: E731
    measure_sensitivity(small, batches, ("int8",), out=out)
    measure_sensitivity(small, batches[:1], ("int8",), on_progress=count, out=out)
    assert len(calls) == 6
    small.base_layer("block_0_fc").kernel.assign_add(np.full((32, 128), 0.01, "float32"))
    measure_sensitivity(small, batches[:1], ("int8",), on_progress=count, out=out)
    assert len(calls) == 12
    config = QuantConfig(range="minmax")
    measure_sensitivity(small, batches[:1], ("int8",), on_progress=count, config=config, out=out)
    assert len(calls) == 18


def test_the_scheme_of_the_options(small, batches):
    config = QuantConfig("int4", granularity="tensor", float_layers=("block_*", "token_logits"))
    (row,) = measure_sensitivity(small, batches, ("int4",), config=config).rows
    assert row.layer == "token_embedding"
    assert row.bytes == matrix_bytes(61, 32, "int4", "tensor")
    changed = quantize(small, config)
    positions = (model.base_layer("position_embedding").embeddings for model in (changed, small))
    next(positions).assign(next(positions))  # which are no layer of the table
    assert row.kl == pytest.approx(measure_quality(changed, batches, small).kl, rel=1e-3)


def test_a_mixed_scheme_from_a_table(small, batches):
    table = measure_sensitivity(small, batches, ("int8", "int4", "int4:channel"))
    config = QuantConfig.from_sensitivity(table, loss=0.02)
    assert quantize(small, config)  # its patterns are names of layers
    assert table.totals(config.layers)[1] <= 0.02


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("int9",), "Did you mean 'int8'"),
        (("int8", "int4:16"), "Unknown option 'int4:16'"),
        (("prune100",), "between 0% and 100%"),
        ((), "at least one option"),
    ],
)
def test_unknown_options(small, batches, options, message):
    with pytest.raises(UserError, match=message):
        measure_sensitivity(small, batches, options)


def test_what_cannot_be_measured(small, batches, tmp_path):
    with pytest.raises(UserError, match="at least one batch"):
        measure_sensitivity(small, [])
    with pytest.raises(UserError, match="model's own tokenizer"):
        measure_sensitivity(small, [(inputs + 10_000, labels) for inputs, labels in batches])
    pruned = prune(small, PruneConfig(0.5, schedule="constant"))
    with pytest.raises(UserError, match="strip_pruning"):
        measure_sensitivity(pruned, batches)
    with pytest.raises(UserError, match="calibration"):
        measure_sensitivity(small, batches, ("prune50",), pruning=PruneConfig(score="wanda"))
    with pytest.raises(UserError, match="No layer is left"):
        measure_sensitivity(small, batches, config=QuantConfig(float_layers="*"))
    notes = tmp_path / "notes.json"
    notes.write_text("[1]")
    with pytest.raises(UserError, match="something else"):
        measure_sensitivity(small, batches, out=notes)
    assert notes.read_text() == "[1]"
    with pytest.raises(UserError, match="no table"):
        Sensitivity.load(notes)


@pytest.fixture
def table():
    rows = [
        SensitivityRow(layer, option, 4096, 4096 // share, 3.0 + kl, kl, 0.97)
        for layer, least in (("block_0_qkv", 1e-5), ("block_0_fc", 2e-4))
        for option, share, kl in (("int8", 1, least), ("int4", 2, 40 * least))
    ]
    return Sensitivity(tuple(rows), 3.0, 8192, QuantConfig("int4", range="mse"))


def test_a_table_survives_files_and_shows_all(table, tmp_path):
    assert Sensitivity.from_dict(json.loads(json.dumps(table.to_dict()))) == table
    table.save(tmp_path / "t.json")
    assert Sensitivity.load(tmp_path / "t.json") == table
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(rich_table(table))
    lines = console.export_text().splitlines()
    places = []
    for row in sorted(table.rows, key=lambda row: row.kl, reverse=True):
        (place,) = [i for i, line in enumerate(lines) if row.layer in line and row.option in line]
        assert f"{row.kl:.6f}" in lines[place]
        places.append(place)
    assert places == sorted(places)  # what hurts most comes first
    with pytest.raises(dataclasses.FrozenInstanceError):
        table.loss = 0.0


def test_totals_of_a_scheme(table):
    assert table.totals({"block_0_qkv": "int4", "block_0_fc": "int8"}) == (
        2048 + 4096,
        pytest.approx(6e-4),
    )
    assert table.totals({"block_0_qkv": "float16"}) == (4 * 4096, 0)  # a layer left out is float16


def test_a_plot(table, tmp_path, monkeypatch):
    plot(table, tmp_path / "p.svg")
    drawn = (tmp_path / "p.svg").read_text()
    assert "<svg" in drawn
    assert all(f"<!-- {name} -->" in drawn for name in ("int8", "int4", "block_0_qkv"))
    with pytest.raises(UserError, match=r"\.svg"):
        plot(table, tmp_path / "p.txt")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"tf-gptopt\[plot\]"):
        plot(table, tmp_path / "q.svg")
