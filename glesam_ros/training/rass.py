"""SCR and RASS by the paper's recipe: first a restorer that knows the classes, then a segmenter on its features.

    scr    LoRA in three groups and the first convolution of Stable Diffusion's U-Net: restoration loss, and the
           semantic constraint that aligns cross-attention with the masks of the named classes
    rass   SCR merged into the weights; new LoRA of rank 4, the first convolution, projections and Mask2Former on
           degraded crops

Source: RASS (IJCV 2026, arXiv 2602.14042) and its released code, which has the second stage only.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glesam_ros.checksum import sha256
from glesam_ros.models.glesam import catalogue
from glesam_ros.models.glesam.enhancer import load_text_encoder, load_unet
from glesam_ros.models.rass.rass import RassConfig, RassNetwork, masks_of, write_rass
from glesam_ros.models.rass.scr import (
    NAME as SCR_NAME,
)
from glesam_ros.models.rass.scr import (
    ClassPrompts,
    Scr,
    add_scr,
    load_vae,
    merge_lora,
    merge_scr,
    scr_weights,
    tokenise,
    trained_parameters,
    write_scr,
)
from glesam_ros.training.config import StageConfig
from glesam_ros.training.full import worsen
from glesam_ros.training.labelled_crops import VOID, LabelledScenes, draw_labelled_crop, load_labelled
from glesam_ros.training.loop import (
    Adapting,
    Batch,
    Group,
    Run,
    Stop,
    claim,
    complete,
    make_accelerator,
    settled,
    sow,
)
from glesam_ros.training.random_sd import write_random_sd
from glesam_ros.training.rass_config import RASS_STAGES, RassTrainingConfig, ScrConfig, SegmentConfig
from glesam_ros.training.semantic_constraint import AttentionMaps, restoration_loss, semantic_constraint
from glesam_ros.whole_files import write_whole

RANDOM_HEAD: dict[str, int] = {
    "projection": 256, "width": 64, "queries": 8, "heads": 4, "pixel_layers": 1, "layers": 2, "feedforward": 64,
    "points": 512,
}
"""Where the network of a `random` run differs from the published one."""


UNDECAYED = "_undecayed"
"""End of the names of groups whose weights do not decay."""


def draw_crops(
    scenes: LabelledScenes, rng: np.random.Generator, config: RassTrainingConfig, count: int, clear: float
) -> Batch:
    """Labelled crops, and what the network gets in their place: degraded, or with the probability `clear` the same.

    Returns:
        "clear" and "input" (B, S, S, 3) uint8 RGB; "labels" (B, S, S) int16 or int32, `VOID` where there is no class.
    """
    drawn = [draw_labelled_crop(scenes, rng, config.crop) for _ in range(count)]
    inputs = [
        image if rng.random() < clear else worsen(image, config.degradation, rng)[0] for image, _ in drawn
    ]
    return {
        "clear": torch.from_numpy(np.stack([image for image, _ in drawn])),
        "input": torch.from_numpy(np.stack(inputs)),
        "labels": torch.from_numpy(np.stack([labels for _, labels in drawn])),
    }


def pixels_of(images: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in -1..1."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


class RassStage(Adapting):
    """What both stages share."""

    def __init__(
        self, model: nn.Module, config: RassTrainingConfig, settings: StageConfig, scenes: LabelledScenes
    ) -> None:
        super().__init__(model, settings)
        self.config, self.scenes = config, scenes


class Restore(RassStage):
    """SCR: the restoration loss of the decoded picture, and the semantic constraint on the U-Net's cross-attention.

    The prompt of a crop names the classes that it shows, the largest first, as the released code names those that a
    tagger finds in the clear picture; the class maps say it more surely. So the constraint has a mask for each name.
    """

    name = "scr"
    model: Scr
    settings: ScrConfig

    def __init__(
        self, scr: Scr, text: tuple[Any, Any], config: RassTrainingConfig, settings: ScrConfig, scenes: LabelledScenes
    ) -> None:
        """Take `scr` with its LoRA, and tokenizer and text encoder.

        Raises:
            ValueError: a class name without a word in it.
        """
        super().__init__(scr, config, settings, scenes)
        self.tokenizer, self.text = text
        for name in scenes.classes:
            tokenise(self.tokenizer, [name])  # refused now, not when the first crop shows it
        self.attention = AttentionMaps(scr.unet) if settings.semantic else None

    def groups(self) -> list[Group]:
        return [Group("adapters", trained_parameters(self.model.unet), self.settings.rates.adapters)]

    def batch(self, rng: np.random.Generator) -> Batch:
        return draw_crops(self.scenes, rng, self.config, self.settings.batch, self.settings.clear)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        clear, bad = pixels_of(batch["clear"]), pixels_of(batch["input"])
        named = [classes_of(labels) for labels in batch["labels"]]
        with torch.no_grad():
            latent = self.model.encode(bad)
            prompt, spans = self.prompts(named)
        restored = self.model.decode(self.model.restore(latent, prompt))
        with torch.autocast(bad.device.type, enabled=False):
            restoration = restoration_loss(restored, clear)
            losses = {"restoration": restoration, "unrestored": restoration_loss(bad, clear)}
            if self.attention is None:
                return {"loss": restoration, **losses}
            attention = self.attention.take((latent.shape[2], latent.shape[3]))
            constraint = semantic_constraint(attention, spans, named, batch["labels"], VOID)
        loss = restoration + self.settings.semantic * (constraint.place + constraint.choice)
        return {"loss": loss, **losses, "place": constraint.place, "choice": constraint.choice}

    def prompts(self, named: Sequence[Sequence[int]]) -> tuple[Tensor, list[list[tuple[int, int]]]]:
        """Class indices of each crop -> (B, 77, C), and where each name stands in it, see `tokenise`."""
        found = [tokenise(self.tokenizer, [self.scenes.classes[k] for k in classes]) for classes in named]
        ids = torch.cat([ids for ids, _ in found])
        return self.text(ids.to(self.text.device)).last_hidden_state, [spans for _, spans in found]

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Input, restored and clear, side by side."""
        prompt, _ = self.prompts([classes_of(labels) for labels in batch["labels"]])
        restored = self.model(pixels_of(batch["input"]), prompt).permute(0, 2, 3, 1)
        shown = (127.5 * (restored.clamp(-1, 1) + 1)).round().to(torch.uint8)
        return {"restored": side_by_side(batch["input"], shown, batch["clear"])}

    def close(self) -> None:
        """Give the U-Net its own attention back, for the next stage."""
        if self.attention is not None:
            self.attention.close()


