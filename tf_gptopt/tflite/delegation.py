"""Which operations of a .tflite file XNNPACK takes, and which it leaves to LiteRT itself.

LiteRT does not say so, but it shows: XNNPACK runs the operations that it takes as one, and what
they alone see has no memory of its own in LiteRT's interpreter. An operation with such an input or
output was taken. (One that was taken alone, between others that were left, counts as left.)
`python -m tf_gptopt.tflite.delegation FILE` runs a few signatures on zeros and looks, in a process
of its own: a file of somebody else may end it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from tf_gptopt.tflite.child import last_words, run_child

COMMAND = ("-m", "tf_gptopt.tflite.delegation")
_OPERATORS = 10  # where a subgraph's table says where they are: 4 + 2 x its field's number, 3
_TIMEOUT = 300  # seconds
_CODES = {code: name for name, code in vars(schema.BuiltinOperator).items() if name.isupper()}

Taken = dict[str, bool]  # by `operation_key`


def taken_operations(path: str | os.PathLike) -> tuple[Taken, str | None]:
    """Run a .tflite file in a child process to see what XNNPACK takes.

    Returns:
        By `operation_key`, whether XNNPACK takes such operations; those that were not seen to run
        are left out. And why, when some were not.
    """
    try:
        child = run_child(*COMMAND, str(path), timeout=_TIMEOUT)
    except subprocess.TimeoutExpired:
        return {}, f"LiteRT did not run it in {_TIMEOUT} seconds"
    taken: Taken = {}
    for line in child.stdout.splitlines():
        taken.update(json.loads(line))
    if child.returncode == 0:
        return taken, None
    if child.returncode < 0:
        return taken, f"LiteRT ended its process with signal {-child.returncode}"
    (said,) = last_words(child) or ["no reason given"]
    return taken, f"LiteRT cannot run it: {said}"


def operations(model: Any, graph: Any) -> Iterator[tuple[str, str, list[int]]]:
    """Each operation of a subgraph: name, `operation_key`, and its tensors that are computed."""
    tensors = [graph.Tensors(i) for i in range(graph.TensorsLength())]
    constant = [bool(model.Buffers(tensor.Buffer()).DataLength()) for tensor in tensors]
    words = [
        f"{tensor.Type()}:{tensor.ShapeLength()}{'c' * is_constant}"
        for tensor, is_constant in zip(tensors, constant, strict=True)
    ]
    names = [_name(model.OperatorCodes(i)) for i in range(model.OperatorCodesLength())]
    for operator in (graph.Operators(i) for i in range(graph.OperatorsLength())):
        used = [*_ints(operator.InputsAsNumpy()), *_ints(operator.OutputsAsNumpy())]
        name = names[operator.OpcodeIndex()]
        key = " ".join([name, *(words[i] if i >= 0 else "-" for i in used)])
        yield name, key, [i for i in used if i >= 0 and not constant[i]]


def signatures(model: Any) -> list[tuple[str, int]]:
    """Names and subgraphs of all signatures; of a file that has none, its first subgraph."""
    found = [model.SignatureDefs(i) for i in range(model.SignatureDefsLength())]
    return [((s.SignatureKey() or b"").decode(), s.SubgraphIndex()) for s in found] or [("", 0)]


def watch(path: str) -> Iterator[Taken]:
    """Run the smallest signatures that between them hold operations of all keys."""
    data = bytearray(Path(path).read_bytes())
    model = schema.Model.GetRootAsModel(data, 0)
    graphs = {
        name: (index, list(operations(model, model.Subgraphs(index))))
        for name, index in signatures(model)
    }
    seen: set[str] = set()
    for name, (index, found) in sorted(graphs.items(), key=lambda item: len(item[1][1])):
        keys = {key for _, key, _ in found}
        if keys <= seen:
            continue
        seen |= keys
        others = {i for i, _ in graphs.values()} - {index}
        alone = _without(data, [model.Subgraphs(i) for i in others])
        has_memory = _run(alone, name, index, {i for _, _, used in found for i in used})
        taken = dict.fromkeys(keys, False)
        for _, key, used in found:
            taken[key] |= not all(has_memory[i] for i in used)
        yield taken


def _without(data: bytearray, graphs: list[Any]) -> bytes:
    """A file in which these subgraphs hold no operations: XNNPACK would pack their weights too."""
    data = bytearray(data)
    for table in (graph._tab for graph in graphs):
        if at := table.Offset(_OPERATORS):
            length = table.Vector(at) - 4  # a vector's length stands before it
            data[length : length + 4] = (1).to_bytes(4, "little")
    return bytes(data)


def _run(file: bytes, name: str, index: int, tensors: set[int]) -> dict[int, bool]:
    """Which tensors of a signature have memory once it has run on zeros."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_content=file, num_threads=2)
    if name:
        runner = interpreter.get_signature_runner(name)
        runner(**{key: _zeros(detail) for key, detail in runner.get_input_details().items()})
    else:
        interpreter.allocate_tensors()
        for detail in interpreter.get_input_details():
            interpreter.set_tensor(detail["index"], _zeros(detail))
        interpreter.invoke()

    def has_memory(tensor: int) -> bool:
        try:
            interpreter.get_tensor(tensor, index)
        except ValueError:
            return False
        return True

    return {tensor: has_memory(tensor) for tensor in tensors}


def _zeros(detail: dict[str, Any]) -> np.ndarray:
    return np.zeros(detail["shape"], detail["dtype"])


def _name(code: Any) -> str:
    number = max(code.BuiltinCode(), code.DeprecatedBuiltinCode())  # older files have the latter
    name = _CODES.get(number, f"operation {number}")
    return (code.CustomCode() or b"").decode("utf-8", "replace") if name == "CUSTOM" else name


def _ints(array: Any) -> list[int]:
    return [] if isinstance(array, int) else array.tolist()  # 0 for a vector that is not there


if __name__ == "__main__":
    try:
        for part in watch(sys.argv[1]):
            print(json.dumps(part), flush=True)
    except (ValueError, RuntimeError) as error:
        sys.exit(" ".join(str(error).split()))
