"""What is measured on one photograph, under each condition, with each method.

Points follow GleSAM (arXiv 2503.12507, section 4.1): three random positive points from each true mask. Boxes are the
tight boxes of the true masks. Everything mode: for each true region the best of at most 100 masks, and COCO's recall.
All that is random comes from the seed, the data set and the photograph's name, so neither order nor number of
processes matters.
"""

from __future__ import annotations

import functools
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import numpy as np

from glesam_ros.datasets import Photograph, load_lqseg, region_masks
from glesam_ros.degradation import degrade
from glesam_ros.evaluation import MAX_MASKS
from glesam_ros.evaluation.baselines import GRABCUT, LEARNED, Restorer, applies, grabcut, load_restorers
from glesam_ros.evaluation.metrics import (
    Doubles,
    boundary,
    dice,
    iou,
    mask_boxes,
    pairwise_iou,
    pixel_accuracy,
    region_recall,
    sample_points,
)
from glesam_ros.instances import Instances
from glesam_ros.models import Embedding, SegmentationModel, load_model
from glesam_ros.pipeline import EnhancementGate, Pipeline, budget, in_mode
from glesam_ros.settings import ENHANCEMENT_MODES, Settings
from glesam_ros.validation import BoolArray, FloatArray, UInt8Array

MIN_AREA = 1000
"""True regions with fewer pixels are left out."""
POINTS = 3
"""Of each region as in GleSAM's protocol; fewer are the first ones of these."""
MODES = ENHANCEMENT_MODES
MOST_BOX_ERROR = 0.2
"""At more than 0.25 a box could turn inside out."""
PROMPTS = ("points", "boxes", "everything")
_MASK_METRICS = ("iou", "dice", "accuracy", "boundary", "score")
METRICS = {"points": _MASK_METRICS, "boxes": _MASK_METRICS, "everything": ("best_iou", "map_iou", "ar10", "ar100")}
"""Metrics of each kind of prompt; "points" and "iou" make the name "points_iou". GrabCut has no score."""

Values = dict[tuple[str, str], list[float]]
"""(method, metric) -> one value a true region; a method is an enhancement mode or a baseline."""


@dataclass(frozen=True, order=True)
class Condition:
    """A degradation; `kind` "" and `level` 0 is the clear photograph."""

    kind: str = ""
    level: int = 0

    @property
    def name(self) -> str:
        """As in the tables: "clear", "lq-3"."""
        return f"{self.kind}-{self.level}" if self.kind else "clear"


CLEAR = Condition()


