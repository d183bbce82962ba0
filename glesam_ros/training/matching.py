"""Distribution matching and the adversarial term of the released GleSAM code, for restored latents.

With x a restored latent in the U-Net's scale, x_t its noised version and x0(x_t) what a U-Net makes of that,

    gradient of x = (x0_fake(x_t) - x0_real(x_t)) / mean |x - x0_real(x_t)|

x0_real comes from the frozen U-Net, x0_fake from the same one with a LoRA that learns the distribution of x as it
changes. The adversarial term is softplus(-D(x_t)), D a classifier on the middle block of the fake U-Net.

The only prompt is the empty one, so classifier-free guidance, with whatever factor, leaves the real U-Net's prediction
as it is, and none is computed.

Source: DMD2 (arXiv 2405.14867), equations 1 to 4 and its appendix; their use for latents: released code of GleSAM.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glesam_ros.models.glesam.enhancer import Enhancer, is_lora
from glesam_ros.models.glesam.one_step import TIMESTEPS, alpha_bar

FIRST, LAST = 20, 980
"""Timesteps at which distributions are compared; nearer to the ends nothing is to be learnt. The fake U-Net and the
classifier learn at all of them, as in the released code."""
HIDDEN = 256
"""Channels of the classifier."""
LEAST = 1e-6
"""Smallest divisor of the gradient."""


def matching_gradient(x: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """Gradient of x (B, C, h, w) from the clean latents that both U-Nets see in it; against it real grows likelier.

    Source: DMD2, equation 2 with the weight of its code.
    """
    return (fake - real) / (x - real).abs().mean((1, 2, 3), keepdim=True).clamp_min(LEAST)


def carried(x: Tensor, gradient: Tensor) -> Tensor:
    """A scalar of value 0 whose gradient in `x` is `gradient`."""
    return (gradient.detach() * (x - x.detach())).sum()


class Classifier(nn.Sequential):
    """Logit of a clear latent from the middle block of a U-Net: (B, C, h, w) -> (B,); smaller than the released one."""

    def __init__(self, channels: int) -> None:
        super().__init__(
            nn.Conv2d(channels, HIDDEN, 3, padding=1), nn.GroupNorm(32, HIDDEN), nn.SiLU(),
            nn.Conv2d(HIDDEN, 1, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(0),
        )


class Guide(nn.Module):
    """The U-Nets that compare restored with clear latents; real and fake share their frozen weights.

    Attributes:
        unet: with a LoRA of its own, the fake one; without it, the real one.
        classifier: on its middle block.
    """

    def __init__(self, enhancer: Enhancer) -> None:
        """Begin with fake equal to real; the frozen weights stay those of `enhancer`, in the same memory."""
        from peft.tuners.lora import LoraLayer

        super().__init__()
        shared = [p for name, p in enhancer.unet.named_parameters() if not is_adapted(name)]
        self.unet = copy.deepcopy(enhancer.unet, {id(p): p for p in shared})
        self.unet.class_embedding = None  # the level is the enhancer's alone
        for module in self.unet.modules():
            if isinstance(module, LoraLayer):
                module.reset_lora_parameters("default", True)
        self.classifier = Classifier(self.unet.config.block_out_channels[-1])
        self.register_buffer("prompt", enhancer.prompt, persistent=False)
        bars = torch.tensor([alpha_bar(t) for t in range(TIMESTEPS)])
        self.register_buffer("bars", bars.to(enhancer.prompt.device), persistent=False)
        self.prompt: Tensor
        self.bars: Tensor

    def trained_parameters(self) -> list[nn.Parameter]:
        """LoRA of the fake U-Net, and the classifier."""
        lora = [p for name, p in self.unet.named_parameters() if is_adapted(name)]
        return [*lora, *self.classifier.parameters()]

    def gradients(self, x: Tensor, matching: float, adversarial: float) -> tuple[Tensor, dict[str, Tensor]]:
        """What the enhancer is to learn of its output.

        Args:
            x: (B, C, h, w) float32, restored latents times gamma.
            matching, adversarial: weights of the terms; 0 leaves one out.

        Returns:
            The gradient of x of the weighted terms, each the mean over all positions, and their sizes by name.
        """
        x = x.detach()
        total, sizes = torch.zeros_like(x), {}
        if matching:
            t, noised, _ = self._noised(x, FIRST, LAST)
            with torch.no_grad():
                with self._frozen():
                    fake = self._clean(noised, t)
                with self._without_lora():
                    real = self._clean(noised, t)
            gradient = matching_gradient(x, real, fake)
            total += matching * gradient / x.numel()
            sizes["matching"] = 0.5 * (gradient**2).mean()
        if adversarial:
            seen = x.clone().requires_grad_()
            with self._frozen():
                t, noised, _ = self._noised(seen)
                loss = F.softplus(-self.judge(noised, t)).mean()
                # at once, while the fake U-Net is frozen: checkpointed layers are run again by that
                (gradient,) = torch.autograd.grad(adversarial * loss, seen)
            total += gradient
            sizes["adversarial"] = loss.detach()
        return total, sizes

    def losses(self, x: Tensor, clear: Tensor) -> dict[str, Tensor]:
        """What the fake U-Net and the classifier learn: noise in restored latents, and to tell them from clear ones.

        Args:
            x, clear: (B, C, h, w) float32, times gamma.

        Returns:
            "fake", the MSE of the noise, and "classifier".
        """
        x, clear = x.detach(), clear.detach()
        t, noised, noise = self._noised(x)
        mse = F.mse_loss(self._noise(noised, t), noise)
        t, restored, _ = self._noised(x)
        at, real, _ = self._noised(clear)
        told = F.softplus(-self.judge(real, at)) + F.softplus(self.judge(restored, t))
        return {"fake": mse, "classifier": told.mean()}

    def judge(self, noised: Tensor, t: Tensor) -> Tensor:
        """Logits (B,) of being clear, of noised latents (B, C, h, w) at timesteps (B,)."""
        unet, prompt = self.unet, self.prompt.expand(len(noised), -1, -1)
        embedding = unet.time_embedding(unet.time_proj(t).to(noised.dtype))
        h = unet.conv_in(noised)
        for block in unet.down_blocks:
            attends: Mapping[str, Tensor] = (
                {"encoder_hidden_states": prompt} if getattr(block, "has_cross_attention", False) else {}
            )
            h, _ = block(h, embedding, **attends)
        return self.classifier(unet.mid_block(h, embedding, encoder_hidden_states=prompt)).float()

    def _noised(self, x: Tensor, first: int = 0, last: int = TIMESTEPS - 1) -> tuple[Tensor, Tensor, Tensor]:
        """Random timesteps (B,), x noised for them, and the noise."""
        t = torch.randint(first, last + 1, (len(x),), device=x.device)
        noise = torch.randn_like(x)
        return t, self._add(x, t, noise), noise

    def _add(self, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        share = self.bars[t].view(-1, 1, 1, 1)
        return share.sqrt() * x + (1 - share).sqrt() * noise

    def _noise(self, noised: Tensor, t: Tensor) -> Tensor:
        prompt = self.prompt.expand(len(noised), -1, -1)
        return self.unet(noised, t, encoder_hidden_states=prompt, return_dict=False)[0].float()

    def _clean(self, noised: Tensor, t: Tensor) -> Tensor:
        share = self.bars[t].view(-1, 1, 1, 1)
        return (noised - (1 - share).sqrt() * self._noise(noised, t)) / share.sqrt()

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """No gradient for the guide's own parameters; autocast of older torch would keep copies of them without one."""
        trained = [p for p in self.trained_parameters() if p.requires_grad]
        for p in trained:
            p.requires_grad_(False)
        try:
            yield
        finally:
            for p in trained:
                p.requires_grad_(True)

    @contextmanager
    def _without_lora(self) -> Iterator[None]:
        """The real U-Net; peft makes LoRA trainable again afterwards."""
        self.unet.disable_adapters()
        try:
            yield
        finally:
            self.unet.enable_adapters()


def is_adapted(name: str) -> bool:
    """Whether a U-Net's parameter is of LoRA or of the level embedding, by its name."""
    return is_lora(name) or name.startswith("class_embedding.")
