"""What is in a .tflite file: functions, operations, bytes by what they are for, second copies.

Any .tflite file can be looked at; of those of this package more is known. No TensorFlow takes part.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from tf_gptopt._errors import UserError
from tf_gptopt.compression.quantization.config import QuantConfig
from tf_gptopt.tflite import bundle, metadata
from tf_gptopt.tflite.delegation import Taken, operations, signatures, taken_operations
from tf_gptopt.tflite.duplicates import equal_buffers, two_forms
from tf_gptopt.tflite.reading import block_scales, constants, read_weights, tensor_name

_TYPES = {code: name.lower() for name, code in vars(schema.TensorType).items() if name.isupper()}

# What a constant is for, by its name in the files of this package; the first that matches.
_KINDS = {
    "token table": r"token_embedding/embeddings",
    "positions": r"position_embedding/embeddings",
    "output head": r"token_logits/kernel",
    "attention matrices": r"block_\d+_(qkv|proj)/kernel",
    "MLP matrices": r"block_\d+_(fc|out)/kernel",
    "norms": r".*_norm/(gamma|beta)",
    "biases": r".*/bias",
}
_SCALES, _METADATA, _GRAPH, _ARCHIVE = "scales", "metadata", "graph structure", "archive"


@dataclasses.dataclass(frozen=True)
class Signature:
    """A function of a file.

    Args:
        name: its signature.
        tokens, capacity: how many tokens it reads, over a cache of how many rows; None elsewhere.
        operations: how many of each kind.
        left: those of them that XNNPACK leaves to LiteRT's own kernels; None where not known.
    """

    name: str
    tokens: int | None
    capacity: int | None
    operations: dict[str, int]
    left: dict[str, int] | None

    @property
    def taken(self) -> int | None:
        """How many operations XNNPACK takes."""
        return (
            None if self.left is None else sum(self.operations.values()) - sum(self.left.values())
        )


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What is in a .tflite file.

    Args:
        path, bytes: the file.
        is_ours: whether this package wrote it; what only those files say is None in others.
        checksum: `"ok"`, `"wrong"`, or None of a file that has none.
        scheme: how it is quantized.
        parameters: of the model.
        numbers, nonzero: in the named constants, and those that are not zero.
        signatures: its functions.
        xnnpack: why it is not known what XNNPACK takes, or None.
        sizes: bytes by what they are for; their sum is `bytes`.
        twice: what is stored more than once, as `(what, bytes that could be saved)`.
        tokenizer: where it is ("inside", "beside" or None), vocab_size, fingerprint and eot_id.
        files: sizes of the files in its archive, unpacked.
        made: how it was made (`made.json`).
    """

    path: str
    bytes: int
    is_ours: bool
    checksum: str | None
    scheme: str | None
    parameters: int | None
    numbers: int
    nonzero: int
    signatures: tuple[Signature, ...]
    xnnpack: str | None
    sizes: dict[str, int]
    twice: tuple[tuple[str, int], ...]
    tokenizer: dict[str, Any] | None
    files: dict[str, int]
    made: dict[str, Any] | None

    @property
    def bytes_per_parameter(self) -> float | None:
        return self.bytes / self.parameters if self.parameters else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        rows = [{**dataclasses.asdict(s), "taken": s.taken} for s in self.signatures]
        ratio = self.bytes_per_parameter
        return {**dataclasses.asdict(self), "signatures": rows, "bytes_per_parameter": ratio}


