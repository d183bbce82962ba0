"""RASS: a semantic map straight from a bad picture, by the features of a restoring diffusion model.

Read top to bottom: the configuration, the network (`Projection`, `Head`, `RassNetwork`), the sliding window, files, the
model for the pipeline (`RassModel`, `load_rass`).

    picture ─► VAE encoder ─► latent ─► U-Net at t = 1: SCR merged, three new LoRA adapters of rank 4
                  │ 256@/4, 512@/8       │ 1280@/32, 1280@/16, 640@/8, 320@/8
                  └──────────┬───────────┘
               bottleneck projections to 512, summed by stride: res2 (/4), res3 (/8), res4 (/16), res5 (/32)
                             │
               Mask2Former: pixel decoder, 100 queries ─► class and mask of each query ─► share of each class

Training calls `RassNetwork.loss(images, mask_labels, class_labels)`:

    images        (B, H, W, 3) uint8 RGB, H and W multiples of 64, on the network's device
    mask_labels   list of B tensors (N_i, H, W) float32 of 0 and 1, one mask for each class in the picture; N_i may be 0
    class_labels  list of B tensors (N_i,) int64, the class of each mask; `masks_of(labels, ignore)` makes both
    returns       {"class": ..., "mask": ..., "dice": ...}, scalars, weighted 2, 5, 5 and summed over the 10 layers:
                  their sum is what the paper minimises

`RassNetwork.trainable_parameters()` gives {"backbone": [...], "head": [...]}; the released recipe trains the backbone
at a tenth of the head's rate. Set `network.autocast = torch.bfloat16` for mixed precision: VAE and U-Net run in it, the
head in float32.

Source: RASS (IJCV 2026, arXiv 2602.14042) and its released code; Mask2Former (CVPR 2022, arXiv 2112.01527); the
projections are those of ODISE (CVPR 2023, arXiv 2303.04803).
"""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from glesam_ros import ade20k
from glesam_ros.checksum import sha256
from glesam_ros.models.base import check_finite
from glesam_ros.models.glesam import catalogue
from glesam_ros.models.glesam.enhancer import (
    TOKENS,
    UNet2DConditionModel,
    embedded_once,
    is_lora,
    load_unet,
    merge_layers,
)
from glesam_ros.models.glesam.one_step import PICTURE_MULTIPLE
from glesam_ros.models.glesam.replay import Replayed, capturer, give_back
from glesam_ros.models.glesam.runtime import (
    choose_device,
    choose_precision,
    device_in_words,
    loading,
    made_current,
    memory_errors,
)
from glesam_ros.models.glesam.torchvision_ops import allow_import_without_operators
from glesam_ros.models.glesam.weights import load_exactly, read_checkpoint, write_checkpoint
from glesam_ros.models.rass.checkpoint import NOT_READ, from_released, is_released, released_sizes
from glesam_ros.models.rass.scr import (
    GROUPS,
    AutoencoderKL,
    ClassPrompts,
    group_of,
    load_vae,
    merge_scr,
    trained_parameters,
)
from glesam_ros.validation import FloatArray, UInt8Array, check_image

allow_import_without_operators()  # transformers, diffusers and peft want torchvision

from transformers import Mask2FormerConfig  # noqa: E402
from transformers.models.mask2former.modeling_mask2former import (  # noqa: E402
    Mask2FormerLoss,
    Mask2FormerPixelDecoder,
    Mask2FormerPreTrainedModel,
    Mask2FormerTransformerModule,
)

_LOG = logging.getLogger(__name__)

