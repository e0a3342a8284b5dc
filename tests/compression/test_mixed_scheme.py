"""Mixed schemes against every combination there is, and against their budgets."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tf_gptopt._errors import UserError
from tf_gptopt.compression.quantization import mixed
from tf_gptopt.compression.quantization.config import QuantConfig
from tf_gptopt.compression.quantization.mixed import Choice, cheapest, lightest, matrix_bytes
from tf_gptopt.evaluation.sensitivity_table import Sensitivity, SensitivityRow

COSTS = st.floats(0, 1, allow_subnormal=False)
GROUPS = st.lists(
    st.lists(st.builds(Choice, st.just("x"), st.integers(1, 40), COSTS), min_size=1, max_size=4),
    min_size=1,
    max_size=5,
)


def size(choices) -> int:
    return sum(choice.bytes for choice in choices)


def cost(choices) -> float:
    return sum(choice.cost for choice in choices)


@settings(max_examples=200, deadline=None)
@given(GROUPS, st.floats(0, 1))
def test_no_combination_within_the_bytes_costs_less(groups, share) -> None:
    every = list(itertools.product(*groups))
    sizes = [size(choices) for choices in every]
    budget = min(sizes) + int(share * (max(sizes) - min(sizes)))
    picked = cheapest(groups, budget)
    assert all(choice in group for choice, group in zip(picked, groups, strict=True))
    assert size(picked) <= budget
    best = min(cost(choices) for choices in every if size(choices) <= budget)
    assert cost(picked) == pytest.approx(best, abs=1e-9)


@settings(max_examples=200, deadline=None)
@given(GROUPS, st.floats(0, 1))
def test_no_combination_within_the_cost_is_smaller(groups, share) -> None:
    every = list(itertools.product(*groups))
    costs = [cost(choices) for choices in every]
    budget = min(costs) + share * (max(costs) - min(costs)) + 1e-9
    picked = lightest(groups, budget)
    assert cost(picked) <= budget + 1e-9
    assert size(picked) == min(size(c) for c in every if cost(c) <= budget)


def test_many_layers_stay_near_the_best(monkeypatch) -> None:
    """States merged down to 200: the budget is kept, and little of it is lost."""
    groups = [
        [
            Choice("int4", 1000 + 37 * i, (i % 7 + 1) / 10),
            Choice("int8", 2000 + 71 * i, (i % 7 + 1) / 150),
        ]
        for i in range(60)
    ]
    budget = 1.3 * sum(group[0].bytes for group in groups)
    exact = cheapest(groups, budget)
    smallest = lightest(groups, cost(exact))
    monkeypatch.setattr(mixed, "MOST_STATES", 200)
    near = cheapest(groups, budget)
    assert cost(exact) <= cost(near) <= 1.1 * cost(exact)
    assert size(near) <= budget
    light = lightest(groups, cost(exact))
    assert cost(light) <= cost(exact) + 1e-9
    assert size(smallest) <= size(light) <= 1.1 * size(smallest)
    least = size(group[0] for group in groups)
    assert size(cheapest(groups, least)) == least  # the tightest budget is still met


def table(**changes) -> Sensitivity:
    """Three layers: the table is sensitive, `b` hardly, `c` not at all."""
    kl = {
        "a": {"int8": 0.001, "int4": 0.9, "int4:128": 1.0, "prune50": 5.0},
        "b": {"int8": 0.0005, "int4": 0.01, "int4:128": 0.02, "prune50": 2.0},
        "c": {"int8": 1e-6, "int4": 1e-5, "int4:128": 2e-5, "prune50": 1.0},
    }
    width = {"int8": (8, "channel"), "int4": (4, 32), "int4:128": (4, 128)}
    rows = []
    for layer, height in (("a", 8), ("b", 64), ("c", 128)):
        for option, value in kl[layer].items():
            kind, group = f"int{width.get(option, (8,))[0]}", width.get(option, (8, "channel"))[1]
            size = matrix_bytes(height, 128, kind, group)
            rows.append(SensitivityRow(layer, option, 128 * height, size, 3 + value, value, 0.9))
    return Sensitivity(tuple(rows), 3.0, 1000, QuantConfig(range="mse", **changes))


def test_the_size_of_uniform_int4_goes_where_it_hurts() -> None:
    found = table()
    config = QuantConfig.from_sensitivity(found, bytes=1.0)
    assert config.layers == {"a": "int8", "b": "int4", "c": "int4:128"}
    uniform = dict.fromkeys("abc", "int4")
    assert found.totals(config.layers)[0] <= found.totals(uniform)[0]
    assert found.totals(config.layers)[1] < found.totals(uniform)[1] / 10
    assert (config.weights, config.range) == ("int4", "mse")
    assert [config.group_of(name, 128) for name in "abc"] == ["channel", 32, 128]
    assert QuantConfig.from_dict(config.to_dict()) == config


def test_budgets_of_bytes_and_of_loss() -> None:
    found = table()
    everything = QuantConfig.from_sensitivity(found, bytes=10**6)
    assert set(everything.layers.values()) == {"float16"}
    exact = found.totals(dict.fromkeys("abc", "int8"))[0]
    config = QuantConfig.from_sensitivity(found, bytes=exact)
    assert found.totals(config.layers)[0] <= exact
    strict = QuantConfig.from_sensitivity(found, loss=0.0021)
    assert strict.layers == {"a": "int8", "b": "int8", "c": "int4:128"}
    loose = QuantConfig.from_sensitivity(found, loss=0.0, rounding="gptq", kv_cache="int8")
    assert set(loose.layers.values()) == {"float16"}
    assert (loose.rounding, loose.kv_cache) == ("gptq", "int8")


def test_a_lucky_loss_is_not_spent() -> None:
    row = SensitivityRow("a", "int4", 100, 50, 2.0, 0.3, 0.9)  # lower than the float model's
    found = Sensitivity((row,), 3.0, 10)
    assert QuantConfig.from_sensitivity(found, loss=0.29).layers == {"a": "float16"}
    assert QuantConfig.from_sensitivity(found, loss=0.31).layers == {"a": "int4"}


def test_float_layers_and_the_scheme_of_the_table_are_kept() -> None:
    config = QuantConfig.from_sensitivity(table(float_layers=("z",)), bytes=1.0)
    assert config.float_layers == ("z",)
    blocks = {"weights": "int4", "granularity": 32}
    loose = QuantConfig.from_sensitivity(table(**blocks), bytes=10**6)
    assert (loose.weights, loose.granularity) == ("float16", None)
    assert QuantConfig.from_sensitivity(table(**blocks), bytes=1.0).granularity == 32


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({}, "Name one budget"),
        ({"bytes": 1.0, "loss": 0.1}, "Name one budget"),
        ({"bytes": 100}, "13,200 bytes at least"),
        ({"bytes": 0.5}, "13,200 bytes at least"),
        ({"bytes": -1.0}, "a number of bytes"),
        ({"bytes": True}, "a number of bytes"),
        ({"loss": -0.1}, "rises by 0 at least"),
        ({"bytes": 1.0, "granularity": 48}, "Unknown granularity"),
    ],
)
def test_budgets_that_cannot_be_met(budget, message) -> None:
    with pytest.raises(UserError, match=message):
        QuantConfig.from_sensitivity(table(), **budget)


def test_a_fraction_needs_int4_and_a_table_needs_rows() -> None:
    found = table()
    rows = tuple(row for row in found.rows if row.option != "int4")
    with pytest.raises(UserError, match="Measure that option too"):
        QuantConfig.from_sensitivity(Sensitivity(rows, 3.0, 10), bytes=1.0)
    with pytest.raises(UserError, match="no rows"):
        QuantConfig.from_sensitivity(Sensitivity((), 3.0, 10), bytes=10)


def test_bytes_of_matrices() -> None:
    assert matrix_bytes(10, 64, "float32", "channel") == 10 * 64 * 4
    assert matrix_bytes(10, 64, "float16", "channel") == 10 * 64 * 2
    assert matrix_bytes(10, 64, "int8", "channel") == 10 * 64 + 10 * 12
    assert matrix_bytes(10, 64, "int8", "tensor") == 10 * 64 + 12
    assert matrix_bytes(10, 64, "int4", 32) == 10 * 32 + 10 * 2 * 2


def test_no_tensorflow_is_loaded(run_child) -> None:
    code = """
        import sys
        from tf_gptopt.compression.quantization.config import QuantConfig
        from tf_gptopt.evaluation.sensitivity_table import Sensitivity, SensitivityRow
        row = SensitivityRow("a", "int4", 100, 50, 3.1, 0.1, 0.9)
        QuantConfig.from_sensitivity(Sensitivity((row,), 3.0, 10), bytes=1.0)
        print(sorted({"tensorflow", "tf_keras", "matplotlib"} & set(sys.modules)))
    """
    assert run_child(code, devices=0).strip() == "[]"
