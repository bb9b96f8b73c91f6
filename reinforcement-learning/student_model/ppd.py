"""Proximal policy distillation (Spigler 2025, arXiv:2407.15134): PPO with a term for the KL to the teacher.

    loss = PPO's loss + weight * E[max(r, clip(r, 1 - eps, 1 + eps)) * KL(teacher || student)]

r is the ratio of the action's probabilities under the current student and the student that collected the rollout; eps
is PPO's clip range. The student collects the rollouts and is also trained on rewards, so it can become better than its
teacher. The teacher runs once on each observation. Unlike in the paper, the weight falls linearly to 0 during
training, as in kickstarting (arXiv:1803.03835): a constant weight would keep the student close to a worse teacher.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.vec_env import VecEnv, VecNormalize
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Normal, kl_divergence

from kd.common.outputs import Outputs
from kd.reinforcement_learning.data.rollouts import predict, to_outputs
from kd.reinforcement_learning.student_model.student import StudentSpec
from kd.reinforcement_learning.teacher_model.policies import PolicyNetwork
from kd.reinforcement_learning.teacher_model.training import recipe_environments


class DistillationSamples(NamedTuple):
    """A minibatch of Stable-Baselines3's rollout buffer, with the teacher's outputs."""

    observations: Tensor
    actions: Tensor
    old_values: Tensor
    old_log_prob: Tensor
    advantages: Tensor
    returns: Tensor
    teacher: Outputs


class DistillationRollouts(RolloutBuffer):
    """A rollout buffer that runs the teacher once per rollout."""

    teacher: nn.Module

    def reset(self) -> None:
        super().reset()
        self.teacher_outputs: dict[str, Tensor] = {}

    def _get_samples(  # type: ignore[override]
        self, batch_inds: np.ndarray, env: VecNormalize | None = None
    ) -> DistillationSamples:
        if not self.teacher_outputs:  # the observations are flat here: (steps * environments, ...)
            self.teacher_outputs = predict(self.teacher, torch.as_tensor(self.observations))
        outputs = {name: values[batch_inds].to(self.device) for name, values in self.teacher_outputs.items()}
        return DistillationSamples(*super()._get_samples(batch_inds, env), to_outputs(outputs))


class PPD(PPO):
    """PPO with a teacher: a network for the observations of the environments, which is not saved."""

    def __init__(self, *args: Any, teacher: nn.Module, teacher_weight: float = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, **({"rollout_buffer_class": DistillationRollouts} | kwargs))
        self.teacher_weight = teacher_weight
        assert isinstance(self.rollout_buffer, DistillationRollouts)
        self.rollout_buffer.teacher = teacher

    def train(self) -> None:
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        clip: float = self.clip_range(self._current_progress_remaining)  # type: ignore[operator]
        for _ in range(self.n_epochs):
            for samples in self.rollout_buffer.get(self.batch_size):
                loss = self._loss(samples, clip)  # type: ignore[arg-type]
                self.policy.optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
                self.policy.optimizer.step()
        self._n_updates += self.n_epochs

    def _loss(self, samples: DistillationSamples, clip: float) -> Tensor:
        discrete = isinstance(self.action_space, spaces.Discrete)
        distribution = self.policy.get_distribution(samples.observations)
        actions = samples.actions.long().flatten() if discrete else samples.actions
        ratio = (distribution.log_prob(actions) - samples.old_log_prob).exp()  # (batch,)
        clipped = ratio.clamp(1 - clip, 1 + clip)

        advantages = samples.advantages
        if self.normalize_advantage and len(advantages) > 1:
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        reward = torch.min(ratio * advantages, clipped * advantages).mean()
        value = F.mse_loss(self.policy.predict_values(samples.observations).flatten(), samples.returns)
        divergence = kl_divergence(_distribution(samples.teacher), distribution.distribution)  # type: ignore[arg-type]
        divergence = divergence if discrete else divergence.sum(-1)  # (batch,)
        distillation = (torch.max(ratio, clipped) * divergence).mean()
        entropy = distribution.entropy()
        assert entropy is not None  # of a categorical or Gaussian distribution
        terms = -reward + self.vf_coef * value - self.ent_coef * entropy.mean()
        remaining = max(0.0, self._current_progress_remaining)  # negative in a rollout that ends after the last step
        return terms + self.teacher_weight * remaining * distillation


def _distribution(outputs: Outputs) -> Distribution:
    if outputs.logits is not None:
        return Categorical(logits=outputs.logits, validate_args=False)
    features = outputs.features or {}
    return Normal(features["mean"], features["log_std"].exp(), validate_args=False)


def ppd_environments(spec: StudentSpec, seed: int) -> tuple[VecEnv, PolicyNetwork]:
    """Environments for student and teacher, and the teacher's network for their observations.

    The teacher's statistics, if any, normalize observations unless the student has a bottleneck. The student's recipe
    determines whether rewards are normalized.
    """
    teacher, network = spec.teacher, spec.teacher.network
    assert isinstance(network, PolicyNetwork), "an average of teachers has no statistics"
    statistics = None if spec.args.codebooks else teacher.agent.statistics
    environments = recipe_environments(teacher.environment, spec.recipe, seed, norm_obs=False, fixed=statistics)
    if statistics is not None:
        temperature = network.temperature
        network = PolicyNetwork(teacher.agent.policy).to(network.device).eval()
        network.temperature = temperature
    return environments, network
