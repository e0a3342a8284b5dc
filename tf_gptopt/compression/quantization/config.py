"""How many bits a number gets: `QuantConfig`, read by training, post-training and export alike."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from tf_gptopt._errors import UserError, known_arguments, suggest

if TYPE_CHECKING:
    from tf_gptopt.models.config import GPTConfig

WEIGHTS: dict[str, str] = {
    "int8": "8-bit integers",
    "int4": "4-bit integers",
    "float16": "rounded to float16; arithmetic in float32",
    "float32": "as they are",
}
BITS = {"int8": 8, "int4": 4}
ACTIVATIONS: dict[str, str] = {
    "dynamic": "inputs of products become int8 as they come, each row with its own range",
    "static": "inputs and outputs of products are int8, with ranges fixed by calibration",
    "float": "weights alone are integers (weight-only)",
}
BLOCKS = (32, 64, 128)
LAYER_WEIGHTS: tuple[str, ...] = (  # of `QuantConfig.layers`
    *WEIGHTS,
    *(f"{kind}:{group}" for kind in BITS for group in ("tensor", "channel")),
    *(f"int4:{block}" for block in BLOCKS),
)
_CHOICES: dict[str, tuple[Any, ...]] = {
    "weights": tuple(WEIGHTS),
    "activations": tuple(ACTIVATIONS),
    "granularity": ("global", "tensor", "channel", *BLOCKS),
    "range": ("minmax", "percentile", "mse"),
    "rounding": ("nearest", "gptq"),
    "kv_cache": ("auto", "float32", "int8"),
    "io": ("float32", "int8"),
}
# bytes of a float32 one: from here on an int8 one is faster behind the first hundred tokens
_LARGE_CACHE = 8 * 2**20


@known_arguments
@dataclasses.dataclass(frozen=True)
class QuantConfig:
    """What is quantized, and to what. Needs no TensorFlow.

    Quantized are the kernels of all products and the token table. LayerNorms, biases and attention
    stay float in each scheme; the position table is float16 beside int8 weights and int8 beside
    int4. `QuantConfig.from_recipe` has names for the common cases.

    Args:
        weights: a name from `WEIGHTS`.
        activations: a name from `ACTIVATIONS`, for integer weights.
        granularity: which weights share a scale: all of the model (`"global"`), a `"tensor"`, an
            output `"channel"` (a token, in the table), or blocks of 32, 64 or 128 neighbours of a
            channel. Default `"channel"`, and 32 for int4 with dynamic activations. Blocks are for
            these alone: LiteRT has no others. A layer whose inputs the block does not divide takes
            `"channel"`.
        range: how far a grid reaches: to the largest weight (`"minmax"`), to a percentile of the
            magnitudes (`"percentile"`), or where the squared error is least (`"mse"`). Static
            activations use it as well.
        percentile: for that range, in percent.
        rounding: `"nearest"`, or `"gptq"`, which makes later weights of a channel answer for the
            rounding of earlier ones (post-training, with calibration).
        smoothing: SmoothQuant's alpha: how much of the activations' spread moves into the weights,
            0 (none) to 1 (all). Dynamic and static activations alike.
        bias_correction: whether biases take back the mean error that rounding made on the
            calibration text.
        symmetric: whether the ranges of static activations are symmetric around zero.
        kv_cache: `"float32"`, or `"int8"` with a scale for each head and token. `"auto"`: int8
            beside integer weights with dynamic activations, in a model whose full cache would take
            8 MiB or more in float32 (`for_model`).
        io: `"int8"` hands logits out, and takes the cache in, as integers of a fixed scale, as
            NPUs want them (static activations only).
        quantize_adds: whether the residual additions are int8 too (static activations only).
        layers: weights of single layers: shell patterns of names to names from `WEIGHTS`, with a
            granularity behind a colon where it is a layer's own, such as
            `{"block_0_*": "int8", "block_3_*": "int4:128"}`; the first that matches counts.
            `"token_embedding"` covers both uses of the table in a model whose logits are tied to
            it.
        float_layers: patterns of layers whose weights stay float32, before all others.

    Raises:
        UserError: for values that are none, or do not go together, with what would.
    """

    weights: str = "int8"
    activations: str = "dynamic"
    granularity: int | str | None = None  # the command line tries the types in this order
    range: str = "minmax"
    percentile: float = 99.9
    rounding: str = "nearest"
    smoothing: float = 0.0
    bias_correction: bool = False
    symmetric: bool = False
    kv_cache: str = "auto"
    io: str = "float32"
    quantize_adds: bool = False
    layers: dict[str, str] = dataclasses.field(default_factory=dict)
    float_layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices and not (name == "granularity" and value is None):
                raise UserError(
                    f"Unknown {name} {value!r} of a quantization."
                    f"{suggest(str(value), map(str, choices))}"
                )
        for name, low, high in (("percentile", 50, 100), ("smoothing", 0, 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise UserError(f"{name} must be a number. Received: {name}={value!r}.")
            if not low <= value <= high:
                raise UserError(f"{name} is {low} to {high}. Received: {name}={value!r}.")
        layers = self.layers
        if not isinstance(layers, Mapping) or not all(
            isinstance(pattern, str) and pattern and weights in LAYER_WEIGHTS
            for pattern, weights in layers.items()
        ):
            raise UserError(
                "layers maps layer name patterns to weights, such as {'block_0_*': 'int8'} "
                f"(known: {', '.join(LAYER_WEIGHTS)}). Received: layers={layers!r}."
            )
        patterns = self.float_layers
        if isinstance(patterns, str):  # one pattern is as good as a list of one
            patterns = (patterns,)
        if not isinstance(patterns, (tuple, list)) or not all(
            isinstance(pattern, str) and pattern for pattern in patterns
        ):
            raise UserError(
                "float_layers must be layer name patterns such as ('block_0_*',). "
                f"Received: float_layers={self.float_layers!r}."
            )
        object.__setattr__(self, "layers", dict(layers))  # the dataclass is frozen
        object.__setattr__(self, "float_layers", tuple(patterns))
        self._check_together()

    def _check_together(self) -> None:
        kinds = self.kinds
        if isinstance(self.granularity, int) and "int4" not in kinds:
            raise UserError(
                "Blocks are for int4: LiteRT has no int8 weights with a scale per block. "
                f"Received: granularity={self.granularity!r}, weights={self.weights!r}. "
                'Take granularity="channel".'
            )
        groups = [self.granularity, *(split_weights(w)[1] for w in self.layers.values())]
        has_blocks = any(isinstance(group, int) for group in groups)
        if self.activations == "static" and has_blocks:
            raise UserError(
                "LiteRT has no static activations beside weights in blocks. Take "
                'granularity="channel", or activations="dynamic".'
            )
        if self.activations == "float" and has_blocks:
            raise UserError(
                "LiteRT cannot make weights in blocks float again (it makes zeros of them). Take "
                'granularity="channel", or activations="dynamic".'
            )
        if self.io == self.kv_cache == "int8":
            raise UserError(
                'io="int8" has an int8 cache of its own, with fixed scales, and kv_cache="int8" '
                "would have a scale for each token. Leave one of them out."
            )
        if self.activations == "float" and self.smoothing > 0:
            raise UserError(
                "smoothing is for activations that are quantized. Received: "
                'activations="float". Say activations="dynamic" or "static", or leave it out.'
            )
        if self.activations != "static":
            for name, asked in (
                ('io="int8"', self.io == "int8"),
                ("quantize_adds", self.quantize_adds),
            ):
                if asked:
                    raise UserError(
                        f"{name} is for static activations. Received: activations="
                        f'{self.activations!r}. Say activations="static", or leave it out.'
                    )
        if not kinds & set(BITS) and self.activations == "static":
            raise UserError(
                f"Static activations need integer weights. Received: weights={self.weights!r}."
            )

    @property
    def needs_calibration(self) -> bool:
        """Whether quantizing takes calibration text."""
        static = self.activations == "static"
        corrects = self.smoothing > 0 or self.bias_correction
        return static or corrects or self.rounding == "gptq"

    @property
    def name(self) -> str:
        """The scheme in a few words: `"int8 dynamic"`, `"int4 per 32 dynamic gptq"`."""
        words = ["mixed" if self.layers else self.weights]
        if self.kinds & set(BITS):
            if self.granularity is not None or "int4" in words:
                words.append(f"per {self._group(self.weights, self.granularity)}")
            words.append("weight-only" if self.activations == "float" else self.activations)
            words += [self.range] * (self.range != "minmax")
            words += [self.rounding] * (self.rounding != "nearest")
            words += ["smooth"] * bool(self.smoothing)
            words += ["bias-corrected"] * self.bias_correction
        words += ["int8 adds"] * self.quantize_adds + ["int8 io"] * (self.io == "int8")
        words += ["int8 cache"] * (self.kv_cache == "int8")
        return " ".join(words)

    @property
    def kinds(self) -> set[str]:
        """All weights that layers may have, names from `WEIGHTS`."""
        return {self.weights, *(split_weights(w)[0] for w in self.layers.values())}

    def weights_of(self, layer: str) -> str:
        """The weights, a name from `WEIGHTS`, of the layer of this name."""
        return split_weights(self._layer_weights(layer))[0]

    def group_of(self, layer: str, width: int | None = None) -> str | int:
        """Who shares a scale in the layer of this name, whose rows are `width` weights: `"global"`,
        `"tensor"`, `"channel"`, or so many neighbours of a row."""
        kind, group = split_weights(self._layer_weights(layer))
        return self._group(kind, group or self.granularity, width)

    def _layer_weights(self, layer: str) -> str:
        if any(fnmatchcase(layer, pattern) for pattern in self.float_layers):
            return "float32"
        for pattern, weights in self.layers.items():
            if fnmatchcase(layer, pattern):
                return weights
        return self.weights

    def _group(self, kind: str, group: str | int | None, width: int | None = None) -> str | int:
        if group is None:
            group = 32 if kind == "int4" and self.activations == "dynamic" else "channel"
        if isinstance(group, int) and (kind != "int4" or (width or group) % group):
            return "channel"
        return group

    def keeps_float(self, layer: str) -> bool:
        """Whether the weights of the layer of this name are no integers."""
        return self.weights_of(layer) not in BITS

    def for_model(self, config: GPTConfig) -> QuantConfig:
        """The same scheme for a model of this config, with `kv_cache` decided."""
        if self.kv_cache != "auto":
            return self
        rows = sum(config.block_heads) * config.max_sequence_length
        is_large = 2 * 4 * rows * config.head_dim >= _LARGE_CACHE
        rounds = self.activations == "dynamic" and bool(self.kinds & set(BITS))
        return dataclasses.replace(self, kv_cache="int8" if is_large and rounds else "float32")

    def layers_to_quantize(self, layer_names: Iterable[str]) -> set[str]:
        """Those of `layer_names` whose weights become integers.

        Raises:
            UserError: for a pattern that matches none of them, with the nearest name.
        """
        layer_names = set(layer_names)
        for field, patterns in (("float_layers", self.float_layers), ("layers", self.layers)):
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) for name in layer_names):
                    raise UserError(
                        f"{field}: {pattern!r} matches no layer with weights to quantize."
                        f"{suggest(pattern, layer_names)}"
                    )
        return {name for name in layer_names if not self.keeps_float(name)}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `QuantConfig.from_dict` reads them back."""
        values = dataclasses.asdict(self)
        return {**values, "float_layers": list(self.float_layers)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> QuantConfig:
        """Build from `to_dict`'s values; an unknown key raises with the nearest known one."""
        known = {field.name for field in dataclasses.fields(cls)}
        for key in values:
            if key not in known:
                raise UserError(f"Unknown quantization option {key!r}.{suggest(key, known)}")
        return cls(**values)

    @classmethod
    def from_recipe(cls, name: str, **changes: Any) -> QuantConfig:
        """A named scheme from `RECIPES`, with `changes` to its fields."""
        if name not in RECIPES:
            raise UserError(f"Unknown quantization recipe {name!r}.{suggest(str(name), RECIPES)}")
        return dataclasses.replace(RECIPES[name][0], **changes)

    @classmethod
    def from_sensitivity(
        cls,
        table: Any,
        *,
        bytes: int | float | None = None,
        loss: float | None = None,
        **changes: Any,
    ) -> QuantConfig:
        """A mixed scheme: for each layer what hurts least, within a budget.

        Args:
            table: a `Sensitivity`, measured with the options to choose from. float16 is always one.
            bytes: what the matrices may take in a file, as an integer; or as a fraction of what
                uniform int4 takes: 1.0 is the same size. The summed KL becomes the least possible.
            loss: by how many nats the loss may rise, summed over the layers. The size becomes the
                least possible.
            **changes: fields of the config, beside those that the table was measured with.

        Raises:
            UserError: for no budget or two, and for one that cannot be met, with the least that
                can.
        """
        from tf_gptopt.compression.quantization.mixed import from_sensitivity

        layers = from_sensitivity(table, bytes, loss)
        counts = Counter(split_weights(weights)[0] for weights in layers.values())
        values: dict[str, Any] = {"weights": counts.most_common(1)[0][0], "layers": layers}
        if "int4" not in counts and isinstance(table.quantization.granularity, int):
            values["granularity"] = None  # of blocks that nobody takes
        return dataclasses.replace(table.quantization, **{**values, **changes})

    def __hash__(self) -> int:
        return hash(json.dumps(self.to_dict(), sort_keys=True))


def split_weights(weights: str) -> tuple[str, str | int | None]:
    """A value of `QuantConfig.layers`: `"int4:128"` -> `("int4", 128)`, `"int8"` ->
    `("int8", None)`."""
    kind, _, group = weights.partition(":")
    return kind, int(group) if group.isdigit() else group or None


RECIPES: dict[str, tuple[QuantConfig, str]] = {
    "int8": (
        QuantConfig(),
        "the default on CPUs: a quarter of the size, the fastest, and as good as float",
    ),
    "int8-smooth": (
        QuantConfig(smoothing=0.7),
        "int8 nearer to float: SmoothQuant on calibration text, for one product more a norm",
    ),
    "int8-cache": (
        QuantConfig(kv_cache="int8"),
        "int8, and a KV cache of a quarter of the memory in small models too",
    ),
    "int8-weight-only": (
        QuantConfig(activations="float"),
        "the size of int8, the arithmetic, speed and memory of float32",
    ),
    "int8-static": (
        QuantConfig(activations="static"),
        "integer products with fixed ranges, for accelerators that know nothing else",
    ),
    "int8-static-smooth": (
        QuantConfig(activations="static", smoothing=0.5, bias_correction=True),
        "static int8 with SmoothQuant and bias correction: the better static file",
    ),
    "int4": (
        QuantConfig("int4", range="mse"),
        "half of int8, blocks of 32 weights rounded to nearest: takes seconds, no text",
    ),
    "int4-gptq": (
        QuantConfig("int4", range="mse", rounding="gptq"),
        "int4 with GPTQ on calibration text: the same size, nearer to float",
    ),
    "int4-weight-only": (
        QuantConfig("int4", range="mse", rounding="gptq", activations="float"),
        "the size of int4 per channel, activations untouched",
    ),
    "float16": (QuantConfig("float16"), "half the size, as exact as anyone can tell"),
    "float32": (QuantConfig("float32"), "nothing is quantized"),
}
