"""Hugging Face GPT-2 checkpoints <-> our names.

Source of the layout: `transformers` GPT2LMHeadModel. Its Conv1D keeps kernels as (in, out), as
Keras does, so only names change; the output table of an untied model is transposed.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tf_gptopt._errors import UserError
from tf_gptopt._files import read_json
from tf_gptopt.models.config import ACTIVATIONS, GPTConfig
from tf_gptopt.models.safetensors_file import read_tensors

# Options whose other values change what the model computes, in ways that ours cannot.
_REQUIRED = {"add_cross_attention": False, "is_encoder_decoder": False}
_ACTIVATIONS = {name: name for name in ACTIVATIONS} | {"gelu_pytorch_tanh": "gelu_new"}
_OTHER_NAMES = {  # as transformers' GPT2Config has them
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
}

_TOP = {
    "wte.weight": "token_embedding/embeddings",
    "wpe.weight": "position_embedding/embeddings",
    "ln_f.weight": "final_norm/gamma",
    "ln_f.bias": "final_norm/beta",
}
_BLOCK = {
    "ln_1.weight": "attention_norm/gamma",
    "ln_1.bias": "attention_norm/beta",
    "attn.c_attn.weight": "qkv/kernel",
    "attn.c_attn.bias": "qkv/bias",
    "attn.c_proj.weight": "proj/kernel",
    "attn.c_proj.bias": "proj/bias",
    "ln_2.weight": "mlp_norm/gamma",
    "ln_2.bias": "mlp_norm/beta",
    "mlp.c_fc.weight": "fc/kernel",
    "mlp.c_fc.bias": "fc/bias",
    "mlp.c_proj.weight": "out/kernel",
    "mlp.c_proj.bias": "out/bias",
}
_BLOCK_NAME = re.compile(r"h\.(\d+)\.(.+)")
_BUFFERS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # causal masks of old versions


def read_gpt2(folder: Path, config: dict[str, Any]) -> tuple[GPTConfig, dict[str, np.ndarray]]:
    """Shape and weights, by our names, of a folder with model.safetensors (or its shards).

    Raises:
        UserError: for another architecture, an unsupported option, and missing or damaged files.
    """
    shape = shape_of(config)  # judged before a tensor is read
    tensors = {
        name.removeprefix("transformer."): tensor for name, tensor in _read_all(folder).items()
    }
    head = tensors.pop("lm_head.weight", None)
    weights = {}
    for name, tensor in tensors.items():
        ours = _our_name(name)
        if ours is not None:
            weights[ours] = tensor
    table = weights.get("token_embedding/embeddings")
    tied = config.get("tie_word_embeddings") is not False
    if head is not None:
        tied = tied and np.array_equal(head, table)
        if not tied:
            weights["token_logits/kernel"] = np.ascontiguousarray(head.T)
    _fold_scales(config, shape, weights)
    return dataclasses.replace(shape, tie_embeddings=tied), weights


def to_gpt2(
    config: GPTConfig, weights: Mapping[str, np.ndarray], eot_ids: Sequence[int | None] = (None,)
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """config.json and tensors of the same model for `transformers`.

    Raises:
        UserError: when blocks differ in size or heads do not span the width: GPT-2's format has
            one number for all of them.
    """
    heads, neurons = config.num_heads, config.intermediate_dim
    if isinstance(heads, tuple) or isinstance(neurons, tuple):
        raise UserError(
            "Hugging Face's GPT-2 format has one num_heads and one intermediate_dim for all "
            f"blocks. This model has num_heads={heads}, intermediate_dim={neurons}. "
            'Save it with format="tf_gptopt".'
        )
    if heads * config.head_dim != config.embedding_dim:
        raise UserError(
            "Hugging Face's GPT-2 format needs num_heads x head_dim = embedding_dim. Received: "
            f"{heads} x {config.head_dim}, {config.embedding_dim}. "
            'Save it with format="tf_gptopt".'
        )
    embedding_dropout, attention_dropout, dropout = config.dropouts
    theirs = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": config.activation,
        "vocab_size": config.vocab_size,
        "n_embd": config.embedding_dim,
        "n_layer": config.num_layers,
        "n_head": heads,
        "n_inner": neurons,
        "n_positions": config.max_sequence_length,
        "n_ctx": config.max_sequence_length,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "attn_pdrop": attention_dropout,
        "embd_pdrop": embedding_dropout,
        "resid_pdrop": dropout,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": eot_ids[0],
        "eos_token_id": list(eot_ids) if len(eot_ids) > 1 else eot_ids[0],
    }
    tensors = {}
    for name, tensor in weights.items():
        if name == "token_logits/kernel":
            tensors["lm_head.weight"] = np.ascontiguousarray(tensor.T)
        else:
            tensors[f"transformer.{_their_name(name)}"] = tensor
    return theirs, tensors


def shape_of(config: dict[str, Any]) -> GPTConfig:
    kind = config["model_type"]
    if kind != "gpt2":
        raise UserError(f"Only model_type 'gpt2' can be read. Received: {kind!r}.")
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise UserError(
            f"The checkpoint's weights are quantized (quantization_config, {method or 'unknown'}), "
            "and weights as they were trained are needed. Take the original checkpoint; "
            "tf_gptopt.quantize makes a quantized model of it."
        )
    for key, expected in _REQUIRED.items():
        if config.get(key, expected) != expected:
            raise UserError(f"GPT-2 with {key}={config[key]} is not supported.")
    activation = config.get("activation_function", "gelu_new")
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        raise UserError(
            f"activation_function must be one of {', '.join(_ACTIVATIONS)}. "
            f"Received: {activation!r}."
        )
    values = {
        name: config[other] if config.get(name) is None else config[name]
        for name, other in _OTHER_NAMES.items()
        if config.get(name) is not None or config.get(other) is not None
    }
    lacking = [name for name in ("n_embd", "n_layer", "n_head") if name not in values]
    lacking += [] if config.get("vocab_size") is not None else ["vocab_size"]
    if lacking:
        raise UserError(f"config.json lacks {', '.join(lacking)}. Restore the original file.")
    sizes = values["n_embd"], values["n_head"]
    if all(isinstance(n, int) and n > 0 for n in sizes) and sizes[0] % sizes[1]:
        raise UserError(
            "n_head must divide n_embd in GPT-2. Received: "
            f"n_head={values['n_head']}, n_embd={values['n_embd']}. Restore the original file."
        )
    embedding_dropout, attention_dropout, dropout = (
        _rate(config, name) for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop")
    )
    return GPTConfig(
        vocab_size=config["vocab_size"],
        embedding_dim=values["n_embd"],
        num_layers=values["n_layer"],
        num_heads=values["n_head"],
        intermediate_dim=config.get("n_inner"),
        max_sequence_length=values.get("n_positions") or config.get("n_ctx") or 1024,
        dropout=dropout,
        embedding_dropout=embedding_dropout,
        attention_dropout=attention_dropout,
        layer_norm_epsilon=config.get("layer_norm_epsilon", 1e-5),
        activation=_ACTIVATIONS[activation],
    )


def _rate(config: dict[str, Any], name: str) -> float:
    value = config.get(name, 0.1) or 0.0
    if not isinstance(value, (int, float)):
        raise UserError(f"config.json: {name} must be a number. Received: {value!r}.")
    return float(value)


def _fold_scales(config: dict[str, Any], shape: GPTConfig, weights: dict[str, np.ndarray]) -> None:
    """Take what a model does to its attention scores into its queries, which come first in qkv:
    `scale_attn_by_inverse_layer_idx` divides by the block's number, and without
    `scale_attn_weights` nothing is divided by the root of a head's width, as ours do."""
    inverse = bool(config.get("scale_attn_by_inverse_layer_idx"))
    root = 1.0 if config.get("scale_attn_weights", True) else shape.head_dim**0.5
    if not inverse and root == 1:
        return
    for block in range(shape.num_layers):
        factor = np.float32(root / (block + 1 if inverse else 1))
        for name in (f"block_{block}_qkv/kernel", f"block_{block}_qkv/bias"):
            if name in weights:  # else whoever assigns them says so
                weights[name] = weights[name].copy()
                weights[name][..., : shape.embedding_dim] *= factor


