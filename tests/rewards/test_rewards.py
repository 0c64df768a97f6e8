"""Rewards on a real rollout of the tiny pipeline."""

from __future__ import annotations

import pytest
import torch

from advdmd_lightning.equations import discriminator_score, group_advantages
from advdmd_lightning.flow import Renoising
from advdmd_lightning.rewards import DiscriminatorReward, ImageReward, Rollout, brightness, sharpness
from advdmd_lightning.settings import GRPOSettings
from advdmd_lightning.shapes.stream import draw_batch
from advdmd_lightning.updates import trajectory_advantages
from tests.training import CAPTIONS, rollout, tiny_backbone, tiny_module


class Decoder:
    """The backbone's decoder, counting its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, latents):
        self.calls += 1
        return tiny_backbone().decode(latents)


@pytest.fixture
def module():
    return tiny_module()


@pytest.fixture
def seen(module):
    samples = rollout(module.roles.generator, Renoising(), group_size=4)
    captions = [caption for caption in CAPTIONS[:2] for _ in range(4)]
    return Rollout(samples, captions, lambda *state: module.critic.score(*state, 3), Decoder())


@pytest.mark.parametrize("read", ["sigmoid", "logit"])
def test_discriminator_rewards_the_state_that_each_step_reaches(module, seen, read):
    rewards = DiscriminatorReward(read=read)(seen)
    samples = seen.trajectory
    assert rewards.shape == (3, 8)
    assert not rewards.requires_grad
    for k in range(3):
        t = samples.times[k + 1].expand(8)
        with torch.no_grad():
            logits = module.discriminator(module.critic.features(samples.states[k + 1], t, samples.condition))
        expected = discriminator_score(logits) if read == "sigmoid" else sum(m.mean((1, 2, 3)) for m in logits) / 3
        torch.testing.assert_close(rewards[k], expected, rtol=1e-4, atol=1e-5)


def test_discriminator_reward_is_that_of_the_current_heads(module, seen):
    before = DiscriminatorReward()(seen)
    with torch.no_grad():
        for head in module.discriminator.heads:
            head[-1].bias.add_(1.0)
    assert (DiscriminatorReward()(seen) > before).all()


def test_image_reward_is_one_number_per_image(seen):
    rewards = ImageReward(brightness)(seen)
    torch.testing.assert_close(rewards, (tiny_backbone().decode(seen.trajectory.x0) + 1).div(2).mean((1, 2, 3)))


def test_images_are_decoded_once_for_all_rewards(seen):
    advantages, scores = trajectory_advantages(
        [ImageReward(brightness), ImageReward(lambda images, captions: -brightness(images, captions), name="darkness")],
        seen,
        GRPOSettings(group_size=4, std_floor=1e-9),
    )
    assert seen.decode.calls == 1
    assert list(scores) == ["brightness", "darkness"]
    torch.testing.assert_close(advantages.values, torch.zeros(3, 8), rtol=0, atol=1e-4)  # they cancel


def test_image_rewards_see_the_captions(seen):
    length = ImageReward(lambda images, captions: torch.tensor([float(len(c)) for c in captions]), name="length")
    assert length(seen).tolist() == [float(len(caption)) for caption in seen.captions]


def test_image_reward_needs_no_captions(seen):
    wordless = Rollout(seen.trajectory, (), seen.logits, seen.decode)
    assert torch.equal(ImageReward(brightness)(wordless), ImageReward(brightness)(seen))


def test_wrong_shape_is_refused(seen):
    with pytest.raises(ValueError, match=r"reward `mean` returned shape \(\); .* \(8,\)"):
        ImageReward(lambda images, captions: images.mean(), name="mean")(seen)


def test_weights_are_those_of_normalised_rewards(seen):
    """A reward a thousand times as large counts no more: each is normalised in its group before it is weighted."""
    settings = GRPOSettings(group_size=4, std_floor=1e-9)
    large = ImageReward(lambda images, captions: 1000 * brightness(images, captions), weight=0.5, name="large")
    found, _ = trajectory_advantages([DiscriminatorReward(weight=2.0), large], seen, settings)
    parts = [group_advantages(r, 4, std_floor=1e-9).values for r in (DiscriminatorReward()(seen), large(seen))]
    torch.testing.assert_close(found.values, 2 * parts[0] + 0.5 * parts[1].expand(3, -1))


def test_names():
    assert DiscriminatorReward().name == "discriminator"
    assert ImageReward(brightness).name == "brightness"
    assert ImageReward(brightness, name="light").name == "light"


def test_brightness_runs_from_black_to_white():
    images = torch.stack([torch.full((3, 2, 2), value) for value in (-1.0, 0.0, 1.0)])
    assert brightness(images, ["", "", ""]).tolist() == [0.0, 0.5, 1.0]


def test_sharpness_is_the_mean_absolute_laplacian_of_the_luminance():
    """By torch's convolution, on pixels in [0, 1]; the luminance is Pillow's."""
    images = torch.rand(3, 3, 9, 7) * 2 - 1
    gray = (images / 2 + 0.5).mul(torch.tensor([299.0, 587.0, 114.0])[:, None, None] / 1000).sum(1, keepdim=True)
    kernel = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])[None, None]
    expected = torch.nn.functional.conv2d(gray, kernel).abs().mean((1, 2, 3))
    torch.testing.assert_close(sharpness(images, ()), expected)


def test_sharpness_falls_with_blur_and_rises_with_noise():
    images = draw_batch(16, seed=0, index=0)["image"]
    blurred = torch.nn.functional.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    noisy = (images + 0.3 * torch.randn_like(images)).clamp(-1, 1)
    low, middle, high = (sharpness(batch, ()) for batch in (blurred, images, noisy))
    assert (low < middle).all()
    assert (middle < high).all()  # it can be hacked
    assert ImageReward(sharpness).name == "sharpness"
