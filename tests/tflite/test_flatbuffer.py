"""What the writer writes, LiteRT computes; what is equal is in the file once."""

from __future__ import annotations

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

from tf_gptopt.compression.quantization.grids import Grid
from tf_gptopt.tflite.flatbuffer import Model
from tf_gptopt.tflite.litert import aligned_zeros, host_buffer, load_litert
from tf_gptopt.tflite.reading import count_weights, read_weights
from tf_gptopt.tflite.tensors import Affine, pack_int4, unpack_int4

RNG = np.random.default_rng(0)


def numbers(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def run(tmp_path, model, signature, **inputs):
    """Outputs of one signature, by name, flat."""
    path = tmp_path / "model.tflite"
    path.write_bytes(model.to_bytes())
    litert = load_litert(path, 1, "none")
    names = litert.get_signature_list()[signature]
    arrays = {}
    for name, value in inputs.items():
        arrays[name] = aligned_zeros(value.shape, value.dtype)
        arrays[name][:] = value
    details = litert.get_output_tensor_details(signature)
    outputs = {
        name: aligned_zeros(tuple(details[name]["shape"]), np.dtype(details[name]["dtype"]))
        for name in names["outputs"]
    }
    litert.run_by_index(
        litert.get_signature_index(signature),
        [host_buffer(arrays[name]) for name in names["inputs"]],
        [host_buffer(array) for array in outputs.values()],
    )
    return outputs


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


X, Y = numbers(4, 6), numbers(3, 4, 6)
ROW = numbers(1, 6)
OPERATIONS = {
    "add": (lambda g, x, y: y + g.reshape(x, [1, 4, 6]), Y + X),
    "subtract a constant row": (lambda g, x, y: x - g.model.constant(ROW), X - ROW),
    "multiply": (lambda g, x, y: y * g.reshape(x, [1, 4, 6]), Y * X),
    "minimum": (
        lambda g, x, y: g.elementwise("MINIMUM", x, g.model.constant(ROW)),
        np.minimum(X, ROW),
    ),
    "divide": (lambda g, x, y: x / g.model.constant(ROW), X / ROW),
    "maximum": (
        lambda g, x, y: g.elementwise("MAXIMUM", x, g.model.constant(ROW)),
        np.maximum(X, ROW),
    ),
    "largest magnitude": (lambda g, x, y: g.max(g.abs(y)), np.abs(Y).max(-1, keepdims=True)),
    "to int8 and back": (
        lambda g, x, y: g.dequantize(g.quantize(x, Affine(0.01, 3))),
        (np.clip(np.rint(X / np.float32(0.01)) + 3, -128, 127) - 3) * np.float32(0.01),
    ),
    "add int8": (
        lambda g, x, y: g.dequantize(
            g.elementwise(
                "ADD", g.quantize(x, Affine(2.0)), g.quantize(x, Affine(1.0)), Affine(1.0)
            )
        ),
        np.rint(X) + 2 * np.rint(X / 2),
    ),
    "mean": (lambda g, x, y: g.mean(x), X.mean(-1, keepdims=True)),
    "rsqrt": (lambda g, x, y: g.rsqrt(x * x), 1 / np.abs(X)),
    "gelu": (
        lambda g, x, y: g.gelu(x),
        0.5 * X * (1 + np.tanh(np.sqrt(2 / np.pi) * (X + 0.044715 * X**3))),
    ),
    "softmax": (lambda g, x, y: g.softmax(x), softmax(X)),
    "transpose": (lambda g, x, y: g.transpose(y, [1, 0, 2]), Y.transpose(1, 0, 2)),
    "second third": (lambda g, x, y: g.split(x, 3, axis=1)[1], X[:, 2:4]),
    "slice": (lambda g, x, y: g.slice(y, [1, 0, 2], [2, 4, 3]), Y[1:, :, 2:5]),
    "part": (lambda g, x, y: g.part(y, 1, 2), Y[1:3]),
    "concatenate": (lambda g, x, y: g.concatenate([x, x], axis=1), np.concatenate([X, X], 1)),
    "concatenate many": (
        lambda g, x, y: g.concatenate([g.part(x, i, 1) for i in (3, 2, 1, 0, 1, 2, 3)], axis=0),
        X[[3, 2, 1, 0, 1, 2, 3]],
    ),
    "matmul": (lambda g, x, y: g.matmul(y, g.transpose(y, [0, 2, 1])), Y @ Y.transpose(0, 2, 1)),
    "matmul transposed": (
        lambda g, x, y: g.matmul(y, y, transpose_b=True),
        Y @ Y.transpose(0, 2, 1),
    ),
    "cast": (lambda g, x, y: g.cast(g.cast(x, np.int32), np.float32), np.trunc(X)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation(tmp_path, name):
    build, expected = OPERATIONS[name]
    model = Model()
    g = model.graph("f")
    x, y = g.reshape(g.input("x", [24]), [4, 6]), g.reshape(g.input("y", [72]), [3, 4, 6])
    result = build(g, x, y)
    g.output("z", result)
    z = run(tmp_path, model, "f", x=X.reshape(-1), y=Y.reshape(-1))["z"]
    assert result.shape == expected.shape
    np.testing.assert_allclose(z, expected, atol=2e-6, rtol=2e-6)


def test_products_and_look_ups_with_a_float_table(tmp_path):
    table, bias = numbers(7, 6), numbers(7)
    model = Model()
    weights = model.constant(table, "table")
    g = model.graph("f")
    x = g.embedding_lookup(g.input("ids", [3], np.int32), weights)
    g.output("rows", x)
    g.output("products", g.dense(x, weights, model.constant(bias, "bias")))
    ids = np.array([6, 0, 6], np.int32)
    outputs = run(tmp_path, model, "f", ids=ids)
    np.testing.assert_array_equal(outputs["rows"], table[ids])
    np.testing.assert_allclose(outputs["products"], table[ids] @ table.T + bias, rtol=1e-5)


def test_products_and_look_ups_with_a_float16_table(tmp_path):
    table = numbers(7, 6).astype(np.float16)
    model = Model()
    weights = model.constant(table, "table")
    g = model.graph("f")
    x = g.cast(g.embedding_lookup(g.input("ids", [3], np.int32), weights), np.float32)
    g.output("products", g.dense(x, g.dequantize(weights)))
    ids = np.array([6, 0, 6], np.int32)
    wide = table.astype(np.float32)
    products = run(tmp_path, model, "f", ids=ids)["products"]
    np.testing.assert_allclose(products, wide[ids] @ wide.T, rtol=1e-5)


def test_products_and_look_ups_with_an_int8_table(tmp_path):
    integers = RNG.integers(-127, 128, (7, 6), dtype=np.int8)
    scales = RNG.uniform(0.01, 0.1, 7).astype(np.float32)
    model = Model()
    weights = model.constant(integers, "table", scales)
    g = model.graph("f")
    x = g.embedding_lookup(g.input("ids", [3], np.int32), weights)
    g.output("rows", x)
    g.output("products", g.dense(x, weights))
    ids = np.array([6, 0, 6], np.int32)
    outputs = run(tmp_path, model, "f", ids=ids)
    table = integers * scales[:, None]
    np.testing.assert_array_equal(outputs["rows"], table[ids])
    # each row of x is rounded to 256 steps between its extremes and 0
    step = (np.maximum(table[ids].max(1), 0) - np.minimum(table[ids].min(1), 0)) / 255
    most = step[:, None] / 2 * np.abs(table).sum(1)[None] * 1.01
    assert (np.abs(outputs["products"] - table[ids] @ table.T) <= most).all()


@pytest.mark.parametrize(
    ("rows", "width", "blocks"), [(7, 6, 0), (7, 6, 1), (5, 64, 2), (3, 128, 1), (1, 1, 0)]
)
def test_products_look_ups_and_reading_of_an_int4_table(tmp_path, rows, width, blocks):
    """One scale for all, one a row, and one a block of 32 or more."""
    integers = RNG.integers(-8, 8, (rows, width), dtype=np.int8)
    shape = (rows if blocks else 1, max(blocks, 1))
    scales = RNG.uniform(0.01, 0.1, shape).astype(np.float16).astype(np.float32)
    grid = Grid(integers, scales, bits=4)
    model = Model()
    weights = model.grid(grid, "table")
    g = model.graph("f")
    x = g.embedding_lookup(g.input("ids", [2], np.int32), weights)
    g.output("rows", x)
    g.output("products", g.dense(x, weights))
    ids = np.array([rows - 1, 0], np.int32)
    outputs = run(tmp_path, model, "f", ids=ids)
    table = grid.values()
    np.testing.assert_array_equal(outputs["rows"], table[ids])
    step = (np.maximum(table[ids].max(1), 0) - np.minimum(table[ids].min(1), 0)) / 255
    most = step[:, None] / 2 * np.abs(table).sum(1)[None] * 1.01
    assert (np.abs(outputs["products"] - table[ids] @ table.T) <= most + 1e-6).all()
    data = model.to_bytes()
    values, stored = read_weights(data)["table"]
    np.testing.assert_array_equal(values, integers)
    np.testing.assert_array_equal(stored.reshape(shape), scales)
    assert count_weights(data) == (rows * width, np.count_nonzero(integers))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("is_one", [False, True])
def test_integer_products_with_fixed_scales_are_exact(tmp_path, bits, is_one):
    most = 127 if bits == 8 else 7
    integers = RNG.integers(-most, most + 1, (9, 6), dtype=np.int8)
    scales = RNG.uniform(0.01, 0.1, (1 if is_one else 9, 1)).astype(np.float32)
    bias = RNG.integers(-50, 50, 9).astype(np.int32)
    model = Model()
    before, after = Affine(0.5, -7), Affine(scales.max() * most / 2, 11)
    kernel = model.grid(Grid(integers, scales, bits), "kernel")
    unit = scales[:, 0] * np.float32(before.scale)
    g = model.graph("f")
    x = g.quantize(g.reshape(g.input("x", [24]), [4, 6]), before)
    g.output("y", g.dense(x, kernel, model.constant(bias, "bias", unit), after))
    y = run(tmp_path, model, "f", x=10 * X.reshape(-1))["y"]
    steps = np.clip(np.rint(10 * X / np.float32(0.5)) - 7, -128, 127) + 7
    sums = (steps @ integers.T.astype(float) + bias) * unit / after.scale + 11
    assert np.ptp(y.astype(int)) > 20
    np.testing.assert_array_equal(y, np.clip(np.rint(sums), -128, 127))


def test_unpacking_is_packing_backwards():
    for size in (1, 2, 7, 16):
        integers = RNG.integers(-8, 8, size, dtype=np.int8)
        assert pack_int4(integers).nbytes == (size + 1) // 2
        np.testing.assert_array_equal(unpack_int4(pack_int4(integers), (size,)), integers)


def test_blocks_are_never_dequantized():
    """LiteRT makes zeros of them without a word."""
    model = Model()
    grid = Grid(np.ones((2, 64), np.int8), np.ones((2, 2), np.float32), bits=4)
    with pytest.raises(AssertionError):
        model.graph("f").dequantize(model.grid(grid, "table"))


def test_a_constant_is_stored_once_for_all_graphs_and_uses():
    model = Model()
    table = model.constant(np.zeros((100, 64), np.int8), "table", np.ones(100, np.float32))
    for i in range(5):
        g = model.graph(f"f{i}")
        x = g.embedding_lookup(g.input("ids", [3], np.int32), table)
        g.output("y", g.dense(x, table))
    data = model.to_bytes()
    assert 100 * (64 + 4 + 8) < len(data) < 100 * (64 + 4 + 8) + 3000
    assert count_weights(data) == (6400, 0)
    values, scales = read_weights(data)["table"]
    assert values.shape == (100, 64)
    assert scales.shape == (100,)


def test_buffers_start_at_multiples_of_16():
    model = Model()
    g = model.graph("f")
    x = g.input("x", [1, 3])
    for size in (1, 2, 3, 5, 7):
        x = g.concatenate([x, g.part(x * model.constant(numbers(1, 1), f"c{size}"), 0, 1)], axis=1)
        model.metadata(f"m{size}", bytes(size))
    g.output("y", x)
    data = model.to_bytes()
    start = np.frombuffer(data, np.uint8).ctypes.data
    root = schema.Model.GetRootAsModel(data, 0)
    buffers = [root.Buffers(i).DataAsNumpy() for i in range(root.BuffersLength())]
    filled = [b for b in buffers if not isinstance(b, int)]
    assert len(filled) > 8
    assert {(b.ctypes.data - start) % 16 for b in filled} == {0}


def test_an_id_outside_the_table_is_an_error_at_run_time(tmp_path):
    model = Model()
    table = model.constant(numbers(7, 6), "table")
    g = model.graph("f")
    g.output("rows", g.embedding_lookup(g.input("ids", [1], np.int32), table))
    with pytest.raises(RuntimeError):
        run(tmp_path, model, "f", ids=np.array([7], np.int32))
