"""Stage ``vae``."""

from __future__ import annotations

import pytest
import torch

from advdmd_lightning.shapes.pretrain import autoencoder
from advdmd_lightning.shapes.stream import draw_batch


def test_principal_components_are_those_of_the_patches():
    """Against a singular value decomposition of the patches, up to sign."""
    images = draw_batch(64, seed=4, index=0)["image"].double()
    kernel = autoencoder.principal_components(images, patch=4, count=5).flatten(1)
    patches = images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(0, 2)
    expected = torch.linalg.svd(patches, full_matrices=False).Vh[:5]
    assert torch.allclose((kernel @ expected.mT).abs(), torch.eye(5).double(), atol=1e-6)


def test_autoencoder_loss_is_least_at_the_principal_components(vae):
    """The KL divergence of two Gaussians from torch.distributions, and the squared error, add up to the loss."""
    module = autoencoder.AutoencoderPretraining(kl_weight=0.5, prior_std=0.2)
    image = draw_batch(8, seed=5, index=0)["image"]
    with torch.no_grad():
        posterior = module.network.encode(image).latent_dist
        center = torch.nn.functional.conv2d(image, module.kernel, stride=4)
        normal = torch.distributions.Normal
        kl = torch.distributions.kl_divergence(normal(posterior.mean, posterior.std), normal(center, 0.2)).mean()
        latents = posterior.sample(torch.Generator().manual_seed(0))
        error = (module.network.decode(latents).sample - image).square().mean()
        module.log_dict = lambda *_, **__: None  # outside a Trainer there is no logger
        loss = module.loss({"image": image}, torch.Generator().manual_seed(0))
        assert float(loss) == pytest.approx(float(error + 0.5 * kl), rel=1e-4)


def test_load_vae_standardises_the_latents(vae):
    """On images that it has not measured."""
    network = autoencoder.load_vae(str(vae))
    with torch.no_grad():
        latents = network.encode(draw_batch(256, seed=9, index=0)["image"]).latent_dist.mean
    latents = (latents - network.config.shift_factor) * network.config.scaling_factor
    assert float(latents.mean()) == pytest.approx(0, abs=0.02)
    assert float(latents.std()) == pytest.approx(1, abs=0.02)
    assert not any(weight.requires_grad for weight in network.parameters())
    assert not network.training
