"""GleSAM, GleSAM2 and GleSAM++ at full size, and SAM and SAM 2 alone, as models of the pipeline."""

from __future__ import annotations

import dataclasses
import functools
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from glesam_ros.models.base import Budget, Candidates, Embedding, check_finite, return_freed_memory
from glesam_ros.models.glesam import catalogue, everything
from glesam_ros.models.glesam.base import LOGIT_STRIDE, STRIDE, BaseModel, Features
from glesam_ros.models.glesam.enhancer import Enhancer, SmallEnhancer, load_config, load_enhancer
from glesam_ros.models.glesam.one_step import SIDE_MULTIPLE
from glesam_ros.models.glesam.runtime import (
    Runtime,
    TorchRuntime,
    choose_device,
    choose_precision,
    loading,
    memory_errors,
)
from glesam_ros.models.glesam.weights import decoder_state, load_exactly, read_tensors, with_all_masks
from glesam_ros.models.nano import Nano
from glesam_ros.validation import FloatArray, UInt8Array

if TYPE_CHECKING:
    from glesam_ros.models.glesam.sam import Sam
    from glesam_ros.models.glesam.sam2 import Sam2

_LOG = logging.getLogger(__name__)
LEAST_SIDE = 2 * SIDE_MULTIPLE
"""Smallest side of the square input."""
ENHANCED = (0.15, 0.5)
"""Score and stability below which masks of everything mode go with an enhancer: less than upstream asks for, so that
bad pictures have masks, too."""
LEVEL_THREADS = 2
"""CPU threads of nano where it measures the level."""


