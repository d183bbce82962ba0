"""Everything mode of SAM and SAM 2: a grid of points over the image and its crops, the best masks of them all.

After segment-anything's automatic masks (Kirillov et al. 2023, appendix B), with these differences. Each crop is
enhanced as the whole image is. Masks stay at the resolution of the logits. Memory is bounded: a batch of prompts on
the device, and `limit` masks of the crop at hand and `limit` of those before it on the host; the result does not depend
on the size of the batch. Finer crops have fewer points a side (`GRID_DOWNSCALE`; upstream's default is 1). What is left
goes through the pipeline's suppression by mask IoU, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glesam_ros.masks import areas, extents_of
from glesam_ros.models.base import STABILITY_OFFSET, Budget, Candidates, check_finite
from glesam_ros.models.glesam.base import LOGIT_STRIDE, STRIDE, BaseModel, Features
from glesam_ros.models.glesam.runtime import Runtime
from glesam_ros.validation import FloatArray

CROP_OVERLAP = 512 / 1500
"""Overlap of the 2x2 crops as a share of the image's short side; finer crops overlap by less (upstream's default)."""
GRID_DOWNSCALE = 2
"""Points a side shrink by this with each layer, so that a layer of crops costs as many points as the whole image."""
EDGE = 20
"""A mask whose box comes this near to an inner edge of its crop, in pixels of the image, is cut off there: dropped."""
OUTSIDE = -32.0
"""Logit of what lies outside of a mask's crop."""
LEVELS = STABILITY_OFFSET, -STABILITY_OFFSET
"""Mask thresholds whose areas give the stability."""

IntArray = NDArray[np.intp]


class Crop(NamedTuple):
    """A window of the image in pixels, right and bottom exclusive; layer k has 2^k x 2^k of them."""

    left: int
    top: int
    right: int
    bottom: int
    layer: int

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.bottom - self.top, self.right - self.left


class _Found(NamedTuple):
    """Masks without their logits: boxes (n, 4) xyxy in pixels of the image, scores (n,), points and choices (n,)."""

    boxes: FloatArray
    scores: FloatArray
    point: IntArray
    choice: IntArray

    def join(self, other: _Found) -> _Found:
        """The rows of both."""
        boxes, scores = np.concatenate([self.boxes, other.boxes]), np.concatenate([self.scores, other.scores])
        point, choice = np.concatenate([self.point, other.point]), np.concatenate([self.choice, other.choice])
        return _Found(boxes, scores, point, choice)

    def pick(self, rows: IntArray) -> _Found:
        """These rows, in this order."""
        return _Found(self.boxes[rows], self.scores[rows], self.point[rows], self.choice[rows])


