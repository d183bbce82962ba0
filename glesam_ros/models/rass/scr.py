"""SCR, semantic-constrained restoration: one step of Stable Diffusion 2.1-base makes a clear picture of a bad one.

Read top to bottom: LoRA in three groups and its file (`lora_groups`, `add_scr`, `read_scr`, `write_scr`, `merge_scr`),
the text (`tokenise`, `ClassPrompts`), the network (`Scr`), pictures of any size (`ScrRestorer`), `load_scr`.

    picture ─► VAE encoder ─► z_L ─► U-Net at T, told the class names ─► eps ─► z_hat ─► VAE decoder ─► picture

    z_hat = (z_L - sqrt(1 - abar_T) eps(z_L, T, text)) / sqrt(abar_T)

The latent of the bad picture takes the place of a noisy one, no noise is added. VAE, U-Net and text encoder are frozen;
LoRA of the U-Net and its first convolution are trained, by `glesam_ros.training.semantic_constraint`'s losses.

Our reading where the paper's details are not public:

- T = 1. OSEDiff, from which SCR descends, takes 999. RASS runs the U-Net with SCR merged at 1, and a LoRA belongs to
  the timestep that it was trained at: one T for both.
- The latent is the mode of the VAE's distribution, not a sample: the same picture gives the same result.
- The released file names the layers of each group. A LoRA of our own adapts what GleSAM adapts but the projections of
  the timestep's embedding (OSEDiff's list): with one T they could only add a constant. Groups: "encoder" has the down
  blocks and conv_in, "decoder" the up blocks, "others" the rest, that is the middle block and conv_out.
- alpha = 8: the file does not say it; the released code leaves it to peft, which takes 8.
- Colours are those of the bad picture: `keep_colours`.

Source: RASS (IJCV 2026, arXiv 2602.14042) and its released code; OSEDiff (NeurIPS 2024, arXiv 2406.08177).
"""

from __future__ import annotations

import logging
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from glesam_ros.models.base import OutOfMemory, check_finite
from glesam_ros.models.glesam import catalogue
from glesam_ros.models.glesam.enhancer import (
    LORA_TARGETS,
    TOKENS,
    UNET_CHANNELS,
    UNet2DConditionModel,
    empty_prompt,
    is_lora,
    load_text_encoder,
    load_unet,
    merge_layers,
)
from glesam_ros.models.glesam.one_step import PICTURE_MULTIPLE, TIMESTEPS, alpha_bar, one_step
from glesam_ros.models.glesam.replay import Replayed, capturer, give_back
from glesam_ros.models.glesam.runtime import (
    choose_device,
    choose_precision,
    device_in_words,
    loading,
    made_current,
    memory_errors,
)
from glesam_ros.models.glesam.torchvision_ops import allow_import_without_operators
from glesam_ros.models.glesam.weights import load_exactly, read_checkpoint, write_checkpoint
from glesam_ros.validation import FloatArray, UInt8Array, check_image

allow_import_without_operators()  # diffusers and peft, which are imported below, want torchvision

_LOG = logging.getLogger(__name__)
AutoencoderKL = Any
"""diffusers' class; what it consists of is made at run time, and no checker of types sees it."""

NAME = "scr-sd21"
"""Name of the restorer."""
TIMESTEP = 1
"""T of `load_scr`."""
ALPHA = 8
"""alpha of LoRA; the update of a layer is alpha / rank * B A."""
GROUPS = ("encoder", "decoder", "others")
"""Groups of adapted layers; peft's adapters are "default_encoder" and so on."""
SCR_TARGETS = tuple(target for target in LORA_TARGETS if target != "time_emb_proj")
"""Endings of the names of the layers that a LoRA of our own adapts."""
RANK_KEY, STATE_KEY = "rank_unet", "state_dict_unet"
MODULE_KEYS = {group: f"unet_lora_{group}_modules" for group in GROUPS}
"""Keys of scr.pkl."""
TILE = 768
"""Longest side in pixels that is restored in one piece; 512 is what Stable Diffusion 2.1-base was trained with."""
LEAST_TILE = 256
"""Where memory lacks, tiles shrink to this."""
OVERLAP = 64
"""Pixels in which neighbouring tiles fade into one another, at least."""
COLOUR_SIGMA = 13.0
"""Deviation in pixels of the Gaussian between colour and detail; the five wavelet levels of StableSR blur as much."""
PROMPTS_KEPT = 8
"""Embedded lists of classes that `ClassPrompts` remembers."""