NAME = "rass-sd21"
"""Name of the segmenter."""
ADAPTERS = ("default_encoder_s2", "default_decoder_s2", "default_others_s2")
"""Names of the new adapters: on the down blocks and the first convolution, on the up blocks, on the middle block."""
ADAPTED = ("to_q", "to_k", "to_v", "to_out.0", "conv", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
"""Parts of the names of adapted layers; "conv" stands for every convolution but the last."""
STRIDES = (4, 8, 16, 32)
"""Of res2 .. res5."""
VAE_BLOCKS = (1, 3)
"""Blocks of the VAE encoder whose outputs are features."""
FEATURE_STRIDES = (4, 8, 32, 16, 8, 8)
"""Of the six features: two of the VAE encoder, four of the U-Net's up blocks."""
WINDOW, LONGEST = 512, 2048
"""Shorter side at which a picture is looked at, and most of its longer one, in pixels."""
NORM_GROUPS = 32
"""Of all group norms."""
LEAST_SHARE = 1e-8
"""Share of a class below which its logarithm is no longer told apart."""


@dataclass(frozen=True)
class RassConfig:
    """What a RASS network is; the defaults are the published ones.

    Attributes:
        classes: names of the K classes, each once.
        rank, alpha: of the new LoRA; the update is alpha / rank * B A. The released code leaves alpha at peft's 8.
        timestep: at which the U-Net is asked, in 0..999.
        projection: channels of res2 .. res5, a multiple of 128.
        width: channels of the head, a multiple of 32 and of `heads`.
        queries: masks that the head proposes.
        heads: of each attention.
        pixel_layers: of the pixel decoder.
        layers: predictions of the transformer decoder, one before its first layer.
        feedforward: of the transformer decoder; that of the pixel decoder is half as wide.
        points: at which masks are compared in training.

    Raises:
        ValueError: a value is out of its range.
    """

    classes: tuple[str, ...]
    rank: int = 4
    alpha: int = 8
    timestep: int = 1
    projection: int = 512
    width: int = 256
    queries: int = 100
    heads: int = 8
    pixel_layers: int = 6
    layers: int = 10
    feedforward: int = 2048
    points: int = 12544

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(self.classes))
        if not self.classes or len(set(self.classes)) != len(self.classes):
            raise ValueError(f"classes: expected at least one name, each once, got {list(self.classes)}")
        least = dict.fromkeys(("rank", "alpha", "queries", "heads", "pixel_layers", "layers", "feedforward"), 1)
        least |= {"points": 4, "timestep": 0, "projection": 4 * NORM_GROUPS, "width": NORM_GROUPS}
        for name, low in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < low:
                raise ValueError(f"{name}: expected a whole number >= {low}, got {value!r}")
        for name, divisor in (("projection", 4 * NORM_GROUPS), ("width", NORM_GROUPS), ("width", self.heads)):
            if getattr(self, name) % divisor:
                raise ValueError(f"{name}: expected a multiple of {divisor}, got {getattr(self, name)}")


class Prediction(NamedTuple):
    """What the head says of B pictures, after each of its layers; the last is what counts.

    Attributes:
        classes: for each layer (B, Q, K + 1) logits, the last class is "no object".
        masks: for each layer (B, Q, H/4, W/4) logits.
    """

    classes: tuple[Tensor, ...]
    masks: tuple[Tensor, ...]

    def shares(self) -> Tensor:
        """(B, K, H/4, W/4) float32, not negative: what all queries together say for each class; not normalised.

        Source: Mask2Former's inference of semantic maps.
        """
        classes = self.classes[-1].float().softmax(-1)[..., :-1]
        return torch.einsum("bqk,bqhw->bkhw", classes, self.masks[-1].float().sigmoid())


