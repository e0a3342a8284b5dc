"""Export a GPT to a .tflite file: weights, signatures, metadata, checksum.

The file is written operation by operation (`flatbuffer.py`) instead of traced and converted. That
takes a second instead of minutes, and makes exact what a converter decides: the int8 values are
those that quantization-aware training saw, the token table is stored once although it is both
gathered from and multiplied with, and more signatures cost kilobytes because they share all else.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tf_gptopt._errors import UserError
from tf_gptopt._files import write_bytes
from tf_gptopt.compression.quantization.config import QuantConfig
from tf_gptopt.models.config import GPTConfig
from tf_gptopt.tflite.flatbuffer import Model
from tf_gptopt.tflite.metadata import add_metadata, seal
from tf_gptopt.tflite.signatures import LOGITS_ROWS, add_logits, add_step, plan_buckets
from tf_gptopt.tflite.weights import store_weights

if TYPE_CHECKING:
    import numpy as np

    from tf_gptopt.models.gpt import GPTModel

_MOST_BYTES = 2**31 - 2**20  # flatbuffers address 2 GiB


@dataclasses.dataclass(frozen=True)
class ExportInfo:
    """What was written.

    Args:
        path: the .tflite file.
        bytes: its size.
        parameters: of the model, counted once where tied.
        scheme: how the weights are stored.
        signatures: the functions in the file.
    """

    path: str
    bytes: int
    parameters: int
    scheme: str
    signatures: tuple[str, ...]

    @property
    def bytes_per_parameter(self) -> float:
        return self.bytes / self.parameters


def export_tflite(
    model: GPTModel,
    path: str | os.PathLike,
    quant: QuantConfig | None = None,
    tokenizer: Any = None,
    *,
    prefill_lengths: Sequence[int] | None = None,
    decode_capacities: Sequence[int] | None = None,
) -> ExportInfo:
    """Write `model` to a .tflite file that decodes with a KV cache, and its tokenizer beside it.

    The signatures are described in `tflite/signatures.py`; `tflite.runtime.TFLiteGPT` drives them.

    Args:
        model: any `GPTModel`: dense, pruned, with blocks of different shape, with a tied or an own
            head. One that is wrapped for pruning or quantization-aware training is stripped first;
            it is not changed.
        path: where to; replaced atomically.
        quant: the scheme; default `QuantConfig("int8")`.
        tokenizer: default `model.tokenizer`. Its files go into the folder of `path`, and its
            fingerprint into the file.
        prefill_lengths, decode_capacities: see `signatures.plan_buckets`. Each costs some 5 kB a
            block; a file for one length alone is smaller by a few percent.

    Raises:
        UserError: for something that is no GPTModel, weights that are not finite, a tokenizer with
            more tokens than the model, impossible lengths and a file beyond 2 GiB.
    """
    from tf_gptopt.models.checkpoints import named_weights

    quant = quant or QuantConfig("int8")
    plain = _plain_model(model)
    tokenizer = tokenizer or model.tokenizer
    _check_tokenizer(tokenizer, plain.config)
    path = Path(path)
    data, info = build_tflite(
        plain.config,
        named_weights(plain),
        quant,
        _as_the_runtime_reads(tokenizer),
        prefill_lengths=prefill_lengths,
        decode_capacities=decode_capacities,
    )
    if hasattr(tokenizer, "save"):
        tokenizer.save(path.parent)
    write_bytes(path, data)
    return dataclasses.replace(info, path=str(path))


def build_tflite(
    config: GPTConfig,
    weights: dict[str, np.ndarray],
    quant: QuantConfig,
    tokenizer: Any = None,
    *,
    prefill_lengths: Sequence[int] | None = None,
    decode_capacities: Sequence[int] | None = None,
) -> tuple[bytearray, ExportInfo]:
    """The file's bytes, from named weights alone: no TensorFlow takes part."""
    parameters = sum(array.size for array in weights.values())
    names = {name.partition("/")[0] for name in weights if name.endswith(("kernel", "embeddings"))}
    quant.layers_to_quantize(names)  # a pattern that matches nothing is an error
    context = config.max_sequence_length
    buckets = plan_buckets(context, prefill_lengths, decode_capacities)
    _check_size(quant.weights, parameters)

    file = Model(description="GPT with a KV cache, written by tf_gptopt")
    shared = store_weights(file, config, weights, quant.weights, quant.keeps_float)
    for bucket in buckets:
        add_step(file, shared, bucket)
    logits_rows = min(LOGITS_ROWS, context)
    logits = add_logits(file, shared, logits_rows)
    add_metadata(
        file,
        {
            "gpt": config.to_dict(),
            "quantization": quant.to_dict(),
            "parameters": parameters,
            "buckets": [dataclasses.asdict(bucket) for bucket in buckets],
            "logits": {"signature": logits, "rows": logits_rows},
            "cache": {"layout": "(num_heads, capacity, head_dim)", "dtype": "float32"},
            "tokenizer": _describe(tokenizer),
        },
    )
    data = file.to_bytes()
    seal(data)
    names = (*(bucket.signature for bucket in buckets), logits)
    return data, ExportInfo("", len(data), parameters, quant.weights, names)


def _plain_model(model: Any) -> GPTModel:
    """`model` without the wrappers of pruning and quantization-aware training."""
    from tf_gptopt.models.gpt import require_gpt

    require_gpt(model)
    if not any(hasattr(layer, "layer") for layer in model.layers):
        return model
    from tf_gptopt.compression.pruning.pruner import strip_pruning
    from tf_gptopt.compression.quantization.qat import is_quantization_aware, strip_quantization

    return strip_quantization(model) if is_quantization_aware(model) else strip_pruning(model)


def _as_the_runtime_reads(tokenizer: Any) -> Any:
    """`tokenizer` after a round trip through its files: that is the fingerprint to expect."""
    if not hasattr(tokenizer, "save"):
        return tokenizer
    from tf_gptopt.data.tokenizer import Tokenizer

    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        return Tokenizer.load(folder)


def _check_tokenizer(tokenizer: Any, config: GPTConfig) -> None:
    size = getattr(tokenizer, "vocab_size", None)
    if size is not None and size > config.vocab_size:
        raise UserError(
            f"The tokenizer knows {size} tokens and the model {config.vocab_size}: it belongs to "
            "another model. Hand over the one that the model was trained with."
        )


def _check_size(scheme: str, parameters: int) -> None:
    size = parameters * {"float32": 4, "float16": 2}.get(scheme, 1)
    if size > _MOST_BYTES:
        raise UserError(
            f"{parameters:,} parameters in {scheme} are {size / 2**30:.1f} GiB, and a .tflite file "
            'holds at most 2 GiB. Export with QuantConfig("int8").'
        )


def _describe(tokenizer: Any) -> dict[str, Any] | None:
    """What the runtime checks a tokenizer against."""
    if tokenizer is None:
        return None
    names = ("vocab_size", "fingerprint", "eot_id")
    return {name: getattr(tokenizer, name, None) for name in names}
