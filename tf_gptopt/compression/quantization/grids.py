"""Grids: a matrix as small integers and the scales that give them back. numpy alone.

A weight `w` of a group with scale `s` becomes the integer `q = round(w / s)` and means `q * s`. The
groups are the whole matrix, its rows (one an output channel, or a token), or blocks of neighbours
in a row. Grids are symmetric: zero is zero, so pruned weights stay pruned.

**Nothing has to travel beside the weights.** Scales keep so few bits that every `q * s` is exact in
float32. A matrix on a grid is then an ordinary float32 matrix, and `find_grid` finds its integers
and scales again, to the last bit, whoever put it there: quantization-aware training, GPTQ or plain
rounding, before or after any number of files.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from tf_gptopt._errors import UserError

LIMITS = {8: (-127, 127), 4: (-8, 7)}  # integers of a weight; -128 is not used
_SCALE_BITS = ~np.uint32(0x7F)  # the 17 leading bits: times 127, exact in float32's 24
SMALLEST = np.float32(1e-32)  # a group that would need a smaller scale becomes zero, with scale 1
LEAST_CLIP = np.float32(2.0**-30)  # of what the largest weight needs: a range reaches that far
SMALLEST_HALF = np.float32(2.0**-24)  # float16's least number: scales of blocks are float16
_SHRINKS = np.linspace(1.0, 0.5, 21, dtype=np.float32)  # of the range, tried for the least error


@dataclasses.dataclass(frozen=True)
class Grid:
    """A quantized matrix.

    Args:
        integers: `(rows, width)` int8, within `LIMITS[bits]`.
        scales: float32: `(1, 1)` for the whole matrix, `(rows, 1)` for its rows, `(rows, blocks)`
            for blocks of `width / blocks` neighbours, whose scales float16 holds too.
        bits: 8 or 4.
    """

    integers: np.ndarray
    scales: np.ndarray
    bits: int

    @property
    def block(self) -> int | None:
        """Weights of a block; None where a scale has a whole row or more."""
        blocks = self.scales.shape[1]
        return self.integers.shape[1] // blocks if blocks > 1 else None

    def values(self) -> np.ndarray:
        """What the integers mean, `(rows, width)` float32, exactly."""
        rows, blocks = len(self.integers), self.scales.shape[1]
        grouped = self.integers.reshape(rows, blocks, -1).astype(np.float32)
        return (grouped * self.scales[:, :, None]).reshape(self.integers.shape)


def quantize_matrix(
    matrix: np.ndarray,
    bits: int = 8,
    group: str | int = "channel",
    range: str = "minmax",
    percentile: float = 99.9,
    peak: float | None = None,
) -> Grid:
    """Round `matrix` to the nearest points of a grid.

    Args:
        matrix: `(rows, width)` float32.
        bits: 8 or 4.
        group: who shares a scale: `"tensor"` (or `"global"`, with a `peak`), `"channel"` (a row) or
            so many neighbours of a row, which must divide the width.
        range: how far a group's grid reaches: to its largest weight (`"minmax"`), to a percentile
            of the magnitudes, or as far as makes the squared error least (`"mse"`). What lies
            beyond is clipped.
        percentile: for that range, in percent.
        peak: a range that all groups share, instead of their own.

    Raises:
        UserError: for weights that float16 scales cannot hold (blocks only).
    """
    grouped = grouped_view(matrix, group)
    scales = find_scales(grouped, bits, group, range, percentile, peak)
    return _as_grid(grouped, _rounded(grouped, scales, bits), scales, bits, matrix.shape)


def find_grid(matrix: np.ndarray, bits: int = 8, group: str | int = "channel") -> Grid | None:
    """The grid that `matrix` lies on exactly, or None if it lies on none.

    Args:
        matrix, bits, group: as in `quantize_matrix`.
    """
    grouped = grouped_view(matrix, group)
    flat = grouped.reshape(-1, grouped.shape[2])
    scales = np.ones(len(flat), np.float32)
    largest = np.abs(flat).argmax(1)
    peaks = np.take_along_axis(flat, largest[:, None], 1)[:, 0]
    low, high = LIMITS[bits]
    limits = np.where(peaks < 0, -low, high)
    open_ = np.flatnonzero(peaks)
    few = np.linspace(0, flat.shape[1] - 1, min(16, flat.shape[1])).astype(int)
    for start in (open_[:64], open_):  # a matrix on no grid is known by its first groups
        pending = start
        for count in np.arange(max(-low, high), 0, -1):  # the largest weight is this many steps
            tried = pending[limits[pending] >= count]
            steps = np.abs(peaks[tried]) / np.float32(count)
            fits = _stored(steps, group) & _on_steps(flat[np.ix_(tried, few)], steps, bits)
            tried, steps = tried[fits], steps[fits]
            fits = _on_steps(flat[tried], steps, bits)
            scales[tried[fits]] = steps[fits]
            pending = np.setdiff1d(pending, tried[fits], assume_unique=True)
            if not len(pending):
                break
        if len(pending):
            return None
    scales = scales.reshape(*grouped.shape[:2], 1)
    return _as_grid(grouped, np.rint(grouped / scales), scales, bits, matrix.shape)


def grouped_view(matrix: np.ndarray, group: str | int) -> np.ndarray:
    """`matrix` `(rows, width)` as float32 `(rows, groups, weights of a group)`; `(1, 1, all)` for
    "tensor" and "global".

    Raises:
        UserError: for blocks that do not divide the width.
    """
    matrix = np.ascontiguousarray(matrix, np.float32)
    rows, width = matrix.shape
    if group in ("tensor", "global"):
        return matrix.reshape(1, 1, -1)
    if group == "channel":
        return matrix.reshape(rows, 1, width)
    if width % int(group):
        raise UserError(f"Blocks of {group} weights do not divide rows of {width}.")
    return matrix.reshape(rows, width // int(group), int(group))


def find_scales(
    grouped: np.ndarray,
    bits: int,
    group: str | int,
    range: str = "minmax",
    percentile: float = 99.9,
    peak: float | None = None,
) -> np.ndarray:
    """The scales of groups `(rows, groups, weights)`, float32 `(rows, groups, 1)`.

    Args: as `quantize_matrix`.
    """
    high = LIMITS[bits][1]
    if peak is not None:
        return round_scales(np.full((*grouped.shape[:2], 1), peak / high), group)
    if range == "percentile":
        peaks = np.percentile(np.abs(grouped), percentile, axis=2, keepdims=True)
        least = find_reach(grouped, bits) * LEAST_CLIP
        return round_scales(np.maximum(peaks / high, least), group)
    widest = find_reach(grouped, bits)
    if range == "minmax":
        return round_scales(widest, group)
    best, least = None, None
    for shrink in _SHRINKS:
        scales = round_scales(widest * shrink, group)
        error = np.square(_rounded(grouped, scales, bits) * scales - grouped).sum(2, keepdims=True)
        if best is None:
            best, least = scales, error
        else:
            better = error < least
            best, least = np.where(better, scales, best), np.where(better, error, least)
    return best


def find_reach(grouped: np.ndarray, bits: int) -> np.ndarray:
    """The scales that the largest weights of groups need, not rounded, `(rows, groups, 1)`."""
    low, high = LIMITS[bits]
    above = np.maximum(grouped.max(2, keepdims=True), 0.0) / np.float32(high)
    below = np.maximum(-grouped.min(2, keepdims=True), 0.0) / np.float32(-low)
    return np.maximum(above, below)


def round_scales(scales: np.ndarray, group: str | int) -> np.ndarray:
    """`scales` with the bits that a file keeps of them, as float32.

    A scale for rows or more keeps its 17 leading bits; one for blocks is a float16.
    """
    scales = np.asarray(scales, np.float32)
    if isinstance(group, int):
        with np.errstate(over="ignore"):
            half = scales.astype(np.float16).astype(np.float32)
        if not np.isfinite(half).all():
            raise UserError(
                f"Weights up to {scales.max() * 8:.3g} are too large for blocks, whose scales are "
                'float16. Take granularity="channel".'
            )
        return np.where(half < SMALLEST_HALF, np.float32(1), half)
    kept = (scales.view(np.uint32) & _SCALE_BITS).view(np.float32)
    return np.where(kept < SMALLEST, np.float32(1), kept)


def activation_scale(low: float, high: float, symmetric: bool = False) -> tuple[float, int]:
    """Scale and zero point of int8 activations between `low` and `high`.

    The integer `q` means `(q - zero_point) * scale`. The range is widened to hold 0, which is then
    exact.

    Args:
        low, high: the range, finite.
        symmetric: whether zero lies in the middle: integers -127 to 127 and zero point 0, else -128
            to 127.

    Returns:
        A scale that float32 holds exactly, and a zero point in -128..127; 1 and 0 for no range.

    Raises:
        UserError: for a range that is none.
    """
    if not np.isfinite([low, high]).all() or low > high:
        raise UserError(f"Activations need a range low <= high. Received: {low} to {high}.")
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    scale = np.float32(max(-low, high) / 127 if symmetric else (high - low) / 255)
    if scale < SMALLEST:
        return 1.0, 0
    zero_point = 0 if symmetric else round(-128 - low / float(scale))
    return float(scale), min(max(zero_point, -128), 127)


def _rounded(grouped: np.ndarray, scales: np.ndarray, bits: int) -> np.ndarray:
    """The integers, as float32."""
    low, high = LIMITS[bits]
    integers = grouped / scales
    return np.clip(np.rint(integers, out=integers), low, high, out=integers)


def _as_grid(
    grouped: np.ndarray, integers: np.ndarray, scales: np.ndarray, bits: int, shape: tuple[int, ...]
) -> Grid:
    return Grid(integers.astype(np.int8).reshape(shape), scales[:, :, 0], bits)


def _stored(scales: np.ndarray, group: str | int) -> np.ndarray:
    """Whether a file can hold each of `scales` exactly."""
    if isinstance(group, int):
        with np.errstate(over="ignore"):
            return scales.astype(np.float16).astype(np.float32) == scales
    return scales.view(np.uint32) & ~_SCALE_BITS == 0


def _on_steps(flat: np.ndarray, steps: np.ndarray, bits: int) -> np.ndarray:
    """Which rows of `flat` are integers within limits times their step, exactly."""
    if not len(flat):
        return np.zeros(0, bool)
    low, high = LIMITS[bits]
    integers = np.rint(flat / steps[:, None])
    inside = (integers >= low) & (integers <= high)
    return (inside & (integers * steps[:, None] == flat)).all(1)
