"""CLIP features in torchmetrics' distances, and diversity within a prompt."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist
from torch.nn import functional as F
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance
from transformers import CLIPModel

from advdmd_lightning.embedded import locate
from advdmd_lightning.evaluation.features import CLIPImageFeatures, prompt_diversity
from advdmd_lightning.shapes.stream import draw_batch


@pytest.fixture(scope="module")
def real():
    return draw_batch(256, seed=1, index=0)["image"]


@pytest.fixture(scope="module")
def again():
    return draw_batch(256, seed=1, index=1)["image"]


@pytest.fixture(scope="module")
def blurred(again):
    return F.avg_pool2d(F.pad(again, (1, 1, 1, 1), mode="replicate"), 3, stride=1)


@pytest.mark.parametrize("projected", [True, False])
def test_features_are_the_models(real, projected):
    model = CLIPModel.from_pretrained(locate("embedded://shapes-clip", "key"), dtype=torch.float32).eval()
    network = CLIPImageFeatures(projected=projected)
    with torch.no_grad():
        pooled = model.vision_model(pixel_values=real[:4]).pooler_output  # mean and std of 0.5 undo each other
        expected = model.visual_projection(pooled) if projected else pooled
    found = network(real[:4])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert found.shape == (4, network.num_features)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    assert not any(weight.requires_grad for weight in network.parameters())


@pytest.mark.parametrize("projected", [True, False])
def test_frechet_distance(real, again, blurred, projected):
    """Small between two draws of real images, large from real to blurred ones."""
    metric = FrechetInceptionDistance(CLIPImageFeatures(projected=projected), reset_real_features=False)
    metric.update(real, real=True)
    found = {}
    for name, images in {"real": again, "blurred": blurred}.items():
        metric.reset()
        metric.update(images[:128], real=False)
        metric.update(images[128:], real=False)
        found[name] = float(metric.compute())
    assert 0 <= found["real"] < found["blurred"] / 2


def test_kernel_distance(real, again, blurred):
    metric = KernelInceptionDistance(CLIPImageFeatures(), subsets=5, subset_size=128, reset_real_features=False)
    metric.update(real, real=True)
    found = {}
    for name, images in {"real": again, "blurred": blurred}.items():
        metric.reset()
        metric.update(images, real=False)
        found[name] = float(metric.compute()[0])
    assert abs(found["real"]) < found["blurred"] / 2


def test_diversity_is_the_mean_of_scipys_distances():
    features = np.random.default_rng(0).normal(size=(3, 5, 8))
    expected = np.mean([pdist(samples, "cosine").mean() for samples in features])
    assert prompt_diversity(torch.from_numpy(features)) == pytest.approx(expected)


def test_diversity_sees_only_what_differs_within_a_prompt(real):
    features = CLIPImageFeatures()(real[:12])
    assert prompt_diversity(features[:, None].repeat(1, 4, 1)) == pytest.approx(0, abs=1e-6)
    assert prompt_diversity(features.view(3, 4, -1)) > 0.1


@pytest.mark.parametrize("shape", [(4, 8), (3, 1, 8)])
def test_diversity_needs_several_samples_per_prompt(shape):
    with pytest.raises(ValueError, match=r"expected features \(P, N >= 2, D\)"):
        prompt_diversity(torch.zeros(shape))
