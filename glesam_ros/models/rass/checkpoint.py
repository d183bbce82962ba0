"""The released RASS checkpoint: detectron2's names of its weights, and what they are in `RassNetwork`.

The file is what detectron2 writes: a dict with the state of the whole model under "model". Its keys, from the released
code (backbone, projections, adapters) and from Mask2Former (head):

    backbone.feature_extractor.feature_projections.<i>.0.*   projections.<i>.*
    backbone.feature_extractor.sd.unet.*                     unet.*
    backbone.feature_extractor.sd.{vae,text_encoder}.*       frozen, as in Stable Diffusion: not read
    backbone.feature_extractor.{ram,dape}.*                  taggers, which we do without: not read
    sem_seg_head.pixel_decoder.*                             head.pixel_decoder.*
    sem_seg_head.predictor.*                                 head.transformer_module.*, head.class_predictor.*

The weights are the same numbers in the same order but for self-attention, whose one matrix of queries, keys and values
becomes three.

The file itself was not at hand. What is verified is this mapping, on checkpoints that the tests make by detectron2's
naming; not that the released file has these keys and no others (others are refused by name), nor its accuracy.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

UNET = "backbone.feature_extractor.sd.unet."
"""Before the keys of the U-Net."""
NOT_READ = (
    "backbone.feature_extractor.sd.vae.", "backbone.feature_extractor.sd.text_encoder.",
    "backbone.feature_extractor.ram.", "backbone.feature_extractor.dape.", "backbone.jpeger.", "criterion.",
    "pixel_mean", "pixel_std",
)
"""Beginnings of keys of what is frozen, or used in training alone."""

_PIXEL, _PREDICTOR = r"sem_seg_head\.pixel_decoder\.", r"sem_seg_head\.predictor\."
_DECODER = "head.transformer_module.decoder"
_LAYER = rf"{_DECODER}.layers.\1"
_END = r"(weight|bias)$"
_RULES: tuple[tuple[str, str], ...] = (
    (r"backbone\.feature_extractor\.feature_projections\.(\d+)\.0\.", r"projections.\1."),
    (rf"{_PIXEL}input_proj\.", "head.pixel_decoder.input_projections."),
    (rf"{_PIXEL}transformer\.level_embed$", "head.pixel_decoder.level_embed"),
    (rf"{_PIXEL}(adapter|layer)_(\d+)\.norm\.", r"head.pixel_decoder.\1_\2.1."),
    (rf"{_PIXEL}(adapter|layer)_(\d+)\.weight$", r"head.pixel_decoder.\1_\2.0.weight"),
    (rf"{_PIXEL}mask_features\.", "head.pixel_decoder.mask_projection."),
    (rf"{_PIXEL}transformer\.encoder\.layers\.(\d+)\.self_attn\.", r"head.pixel_decoder.encoder.layers.\1.self_attn."),
    *(
        (rf"{_PIXEL}transformer\.encoder\.layers\.(\d+)\.{old}\.", rf"head.pixel_decoder.encoder.layers.\1.{new}.")
        for old, new in (
            ("linear1", "fc1"), ("linear2", "fc2"), ("norm1", "self_attn_layer_norm"), ("norm2", "final_layer_norm"),
        )
    ),
    (rf"{_PREDICTOR}transformer_self_attention_layers\.(\d+)\.self_attn\.out_proj\.", rf"{_LAYER}.self_attn.out_proj."),
    (rf"{_PREDICTOR}transformer_self_attention_layers\.(\d+)\.norm\.", rf"{_LAYER}.self_attn_layer_norm."),
    (rf"{_PREDICTOR}transformer_cross_attention_layers\.(\d+)\.multihead_attn\.", rf"{_LAYER}.cross_attn."),
    (rf"{_PREDICTOR}transformer_cross_attention_layers\.(\d+)\.norm\.", rf"{_LAYER}.cross_attn_layer_norm."),
    (rf"{_PREDICTOR}transformer_ffn_layers\.(\d+)\.linear([12])\.", rf"{_LAYER}.fc\2."),
    (rf"{_PREDICTOR}transformer_ffn_layers\.(\d+)\.norm\.", rf"{_LAYER}.final_layer_norm."),
    (rf"{_PREDICTOR}decoder_norm\.", f"{_DECODER}.layernorm."),
    (rf"{_PREDICTOR}mask_embed\.layers\.(\d+)\.{_END}", rf"{_DECODER}.mask_predictor.mask_embedder.\1.0.\2"),
    (rf"{_PREDICTOR}query_feat\.", "head.transformer_module.queries_features."),
    (rf"{_PREDICTOR}query_embed\.", "head.transformer_module.queries_embedder."),
    (rf"{_PREDICTOR}level_embed\.", "head.transformer_module.level_embed."),
    (rf"{_PREDICTOR}class_embed\.", "head.class_predictor."),
)
_IN_PROJ = re.compile(rf"{_PREDICTOR}transformer_self_attention_layers\.(\d+)\.self_attn\.in_proj_{_END}")


def is_released(state: Mapping[str, Any]) -> bool:
    """Whether a state dict has detectron2's names of RASS."""
    return any(key.startswith("sem_seg_head.predictor.") for key in state)


