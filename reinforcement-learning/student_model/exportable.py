"""Policies for `python -m kd.common.export`: raw observations -> actions.

Exports are compared with Stable-Baselines3's `predict` on observations of the environment.
"""

from contextlib import closing

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from torch import Tensor, nn

from kd.common.export.exportable import Exportable
from kd.common.utils.errors import UserError
from kd.reinforcement_learning.data.environments import Environments
from kd.reinforcement_learning.data.observations import from_box, to_box
from kd.reinforcement_learning.data.rollouts import VALIDATION_SEED, Recorder
from kd.reinforcement_learning.data.specs import environment_code, registration_code
from kd.reinforcement_learning.teacher_model.policies import (
    ObservationStatistics,
    PolicyNetwork,
    greedy,
    greedy_actions,
)
from kd.reinforcement_learning.teacher_model.teacher import load_agent

TOLERANCE = 1e-4  # in the units of the actions; Discrete actions must be equal
USAGE = """{register}import gymnasium

environments = gymnasium.make_vec({environment}, num_envs=2)
observations, _ = environments.reset(seed=0)
for _ in range(10):
    actions = model({inputs})
    observations, rewards, *_ = environments.step(actions)
print(actions)"""


class GreedyPolicy(nn.Module):
    """Maps the observations of an environment, (batch, ...) named `observations` or the parts of a Dict by key, to
    actions: the most probable ones (batch,) or (batch, components), or the means (batch, actions) clipped to a Box.
    """

    low: Tensor | None
    high: Tensor | None

    def __init__(self, network: PolicyNetwork, observations: spaces.Space, space: spaces.Space) -> None:
        super().__init__()
        self.network, self.observations = network, observations
        bounds = (space.low, space.high) if isinstance(space, spaces.Box) else (None, None)
        for name, bound in zip(("low", "high"), bounds, strict=True):
            self.register_buffer(name, None if bound is None else torch.as_tensor(bound))

    def forward(self, **observations: Tensor) -> Tensor:
        actions = greedy_actions(self.network(self.to_box(observations), value=False))
        return actions if self.low is None else actions.clamp(self.low, self.high)

    def to_box(self, named: dict[str, Tensor]) -> Tensor:
        return to_box(
            named if isinstance(self.observations, spaces.Dict) else named["observations"], self.observations
        )


def load(name: str, task: str | None, vecnormalize: str | None = None) -> Exportable:
    """Loads the policy in a zip file or folder for the environment `task`, with the statistics in the file
    `vecnormalize` (default: the file named like the policy; none: no statistics). Raises UserError if there is no
    policy.
    """
    if task is None:
        raise UserError(f"the environment of {name} is unknown: pass --task, such as --task CartPole-v1")
    agent = load_agent(name, task, vecnormalize=vecnormalize)
    if agent.recurrent:
        raise UserError(f"{name} is recurrent, and its actions depend on earlier observations: export a student of it")
    policy = agent.policy.cpu()
    network = agent.network()
    with closing(Environments(task, 4, VALIDATION_SEED)) as environments:
        observations = Recorder(environments).collect(greedy(network), 200)  # (200, ...)
        space = environments.original_space
    original, is_dict = from_box(observations.numpy(), space), isinstance(space, spaces.Dict)
    named = original if isinstance(original, dict) else {"observations": original}
    exported = GreedyPolicy(network, space, policy.action_space).eval()

    def predict(**named: Tensor) -> Tensor:
        return torch.as_tensor(_predict(policy, agent.statistics, exported.to_box(named).numpy()))

    return Exportable(
        exported,
        inputs=_first(named, 2),
        test_inputs=[_first(named, 1), _first(named, len(observations))],
        axes={0: "batch"},
        usage=USAGE.format(
            environment=environment_code(task),
            register=registration_code(task),
            inputs="observations" if is_dict else '{"observations": observations}',
        ),
        output="actions",
        reference=predict,
        tolerance=TOLERANCE,
    )


def _first(named: dict[str, np.ndarray], rows: int) -> dict[str, Tensor]:
    return {name: torch.as_tensor(values[:rows]) for name, values in named.items()}


def _predict(policy: BasePolicy, statistics: ObservationStatistics | None, observations: np.ndarray) -> np.ndarray:
    """The actions of Stable-Baselines3 for observations, which are normalized first, as in VecNormalize."""
    if statistics is not None:
        normalized = (observations - statistics.mean) / statistics.std
        observations = np.clip(normalized, -statistics.clip, statistics.clip).astype(np.float32)
    return policy.predict(observations, deterministic=True)[0]
