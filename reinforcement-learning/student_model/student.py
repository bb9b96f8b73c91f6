"""Students: Stable-Baselines3 PPO models of any size.

A student is distilled on standardized observations and values. The statistics are then folded into its first and last
layers, so that `PPO.load("student.zip")` works on raw observations without this project. A student with a key-value
bottleneck standardizes observations itself, and needs this project.
"""

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor, nn

from kd.common.cli import reject_unused
from kd.common.outputs import Outputs
from kd.common.utils.errors import UserError
from kd.reinforcement_learning.data.environment_ids import student_environment
from kd.reinforcement_learning.data.environments import training_environments
from kd.reinforcement_learning.student_model.arguments import StudentArguments
from kd.reinforcement_learning.teacher_model import policies
from kd.reinforcement_learning.teacher_model.bottleneck import BottleneckFeatures, moments
from kd.reinforcement_learning.teacher_model.networks import ActorCritic
from kd.reinforcement_learning.teacher_model.policies import ObservationStatistics, PolicyNetwork
from kd.reinforcement_learning.teacher_model.recipes import TrainingRecipe
from kd.reinforcement_learning.teacher_model.saved_policy import read_model
from kd.reinforcement_learning.teacher_model.teacher import MODEL, Agent, Teacher, columns_of_both

FEATURES = 16  # width of the output of a bottleneck

cloudpickle.register_pickle_by_value(policies)  # a zip contains FrameFeatures and loads without this project


@dataclass(frozen=True)
class StudentSpec:
    """A teacher, and the sizes and the PPO recipe of its students and their control."""

    teacher: Teacher
    args: StudentArguments
    recipe: TrainingRecipe

    @property
    def environment(self) -> str:
        """The environment of the students, which differs from the teacher's if they observe otherwise."""
        return student_environment(self.teacher.shared)

    @property
    def columns(self) -> slice | None:
        """The student's part of the observations of `teacher.shared`. The state of a recurrent teacher follows."""
        if self.environment != self.teacher.environment:
            return columns_of_both(self.teacher.agent)[1]
        return slice(0, None) if self.teacher.agent.recurrent else None

    def new(self, seed: int, environments: VecEnv | None = None, **keywords: Any) -> PPO:
        """An untrained student, initialized with `seed`, in `environments` (default: those of its recipe)."""
        if environments is None:
            environments = training_environments(self.environment, self.recipe.environments, seed)
        return new_student(environments, self.args, self.recipe, seed, **keywords)

    def load(self, name: str, folder: Path, seed: int) -> Agent:
        """Loads the student that a stage saved. Raises UserError if the file contains another model."""
        model = self.new(seed)
        _, weights = read_model(folder / MODEL)
        try:
            model.policy.load_state_dict(weights)
        except RuntimeError:  # names or shapes of weights
            raise UserError(
                f"{folder / MODEL} is not the student of this run: start over with --overwrite_output_dir"
            ) from None
        return Agent(name, model.policy, model=model, columns=self.columns)

    def with_policy(
        self, name: str, seed: int, policy: ActorCriticPolicy, folded: ObservationStatistics | None = None
    ) -> Agent:
        """A student for raw observations: the weights of `policy`, into which the statistics `folded` are folded."""
        model = self.new(seed)
        model.policy.load_state_dict(policy.state_dict())
        if folded is not None:
            fold_input(model.policy, torch.as_tensor(folded.mean), torch.as_tensor(folded.std))
        return Agent(name, model.policy, model=model, columns=self.columns)


def new_student(
    environments: VecEnv,
    args: StudentArguments,
    recipe: TrainingRecipe,
    seed: int,
    algorithm: type[PPO] = PPO,
    **more: Any,
) -> PPO:
    """An untrained PPO with the hyper-parameters of `recipe` and networks of the widths in `args`.

    Policy and value share the convolutions of frames and the layer after them, or the bottleneck.
    """
    keywords = recipe.keywords | more
    policy: dict[str, Any] = dict(keywords.pop("policy_kwargs", {}))
    value = args.student if args.student_value is None else args.student_value
    images = is_image_space(environments.observation_space)
    features: dict[str, Any]
    if images:
        features = {"features_dim": args.student[0], "channels": tuple(args.channels)}
        policy |= {"features_extractor_class": policies.FrameFeatures, "features_extractor_kwargs": features}
    elif args.codebooks:
        features = {"features_dim": FEATURES, "codebooks": args.codebooks}
        features |= {"codebook_size": args.codebook_size, "key_dim": args.key_dim}
        policy |= {"features_extractor_class": BottleneckFeatures, "features_extractor_kwargs": features}
    policy["net_arch"] = {"pi": args.student[images:], "vf": args.student[1:] if images else value}
    kind, device = ("CnnPolicy", "auto") if images else ("MlpPolicy", "cpu")  # small networks are faster on the CPU
    return algorithm(kind, environments, policy_kwargs=policy, seed=seed, device=device, **keywords)


def widths_of_share(share: float, parameters: int, inputs: int, outputs: int) -> list[int]:
    """The equal widths of two hidden layers, as large as possible with at most `share` of `parameters`, those of the
    teacher's actor. Raises UserError if a width of 1 has more.
    """
    linear, room = inputs + outputs + 2, share * parameters - outputs
    width = int((linear**2 / 4 + max(room, 0)) ** 0.5 - linear / 2)  # of width^2 + linear * width <= room
    if not width:
        raise UserError(
            f"--student_share {share:g} of {parameters:,} parameters is not enough for two hidden layers: raise it "
            "or pass --student"
        )
    return [width, width]


