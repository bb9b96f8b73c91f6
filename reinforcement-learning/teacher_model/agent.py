"""A Stable-Baselines3 policy with the statistics of its observations."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.td3.policies import TD3Policy
from torch import Tensor, nn

from kd.common.outputs import Outputs
from kd.common.utils.devices import best_device
from kd.common.utils.errors import UserError
from kd.common.utils.finite import check_finite_weights, non_finite_tensor
from kd.reinforcement_learning.teacher_model.files import TeacherFiles
from kd.reinforcement_learning.teacher_model.policies import network_of
from kd.reinforcement_learning.teacher_model.saved_policy import behind_vec_normalize, load_policy
from kd.reinforcement_learning.teacher_model.statistics import ObservationStatistics, read_statistics

MODEL, STATISTICS = "model.zip", "vecnormalize.pkl"


class PolicyNetwork(nn.Module):
    """Raw observations (batch, ...) -> Outputs, as in policies.py; logits are divided by `temperature`."""

    mean: Tensor | None
    std: Tensor | None

    def __init__(self, policy: BasePolicy, statistics: ObservationStatistics | None = None) -> None:
        super().__init__()
        self.network, self.temperature = network_of(policy), 1.0
        self.clip = float("inf") if statistics is None else statistics.clip
        for name in ("mean", "std"):
            value = None if statistics is None else torch.as_tensor(getattr(statistics, name), dtype=torch.float32)
            self.register_buffer(name, value)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, observations: Tensor, value: bool = True) -> Outputs:
        if self.mean is not None and self.std is not None:
            observations = ((observations - self.mean) / self.std).clamp(-self.clip, self.clip)
        outputs: Outputs = self.network(observations, value=value)
        logits = None if outputs.logits is None else outputs.logits / self.temperature
        return Outputs(logits=logits, features=outputs.features)


@dataclass
class Agent:
    """A teacher, control or student. `model` is the algorithm of the policy, None if only the policy was loaded.

    `source`: where the statistics of its observations come from, for the report. `warnings`: what is uncertain about
    a loaded policy.
    """

    name: str
    policy: BasePolicy
    statistics: ObservationStatistics | None = None
    model: BaseAlgorithm | None = None
    source: str = "none"
    warnings: tuple[str, ...] = ()

    @classmethod
    def load(
        cls,
        files: TeacherFiles,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        trust_pickle: bool = False,
    ) -> "Agent":
        """Raises UserError for damaged files, and for a policy of other spaces."""
        algorithm, policy = load_policy(files.policy, observation_space, action_space, trust_pickle)
        if is_image_space(observation_space):
            policy.to(best_device())  # networks for anything smaller are faster on the CPU
        if (weight := non_finite_tensor(policy)) is not None:
            raise UserError(f"{files.policy} has weights that are not finite ({weight}): its training diverged")
        name, warnings = f"{algorithm} {files.policy.stem}", files.warnings
        if files.statistics is None:
            if not files.raw and behind_vec_normalize(files.policy):
                warnings += (
                    f"{files.policy} was trained behind VecNormalize, and no statistics were found: observations are "
                    "not normalized, which is right only if VecNormalize normalized rewards; else pass --vecnormalize",
                )
            return cls(name, policy, warnings=warnings)
        statistics, source = read_statistics(files.statistics), str(files.statistics)
        if statistics is None:
            source += " (leaves observations as they are)"
        else:
            statistics.check(observation_space, files.statistics)
        return cls(name, policy, statistics, source=source, warnings=warnings)

    @classmethod
    def trained(cls, name: str, model: BaseAlgorithm) -> "Agent":
        """The agent of a model trained by this process, with the statistics of its VecNormalize if it has one."""
        normalizer = model.get_vec_normalize_env()
        statistics = None
        if normalizer is not None and normalizer.norm_obs:
            means: Any = normalizer.obs_rms
            statistics = ObservationStatistics(means.mean, means.var, normalizer.epsilon, normalizer.clip_obs)
        return cls(
            name, model.policy, statistics, model, "none" if statistics is None else "VecNormalize of its training"
        )

    @property
    def deterministic(self) -> bool:
        """Whether it outputs actions without a distribution, as TD3 and DDPG do."""
        return isinstance(self.policy, TD3Policy)

    def network(self) -> PolicyNetwork:
        """The policy's network, in eval mode on the policy's device, sharing its weights."""
        return PolicyNetwork(self.policy, self.statistics).to(self.policy.device).eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes model.zip, as Stable-Baselines3 saves it, and vecnormalize.pkl."""
        assert self.model is not None, "only a whole model can be saved"
        check_finite_weights(self.policy, when=f"at the end of the training of {self.name}")
        self.model.save(Path(folder, MODEL))
        if self.statistics is not None:
            normalizer = self.model.get_vec_normalize_env()
            assert normalizer is not None
            normalizer.save(str(Path(folder, STATISTICS)))
