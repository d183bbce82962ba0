"""What a training run of GleSAM at full size is made of; the defaults are the paper's, see `FullConfig`."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic.dataclasses import dataclass

from glesam_ros.models.glesam.catalogue import own_name
from glesam_ros.models.glesam.one_step import SIDE_MULTIPLE
from glesam_ros.training.config import (
    STRICT,
    Count,
    CountOrNone,
    Decay,
    DegradationConfig,
    NoPictures,
    Number,
    Rate,
    Scale,
    Share,
    SourceConfig,
    StageConfig,
    Text,
    Zoom,
    no_as_text,
    zoom_range,
)
from glesam_ros.training.recipes import RECIPES

FULL_STAGES = RECIPES["glesam"].stages
"""The stages in the order in which they run."""
FullPrecision = Annotated[Literal["auto", "no", "bf16"], BeforeValidator(no_as_text)]


@dataclass(frozen=True, config=STRICT)
class SquareConfig:
    """Square crops of photographs, which are degraded and then resized for the model.

    Attributes:
        side: pixels; LQSeg is made for 512.
        zoom: range of the scale, 1 is the largest square that fits into the photograph.
        paste: share of crops that get objects of another photograph; the paper has none.
        jitter: other contrast, brightness and colours; the paper has none. Half of the crops are mirrored in any case.
    """

    side: Annotated[int, Field(strict=True, ge=32, le=4096, multiple_of=4)] = 512
    zoom: Annotated[tuple[Zoom, Zoom], AfterValidator(zoom_range)] = (1.0, 1.0)
    paste: Share = 0.0
    jitter: bool = False


@dataclass(frozen=True, config=STRICT)
class FullDegradationConfig(DegradationConfig):
    """What degrades the crops; by default LQSeg alone, at the rates that the released code trains with.

    Attributes:
        rates: mixed (`glesam_ros.degradation.lqseg.MIXED_RATES`), levels: LQ-1, 2, 3 by the weights of `levels`, or x1:
            LQ-1 with the wider first resize of the published test sets, as RASS trains.
    """

    lq: Share = 1.0
    rates: Literal["mixed", "levels", "x1"] = "mixed"


@dataclass(frozen=True, config=STRICT)
class AdaptationConfig:
    """The enhancer, see `glesam_ros.models.glesam.enhancer.EnhancerConfig`.

    Attributes:
        gamma: factor of the latent before the U-Net (FDA).
        timestep: of the one step.
        rank, alpha: of LoRA.
        levels: GleSAM++: predicts the degradation level and is told it.
    """

    gamma: Scale = 5.0
    timestep: Annotated[int, Field(strict=True, ge=0, le=999)] = 1
    rank: Count = 8
    alpha: Count = 8
    levels: bool = False


@dataclass(frozen=True, config=STRICT)
class FullLevelRates:
    """Peak rate of the level predictor."""

    predictor: Rate = 1e-3


@dataclass(frozen=True, config=STRICT)
class FullLevelConfig(StageConfig):
    """The level predictor of GleSAM++ on clear (level 0) and degraded crops; skipped without `enhancer.levels`.

    `clear`: share of clear crops.
    """

    steps: CountOrNone = 5000
    clip: Number = 1.0
    pictures_every: NoPictures = 0
    clear: Share = 0.25
    rates: FullLevelRates = field(default_factory=FullLevelRates)


@dataclass(frozen=True, config=STRICT)
class FullRestoreRates:
    """Peak rates: LoRA, with the level embedding of GleSAM++; the fake U-Net's LoRA and the classifier."""

    enhancer: Rate = 1e-4
    fake: Rate = 1e-4


@dataclass(frozen=True, config=STRICT)
class FullRestoreConfig(StageConfig):
    """Stage 1: MSE of latents, which is all that the paper has.

    The released code has two more terms, of DMD2 (arXiv 2405.14867): `distribution_matching: 1.0` and
    `adversarial: 5.0e-3` are its weights. With either a second LoRA learns the distribution of restored latents at
    every step, and the enhancer is trained at every `generator_every`-th only.

    Attributes:
        distribution_matching, adversarial: weights of the terms, 0 is off.
        classification: weight of the classifier's loss beside the fake U-Net's.
        generator_every: see above; without those terms the enhancer is trained at every step.
        clear: share of inputs that are clear and must stay.
    """

    steps: CountOrNone = 100_000
    batch: Count = 1
    warm_up: CountOrNone = 500
    final: Share = 1.0
    clip: Number = 10.0
    ema: Decay = 0.0
    checkpoint_every: Count = 500
    pictures_every: NoPictures = 0
    distribution_matching: Number = 0.0
    adversarial: Number = 0.0
    classification: Number = 1e-2
    generator_every: Count = 5
    clear: Share = 0.0
    rates: FullRestoreRates = field(default_factory=FullRestoreRates)

    @property
    def guided(self) -> bool:
        """Whether one of the terms of DMD2 is on."""
        return self.distribution_matching > 0 or self.adversarial > 0


