"""A Stable Diffusion of tiny width with random weights, in diffusers' folders, to try the recipe of RASS out."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch

from glesam_ros.models.glesam.enhancer import TOKENS, write_tensors
from glesam_ros.models.glesam.torchvision_ops import allow_import_without_operators
from glesam_ros.training.full_networks import RANDOM_UNET

RANDOM_SD_UNET: dict[str, Any] = {
    **RANDOM_UNET,
    "down_block_types": ("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
}
"""Where the U-Net differs from diffusers' defaults: few attentions, some of those that the constraint of SCR reads."""
RANDOM_VAE: dict[str, Any] = {
    "block_out_channels": (16, 32, 32, 32), "layers_per_block": 1, "norm_num_groups": 8, "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}
"""Where the autoencoder differs from diffusers' defaults."""
START, END, PAD = "<|startoftext|>", "<|endoftext|>", "!"
"""Special tokens of CLIP; SD 2 pads with the last."""


def write_random_sd(folder: Path, seed: int) -> Path:
    """Write {unet,vae,text_encoder,tokenizer}; a folder that is complete is left as it is.

    Returns:
        `folder`.
    """
    last = folder / "tokenizer" / "special_tokens_map.json"
    if last.is_file():
        return folder
    allow_import_without_operators()
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    networks: dict[str, Any] = {"unet": UNet2DConditionModel(**RANDOM_SD_UNET), "vae": AutoencoderKL(**RANDOM_VAE)}
    for name, network in networks.items():
        network.save_pretrained(folder / name)
    # a token a letter: within a word, and at its end
    letters = [PAD, *string.ascii_lowercase, *string.digits]
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), START, END]
    text = CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=RANDOM_UNET["cross_attention_dim"], intermediate_size=32,
        num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=TOKENS,
        bos_token_id=vocabulary.index(START), eos_token_id=vocabulary.index(END), pad_token_id=vocabulary.index(PAD),
    )
    text.save_pretrained(folder / "text_encoder")
    write_tensors(CLIPTextModel(text).state_dict(), folder / "text_encoder" / "model.safetensors")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": PAD}
    files = {
        "vocab.json": json.dumps({token: number for number, token in enumerate(vocabulary)}),
        "merges.txt": "#version: 0.2\n",
        "tokenizer_config.json": json.dumps(
            {"tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS, **special}
        ),
        last.name: json.dumps(special),
    }
    last.parent.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (last.parent / name).write_text(content, encoding="utf-8")
    return folder
