"""Folding LayerNorm's gamma and beta into the Dense that follows: fewer operations, same function.

`LayerNorm(x) @ W + b` is `(normalize(x) * gamma + beta) @ W + b`, which equals
`normalize(x) @ (gamma[:, None] * W) + (b + beta @ W)`. The export to TFLite does this for speed.
Quantization-aware training does it first too: per-channel scales of the unfolded kernel say nothing
about the folded one, so training has to see the kernel that the file will hold.
"""

from __future__ import annotations

import re

import numpy as np

# which Dense reads which norm's output
_READERS = {"attention_norm": "qkv", "mlp_norm": "fc"}
_GAMMA = re.compile(r"(block_\d+)_(attention_norm|mlp_norm)/gamma")


def fold_layer_norms(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same function with every block's LayerNorm at gamma 1 and beta 0.

    `final_norm` stays as it is: a tied token table cannot absorb gamma for the logits alone, and
    the head has no bias that could take beta.

    Args:
        weights: as `models.checkpoints.named_weights` gives them (`"block_0_qkv/kernel"`, ...),
            kernels `(in, out)`. It is not changed.

    Returns:
        A new dictionary with the same keys and float32 arrays; zeros of kernels stay zero. Folding
        twice changes nothing.
    """
    folded = {name: np.asarray(array, np.float32) for name, array in weights.items()}
    for name in weights:
        if not (match := _GAMMA.fullmatch(name)):
            continue
        block, norm = match.groups()
        beta_name, dense = f"{block}_{norm}/beta", f"{block}_{_READERS[norm]}"
        gamma, beta = folded[name].astype(np.float64), folded[beta_name].astype(np.float64)
        kernel, bias = folded[f"{dense}/kernel"], folded[f"{dense}/bias"]  # (in, out), (out,)
        folded[f"{dense}/kernel"] = (gamma[:, None] * kernel).astype(np.float32)
        folded[f"{dense}/bias"] = (bias + beta @ kernel).astype(np.float32)
        folded[name] = np.ones_like(folded[name])
        folded[beta_name] = np.zeros_like(folded[beta_name])
    return folded
