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
from stable_baselines3.common.utils import explained_variance
from stable_baselines3.common.vec_env import VecEnv, VecNormalize
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal, kl_divergence

from kd.common.outputs import Outputs
from kd.reinforcement_learning.data.rollouts import predict, to_outputs
from kd.reinforcement_learning.student_model.student import StudentSpec
from kd.reinforcement_learning.teacher_model.networks import ActorCritic
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
    """PPO with a teacher: a network for the observations of the environments, which is not saved.

    All hyper-parameters of PPO apply, also `clip_range_vf` and `target_kl`. It logs what PPO logs, as means over the
    minibatches, and the distillation loss.
    """

    def __init__(self, *args: Any, teacher: nn.Module, teacher_weight: float = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, **({"rollout_buffer_class": DistillationRollouts} | kwargs))
        self.teacher_weight = teacher_weight
        assert isinstance(self.rollout_buffer, DistillationRollouts)
        self.rollout_buffer.teacher = teacher

    def train(self) -> None:
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        logs: list[dict[str, Tensor]] = []
        for _ in range(self.n_epochs):
            finished = self._train_epoch(logs)
            self._n_updates += 1
            if not finished:
                break
        for name in logs[0]:
            self.logger.record(f"train/{name}", torch.stack([log[name] for log in logs]).mean().item())
        self._log_state()

    def _log_state(self) -> None:
        rollout = self.rollout_buffer
        explained = explained_variance(rollout.values.flatten(), rollout.returns.flatten())
        state = {"explained_variance": explained, "clip_range": self._now(self.clip_range)}
        if self.clip_range_vf is not None:
            state["clip_range_vf"] = self._now(self.clip_range_vf)
        if isinstance(self.action_space, spaces.Box):
            state["std"] = self.policy.log_std.exp().mean().item()
        for name, value in state.items():
            self.logger.record(f"train/{name}", value)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    def _train_epoch(self, logs: list[dict[str, Tensor]]) -> bool:
        """Updates the policy once on each minibatch, and appends the parts of each loss to `logs`. Like PPO it stops,
        and returns False, when the policy is further than `target_kl` from that of the rollout.
        """
        for samples in self.rollout_buffer.get(self.batch_size):
            loss, log = self._loss(samples)  # type: ignore[arg-type]
            logs.append(log)
            if self.target_kl is not None and log["approx_kl"] > 1.5 * self.target_kl:
                return False
            self.policy.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
            self.policy.optimizer.step()
        return True

    def _loss(self, samples: DistillationSamples) -> tuple[Tensor, dict[str, Tensor]]:
        outputs: Outputs = ActorCritic(self.policy)(samples.observations)
        distribution = _distribution(outputs)
        actions = samples.actions.flatten() if isinstance(self.action_space, spaces.Discrete) else samples.actions
        log_ratio = distribution.log_prob(actions) - samples.old_log_prob  # (batch,)
        ratio, clip = log_ratio.exp(), self._now(self.clip_range)
        clipped = ratio.clamp(1 - clip, 1 + clip)

        advantages = samples.advantages
        if self.normalize_advantage and len(advantages) > 1:
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        reward = torch.min(ratio * advantages, clipped * advantages).mean()
        value = self._value_loss(samples, (outputs.features or {})["value"])
        divergence = kl_divergence(_distribution(samples.teacher), distribution)  # (batch,)
        distillation = (torch.max(ratio, clipped) * divergence).mean()
        entropy = distribution.entropy().mean()
        remaining = max(0.0, self._current_progress_remaining)  # negative in a rollout that ends after the last step
        loss = -reward + self.vf_coef * value - self.ent_coef * entropy
        loss = loss + self.teacher_weight * remaining * distillation
        parts = {"policy_gradient_loss": -reward, "value_loss": value, "distillation_loss": distillation, "loss": loss}
        parts |= {"entropy_loss": -entropy, "approx_kl": (ratio - 1 - log_ratio).mean()}
        parts["clip_fraction"] = ((ratio - 1).abs() > clip).float().mean()
        return loss, {name: part.detach() for name, part in parts.items()}

    def _value_loss(self, samples: DistillationSamples, values: Tensor) -> Tensor:
        if self.clip_range_vf is not None:
            clip = self._now(self.clip_range_vf)
            values = samples.old_values + (values - samples.old_values).clamp(-clip, clip)
        return F.mse_loss(values, samples.returns)

    def _now(self, schedule: Any) -> float:
        """The value of a schedule of PPO at this point of the training."""
        return float(schedule(self._current_progress_remaining))


def _distribution(outputs: Outputs) -> Distribution:
    """The distribution of a batch of actions, whose components are independent."""
    if outputs.logits is not None:
        categories = Categorical(logits=outputs.logits, validate_args=False)
        return Independent(categories, outputs.logits.dim() - 2, validate_args=False)
    features = outputs.features or {}
    return Independent(
        Normal(features["mean"], features["log_std"].exp(), validate_args=False), 1, validate_args=False
    )


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
