"""SAM and MobileSAM: the modules of the segment-anything package at any square size, with fast attention.

Read top to bottom: sizes, the model (`Sam`), attention in the image encoder, attention in the mask decoder.

Official checkpoints: sam_vit_b_01ec64.pth, sam_vit_l_0b3195.pth, sam_vit_h_4b8939.pth; mobile_sam.pt.

Source: Segment Anything (arXiv 2304.02643); MobileSAM (arXiv 2306.14289).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glesam_ros.models.glesam.base import (
    LATENT_CHANNELS,
    LOGIT_STRIDE,
    SIDE,
    STRIDE,
    BaseModel,
    Features,
    check_square,
    exact_places,
)
from glesam_ros.models.glesam.mobile_sam import CLASSIFIER, TinyVit, TinyVitConfig
from glesam_ros.models.glesam.torchvision_ops import allow_import_without_operators
from glesam_ros.models.glesam.weights import load_exactly, sam_from_transformers

if TYPE_CHECKING:
    from segment_anything.modeling import Sam as OfficialSam

MEAN = (123.675, 116.28, 103.53)
"""Of the input, for 0..255."""
STD = (58.395, 57.12, 57.375)
THRESHOLDS = (0.88, 0.95)
"""Least score and stability of upstream's automatic masks."""
WINDOW = 14
"""Side of the attention windows in cells of the latent."""
BOX_CORNER = 2
"""Labels from here on are corners of a box."""
OWN_TOKENS = 5
"""Tokens of the mask decoder before those of the prompt: predicted IoU, single mask, three masks."""


@dataclass(frozen=True)
class SamConfig:
    """The image encoder of SAM, a vision transformer at stride 16; the rest is the same in all sizes.

    Attributes:
        width: channels.
        depth: blocks.
        heads: of attention.
        global_blocks: blocks that attend to the whole image; the others to windows of 14 x 14 cells.
    """

    width: int
    depth: int
    heads: int
    global_blocks: tuple[int, ...]


SAM_SIZES: dict[str, SamConfig | TinyVitConfig] = {
    "sam_vit_b": SamConfig(768, 12, 12, (2, 5, 8, 11)),
    "sam_vit_l": SamConfig(1024, 24, 16, (5, 11, 17, 23)),
    "sam_vit_h": SamConfig(1280, 32, 16, (7, 15, 23, 31)),
    "mobile_sam": TinyVitConfig(),
}
"""The published models."""


def build_sam(name: str, config: SamConfig | TinyVitConfig | None = None) -> Sam:
    """A SAM with random weights and fast attention, in evaluation mode, on torch's default device.

    Args:
        name: one of `SAM_SIZES`, or any name if `config` is given.
        config: what to build instead of the published size, for example a narrow one for tests.

    Raises:
        ValueError: the name is unknown.
        ModuleNotFoundError: the segment_anything package, or torchvision, which it needs, is missing.
    """
    if config is None and name not in SAM_SIZES:
        raise ValueError(f"SAM model: expected one of {', '.join(SAM_SIZES)}, got {name!r}")
    allow_import_without_operators()
    from segment_anything import modeling as official

    chosen = config or SAM_SIZES[name]
    cells = SIDE // STRIDE
    encoder = TinyVit(chosen) if isinstance(chosen, TinyVitConfig) else official.ImageEncoderViT(
        img_size=SIDE, patch_size=STRIDE, embed_dim=chosen.width, depth=chosen.depth, num_heads=chosen.heads,
        global_attn_indexes=chosen.global_blocks, window_size=WINDOW, out_chans=LATENT_CHANNELS, use_rel_pos=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )  # fmt: skip
    prompts = official.PromptEncoder(
        embed_dim=LATENT_CHANNELS, image_embedding_size=(cells, cells), input_image_size=(SIDE, SIDE), mask_in_chans=16
    )
    transformer = official.TwoWayTransformer(depth=2, embedding_dim=LATENT_CHANNELS, mlp_dim=2048, num_heads=8)
    decoder = official.MaskDecoder(transformer_dim=LATENT_CHANNELS, transformer=transformer)
    sam = Sam(name, official.Sam(encoder, prompts, decoder))
    use_fast_attention(sam)
    return sam


