"""SAM for single images: the modules of the segment_anything package at any square size, with fused attention.

Source: Segment Anything (Kirillov et al. 2023). Checkpoints: sam_vit_b_01ec64.pth, sam_vit_l_0b3195.pth,
sam_vit_h_4b8939.pth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glesam_ros.models.glesam.base import LOGIT_STRIDE, SIDE_MULTIPLE, STRIDE, BaseModel, Features
from glesam_ros.models.glesam.torchvision_ops import allow_import_without_operators
from glesam_ros.models.glesam.weights import load_exactly

if TYPE_CHECKING:
    from segment_anything.modeling import Sam as OfficialSam

MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)
NOT_A_POINT = -1
"""Label of a token that stands for no point: padding, and what upstream appends to points without a box."""
LABELS = (0, 1, 2, 3)
"""Outside, inside, top left corner, bottom right corner: the order of upstream's embeddings."""


@dataclass(frozen=True)
class SamConfig:
    """The image encoder of a SAM; all else is the same in every size.

    Attributes:
        width: channels of the transformer.
        depth: blocks.
        heads: of each attention.
        global_blocks: blocks that attend over the whole image, the others over windows of 14 x 14.
    """

    width: int
    depth: int
    heads: int
    global_blocks: tuple[int, ...]


SAM_SIZES: dict[str, SamConfig] = {
    "sam_vit_b": SamConfig(768, 12, 12, (2, 5, 8, 11)),
    "sam_vit_l": SamConfig(1024, 24, 16, (5, 11, 17, 23)),
    "sam_vit_h": SamConfig(1280, 32, 16, (7, 15, 23, 31)),
}
"""The published models with a plain vision transformer."""


def build_sam(name: str, config: SamConfig | None = None) -> Sam:
    """A SAM with random weights, in evaluation mode, on torch's default device.

    Args:
        name: one of `SAM_SIZES`, or any name if `config` is given.
        config: what to build instead of the published size, for example a narrow one for tests.

    Raises:
        ValueError: the name is unknown.
        ModuleNotFoundError: the segment_anything package is missing.
    """
    if config is None and name not in SAM_SIZES:
        raise ValueError(f"SAM model: expected one of {', '.join(SAM_SIZES)}, got {name!r}")
    chosen = config or SAM_SIZES[name]
    allow_import_without_operators()
    try:
        from segment_anything.build_sam import _build_sam
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{name} needs the segment_anything package ({error}): pip install segment-anything torchvision",
            name="segment_anything",
        ) from error
    net = _build_sam(
        encoder_embed_dim=chosen.width, encoder_depth=chosen.depth, encoder_num_heads=chosen.heads,
        encoder_global_attn_indexes=list(chosen.global_blocks),
    )
    return Sam(name, net)