def from_released(state: Mapping[str, Tensor], own: Collection[str]) -> dict[str, Tensor]:
    """A released state dict in the names of `RassNetwork`, without what is not read.

    Args:
        own: keys of the network with its adapters. An adapted layer has its weight as "conv1.base_layer.weight", which
            older versions of peft call "conv1.weight"; either is taken.

    Raises:
        ValueError: a key that is not known; names up to eight.
    """
    found: dict[str, Tensor] = {}
    unknown = []
    for key, value in state.items():
        if key.startswith(NOT_READ):
            continue
        if match := _IN_PROJ.match(key):
            for name, part in zip("qkv", value.chunk(3)):
                found[f"{_DECODER}.layers.{match[1]}.self_attn.{name}_proj.{match[2]}"] = part
        elif key.startswith(UNET):
            name = f"unet.{key.removeprefix(UNET)}"
            module, _, end = name.rpartition(".")
            found[name if name in own else f"{module}.base_layer.{end}"] = value
        elif (new := _renamed(key)) is not None:
            found[new] = value
        else:
            unknown.append(key)
    unknown += [key for key in found if key not in own]
    if unknown:
        raise ValueError(
            f"expected the keys of a released RASS checkpoint, got {len(unknown)} others: {', '.join(unknown[:8])}"
        )
    return found


def released_sizes(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Fields of `RassConfig` that the shapes of a released state dict tell, and "classes", their number.

    Raises:
        ValueError: a key that they are read from is missing.
    """
    head = "sem_seg_head.predictor."
    keys = {
        "class": f"{head}class_embed.bias", "query": f"{head}query_feat.weight",
        "ffn": f"{head}transformer_ffn_layers.0.linear1.weight",
        "projection": "backbone.feature_extractor.feature_projections.0.0.conv3.weight",
    }
    lora = next((key for key in state if key.startswith(UNET) and ".lora_A." in key), f"{UNET}*.lora_A.*")
    if missing := [key for key in (*keys.values(), lora) if key not in state]:
        raise ValueError(f"expected a released RASS checkpoint, missing: {', '.join(missing)}")
    shapes = {name: state[key].shape for name, key in keys.items()}
    return {
        "classes": shapes["class"][0] - 1, "rank": state[lora].shape[0], "projection": shapes["projection"][0],
        "width": shapes["query"][1], "queries": shapes["query"][0], "feedforward": shapes["ffn"][0],
        "layers": 1 + _count(state, rf"{_PREDICTOR}transformer_ffn_layers\.(\d+)\."),
        "pixel_layers": _count(state, rf"{_PIXEL}transformer\.encoder\.layers\.(\d+)\."),
    }


def _renamed(key: str) -> str | None:
    """A key of projections or head by the rules; None where none fits."""
    for pattern, template in _RULES:
        new, fits = re.subn(f"^{pattern}", template, key)
        if fits:
            return new
    return None


def _count(state: Mapping[str, Any], pattern: str) -> int:
    return len({match[1] for key in state if (match := re.match(pattern, key))})