# LoRA in three groups


@dataclass(frozen=True)
class ScrWeights:
    """What is trained of SCR; the content of scr.pkl.

    Attributes:
        rank: of LoRA.
        modules: names of the adapted layers, by group.
        state: LoRA in peft's keys, "<module>.lora_A.default_<group>.weight", and conv_in.
    """

    rank: int
    modules: dict[str, list[str]]
    state: dict[str, Tensor]


def group_of(name: str) -> str:
    """The group of a layer of the U-Net by its name."""
    if name.startswith("down_blocks.") or name == "conv_in":
        return "encoder"
    return "decoder" if name.startswith("up_blocks.") else "others"


def lora_groups(unet: UNet2DConditionModel, targets: Sequence[str] = SCR_TARGETS) -> dict[str, list[str]]:
    """Names of the layers of a plain U-Net whose names end in one of `targets`, by group."""
    groups: dict[str, list[str]] = {group: [] for group in GROUPS}
    for name, _ in unet.named_modules():
        if any(name == target or name.endswith(f".{target}") for target in targets):
            groups[group_of(name)].append(name)
    return groups


def add_scr(unet: UNet2DConditionModel, rank: int) -> None:
    """Give a plain U-Net a fresh LoRA in three groups, in place; it changes nothing until it is trained.

    LoRA and conv_in get gradients (`trained_parameters`), all else is frozen.
    """
    _inject(unet, rank, lora_groups(unet))


def trained_parameters(unet: UNet2DConditionModel) -> list[nn.Parameter]:
    """What an optimiser gets of a U-Net with SCR's LoRA: LoRA and conv_in."""
    return [parameter for name, parameter in unet.named_parameters() if _is_trained(name)]


def scr_weights(unet: UNet2DConditionModel) -> ScrWeights:
    """What is trained of a U-Net with SCR's LoRA, on the CPU.

    Raises:
        ValueError: it has no such LoRA.
    """
    state = {key: x.detach().cpu().clone() for key, x in unet.state_dict().items() if _is_trained(key)}
    modules: dict[str, list[str]] = {group: [] for group in GROUPS}
    ranks = set()
    for key, x in state.items():
        name, found, rest = key.partition(".lora_A.default_")
        if found:
            modules[rest.removesuffix(".weight")].append(name)
            ranks.add(len(x))
    if len(ranks) != 1:
        raise ValueError(f"unet: expected SCR's LoRA, of one rank; found the ranks {sorted(ranks) or 'none'}")
    return ScrWeights(ranks.pop(), modules, state)


def write_scr(weights: ScrWeights, path: Path) -> None:
    """Write scr.pkl, whole or not at all, in the layout of the released one; folders above it are made."""
    content = {
        RANK_KEY: weights.rank, **{MODULE_KEYS[group]: names for group, names in weights.modules.items()},
        STATE_KEY: {key: x.detach().cpu().contiguous() for key, x in weights.state.items()},
    }
    write_checkpoint(path, content)


def read_scr(path: Path) -> ScrWeights:
    """Read scr.pkl, the released one or one of `write_scr`; code in it is refused, not run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file; names the keys that are missing or hold something else.
    """
    content = read_checkpoint(path)
    kinds: dict[str, tuple[str, Callable[[Any], bool]]] = {
        RANK_KEY: ("a whole number >= 1", lambda x: isinstance(x, int) and not isinstance(x, bool) and x >= 1),
        **{key: ("a list of names of layers", _are_names) for key in MODULE_KEYS.values()},
        STATE_KEY: ("a dict of tensors", _are_tensors),
    }
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a dict with {', '.join(kinds)}, got {type(content).__name__}")
    faults = [f"{key} is missing" for key in kinds if key not in content]
    faults += [
        f"{key} is {type(content[key]).__name__} instead of {what}"
        for key, (what, fits) in kinds.items() if key in content and not fits(content[key])
    ]
    if faults:
        raise ValueError(f"{path}: expected the weights of SCR; {'; '.join(faults)}")
    modules = {group: list(content[key]) for group, key in MODULE_KEYS.items()}
    return ScrWeights(content[RANK_KEY], modules, dict(content[STATE_KEY]))


