"""Files of tensors: written, read without running what is in them, put into a module without leaving a key behind."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from glesam_ros.whole_files import write_whole

NAMES_SHOWN = 8
"""Keys that an error lists before it counts the rest."""
LORA_SPELLINGS = {"lora.down": "lora_A", "lora.up": "lora_B", "lora_A": "lora_A", "lora_B": "lora_B"}
"""Ends of module names in diffusers' older and newer layout, and what peft calls them."""
WORN = 0.5
"""Share of its official length below which a layer counts as worn away: fine-tuning changes it by far less."""
SAM_PARTS = ("image_encoder", "prompt_encoder", "pixel_mean", "pixel_std")
"""What a state dict of SAM has beside its mask decoder."""
SAM2_VIDEO_PARTS = (
    "memory_attention", "memory_encoder", "mask_downsample", "maskmem_tpos_enc", "no_mem_pos_enc", "no_obj_ptr",
    "no_obj_embed_spatial", "obj_ptr_proj", "obj_ptr_tpos_proj",
)  # fmt: skip
"""Parts of SAM 2 that serve its memory of past frames; a single image needs none of them."""
SAM2_PARTS = ("image_encoder", "sam_prompt_encoder", "no_mem_embed", *SAM2_VIDEO_PARTS)
"""What a state dict of SAM 2 has beside its mask decoder."""
TRANSFORMERS_SAM = (
    # before `layers` of the encoder becomes `blocks`, as that of the decoder does not
    (r"^vision_encoder\.layers\.", "image_encoder.blocks."), (r"^vision_encoder\.", "image_encoder."),
    (r"patch_embed\.projection", "patch_embed.proj"),
    (r"neck\.conv1", "neck.0"), (r"neck\.layer_norm1", "neck.1"), (r"neck\.conv2", "neck.2"),
    (r"neck\.layer_norm2", "neck.3"),
    # one matrix, which files hold once or twice
    (
        r"^(prompt_encoder\.shared_embedding|shared_image_embedding)\.positional_embedding",
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
    ),
    (r"\.point_embed\.", ".point_embeddings."),
    (r"mask_embed\.conv1", "mask_downscaling.0"), (r"mask_embed\.layer_norm1", "mask_downscaling.1"),
    (r"mask_embed\.conv2", "mask_downscaling.3"), (r"mask_embed\.layer_norm2", "mask_downscaling.4"),
    (r"mask_embed\.conv3", "mask_downscaling.6"),
    (r"upscale_conv1", "output_upscaling.0"), (r"upscale_layer_norm", "output_upscaling.1"),
    (r"upscale_conv2", "output_upscaling.3"),
    (r"(output_hypernetworks_mlps\.\d+|iou_prediction_head)\.layers\.0", r"\1.layers.1"),
    (r"(output_hypernetworks_mlps\.\d+|iou_prediction_head)\.proj_in", r"\1.layers.0"),
    (r"(output_hypernetworks_mlps\.\d+|iou_prediction_head)\.proj_out", r"\1.layers.2"),
    (r"\.layer_norm", ".norm"),
)  # fmt: skip
"""What transformers' SamModel calls the parts of SAM, as patterns, and what segment-anything calls them."""
ADAPTER = "default"
"""Name of the adapter in peft's keys."""