def classes_of(labels: Tensor) -> list[int]:
    """Classes of a label map (H, W), the largest first."""
    found, counts = labels.unique(return_counts=True)
    order = counts.argsort(descending=True, stable=True)
    return [k for k in found[order].tolist() if k != VOID]


def side_by_side(*pictures: Tensor) -> Tensor:
    """Pictures (B, S, S, 3) uint8 -> (B S, N S, 3): a row for each of the B."""
    return torch.cat(pictures, 2).flatten(0, 1)


class Segment(RassStage):
    """RASS: the three terms of Mask2Former on degraded crops, one mask for each class in the crop."""

    name = "rass"
    model: RassNetwork
    settings: SegmentConfig

    def groups(self) -> list[Group]:
        rates, apart = self.settings.rates, undecayed(self.model)
        found = []
        for part, parameters in self.model.trainable_parameters().items():
            rate = getattr(rates, part)
            found.append(Group(part, [p for p in parameters if id(p) not in apart], rate))
            found.append(Group(f"{part}{UNDECAYED}", [p for p in parameters if id(p) in apart], rate))
        return found

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """AdamW; norms and embeddings do not decay (Mask2Former's recipe)."""
        for group, own in zip(groups, self.groups(), strict=True):
            group["weight_decay"] = 0.0 if own.name.endswith(UNDECAYED) else self.settings.weight_decay
        return super().optimizer(groups)

    def set_modes(self) -> None:
        self.eval()
        self.model.head.train()

    def batch(self, rng: np.random.Generator) -> Batch:
        batch = draw_crops(self.scenes, rng, self.config, self.settings.batch, self.settings.clear)
        return {"input": batch["input"], "labels": batch["labels"]}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        device = batch["input"].device.type
        self.model.autocast = torch.bfloat16 if torch.is_autocast_enabled(device) else None
        with torch.autocast(device, enabled=False):  # the head in float32, VAE and U-Net by what is set above
            losses = self.model.loss(batch["input"], *masks_of(batch["labels"], VOID))
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Input, truth and prediction, side by side; black has no class."""
        images, labels = batch["input"], batch["labels"].long()
        shares = self.model(images).shares()
        found = F.interpolate(shares, labels.shape[1:], mode="bilinear", align_corners=False).argmax(1)
        palette = torch.as_tensor(self.scenes.palette, device=images.device)
        truth = palette[labels.clamp(min=0)] * (labels != VOID)[..., None]
        return {"classes": side_by_side(images, truth, palette[found])}


def undecayed(module: nn.Module) -> set[int]:
    """Ids of the parameters of norms and embeddings, as in Mask2Former's training: a level's bare parameter decays."""
    kinds = (nn.GroupNorm, nn.LayerNorm, nn.Embedding)
    return {id(p) for part in module.modules() if isinstance(part, kinds) for p in part.parameters()}


def make_scr(scr: Scr, text: tuple[Any, Any], config: RassTrainingConfig, scenes: LabelledScenes) -> Restore:
    """The stage scr, with a fresh LoRA on the plain U-Net of `scr`, which depends on seed and rank alone."""
    sow(config.seed, RASS_STAGES.index("scr"))
    add_scr(scr.unet, config.scr.rank)
    return Restore(scr, text, config, config.scr, scenes)


def make_rass(scr: Scr, prompt: Tensor, config: RassTrainingConfig, scenes: LabelledScenes) -> Segment:
    """The stage rass, on U-Net and VAE of `scr`, whose LoRA is merged; what is new depends on the seed alone."""
    sow(config.seed, RASS_STAGES.index("rass"))
    sizes = RANDOM_HEAD if config.random else {}
    network = RassNetwork(RassConfig(scenes.classes, config.rass.rank, **sizes), scr.vae, scr.unet, prompt)
    return Segment(network, config, config.rass, scenes)


def stages_of(config: RassTrainingConfig) -> list[str]:
    """The stages that a run has, in their order."""
    return [name for name in RASS_STAGES if getattr(config, name).steps]


def sd_of(config: RassTrainingConfig, out: Path) -> Path:
    """The folder of Stable Diffusion; that of a `random` run is made in `out`.

    Raises:
        FileNotFoundError: a part of it is missing; names the command that gets it.
    """
    if config.sd_folder is None and config.random:
        return write_random_sd(out / catalogue.SYSTEM_SD, config.seed)
    folder = catalogue.home() / catalogue.SYSTEM_SD if config.sd_folder is None else Path(config.sd_folder)
    for part in ("unet", "vae", "text_encoder", "tokenizer"):
        if not (folder / part).is_dir():
            raise FileNotFoundError(
                f"sd_folder: expected the folder {folder / part}, found none; get it: {catalogue.get(SCR_NAME)}"
            )
    return folder


def scr_file_of(config: RassTrainingConfig) -> Path:
    """The SCR that a run without the stage scr merges.

    Raises:
        FileNotFoundError: there is none; names the ways to one.
    """
    file = catalogue.home() / catalogue.SCR_FILE if config.scr_file is None else Path(config.scr_file)
    if not file.is_file():
        raise FileNotFoundError(
            f"scr_file: expected the weights of SCR at {file}, found no file; train them (scr.steps above 0), name "
            f"those of another run, OUT/{catalogue.SCR_FILE}, or get them: {catalogue.get(SCR_NAME)}"
        )
    return file


def train_rass(
    config: RassTrainingConfig, data: Path, out: Path, device: Literal["auto", "cpu", "cuda"] = "auto",
    until: str = RASS_STAGES[-1],
) -> list[Path]:
    """Train, or go on with what `out` holds.

    Args:
        config: the recipe.
        data: folder that the paths of the sources are relative to.
        out: gets `config.yaml`, `<stage>.csv`, `tensorboard/`, `checkpoint.pt` while a stage is under way, `<stage>.pt`
            of each finished one, and `rass/` for `glesam models get`: `rass.pth` and the `scr.pkl` that it goes with. A
            `random` run puts its Stable Diffusion there, too, so that `out` may serve as GLESAM_HOME.
        device: auto takes a GPU where there is one.
        until: last stage to run.

    Returns:
        What was written below `out`/rass.

    Raises:
        Stopped: SIGINT or SIGTERM came; the same call goes on.
        ValueError: the device is not there, `out` was begun with another configuration, weights, labels or classes that
            do not fit.
        FileNotFoundError: data or weights are missing.
        FloatingPointError: the loss is infinite or not a number.
    """
    config = settled(config, device)
    accelerator = make_accelerator(device, config.precision)
    torch.set_flush_denormal(True)  # computing with denormal numbers is many times slower on CPUs
    scenes = load_labelled(config.sources, data)
    with accelerator.main_process_first():  # which writes a random one
        folder = sd_of(config, out)
    stages = stages_of(config)
    merged = out / catalogue.SCR_FILE if "scr" in stages else scr_file_of(config)
    scr = _load_scr(config, folder, None if "scr" in stages else merged).to(accelerator.device)
    claim(out, config, accelerator)  # not before the weights are known to be there
    written: list[Path] = []
    with (stop := Stop()).signals():
        run = Run(out, config.seed, config.workers, accelerator, stop)
        for name in stages:
            if RASS_STAGES.index(name) > RASS_STAGES.index(until):
                break
            if name == "scr":
                written.append(_train_restorer(scr, folder, config, scenes, run))
            else:
                written.append(_train_segmenter(scr, merged, folder, config, scenes, run))
    accelerator.wait_for_everyone()
    return written


def _load_scr(config: RassTrainingConfig, folder: Path, merged: Path | None) -> Scr:
    """U-Net and VAE of a Stable Diffusion, with the SCR of a file merged in, or plain."""
    scr = Scr(load_unet(folder / "unet"), load_vae(folder / "vae"))
    if merged is not None:
        merge_scr(scr.unet, merged)
    if config.gradient_checkpointing:
        scr.unet.enable_gradient_checkpointing()
        scr.vae.enable_gradient_checkpointing()
    return scr


def _train_restorer(scr: Scr, folder: Path, config: RassTrainingConfig, scenes: LabelledScenes, run: Run) -> Path:
    """The stage scr on a plain `scr`, which is merged in the end; the file of what was trained."""
    file = run.out / catalogue.SCR_FILE
    new = _is_new(run, "scr", file)
    stage = make_scr(scr, load_text_encoder(folder), config, scenes)
    complete(stage, RASS_STAGES.index("scr"), run)
    stage.close()
    if new:
        write_scr(scr_weights(scr.unet), file)
    merge_lora(scr.unet)
    return file


def _train_segmenter(
    scr: Scr, merged: Path, folder: Path, config: RassTrainingConfig, scenes: LabelledScenes, run: Run
) -> Path:
    """The stage rass on a merged `scr`; the file of what was trained, beside which the SCR lies that was `merged`."""
    file, beside = run.out / catalogue.RASS_FILE, run.out / catalogue.SCR_FILE
    new = _is_new(run, "rass", file)
    stage = make_rass(scr, ClassPrompts(folder)(scenes.classes), config, scenes)
    complete(stage, RASS_STAGES.index("rass"), run)
    if new:
        if merged != beside:
            write_whole(beside, lambda part: shutil.copyfile(merged, part))
        write_rass(stage.model, file, scenes.palette, sha256(merged))
    return file


def _is_new(run: Run, name: str, file: Path) -> bool:
    """Whether this process is to write the file of a stage: once, as rass.pth names the checksum of its scr.pkl."""
    return run.accelerator.is_main_process and not ((run.out / f"{name}.pt").exists() and file.is_file())
