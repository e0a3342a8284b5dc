"""What a GPT's shape is: `GPTConfig` and the named presets. Needs no TensorFlow."""

from __future__ import annotations

import dataclasses
import numbers
import warnings
from typing import Any

from tf_gptopt._errors import UserError, known_arguments, suggest

PerBlock = int | tuple[int, ...]
ACTIVATIONS = ("gelu_new", "gelu", "relu")
DROPOUTS = ("dropout", "embedding_dropout", "attention_dropout")
_MOST = 2**31 - 1  # of any size: what an int32 counts


@known_arguments
@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT-2 style decoder (Radford et al. 2019).

    Args:
        vocab_size: rows of the token table.
        embedding_dim: width of the residual stream.
        num_layers: number of blocks.
        num_heads: attention heads, one number or one per block.
        intermediate_dim: neurons of the MLP, one number or one per block; default 4 x width.
        head_dim: width of one head; default embedding_dim // num_heads, with a warning
            where that leaves a rest.
        max_sequence_length: rows of the learned position table, the longest context.
        dropout: rate after the embeddings, in attention and after each residual branch, as far as
            the next two say nothing else.
        layer_norm_epsilon: added to the variance in every LayerNorm.
        tie_embeddings: whether the logits use the token table (as GPT-2 does).
        activation: the MLP's: `"gelu_new"` (GPT-2's tanh approximation), `"gelu"` (exact) or
            `"relu"`.
        embedding_dropout, attention_dropout: rates of their own after the embeddings and in
            attention; default `dropout`.

    Raises:
        UserError: when the numbers cannot make a model.
    """

    vocab_size: int
    embedding_dim: int
    num_layers: int
    num_heads: PerBlock
    intermediate_dim: PerBlock | None = None
    head_dim: int | None = None
    max_sequence_length: int = 1024
    dropout: float = 0.0
    layer_norm_epsilon: float = 1e-5
    tie_embeddings: bool = True
    activation: str = "gelu_new"
    embedding_dropout: float | None = None
    attention_dropout: float | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "embedding_dim", "num_layers", "max_sequence_length"):
            _check_positive(name, getattr(self, name))
        if self.activation not in ACTIVATIONS:
            hint = suggest(str(self.activation), ACTIVATIONS)
            raise UserError(f"Unknown activation {self.activation!r}.{hint}")
        epsilon = self.layer_norm_epsilon
        if not (_is_number(epsilon) and 0.0 <= epsilon < 1.0):
            raise UserError(
                f"layer_norm_epsilon must be in [0, 1). Received: layer_norm_epsilon={epsilon!r}."
            )
        if not isinstance(self.tie_embeddings, bool):
            raise UserError(
                "tie_embeddings must be true or false. Received: "
                f"tie_embeddings={self.tie_embeddings!r}."
            )
        set_field = object.__setattr__  # the dataclass is frozen
        for name in DROPOUTS:
            rate = getattr(self, name)
            is_left_out = rate is None and name != "dropout"
            if not is_left_out and not (_is_number(rate) and 0.0 <= rate < 1.0):
                raise UserError(f"{name} must be in [0, 1). Received: {name}={rate!r}.")
            if name != "dropout" and rate == self.dropout:
                set_field(self, name, None)  # equal shapes are equal however they were written
        if self.head_dim is None:
            heads = self.num_heads
            if isinstance(heads, (tuple, list)):
                if len(set(heads)) != 1:
                    raise UserError(
                        f"head_dim is needed when num_heads differs between blocks. "
                        f"Received: num_heads={tuple(heads)}."
                    )
                heads = heads[0]
            _check_positive("num_heads", heads)
            if heads > self.embedding_dim:
                raise UserError(
                    "A head is embedding_dim // num_heads wide, and that must be at least 1. "
                    f"Received: num_heads={heads}, embedding_dim={self.embedding_dim}."
                )
            set_field(self, "head_dim", self.embedding_dim // heads)
            if self.embedding_dim % heads:
                near = max(n for n in range(1, heads + 1) if self.embedding_dim % n == 0)
                warnings.warn(
                    f"num_heads={heads} does not divide embedding_dim={self.embedding_dim}: the "
                    f"heads are {self.head_dim} wide, {heads * self.head_dim} together. "
                    f"num_heads={near} would use all of it; head_dim={self.head_dim} says that "
                    "this is meant.",
                    stacklevel=4,
                )
        _check_positive("head_dim", self.head_dim)
        if self.intermediate_dim is None:
            set_field(self, "intermediate_dim", 4 * self.embedding_dim)
        for name in ("num_heads", "intermediate_dim"):
            set_field(self, name, self._per_block(name))

    def _per_block(self, name: str) -> PerBlock:
        """One number where all blocks agree, else a tuple with one number per block."""
        value = getattr(self, name)
        if isinstance(value, (tuple, list)):
            if len(value) != self.num_layers:
                raise UserError(
                    f"{name} must be one number or one per block (num_layers={self.num_layers}). "
                    f"Received: {tuple(value)}."
                )
            value = tuple(value)
            for item in value:
                _check_positive(name, item)
            return value[0] if len(set(value)) == 1 else value
        _check_positive(name, value)
        return value

    @property
    def dropouts(self) -> tuple[float, float, float]:
        """The rates after the embeddings, in attention and after each residual branch."""
        own = (self.embedding_dropout, self.attention_dropout, self.dropout)
        return tuple(self.dropout if rate is None else rate for rate in own)

    @property
    def has_dropout(self) -> bool:
        return any(self.dropouts)

    def with_dropout(self, **rates: float | None) -> GPTConfig:
        """The same shape with other rates; one `dropout` sets all that have none of their own here.

        Raises:
            UserError: for impossible rates, and names that are none of `DROPOUTS`.
        """
        for name in rates:
            if name not in DROPOUTS:
                raise UserError(
                    f"A folder's shape cannot be overridden: its weights fix it. Only its dropout "
                    f"can ({', '.join(DROPOUTS)}). Received: {name}."
                )
        given = {name: rate for name, rate in rates.items() if rate is not None}
        if "dropout" in given:
            given = {"embedding_dropout": None, "attention_dropout": None, **given}
        return dataclasses.replace(self, **given)

    @property
    def block_heads(self) -> tuple[int, ...]:
        """Attention heads of each block."""
        return self._spread(self.num_heads)

    @property
    def block_intermediate_dims(self) -> tuple[int, ...]:
        """MLP neurons of each block."""
        return self._spread(self.intermediate_dim)

    def _spread(self, value: PerBlock | None) -> tuple[int, ...]:
        return value if isinstance(value, tuple) else (value,) * self.num_layers

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `GPTConfig.from_dict` reads them back. The fields that came last
        are left out where they are what earlier versions have, which then read the rest."""
        later = {"activation": "gelu_new", "embedding_dropout": None, "attention_dropout": None}
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self).items()
            if key not in later or value != later[key]
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GPTConfig:
        """Build from `to_dict`'s values; an unknown key raises with the nearest known one."""
        known = {field.name for field in dataclasses.fields(cls)}
        for key in values:
            if key not in known:
                raise UserError(f"Unknown GPT option {key!r}.{suggest(key, known)}")
        return cls(**values)


