"""GPTModel: GPT-2's architecture as an ordinary flat Functional `keras.Model`."""

from __future__ import annotations

import dataclasses
import importlib
import warnings
from typing import Any

import numpy as np
import tensorflow as tf

from tf_gptopt._errors import UserError, known_arguments
from tf_gptopt._keras import keras, refuse_hdf5, tell_keras3
from tf_gptopt.models.compile_checks import compile_arguments
from tf_gptopt.models.config import GPTConfig, PerBlock, preset
from tf_gptopt.models.fit_checks import CheckedFit, check_ids, check_label_shape
from tf_gptopt.models.graph_errors import ReadableErrors
from tf_gptopt.models.layers import (
    CausalSelfAttention,
    Dropout,
    LayerNorm,
    LogitsDense,
    PositionEmbedding,
    TokenEmbedding,
    TokenLogits,
    make_activation,
    register,
)
from tf_gptopt.models.policies import policy_scope
from tf_gptopt.models.recompute import recomputing
from tf_gptopt.models.token_means import average_over_tokens


@register
@known_arguments
class GPTModel(CheckedFit, ReadableErrors, keras.Model):
    """A decoder-only Transformer (GPT-2: pre-LN, learned positions, gelu_new, tied logits).

    It is a plain Functional model: `compile`, `fit`, `evaluate`, `save`, callbacks, dtype policies
    and `tf.distribute` scopes work as in any Keras tutorial.

    ```python
    model = GPTModel(vocab_size=10000, embedding_dim=512, num_layers=6, num_heads=8)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(inputs, labels, epochs=10)        # both (examples, time) int32
    ```

    Input `token_ids` `(batch, time)` int32, output logits `(batch, time, vocab_size)` float32.

    Attributes:
        config: its `GPTConfig`.
        tokenizer: the `Tokenizer` that belongs to it, or None.
        sampler: what `generate` uses by default.
        activation_ranges: of a model quantized with static activations, `{"block_0_qkv/input":
            (low, high), "block_0_qkv/output": ..., "token_logits/output": ...}`; None elsewhere.
            `save_model` writes them.
        recompute: see there.

    Args: as `GPTConfig`, field by field; `dtype` is the layers' dtype policy, for example
        "mixed_bfloat16", the global one where None; `graph` is `(inputs, outputs)` of an existing
        Functional model of this shape (transforms that wrap layers use it).

    Raises:
        UserError: when the numbers cannot make a model.
    """

    # the class has it, so Keras does not track what a model sets: checkpoints stay as they are
    activation_ranges: dict[str, tuple[float, float]] | None = None

    def __init__(
        self,
        vocab_size: int,
        embedding_dim: int,
        num_layers: int,
        num_heads: PerBlock,
        *,
        intermediate_dim: PerBlock | None = None,
        head_dim: int | None = None,
        max_sequence_length: int = 1024,
        dropout: float = 0.0,
        layer_norm_epsilon: float = 1e-5,
        tie_embeddings: bool = True,
        dtype: Any = None,
        activation: str = "gelu_new",
        embedding_dropout: float | None = None,
        attention_dropout: float | None = None,
        graph: tuple[Any, Any] | None = None,
        name: str = "gpt",
    ) -> None:
        config = GPTConfig(
            vocab_size,
            embedding_dim,
            num_layers,
            num_heads,
            intermediate_dim=intermediate_dim,
            head_dim=head_dim,
            max_sequence_length=max_sequence_length,
            dropout=dropout,
            layer_norm_epsilon=layer_norm_epsilon,
            tie_embeddings=tie_embeddings,
            activation=activation,
            embedding_dropout=embedding_dropout,
            attention_dropout=attention_dropout,
        )
        with policy_scope(dtype):
            inputs, outputs = graph or build_graph(config)
        super().__init__(inputs, outputs, name=name)
        inner = self.base_layer("block_0_qkv")
        # its layers' policy, whatever is global now: `compile` scales the loss under mixed_float16
        self._set_dtype_policy(getattr(inner, "layer", inner).dtype_policy)
        self.config = config
        self._tokenizer = None
        self.sampler = "greedy"
        self._recompute = False
        # metrics are sums over replicas already; Keras would add those of several workers up again
        self.distribute_reduction_method = "first"
        self._has_own_graph = graph is None

    # Construction

    @classmethod
    def from_gpt_config(cls, config: GPTConfig, **kwargs: Any) -> GPTModel:
        """A model of this shape, freshly initialised."""
        return cls(
            **{f.name: getattr(config, f.name) for f in dataclasses.fields(config)}, **kwargs
        )

    @classmethod
    def from_preset(cls, name_or_folder: str, **overrides: Any) -> GPTModel:
        """A named shape (`tiny` ... `gpt2-xl`, random weights), or a folder with weights.

        A folder may be one that `save_to_preset` wrote or a Hugging Face GPT-2 checkpoint; its
        shape is fixed, and only its dropout can be another: `from_preset(folder, dropout=0.0)`.
        The names of published models stand for their shapes alone, and a warning says so.
        """
        from pathlib import Path

        if Path(name_or_folder).is_dir():
            from tf_gptopt.models.checkpoints import load_checkpoint

            return load_checkpoint(name_or_folder, **overrides)
        shape = preset(name_or_folder, **overrides)
        if name_or_folder.startswith("gpt2"):
            warnings.warn(
                f"from_preset({name_or_folder!r}) gives that model's shape with random weights. "
                "For the published weights name a folder with the Hugging Face checkpoint.",
                stacklevel=2,
            )
        return cls.from_gpt_config(shape)

    def save_to_preset(self, folder: str) -> None:
        """Write weights, config.json and the tokenizer (if attached) to `folder`, atomically."""
        from tf_gptopt.models.checkpoints import save_model

        save_model(self, folder)

    # Keras

    @property
    def tokenizer(self) -> Any:
        """The `Tokenizer` that belongs to the model, or None. One of transformers or `tokenizers`
        becomes ours when it is set."""
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, value: Any) -> None:
        from tf_gptopt._tokenizer import as_tokenizer

        self._tokenizer = as_tokenizer(value)

    @property
    def recompute(self) -> bool:
        """Whether training keeps only the input of every block and computes the rest again for the
        gradient: less memory for about a third more time. Set it before `fit`.

        Raises:
            UserError: when set on a model with dropout, which would draw other masks.
        """
        return self._recompute

    @recompute.setter
    def recompute(self, value: bool) -> None:
        if value and self.config.has_dropout:
            rates = ", ".join(str(rate) for rate in self.config.dropouts)
            raise UserError(
                "A block that is computed again would draw other dropout masks. Received: "
                f"recompute with dropout={self.config.dropout} (embeddings, attention, residual: "
                f"{rates}). Build the model with dropout=0, or load it so: "
                "load_checkpoint(folder, dropout=0.0)."
            )
        self._recompute = bool(value)

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        check_ids(inputs)
        if self.recompute and training is True:
            return recomputing(self)(inputs)
        return super().call(inputs, training=training, mask=mask)

    def compile(
        self,
        optimizer: Any = "rmsprop",
        loss: Any = None,
        metrics: Any = None,
        loss_weights: Any = None,
        weighted_metrics: Any = None,
        *,
        sampler: Any = None,
        **kwargs: Any,
    ) -> None:
        """`keras.Model.compile`, with the sampler that `generate` uses by default.

        A cross-entropy that is only named is the one from logits.

        Raises:
            UserError: for a loss or a metric that takes probabilities, and objects of Keras 3.
        """
        checked = compile_arguments(optimizer, loss, metrics, weighted_metrics)
        if sampler is not None:
            from tf_gptopt.models.sampling import get_sampler

            self.sampler = get_sampler(sampler)
        super().compile(**checked, loss_weights=loss_weights, **kwargs)
        average_over_tokens(self)

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None
    ) -> Any:
        if tf.is_tensor(y_pred):
            check_label_shape(y, y_pred.shape, self.loss)
        return super().compute_loss(x, y, y_pred, sample_weight)

    def save(self, filepath: Any, *args: Any, **kwargs: Any) -> None:
        """`keras.Model.save`, as .keras or SavedModel.

        Raises:
            UserError: for HDF5, which Keras writes and cannot read again.
        """
        refuse_hdf5(filepath, args[1] if len(args) > 1 else kwargs.get("save_format"))
        super().save(filepath, *args, **kwargs)
        tell_keras3(_REGISTERED)

    def compile_from_config(self, config: dict[str, Any]) -> None:
        # Keras leaves this out when it loads a model that has a `compile` of its own
        self.compile(**keras.saving.deserialize_keras_object(config))
        if isinstance(self.optimizer, keras.optimizers.Optimizer):  # not a legacy one
            self.optimizer.build(self.trainable_variables)

    def generate(self, inputs: Any, max_length: int | None = None, **kwargs: Any) -> Any:
        """Complete a prompt or a list of prompts; see `tf_gptopt.models.generation.generate`."""
        from tf_gptopt.models.generation import generate

        return generate(self, inputs, max_length=max_length, **kwargs)

    def base_layer(self, name: str) -> keras.layers.Layer:
        """The layer called `name`, or the wrapper around it (pruning, quantization)."""
        found = self._layers_by_base_name.get(name)
        if found is None:
            raise UserError(f"The model has no layer {name!r}.")
        return found

    @property
    def _layers_by_base_name(self) -> dict[str, keras.layers.Layer]:
        return {getattr(layer, "layer", layer).name: layer for layer in self.layers}

    def get_config(self) -> dict[str, Any]:
        shape = self.config.to_dict()
        if self._has_own_graph:
            return {**shape, "dtype": self.dtype_policy.name, "name": self.name}
        # Keras describes the layers of plain Functional models only, not of subclasses of it
        graph = keras.Model(self.inputs, self.outputs, name=self.name)
        return {"gpt": shape, **graph.get_config()}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> GPTModel:
        config = dict(config)
        shape = config.pop("gpt", None)
        if shape is None:
            return cls(**config)
        for layer in config["layers"]:  # a wrapper is known to Keras once its module is imported
            if (layer.get("module") or "").startswith("tf_gptopt."):
                importlib.import_module(layer["module"])
        model = keras.Model.from_config(config, custom_objects)
        return wrap_graph(model, GPTConfig.from_dict(shape))