class Sam(BaseModel):
    """See `BaseModel`.

    At other sides than 1024 the absolute position embedding is interpolated, relative positions of the global blocks
    are interpolated as upstream does, and windows stay as they are.

    Attributes:
        net: Sam of the segment_anything package; its attentions are replaced by `RelativeAttention` and
            `FusedAttention`, which keep the names of all weights.
    """

    def __init__(self, name: str, net: OfficialSam) -> None:
        super().__init__()
        self.name, self.mean, self.std = name, MEAN, STD
        self.net = net
        self.mask_decoder = net.mask_decoder
        fuse_attention(net)
        self.eval()

    def load_official(self, state: Mapping[str, Tensor]) -> None:
        """Load a published checkpoint.

        Args:
            state: the content of the file, with its keys.

        Raises:
            ValueError: a key is missing, unexpected or of another shape. The model is then as before.
        """
        load_exactly(self.net, dict(state), self.name)

    def content(self, size: tuple[int, int], side: int) -> tuple[int, int]:
        """The long side fills the square, the aspect is kept.

        Upstream rounds the short side to whole pixels; here it is rounded to a multiple of 4, so that the padding ends
        where a cell of the logits ends. That moves the far edge by at most 2 pixels of 1024.
        """
        scale = side / max(size)
        height, width = (
            min(side, max(LOGIT_STRIDE, round(length * scale / LOGIT_STRIDE) * LOGIT_STRIDE)) for length in size
        )
        return height, width

    def encode(self, pixels: Tensor) -> Features:
        """Normalised pixels (B, 3, S, S) -> latent (B, 256, S / 16, S / 16).

        Raises:
            ValueError: the input is no square, or S no multiple of `SIDE_MULTIPLE`.
        """
        height, width = pixels.shape[2:]
        if height != width or height % SIDE_MULTIPLE:
            raise ValueError(f"{self.name}: expected a square of {SIDE_MULTIPLE}k pixels, got {height}x{width}")
        encoder = self.net.image_encoder
        x = encoder.patch_embed(pixels)
        x = x + _resized_positions(encoder.pos_embed, x.shape[1])
        for block in encoder.blocks:
            x = block(x)
        return Features(encoder.neck(x.permute(0, 3, 1, 2)))

    def decode(self, features: Features, points: Tensor, labels: Tensor, several: bool) -> tuple[Tensor, Tensor]:
        """See `BaseModel.decode`.

        As in segment-anything's own export for other runtimes, labels are taken as they are: where no object of the
        batch has a box, `padded` appends the token that upstream appends.
        """
        latent = features.latent
        height, width = latent.shape[2:]
        prompts = self.net.prompt_encoder
        sparse = self._embed_prompts(points, labels, STRIDE * height).to(latent.dtype)
        # as upstream's prompt encoder makes them, for the size at hand instead of the one it was built for
        no_mask = prompts.no_mask_embed.weight.view(1, -1, 1, 1).expand(len(points), -1, height, width)
        logits, scores = self.mask_decoder(
            image_embeddings=latent,
            image_pe=prompts.pe_layer((height, width))[None].to(latent.dtype),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=no_mask,
            multimask_output=several,
        )
        return logits, scores

    def padded(self, points: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Append the "not a point" token, unless the prompts are boxes: as upstream's prompt encoder does."""
        if bool((labels >= 2).any()):
            return points, labels
        none = torch.full_like(labels[:, :1], NOT_A_POINT)
        return torch.cat([points, torch.zeros_like(points[:, :1])], 1), torch.cat([labels, none], 1)

    def _embed_prompts(self, points: Tensor, labels: Tensor, side: int) -> Tensor:
        """(K, N, 2) and (K, N) -> (K, N, 256) float32: upstream's embedding without indices that depend on values."""
        prompts = self.net.prompt_encoder
        place = prompts.pe_layer._pe_encoding((points.float() + 0.5) / side)
        kinds = labels[..., None]
        place = torch.where(kinds == NOT_A_POINT, prompts.not_a_point_embed.weight.float(), place)
        for kind in LABELS:
            place = place + (kinds == kind) * prompts.point_embeddings[kind].weight.float()
        return place

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Sam:
        """As in nn.Module, but positions of prompts stay float32: in half precision they would be off by pixels."""
        layer = self.net.prompt_encoder.pe_layer
        exact = layer.positional_encoding_gaussian_matrix
        super()._apply(fn, recurse)
        moved = layer.positional_encoding_gaussian_matrix
        layer.positional_encoding_gaussian_matrix = moved.float() if exact.is_meta else exact.to(moved.device)
        return self


def fuse_attention(net: OfficialSam) -> None:
    """Put fused attention into the image encoder and the mask decoder, in place; weights and their names stay."""
    from segment_anything.modeling.transformer import Attention

    for block in net.image_encoder.blocks:
        block.attn = RelativeAttention(block.attn)
    for module in list(net.mask_decoder.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Attention):
                setattr(module, name, FusedAttention(child))


class RelativeAttention(nn.Module):
    """Attention of SAM's image encoder with its decomposed relative positions, in one fused operator.

    Upstream adds q . Rh[row distance] + q . Rw[column distance] to each of (h w) x (h w) products, which takes 0.8 GB a
    block in float32 for 12 heads at 1024 pixels. The sum is itself an inner product: of the query with both terms for
    every row and column behind it, and the key with a one for its own row and its own column. So the fused operator
    does it with h + w channels more, and the matrix is never made.
    """

    def __init__(self, official: nn.Module) -> None:
        super().__init__()
        self.num_heads, self.scale = official.num_heads, official.scale
        self.qkv, self.proj = official.qkv, official.proj
        self.rel_pos_h, self.rel_pos_w = official.rel_pos_h, official.rel_pos_w
        self.scale: float
        self.num_heads: int

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, w, C) -> (B, h, w, C)."""
        b, h, w, c = x.shape
        heads, head = self.num_heads, c // self.num_heads
        q, k, v = self.qkv(x).reshape(b, h * w, 3, heads, head).permute(2, 0, 3, 1, 4).unbind(0)
        grid = q.reshape(b, heads, h, w, head)
        rows = torch.einsum("bnhwc,hkc->bnhwk", grid, _distances(self.rel_pos_h, h))
        columns = torch.einsum("bnhwc,wkc->bnhwk", grid, _distances(self.rel_pos_w, w))
        here = torch.arange(h * w, device=x.device)
        own_row = (here[:, None] // w == torch.arange(h, device=x.device)).to(q.dtype)
        own_column = (here[:, None] % w == torch.arange(w, device=x.device)).to(q.dtype)
        own = torch.cat([own_row, own_column], 1).expand(b, heads, -1, -1)
        q = torch.cat([q * self.scale, rows.flatten(2, 3), columns.flatten(2, 3)], 3)
        k = torch.cat([k, own], 3)
        # channels of v that are zero: the fused operators want three inputs of one width
        y = F.scaled_dot_product_attention(q, k, F.pad(v, (0, h + w)), scale=1.0)[..., :head]
        return self.proj(y.transpose(1, 2).reshape(b, h, w, c))


class FusedAttention(nn.Module):
    """Attention of SAM's mask decoder in one fused operator."""

    def __init__(self, official: nn.Module) -> None:
        super().__init__()
        self.num_heads = official.num_heads
        self.q_proj, self.k_proj, self.v_proj = official.q_proj, official.k_proj, official.v_proj
        self.out_proj = official.out_proj
        self.num_heads: int

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, Nq, C), (B, Nk, C), (B, Nk, C) -> (B, Nq, C)."""
        q, k, v = (
            layer(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for layer, x in ((self.q_proj, q), (self.k_proj, k), (self.v_proj, v))
        )
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def _distances(positions: Tensor, size: int) -> Tensor:
    """Relative positions (L, C) -> (size, size, C) of each pair; interpolated where L is of another size."""
    length = 2 * size - 1
    if len(positions) != length:
        positions = F.interpolate(positions.T[None], size=length, mode="linear")[0].T
    here = torch.arange(size, device=positions.device)
    return positions[here[:, None] - here + size - 1]


def _resized_positions(positions: Tensor, side: int) -> Tensor:
    """Absolute positions (1, 64, 64, C) for a grid of `side` x `side`."""
    if positions.shape[1] == side:
        return positions
    fine = F.interpolate(positions.permute(0, 3, 1, 2).float(), (side, side), mode="bicubic", align_corners=False)
    return fine.permute(0, 2, 3, 1).to(positions.dtype)
