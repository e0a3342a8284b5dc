"""GPTQ: round a kernel to its grid, and let later weights answer for the rounding of earlier ones.

Frantar, Ashkboos, Hoefler & Alistarh 2022, "GPTQ: Accurate Post-Training Quantization for
Generative Pre-trained Transformers", arXiv:2210.17323. The frame is that of
`compression/hessian.py`: input by input, each weight becomes the nearest point of its grid, and
what that costs in the layer's output is made good by the inputs that follow. A block of neighbours
gets its scale when its turn comes, from the weights as they are by then.

Written here rather than taken from ai-edge-quantizer, which quantizes converted files: this one
needs no conversion and none back, walks the model's blocks in bounded memory, rounds to the grids
of `grids.py`, and keeps the zeros of a pruned model.

**The tied table** is looked up and multiplied with. Its rows answer for both: the Hessian of the
head's inputs plus a share of the identity, which is the Hessian of looking up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tf_gptopt.compression.block_parts import HEAD
from tf_gptopt.compression.calibration import Progress, stream_inputs, walk_blocks
from tf_gptopt.compression.hessian import (
    Moments,
    inverse_factor,
    observe_moments,
    settle_in_order,
)
from tf_gptopt.compression.quantization.config import BITS, QuantConfig
from tf_gptopt.compression.quantization.grids import (
    LIMITS,
    find_grid,
    find_scales,
    grouped_view,
)
from tf_gptopt.compression.quantization.rounding import (
    TABLE,
    round_matrix,
    round_positions,
    shared_peaks,
)
from tf_gptopt.models.checkpoints import named_weights
from tf_gptopt.models.gpt import GPTModel

LOOKUP = 0.3  # of a tied table's Hessian is that of looking up, by the mean of the diagonal
_OUTPUTS = 4096  # of a kernel that are worked on at once


def solves_table(model: GPTModel, config: QuantConfig) -> bool:
    """Whether GPTQ is for the token table: its rows have neighbours to answer for them only where
    logits are made of it."""
    tied = model.config.tie_embeddings and not config.keeps_float("token_embedding")
    return tied and config.rounding == "gptq"


def quantize_table(
    model: GPTModel, config: QuantConfig, token_ids: Any, on_progress: Progress | None = None
) -> None:
    """Put a tied table on its grid in place by GPTQ, for what goes into the float model's head.

    Args: as `quantize_blocks`.
    """
    table = model.base_layer("token_embedding").embeddings
    moments = Moments()
    stream_inputs(
        model, token_ids, [HEAD], lambda _, x: moments.observe(x), on_progress=on_progress
    )
    hessian = moments.hessian()
    hessian += LOOKUP * np.diag(hessian).mean() * np.eye(len(hessian))
    peaks = shared_peaks(named_weights(model), config)
    table.assign(_solve("token_embedding", table.numpy().T, hessian, config, peaks).T)


def quantize_blocks(
    model: GPTModel, config: QuantConfig, token_ids: Any, on_progress: Progress | None = None
) -> None:
    """Put the matrices of `model` on their grids in place, block by block, by GPTQ or to the
    nearest point, and correct biases, as `config` says.

    A layer's bias takes back the mean error of its outputs, E[x] (W - W') (Nagel et al. 2019,
    arXiv:1906.04721). The kernels of a block are all solved for the inputs that the float block
    makes of what the quantized blocks before it hand on. Memory: see `calibration.py`, and for one
    block the Hessian of each of its layers and some float64 matrices of `_OUTPUTS` outputs.

    Args:
        model: a plain float32 model whose LayerNorms are folded.
        config: all that it says of weights counts.
        token_ids: `(examples, time)` integers; see `calibration_ids`.
        on_progress: called as `on_progress(done, total, what)`.
    """
    peaks = shared_peaks(named_weights(model), config)
    table = model.base_layer("token_embedding").embeddings
    table.assign(round_matrix(TABLE, table.numpy(), config, peaks))
    positions = model.base_layer("position_embedding").embeddings
    positions.assign(round_positions(positions.numpy(), config))
    by_gptq = config.rounding == "gptq"
    own_head = not model.config.tie_embeddings
    for block in walk_blocks(model, token_ids, on_progress=on_progress, head=own_head):
        for name in block.layers:
            if config.keeps_float(name):
                kernel = model.base_layer(name).kernel
                kernel.assign(round_matrix(f"{name}/kernel", kernel.numpy(), config))
        names = [name for name in block.layers if not config.keeps_float(name)]
        for name, moments in observe_moments(block, names, hessian=by_gptq).items():
            layer = model.base_layer(name)
            kernel = layer.kernel.numpy()
            if by_gptq:
                on_grid = _solve(name, kernel, moments.hessian(), config, peaks)
            else:
                on_grid = round_matrix(f"{name}/kernel", kernel, config, peaks)
            layer.kernel.assign(on_grid)
            if config.bias_correction and layer.use_bias:
                error = kernel.astype(np.float64) - on_grid
                layer.bias.assign_add((moments.mean() @ error).astype(np.float32))


def _solve(
    name: str,
    kernel: np.ndarray,
    hessian: np.ndarray,
    config: QuantConfig,
    peaks: Mapping[int, float],
) -> np.ndarray:
    """`solve_kernel` with what `config` says of the layer of this name."""
    bits, group = BITS[config.weights_of(name)], config.group_of(name, len(kernel))
    peak = peaks[bits] if group == "global" else None
    return solve_kernel(kernel, hessian, bits, group, config.range, config.percentile, peak)


def solve_kernel(
    kernel: np.ndarray,
    hessian: np.ndarray,
    bits: int = 4,
    group: str | int = 32,
    range: str = "minmax",
    percentile: float = 99.9,
    peak: float | None = None,
) -> np.ndarray:
    """A kernel on a grid, near `kernel` in what it does to the inputs.

    Args:
        kernel: `(inputs, outputs)` float32.
        hessian: `(inputs, inputs)` float64, of any scale.
        bits, group, range, percentile, peak: as in `grids.quantize_matrix`, of the transposed
            kernel.

    Returns:
        `(inputs, outputs)` float32, zero wherever `kernel` was; `kernel` itself if it lies on such
        a grid.
    """
    if find_grid(kernel.T, bits, group) is not None:
        return kernel
    size = group if isinstance(group, int) else len(kernel)
    factor, _ = inverse_factor(hessian)

    def scales_of(weights: np.ndarray) -> np.ndarray:
        """Of the groups that inputs `(size, outputs)` are, `(outputs,)`; or the one of all."""
        grouped = grouped_view(weights.T, group)
        scales = find_scales(grouped, bits, group, range, percentile, peak)
        return scales[:, 0, 0].astype(np.float64)

    shared = scales_of(kernel) if group in ("tensor", "global") else None
    parts = np.array_split(kernel, -(-kernel.shape[1] // _OUTPUTS), axis=1)
    solved = [_solve_part(part, factor, bits, size, shared, scales_of) for part in parts]
    return np.concatenate(solved, axis=1)


def _solve_part(
    kernel: np.ndarray,
    factor: np.ndarray,
    bits: int,
    size: int,
    shared: np.ndarray | None,
    scales_of: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """Some outputs of a kernel: they depend on each other only by a scale that they share."""
    low, high = LIMITS[bits]
    weights, alive, scales = kernel.astype(np.float64), kernel != 0, shared

    def choose_scales(start: int, end: int) -> None:
        nonlocal scales
        scales = scales_of(weights[start:end]) if shared is None else shared

    def nearest(i: int, row: np.ndarray) -> np.ndarray:
        steps = np.clip(np.rint(row / scales), low, high)
        return np.where(alive[i], steps, 0.0) * scales + 0.0  # no -0.0

    settle_in_order(weights, factor, size, choose_scales, nearest)
    return weights.astype(np.float32)
