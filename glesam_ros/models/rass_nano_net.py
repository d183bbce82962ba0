"""The network of rass-nano in torch: RASS in small. Used for training and export, never by the node.

RASS (IJCV 2026) restores pictures with adapters on a Stable Diffusion U-Net, merges them into its weights and decodes
classes from its features. Here EfficientNet-Lite0 takes the place of VAE and U-Net: adapters on its 1x1 convolutions
learn to restore the features of bad pictures and are merged (`glesam_ros.training.rass_nano`), and a small feature
pyramid takes the place of Mask2Former, so that all of it runs on two CPU cores.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glesam_ros.models.nano_net import Backbone, conv_bn

WIDTH = 96
"""Channels of the pyramid and of the class embeddings."""
STRIDES = (4, 8, 16, 32)
"""Levels of the backbone that are decoded."""
ADAPTED = r"_blocks\.\d+\.(_expand_conv|_project_conv)"
"""What gets adapters, of `Backbone`: the 1x1 convolutions, 96 % of its weights."""


class RassNano(nn.Module):
    """Image to class logits.

    Args:
        classes: K, how many.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.lateral = nn.ModuleList(nn.Conv2d(Backbone.channels[stride], WIDTH, 1) for stride in STRIDES)
        self.context = conv_bn(WIDTH, WIDTH)
        self.gate = nn.Conv2d(WIDTH, WIDTH, 1)
        self.smooth = nn.ModuleList(conv_bn(WIDTH, WIDTH) for _ in STRIDES[:-1])
        # its weight has an embedding a class: the part of the text tokens in the cross-attention of RASS
        self.classes = nn.Conv2d(WIDTH, classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 or float RGB in 0..255, H and W multiples of 32 -> logits (B, K, H / 4, W / 4)."""
        return self.decode(features_of(self.backbone, images))

    def decode(self, features: list[Tensor]) -> Tensor:
        """What `features_of` gives -> logits (B, K, H / 4, W / 4)."""
        x = self.context(self.lateral[3](features[3]))
        # what the whole picture shows (a street, a room) weighs the channels
        x = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        for k in (2, 1, 0):
            x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
            x = self.smooth[k](self.lateral[k](features[k]) + x)
        return self.classes(x)


def features_of(backbone: Backbone, images: Tensor) -> list[Tensor]:
    """Images as in `RassNano.forward` -> what a backbone makes of them at `STRIDES`: 24, 40, 112, 320 channels."""
    return backbone((images.permute(0, 3, 1, 2).float() - 127.0) / 128.0)[1:]