class GlesamModel:
    """Model for the pipeline; see `glesam_ros.models.base.SegmentationModel`.

    The degradation level is what the enhancer of GleSAM++ predicts. Plain GleSAM and the bases alone predict none, but
    automatic enhancement needs one: there the level head of nano measures it on the image, on the CPU beside the GPU.

    A base without an enhancer restores nothing: `enhance` returns the embedding as it came, `enhanced` False.

    Lack of memory is OutOfMemory anywhere in `encode`, `enhance`, `propose` and `prompt`: also between the runtime's
    stages, where masks are compared, picked and brought to the host.

    Args:
        name: as in `glesam_ros.models.glesam.catalogue`.
        runtime: executes base and enhancer.
        base: says where an image lies in the square input; its weights are not used.
        enhances: whether the runtime has an enhancer.
    """

    classes: tuple[str, ...] = ("object",)

    def __init__(self, name: str, runtime: Runtime, base: BaseModel, enhances: bool) -> None:
        self.name, self.device = name, runtime.device
        self.own_size, self.overlaps = runtime.side, runtime.overlaps
        self.thresholds = ENHANCED if enhances else base.thresholds
        self._runtime, self._base, self._enhances = runtime, base, enhances
        if not enhances:
            _LOG.info("%s has no enhancer: enhancement changes nothing; add +glesam to its name for one", name)

    @memory_errors
    def encode(self, image: UInt8Array, budget: Budget) -> Embedding:
        """Embed an image.

        `budget.processing_size` is rounded to the nearest multiple of 128, at least 256. With crop layers the embedding
        keeps a copy of the image, for everything mode.
        """
        size = (int(image.shape[0]), int(image.shape[1]))
        features = self._runtime.encode(image, self._side(budget))
        level = self._runtime.level(features)
        if level is None:
            level = self._nano.encode(image, Budget()).degradation
        extra: dict[str, Any] = {"features": features}
        if budget.crop_layers:
            extra["image"] = image.copy()
        return Embedding(features.latent, size, level, extra=extra)

    @memory_errors
    def enhance(self, embedding: Embedding) -> Embedding:
        """Restore the latent; without an enhancer the embedding as it came."""
        if not self._enhances:
            return embedding
        features = self._runtime.enhance(embedding.extra["features"], embedding.degradation)
        extra = {**embedding.extra, "features": features}
        return dataclasses.replace(embedding, latent=features.latent, enhanced=True, extra=extra)

    @memory_errors
    def propose(self, embedding: Embedding, score_threshold: float, limit: int, budget: Budget) -> Candidates:
        """Everything mode, see `glesam_ros.models.glesam.everything`.

        Crops are encoded here and enhanced where the image was. An embedding that was made without crop layers has
        none.
        """
        image: UInt8Array = embedding.extra.get("image", np.zeros((0, 0, 3), np.uint8))
        if not image.size:
            budget = dataclasses.replace(budget, crop_layers=0)
        whole: Features = embedding.extra["features"]

        def embed(crop: everything.Crop) -> Features:
            if not crop.layer:
                return whole
            pixels = image[crop.top : crop.bottom, crop.left : crop.right]
            features = self._runtime.encode(pixels, _square(whole))
            return self._runtime.enhance(features, embedding.degradation) if embedding.enhanced else features

        return everything.propose(
            self._runtime, self._base, embed, embedding.size, score_threshold, limit, budget
        )

    @memory_errors
    def prompt(self, embedding: Embedding, points: FloatArray, labels: FloatArray, budget: Budget) -> Candidates:
        """One mask for each object.

        A lone point is ambiguous: of three masks the one with the best predicted IoU. Anything more has one mask, as
        segment-anything recommends. Objects with as many points are decoded together, so that none needs padding: the
        result is that of each object alone.
        """
        features: Features = embedding.extra["features"]
        height, width = self._base.content(embedding.size, _square(features))
        scale = np.array([width / embedding.size[1], height / embedding.size[0]], np.float32)
        xy = (points * scale).astype(np.float32)
        used = labels >= 0
        kinds = np.stack([used.sum(1), (labels >= 2).any(1)], 1)
        masks = np.empty((len(points), height // LOGIT_STRIDE, width // LOGIT_STRIDE), np.float32)
        scores = np.empty(len(points), np.float32)
        for count, boxed in np.unique(kinds, axis=0):
            rows = np.flatnonzero((kinds == (count, boxed)).all(1))
            several = bool(count == 1 and not boxed)
            for start in range(0, len(rows), budget.points_per_batch):
                batch = rows[start : start + budget.points_per_batch]
                own = used[batch]
                prompts = xy[batch][own].reshape(-1, count, 2), labels[batch][own].reshape(-1, count)
                logits, quality = self._runtime.decode(features, *prompts, several)
                logits, quality = _best(logits[..., : masks.shape[1], : masks.shape[2]], quality)
                masks[batch], scores[batch] = logits.cpu().numpy(), quality.cpu().numpy()
        for values in (scores, masks):
            check_finite(values, f"{self.name} on {self.device}")
        return Candidates(masks, scores)

    def free(self) -> None:
        """Give cached device memory back."""
        self._runtime.free()

    def close(self) -> None:
        """Free memory; the model cannot be used afterwards."""
        # before the runtime gives memory back: a base that is still held would keep its weights on the device
        del self._base
        self._runtime.close()
        if "_nano" in self.__dict__:
            self._nano.close()

    def _side(self, budget: Budget) -> int:
        if not budget.processing_size:
            return self._runtime.side
        return max(LEAST_SIDE, round(budget.processing_size / SIDE_MULTIPLE) * SIDE_MULTIPLE)

    @functools.cached_property
    def _nano(self) -> Nano:
        return Nano("cpu", threads=LEVEL_THREADS)


@loading
def load_glesam(name: str, device: str = "auto", precision: str = "auto", *, compile: bool = False) -> GlesamModel:
    """Load a full-size model from the files in `catalogue.home()`.

    Args:
        name: a base, "sam2.1_hiera_tiny", or a base and an enhancer, "sam2.1_hiera_tiny+glesam"; the base also by its
            repository on Hugging Face, see `catalogue.own_name`.
        device: "auto" (CUDA where torch has it, else the CPU), "cuda", "cpu", or "tensorrt" (what `glesam export`
            wrote, by onnxruntime).
        precision: "auto", see `choose_precision`, "fp32", "fp16" or "bf16".
        compile: see `TorchRuntime`.

    Raises:
        ValueError: unknown name, device or precision, or files that do not fit.
        FileNotFoundError: a file is missing; names it and the command that gets it.
        RuntimeError: the device is not available.
        OutOfMemory: the weights do not fit.
    """
    name = catalogue.own_name(name)
    base_name, enhancer_name = catalogue.split_name(name)
    if device == "tensorrt":
        from glesam_ros.models.glesam.onnx_runtime import open_onnx_runtime  # onnxruntime of this device only here

        with torch.device("meta"):  # no weights: the graphs have their own
            plan = build_base(base_name)
        exported = open_onnx_runtime(name, device, precision, base=plan)
        return GlesamModel(name, exported, plan, enhancer_name is not None)
    place = choose_device(device)
    dtype = choose_precision(precision, place)
    base, enhancer = load_parts(name, catalogue.home())
    runtime = TorchRuntime(base, enhancer, place, dtype, compile=compile)
    return_freed_memory()
    _LOG.info("%s runs on %s", name, runtime.device)
    return GlesamModel(name, runtime, base, enhancer is not None)


def load_parts(name: str, folder: Path) -> tuple[Sam | Sam2, Enhancer | SmallEnhancer | None]:
    """Base with its fine-tuned mask decoder, and enhancer, of a model in `folder`; on the CPU in fp32.

    Raises:
        ValueError: unknown name, or files that do not fit.
        FileNotFoundError: a file is missing; names it and the command that gets it.
    """
    base_name, enhancer_name = catalogue.split_name(name)
    if enhancer_name is None:
        return load_base(base_name, folder), None
    own = catalogue.enhancer_folder(name, folder)
    config = load_config(own)
    if config.base != base_name:
        raise ValueError(f"{own}: expected an enhancer of {base_name}, got one of {config.base}")
    # what is missing is said before gigabytes are read
    catalogue.enhancer_folder(name, folder, config.files)
    if config.kind == "lora":
        catalogue.unet_folder(config.unet, name, folder)
    catalogue.base_file(base_name, folder)
    enhancer = load_enhancer(own, folder)
    base = load_base(base_name, folder)
    if (decoder := own / catalogue.DECODER_FILE).is_file():
        state, worn = with_all_masks(decoder_state(read_tensors(decoder)), base.mask_decoder.state_dict())
        if worn:
            _LOG.warning("%s: layers of masks %s are worn away, the official ones take their place", decoder, worn)
        load_exactly(base.mask_decoder, state, str(decoder))
    else:
        _LOG.warning("%s: no fine-tuned mask decoder (stage 2) at %s, the official one takes its place", name, decoder)
    return base, enhancer


def build_base(name: str) -> Sam | Sam2:
    """A base of the catalogue with random weights."""
    if catalogue.BASES[name].family == "sam2":
        from glesam_ros.models.glesam.sam2 import build_sam2  # each needs a package that the other does without

        return build_sam2(name)
    from glesam_ros.models.glesam.sam import build_sam

    return build_sam(name)


def load_base(name: str, folder: Path) -> Sam | Sam2:
    """A base of the catalogue with the official weights in `folder`, on the CPU in fp32.

    Raises:
        FileNotFoundError: the file is missing; names it and the command that gets it.
        ValueError: its keys are others.
    """
    file = catalogue.base_file(name, folder)
    base = build_base(name)
    base.load_official(read_tensors(file))
    return base


def _square(features: Features) -> int:
    """Side of the square input that gave these features."""
    return int(features.latent.shape[-1]) * STRIDE


def _best(logits: Tensor, quality: Tensor) -> tuple[Tensor, Tensor]:
    """Of M masks (K, M, h, w) the ones of best predicted IoU, (K, h, w) and (K,)."""
    best, choice = quality.max(1)
    return logits[torch.arange(len(choice), device=choice.device), choice], best