def inspect_tflite(path: str | os.PathLike, *, run: bool = True) -> Inspection:
    """Look into a .tflite file.

    Args:
        path: the file, of this package or of anybody else.
        run: run it on zeros, in a child process, to see what XNNPACK takes (5 s for 124 M
            parameters).

    Raises:
        UserError: when it does not exist, is not a .tflite file, or is so damaged that it cannot be
            read.
    """
    path = Path(path)
    known, checksum = _read_metadata(path)
    files = bundle.read_files(path)
    taken, why = taken_operations(path) if run else ({}, "it was not asked for")
    try:
        data = memoryview(np.memmap(path, np.uint8, "r"))
        model = schema.Model.GetRootAsModel(data, 0)
        weights = read_weights(data)
        found = tuple(_signatures(model, known, taken))
        sizes = _sizes(model, path, len(data))
    except Exception as error:  # offsets that point anywhere end in any kind of error
        raise UserError(
            f"{path} is damaged, or of a kind that this version does not know "
            f"({type(error).__name__}: {error}). Copy or export it again."
        ) from None
    made = files.get(bundle.MADE_FILE)
    return Inspection(
        path=str(path),
        bytes=len(data),
        is_ours=known is not None,
        checksum=checksum,
        scheme=_scheme(known),
        parameters=known and known["parameters"],
        numbers=sum(values.size for values, _ in weights.values()),
        nonzero=sum(int(np.count_nonzero(values)) for values, _ in weights.values()),
        signatures=found,
        xnnpack=why,
        sizes=sizes,
        twice=(*equal_buffers(model), *two_forms(weights)),
        tokenizer=_tokenizer(path, known, files),
        files={name: len(content) for name, content in files.items()},
        made=made and json.loads(made),
    )


def _read_metadata(path: Path) -> tuple[dict[str, Any] | None, str | None]:
    """What a file of ours says about itself, and how its checksum is."""
    try:
        return metadata.read_metadata(path), "ok"
    except metadata.ForeignFile:
        return None, None
    except metadata.DamagedFile:
        try:
            return metadata.read_metadata(path, verify=False), "wrong"
        except metadata.DamagedFile:
            return None, "wrong"


def _scheme(known: dict[str, Any] | None) -> str | None:
    if known is None:
        return None
    values = known["quantization"]
    try:
        return QuantConfig.from_dict(values).name
    except UserError:  # of an older or a newer version
        return values.get("scheme") or values.get("weights")


def _signatures(model: Any, known: dict[str, Any] | None, taken: Taken) -> Any:
    listed = [*known["buckets"], *known.get("verify", ())] if known else []
    buckets = {bucket["signature"]: bucket for bucket in listed}
    for name, index in signatures(model):
        found = list(operations(model, model.Subgraphs(index)))
        left = Counter(kind for kind, key, _ in found if not taken.get(key))
        is_known = all(key in taken for _, key, _ in found)
        bucket = buckets.get(name, {})
        yield Signature(
            name,
            bucket.get("tokens"),
            bucket.get("capacity"),
            dict(Counter(kind for kind, _, _ in found).most_common()),
            dict(left.most_common()) if is_known else None,
        )


def _sizes(model: Any, path: Path, total: int) -> dict[str, int]:
    """Every byte of the file, by what it is for."""
    kinds = {model.Metadata(i).Buffer(): _METADATA for i in range(model.MetadataLength())}
    scales: dict[int, int] = {}  # sizes by address: tensors share them
    for graph, tensor in constants(model):
        quantization = tensor.Quantization()
        if quantization is not None:
            for array in (quantization.ScaleAsNumpy(), quantization.ZeroPointAsNumpy()):
                if not isinstance(array, int):
                    scales[array.ctypes.data] = array.nbytes
            if (blocks := block_scales(graph, quantization)) is not None:
                kinds[blocks.Buffer()] = _SCALES
        kinds.setdefault(tensor.Buffer(), _kind(tensor))
    sizes = Counter({_SCALES: sum(scales.values())})
    for buffer, kind in kinds.items():
        sizes[kind] += model.Buffers(buffer).DataLength()
    sizes[_ARCHIVE] = total - bundle.archive_start(path)
    sizes[_GRAPH] = total - sum(sizes.values())
    order = [*_KINDS, *sorted(kind for kind in sizes if kind not in _KINDS)]
    return {kind: sizes[kind] for kind in order if sizes[kind]}


def _kind(tensor: Any) -> str:
    fits = (kind for kind, pattern in _KINDS.items() if re.fullmatch(pattern, tensor_name(tensor)))
    return next(fits, f"other {_TYPES.get(tensor.Type(), 'numbers')}")


def _tokenizer(
    path: Path, known: dict[str, Any] | None, files: Mapping[str, bytes]
) -> dict[str, Any] | None:
    if known is None or not known["tokenizer"]:
        return None
    is_beside = (path.parent / bundle.TOKENIZER_FILE).is_file()
    where = "inside" if bundle.TOKENIZER_FILE in files else "beside" if is_beside else None
    return {"where": where, **known["tokenizer"]}
