"""How many bits a number gets: `QuantConfig`, read by training, export and calibration alike."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable
from typing import Any

from tf_gptopt._errors import UserError, suggest

SCHEMES: dict[str, str] = {
    "int8": "int8 weights, one scale per output channel; activations quantized as they come",
    "float16": "weights rounded to float16, arithmetic in float32",
    "float32": "nothing is quantized",
}


@dataclasses.dataclass(frozen=True)
class QuantConfig:
    """What is quantized, and to what. Needs no TensorFlow.

    - `int8`: weights are symmetric int8 in [-127, 127] (narrow range), one scale `max|w| / 127`
      per output channel of a Dense kernel and per row (token) of the token table. Inputs of
      those products are quantized to int8 per row at run time ("dynamic range").
    - `float16`: weights are stored in 16 bits.
    - `float32`: nothing changes.

    LayerNorms, biases, the position table, attention and additions stay float in each scheme.

    Args:
        scheme: a name from `SCHEMES`.
        float_layers: names of layers whose weights stay float32 whatever the scheme;
            shell patterns such as `"block_0_*"`, `"*_qkv"` or `"token_embedding"` (which covers
            both uses of the table in a model whose logits are tied to it).

    Raises:
        UserError: for an unknown scheme, with the nearest known one.
    """

    scheme: str = "int8"
    float_layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise UserError(
                f"Unknown quantization scheme {self.scheme!r}.{suggest(str(self.scheme), SCHEMES)}"
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
        object.__setattr__(self, "float_layers", tuple(patterns))  # the dataclass is frozen

    def keeps_float(self, layer_name: str) -> bool:
        """Whether `float_layers` names the layer called `layer_name`."""
        return any(fnmatch.fnmatchcase(layer_name, pattern) for pattern in self.float_layers)

    def layers_to_quantize(self, layer_names: Iterable[str]) -> set[str]:
        """Those of `layer_names` that `float_layers` does not keep.

        Raises:
            UserError: for a pattern that matches none of them, with the nearest name.
        """
        layer_names = set(layer_names)
        for pattern in self.float_layers:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in layer_names):
                raise UserError(
                    f"float_layers: {pattern!r} matches no layer with weights to quantize."
                    f"{suggest(pattern, layer_names)}"
                )
        return {name for name in layer_names if not self.keeps_float(name)}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `QuantConfig.from_dict` reads them back."""
        return {"scheme": self.scheme, "float_layers": list(self.float_layers)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> QuantConfig:
        """Build from `to_dict`'s values; an unknown key raises with the nearest known one."""
        known = {field.name for field in dataclasses.fields(cls)}
        for key in values:
            if key not in known:
                raise UserError(f"Unknown quantization option {key!r}.{suggest(key, known)}")
        return cls(**values)
