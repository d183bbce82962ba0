"""A Stable Diffusion of tiny width in the folders of diffusers, and an SCR checkpoint for it, for tests."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch

UNET: dict[str, Any] = {
    "sample_size": 64, "block_out_channels": (8, 16, 32, 32), "layers_per_block": 1, "norm_num_groups": 4,
    "attention_head_dim": (1, 2, 4, 4), "cross_attention_dim": 12, "use_linear_projection": True,
}
"""Where the tiny U-Net differs from diffusers' defaults; its four blocks are of SD 2.1's kinds."""
VAE: dict[str, Any] = {
    "block_out_channels": (4, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4, "sample_size": 64,
}
WORDS = ("road", "car")
"""Words of the tokenizer that are one token; any other is a token a letter."""
START, END, PAD = "<|startoftext|>", "<|endoftext|>", "!"


def tiny_unet(seed: int = 0, **other: Any) -> Any:
    """A U-Net as it comes from its constructor, float32."""
    from glesam_ros.models.glesam.torchvision_ops import allow_import_without_operators

    allow_import_without_operators()
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    return UNet2DConditionModel(**{**UNET, **other}).eval()


def tiny_vae(seed: int = 0) -> Any:
    """An autoencoder with latents of 4 channels at an eighth of the side, float32."""
    from glesam_ros.models.glesam.torchvision_ops import allow_import_without_operators

    allow_import_without_operators()
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    return AutoencoderKL(**VAE).eval()


def write_tiny_sd(folder: Path, seed: int = 0) -> Path:
    """Write {unet,vae,text_encoder,tokenizer} as Stable Diffusion publishes them; returns `folder`."""
    tiny_unet(seed).save_pretrained(folder / "unet")
    tiny_vae(seed).save_pretrained(folder / "vae")
    write_text(folder, seed)
    return folder


def write_text(folder: Path, seed: int = 0) -> None:
    """Write {text_encoder,tokenizer}: letters, the two `WORDS`, and SD 2's padding "!"."""
    from transformers import CLIPTextConfig, CLIPTextModel

    letters = ["!", *string.ascii_lowercase]
    merges, pieces = [], []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merges.append(f"{parts[0]} {parts[1]}")
            parts = [parts[0] + parts[1], *parts[2:]]
            pieces.append(parts[0])
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), *pieces, START, END]
    torch.manual_seed(seed)
    text = CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=UNET["cross_attention_dim"], intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=77, bos_token_id=len(vocabulary) - 2,
        eos_token_id=len(vocabulary) - 1, pad_token_id=0,
    )
    CLIPTextModel(text).save_pretrained(folder / "text_encoder")
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir(parents=True)
    (tokenizer / "vocab.json").write_text(json.dumps({word: k for k, word in enumerate(vocabulary)}))
    (tokenizer / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": PAD}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **special}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings))
    (tokenizer / "special_tokens_map.json").write_text(json.dumps(special))


def write_tiny_scr(path: Path, rank: int = 4, seed: int = 1, trained: bool = True) -> Path:
    """Write an SCR checkpoint for `tiny_unet`: the layout of scr.pkl; returns `path`.

    Args:
        trained: random matrices everywhere; False leaves LoRA as it begins, without effect.
    """
    from glesam_ros.models.rass.scr import add_scr, scr_weights, write_scr

    unet = tiny_unet()
    add_scr(unet, rank)
    if trained:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in unet.named_parameters():
                if ".lora_" in name or name.startswith("conv_in."):
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    write_scr(scr_weights(unet), path)
    return path