class ConvNorm(nn.Conv2d):
    """A convolution without bias and a group norm; detectron2's names of the weights."""

    def __init__(self, inside: int, outside: int, kernel: int) -> None:
        super().__init__(inside, outside, kernel, padding=kernel // 2, bias=False)
        self.norm = nn.GroupNorm(NORM_GROUPS, outside)
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """(B, inside, h, w) -> (B, outside, h, w)."""
        return self.norm(super().forward(x))


class Projection(nn.Module):
    """A residual bottleneck block from the width of a feature to that of the head's input."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(inside, outside // 4, 1)
        self.conv2 = ConvNorm(outside // 4, outside // 4, 3)
        self.conv3 = ConvNorm(outside // 4, outside, 1)
        self.shortcut = None if inside == outside else ConvNorm(inside, outside, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inside, h, w) -> (B, outside, h, w)."""
        y = self.conv3(F.relu(self.conv2(F.relu(self.conv1(x)))))
        return F.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class HeadLoss(Mask2FormerLoss):
    """Mask2Former's losses by transformers, which itself divides the number of masks by that of processes twice."""

    def get_num_masks(  # type: ignore[override]  # transformers' own hint is wrong: it is given a list
        self, class_labels: Sequence[Tensor], device: torch.device
    ) -> Tensor:
        """Masks of a process, averaged over all processes, at least 1: a scalar on `device`."""
        count = torch.tensor(float(sum(map(len, class_labels))), device=device)
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(count)
            count /= distributed.get_world_size()
        return count.clamp(min=1)


class Head(Mask2FormerPreTrainedModel):
    """Mask2Former without its backbone: transformers' pixel decoder and transformer decoder on features of ours.

    Multi-scale deformable attention runs by `grid_sample`; no operator is compiled.
    """

    def __init__(self, config: RassConfig) -> None:
        own = Mask2FormerConfig(  # type: ignore[call-arg]  # the base class takes num_labels
            num_labels=len(config.classes), feature_size=config.width, mask_feature_size=config.width,
            hidden_dim=config.width, encoder_feedforward_dim=max(1, config.feedforward // 2),
            dim_feedforward=config.feedforward, encoder_layers=config.pixel_layers, decoder_layers=config.layers,
            num_attention_heads=config.heads, num_queries=config.queries, feature_strides=list(STRIDES),
            common_stride=STRIDES[0], dropout=0.0, class_weight=2.0, mask_weight=5.0, dice_weight=5.0,
            no_object_weight=0.1, train_num_points=config.points,
        )
        super().__init__(own)
        self.pixel_decoder = Mask2FormerPixelDecoder(own, [config.projection] * len(STRIDES))
        self.transformer_module = Mask2FormerTransformerModule(config.width, own)
        self.class_predictor = nn.Linear(config.width, len(config.classes) + 1)
        self.post_init()

    def forward(self, features: Sequence[Tensor]) -> Prediction:
        """res2 .. res5, each (B, projection, h, w) float32 -> classes and masks after each layer."""
        pixels = self.pixel_decoder(list(features), output_hidden_states=False, return_dict=True)
        found = self.transformer_module(
            multi_scale_features=pixels.multi_scale_features, mask_features=pixels.mask_features,
            output_hidden_states=True,
        )
        classes = tuple(self.class_predictor(x.transpose(0, 1)) for x in found.intermediate_hidden_states)
        return Prediction(classes, tuple(found.masks_queries_logits))

    def loss(
        self, found: Prediction, mask_labels: Sequence[Tensor], class_labels: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """As `RassNetwork.loss`; transformers' matching, which needs scipy, and losses."""
        weights = {
            "cross_entropy": self.config.class_weight, "mask": self.config.mask_weight, "dice": self.config.dice_weight,
        }
        criterion = HeadLoss(self.config, {f"loss_{name}": x for name, x in weights.items()})
        layers = [
            {"class_queries_logits": classes.float(), "masks_queries_logits": masks.float()}
            for classes, masks in zip(*found)
        ]
        parts = criterion.to(found.classes[-1].device)(
            **layers[-1], mask_labels=list(mask_labels), class_labels=list(class_labels),
            auxiliary_predictions=layers[:-1],
        )
        totals = {
            name: weight * torch.stack([x for key, x in parts.items() if key.startswith(f"loss_{name}")]).sum()
            for name, weight in weights.items()
        }
        return {"class": totals.pop("cross_entropy"), **totals}


class RassNetwork(nn.Module):
    """VAE encoder and U-Net, frozen but for the new adapters and the first convolution; projections; head.

    Attributes:
        autocast: type in which VAE and U-Net compute, whatever type their weights have; None leaves it to the weights.
    """

    def __init__(self, config: RassConfig, vae: AutoencoderKL, unet: UNet2DConditionModel, prompt: Tensor) -> None:
        """Take over a VAE, of which the encoder is kept, and a U-Net with SCR merged, which is adapted in place.

        Args:
            prompt: (1, 77, C) float, what the text encoder says of the prompt, the same for all pictures.

        Raises:
            ValueError: the prompt has another shape, or the U-Net has adapters already.
        """
        from peft import LoraConfig

        super().__init__()
        text = unet.config.cross_attention_dim
        if prompt.shape != (1, TOKENS, text):
            raise ValueError(f"prompt: expected shape (1, {TOKENS}, {text}) of this U-Net, got {tuple(prompt.shape)}")
        if any(is_lora(name) for name, _ in unet.named_parameters()):
            raise ValueError("unet: expected merged weights, got LoRA; merge SCR first")
        self.config = config
        self.autocast: torch.dtype | None = None
        self.scaling = float(vae.config.scaling_factor)
        self.encoder, self.quant_conv = vae.encoder, vae.quant_conv
        self.unet = unet
        self.unet.requires_grad_(False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # three adapters are meant
            for name, targets in zip(ADAPTERS, adapted_layers(unet)):
                own = LoraConfig(
                    r=config.rank, lora_alpha=config.alpha, init_lora_weights="gaussian", target_modules=targets
                )
                unet.add_adapter(own, adapter_name=name)
        unet.set_adapter(list(ADAPTERS))
        widths = [vae.config.block_out_channels[k] for k in VAE_BLOCKS] + list(unet.config.block_out_channels)[::-1]
        self.projections = nn.ModuleList(Projection(width, config.projection) for width in widths)
        self.head = Head(config)
        self.register_buffer("prompt", prompt.detach().clone(), persistent=False)
        self.register_buffer("step", torch.tensor([config.timestep], device=prompt.device), persistent=False)
        self.prompt: Tensor
        self.step: Tensor
        self.requires_grad_(False)
        for parameters in self.trainable_parameters().values():
            for parameter in parameters:
                parameter.requires_grad_(True)

    def trainable_parameters(self) -> dict[str, list[nn.Parameter]]:
        """What an optimiser gets: "backbone" (new LoRA, first convolution, projections) and "head"; all else is frozen.

        At full size with 150 classes 27,905,063 parameters; the paper says 27.9 million.
        """
        backbone = [*trained_parameters(self.unet), *self.projections.parameters()]
        return {"backbone": backbone, "head": list(self.head.parameters())}

    def features(self, images: Tensor) -> tuple[Tensor, ...]:
        """What VAE and U-Net say of pictures.

        Args:
            images: (B, H, W, 3) uint8 RGB, H and W multiples of 64.

        Returns:
            res2 .. res5: (B, projection, H / stride, W / stride) float32 for the strides 4, 8, 16, 32.

        Raises:
            ValueError: a shape or the type is wrong.
        """
        if images.ndim != 4 or images.shape[3] != 3 or images.dtype != torch.uint8:
            raise ValueError(f"images: expected (B, H, W, 3) uint8, got {tuple(images.shape)} {images.dtype}")
        if images.shape[1] % PICTURE_MULTIPLE or images.shape[2] % PICTURE_MULTIPLE:
            raise ValueError(
                f"images: expected sides that are multiples of {PICTURE_MULTIPLE}, got {images.shape[1]} x "
                f"{images.shape[2]}"
            )
        kind = self.quant_conv.weight.dtype
        pixels = (images.permute(0, 3, 1, 2).float() / 127.5 - 1).to(kind)
        with nullcontext() if self.autocast is None else torch.autocast(images.device.type, self.autocast):
            with torch.no_grad(), outputs_of([self.encoder.down_blocks[k] for k in VAE_BLOCKS]) as found:
                # the mean of the posterior: the released code draws a sample, which makes every answer another
                latent = self.scaling * self.quant_conv(self.encoder(pixels)).chunk(2, 1)[0]
            with outputs_of(self.unet.up_blocks) as later:
                prompt = self.prompt.to(kind).expand(len(images), -1, -1)
                self.unet(latent, self.step, encoder_hidden_states=prompt, return_dict=False)
        levels: dict[int, Tensor] = {}
        for feature, stride, projection in zip([*found, *later], FEATURE_STRIDES, self.projections):
            projected = projection(feature.float())
            levels[stride] = levels[stride] + projected if stride in levels else projected
        return tuple(levels[stride] for stride in STRIDES)

    def forward(self, images: Tensor) -> Prediction:
        """Pictures as in `features` -> classes and masks after each layer of the head."""
        return self.head(self.features(images))

    def slide(
        self, images: Tensor, features: Callable[[Tensor], tuple[Tensor, ...]] | None = None
    ) -> tuple[Tensor, ...]:
        """Features of whole pictures from square windows as high or wide as the shorter side: the published test.

        Windows lie side by side, the last one at the border; where it overlaps the one before, both count half. The
        head then sees the picture whole.

        Args:
            images: (B, H, W, 3) uint8 RGB, the shorter side a multiple of 64, the longer one of 32.
            features: takes the place of `self.features`.

        Returns:
            As `features`, of the whole pictures.

        Raises:
            ValueError: as `features`, or the longer side is no multiple of 32.
        """
        features = features or self.features
        height, width = int(images.shape[1]), int(images.shape[2])
        side = min(height, width)
        if height == width:
            return features(images)
        if max(height, width) % STRIDES[-1]:
            raise ValueError(
                f"images: expected a longer side that is a multiple of {STRIDES[-1]}, got {height} x {width}"
            )
        found: list[Tensor] = []
        counts: list[Tensor] = []
        for top in window_starts(height, side):
            for left in window_starts(width, side):
                parts = features(images[:, top : top + side, left : left + side])
                if not found:
                    found = [x.new_zeros(*x.shape[:2], height // s, width // s) for x, s in zip(parts, STRIDES)]
                    counts = [x.new_zeros(height // s, width // s) for x, s in zip(parts, STRIDES)]
                for total, count, part, s in zip(found, counts, parts, STRIDES):
                    where = (slice(top // s, (top + side) // s), slice(left // s, (left + side) // s))
                    total[(..., *where)] += part
                    count[where] += 1
        return tuple(total / count for total, count in zip(found, counts))

    def loss(
        self, images: Tensor, mask_labels: Sequence[Tensor], class_labels: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """The three terms of Mask2Former, weighted; the top of this file has the arguments.

        Raises:
            ValueError: as `features`, or the labels do not fit the pictures.
        """
        size = tuple(images.shape[1:3])
        if not len(images) == len(mask_labels) == len(class_labels):
            raise ValueError(
                f"expected masks and classes of {len(images)} pictures, got {len(mask_labels)} and {len(class_labels)}"
            )
        for masks, classes in zip(mask_labels, class_labels):
            if masks.shape != (len(classes), *size):
                raise ValueError(
                    f"mask_labels: expected shape {(len(classes), *size)}, as many masks as classes, got "
                    f"{tuple(masks.shape)}"
                )
        return self.head.loss(self(images), mask_labels, class_labels)

    def trained_state(self) -> dict[str, Tensor]:
        """`trainable_parameters` by their names in the network, on the CPU; empty of LoRA once it is merged."""
        trained = {id(p) for parameters in self.trainable_parameters().values() for p in parameters}
        return {name: p.detach().cpu().clone() for name, p in self.named_parameters() if id(p) in trained}

    def merge(self) -> None:
        """For inference: put the adapters into the weights, the same output without their cost; there is no way back.

        Merge in float32, before the weights get a narrower type.

        Raises:
            ValueError: LoRA is not finite.
        """
        merge_layers(self.unet, lambda name: None)
        self.requires_grad_(False)


@contextmanager
def outputs_of(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Collects what modules return while the context lasts, in the order of their calls."""
    found: list[Tensor] = []
    handles = [module.register_forward_hook(lambda m, args, out: found.append(out)) for module in modules]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def adapted_layers(unet: UNet2DConditionModel) -> tuple[list[str], list[str], list[str]]:
    """Names of the layers that the three adapters are on, in the order of `ADAPTERS`; of SD 2.1-base 257 in all."""
    layers = [name for name, module in unet.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    adapted = [name for name in layers if name != "conv_out" and any(part in name for part in ADAPTED)]
    encoder, decoder, others = ([name for name in adapted if group_of(name) == group] for group in GROUPS)
    return encoder, decoder, others


def masks_of(labels: Tensor, ignore: int) -> tuple[list[Tensor], list[Tensor]]:
    """Masks and classes of label maps, as `RassNetwork.loss` takes them.

    Args:
        labels: (B, H, W) class indices of any integer type.
        ignore: value of unlabelled pixels, which belong to no mask.

    Returns:
        B tensors (N_i, H, W) float32 and B tensors (N_i,) int64, on the device of `labels`.
    """
    classes = [found[found != ignore].long() for found in (x.long().unique() for x in labels)]
    return [(x[None] == found[:, None, None]).float() for x, found in zip(labels, classes)], classes


# pictures of any size


def window_starts(length: int, side: int) -> list[int]:
    """Where windows of `side` begin that cover `length`: side by side, the last one at the end."""
    return [min(k * side, length - side) for k in range(-(-length // side))]


def working_size(height: int, width: int) -> tuple[int, int]:
    """Height and width at which a picture is looked at: the shorter side 512, the longer one at most 2048.

    The shorter side is rounded to a multiple of 64, the longer one of 32; proportions change by a few hundredths.
    """
    short, long = min(height, width), max(height, width)
    scale = min(WINDOW / short, LONGEST / long)
    side = max(PICTURE_MULTIPLE, round(short * scale / PICTURE_MULTIPLE) * PICTURE_MULTIPLE)
    other = max(side, round(long * scale / STRIDES[-1]) * STRIDES[-1])
    return (side, other) if height <= width else (other, side)


# files


@dataclass(frozen=True, eq=False)
class RassWeights:
    """What is trained of RASS, and what belongs to it; the content of rass.pth.

    Attributes:
        config: of the network.
        palette: (K, 3) uint8 RGB, colours of the classes.
        state: tensors by the names of `RassNetwork`, or in the released file by those of detectron2; from a file they
            are views of it, which has to stay as it is while they live.
        prompt: (1, 77, C) float32, the prompt of the training; None in the released file, whose prompts were tags.
        scr: SHA-256 of the scr.pkl that was merged in for the training; empty where it is not known.
    """

    config: RassConfig
    palette: UInt8Array
    state: dict[str, Tensor]
    prompt: Tensor | None = None
    scr: str = ""

    def load_into(self, network: RassNetwork, what: str) -> None:
        """Put the weights into a network of this configuration; `what` they are, for errors.

        Raises:
            ValueError: a trained weight is missing, one is left over, or of another shape.
        """
        own = network.state_dict()
        state = from_released(self.state, own) if is_released(self.state) else self.state
        trained = network.trained_state()
        # the released file has the frozen U-Net, too, with SCR merged in
        load_exactly(network, state, what, ignore=[key for key in own if key not in trained and key not in state])


def write_rass(network: RassNetwork, path: Path, palette: UInt8Array, scr: str = "") -> None:
    """Write what is trained, with classes, palette and prompt, whole or not at all; folders above it are made.

    Args:
        path: rass.pth.
        palette, scr: as in `RassWeights`.

    Raises:
        ValueError: the palette has not one colour for each class, or the adapters are merged already.
    """
    if palette.shape != (len(network.config.classes), 3):
        raise ValueError(f"palette: expected shape ({len(network.config.classes)}, 3), got {palette.shape}")
    state = network.trained_state()
    if not any(is_lora(key) for key in state):
        raise ValueError("write_rass: expected LoRA, got merged weights; write before merge()")
    fields = {**dataclasses.asdict(network.config), "classes": list(network.config.classes)}
    content = {
        "config": fields, "palette": palette.tolist(), "state": state, "prompt": network.prompt.cpu(), "scr": scr,
    }
    write_checkpoint(path, content)


def read_rass(path: Path) -> RassWeights:
    """Read rass.pth: one of `write_rass`, or the released one (see `checkpoint`), whose classes are ADE20K's.

    Weights take memory where they are read only, so those that the released file has for nothing here take none.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file, or a released one of other classes than ADE20K's 150.
    """
    content = read_checkpoint(path, mapped=True)
    state = content.get("model", content) if isinstance(content, dict) else None
    try:
        if isinstance(state, dict) and is_released(state):
            if odd := [key for key, x in state.items() if not isinstance(x, Tensor)]:
                raise ValueError(f"expected a state dict of tensors, got something else under {', '.join(odd[:8])}")
            sizes = released_sizes(state)
            if (count := sizes.pop("classes")) != len(ade20k.CLASSES):
                raise ValueError(f"expected the {len(ade20k.CLASSES)} classes of ADE20K, got {count} without names")
            read = {key: x for key, x in state.items() if not key.startswith(NOT_READ)}
            return RassWeights(RassConfig(ade20k.CLASSES, **sizes), ade20k.PALETTE, read)
        if not isinstance(content, dict) or not {"config", "palette", "state", "prompt", "scr"} <= set(content):
            raise ValueError("expected the weights of RASS, released or of glesam train, got something else")
        if not isinstance(content["state"], dict) or not all(isinstance(x, Tensor) for x in content["state"].values()):
            raise ValueError("state: expected a dict of tensors, got something else")
        config = RassConfig(**content["config"])
        colours = np.array(content["palette"])
        if colours.shape != (len(config.classes), 3):
            raise ValueError(f"palette: expected {len(config.classes)} colours, got an array {colours.shape}")
        palette = colours.astype(np.uint8)
        if not np.array_equal(palette, colours):
            raise ValueError(f"palette: expected whole numbers in 0..255, got {colours.min()} .. {colours.max()}")
        if not isinstance(prompt := content["prompt"], Tensor):
            raise ValueError(f"prompt: expected a tensor, got {type(prompt).__name__}")
        return RassWeights(config, palette, content["state"], prompt.clone(), content["scr"])
    except (TypeError, ValueError) as error:  # a field that is missing or unknown is a TypeError
        raise ValueError(f"{path}: {error}") from error


# the model


class RassModel:
    """RASS for pictures of any size; see `glesam_ros.models.base.SemanticModel`.

    Args:
        network: with what was trained of it; taken over, its adapters are merged here.
        palette: (K, 3) uint8 RGB.
        device: of torch.
        dtype: of VAE and U-Net; projections and head compute in float32.

    Raises:
        OutOfMemory: the weights do not fit.
    """

    name = NAME

    @memory_errors
    def __init__(self, network: RassNetwork, palette: UInt8Array, device: torch.device, dtype: torch.dtype) -> None:
        self.classes, self.palette = network.config.classes, palette
        self.device = device_in_words(device, dtype)
        self._place = device
        network.merge()
        for part in (network.encoder, network.quant_conv, network.unet):
            part.to(dtype)
            part.to(memory_format=torch.channels_last)
        self._network = network.to(device).eval()
        capture = capturer() if device.type == "cuda" else None
        self._features = Replayed(self._network.features, "features", capture, at_once=False)

    @memory_errors
    def logits(self, image: UInt8Array) -> FloatArray:
        """Classify an image.

        Args:
            image: (H, W, 3) uint8 RGB with H, W >= 1; left as it is.

        Returns:
            (K, h, w) float32: logarithms of the classes' shares at a quarter of `working_size`, so that the softmax
            over K is their normalised share.

        Raises:
            TypeError, ValueError: no such image.
            OutOfMemory: the device lacked memory.
            RuntimeError: the result is not finite, which half precision may cause.
        """
        image = check_image(image)
        height, width = working_size(*image.shape[:2])
        smaller = height * width < image.shape[0] * image.shape[1]
        how = cv2.INTER_AREA if smaller else cv2.INTER_CUBIC
        resized = cv2.resize(image, (width, height), interpolation=how)
        with torch.inference_mode(), made_current(self._place):
            pixels = torch.from_numpy(np.ascontiguousarray(resized))[None].to(self._place)
            shares = self._network.head(self._network.slide(pixels, self._features)).shares()[0]
            found = shares.clamp_min(LEAST_SHARE).log().cpu().numpy()
        check_finite(found, f"{NAME} on {self.device}")
        return np.asarray(found, np.float32)

    def free(self) -> None:
        """Drop captured graphs and give cached device memory back."""
        self._features.free()
        if self._place.type == "cuda":
            give_back()

    def close(self) -> None:
        """Free memory; the model cannot be used afterwards."""
        self._features.free()
        del self._network, self._features
        if self._place.type == "cuda":
            give_back()


@loading
def load_rass(device: str, precision: str) -> RassModel:
    """The segmenter from the files that `catalogue` names below `home()`.

    Args:
        device: "auto", "cuda" or "cpu".
        precision: "auto" (bf16 on CUDA from capability 8.0, fp16 below, fp32 on a CPU), "fp32", "fp16" or "bf16".

    Raises:
        FileNotFoundError: a file is missing; names the command that gets it.
        RuntimeError: there is no CUDA.
        OutOfMemory: the weights do not fit.
        ValueError: another device or precision, or files that do not fit each other.
    """
    place = choose_device(device)
    dtype = choose_precision(precision, place)
    folder = catalogue.system_folder(NAME, catalogue.home())
    scr, file = folder / catalogue.SCR_FILE, folder / catalogue.RASS_FILE
    weights = read_rass(file)
    if weights.scr and weights.scr != sha256(scr):
        raise ValueError(f"{file}: expected the scr.pkl that it was trained with beside it, {scr} is another one")
    sd = folder / catalogue.SYSTEM_SD
    unet = load_unet(sd / "unet")
    merge_scr(unet, scr)
    prompt = _released_prompt(folder, weights.config.classes) if weights.prompt is None else weights.prompt
    network = RassNetwork(weights.config, load_vae(sd / "vae"), unet, prompt)
    weights.load_into(network, str(file))
    return RassModel(network, weights.palette, place, dtype)


def _released_prompt(folder: Path, classes: Sequence[str]) -> Tensor:
    """What the text encoder says of the class names, as many as fit: the prompt where the file has none.

    The authors prompt with the tags that a recognition model gives each picture. Ours is the same for all pictures, so
    it is computed once, and no tagger (470 million parameters) and no text encoder has to run.
    """
    sd, file = folder / catalogue.SYSTEM_SD, folder / catalogue.RASS_PROMPT_FILE
    return embedded_once(file, lambda: ClassPrompts(sd)(classes))
