"""CLIPScore as a reward, against torchmetrics and on a real cycle."""

from __future__ import annotations

import pytest
import torch
from torchmetrics.functional.multimodal import clip_score
from transformers import CLIPModel, CLIPProcessor

from advdmd_lightning.embedded import locate
from advdmd_lightning.flow import Renoising
from advdmd_lightning.rewards import CLIPScoreReward, ImageReward, Rollout, brightness
from advdmd_lightning.shapes.stream import draw_batch
from tests.training import CAPTIONS, fit, rollout, tiny_backbone, tiny_module


class TensorCLIP(CLIPModel):
    """CLIPModel whose features are tensors, as torchmetrics 1.9 expects them; transformers 5 wraps them."""

    def get_image_features(self, *args, **kwargs):
        return super().get_image_features(*args, **kwargs).pooler_output

    def get_text_features(self, *args, **kwargs):
        return super().get_text_features(*args, **kwargs).pooler_output


@pytest.fixture(scope="module")
def reward():
    return CLIPScoreReward()


@pytest.fixture(scope="module")
def seen():
    samples = rollout(tiny_module().roles.generator, Renoising(), group_size=4)
    captions = [caption for caption in CAPTIONS[:2] for _ in range(4)]
    return Rollout(samples, captions, lambda *_: [], tiny_backbone().decode)


def test_equals_torchmetrics(reward):
    """On images of 8 bits, one by one, right and wrong captions."""
    folder = locate("embedded://shapes-clip", "key")
    parts = TensorCLIP.from_pretrained(folder, dtype=torch.float32).eval(), CLIPProcessor.from_pretrained(folder)
    batch = draw_batch(6, seed=3, index=0, held_out=True)
    levels = ((batch["image"] + 1) * 127.5).round().byte()
    captions = [*batch["caption"], *batch["caption"][1:], batch["caption"][0]]
    found = reward.score(torch.cat([levels, levels]).float() / 127.5 - 1, captions)
    with torch.no_grad():
        expected = [clip_score(levels[i % 6], captions[i], lambda: parts).clamp(min=0) for i in range(12)]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-3)
    assert found[:6].mean() > found[6:].mean() + 10


def test_knows_what_is_seen(reward):
    """Held-out captions: the image's own scores above those of other images, hardly ever below."""
    batch = draw_batch(64, seed=4, index=0, held_out=True)
    own, other = (reward.score(batch["image"].roll(shift, 0), batch["caption"]) for shift in (0, 1))
    assert (own > other).float().mean() > 0.9


def test_one_score_per_image_of_a_rollout(reward, seen):
    scores = reward(seen)
    assert scores.shape == (8,)
    assert scores.dtype == torch.float32
    assert not scores.requires_grad
    assert ((scores >= 0) & (scores <= 100)).all()
    assert reward.name == "clip_score"


def test_micro_batches_and_repeated_captions_change_nothing(seen):
    images = draw_batch(7, seed=0, index=0)["image"]
    captions = [CAPTIONS[i % 2] for i in range(7)]
    whole, parts = (CLIPScoreReward(micro_batch=size).score(images, captions) for size in (64, 3))
    torch.testing.assert_close(whole, parts)
    alone = torch.cat([CLIPScoreReward().score(images[i : i + 1], captions[i : i + 1]) for i in range(7)])
    torch.testing.assert_close(whole, alone, rtol=1e-4, atol=1e-3)


def test_equal_captions_are_encoded_once(monkeypatch, seen):
    reward, read = CLIPScoreReward(), []
    tokenizer = type(reward.clip.tokenizer)
    plain = tokenizer.__call__
    monkeypatch.setattr(tokenizer, "__call__", lambda self, text, **k: read.append(text) or plain(self, text, **k))
    reward(seen)
    assert read == [CAPTIONS[:2]]


def test_other_sizes_and_precisions(reward):
    batch = draw_batch(8, seed=1, index=0)
    small = reward.score(batch["image"], batch["caption"])
    large = torch.nn.functional.interpolate(batch["image"], scale_factor=4, mode="nearest")
    torch.testing.assert_close(reward.score(large, batch["caption"]), small, rtol=0, atol=10)
    half = reward.score(batch["image"].bfloat16(), batch["caption"])
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, small, rtol=0, atol=3)


def test_score_below_zero_is_zero(reward):
    batch = draw_batch(64, seed=2, index=0)
    scores = reward.score(batch["image"].roll(1, 0), batch["caption"])
    assert scores.min() == 0


def test_takes_part_in_a_cycle_and_leaves_no_trace_in_the_module(tmp_path, seen):
    module = tiny_module(rewards=[CLIPScoreReward(weight=0.5), ImageReward(brightness)])
    assert not any("clip" in name for name in module.state_dict())
    ours = {id(weight) for reward in module.rewards[:1] for weight in reward.clip.model.parameters()}
    assert not ours & {id(weight) for weight in module.parameters()}
    fit(module, tmp_path)
    assert {"reward_mean/clip_score", "reward_std/clip_score", "reward_mean/brightness"} <= module.last_metrics.keys()


def test_settings_are_checked(tmp_path):
    with pytest.raises(ValueError, match=r"rewards\.init_args\.micro_batch: got 0"):
        CLIPScoreReward(micro_batch=0)
    with pytest.raises(ValueError, match=r"rewards\.init_args\.pretrained: expected the folder of a CLIPModel"):
        CLIPScoreReward(str(tmp_path))


def test_captions_must_fit(reward):
    with pytest.raises(ValueError, match="`clip_score` got 2 images and 1 captions"):
        reward.score(torch.zeros(2, 3, 24, 24), CAPTIONS[:1])