def _check_positive(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{name} must be a positive integer. Received: {name}={value!r}.")
    if value > _MOST:
        received = f"{value:,}" if value < 10**18 else f"a number of {value.bit_length()} bits"
        raise UserError(f"{name} must be at most {_MOST:,}. Received: {received}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


GPT2_VOCAB = 50257

PRESETS: dict[str, GPTConfig] = {
    "tiny": GPTConfig(2048, 128, 2, 4, max_sequence_length=256),
    "mini": GPTConfig(4096, 192, 4, 6, max_sequence_length=256),
    "small": GPTConfig(8192, 384, 6, 6, max_sequence_length=512),
    "gpt2": GPTConfig(GPT2_VOCAB, 768, 12, 12),
    "gpt2-medium": GPTConfig(GPT2_VOCAB, 1024, 24, 16),
    "gpt2-large": GPTConfig(GPT2_VOCAB, 1280, 36, 20),
    "gpt2-xl": GPTConfig(GPT2_VOCAB, 1600, 48, 25),
}


def preset(name: str, **overrides: Any) -> GPTConfig:
    """The named shape, with some of its numbers replaced.

    Raises:
        UserError: for an unknown name, with the nearest known one.
    """
    if name not in PRESETS:
        raise UserError(f"Unknown preset {name!r}.{suggest(name, PRESETS)}")
    base = PRESETS[name]
    values = {**base.to_dict(), **overrides}
    if "head_dim" not in overrides and overrides.keys() & {"embedding_dim", "num_heads"}:
        values["head_dim"] = None
    if "intermediate_dim" not in overrides and "embedding_dim" in overrides:
        values["intermediate_dim"] = None
    return GPTConfig.from_dict(values)
