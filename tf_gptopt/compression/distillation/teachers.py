"""Who may teach: our models, keras-nlp's GPT-2, folders of checkpoints, several of them at once."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from tf_gptopt._errors import UserError
from tf_gptopt.models.checkpoints import assign_weights, load_checkpoint
from tf_gptopt.models.config import GPTConfig
from tf_gptopt.models.gpt import GPTModel, require_gpt


def as_teachers(teacher: Any) -> tuple[GPTModel, ...]:
    """`teacher`, or each of a list, as a `GPTModel`: one that is one already, a `GPT2CausalLM` or
    `GPT2Backbone` of keras-nlp (copied), or the path of a folder that `load_checkpoint` reads."""
    several = teacher if isinstance(teacher, (list, tuple)) else [teacher]
    if not several:
        raise UserError("A student needs a teacher. Received: teacher=[].")
    return tuple(_as_teacher(one) for one in several)


def _as_teacher(teacher: Any) -> GPTModel:
    if isinstance(teacher, (str, os.PathLike)):
        return load_checkpoint(teacher)
    backbone = getattr(teacher, "backbone", teacher)
    if type(backbone).__name__ == "GPT2Backbone":
        return from_keras_nlp(backbone)
    return require_gpt(teacher)


def teacher_shares(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """Each teacher's share of the mean; they sum to 1.

    Raises:
        UserError: unless there is a positive weight for each teacher.
    """
    if weights is None:
        return (1.0 / count,) * count
    sound = len(weights) == count and all(w > 0 and math.isfinite(w) for w in weights)
    if not sound:
        raise UserError(
            f"teacher_weights must be a positive number for each of {count} teachers. "
            f"Received: {list(weights)}."
        )
    return tuple(float(weight) / float(sum(weights)) for weight in weights)


def from_keras_nlp(backbone: Any) -> GPTModel:
    """A copy of keras-nlp's (keras-hub's) `GPT2Backbone` as a `GPTModel` without dropout.

    Those are Keras 3 models with heads as axes of their own; here queries, keys and values of all
    heads are columns of one kernel. No tokenizer comes along.
    """
    shape = backbone.get_config()
    config = GPTConfig(
        vocab_size=shape["vocabulary_size"],
        embedding_dim=shape["hidden_dim"],
        num_layers=shape["num_layers"],
        num_heads=shape["num_heads"],
        intermediate_dim=shape["intermediate_dim"],
        max_sequence_length=shape["max_sequence_length"],
    )
    found = {weight.path: np.asarray(weight.numpy(), np.float32) for weight in backbone.weights}
    # "gpt2_backbone/..." or not, as the backbone was made
    found = {name[_start(name) :]: value for name, value in found.items()}
    weights = {
        "token_embedding/embeddings": found["token_embedding/embeddings"],
        "position_embedding/embeddings": found["position_embedding/embeddings"],
        "final_norm/gamma": found["layer_norm/gamma"],
        "final_norm/beta": found["layer_norm/beta"],
    }
    width = config.embedding_dim
    for i in range(config.num_layers):
        theirs, ours = f"transformer_layer_{i}", f"block_{i}"
        attention = f"{theirs}/self_attention"
        parts = [f"{attention}/{part}" for part in ("query", "key", "value")]
        weights[f"{ours}_qkv/kernel"] = np.concatenate(
            [found[f"{part}/kernel"].reshape(width, -1) for part in parts], 1
        )
        weights[f"{ours}_qkv/bias"] = np.concatenate(
            [found[f"{part}/bias"].reshape(-1) for part in parts]
        )
        weights[f"{ours}_proj/kernel"] = found[f"{attention}/attention_output/kernel"].reshape(
            -1, width
        )
        weights[f"{ours}_proj/bias"] = found[f"{attention}/attention_output/bias"]
        for layer, name in (
            ("attention_norm", "self_attention_layer_norm"),
            ("mlp_norm", "feedforward_layer_norm"),
        ):
            for weight in ("gamma", "beta"):
                weights[f"{ours}_{layer}/{weight}"] = found[f"{theirs}/{name}/{weight}"]
        for layer, name in (
            ("fc", "feedforward_intermediate_dense"),
            ("out", "feedforward_output_dense"),
        ):
            for weight in ("kernel", "bias"):
                weights[f"{ours}_{layer}/{weight}"] = found[f"{theirs}/{name}/{weight}"]
    model = GPTModel.from_gpt_config(config)
    assign_weights(model, weights)
    return model


def _start(path: str) -> int:
    """Where the part of a weight's path begins that does not depend on what it was made within."""
    tops = ("token_embedding/", "position_embedding/", "transformer_layer_")
    for top in tops:
        if top in path:
            return path.index(top)
    return path.rindex("layer_norm/")


def check_same_tokens(student: GPTModel, teacher: GPTModel) -> None:
    """Raise a `UserError` unless token 17 is the same token to both models."""
    if student is teacher:
        raise UserError(
            "Student and teacher are one model. Make the student first, for example with "
            "shrink(teacher, layers=...)."
        )
    fingerprint = getattr(teacher.tokenizer, "fingerprint", None)
    check_vocabulary(student, teacher.config.vocab_size, fingerprint)


def check_vocabulary(student: GPTModel, vocab_size: int, fingerprint: str | None) -> None:
    """Raise a `UserError` unless the student has the teacher's vocabulary and, where both are
    known, its tokenizer."""
    if student.config.vocab_size != vocab_size:
        raise UserError(
            "Student and teacher must share one vocabulary. Received: student "
            f"vocab_size={student.config.vocab_size}, teacher vocab_size={vocab_size}. Build the "
            f"student with vocab_size={vocab_size} and the teacher's tokenizer."
        )
    own = getattr(student.tokenizer, "fingerprint", None)
    if own and fingerprint and own != fingerprint:
        raise UserError(
            "Student and teacher carry different tokenizers (fingerprints "
            f"{own[:12]} and {fingerprint[:12]}), so their logits do not mean the same tokens. "
            "Train the student on the teacher's tokenizer."
        )