@dataclass(frozen=True, config=STRICT)
class FullDecodeRates:
    """Peak rate of the mask decoder."""

    decoder: Rate = 1e-4


@dataclass(frozen=True, config=STRICT)
class FullDecodeConfig(StageConfig):
    """Stage 2: the mask decoder without its IoU head on restored latents; AdamW, Dice and focal loss.

    `clear`: share of crops that are clear.
    """

    steps: CountOrNone = 20_000
    batch: Count = 1
    warm_up: CountOrNone = 0
    final: Share = 1.0
    weight_decay: Number = 1e-5
    clip: Number = 0.0
    ema: Decay = 0.0
    checkpoint_every: Count = 500
    pictures_every: NoPictures = 0
    clear: Share = 0.0
    rates: FullDecodeRates = field(default_factory=FullDecodeRates)


@dataclass(frozen=True, config=STRICT)
class DistillRates:
    """Peak rate of the small enhancer."""

    small: Rate = 2e-4


@dataclass(frozen=True, config=STRICT)
class DistillConfig(StageConfig):
    """The small enhancer learns what the large one makes of a latent; not of the paper, off by default.

    Attributes:
        timestep: of the small enhancer's one step; see `SmallEnhancer`.
        clear: share of inputs that are clear.
    """

    steps: CountOrNone = 0
    warm_up: CountOrNone = 500
    clip: Number = 1.0
    ema: Decay = 0.999
    checkpoint_every: Count = 500
    pictures_every: NoPictures = 0
    timestep: Annotated[int, Field(strict=True, ge=0, le=999)] = 100
    clear: Share = 0.1
    rates: DistillRates = field(default_factory=DistillRates)


def _own_text(value: Any) -> Any:
    return own_name(value) if isinstance(value, str) else value


@dataclass(frozen=True, config=STRICT)
class FullConfig:
    """One run of GleSAM, GleSAM2 or GleSAM++ (arXiv 2503.12507, sec. 3 and 4.1; arXiv 2601.02018).

    Attributes:
        model: tells this recipe from nano's.
        seed: of the first weights and of every batch.
        precision: auto (bf16 where the device computes in it, else no), no (fp32) or bf16.
        workers: processes that draw batches ahead, 0 for none; the batches are the same.
        random: tiny networks with random weights take the place of base and U-Net, to try the loop out.
        base: name of the model whose latent is restored, or of its repository on Hugging Face.
        base_file: its checkpoint; null: that of `glesam models get`.
        unet: sd21-base or sd15, or the name of its repository on Hugging Face.
        unet_folder: holds unet/ and text_encoder/, tokenizer/ or empty_prompt.safetensors; null: as for `base_file`.
        start: folder with `glesam.json` to begin with, or null for a fresh LoRA.
        side: of the model's square input in pixels.
        gradient_checkpointing: less memory and more time in stage 1.
        objects: prompted objects of a crop; with 3 random points each.
    """

    model: Literal["glesam"] = "glesam"
    seed: CountOrNone = 10
    precision: FullPrecision = "auto"
    workers: CountOrNone = 4
    random: bool = False
    base: Annotated[Text, AfterValidator(own_name)] = "sam_vit_b"
    base_file: Text | None = None
    unet: Annotated[Literal["sd21-base", "sd15"], BeforeValidator(_own_text)] = "sd21-base"
    unet_folder: Text | None = None
    start: Text | None = None
    side: Annotated[int, Field(strict=True, ge=SIDE_MULTIPLE, le=2048, multiple_of=SIDE_MULTIPLE)] = 1024
    gradient_checkpointing: bool = True
    objects: Count = 1
    sources: Annotated[tuple[SourceConfig, ...], Field(min_length=1)] = (
        SourceConfig("lqseg", "msra10k"), SourceConfig("lqseg", "thinobject5k"), SourceConfig("lqseg", "lvis"),
    )
    crop: SquareConfig = field(default_factory=SquareConfig)
    degradation: FullDegradationConfig = field(default_factory=FullDegradationConfig)
    enhancer: AdaptationConfig = field(default_factory=AdaptationConfig)
    level: FullLevelConfig = field(default_factory=FullLevelConfig)
    restore: FullRestoreConfig = field(default_factory=FullRestoreConfig)
    decode: FullDecodeConfig = field(default_factory=FullDecodeConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
