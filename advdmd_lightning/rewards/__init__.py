"""Rewards: the online discriminator at every step, and rewards of the final image."""

from advdmd_lightning.rewards.base import Reward, Rollout
from advdmd_lightning.rewards.clip_score import CLIPScoreReward
from advdmd_lightning.rewards.discriminator import DiscriminatorReward
from advdmd_lightning.rewards.image import ImageReward, brightness, sharpness

__all__ = ["CLIPScoreReward", "DiscriminatorReward", "ImageReward", "Reward", "Rollout", "brightness", "sharpness"]