class Sam(BaseModel):
    """See `BaseModel`.

    Any S that is a multiple of `SIDE_MULTIPLE`: the absolute position embedding is interpolated (bicubic), so are the
    relative positions of blocks that attend to the whole image (linear, as in segment-anything); windows stay 14 x 14
    and are padded where they do not fit, as they are at 1024. MobileSAM has nothing to interpolate.

    Attributes:
        net: Sam of the segment-anything package, with `TinyVit` as `image_encoder` where it is MobileSAM.
    """

    def __init__(self, name: str, net: OfficialSam) -> None:
        super().__init__()
        self.name, self.mean, self.std, self.thresholds = name, MEAN, STD, THRESHOLDS
        self.net = net
        self.mask_decoder = net.mask_decoder
        self.eval()

    def load_official(self, state: Mapping[str, Tensor]) -> None:
        """Load a published checkpoint.

        Args:
            state: what is in the file, with its keys; those of transformers' SamModel are known, too. The ImageNet
                classifier in MobileSAM's is left out.

        Raises:
            ValueError: a key is missing, unexpected or of another shape. The model is then as before.
        """
        mobile = isinstance(self.net.image_encoder, TinyVit)
        unused = [f"image_encoder.{start}" for start in CLASSIFIER] if mobile else []
        load_exactly(self.net, sam_from_transformers(state), self.name, ignore=unused)

    def content(self, size: tuple[int, int], side: int) -> tuple[int, int]:
        """The image with its aspect, its long side as long as the square.

        segment-anything rounds the short side to a whole pixel; here it is the nearest multiple of `LOGIT_STRIDE`, at
        least one, so that logits are cut without a rest: 2 px apart at most, where the side is not below 4. Points are
        scaled by axis, so they stay on what they point at.
        """
        long = max(size)
        height, width = (max(1, round(length * side / long / LOGIT_STRIDE)) * LOGIT_STRIDE for length in size)
        return height, width

    def encode(self, pixels: Tensor) -> Features:
        """Normalised pixels (B, 3, S, S) -> latent (B, 256, S / 16, S / 16).

        Raises:
            ValueError: the input is no square, or S no multiple of `SIDE_MULTIPLE`.
        """
        check_square(self.name, pixels)
        encoder = self.net.image_encoder
        if isinstance(encoder, TinyVit):
            return Features(encoder(pixels))
        x = encoder.patch_embed(pixels)
        x = x + _resized_positions(encoder.pos_embed, x.shape[1])
        for block in encoder.blocks:
            x = block(x)
        return Features(encoder.neck(x.permute(0, 3, 1, 2)))

    def decode(self, features: Features, points: Tensor, labels: Tensor, several: bool) -> tuple[Tensor, Tensor]:
        """See `BaseModel.decode`.

        Each prompt gets the masks that segment-anything gives it alone, whatever else is in the batch: nothing attends
        to padding (label -1), except for the one token that segment-anything itself adds where a prompt has no box.

        SAM's predicted IoU is a regression without a bound, now and then a little above 1. It comes as it is, because
        everything mode ranks by it.
        """
        latent, decoder = features.latent, self.net.mask_decoder
        height, width = latent.shape[2:]
        prompts = self.net.prompt_encoder
        # both as upstream's prompt encoder makes them, for the size at hand instead of the one it was built for
        source = latent + prompts.no_mask_embed.weight.view(1, -1, 1, 1)
        position = prompts.pe_layer((height, width))[None].to(latent.dtype)
        tokens, hidden = self._tokens(points, labels, STRIDE * height, latent.dtype)
        queries, keys = two_way(
            decoder.transformer, source.flatten(2).transpose(1, 2), position.flatten(2).transpose(1, 2), tokens, hidden
        )
        fine = decoder.output_upscaling(keys.transpose(1, 2).unflatten(2, (height, width)))
        chosen = range(1, 4) if several else range(1)
        kernels = torch.stack([decoder.output_hypernetworks_mlps[k](queries[:, 1 + k]) for k in chosen], 1)
        logits = (kernels @ fine.flatten(2)).unflatten(2, fine.shape[2:])
        return logits, decoder.iou_prediction_head(queries[:, 0])[:, chosen.start : chosen.stop]

    def _tokens(self, points: Tensor, labels: Tensor, side: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Tokens (K, 5 + N + 1, 256), the last one what is added to prompts without a box; bias of attention to them.

        The bias (K, 1, 1, 5 + N + 1) is 0, or minus infinity where a prompt does not have that token. No shape depends
        on a label, so that a CUDA graph and an exported graph can follow.
        """
        prompts, decoder = self.net.prompt_encoder, self.net.mask_decoder
        boxless = (labels < BOX_CORNER).all(1, keepdim=True)
        points, labels = F.pad(points, (0, 0, 0, 1)), F.pad(labels, (0, 1), value=-1.0)
        place = prompts.pe_layer.forward_with_coords(points + 0.5, (side, side))
        kinds = torch.cat([prompts.not_a_point_embed.weight, *(kind.weight for kind in prompts.point_embeddings)])
        sparse = torch.where(labels[..., None] < 0, 0.0, place).to(dtype) + F.embedding(labels.long() + 1, kinds)
        own = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight]).expand(points.shape[0], -1, -1)
        used = torch.cat([labels[:, :-1] >= 0, boxless], 1)
        bias = torch.zeros(used.shape, dtype=dtype, device=used.device).masked_fill(~used, -torch.inf)
        return torch.cat([own, sparse], 1), F.pad(bias, (OWN_TOKENS, 0))[:, None, None]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Sam:
        with exact_places(self.net.prompt_encoder.pe_layer):
            super()._apply(fn, recurse)
        return self


def use_fast_attention(sam: Sam) -> None:
    """Replace the attention of SAM's image encoder by `EncoderAttention`, with the same parameters under the same keys.

    MobileSAM's encoder and the mask decoder need no replacement: they have fast attention anyway.
    """
    if not isinstance(sam.net.image_encoder, TinyVit):
        for block in sam.net.image_encoder.blocks:
            block.attn = EncoderAttention(block.attn)


class EncoderAttention(nn.Module):
    """Attention with decomposed relative positions, in one fused operator.

    segment-anything adds q . Rh[row distance] + q . Rw[column distance] to each of (h w) x (h w) products, and stores
    that matrix several times: 0.8 GB each in a block of 12 heads at 1024 px, in float32. The sum is itself one inner
    product: of the query with both terms for every row and every column behind it, and of the key with a one at its own
    row and at its own column. So the operator gets h + w channels more, and no matrix is made.

    Args:
        layer: the attention of segment-anything whose parameters are taken over.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.heads, self.scale = layer.num_heads, layer.scale
        self.qkv, self.proj = layer.qkv, layer.proj
        self.rel_pos_h, self.rel_pos_w = layer.rel_pos_h, layer.rel_pos_w

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, w, C) -> (B, h, w, C)."""
        batch, height, width, _ = x.shape
        qkv = self.qkv(x).reshape(batch, height * width, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        cells = q.unflatten(2, (height, width))
        rows = torch.einsum("bnhwc,hkc->bnhwk", cells, _distances(self.rel_pos_h, height))
        columns = torch.einsum("bnhwc,wkc->bnhwk", cells, _distances(self.rel_pos_w, width))
        q = torch.cat([q * self.scale, rows.flatten(2, 3), columns.flatten(2, 3)], 3)
        own_row = torch.eye(height, dtype=x.dtype, device=x.device)[:, None].expand(-1, width, -1)
        own_column = torch.eye(width, dtype=x.dtype, device=x.device)[None].expand(height, -1, -1)
        own = torch.cat([own_row, own_column], 2).flatten(0, 1)
        k = torch.cat([k, own.expand(batch, self.heads, -1, -1)], 3)
        # zeros behind v: the fused kernels want three inputs of one width
        mixed = F.scaled_dot_product_attention(q, k, F.pad(v, (0, height + width)), scale=1.0)[..., : v.shape[3]]
        return self.proj(mixed.transpose(1, 2).reshape(x.shape))


def _distances(table: Tensor, size: int) -> Tensor:
    """(2 n - 1, c) embeddings of the distances -(n - 1) .. n - 1 -> (size, size, c), for each query and key."""
    if len(table) != 2 * size - 1:
        table = F.interpolate(table.T[None], 2 * size - 1, mode="linear")[0].T
    at = torch.arange(size, device=table.device)
    return table[at[:, None] - at + size - 1]


def _resized_positions(table: Tensor, size: int) -> Tensor:
    """Absolute positions (1, n, n, C) for another grid, (1, size, size, C)."""
    if table.shape[1] == size:
        return table
    grid = F.interpolate(table.permute(0, 3, 1, 2).float(), (size, size), mode="bicubic", align_corners=False)
    return grid.permute(0, 2, 3, 1).to(table.dtype)


def two_way(
    transformer: Any, image: Tensor, position: Tensor, tokens: Tensor, hidden: Tensor
) -> tuple[Tensor, Tensor]:
    """SAM's two-way transformer for K prompts of one image, with hidden tokens.

    The image is the same for all prompts until they first write into it, so until then it is projected once.

    Args:
        transformer: TwoWayTransformer of segment-anything.
        image: (1, h * w, C), without its positions.
        position: (1, h * w, C).
        tokens: (K, T, C); at the same time their own positions.
        hidden: (K, 1, 1, T), added to the attention to a token: 0 or minus infinity.

    Returns:
        Tokens (K, T, C) and image (K, h * w, C).
    """
    count = tokens.shape[0]
    queries, keys = tokens, image
    for layer in transformer.layers:
        if layer.skip_first_layer_pe:
            queries = layer.norm1(_attend(layer.self_attn, queries, queries, queries, count, hidden))
        else:
            placed = queries + tokens
            queries = layer.norm1(queries + _attend(layer.self_attn, placed, placed, queries, count, hidden))
        seen = _attend(layer.cross_attn_token_to_image, queries + tokens, keys + position, keys, count)
        queries = layer.norm2(queries + seen)
        queries = layer.norm3(queries + layer.mlp(queries))
        told = _attend(layer.cross_attn_image_to_token, keys + position, queries + tokens, queries, count, hidden)
        keys = layer.norm4(keys + told)
    seen = _attend(transformer.final_attn_token_to_image, queries + tokens, keys + position, keys, count)
    return transformer.norm_final_attn(queries + seen), keys


def _attend(layer: Any, q: Tensor, k: Tensor, v: Tensor, count: int, hidden: Tensor | None = None) -> Tensor:
    """A layer of the mask decoder's attention for `count` prompts; inputs (count, n, C), or (1, n, C) for them all."""
    q, k, v = (
        project(x).unflatten(2, (layer.num_heads, -1)).transpose(1, 2).expand(count, -1, -1, -1)
        for project, x in ((layer.q_proj, q), (layer.k_proj, k), (layer.v_proj, v))
    )
    return layer.out_proj(F.scaled_dot_product_attention(q, k, v, attn_mask=hidden).transpose(1, 2).flatten(2))
