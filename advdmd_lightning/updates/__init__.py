"""What each update of a cycle minimises: the equations, applied to the roles on one rollout."""

from advdmd_lightning.updates.critic import Accuracy, Critic, critic_of
from advdmd_lightning.updates.draws import draw_steps, draw_times
from advdmd_lightning.updates.generator import GeneratorLoss, generator_losses
from advdmd_lightning.updates.gradients import add_gradients, gradient_norm, take_gradients
from advdmd_lightning.updates.guidance import GuidanceLoss, guidance_loss, real_score_loss
from advdmd_lightning.updates.measures import (
    POLICY_METRICS,
    MeanMetrics,
    accuracy_metrics,
    mean_over_processes,
    reward_metrics,
    sample_metrics,
)
from advdmd_lightning.updates.micro_batches import micro_batches, portions
from advdmd_lightning.updates.policy import passes, pathwise_losses, policy_losses, trajectory_advantages

__all__ = [
    "POLICY_METRICS",
    "Accuracy",
    "Critic",
    "GeneratorLoss",
    "GuidanceLoss",
    "MeanMetrics",
    "accuracy_metrics",
    "add_gradients",
    "critic_of",
    "draw_steps",
    "draw_times",
    "generator_losses",
    "gradient_norm",
    "guidance_loss",
    "mean_over_processes",
    "micro_batches",
    "passes",
    "pathwise_losses",
    "policy_losses",
    "portions",
    "real_score_loss",
    "reward_metrics",
    "sample_metrics",
    "take_gradients",
    "trajectory_advantages",
]
