"""Rewards: the online discriminator at every step, and rewards of the final image."""

from advdmd_lightning.rewards.base import Reward, Rollout
from advdmd_lightning.rewards.discriminator import DiscriminatorReward
from advdmd_lightning.rewards.image import ImageReward, brightness

__all__ = ["DiscriminatorReward", "ImageReward", "Reward", "Rollout", "brightness"]
