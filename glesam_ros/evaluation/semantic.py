"""Maps of classes against truth, clear and degraded, beside baselines: what is measured on one picture.

A picture is degraded by the seed and its name, so it is the same for every model and in every run, whatever the number
of processes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from glesam_ros.degradation import degrade
from glesam_ros.evaluation.baselines import BASELINES, GRABCUT, LEARNED, Restorer, applies, load_restorers
from glesam_ros.evaluation.protocol import CLEAR, Condition, photograph_seed
from glesam_ros.evaluation.semantic_metrics import Integers, confusion
from glesam_ros.labelled import LabelledFolder, open_labelled, some_of
from glesam_ros.models import restorer_names, semantic_names
from glesam_ros.semantic import Restorer as LoadedRestorer
from glesam_ros.semantic import SemanticSegmenter, load_restorer, load_semantic
from glesam_ros.validation import UInt8Array

RASS_NANO = "rass-nano"
RESTORERS = tuple(name for name in BASELINES if name != GRABCUT)
"""Baselines that restore the picture; beside them every registered model that does."""
OTHER = "(no class of the data set)"
"""What a pixel was taken for where the model has classes that the data set has not."""
_SEEDS = "semantic"
_NAMED = 20
"""At most so many classes are named in a message."""


class Method(NamedTuple):
    """A model, and what restores the picture before it; "" restores nothing."""

    model: str
    restorer: str = ""

    @property
    def name(self) -> str:
        """As in the tables: "rass-nano", "classical + rass-nano"."""
        return f"{self.restorer} + {self.model}" if self.restorer else self.model


@dataclass(frozen=True)
class SemanticOptions:
    """What to measure, and with what.

    Attributes:
        data: folder of labelled pictures, see `glesam_ros.labelled.open_labelled`.
        split: of it.
        models: registered names or folders with weights of rass-nano; the first is the one that the others are
            compared with.
        conditions: of the pictures.
        restorers: some of `RESTORERS` and of the registered restorers.
        weights: folder with the state dicts of the learned ones among `RESTORERS`.
        classes_map: file, see `read_classes_map`.
        device, precision: of the models.
        limit: the first so many pictures.
        seed: of the degradations, at least 0.
        threads: of a model on the CPU, where it can be said; 0 is one a core.
    """

    data: Path
    split: str = "test"
    models: tuple[str, ...] = ("rass-nano",)
    conditions: tuple[Condition, ...] = (CLEAR,)
    restorers: tuple[str, ...] = ()
    weights: Path | None = None
    classes_map: Path | None = None
    device: str = "auto"
    precision: str = "auto"
    limit: int | None = None
    seed: int = 0
    threads: int = 1


@dataclass(frozen=True, eq=False)
class SemanticMeasurement:
    """One picture under one condition.

    Attributes:
        picture, condition: what was measured.
        matrices: method -> (K, K + 1) int64, see `confusion`.
        seconds: processor time of the first model without restorers; differs from run to run.
    """

    picture: str
    condition: Condition
    matrices: dict[Method, Integers]
    seconds: float


@dataclass(frozen=True, eq=False)
class SemanticPictures:
    """One picture under one condition, for looking at; labels are (H, W) in 0..K, where K is `OTHER` or no true class.

    Attributes:
        name, condition: what is shown.
        clear, image: (H, W, 3) uint8 RGB, without and with the degradation.
        truth: labels.
        predictions: method -> labels.
    """

    name: str
    condition: Condition
    clear: UInt8Array
    image: UInt8Array
    truth: Integers
    predictions: dict[Method, Integers]


class ClassMatch:
    """Classes of a data set and of models, matched by name.

    Args:
        classes: K names of the data set.
        renamed: class of the data set -> name that models have for it, or None to leave its pixels out; several classes
            may get the same name, then they count as one.

    Raises:
        ValueError: `renamed` names a class that the data set lacks, or leaves none.
    """

    def __init__(self, classes: Sequence[str], renamed: Mapping[str, str | None] | None = None) -> None:
        renamed = renamed or {}
        unknown = [name for name in renamed if name not in classes]
        if unknown:
            raise ValueError(
                f"classes map: expected classes of the data set ({some_of(classes, _NAMED)}), got "
                f"{some_of(unknown, _NAMED)}"
            )
        names = [renamed.get(name, name) for name in classes]
        self.classes = tuple(dict.fromkeys(name for name in names if name is not None))
        """Names that are evaluated."""
        if not self.classes:
            raise ValueError("classes map: expected at least one class that is not left out, got none")
        self._truth = np.array([
            len(self.classes) if name is None else self.classes.index(name) for name in names
        ], np.int64)

    def truth(self, labels: Any) -> Integers:
        """(H, W) int64 of labels of the data set: index into `classes`, or K where there is no class."""
        found = np.full(labels.shape, len(self.classes), np.int64)
        known = labels < len(self._truth)
        found[known] = self._truth[labels[known]]
        return found

    def table(self, model: str, classes: Sequence[str]) -> Integers:
        """Class of a model -> index into `self.classes`, or K where the data set lacks it.

        Raises:
            ValueError: the model lacks a class of the data set; says which.
        """
        missing = [name for name in self.classes if name not in classes]
        if missing:
            raise ValueError(
                f"{model}: expected all classes of the data set, {some_of(missing, _NAMED)} missing; the model has "
                f"{some_of(classes, _NAMED)}. Give a classes map: JSON with "
                '{"class of the data set": "class of the model"}, null for one that shall not count'
            )
        return np.array([
            self.classes.index(name) if name in self.classes else len(self.classes) for name in classes
        ], np.int64)


def read_classes_map(path: Path) -> dict[str, str | None]:
    """A JSON file {"class of the data set": "class of the model", or null to leave its pixels out}.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such document.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, cannot read it: {error}") from error
    if not isinstance(found, dict) or not all(value is None or isinstance(value, str) for value in found.values()):
        raise ValueError(f'{path}: expected {{"class of the data set": "class of the model" or null}}')
    return found