def read_checkpoint(path: Path, *, mapped: bool = False) -> Any:
    """What a checkpoint of torch holds, its tensors on the CPU: containers, numbers, text and tensors.

    Read with `weights_only`: a pickle that would run code is refused before it does.

    Args:
        mapped: tensors are views of the file, which has to stay as it is while they live; for those that are copied at
            once. A file of torch before 1.6 is read all the same.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not such a file, cut short, or with code in it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"expected weights at {path}, found no file")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        # torch's own text advises to load it all the same
        if "global" in str(error).lower():
            raise ValueError(
                f"{path}: expected tensors only, found a pickle with other objects, which may run code; refused. Take "
                "the file from its official source, or convert it to safetensors where you trust it"
            ) from error
        raise ValueError(f"{path}: expected a checkpoint of torch, cannot read it: no such pickle") from error
    except Exception as error:  # torch raises half a dozen kinds for a broken file
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: expected a checkpoint of torch, cannot read it: {reason}") from error


def write_checkpoint(path: Path, content: dict[str, Any], *, is_shared: bool = True) -> None:
    """Write a checkpoint of torch, whole or not at all; the same content has the same bytes. Makes the folder.

    Args:
        is_shared: as of `write_whole`.

    Raises:
        OSError: the file cannot be written, as on a full disk.
    """

    def write(beside: Path) -> None:
        try:
            with beside.open("wb") as file:  # of a path torch writes the name, a random one, into the file
                torch.save(content, file)
        except (OSError, RuntimeError) as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            if cause is None:
                raise
            # torch's own text is of its archive alone, and what comes of closing a file names none
            raise OSError(cause.errno, cause.strerror, str(path)) from error

    write_whole(path, write, is_shared=is_shared)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors by key, on the CPU.

    A file of safetensors, by its name or by what is in it, or a checkpoint of torch: the state dict itself, or one that
    lies under "model" or "state_dict" (SAM 2, many trainers). Checkpoints are read with `weights_only`: a pickle that
    would run code is refused before it does.

    They are views of the file, which takes memory where it is read only; it has to stay as it is while they live.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not such a file, cut short, with code in it, or with something else than tensors.
    """
    if not path.is_file():
        raise FileNotFoundError(f"expected weights at {path}, found no file")
    if path.suffix == ".safetensors" or _holds_safetensors(path):
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: expected a safetensors file, cannot read it: {error}") from error
    state = read_checkpoint(path, mapped=True)
    for wrapper in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        odd = [str(k) for k, v in state.items() if not isinstance(v, Tensor)] if isinstance(state, dict) else []
        found = _listed(sorted(odd)) or type(state).__name__
        raise ValueError(f"{path}: expected a state dict of tensors, got {found}")
    return dict(state)


def _holds_safetensors(path: Path) -> bool:
    """Whether a file begins as one of safetensors, with eight bytes of length and an object of JSON."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def load_exactly(
    module: nn.Module, state: Mapping[str, Tensor], what: str, ignore: Sequence[str] = (), *, assign: bool = False
) -> None:
    """Put a state dict into a module where both have the same keys and shapes; else nothing changes.

    Args:
        what: what the state is of, for the error.
        ignore: beginnings of keys that may be missing or too many.
        assign: the tensors themselves take the place of the module's, with their type; else they are copied into those.

    Raises:
        ValueError: names every missing, unexpected or wrongly shaped key.
    """
    own = module.state_dict()

    def counts(key: str) -> bool:
        return not any(key.startswith(start) for start in ignore)

    missing = [key for key in own if key not in state and counts(key)]
    unexpected = [key for key in state if key not in own and counts(key)]
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own if key in state and state[key].shape != own[key].shape
    ]
    faults = [
        f"{name}: {_listed(keys)}"
        for name, keys in (("missing", missing), ("unexpected", unexpected), ("wrong shape", shapes)) if keys
    ]
    if faults:
        raise ValueError(f"{what}: expected the keys of {type(module).__name__}; {'; '.join(faults)}")
    module.load_state_dict({key: state[key] for key in own if key in state}, strict=False, assign=assign)


def lora_to_peft(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """LoRA keys of diffusers, "unet.<module>.lora.down.weight", in peft's layout, "<module>.lora_A.default.weight".

    Raises:
        ValueError: a key is of another kind.
    """
    found = {}
    for key, value in state.items():
        name = key.removeprefix("unet.").removesuffix(".weight").removesuffix(f".{ADAPTER}")
        spelling = next((end for end in LORA_SPELLINGS if name.endswith(f".{end}")), None)
        if spelling is None or not key.endswith(".weight"):
            raise ValueError(f"expected LoRA keys, <module>.lora.down.weight or <module>.lora.up.weight; got {key!r}")
        found[f"{name.removesuffix(spelling)}{LORA_SPELLINGS[spelling]}.{ADAPTER}.weight"] = value
    return found


def lora_to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `lora_to_peft`.

    Raises:
        ValueError: a key is not in peft's layout.
    """
    found = {}
    for key, value in state.items():
        for end, spelling in (("lora_A", "lora.down"), ("lora_B", "lora.up")):
            if key.endswith(f".{end}.{ADAPTER}.weight"):
                found[f"unet.{key.removesuffix(f'{end}.{ADAPTER}.weight')}{spelling}.weight"] = value
                break
        else:
            raise ValueError(f"expected peft keys, <module>.lora_A.{ADAPTER}.weight; got {key!r}")
    return found


