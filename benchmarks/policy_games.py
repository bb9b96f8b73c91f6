"""Games with the same observations and actions, so that one student can play several, for `policy_streams.py`."""

from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import gymnasium
import numpy as np
import torch
import torch.nn.functional as F
from gymnasium import spaces
from torch import Tensor, nn

from kd.common.outputs import Outputs
from kd.reinforcement_learning.data.environments import Environments
from kd.reinforcement_learning.data.rollouts import Recorder, random_actions
from kd.reinforcement_learning.teacher_model.policies import sampling
from kd.reinforcement_learning.teacher_model.teacher import load_agent

ENVIRONMENTS = 16  # that collect at the same time
LOWEST = -20.0  # the teacher's logit of an action that its game does not have


class Shared(gymnasium.Wrapper):
    """A game with `width` observed numbers, the last of them zeros, then `marks`, and with `actions` actions, of which
    those that the game does not have repeat its last one. `mirrored` reverses the order of the game's actions.
    """

    def __init__(
        self, env: gymnasium.Env, width: int, actions: int, mirrored: bool = False, marks: tuple[float, ...] = ()
    ) -> None:
        super().__init__(env)
        assert isinstance(env.action_space, spaces.Discrete) and env.observation_space.shape is not None
        self.mirrored, self.last = mirrored, int(env.action_space.n) - 1
        missing = width - env.observation_space.shape[0]
        self.more = np.array([0.0] * missing + list(marks), np.float32)
        self.observation_space = spaces.Box(-np.inf, np.inf, (width + len(marks),))
        self.action_space = spaces.Discrete(actions)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        observation, infos = self.env.reset(seed=seed, options=options)
        return np.append(observation, self.more), infos

    def step(self, action: Any) -> Any:
        action = min(int(action), self.last)
        observation, *rest = self.env.step(self.last - action if self.mirrored else action)
        return np.append(observation, self.more), *rest


class SharedTeacher(nn.Module):
    """The network of a game's agent for the observations and actions of `Shared`."""

    def __init__(self, network: nn.Module, width: int, actions: int, mirrored: bool) -> None:
        super().__init__()
        self.network, self.width, self.actions, self.mirrored = network, width, actions, mirrored

    def forward(self, observations: Tensor, value: bool = True) -> Outputs:
        logits = self.network(observations[:, : self.width], value=False).logits
        logits = logits.flip(-1) if self.mirrored else logits
        return Outputs(logits=F.pad(logits, (0, self.actions - logits.shape[1]), value=LOWEST))


@dataclass(frozen=True)
class Game:
    """`environment`: its id, which is registered."""

    environment: str
    teacher: SharedTeacher

    def environments(self, seed: int) -> Environments:
        return Environments(self.environment, ENVIRONMENTS, seed)

    def observations(self, number: int, seed: int) -> Tensor:
        """At least `number` observations (rows, width): half under random actions, half under the teacher's."""
        with closing(self.environments(seed)) as environments:
            acts = random_actions(environments.action_space), sampling(self.teacher, torch.Generator())
            recorder = Recorder(environments)
            return torch.cat([recorder.collect(act, number // 2) for act in acts])


def pairs(cartpole: str, acrobot: str) -> dict[str, tuple[Game, Game]]:
    """The pairs of a first and a second game, of two agents.

    The observations of Acrobot and CartPole differ: Acrobot's first two numbers are the cosine and sine of an angle,
    and CartPole's last two are zero. The mirrored CartPole has the same states with the opposite actions.
    """
    cart, padded = (partial(_game, cartpole, "CartPole-v1", 4, *shape) for shape in ((4, 2), (6, 3)))
    return {
        "CartPole, then Acrobot": (padded(), _game(acrobot, "Acrobot-v1", 6, 6, 3)),
        "CartPole, then mirrored and marked": (cart(marks=(0.0,)), cart(mirrored=True, marks=(1.0,))),
        "CartPole, then mirrored": (cart(), cart(mirrored=True)),
    }


def _game(
    agent: str,
    base: str,
    size: int,
    width: int,
    actions: int,
    mirrored: bool = False,
    marks: tuple[float, ...] = (),
) -> Game:
    """The game `base`, with `size` observed numbers, as `Shared`, with the teacher `agent`."""
    marked = "".join(f"{mark:g}" for mark in marks)
    name = f"Shared{width}{'Mirrored' if mirrored else ''}{marked and f'Mark{marked}'}{base}"
    gymnasium.register(
        name, lambda: Shared(gymnasium.make(base, disable_env_checker=True), width, actions, mirrored, marks)
    )
    return Game(name, SharedTeacher(load_agent(agent, base).network(), size, actions, mirrored))