@dataclass(frozen=True)
class Case:
    """One photograph and the conditions under which it is measured.

    Attributes:
        set_name: of the data set.
        photograph: clear.
        conditions: each with its picture (H, W, 3) uint8 RGB; None: degraded here, by the photograph's seed.
    """

    set_name: str
    photograph: Photograph
    conditions: tuple[tuple[Condition, UInt8Array | None], ...]


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        modes: of enhancement, some of `MODES`.
        prompts: some of `PROMPTS`.
        baselines: some of `glesam_ros.evaluation.baselines.BASELINES`.
        seed: at least 0.
        box_error: by how much the sides of box prompts err, see `moved_boxes`; 0: they are tight.
        points: of each region, 1 .. `POINTS`.
    """

    modes: tuple[str, ...] = MODES
    prompts: tuple[str, ...] = PROMPTS
    baselines: tuple[str, ...] = ()
    seed: int = 0
    box_error: float = 0.0
    points: int = POINTS


@dataclass(frozen=True)
class Measurement:
    """One photograph under one condition.

    Attributes:
        set_name, photograph, condition: what was measured.
        level: degradation as the model measures it, 0..1.
        enhanced: whether automatic mode enhances.
        values: see `Values`.
        seconds: processor time without the baselines; differs from run to run.
    """

    set_name: str
    photograph: str
    condition: Condition
    level: float
    enhanced: bool
    values: Values
    seconds: float = field(compare=False)


@dataclass(frozen=True, eq=False)
class Target:
    """What the masks of one photograph are compared with.

    Attributes:
        masks: (R, H, W) bool, true regions that points and boxes ask for; of the first annotator.
        bands: (R, H, W) bool, their `boundary`.
        points: (R, 3, 2) float32 xy in pixels.
        boxes: (R, 4) float32 xyxy in pixels.
        annotators: alternatives of true regions for everything mode, the first of them `masks`.
    """

    masks: BoolArray
    bands: BoolArray
    points: FloatArray
    boxes: FloatArray
    annotators: tuple[BoolArray, ...]


@dataclass(frozen=True, eq=False)
class Pictures:
    """Masks of one photograph under one condition, for looking at.

    Attributes:
        case, condition, target: what is shown.
        image: (H, W, 3) uint8 RGB, degraded.
        off, always: (R, H, W) bool, without and with enhancement, asked for by `prompt`.
        prompt: "points" or "boxes".
    """

    case: Case
    condition: Condition
    target: Target
    image: UInt8Array
    off: BoolArray
    always: BoolArray
    prompt: str


def conditions(kinds: Sequence[str], levels: Sequence[int]) -> list[Condition]:
    """The clear photograph, and each kind at each level."""
    return [CLEAR, *(Condition(kind, level) for kind in kinds for level in levels)]


def synthetic_cases(set_name: str, photographs: Iterable[Photograph], wanted: Sequence[Condition]) -> Iterator[Case]:
    """Photographs that are degraded while they are measured."""
    for photograph in photographs:
        yield Case(set_name, photograph, tuple((condition, None) for condition in wanted))


def lqseg_cases(
    folder: Path, kinds: Sequence[str] | None = None, levels: Sequence[int] | None = None, limit: int | None = None
) -> Iterator[Case]:
    """Photographs of a data set built by `glesam lqseg build`, with its degraded files; read one after the other.

    Args:
        folder: of the data set.
        kinds, levels: those wanted; None for all that it has.
        limit: the first so many photographs; None for all.

    Raises:
        FileNotFoundError, ValueError: as in `glesam_ros.datasets.load_lqseg`.
    """
    pairs = load_lqseg(folder)
    for number, (_, group) in enumerate(groupby(pairs, key=lambda pair: pair.clear.name)):
        if number == limit:
            return
        found = list(group)
        degraded = tuple(
            (Condition(pair.kind, pair.level), pair.degraded.image)
            for pair in found
            if (kinds is None or pair.kind in kinds) and (levels is None or pair.level in levels)
        )
        yield Case("lqseg", found[0].clear, ((CLEAR, None), *degraded))


def photograph_seed(seed: int, set_name: str, name: str) -> int:
    """The seed of one photograph, 0 .. 2**32 - 1."""
    return zlib.crc32(f"{seed}/{set_name}/{name}".encode())


def make_target(case: Case, seed: int, options: Options = Options()) -> Target | None:  # noqa: B008  # it is frozen
    """Regions of at least `MIN_AREA` pixels with their prompts; None where there is none.

    Args:
        case: the photograph.
        seed: of the photograph, see `photograph_seed`.
        options: how many points, and how boxes err.
    """
    photograph = case.photograph
    layers = range(len(photograph.layers)) if photograph.alternatives else [None]
    annotators = []
    for layer in layers:
        masks = region_masks(photograph, layer)
        annotators.append(masks[[np.count_nonzero(mask) >= MIN_AREA for mask in masks]])
    annotators = [masks for masks in annotators if len(masks)]
    if not annotators:
        return None
    first = annotators[0]
    rng = np.random.default_rng([seed, POINTS])
    points = np.stack([sample_points(mask, POINTS, rng) for mask in first])
    boxes = mask_boxes(first)
    if options.box_error:  # drawn after the points, which stay the same
        boxes = moved_boxes(boxes, options.box_error, photograph.image.shape[:2], rng)
    return Target(first, boundary(first), points[:, : options.points], boxes, tuple(annotators))


def moved_boxes(boxes: FloatArray, error: float, size: tuple[int, ...], rng: np.random.Generator) -> FloatArray:
    """Boxes (K, 4) xyxy as a detector gives them: each side is moved in or out, and none leaves the frame (H, W).

    Args:
        boxes: in pixels of the frame.
        error: standard deviation of the normal distribution of the moves, of which none is larger than twice that; as
            a share of the box's width or height, 0 .. `MOST_BOX_ERROR`.
        size: (H, W) of the frame.
        rng: what the moves are drawn from.
    """
    sides = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
    moved = boxes + (error * rng.standard_normal(boxes.shape).clip(-2, 2)) * sides
    return moved.clip(0, np.tile(size[::-1], 2)).astype(np.float32)


def is_enhanced(pipe: Pipeline, raw: Embedding) -> bool:
    """Whether automatic mode enhances a single image of this embedding."""
    return EnhancementGate().update(raw.degradation, pipe.settings.enhance_above, pipe.settings.enhance_below)


def by_mode(pipe: Pipeline, raw: Embedding, modes: Sequence[str]) -> dict[str, Embedding]:
    """What an image is decoded from in each mode of enhancement; the same object where two modes have the same.

    Args:
        pipe: its settings say when automatic mode enhances.
        raw: from `pipe.model.encode`.
        modes: some of `MODES`.
    """
    auto = "always" if is_enhanced(pipe, raw) else "auto"
    embedded = functools.cache(functools.partial(in_mode, pipe.model, raw))
    return {mode: embedded(auto if mode == "auto" else mode) for mode in modes}


class Evaluator:
    """Measures photographs, one after the other.

    Args:
        pipe: the model; its settings say how everything mode chooses masks and when automatic mode enhances.
        options: what to measure.
        restorers: by the names of the baselines that restore the picture.
    """

    def __init__(self, pipe: Pipeline, options: Options, restorers: Mapping[str, Restorer] | None = None) -> None:
        self.pipe = pipe
        self.options = options
        self.restorers = restorers or {}

    def measure(self, case: Case) -> list[Measurement]:
        """One measurement a condition; none where the photograph has no region that counts."""
        target = make_target(case, self._seed(case), self.options)
        if target is None:
            return []
        return [self._measure(case, target, condition, given) for condition, given in case.conditions]

    def pictures(self, case: Case, condition: Condition, prompt: str) -> Pictures:
        """The masks of one photograph without and with enhancement.

        Args:
            case: with at least one region that counts, and `condition` among its conditions.
            condition: which to show.
            prompt: "points" or "boxes".
        """
        target = make_target(case, self._seed(case), self.options)
        assert target is not None, f"{case.photograph.name}: expected a region of {MIN_AREA} pixels"
        image = self._picture(case, condition, dict(case.conditions)[condition])
        raw = self._encode(image)
        off, always = (
            self._prompted(embedding, target, prompt)[0] for embedding in (raw, self.pipe.model.enhance(raw))
        )
        return Pictures(case, condition, target, image, off, always, prompt)

    def _seed(self, case: Case) -> int:
        return photograph_seed(self.options.seed, case.set_name, case.photograph.name)

    def _picture(self, case: Case, condition: Condition, given: UInt8Array | None) -> UInt8Array:
        if given is not None:
            return given
        clear = case.photograph.image
        return clear if condition == CLEAR else degrade(clear, condition.kind, condition.level, self._seed(case)).image

    def _encode(self, image: UInt8Array) -> Embedding:
        return self.pipe.model.encode(image, budget(self.pipe.resolved))

    def _measure(
        self, case: Case, target: Target, condition: Condition, given: UInt8Array | None
    ) -> Measurement:
        start = time.process_time()
        image = self._picture(case, condition, given)
        raw = self._encode(image)
        modes = by_mode(self.pipe, raw, self.options.modes)
        # automatic mode may be one of the other two, which is scored once
        scores = functools.cache(functools.partial(self._scores, target=target))
        values: Values = {(mode, m): v for mode, embedding in modes.items() for m, v in scores(embedding).items()}
        seconds = time.process_time() - start
        for name in self.options.baselines:
            if applies(name, condition.kind):
                values |= {(name, metric): v for metric, v in self._baseline(name, image, target).items()}
        return Measurement(
            case.set_name, case.photograph.name, condition, float(raw.degradation),
            is_enhanced(self.pipe, raw), values, seconds,
        )

    def _baseline(self, name: str, image: UInt8Array, target: Target) -> dict[str, list[float]]:
        if name != GRABCUT:
            return self._scores(self._encode(self.restorers[name](image)), target)
        if "boxes" not in self.options.prompts:
            return {}
        return _mask_scores("boxes", grabcut(image, target.boxes), target, None)

    def _scores(self, embedding: Embedding, target: Target) -> dict[str, list[float]]:
        scores: dict[str, list[float]] = {}
        for prompt in self.options.prompts:
            if prompt == "everything":
                scores |= _everything_scores(self.pipe.decode(embedding), target)
            else:
                masks, predicted = self._prompted(embedding, target, prompt)
                scores |= _mask_scores(prompt, masks, target, predicted)
        return scores

    def _prompted(self, embedding: Embedding, target: Target, prompt: str) -> tuple[BoolArray, FloatArray]:
        """Masks and scores, one a region."""
        name, given = ("points", target.points) if prompt == "points" else ("boxes", target.boxes)
        # one object at a time, as the paper does: a second look is nearer at one than at several
        found = [self.pipe.decode(embedding, **{name: one[None]}) for one in given]
        return np.concatenate([one.masks for one in found]), np.concatenate([one.scores for one in found])


def open_evaluator(
    settings: Settings, options: Options, weights: Path | None = None, restorers: Path | None = None
) -> Evaluator:
    """An evaluator with a model of its own on one thread, so that as many processes as cores can run side by side.

    Args:
        settings: of the pipeline; `enhancement` has no effect.
        options: what to measure.
        weights: folder with other weights of nano; None for the model that the settings name.
        restorers: folder with the state dicts of the learned baselines.

    Raises:
        ValueError: unknown model or baseline, or weights that do not fit.
        FileNotFoundError: weights are missing.
        RuntimeError: the device is not available.
        ModuleNotFoundError: a learned baseline was asked for without torch.
    """
    if settings.model == "nano":
        from glesam_ros.models.nano import Nano

        model: SegmentationModel = Nano(settings.device, settings.precision, weights, threads=1)
    elif weights is not None:
        raise ValueError(f"weights: expected the model nano, which they are for, got {settings.model}")
    else:
        model = load_model(settings.model, settings.device, settings.precision)
    if set(LEARNED) & set(options.baselines):
        import torch

        torch.set_num_threads(1)
    return Evaluator(Pipeline(model, settings), options, load_restorers(options.baselines, restorers or Path()))


def _mask_scores(
    prompt: str, predicted: BoolArray, target: Target, scores: FloatArray | None
) -> dict[str, list[float]]:
    truth = target.masks
    values = {
        "iou": iou(predicted, truth),
        "dice": dice(predicted, truth),
        "accuracy": pixel_accuracy(predicted, truth),
        "boundary": iou(boundary(predicted), target.bands),
    }
    if scores is not None:
        values["score"] = scores.astype(np.float64)
    return {f"{prompt}_{metric}": found.tolist() for metric, found in values.items()}


def _everything_scores(found: Instances, target: Target) -> dict[str, list[float]]:
    """Of the annotator whose regions the masks, or what the label map shows of them, fit best on average."""
    overlap = _best_overlap(found.masks, target)
    shown = found.label_map() == found.ids[:, None, None]
    return {
        "everything_best_iou": overlap.max(0, initial=0.0).tolist(),
        "everything_map_iou": _best_overlap(shown, target).max(0, initial=0.0).tolist(),
        "everything_ar10": region_recall(overlap, 10).tolist(),
        "everything_ar100": region_recall(overlap, MAX_MASKS).tolist(),
    }


def _best_overlap(masks: BoolArray, target: Target) -> Doubles:
    overlaps = [pairwise_iou(masks, truth) for truth in target.annotators]
    return max(overlaps, key=lambda rows: float(rows.max(0, initial=0.0).mean()))
