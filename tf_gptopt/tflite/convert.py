"""Export a GPT to a .tflite file: weights, signatures, metadata, checksum.

The file is written operation by operation (`flatbuffer.py`) instead of traced and converted. That
takes a second instead of minutes, and makes exact what a converter decides: the integers are those
that quantization saw, the token table is stored once although it is both gathered from and
multiplied with, and more signatures cost kilobytes because they share all else.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tf_gptopt._errors import UserError
from tf_gptopt._folder import changing
from tf_gptopt._tokenizer import as_tokenizer
from tf_gptopt.compression.quantization.config import QuantConfig
from tf_gptopt.compression.quantization.found_scheme import find_scheme
from tf_gptopt.models.config import GPTConfig
from tf_gptopt.tflite import bundle
from tf_gptopt.tflite.attention import FIXED
from tf_gptopt.tflite.checking import ExportCheck, check_logits, require_good, sample_ids
from tf_gptopt.tflite.flatbuffer import Model
from tf_gptopt.tflite.layers import Weights
from tf_gptopt.tflite.metadata import add_metadata, seal, seal_file
from tf_gptopt.tflite.reading import count_stored, read_weights
from tf_gptopt.tflite.signatures import (
    LOGITS_ROWS,
    add_logits,
    add_step,
    group_heads,
    plan_buckets,
    plan_verifies,
)
from tf_gptopt.tflite.trial import read_logits, try_file
from tf_gptopt.tflite.weights import Ranges, store_weights

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
        scheme: how it is quantized (`QuantConfig.name`).
        signatures: the functions in the file.
        check: how it compares with its Keras model; None when nobody looked.
    """

    path: str
    bytes: int
    parameters: int
    scheme: str
    signatures: tuple[str, ...]
    check: ExportCheck | None = None

    @property
    def bytes_per_parameter(self) -> float:
        return self.bytes / self.parameters


