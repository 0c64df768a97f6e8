"""Stage ``vae``: the teacher's autoencoder."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from advdmd_lightning.shapes import components
from advdmd_lightning.shapes.pretrain.loop import Pretraining, load_average
from advdmd_lightning.shapes.stream import draw_batch


def principal_components(images: Tensor, patch: int, count: int) -> Tensor:
    """Return the leading principal directions of the images' patches.

    Args:
        images: (B, 3, H, W).
        patch: side of a patch in pixels.
        count: number of directions.

    Returns:
        (count, 3, patch, patch) orthonormal directions, as a convolution kernel.
    """
    patches = F.unfold(images, patch, stride=patch).transpose(1, 2).flatten(0, 1)
    _, directions = torch.linalg.eigh(patches.mT @ patches / len(patches))
    return directions.mT.flip(0)[:count].reshape(count, 3, patch, patch)


class AutoencoderPretraining(Pretraining):
    """The autoencoder.

    Squared error, and a KL divergence to a prior around the principal components of 4×4 patches. So latents keep the
    spectrum of pixels, large shapes large and fine detail small, and the velocity network learns shapes first.

    Args:
        kl_weight: weight of the KL divergence (nats per latent value) against the squared error per pixel.
        prior_std: standard deviation of the prior around the principal components, in pixel units.
        lr: learning rate.
        ema_decay: decay of the average that is exported.
        decay_share: share of the run over which the learning rate falls to zero.
    """

    network: AutoencoderKL
    kernel: Tensor

    def __init__(
        self,
        kl_weight: float = 5e-5,
        prior_std: float = 0.03,
        lr: float = 2e-3,
        ema_decay: float = 0.995,
        decay_share: float = 0.6,
    ) -> None:
        super().__init__(components.build_vae(), lr, lr, ema_decay, decay_share, compile=False)
        self.kl_weight, self.prior_std = kl_weight, prior_std
        kernel = principal_components(draw_batch(2048, seed=0, index=0)["image"], 4, components.LATENT_CHANNELS)
        self.register_buffer("kernel", kernel)

    def loss(self, batch: dict[str, Any], noise_source: torch.Generator) -> Tensor:
        """Squared error plus weighted KL of a batch with key ``image``."""
        image = batch["image"]
        posterior = self.network.encode(image).latent_dist
        error = F.mse_loss(self.network.decode(posterior.sample(noise_source)).sample, image)
        shift = (posterior.mean - F.conv2d(image, self.kernel, stride=4)) / self.prior_std
        log_ratio = posterior.logvar - 2 * math.log(self.prior_std)
        kl = 0.5 * (shift.square() + log_ratio.exp() - log_ratio - 1).mean()
        self.log_dict({"squared_error": error, "kl": kl}, prog_bar=True)
        return error + self.kl_weight * kl


def load_vae(checkpoint: str | Path) -> AutoencoderKL:
    """Build the autoencoder of stage ``vae`` from its checkpoint, with shift and scale that make latents standard."""
    vae = components.build_vae().eval().requires_grad_(False)
    load_average(vae, checkpoint)
    with torch.no_grad():
        latents = vae.encode(draw_batch(512, seed=0, index=0)["image"]).latent_dist.mean
    vae.register_to_config(
        shift_factor=round(float(latents.mean()), 4), scaling_factor=round(1 / float(latents.std()), 4)
    )
    return vae