def load_lora(unet: UNet2DConditionModel, weights: ScrWeights, what: str) -> None:
    """Give a plain U-Net a trained LoRA, in place, to go on with its training or to merge it.

    Args:
        what: where the weights are from, for errors.

    Raises:
        ValueError: they are of another U-Net: a layer that it has not, or a key that is missing, left over, or of
            another shape. The U-Net may have got a LoRA without effect by then.
    """
    layers = {name for name, module in unet.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
    unknown = [name for names in weights.modules.values() for name in names if name not in layers]
    if unknown:
        raise ValueError(f"{what}: expected names of layers of this U-Net, got {', '.join(unknown[:8])}")
    _inject(unet, weights.rank, weights.modules)
    frozen = [key for key in unet.state_dict() if not _is_trained(key)]
    load_exactly(unet, weights.state, what, ignore=frozen)


def merge_scr(unet: UNet2DConditionModel, path: Path, dtype: torch.dtype | None = None) -> None:
    """W0 + alpha / r B A takes the place of each adapted layer, of all three groups, in place; no adapter is left.

    conv_in begins as the file has it. Merge while the weights are float32. There is no way back.

    Args:
        unet: plain.
        path: scr.pkl.
        dtype: as `merge_lora`.

    Raises:
        FileNotFoundError, ValueError: as `read_scr`, `load_lora` and `merge_lora`.
    """
    load_lora(unet, read_scr(path), str(path))
    merge_lora(unet, dtype)


def merge_lora(unet: UNet2DConditionModel, dtype: torch.dtype | None = None) -> None:
    """As `merge_scr`, of the LoRA that a U-Net has; afterwards no weight is a view of a file.

    Args:
        dtype: of all weights afterwards, each at once; None leaves them as they are.

    Raises:
        ValueError: the LoRA is not finite.
    """
    merge_layers(unet, lambda name: dtype)
    for parameter in unet.parameters():  # what has no adapter is a view of its file still
        parameter.data = parameter.data.to(dtype or parameter.dtype, copy=True)


def _inject(unet: UNet2DConditionModel, rank: int, groups: dict[str, list[str]]) -> None:
    from peft import LoraConfig

    unet.requires_grad_(False)
    names = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are the plan
        for group in GROUPS:
            if layers := groups[group]:
                config = LoraConfig(r=rank, lora_alpha=ALPHA, init_lora_weights="gaussian", target_modules=layers)
                names.append(f"default_{group}")
                unet.add_adapter(config, names[-1])
    unet.set_adapter(names)  # each of them switched the earlier ones off
    unet.conv_in.requires_grad_(True)


def _is_trained(key: str) -> bool:
    return is_lora(key) or key.startswith("conv_in.")


def _are_names(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value)


def _are_tensors(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(x, Tensor) for x in value.values())


# text


def tokenise(tokenizer: Any, classes: Sequence[str]) -> tuple[Tensor, list[tuple[int, int]]]:
    """Class names as a prompt, "road traffic light", with the places of each in it.

    The released code joins names with spaces. A text encoder splits at spaces first, so a name has the same tokens in
    the prompt as alone.

    Args:
        tokenizer: transformers' CLIPTokenizer.
        classes: names in words; commas and underscores become spaces.

    Returns:
        Token ids (1, 77) int64; and for each name, in order, the range [first, end) of its tokens. The list is shorter
        than `classes` where these are too many: 75 tokens fit, names from the first that does not fit on are left out.

    Raises:
        ValueError: a name without a word in it.
    """
    kept: list[str] = []
    spans: list[tuple[int, int]] = []
    first = 1  # behind the start token
    for name in classes:
        words = " ".join(name.replace(",", " ").replace("_", " ").split())
        if not words:
            raise ValueError(f"classes: expected names in words, got {name!r}")
        end = first + len(tokenizer(words, add_special_tokens=False).input_ids)
        if end > TOKENS - 1:
            _LOG.info("classes: %d of %d names fit into %d tokens", len(kept), len(classes), TOKENS - 2)
            break
        kept.append(words)
        spans.append((first, end))
        first = end
    padded = tokenizer(" ".join(kept), padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    return padded.input_ids, spans


class ClassPrompts:
    """What the text encoder of a Stable Diffusion says of class names; it runs on the CPU, in float32.

    The encoder is loaded with the first names: the empty prompt has its own file (`empty_prompt`). The last lists of
    names are remembered, so that a stream of pictures with the same classes costs nothing.

    Args:
        folder: with text_encoder and tokenizer, and the empty prompt where it was embedded before.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._text: tuple[Any, Any] | None = None
        self._known: OrderedDict[tuple[str, ...], Tensor] = OrderedDict()

    def __call__(self, classes: Sequence[str] = ()) -> Tensor:
        """Class names, or none -> (1, 77, C) float32.

        Raises:
            FileNotFoundError: tokenizer or text encoder are not there; names the command that gets them.
            ValueError: a name without a word in it, or files that do not fit.
        """
        key = tuple(classes)
        if key not in self._known:
            self._known[key] = self._embed(key) if key else empty_prompt(self._folder)
            if len(self._known) > PROMPTS_KEPT:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return self._known[key]

    def _embed(self, classes: tuple[str, ...]) -> Tensor:
        if self._text is None:
            try:
                self._text = load_text_encoder(self._folder)
            except FileNotFoundError as error:
                raise FileNotFoundError(f"{error}; get it: {catalogue.get(NAME)}") from error
        tokenizer, encoder = self._text
        ids, _ = tokenise(tokenizer, classes)
        with torch.no_grad():
            prompt: Tensor = encoder(ids).last_hidden_state
        return prompt


# the network


def load_vae(folder: Path) -> AutoencoderKL:
    """An autoencoder as Stable Diffusion publishes it, on the CPU, in float32, for inference.

    Args:
        folder: with `config.json` and `diffusion_pytorch_model.safetensors`; older names of its attention are known.

    Raises:
        FileNotFoundError: one of them is missing.
        ValueError: the weights do not fit the configuration.
    """
    from diffusers import AutoencoderKL as Network

    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"expected a VAE of diffusers at {folder / name}, found no file")
    try:
        vae, report = Network.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    except (OSError, RuntimeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{folder}: expected a VAE of diffusers, cannot read it: {reason}") from error
    # diffusers takes random numbers instead
    faults = {kind: sorted(map(str, keys))[:8] for kind, keys in report.items() if keys}
    if faults:
        raise ValueError(f"{folder}: expected all weights of its VAE and no others; found {faults}")
    return vae.float().eval().requires_grad_(False)


class Scr(nn.Module):
    """The one step from picture to picture; see the top of this file.

    For training the U-Net has SCR's LoRA (`add_scr`), for inference it is merged in (`merge_scr`). Nothing depends on
    the values of a tensor, so the forward pass can be captured as a CUDA graph.

    Args:
        unet: with 4 channels in and out; taken over.
        vae: taken over.
        timestep: T in 0..999.

    Raises:
        ValueError: other channels, or another T.
    """

    def __init__(self, unet: UNet2DConditionModel, vae: AutoencoderKL, timestep: int = TIMESTEP) -> None:
        super().__init__()
        found = (unet.config.in_channels, unet.config.out_channels, vae.config.latent_channels)
        if found != (UNET_CHANNELS,) * 3:
            raise ValueError(f"expected {UNET_CHANNELS} channels of U-Net and VAE, got {found}")
        if not 0 <= timestep < TIMESTEPS:
            raise ValueError(f"timestep: expected 0..{TIMESTEPS - 1}, got {timestep}")
        self.unet, self.vae, self.share = unet, vae, alpha_bar(timestep)
        self.scale = float(vae.config.scaling_factor)
        # a tensor on the device: a number would be copied there in every call
        self.register_buffer("timestep", torch.tensor([timestep]), persistent=False)
        self.timestep: Tensor

    def encode(self, pixels: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in -1..1, sides multiples of 64 -> latents (B, 4, H / 8, W / 8) at the U-Net's scale.

        Raises:
            ValueError: another shape.
        """
        if pixels.ndim != 4 or pixels.shape[1] != 3 or any(s % PICTURE_MULTIPLE or not s for s in pixels.shape[2:]):
            raise ValueError(
                f"pixels: expected (B, 3, H, W) with sides that are multiples of {PICTURE_MULTIPLE}, got "
                f"{tuple(pixels.shape)}"
            )
        latent: Tensor = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist.mode()
        return self.scale * latent

    def restore(self, latent: Tensor, prompt: Tensor) -> Tensor:
        """The one step.

        Args:
            latent: (B, 4, h, w) as of `encode`.
            prompt: (B, 77, C), or (1, 77, C) for all.

        Returns:
            (B, 4, h, w) float32 at least: the step itself is not taken in half precision.
        """
        exact = latent.to(torch.promote_types(latent.dtype, torch.float32))
        own = self.unet.conv_in.weight.dtype
        text = prompt.to(own).expand(len(latent), -1, -1)
        noise = self.unet(latent.to(own), self.timestep, encoder_hidden_states=text, return_dict=False)[0]
        return one_step(exact, noise.to(exact.dtype), 1.0, self.share)

    def decode(self, latent: Tensor) -> Tensor:
        """Latents as of `restore` -> pictures (B, 3, H, W) in about -1..1, float32 at least."""
        pixels: Tensor = self.vae.decode((latent / self.scale).to(self.vae.dtype), return_dict=False)[0]
        return pixels.to(torch.promote_types(pixels.dtype, torch.float32))

    def forward(self, pixels: Tensor, prompt: Tensor) -> Tensor:
        """Bad pictures (B, 3, H, W) in -1..1 and their prompts -> restored ones, float32, not clipped."""
        return self.decode(self.restore(self.encode(pixels), prompt))


# pictures of any size


def keep_colours(restored: FloatArray, image: UInt8Array) -> FloatArray:
    """Restored detail in the colours of the picture it was restored from.

    A latent of Stable Diffusion forgets exact colours, and one step may shift them. What changes slowly over a picture
    is taken from the bad one, what changes fast from the restored one: the colour fix by wavelets of StableSR and
    OSEDiff, with its five levels as the one Gaussian that they amount to. The mean colour of a picture stays, but for
    what is clipped later. Noise hardly passes: the Gaussian averages some thousand pixels.

    Args:
        restored: (H, W, 3) float32, 0..255 or beyond.
        image: (H, W, 3) uint8 RGB.

    Returns:
        (H, W, 3) float32, not clipped.
    """
    shift = image.astype(np.float32) - restored
    # reflection about the edge itself keeps the sum
    return restored + cv2.GaussianBlur(shift, (0, 0), COLOUR_SIGMA, borderType=cv2.BORDER_REFLECT)


def starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles of `tile` pixels begin that cover `length`, spread evenly, with at least `overlap` in common."""
    if length <= tile:
        return [0]
    count = -(-(length - overlap) // (tile - overlap))
    return [round(k * (length - tile) / (count - 1)) for k in range(count)]


def feather(length: int, overlap: int) -> FloatArray:
    """(length,) float32 weights in 0..1, more than 0: they rise over `overlap` pixels from either end."""
    from_edge = np.minimum(np.arange(length), np.arange(length)[::-1]) + 0.5
    return np.minimum(1.0, from_edge / overlap).astype(np.float32)


class ScrRestorer:
    """SCR for pictures of any size; see `glesam_ros.models.base.RestorerModel`.

    A picture is reflected at its right and lower edge to multiples of 64. One with a longer side than `tile` is
    restored in tiles that fade into one another, so that memory does not grow with it. Where memory lacks all the same,
    tiles become smaller and stay so.

    Args:
        network: with SCR merged in; taken over.
        prompts: (class names) -> (1, 77, C) float32 on the CPU.
        device: of torch.
        dtype: of weights and activations; the step is float32.
        tile: longest side of a tile in pixels, a multiple of 64, at least 256.

    Raises:
        ValueError: another tile.
        OutOfMemory: the weights do not fit.
    """

    name = NAME

    @memory_errors
    def __init__(
        self, network: Scr, prompts: Callable[[Sequence[str]], Tensor], device: torch.device, dtype: torch.dtype,
        tile: int = TILE,
    ) -> None:
        if tile < LEAST_TILE or tile % PICTURE_MULTIPLE:
            raise ValueError(f"tile: expected a multiple of {PICTURE_MULTIPLE}, at least {LEAST_TILE}, got {tile}")
        self.device = device_in_words(device, dtype)
        self._place, self._tile, self._prompts = device, tile, prompts
        network.to(device, dtype)
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's own hints lack it
        self._network = network.eval().requires_grad_(False)
        capture = capturer() if device.type == "cuda" else None
        # pictures of a camera come again in one size, pictures of a folder do not
        self._forward = Replayed(lambda x, prompt: (self._network(x, prompt),), "restore", capture, at_once=False)

    def restore(self, image: UInt8Array, classes: Sequence[str] = ()) -> UInt8Array:
        """Restore an image.

        Args:
            image: (H, W, 3) uint8 RGB with H, W >= 1; left as it is.
            classes: names of what it shows, in words, the most important first; 75 tokens of them count. None is the
                empty prompt.

        Returns:
            (H, W, 3) uint8 RGB, a new array, in the colours of `image`.

        Raises:
            TypeError, ValueError: no such image, or a class name without a word in it.
            FileNotFoundError: class names need the text encoder, which is not there.
            OutOfMemory: even the smallest tiles do not fit.
            RuntimeError: the result is not finite, which half precision may cause.
        """
        image = check_image(image)
        prompt = self._prompts(classes)
        while True:
            try:
                return self._restore(image, prompt)
            except OutOfMemory as error:
                if self._tile == LEAST_TILE:
                    raise
                reason = str(error)
            # outside of the handler: the traceback of the failed call would keep its tensors alive
            self._tile = max(LEAST_TILE, self._tile // 2 // PICTURE_MULTIPLE * PICTURE_MULTIPLE)
            _LOG.warning("%s: pictures in tiles of %d pixels from now on: %s", NAME, self._tile, reason)
            self.free()

    def free(self) -> None:
        """Drop captured graphs and give cached device memory back."""
        self._forward.free()
        if self._place.type == "cuda":
            give_back()

    def close(self) -> None:
        """Free memory; the model cannot be used afterwards."""
        self._network = self._prompts = None  # type: ignore[assignment]  # nobody may use it
        self.free()

    @memory_errors
    def _restore(self, image: UInt8Array, prompt: Tensor) -> UInt8Array:
        height, width = image.shape[:2]
        pad = [(0, -side % PICTURE_MULTIPLE) for side in (height, width)]
        padded = np.pad(image, (*pad, (0, 0)), mode="symmetric")
        total = np.zeros(padded.shape, np.float32)
        weights = np.zeros((*padded.shape[:2], 1), np.float32)
        text = prompt.to(self._place)
        for rows, columns in _windows(padded.shape[0], padded.shape[1], self._tile):
            weight = np.outer(feather(rows.stop - rows.start, OVERLAP), feather(columns.stop - columns.start, OVERLAP))
            total[rows, columns] += self._run(padded[rows, columns], text) * weight[..., None]
            weights[rows, columns] += weight[..., None]
        restored: FloatArray = np.asarray((total / weights)[:height, :width], np.float32)
        check_finite(restored, f"{NAME} on {self.device}")
        return np.asarray(np.clip(np.rint(keep_colours(restored, image)), 0, 255), np.uint8)

    def _run(self, tile: UInt8Array, prompt: Tensor) -> FloatArray:
        """(h, w, 3) uint8 -> restored, float32 0..255 or a little beyond."""
        with torch.inference_mode(), made_current(self._place):
            x = torch.from_numpy(np.ascontiguousarray(tile)).to(self._place).permute(2, 0, 1)[None]
            (y,) = self._forward(x / 127.5 - 1, prompt)
            pixels = (127.5 * (y[0].clamp(-1, 1) + 1)).permute(1, 2, 0)
            return np.asarray(pixels.cpu().numpy(), np.float32)


def _windows(height: int, width: int, tile: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of each tile."""
    for top in starts(height, tile, OVERLAP):
        for left in starts(width, tile, OVERLAP):
            yield slice(top, min(top + tile, height)), slice(left, min(left + tile, width))


@loading
def load_scr(device: str, precision: str) -> ScrRestorer:
    """The restorer from the files that `catalogue` names below `home()`.

    Args:
        device: "auto", "cuda" or "cpu".
        precision: "auto" (bf16 on CUDA from capability 8.0, fp16 below, fp32 on a CPU), "fp32", "fp16" or "bf16".

    Raises:
        FileNotFoundError: a file is missing; names the command that gets it.
        RuntimeError: there is no CUDA.
        OutOfMemory: the weights do not fit.
        ValueError: another device or precision, or files that do not fit each other.
    """
    place = choose_device(device)
    dtype = choose_precision(precision, place)
    folder = catalogue.system_folder(NAME, catalogue.home())
    sd = folder / catalogue.SYSTEM_SD
    unet = load_unet(sd / "unet")
    merge_scr(unet, folder / catalogue.SCR_FILE, dtype)
    return ScrRestorer(Scr(unet, load_vae(sd / "vae")), ClassPrompts(sd), place, dtype)