def export_tflite(
    model: GPTModel,
    path: str | os.PathLike,
    quant: QuantConfig | None = None,
    tokenizer: Any = None,
    *,
    calibration: Any = None,
    prefill_lengths: Sequence[int] | None = None,
    decode_capacities: Sequence[int] | None = None,
    verify_lengths: Sequence[int] | None = None,
    check: Any = True,
) -> ExportInfo:
    """Write `model` to a .tflite file that decodes with a KV cache, its tokenizer inside.

    The signatures are described in `tflite/signatures.py`; `tflite.runtime.TFLiteGPT` drives them.
    Before the file gets its name, it and Keras read the same tokens (`tflite/checking.py`). Behind
    the model it holds a ZIP archive (`tflite/bundle.py`): the tokenizer's files, config.json, and
    in made.json how it was made.

    Args:
        model: any `GPTModel`: dense, pruned, with blocks of different shape, with a tied or an own
            head. One that is wrapped for pruning or quantization-aware training is stripped first;
            it is not changed. Weights that are on a grid of the scheme (`quantize`,
            `quantize_aware`) are stored to the bit; others are rounded to the nearest.
        path: where to; replaced atomically, together with the tokenizer. A file of a scheme that is
            not plain int8 or float first runs in a process of its own, because LiteRT aborts where
            others raise.
        quant: the scheme; default the one whose grids the weights lie on, and
            `QuantConfig("int8")` for float weights.
        tokenizer: default `model.tokenizer`. Its files go into the file and into its folder.
        calibration: text for a scheme that looks at some, as `quantize` takes it. Not needed for a
            model that `quantize` or training with static activations has been through.
        prefill_lengths, decode_capacities, verify_lengths: see `signatures.plan_buckets` and
            `plan_verifies`: fixed sizes, each a signature of some 5 kB a block. Default: none, the
            runtime chooses sizes as it goes; with `io="int8"`, for accelerators, fixed ones.
        check: hold the file against its Keras model, and on what: text as `calibration` is, of
            which the first tokens are read. True takes those of `calibration`, or some prose where
            there is a tokenizer, or random ones; False or None looks at nothing. While it looks (a
            second for 124 M parameters), `model` has other weights.

    Raises:
        UserError: for something that is no GPTModel, weights that are not finite, a tokenizer with
            more tokens than the model, impossible lengths, a file beyond 2 GiB, a scheme whose
            calibration is missing, one that LiteRT cannot run, and a file that computes something
            else than its model. Nothing is written then.
    """
    from tf_gptopt.models.checkpoints import named_weights

    plain = quantized = _plain_model(model)
    weights = named_weights(plain)
    quant = quant or find_scheme(weights, plain.activation_ranges is not None) or QuantConfig()
    quant = quant.for_model(plain.config)
    is_ranged = quant.activations == "static" and plain.activation_ranges
    if calibration is not None and not is_ranged:
        from tf_gptopt.compression.quantization.ptq import quantize

        quantized = quantize(plain, quant, calibration)
    tokenizer = as_tokenizer(tokenizer or model.tokenizer)
    _check_tokenizer(tokenizer, plain.config)
    files = bundle.tokenizer_files(tokenizer)
    path = Path(path)
    data, info = build_tflite(
        plain.config,
        weights if quantized is plain else named_weights(quantized),
        quant,
        bundle.load_tokenizer(files) if files else tokenizer,  # as the runtime will read it
        ranges=quantized.activation_ranges,
        prefill_lengths=prefill_lengths,
        decode_capacities=decode_capacities,
        verify_lengths=verify_lengths,
    )
    with changing(path.parent) as new:
        temporary = new / path.name
        temporary.write_bytes(data)
        stored = read_weights(data)
        looks = check is not None and check is not False
        given = calibration if check is True else check
        ids, text = sample_ids(plain.config, given, tokenizer) if looks else (None, "")
        if _needs_trial(quant):
            logits = try_file(temporary, quant.name, ids)
        else:
            logits = read_logits(temporary, ids) if looks else None
        if looks:
            ranges = quantized.activation_ranges
            figures = check_logits(stored, logits, ids, text, plain, weights, quant, ranges)
            require_good(figures, quant.name)
            info = dataclasses.replace(info, check=figures)
        nonzero = count_stored(stored)[1]
        files |= _describe_file(info, plain.config, quant, nonzero)
        bundle.append_files(temporary, files)
        seal_file(temporary)
        if hasattr(tokenizer, "save"):
            tokenizer.save(new)
        return dataclasses.replace(info, path=str(path), bytes=temporary.stat().st_size)


def build_tflite(
    config: GPTConfig,
    weights: dict[str, np.ndarray],
    quant: QuantConfig,
    tokenizer: Any = None,
    *,
    ranges: Ranges | None = None,
    prefill_lengths: Sequence[int] | None = None,
    decode_capacities: Sequence[int] | None = None,
    verify_lengths: Sequence[int] | None = None,
) -> tuple[bytearray, ExportInfo]:
    """The file's bytes, from named weights alone: no TensorFlow takes part, and nothing is tried.

    `ranges` are those of static activations (`GPTModel.activation_ranges`).
    """
    quant = quant.for_model(config)
    parameters = sum(array.size for array in weights.values())
    names = {name.partition("/")[0] for name in weights if name.endswith(("kernel", "embeddings"))}
    quant.layers_to_quantize(names)  # a pattern that matches nothing is an error
    context = config.max_sequence_length
    # for accelerators, which want static shapes, or because somebody chose the shapes
    sizes = prefill_lengths, decode_capacities, verify_lengths
    fixed = quant.io == "int8" or any(given is not None for given in sizes)
    buckets = plan_buckets(context, prefill_lengths, decode_capacities, fixed=fixed)
    verifies = plan_verifies(context, buckets, verify_lengths)
    _check_size(quant, weights)

    file = Model(description="GPT with a KV cache, written by tf_gptopt")
    shared = store_weights(file, config, weights, quant, ranges)
    buckets, verifies = (group_heads(planned, shared) for planned in (buckets, verifies))
    for bucket in (*buckets, *verifies):
        add_step(file, shared, bucket)
    logits_rows = min(LOGITS_ROWS, context)
    logits = add_logits(file, shared, logits_rows, fixed)
    add_metadata(
        file,
        {
            "gpt": config.to_dict(),
            "quantization": quant.to_dict(),
            "parameters": parameters,
            "buckets": [dataclasses.asdict(bucket) for bucket in buckets],
            "verify": [dataclasses.asdict(bucket) for bucket in verifies],
            "logits": {
                "signature": logits,
                "rows": logits_rows,
                "free": not fixed,
                **_describe_logits(shared),
            },
            "cache": _describe_cache(shared),
            "tokenizer": _describe(tokenizer),
        },
    )
    data = file.to_bytes()
    seal(data)
    names = (*(bucket.signature for bucket in (*buckets, *verifies)), logits)
    return data, ExportInfo("", len(data), parameters, quant.name, names)