_REGISTERED = keras.saving.get_registered_name(GPTModel)
tell_keras3(_REGISTERED)


def build_graph(config: GPTConfig) -> tuple[Any, Any]:
    """The Functional graph of a GPT: `(token_ids, logits)` symbolic tensors.

    Layer names are part of the contract: checkpoints, pruning, quantization and export find layers
    by them (`token_embedding`, `position_embedding`, `block_{i}_{attention_norm, qkv, attention,
    proj, mlp_norm, fc, gelu, out}`, `final_norm`, `token_logits`); `gelu` is called so whatever the
    activation is.
    """
    embedding_dropout, attention_dropout, dropout = config.dropouts
    layers = keras.layers
    # GPT-2 shrinks what is added to the residual stream by the number of additions
    residual_stddev = 0.02 / np.sqrt(2 * config.num_layers)

    def dense(units: int, name: str, stddev: float = 0.02) -> keras.layers.Layer:
        init = keras.initializers.RandomNormal(stddev=stddev)
        return layers.Dense(units, kernel_initializer=init, name=name)

    def norm(name: str) -> keras.layers.Layer:
        return LayerNorm(epsilon=config.layer_norm_epsilon, name=name)

    def drop(x: Any, name: str, rate: float = dropout) -> Any:
        return Dropout(rate, name=name)(x) if rate else x

    token_ids = keras.Input((None,), dtype="int32", name="token_ids")

    # Embeddings
    x, table = TokenEmbedding(config.vocab_size, config.embedding_dim, name="token_embedding")(
        token_ids
    )
    x = PositionEmbedding(config.max_sequence_length, name="position_embedding")(x)
    x = drop(x, "embedding_dropout", embedding_dropout)

    # Blocks
    shapes = zip(config.block_heads, config.block_intermediate_dims, strict=True)
    for i, (heads, neurons) in enumerate(shapes):
        block = f"block_{i}"
        y = norm(f"{block}_attention_norm")(x)
        y = dense(3 * heads * config.head_dim, f"{block}_qkv")(y)
        y = CausalSelfAttention(heads, attention_dropout, name=f"{block}_attention")(y)
        y = dense(config.embedding_dim, f"{block}_proj", residual_stddev)(y)
        y = drop(y, f"{block}_attention_dropout")
        x = layers.Add(name=f"{block}_attention_add")([x, y])

        y = norm(f"{block}_mlp_norm")(x)
        y = dense(neurons, f"{block}_fc")(y)
        y = make_activation(config.activation, name=f"{block}_gelu")(y)
        y = dense(config.embedding_dim, f"{block}_out", residual_stddev)(y)
        y = drop(y, f"{block}_mlp_dropout")
        x = layers.Add(name=f"{block}_mlp_add")([x, y])

    # Logits
    x = norm("final_norm")(x)
    if config.tie_embeddings:
        logits = TokenLogits(name="token_logits")([x, table])
    else:
        init = keras.initializers.RandomNormal(stddev=0.02)
        head = LogitsDense(
            config.vocab_size,
            use_bias=False,
            kernel_initializer=init,
            dtype="float32",
            name="token_logits",
        )
        logits = head(x)
    return token_ids, logits


def wrap_graph(model: keras.Model, config: GPTConfig, name: str | None = None) -> GPTModel:
    """A `GPTModel` around an existing Functional model's layers (shared, not copied)."""
    return GPTModel.from_gpt_config(
        config, graph=(model.inputs[0], model.outputs[0]), name=name or model.name
    )


def is_wrapped(model: GPTModel) -> bool:
    """Whether a layer of it has a wrapper, for pruning or quantization."""
    return any(isinstance(layer, keras.layers.Wrapper) for layer in model.layers)


def require_gpt(model: Any) -> GPTModel:
    """Return `model` if it is a `GPTModel`; a `UserError` says how to get one otherwise."""
    from tf_gptopt._keras import require_tf_keras

    require_tf_keras(model)
    if not isinstance(model, GPTModel):
        raise UserError(
            f"A GPTModel is needed. Received: {type(model).__name__}. Build one with "
            "tf_gptopt.GPTModel(...) or read one with tf_gptopt.load_checkpoint(folder)."
        )
    return model
