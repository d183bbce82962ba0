"""SAM 2 and 2.1 for single images: the modules of the sam2 package at any square size, latent apart from the rest.

Only the top level of the feature pyramid, (256, S / 16, S / 16), is what GleSAM2 enhances (`Features.latent`). The two
high-resolution levels, which the mask decoder adds while it upsamples, stay as the image encoder gave them, also in bad
pictures: in benchmarks/sam2_high_levels.py nothing that was put in their place did better.

Source: SAM 2 (arXiv 2408.00714), image path; GleSAM (arXiv 2503.12507) for what is enhanced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from glesam_ros.models.glesam.base import STRIDE, BaseModel, Features, check_square, exact_places
from glesam_ros.models.glesam.weights import SAM2_VIDEO_PARTS, load_exactly

if TYPE_CHECKING:
    from sam2.modeling.sam2_base import SAM2Base

MEAN = (123.675, 116.28, 103.53)
"""Of the input, for 0..255; upstream has the same for 0..1."""
STD = (58.395, 57.12, 57.375)
THRESHOLDS = (0.8, 0.95)
"""Least score and stability of upstream's automatic masks."""


@dataclass(frozen=True)
class Sam2Config:
    """How to build a SAM 2.

    Attributes:
        file: configuration of the sam2 package.
        overrides: changes to it in hydra's syntax, for example "model.image_encoder.trunk.embed_dim=8".
    """

    file: str
    overrides: tuple[str, ...] = ()


SAM2_SIZES: dict[str, Sam2Config] = {
    f"{version}_hiera_{size}": Sam2Config(f"configs/{version}/{version}_hiera_{letter}.yaml")
    for version in ("sam2", "sam2.1")
    for size, letter in (("tiny", "t"), ("small", "s"), ("base_plus", "b+"), ("large", "l"))
}
"""The eight published models."""


def build_sam2(name: str, config: Sam2Config | None = None) -> Sam2:
    """A SAM 2 with random weights, in evaluation mode, on torch's default device.

    Args:
        name: one of `SAM2_SIZES`, or any name if `config` is given.
        config: what to build instead of the published size, for example a narrow one for tests.

    Raises:
        ValueError: the name is unknown.
        ModuleNotFoundError: the sam2 package is missing.
    """
    if config is None and name not in SAM2_SIZES:
        raise ValueError(f"SAM 2 model: expected one of {', '.join(SAM2_SIZES)}, got {name!r}")
    from sam2 import build_sam

    chosen = config or SAM2_SIZES[name]
    device = torch.empty(0).device  # upstream's own default is CUDA
    # Hiera reads numbers from its tensors while it is built, which has to be where there are some
    with torch.device("cpu" if device.type == "meta" else device) as place:
        net = build_sam.build_sam2(chosen.file, device=str(place), hydra_overrides_extra=list(chosen.overrides))
    return Sam2(name, net).to(device)


class Sam2(BaseModel):
    """See `BaseModel`.

    The whole square is image, because SAM 2 squashes. Hiera takes any S that is a multiple of `SIDE_MULTIPLE`: its
    background position embedding is interpolated, its window embedding is tiled (8 divides S / 4), and windows that do
    not fit are padded, as they are at 1024. Prompts keep their place: positions are relative to the square.

    A single mask comes from the token for single masks, unless that mask is unstable: then it is the best of the three
    (the "dynamic multimask via stability" of the sam2 package, its default; in training mode it is off).

    Attributes:
        net: SAM2Base of the sam2 package. After `load_official` without what only video needs.
    """

    def __init__(self, name: str, net: SAM2Base) -> None:
        super().__init__()
        self.name, self.mean, self.std, self.thresholds = name, MEAN, STD, THRESHOLDS
        self.net = net
        self.mask_decoder = net.sam_mask_decoder
        # sine encodings of the pyramid are for the memory attention alone, and their cache would hold 85 MB at 1024
        net.image_encoder.neck.position_encoding = nn.Identity()
        self.eval()

    def load_official(self, state: Mapping[str, Tensor]) -> None:
        """Load a published checkpoint and drop the parts for video; once for each object.

        Args:
            state: what lies under "model" in the file, with its keys.

        Raises:
            ValueError: a key is missing, unexpected or of another shape. The model is then as before.
        """
        load_exactly(self.net, state, self.name)
        for part in SAM2_VIDEO_PARTS:
            if hasattr(self.net, part):
                delattr(self.net, part)

    def content(self, size: tuple[int, int], side: int) -> tuple[int, int]:
        """The whole square, whatever the aspect of the image."""
        return side, side

    def encode(self, pixels: Tensor) -> Features:
        """Normalised pixels (B, 3, S, S) -> latent (B, 256, S / 16, S / 16), levels at S / 4 and S / 8.

        Raises:
            ValueError: the input is no square, or S no multiple of `SIDE_MULTIPLE`.
        """
        check_square(self.name, pixels)
        fine, middle, top = self.net.forward_image(pixels)["backbone_fpn"]
        latent = top + self.net.no_mem_embed.view(1, -1, 1, 1)  # upstream's mark of an image without a past
        # the pyramid sums its top levels in float32 whatever the precision of the weights
        return Features(latent.to(pixels.dtype), (fine, middle))

    def decode(self, features: Features, points: Tensor, labels: Tensor, several: bool) -> tuple[Tensor, Tensor]:
        """See `BaseModel.decode`. Boxes come as two points with labels 2 and 3, as upstream passes them on.

        Padding (label -1) is a token that the others attend to, as upstream: prompts of as many points as each other,
        without padding, get what upstream gives each alone. The token that upstream always appends is added here.
        """
        latent, prompts = features.latent, self.net.sam_prompt_encoder
        height, width = latent.shape[2:]
        trained = prompts.input_image_size[0] / (STRIDE * height)
        sparse, _ = prompts(points=((points + 0.5) * trained - 0.5, labels), boxes=None, masks=None)
        # both as upstream's prompt encoder makes them, for the size at hand instead of the one it was built for
        no_mask = prompts.no_mask_embed.weight.view(1, -1, 1, 1).expand(points.shape[0], -1, height, width)
        position = prompts.pe_layer((height, width))[None]
        logits, scores, _, _ = self.mask_decoder(
            image_embeddings=latent,
            image_pe=position.to(latent.dtype),
            sparse_prompt_embeddings=sparse.to(latent.dtype),
            dense_prompt_embeddings=no_mask,
            multimask_output=several,
            repeat_image=True,
            high_res_features=list(features.high),
        )
        return logits, scores

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Sam2:
        with exact_places(self.net.sam_prompt_encoder.pe_layer):
            super()._apply(fn, recurse)
        return self