def _plain_model(model: Any) -> GPTModel:
    """`model` without the wrappers of pruning and quantization-aware training."""
    from tf_gptopt.models.gpt import is_wrapped, require_gpt

    if not is_wrapped(require_gpt(model)):
        return model
    from tf_gptopt.compression.pruning.pruner import strip_pruning
    from tf_gptopt.compression.quantization.qat import is_quantization_aware, strip_quantization

    return strip_quantization(model) if is_quantization_aware(model) else strip_pruning(model)


def _describe_file(
    info: ExportInfo, config: GPTConfig, quant: QuantConfig, nonzero: int
) -> dict[str, bytes]:
    """What a file says about itself to people."""
    made = bundle.how_it_was_made(
        scheme=quant.name,
        quantization=quant.to_dict(),
        parameters=info.parameters,
        nonzero=nonzero,
        check=info.check and info.check.to_dict(),
    )
    values = {bundle.CONFIG_FILE: config.to_dict(), bundle.MADE_FILE: made}
    return {name: bundle.as_json(value) for name, value in values.items()}


def _check_tokenizer(tokenizer: Any, config: GPTConfig) -> None:
    size = getattr(tokenizer, "vocab_size", None)
    if size is not None and size > config.vocab_size:
        raise UserError(
            f"The tokenizer knows {size} tokens and the model {config.vocab_size}: it belongs to "
            "another model. Hand over the one that the model was trained with."
        )


def _check_size(quant: QuantConfig, weights: Mapping[str, np.ndarray]) -> None:
    each = {"float32": 4, "float16": 2, "int8": 1, "int4": 0.5}
    layers = {name: name.partition("/")[0] for name in weights}
    size = sum(weights[name].size * each[quant.weights_of(layers[name])] for name in weights)
    if size > _MOST_BYTES:
        raise UserError(
            f"The weights in {quant.name!r} are {size / 2**30:.1f} GiB, and a .tflite file holds "
            'at most 2 GiB. Export with QuantConfig("int8") or "int4".'
        )


def _needs_trial(quant: QuantConfig) -> bool:
    """Whether LiteRT runs this seldom enough that it may abort."""
    return "int4" in quant.kinds or quant.activations != "dynamic" or quant.kv_cache != "float32"


def _describe_logits(weights: Weights) -> dict[str, Any]:
    if weights.cache != FIXED:
        return {"dtype": "float32"}
    return {"dtype": "int8", **weights.head.output._asdict()}


def _describe_cache(weights: Weights) -> dict[str, Any]:
    layout = "(num_heads, capacity, head_dim)"
    if weights.cache == "float32":
        return {"layout": layout, "dtype": "float32"}
    return {"layout": layout, "dtype": "int8", "scales": weights.cache == "int8"}


def _describe(tokenizer: Any) -> dict[str, Any] | None:
    """What the runtime checks a tokenizer against."""
    if tokenizer is None:
        return None
    names = ("vocab_size", "fingerprint", "eot_id")
    known = {name: getattr(tokenizer, name, None) for name in names}
    if len(ends := getattr(tokenizer, "eot_ids", ())) > 1:
        known["eot_ids"] = list(ends)
    if unused := getattr(tokenizer, "ids_without_token", ()):
        known["ids_without_token"] = list(unused)
    return known