class SemanticEvaluator:
    """Measures pictures, one after the other.

    Args:
        folder: of the pictures.
        models: by the names that they have in the tables; the first is the one that the others are compared with.
        restorers: by name.
        conditions: of the pictures.
        renamed: of the classes, see `ClassMatch`.
        seed: of the degradations.
        closing: what is closed with the models: the registered ones among the restorers.

    Raises:
        ValueError: a model lacks classes of the data set.
    """

    def __init__(
        self, folder: LabelledFolder, models: Mapping[str, SemanticSegmenter],
        restorers: Mapping[str, Restorer] | None = None, conditions: Sequence[Condition] = (CLEAR,),
        renamed: Mapping[str, str | None] | None = None, seed: int = 0, closing: Iterable[LoadedRestorer] = (),
    ) -> None:
        self.folder = folder
        self.models = models
        self.restorers = restorers or {}
        self.conditions = tuple(conditions)
        self.seed = seed
        self._open: tuple[SemanticSegmenter | LoadedRestorer, ...] = (*models.values(), *closing)
        self.match = ClassMatch(folder.classes, renamed)
        self._tables = {name: self.match.table(name, model.classes) for name, model in models.items()}
        colour = dict(zip(folder.classes, folder.palette))
        own = [colour[name] for name in self.match.classes if name in colour]
        first = next(iter(models.values()))
        colour |= dict(zip(first.classes, first.palette)) if len(own) < len(self.match.classes) else {}
        self.palette: UInt8Array = np.array([colour[name] for name in self.match.classes], np.uint8)
        """(K, 3) uint8 RGB: the data set's colours, or the first model's where classes were renamed."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names that are evaluated."""
        return self.match.classes

    def measure(self, index: int) -> list[SemanticMeasurement]:
        """One measurement a condition of the picture at `index`. Raises as `LabelledFolder.__getitem__`."""
        clear, labels, name = self.folder[index]
        truth = self.match.truth(labels)
        found = []
        for condition in self.conditions:
            image = self._degraded(clear, name, condition)
            start = time.process_time()
            matrices: dict[Method, Integers] = {}
            seconds = 0.0
            for method, predicted in self._predict(image, condition):
                seconds = seconds or time.process_time() - start
                matrices[method] = confusion(truth, predicted, len(self.classes))
            found.append(SemanticMeasurement(name, condition, matrices, seconds))
        return found

    def pictures(self, index: int, condition: Condition) -> SemanticPictures:
        """What `measure` looks at. Raises as it."""
        clear, labels, name = self.folder[index]
        image = self._degraded(clear, name, condition)
        predictions = dict(self._predict(image, condition))
        return SemanticPictures(name, condition, clear, image, self.match.truth(labels), predictions)

    def close(self) -> None:
        """Free the models and restorers."""
        for model in self._open:
            model.close()

    def _degraded(self, clear: UInt8Array, name: str, condition: Condition) -> UInt8Array:
        if condition == CLEAR:
            return clear
        return degrade(clear, condition.kind, condition.level, photograph_seed(self.seed, _SEEDS, name)).image

    def _predict(self, image: UInt8Array, condition: Condition) -> Iterable[tuple[Method, Integers]]:
        for restorer in ("", *self.restorers):
            if restorer and not applies(restorer, condition.kind):
                continue
            seen = self.restorers[restorer](image) if restorer else image
            for name, model in self.models.items():
                yield Method(name, restorer), self._tables[name][model.segment(seen).labels]


