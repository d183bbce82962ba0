"""What a training run of SCR and RASS is made of, see `RassTrainingConfig`; the defaults are the released code's."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic.dataclasses import dataclass

from glesam_ros.models.glesam.one_step import PICTURE_MULTIPLE
from glesam_ros.training.config import (
    STRICT,
    Count,
    CountOrNone,
    Decay,
    Number,
    Rate,
    Scale,
    Share,
    StageConfig,
    Text,
    no_bool,
    training_split,
    zoom_range,
)
from glesam_ros.training.full_config import FullDegradationConfig, FullPrecision
from glesam_ros.training.recipes import RECIPES

RASS_STAGES = RECIPES["rass"].stages
"""The stages in the order in which they run."""


def _own_split(value: str) -> str:
    if value.startswith("val"):
        raise ValueError(
            f"expected a split for training, got {value!r}: nothing is trained on what is measured on, and of ADE20K "
            "that is the validation split"
        )
    return training_split(value)


Magnification = Annotated[float, BeforeValidator(no_bool), Field(ge=0.1, le=8)]


@dataclass(frozen=True, config=STRICT)
class LabelledSourceConfig:
    """A folder of labelled pictures, see `glesam_ros.labelled.open_labelled`; all of a run have the same classes.

    Attributes:
        path: folder, relative to --data.
        split: neither test nor validation.
        weight: how often one of its pictures is drawn, beside a picture of weight 1.
    """

    path: Text
    split: Annotated[Text, AfterValidator(_own_split)] = "train"
    weight: Scale = 1.0


@dataclass(frozen=True, config=STRICT)
class LabelledCropConfig:
    """Square crops of labelled pictures.

    Attributes:
        side: pixels, a multiple of 64 (released code: 512).
        scale: range of the picture's short side, in sides of the crop; what lies beyond the picture has no class. The
            default is that of Mask2Former's recipe for ADE20K: 0.5 to 2.
        flip: share of crops that are mirrored.
    """

    side: Annotated[int, Field(strict=True, ge=PICTURE_MULTIPLE, le=2048, multiple_of=PICTURE_MULTIPLE)] = 512
    scale: Annotated[tuple[Magnification, Magnification], AfterValidator(zoom_range)] = (0.5, 2.0)
    flip: Share = 0.5


@dataclass(frozen=True, config=STRICT)
class ScrRates:
    """Peak rate of the three adapters and of the first convolution (OSEDiff: 5e-5)."""

    adapters: Rate = 5e-5


@dataclass(frozen=True, config=STRICT)
class ScrConfig(StageConfig):
    """SCR: the restoration loss and the semantic constraint, `glesam_ros.training.semantic_constraint`.

    Training code and settings of SCR are not public. Rate, batch and rank are those of OSEDiff (arXiv 2406.08177), in
    whose line it is: 5e-5, four crops of a process, rank 4; steps, warm-up and clipping are ours.

    Attributes:
        rank: of the three adapters.
        semantic: weight of the semantic constraint; 0 trains a plain restorer. With 0.01, ours, it counts as much as
            the restoration of a picture that LQSeg degraded, whose loss is about a hundredth of it at the beginning.
        clear: share of inputs that are clear and must stay.
    """

    steps: CountOrNone = 100_000
    batch: Count = 4
    warm_up: CountOrNone = 500
    final: Share = 1.0
    clip: Number = 1.0
    ema: Decay = 0.0
    checkpoint_every: Count = 500
    pictures_every: CountOrNone = 0
    rank: Count = 4
    semantic: Number = 0.01
    clear: Share = 0.0
    rates: ScrRates = field(default_factory=ScrRates)


@dataclass(frozen=True, config=STRICT)
class SegmentRates:
    """Peak rates: head; adapters, first convolution and projections, a tenth of it (released code)."""

    head: Rate = 1e-4
    backbone: Rate = 1e-5


@dataclass(frozen=True, config=STRICT)
class SegmentConfig(StageConfig):
    """RASS: new adapters on the merged U-Net, projections and Mask2Former on degraded crops.

    Released code: AdamW 1e-4, weight decay 0.05, the backbone at a tenth of the rate, gradient norm 0.01, 160,000 steps
    of 16 crops on 8 GPUs, two each; a single one takes 8 micro-batches for the same step. As in Mask2Former's recipe
    norms and embeddings do not decay; its rate falls by the power 0.9 of what is left, ours by a cosine to 0.

    Attributes:
        rank: of the three adapters (released code: 4).
        clear: share of crops that are clear.
    """

    steps: CountOrNone = 160_000
    batch: Count = 2
    accumulate: Count = 8
    warm_up: CountOrNone = 0
    final: Share = 0.0
    weight_decay: Number = 0.05
    clip: Number = 0.01
    ema: Decay = 0.0
    checkpoint_every: Count = 500
    pictures_every: CountOrNone = 0
    rank: Count = 4
    clear: Share = 0.0
    rates: SegmentRates = field(default_factory=SegmentRates)


@dataclass(frozen=True, config=STRICT)
class RassTrainingConfig:
    """One run of SCR and RASS (IJCV 2026, arXiv 2602.14042).

    Attributes:
        model: tells this recipe from others.
        seed: of the first weights and of every batch.
        precision: auto (bf16 where the device computes in it, else no), no (fp32) or bf16.
        workers: processes that draw batches ahead, 0 for none; the batches are the same.
        random: tiny networks with random weights take the place of Stable Diffusion and Mask2Former, to try the loop
            out.
        sd_folder: holds unet/, vae/, text_encoder/ and tokenizer/ of Stable Diffusion 2.1-base; null: that of
            `glesam models get`.
        scr_file: SCR that the stage rass merges where the stage scr is skipped (`scr.steps=0`); null: that of
            `glesam models get`.
        gradient_checkpointing: less memory and more time.
        sources: training sets; the default is ADE20K.
    """

    model: Literal["rass"] = "rass"
    seed: CountOrNone = 10
    precision: FullPrecision = "auto"
    workers: CountOrNone = 4
    random: bool = False
    sd_folder: Text | None = None
    scr_file: Text | None = None
    gradient_checkpointing: bool = True
    sources: Annotated[tuple[LabelledSourceConfig, ...], Field(min_length=1)] = (
        LabelledSourceConfig("ADEChallengeData2016", "training"),
    )
    crop: LabelledCropConfig = field(default_factory=LabelledCropConfig)
    degradation: FullDegradationConfig = field(default_factory=lambda: FullDegradationConfig(rates="x1"))
    scr: ScrConfig = field(default_factory=ScrConfig)
    rass: SegmentConfig = field(default_factory=SegmentConfig)
