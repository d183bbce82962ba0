"""LoRA on the small networks."""

from __future__ import annotations

from typing import Any

from torch import nn

from glesam_ros.models.glesam.torchvision_ops import allow_import_without_operators


def add_adapters(module: nn.Module, layers: str, rank: int) -> Any:
    """LoRA in place; alpha is the rank, and the output is the same until the adapters learn.

    Args:
        module: what is adapted.
        layers: regular expression for the whole names of convolutions and linear layers in it.
        rank: of each adapter.

    Returns:
        peft's `LoraModel`; its `merge_and_unload()` makes each adapted layer W0 + B A again.
    """
    allow_import_without_operators()
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    return LoraModel(module, LoraConfig(r=rank, lora_alpha=rank, target_modules=layers), "adapters")