def propose(
    runtime: Runtime,
    base: BaseModel,
    embed: Callable[[Crop], Features],
    size: tuple[int, int],
    score_threshold: float,
    limit: int,
    budget: Budget,
) -> Candidates:
    """The best masks of an image.

    Args:
        runtime: decodes.
        base: says where an image lies in the square input.
        embed: features of a crop, enhanced or not; asked once for each crop, small ones first, the whole image last.
        size: (height, width) of the image in pixels.
        score_threshold: least predicted IoU.
        limit: at most so many masks.
        budget: points a side and a batch, crop layers, stability and overlap of the masks.

    Returns:
        Candidates, best first, that cover the whole image at its own logit resolution.
    """
    kept_boxes, kept_scores = np.zeros((0, 4), np.float32), np.zeros(0, np.float32)
    kept: list[FloatArray] = []
    cells = (0, 0)
    # small crops first: where they and large ones find the same, the small one's mask is finer (upstream's order)
    for crop in reversed(crops(size, budget.crop_layers)):
        features = embed(crop)
        side = features.latent.shape[-1] * STRIDE
        height, width = base.content(size, side)
        cells = (height // LOGIT_STRIDE, width // LOGIT_STRIDE)
        found, logits = _crop_masks(runtime, base, features, crop, size, score_threshold, limit, budget)
        best = np.flatnonzero(~_overlapped(found.boxes, kept_boxes, budget.nms_iou))
        kept += [_paste(logits[k], crop, size, cells) if crop.layer else logits[k] for k in best]
        kept_boxes = np.concatenate([kept_boxes, found.boxes[best]])
        kept_scores = np.concatenate([kept_scores, found.scores[best]])
        order = np.argsort(-kept_scores, kind="stable")[:limit]
        kept_boxes, kept_scores, kept = kept_boxes[order], kept_scores[order], [kept[k] for k in order]
    stacked = np.zeros((len(kept), *cells), np.float32)
    for row, mask in enumerate(kept):
        stacked[row] = mask
    return Candidates(stacked, kept_scores)


def point_grid(points_per_side: int) -> FloatArray:
    """(n * n, 2) float32 xy in 0..1: the centres of n x n equal cells, row by row."""
    centres = (np.arange(points_per_side, dtype=np.float32) + 0.5) / points_per_side
    x, y = np.meshgrid(centres, centres)
    return np.stack([x.ravel(), y.ravel()], 1)


def crops(size: tuple[int, int], layers: int) -> list[Crop]:
    """The whole image and the crops of `layers` further layers of an image of `size` (height, width), coarse first."""
    height, width = size
    found = [Crop(0, 0, width, height, 0)]
    for layer in range(1, layers + 1):
        n = 2**layer
        overlap = int(CROP_OVERLAP * min(size) * 2 / n)
        tall, wide = (math.ceil((overlap * (n - 1) + whole) / n) for whole in size)
        for left in range(0, n * (wide - overlap), wide - overlap):
            for top in range(0, n * (tall - overlap), tall - overlap):
                right, bottom = min(left + wide, width), min(top + tall, height)
                # an image of a few pixels has fewer crops
                if left < right and top < bottom:
                    found.append(Crop(left, top, right, bottom, layer))
    return found


def box_nms(boxes: FloatArray, scores: FloatArray, iou_threshold: float, limit: int) -> IntArray:
    """Greedy non-maximum suppression.

    Args:
        boxes: (n, 4) float32 xyxy.
        scores: (n,) float32.
        iou_threshold: a box that overlaps a better one by more than this is dropped.
        limit: stop after so many.

    Returns:
        Indices of the kept boxes, best first.
    """
    rest = np.argsort(-scores, kind="stable")
    kept: list[int] = []
    while rest.size and len(kept) < limit:
        kept.append(int(rest[0]))
        rest = rest[1:]
        rest = rest[~_overlapped(boxes[rest], boxes[kept[-1:]], iou_threshold)]
    return np.array(kept, np.intp)


def _overlapped(boxes: FloatArray, others: FloatArray, iou_threshold: float) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """(n,): whether each of the boxes (n, 4) overlaps any of the others (m, 4) by more than the threshold."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    both = np.maximum(high - low, 0).prod(2)
    area, others_area = ((b[:, 2:] - b[:, :2]).prod(1) for b in (boxes, others))
    found: np.ndarray[Any, np.dtype[np.bool_]] = (both > iou_threshold * (area[:, None] + others_area - both)).any(1)
    return found


def _crop_masks(
    runtime: Runtime,
    base: BaseModel,
    features: Features,
    crop: Crop,
    size: tuple[int, int],
    score_threshold: float,
    limit: int,
    budget: Budget,
) -> tuple[_Found, list[FloatArray]]:
    """The best masks of one crop, best first, and their logits (h, w) float16 on the host."""
    content = base.content(crop.size, features.latent.shape[-1] * STRIDE)
    grid = point_grid(max(1, budget.points_per_side // GRID_DOWNSCALE**crop.layer))
    points = (grid * (content[1], content[0])).astype(np.float32)

    def decode(rows: IntArray) -> tuple[Tensor, Tensor]:
        logits, scores = runtime.decode(features, points[rows, None], np.ones((len(rows), 1), np.float32), True)
        return logits[..., : content[0] // LOGIT_STRIDE, : content[1] // LOGIT_STRIDE], scores

    none = np.zeros(0, np.intp)
    found = _Found(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), none, none)
    held: dict[int, FloatArray] = {}
    for start in range(0, len(points), budget.points_per_batch):
        rows = np.arange(start, min(start + budget.points_per_batch, len(points)))
        logits, scores = decode(rows)
        new = _filter(logits, scores, rows, crop, size, score_threshold, budget.stability_threshold, runtime.device)
        first = len(found.scores)
        found = found.join(new)
        rivals = np.array([*held, *range(first, len(found.scores))], np.intp)
        winners = rivals[box_nms(found.boxes[rivals], found.scores[rivals], budget.nms_iou, limit)]
        held = {int(k): held[int(k)] for k in winners if k < first}
        fresh = winners[winners >= first]
        held.update(zip(fresh.tolist(), _to_host(logits, found.point[fresh] - start, found.choice[fresh])))
    winners = box_nms(found.boxes, found.scores, budget.nms_iou, limit)
    # a mask that lost to one which itself lost later is wanted again: decode its point once more
    missing = [int(k) for k in winners if int(k) not in held]
    for start in range(0, len(missing), budget.points_per_batch):
        again = np.array(missing[start : start + budget.points_per_batch], np.intp)
        logits, _ = decode(found.point[again])
        held.update(zip(again.tolist(), _to_host(logits, np.arange(len(again)), found.choice[again])))
    return found.pick(winners), [held[int(k)] for k in winners]


def _filter(
    logits: Tensor,
    scores: Tensor,
    rows: IntArray,
    crop: Crop,
    size: tuple[int, int],
    score_threshold: float,
    stability_threshold: float,
    device: str,
) -> _Found:
    """What of a batch's masks, logits (K, M, h, w) and scores (K, M), is sure, stable, and not cut off by its crop.

    Raises:
        RuntimeError: a score is not finite; `device` is for the message.
    """
    choices, height, width = logits.shape[1:]
    masks = logits.flatten(0, 1)
    # what overflowed in a mask makes its score so
    scores = scores.flatten() + 0 * masks[:, 0, 0]
    sure = torch.nonzero(~(scores < score_threshold) | ~scores.isfinite())[:, 0]
    scores = scores[sure]
    measured = _measured(masks[sure] if len(sure) < len(masks) else masks)  # a copy, mostly of few
    inner, outer, right = measured[:, 0], measured[:, 1], measured[:, 4]
    stable = (right > 0) & (inner >= stability_threshold * outer)
    # one transfer for all that the host decides by
    rows_found = torch.cat([sure[:, None].double(), scores[:, None].double(), measured[:, 2:].double()], 1)
    table = rows_found[stable | ~scores.isfinite()].cpu().numpy()
    check_finite(table[:, 1], f"scores on {device}")
    pixel = crop.size[1] / width, crop.size[0] / height
    boxes = table[:, 2:] * (*pixel, *pixel) + (crop.left, crop.top, crop.left, crop.top)
    whole = ~_cut_off(boxes, crop, size)
    index = table[whole, 0].astype(np.intp)
    return _Found(
        boxes[whole].astype(np.float32), table[whole, 1].astype(np.float32), rows[index // choices], index % choices
    )


def _measured(masks: Tensor) -> Tensor:
    """Cells of logits (n, h, w) above 1 and above -1, and the extent of those above 0, zeros where none is: (n, 6)."""
    if masks.device.type != "cpu":
        return _measured_by_torch(masks)
    # there torch takes several times as long
    cells = masks.numpy()
    counts = [areas(cells > level) for level in LEVELS]
    return torch.from_numpy(np.concatenate([np.stack(counts, 1), extents_of(cells > 0)], 1))


def _measured_by_torch(masks: Tensor) -> Tensor:
    height, width = masks.shape[1:]
    binary = masks > 0
    across, down = binary.any(1), binary.any(2)
    extents = torch.stack(
        [
            across.int().argmax(1),
            down.int().argmax(1),
            width - across.flip(1).int().argmax(1),
            height - down.flip(1).int().argmax(1),
        ],
        1,
    )
    inner, outer = (torch.count_nonzero(masks > level, (1, 2)) for level in LEVELS)
    return torch.cat([inner[:, None], outer[:, None], extents * across.any(1, keepdim=True)], 1)


def _cut_off(boxes: Any, crop: Crop, size: tuple[int, int]) -> Any:
    """(n,): whether boxes (n, 4) come near an edge of their crop that is no edge of the image."""
    inner = np.array([crop.left > 0, crop.top > 0, crop.right < size[1], crop.bottom < size[0]])
    at_image = np.abs(boxes - (0, 0, size[1], size[0])) <= EDGE
    return ((np.abs(boxes - crop[:4]) <= EDGE) & inner & ~at_image).any(1)


def _to_host(logits: Tensor, row: IntArray, choice: IntArray) -> list[FloatArray]:
    """Masks (row, choice) of logits (K, M, h, w) as float16 arrays (h, w) of their own."""
    where = [torch.from_numpy(index).to(logits.device) for index in (row, choice)]
    limits = torch.finfo(torch.float16)
    picked = logits[where[0], where[1]].clamp(limits.min, limits.max).half().cpu().numpy()
    # copies: a view would keep the whole batch alive
    return [mask.copy() for mask in picked]


def _paste(logits: FloatArray, crop: Crop, size: tuple[int, int], cells: tuple[int, int]) -> FloatArray:
    """Logits (h, w) of a crop in the frame of the whole image, (*cells) float16, `OUTSIDE` around the crop."""
    pixel = size[1] / cells[1], size[0] / cells[0]
    step = [p * n / whole for p, n, whole in zip(pixel, logits.shape[::-1], crop.size[::-1])]
    start = [
        (p / 2 - first) * n / whole - 0.5
        for p, first, n, whole in zip(pixel, (crop.left, crop.top), logits.shape[::-1], crop.size[::-1])
    ]
    inverse = np.array([[step[0], 0, start[0]], [0, step[1], start[1]]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    placed = cv2.warpAffine(
        logits.astype(np.float32), inverse, cells[::-1], flags=flags, borderMode=cv2.BORDER_CONSTANT,
        borderValue=OUTSIDE,
    )
    return np.asarray(placed, np.float16)  # type: ignore[arg-type]