def validate_student(args: StudentArguments, environment: str, observations: spaces.Space) -> None:
    """Raises UserError for a student that does not fit the observations of an environment."""
    frames = is_image_space(observations)
    if frames and args.student_share is not None:
        raise UserError(f"{environment} has frames: pass --student and --channels instead of --student_share")
    if not frames:
        reject_unused(f"{environment} has no frames", args, "channels")
    if frames and not args.student:
        raise UserError(f"{environment} has frames: pass --student with the width of the layer after the convolutions")
    if args.codebooks and len(observations.shape or ()) != 1:
        raise UserError(
            f"a key-value bottleneck needs vectors, but {environment} has observations of shape "
            f"{observations.shape}: leave out --codebooks"
        )


class StudentNetwork(PolicyNetwork):
    """The student during distillation: its value is value_std * output of the value network + value_mean.

    Vectors are standardized with the teacher's statistics. If it has none, or if the student observes otherwise
    (`columns`), they are standardized with their mean and standard deviation in the first round. Unlike VecNormalize
    it does not clip observations, because clipping cannot be folded into a layer.
    """

    value_mean: Tensor
    value_std: Tensor

    def __init__(
        self, policy: ActorCriticPolicy, statistics: ObservationStatistics | None, columns: slice | None = None
    ) -> None:
        shape = policy.observation_space.shape or ()
        bottleneck = isinstance(policy.features_extractor, BottleneckFeatures)  # standardizes observations itself
        raw = bottleneck or is_image_space(policy.observation_space)
        if raw or columns is not None:  # those of the teacher are for other observations
            statistics = None
        self.fits = statistics is None and not raw
        if self.fits:
            statistics = ObservationStatistics(np.zeros(shape), np.ones(shape), 0.0, math.inf)
        super().__init__(policy, statistics, columns)
        self.clip.fill_(float("inf"))
        self.register_buffer("value_mean", torch.zeros(()))
        self.register_buffer("value_std", torch.ones(()))

    @property
    def policy(self) -> ActorCriticPolicy:
        assert isinstance(self.network, ActorCritic)
        return self.network.policy

    def prepare(self, observations: Tensor) -> None:
        """Fits the keys of a bottleneck, or the statistics of a student that has none of its teacher, to the first
        observations (rows, ...). Does nothing if they are fitted already.
        """
        observations = self.part(observations).to(self.device)
        features = self.policy.features_extractor
        if isinstance(features, BottleneckFeatures):
            if not features.bottleneck.frozen:
                features.fit(observations)
        elif self.fits and self.mean is not None and self.std is not None:
            for statistic, value in zip((self.mean, self.std), moments(observations), strict=True):
                statistic.copy_(value)
            self.fits = False

    @torch.no_grad()
    def set_value_scale(self, values: Tensor, preserve: bool) -> None:
        """Sets `value_mean` and `value_std` to those of values (rows,). With `preserve` the weights change so that the
        student's values do not (van Hasselt et al., arXiv:1602.07714).
        """
        mean, std = values.mean().to(self.device), values.std(correction=0).clamp(min=1e-6).to(self.device)
        if preserve:
            fold_output(self.policy.value_net, (self.value_mean - mean) / std, self.value_std / std)
        self.value_mean.copy_(mean)
        self.value_std.copy_(std)

    def forward(self, observations: Tensor, value: bool = True) -> Outputs:
        outputs = super().forward(observations, value)
        if outputs.features and "value" in outputs.features:
            outputs.features["value"] = outputs.features["value"] * self.value_std + self.value_mean
        return outputs

    def folded_policy(self) -> ActorCriticPolicy:
        """A copy of the policy for raw observations, with the same outputs."""
        policy = copy.deepcopy(self.policy)
        if self.mean is not None and self.std is not None:
            fold_input(policy, self.mean, self.std)
        fold_output(policy.value_net, self.value_mean, self.value_std)
        return policy


@torch.no_grad()
def fold_input(policy: ActorCriticPolicy, mean: Tensor, std: Tensor) -> None:
    """Folds the standardization of observations into the first layers: W (o - mean) / std + b."""
    paths = [(policy.mlp_extractor.policy_net, policy.action_net), (policy.mlp_extractor.value_net, policy.value_net)]
    for body, head in paths:
        layer = next((layer for layer in body if isinstance(layer, nn.Linear)), head)
        assert isinstance(layer, nn.Linear)
        weight = layer.weight.double() / std.double().flatten()  # (width, observation)
        layer.bias.copy_(layer.bias.double() - weight @ mean.double().flatten())
        layer.weight.copy_(weight)


@torch.no_grad()
def fold_output(layer: nn.Linear, mean: Tensor, std: Tensor) -> None:
    """Folds a scale into a last layer: its output becomes output * std + mean."""
    layer.weight.mul_(std)
    layer.bias.mul_(std).add_(mean)


def share_bodies(students: list[ActorCriticPolicy]) -> None:
    """Replaces layers of all students, except the heads, by the first student's layers of the same name and shape.

    Students keep layers of other shapes, such as the first layer for observations of another width, and their
    bottleneck, whose keys are fitted to one environment.
    """
    first = students[0]
    for other in students[1:]:
        if not isinstance(first.features_extractor, BottleneckFeatures):
            _share(first.features_extractor, other.features_extractor)
        _share(first.mlp_extractor, other.mlp_extractor)


def _share(first: nn.Module, other: nn.Module) -> None:
    for name, module in list(other.named_children()):
        twin = getattr(first, name, None)
        if twin is None:
            continue
        shapes = [[tuple(p.shape) for p in m.parameters()] for m in (module, twin)]
        if shapes[0] and shapes[0] == shapes[1]:
            setattr(other, name, twin)
        elif type(module) is type(twin):
            _share(twin, module)