def open_semantic_evaluator(options: SemanticOptions) -> SemanticEvaluator:
    """An evaluator with models of its own.

    Raises:
        ValueError: unknown model or restorer, weights or a class list that do not fit, classes that do not match.
        FileNotFoundError: data or weights are missing.
        RuntimeError: the device is not available.
        ModuleNotFoundError: torch or another package is missing for what was asked.
    """
    folder = open_labelled(options.data, options.split)
    folder = folder.select(range(len(folder))[: options.limit])
    models = {
        label: _open_model(source, options) for label, source in model_labels(options.models).items()
    }
    renamed = None if options.classes_map is None else read_classes_map(options.classes_map)
    simple, loaded = _open_restorers(options)
    restorers = {name: loaded[name].restore if name in loaded else simple[name] for name in options.restorers}
    return SemanticEvaluator(
        folder, models, restorers, options.conditions, renamed, options.seed, closing=loaded.values()
    )


def model_labels(sources: Sequence[str]) -> dict[str, str]:
    """Name in the tables -> registered name or folder of weights; a folder is named by itself, or with that above it.

    Raises:
        ValueError: a source twice, or folders that cannot be told apart.
    """
    paths = [None if source in semantic_names() else weights_folder(source).resolve() for source in sources]
    names = [source if path is None else path.name for source, path in zip(sources, paths)]
    labels = [
        f"{path.parent.name}/{name}" if path is not None and names.count(name) > 1 else name
        for name, path in zip(names, paths)
    ]
    if len(set(labels)) != len(labels):
        raise ValueError(f"models: expected each once, with folders of different names, got {', '.join(sources)}")
    return dict(zip(labels, sources))


def weights_folder(source: str) -> Path:
    """The folder of weights of rass-nano that `source` names, itself or by its ONNX file."""
    path = Path(source)
    return path.parent if path.suffix == ".onnx" else path


def _open_model(source: str, options: SemanticOptions) -> SemanticSegmenter:
    if source in semantic_names() and source != RASS_NANO:
        return load_semantic(source, options.device, options.precision)
    from glesam_ros.models.rass_nano import RassNano  # onnxruntime is needed only here

    weights = None if source == RASS_NANO else weights_folder(source)
    if weights is not None and not weights.is_dir():
        raise ValueError(
            f"model: expected one of {', '.join(semantic_names())}, or a folder with weights of {RASS_NANO}; "
            f"got {source!r}"
        )
    return SemanticSegmenter(RassNano(options.device, options.precision, weights, threads=options.threads))


def _open_restorers(options: SemanticOptions) -> tuple[dict[str, Restorer], dict[str, LoadedRestorer]]:
    """Those among `RESTORERS`, and the registered ones."""
    unknown = [name for name in options.restorers if name not in (*RESTORERS, *restorer_names())]
    if unknown:
        raise ValueError(
            f"baselines: expected some of {', '.join([*RESTORERS, *restorer_names()])}; got {', '.join(unknown)}"
        )
    if set(options.restorers) & set(LEARNED):
        import torch

        torch.set_num_threads(max(1, options.threads))
    simple = load_restorers([name for name in options.restorers if name in RESTORERS], options.weights or Path())
    loaded = {
        name: load_restorer(name, options.device, options.precision) for name in options.restorers if name not in simple
    }
    return simple, loaded
