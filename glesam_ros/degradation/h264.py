"""A small H.264 codec, there and back: what a starved video link leaves of a picture.

Follows ITU-T H.264: 4:2:0, macroblocks of 16x16 predicted from the edges of their decoded neighbours (of the modes of
8.3.3 vertical, horizontal and DC), the integer 4x4 transform with the second transform of its means (8.5),
quantisation by QP, and the strong filter on the edges of macroblocks (8.7). One picture is coded, as an intra frame: no
motion, and no entropy coding, which loses nothing. Sums are whole numbers that float32 holds exactly, so the order in
which a machine adds does not change the bits.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from glesam_ros.validation import UInt8Array

Array = NDArray[Any]

MACROBLOCK = 16
SCALES = ((10, 16, 13), (11, 18, 14), (13, 20, 16), (14, 23, 18), (16, 25, 20), (18, 29, 23))
"""Rescaling factors of QP mod 6 for coefficients (even, even), (odd, odd) and the others; they double every 6 QP."""
CHROMA_QP = (29, 30, 31, 32, 32, 33, 34, 34, 35, 35, 36, 36, 37, 37, 37, 38, 38, 38, 39, 39, 39, 39)
"""QP of the colours at luma QP 30 to 51; below 30 it is that of luma."""
ROUNDING = 1 / 3
"""Of a quantisation step: what an encoder adds before it cuts, for intra frames."""

_FORWARD = np.array([[1, 1, 1, 1], [2, 1, -1, -2], [1, -1, -1, 1], [1, -2, 2, -1]], np.float32)
_INVERSE = np.array([[1, 1, 1, 0.5], [1, 0.5, -1, -1], [1, -0.5, -1, 1], [1, -1, 1, -0.5]], np.float32)
_HADAMARD = {
    2: np.array([[1, 1], [1, -1]], np.float32),
    4: np.array([[1, 1, 1, 1], [1, 1, -1, -1], [1, -1, -1, 1], [1, -1, 1, -1]], np.float32),
}
_EDGE_GREY = 128  # prediction where nothing is decoded yet


def h264(image: UInt8Array, qp: int) -> UInt8Array:
    """Code a picture and decode it.

    Args:
        image: (H, W, 3) uint8 RGB.
        qp: quantisation parameter, 0 (finest) .. 51.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        ValueError: `qp` is out of range.
    """
    if not 0 <= qp <= 51:
        raise ValueError(f"qp: expected 0 to 51, got {qp}")
    height, width = image.shape[:2]
    padded = cv2.copyMakeBorder(image, 0, -height % MACROBLOCK, 0, -width % MACROBLOCK, cv2.BORDER_REPLICATE)
    full = cv2.cvtColor(padded, cv2.COLOR_RGB2YCrCb)
    half = cv2.resize(full, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    luma = code_planes(np.asarray(full[None, ..., 0], np.uint8), MACROBLOCK, qp)
    colours = code_planes(np.asarray(half[..., 1:].transpose(2, 0, 1), np.uint8), MACROBLOCK // 2, chroma_qp(qp))
    for coded, step, at in ((luma, MACROBLOCK, qp), (colours, MACROBLOCK // 2, chroma_qp(qp))):
        smooth_edges(coded, step, at)
        smooth_edges(coded.transpose(0, 2, 1), step, at)
    size = (padded.shape[1], padded.shape[0])
    planes = [luma[0], *(cv2.resize(colour, size, interpolation=cv2.INTER_LINEAR) for colour in colours)]
    decoded = cv2.cvtColor(cv2.merge(planes), cv2.COLOR_YCrCb2RGB)
    return np.asarray(decoded[:height, :width], np.uint8)


def chroma_qp(qp: int) -> int:
    """QP of the colours where `qp` is that of luma (table 8-15)."""
    return qp if qp < 30 else CHROMA_QP[qp - 30]


def quantisation_steps(qp: int) -> Array:
    """Rescaling factor of each coefficient of a 4x4 block at `qp`, (4, 4) float32; it doubles every 6 QP."""
    even, odd, mixed = SCALES[qp % 6]
    pattern = np.array([[even, mixed], [mixed, odd]], np.float32)
    return np.asarray(np.tile(pattern, (2, 2)) * 2 ** (qp // 6), np.float32)


def code_planes(planes: UInt8Array, side: int, qp: int) -> UInt8Array:
    """Predict, transform, quantise and decode planes, without the filter on the edges.

    Args:
        planes: (P, H, W) uint8; height and width are multiples of `side`.
        side: of a macroblock in this plane, 16 for luma, 8 for colours.
        qp: 0..51.

    Returns:
        (P, H, W) uint8.
    """
    count, rows, columns = planes.shape[0], planes.shape[1] // side, planes.shape[2] // side
    source = planes.reshape(count, rows, side, columns, side).transpose(1, 3, 0, 2, 4).astype(np.float32)
    decoded = np.zeros_like(source)  # (rows, columns, P, side, side)
    for diagonal in range(rows + columns - 1):  # blocks of a diagonal do not need each other
        r = np.arange(max(0, diagonal - columns + 1), min(diagonal, rows - 1) + 1)
        c = diagonal - r
        wanted = source[r, c]
        predicted = _predict(wanted, *_neighbours(decoded, r, c))
        coded = predicted + code_residual(wanted - predicted, qp)
        decoded[r, c] = np.clip(coded, 0, 255, out=coded)
    return decoded.transpose(2, 0, 3, 1, 4).reshape(planes.shape).astype(np.uint8)


def _neighbours(decoded: Array, r: Array, c: Array) -> tuple[Array, Array]:
    """Decoded pixels (n, P, side) above and left of the blocks; at the border of the picture the mean of the other."""
    above, left = decoded[r - 1, c][..., -1, :], decoded[r, c - 1][..., -1]
    first_row, first_column = np.flatnonzero(r == 0), np.flatnonzero(c == 0)
    if first_row.size:
        above[first_row] = np.floor(left[first_row].mean(-1, keepdims=True) + 0.5)
    if first_column.size:
        left[first_column] = np.floor(above[first_column].mean(-1, keepdims=True) + 0.5)
        corner = first_column[r[first_column] == 0]
        above[corner] = left[corner] = _EDGE_GREY
    return above, left


def _predict(wanted: Array, above: Array, left: Array) -> Array:
    """Of the vertical, horizontal and DC prediction the one with the smallest sum of absolute differences."""
    side = wanted.shape[-1]
    mean = np.floor((above.sum(-1) + left.sum(-1) + side) / (2 * side))
    candidates = np.empty((3, *wanted.shape), np.float32)  # where two are as close, the earlier one is taken
    candidates[0], candidates[1], candidates[2] = mean[..., None, None], above[..., None, :], left[..., :, None]
    difference = wanted - candidates
    costs = np.abs(difference, out=difference).reshape(*candidates.shape[:-2], -1) @ np.ones(side * side, np.float32)
    which = costs.argmin(0)[..., None, None]
    best = candidates[0]
    np.copyto(best, candidates[1], where=which == 1)
    np.copyto(best, candidates[2], where=which == 2)
    return best


def code_residual(residual: Array, qp: int) -> Array:
    """Transform, quantise, and back.

    Args:
        residual: (..., side, side) float32 whole numbers -255..255, side 8 or 16.
        qp: 0..51.

    Returns:
        The decoded residual, same shape, float32 whole numbers.
    """
    k = residual.shape[-1] // 4
    norm, steps, forward, inverse, hadamard = _matrices(k, qp)
    coefficients = _both_sides(residual, forward)
    means = coefficients[..., ::4, ::4].reshape(-1, k * k)
    levels = _quantise(means @ hadamard, norm[0, 0] / k)
    means = levels @ hadamard * (steps[0, 0] / k)
    coefficients = _quantise(coefficients, norm)
    coefficients *= steps
    coefficients[..., ::4, ::4] = means.reshape(*residual.shape[:-2], k, k)
    decoded = _both_sides(coefficients, inverse)
    decoded += 32
    decoded /= 64
    return np.floor(decoded, out=decoded)


@lru_cache
def _matrices(k: int, qp: int) -> tuple[Array, ...]:
    """What `code_residual` needs for k x k blocks of 4x4; made once, for it is called for each diagonal.

    Returns:
        Factors before quantisation and steps after it, transform and inverse, each (4 k, 4 k); second transform of the
        means (k^2, k^2); all float32.
    """
    steps, eye = quantisation_steps(qp), np.eye(k, dtype=np.float32)
    # the rows of the transform are not of unit length; with those of the inverse this makes up for it
    norm = np.tile(np.array([[1.0, 0.8], [0.8, 0.64]], np.float32) * 4, (2, 2)) / steps
    return (
        np.tile(norm, (k, k)), np.tile(steps, (k, k)), np.kron(eye, _FORWARD), np.kron(eye, _INVERSE),
        np.kron(_HADAMARD[k], _HADAMARD[k]),
    )


def _both_sides(blocks: Array, matrix: Array) -> Array:
    """matrix @ block @ matrix.T of each block; two large products instead of many small ones."""
    side = blocks.shape[-1]
    half = (blocks.reshape(-1, side) @ matrix.T).reshape(blocks.shape).swapaxes(-1, -2)
    return (half.reshape(-1, side) @ matrix.T).reshape(blocks.shape).swapaxes(-1, -2)


def _quantise(values: Array, scale: Any) -> Array:
    scaled = values * scale
    scaled += np.copysign(np.float32(ROUNDING), scaled)
    return np.trunc(scaled, out=scaled)


def smooth_edges(planes: UInt8Array, step: int, qp: int) -> None:
    """Filter across the vertical edges between macroblocks, in place: the strong filter of 8.7.2.4.

    Args:
        planes: (P, H, W) uint8.
        step: columns between edges; 16 filters three pixels of each side (luma), 8 one (colours).
        qp: the thresholds below which a step counts as made by coding grow with it.
    """
    alpha, beta = int(0.8 * (2 ** (qp / 6) - 1)), max(0, qp // 2 - 7)
    right = planes[:, :, step:]
    left = planes[:, :, :-step]
    p3, p2, p1, p0 = (left[:, :, step - n :: step].astype(np.int16) for n in (4, 3, 2, 1))
    q0, q1, q2, q3 = (right[:, :, n::step].astype(np.int16) for n in (0, 1, 2, 3))
    gap = np.abs(p0 - q0)
    made = (gap < alpha) & (np.abs(p1 - p0) < beta) & (np.abs(q1 - q0) < beta)
    small = gap < (alpha >> 2) + 2
    for side, first, (a0, a1, a2, a3, b0, b1) in (
        (left, step - 1, (p0, p1, p2, p3, q0, q1)), (right, 0, (q0, q1, q2, q3, p0, p1))
    ):
        towards = -1 if side is left else 1
        flat = made & small & (np.abs(a2 - a0) < beta) if step == MACROBLOCK else np.zeros_like(made)
        near = np.where(flat, (a2 + 2 * a1 + 2 * a0 + 2 * b0 + b1 + 4) >> 3, (2 * a1 + a0 + b1 + 2) >> 2)
        far = ((a2 + a1 + a0 + b0 + 2) >> 2, (2 * a3 + 3 * a2 + a1 + a0 + b0 + 4) >> 3)
        for n, value, where in ((0, near, made), (1, far[0], flat), (2, far[1], flat)):
            np.copyto(side[:, :, first + n * towards :: step], value.astype(np.uint8), where=where)
