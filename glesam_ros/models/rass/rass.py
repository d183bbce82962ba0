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

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glesam_ros.models.glesam.enhancer import TOKENS, UNet2DConditionModel, is_lora
from glesam_ros.models.glesam.torchvision_ops import allow_import_without_operators

allow_import_without_operators()  # transformers, diffusers and peft want torchvision

from transformers import Mask2FormerConfig  # noqa: E402
from transformers.models.mask2former.modeling_mask2former import (  # noqa: E402
    Mask2FormerLoss,
    Mask2FormerPixelDecoder,
    Mask2FormerPreTrainedModel,
    Mask2FormerTransformerModule,
)

AutoencoderKL = Any
"""diffusers' class; see `UNet2DConditionModel`."""

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
SIDE_MULTIPLE = 64
"""The VAE shrinks the picture 8 times, the U-Net the latent 8 times."""
GROUPS = 32
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
        least = {name: 1 for name in ("rank", "alpha", "queries", "heads", "pixel_layers", "layers", "feedforward")}
        for name, low in {**least, "points": 4, "timestep": 0, "projection": 4 * GROUPS, "width": GROUPS}.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < low:
                raise ValueError(f"{name}: expected a whole number >= {low}, got {value!r}")
        for name, divisor in (("projection", 4 * GROUPS), ("width", GROUPS), ("width", self.heads)):
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
        self.norm = nn.GroupNorm(GROUPS, outside)
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
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


class Head(Mask2FormerPreTrainedModel):
    """Mask2Former without its backbone: transformers' pixel decoder and transformer decoder on features of ours.

    Multi-scale deformable attention runs by `grid_sample`; no operator is compiled.
    """

    def __init__(self, config: RassConfig) -> None:
        own = Mask2FormerConfig(
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
        """As `RassNetwork.loss`; transformers' matching and losses, which need scipy."""
        weights = {
            "cross_entropy": self.config.class_weight, "mask": self.config.mask_weight, "dice": self.config.dice_weight,
        }
        criterion = Mask2FormerLoss(self.config, {f"loss_{name}": x for name, x in weights.items()})
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
        adapted = [p for name, p in self.unet.named_parameters() if is_lora(name) or name.startswith("conv_in.")]
        return {"backbone": [*adapted, *self.projections.parameters()], "head": list(self.head.parameters())}

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
        if images.shape[1] % SIDE_MULTIPLE or images.shape[2] % SIDE_MULTIPLE:
            raise ValueError(
                f"images: expected sides that are multiples of {SIDE_MULTIPLE}, got {images.shape[1]} x "
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

    def merge(self) -> None:
        """For inference: put the adapters into the weights, the same output without their cost; there is no way back.

        Merge in float32, before the weights get a narrower type.
        """
        self.unet.fuse_lora(adapter_names=list(ADAPTERS))
        self.unet.unload_lora()
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
    groups: tuple[list[str], list[str], list[str]] = ([], [], [])
    for name, module in unet.named_modules():
        if not isinstance(module, (nn.Linear, nn.Conv2d)) or name == "conv_out":
            continue
        if any(part in name for part in ADAPTED):
            encoder = name.startswith("down_blocks.") or name == "conv_in"
            groups[0 if encoder else 1 if name.startswith("up_blocks.") else 2].append(name)
    return groups


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
