"""What a training run of rass-nano is made of; see `RassNanoConfig`."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass

from glesam_ros.training.config import (
    STRICT,
    Count,
    CountOrNone,
    Decay,
    DegradationConfig,
    NoPictures,
    Number,
    Precision,
    Rate,
    Share,
    Side,
    StageConfig,
    Text,
    Zoom,
    zoom_range,
)
from glesam_ros.training.rass_config import LabelledSourceConfig
from glesam_ros.training.recipes import RECIPES

RASS_NANO_STAGES = RECIPES["rass_nano"].stages
"""The stages in the order in which they run."""


@dataclass(frozen=True, config=STRICT)
class RectangleConfig:
    """Crops of labelled pictures; half of them are mirrored.

    Attributes:
        height, width: pixels, multiples of 32.
        zoom: range of the scale, 1 is that at which the picture just covers the crop.
        gamma, colour: ranges of brightness gamma (1 / g to g) and of the gain of each colour (1 / g to g).
    """

    height: Side = 288
    width: Side = 384
    zoom: Annotated[tuple[Zoom, Zoom], AfterValidator(zoom_range)] = (1.0, 2.0)
    gamma: Zoom = 1.4
    colour: Zoom = 1.2


@dataclass(frozen=True, config=STRICT)
class NanoSegmentRates:
    """Peak rates: backbone; pyramid and classes."""

    backbone: Rate = 2e-4
    decoder: Rate = 1e-3


@dataclass(frozen=True, config=STRICT)
class NanoSegmentConfig(StageConfig):
    """Backbone and decoder by weighted cross-entropy. `clear`: share of crops that stay clear."""

    steps: CountOrNone = 1200
    final: Share = 0.0
    weight_decay: Number = 0.02
    clip: Number = 1.0
    ema: Decay = 0.995
    pictures_every: NoPictures = 0
    clear: Share = 1.0
    rates: NanoSegmentRates = field(default_factory=NanoSegmentRates)


@dataclass(frozen=True, config=STRICT)
class NanoScrRates:
    """Peak rate of the adapters."""

    adapters: Rate = 1e-3


@dataclass(frozen=True, config=STRICT)
class NanoScrConfig(StageConfig):
    """SCR: adapters restore the features of degraded crops; at its end they are merged.

    Attributes:
        rank: of the adapters.
        constraint: weight of the semantic constraint beside the restoration of features.
        clear: share of inputs that are clear and must stay.
    """

    steps: CountOrNone = 400
    clip: Number = 1.0
    weight_decay: Number = 0.0
    ema: Decay = 0.995
    pictures_every: NoPictures = 0
    rank: Count = 16
    constraint: Number = 1.0
    clear: Share = 0.15
    rates: NanoScrRates = field(default_factory=NanoScrRates)


@dataclass(frozen=True, config=STRICT)
class RassNanoConfig:
    """One run: base on clear crops, SCR, RASS on degraded crops.

    Attributes:
        model: tells this recipe from others.
        seed: of the first weights and of every batch.
        precision: auto (bf16 where the device computes in it, else no), no (fp32), bf16, or fp16 (on a GPU).
        workers: processes that draw batches ahead, 0 for none; the batches are the same.
        start: weights to begin with (a `<stage>.pt` of another run), or null for the backbone pretrained on ImageNet.
        balance: rare classes weigh more: share of the pixels to the power of minus this.
    """

    model: Literal["rass_nano"] = "rass_nano"
    seed: CountOrNone = 10
    precision: Precision = "auto"
    workers: CountOrNone = 1
    start: Text | None = None
    sources: Annotated[tuple[LabelledSourceConfig, ...], Field(min_length=1)] = (LabelledSourceConfig("camvid"),)
    balance: Share = 0.35
    crop: RectangleConfig = field(default_factory=RectangleConfig)
    degradation: DegradationConfig = field(default_factory=DegradationConfig)
    base: NanoSegmentConfig = field(default_factory=NanoSegmentConfig)
    scr: NanoScrConfig = field(default_factory=NanoScrConfig)
    rass: NanoSegmentConfig = field(
        default_factory=lambda: NanoSegmentConfig(1800, clear=0.35, rates=NanoSegmentRates(backbone=1e-4, decoder=5e-4))
    )