def _read_all(folder: Path) -> dict[str, np.ndarray]:
    index_file = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file() or not index_file.is_file():
        return read_tensors(_weights_file(folder))
    index = read_json(index_file)
    where = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(where, dict) or any(Path(str(f)).name != f for f in where.values()):
        raise UserError(f"{index_file} is not an index of files. Restore the original file.")
    tensors: dict[str, np.ndarray] = {}
    for shard in sorted(set(where.values())):
        tensors |= read_tensors(folder / shard)
    return tensors


def _weights_file(folder: Path) -> Path:
    path = folder / "model.safetensors"
    if not path.is_file() and (folder / "pytorch_model.bin").is_file():
        raise UserError(
            f"{folder} has its weights in pytorch_model.bin, a pickle, which can run code when it "
            "is read. Save it again with transformers: "
            "model.save_pretrained(folder, safe_serialization=True)."
        )
    return path


def _our_name(name: str) -> str | None:
    if name in _TOP:
        return _TOP[name]
    if _BUFFERS.fullmatch(name):
        return None
    match = _BLOCK_NAME.fullmatch(name)
    if match and match[2] in _BLOCK:
        return f"block_{match[1]}_{_BLOCK[match[2]]}"
    raise UserError(f"The checkpoint has a tensor that GPT-2 does not have: {name!r}.")


def _their_name(name: str) -> str:
    for theirs, ours in _TOP.items():
        if ours == name:
            return theirs
    _, block, rest = name.split("_", 2)
    inverse = {ours: theirs for theirs, ours in _BLOCK.items()}
    return f"h.{block}.{inverse[rest]}"