def decoder_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The mask decoder's part of a state dict of SAM ("mask_decoder."), SAM 2 ("sam_mask_decoder.") or of itself.

    "module." in front of all, from training on several GPUs, is stripped: so is the released GleSAM decoder.

    Raises:
        ValueError: there is no mask decoder in it, or beside it what is no other part of that model.
    """
    bare = {key.removeprefix("module."): value for key, value in state.items()}
    for prefix, others in (("mask_decoder.", SAM_PARTS), ("sam_mask_decoder.", SAM2_PARTS)):
        part = {key.removeprefix(prefix): value for key, value in bare.items() if key.startswith(prefix)}
        if part:
            odd = [key for key in bare if key.split(".")[0] not in (prefix[:-1], *others)]
            if odd:
                raise ValueError(f"expected a mask decoder and {', '.join(others)}; unexpected: {_listed(sorted(odd))}")
            return part
    if not any(key.startswith("iou_prediction_head.") for key in bare):
        raise ValueError(f"expected the keys of a mask decoder, mask_decoder.*; got {_listed(sorted(bare))}")
    return bare


def with_all_masks(tuned: Mapping[str, Tensor], official: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[int]]:
    """A fine-tuned mask decoder with the layers of the second to fourth mask that fine-tuning wore away.

    The released stage 2 trains the first mask alone and lets an L2 term take the layers of the others to zero, while
    the frozen head goes on to rate them: a lone point and everything mode, which need them, would find empty masks.

    Args:
        tuned, official: mask decoders of one layout.

    Returns:
        `tuned`, with layers of `official` for the masks returned beside it, 1 to 3: those whose weights have less than
        `WORN` of the official ones' length.
    """
    state, worn = dict(tuned), []
    for mask in (1, 2, 3):
        own = [
            key for key, value in official.items()
            if key.startswith(f"output_hypernetworks_mlps.{mask}.") and key in tuned and tuned[key].shape == value.shape
        ]
        lengths = [float(sum(x[key].float().square().sum() for key in own)) ** 0.5 for x in (tuned, official)]
        if own and lengths[0] < WORN * lengths[1]:
            state.update({key: official[key] for key in own})
            worn.append(mask)
    return state, worn


def sam_from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of transformers' SamModel with the keys of segment-anything; any other one as it is.

    facebook/sam-vit-base and its siblings on the Hugging Face hub are published so.
    """
    if not any(key.startswith("vision_encoder.") for key in state):
        return dict(state)
    found = {}
    for key, value in state.items():
        for pattern, own in TRANSFORMERS_SAM:
            key = re.sub(pattern, own, key)
        found[key] = value
    return found


def _listed(keys: Sequence[str]) -> str:
    """Keys in words, the first few by name."""
    more = f" and {len(keys) - NAMES_SHOWN} more" if len(keys) > NAMES_SHOWN else ""
    return ", ".join(keys[:NAMES_SHOWN]) + more
