"""Students with a key-value bottleneck: keys are fitted once and values are trained, in every stage."""

from pathlib import Path
from typing import Any, cast

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from torch import Tensor, nn

from kd.common.metrics.cost import parameters
from kd.common.utils.errors import UserError
from kd.reinforcement_learning.data.environments import Environments, SB3Environments
from kd.reinforcement_learning.data.rollouts import Observations, Recorder, returns_of
from kd.reinforcement_learning.student_model.arguments import DistillArguments, StudentArguments
from kd.reinforcement_learning.student_model.distillation import Distillation, DistillationTask, Distiller
from kd.reinforcement_learning.student_model.student import (
    StudentNetwork,
    StudentSpec,
    new_student,
    share_bodies,
    validate_student,
)
from kd.reinforcement_learning.teacher_model.bottleneck import BottleneckFeatures
from kd.reinforcement_learning.teacher_model.policies import ObservationStatistics, greedy
from kd.reinforcement_learning.teacher_model.recipes import PolicyRunArguments, training_recipe
from kd.reinforcement_learning.teacher_model.run import PolicyRun
from kd.reinforcement_learning.teacher_model.saved_policy import load_policy
from kd.reinforcement_learning.teacher_model.teacher import Agent, Teacher
from kd_testing import known_answer  # noqa: F401 - registers the environments

ENVIRONMENT = "KnownAnswer-v0"
RECIPE = training_recipe(
    "ppo", ENVIRONMENT, {"environments": 2, "n_steps": 64, "batch_size": 64, "n_epochs": 2, "normalize": True}
)
BOTTLENECK = StudentArguments(student=[], codebooks=16, codebook_size=32)


def arguments(**changes: Any) -> DistillArguments:
    return DistillArguments(**({"steps": 600, "rounds": 3, "updates": 30, "batch_size": 64, "num_envs": 4} | changes))


def student(environment: str = ENVIRONMENT, args: StudentArguments = BOTTLENECK, seed: int = 0) -> PPO:
    return new_student(SB3Environments(environment, 2), args, RECIPE, seed)


def spec(args: StudentArguments = BOTTLENECK) -> StudentSpec:
    """The teacher is optimal; its statistics are a mean of 5 and a standard deviation of 2."""
    teacher = student(args=StudentArguments(student=[]))
    with torch.no_grad():
        cast(nn.Linear, teacher.policy.action_net).weight.copy_(6 * torch.eye(4))
    agent = Agent("teacher", teacher.policy, ObservationStatistics(np.full(4, 5.0), np.full(4, 4.0), 0.0, 10.0))
    return StudentSpec(Teacher(ENVIRONMENT, (agent,), agent.network().cpu(), ENVIRONMENT), args, RECIPE)


def task(one: StudentSpec, seed: int = 0) -> DistillationTask:
    environments = Environments(ENVIRONMENT, 4, seed)
    network = StudentNetwork(one.new(seed).policy, one.teacher.agent.statistics)
    buffer = Observations(10_000, (4,), torch.float32)
    return DistillationTask(Recorder(environments), one.teacher.network, network, buffer)


def extractor(policy: Any) -> BottleneckFeatures:
    assert isinstance(policy.features_extractor, BottleneckFeatures)
    return policy.features_extractor


def fitted(policy: Any) -> dict[str, Tensor]:
    """The fitted statistics and keys, and the projections."""
    return {name: value.clone() for name, value in extractor(policy).named_buffers()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def test_keys_are_fitted_in_the_first_round_and_only_values_are_trained(tmp_path):
    one, rounds = task(spec()), []
    before = extractor(one.student.policy).bottleneck.values.clone()

    def evaluate() -> dict[str, float]:
        rounds.append(fitted(one.student.policy))
        return {}

    Distiller([one], arguments(), tmp_path, 0).learn(evaluate)
    bottleneck = extractor(one.student.policy).bottleneck
    for later in rounds[1:]:
        assert_equal(rounds[0], later)
    first = one.buffer.observations[:200]  # of 600
    assert torch.allclose(rounds[0]["mean"], first.mean(0)) and bottleneck.frozen
    assert bottleneck.key_statistics((first - rounds[0]["mean"]) / rounds[0]["std"])["usage"] > 0.9
    assert not torch.equal(bottleneck.values, before)


def test_distilled_student_with_a_bottleneck_solves_most_steps(tmp_path):
    one = task(spec())
    Distiller([one], arguments(steps=1800, updates=80, learning_rate=0.03), tmp_path, 0).learn(dict)
    returns, _ = returns_of(greedy(StudentNetwork(one.student.folded_policy(), None)), ENVIRONMENT, 50, seed=9)
    assert returns.mean() > 8  # random actions 2.5, the teacher 10


class Interrupted(Exception):
    pass


def test_resumed_distillation_does_not_fit_the_keys_again(tmp_path, monkeypatch):
    fits = []
    fit = BottleneckFeatures.fit
    monkeypatch.setattr(BottleneckFeatures, "fit", lambda self, rows: (fits.append(len(rows)), fit(self, rows)))

    def run(folder: Path, interrupt: bool) -> dict[str, Tensor]:
        one = task(spec())
        distiller = Distiller([one], arguments(), folder, 0)

        def evaluate() -> dict[str, float]:
            if interrupt and len(distiller.history) == 1:
                raise Interrupted
            return {}

        distiller.learn(evaluate)
        return one.student.state_dict()

    whole = run(tmp_path / "whole", interrupt=False)
    with pytest.raises(Interrupted):
        run(tmp_path / "interrupted", interrupt=True)
    assert fits == [200, 200]
    assert_equal(whole, run(tmp_path / "interrupted", interrupt=False))
    assert len(fits) == 2


def test_all_stages_use_the_same_student_with_the_same_keys(tmp_path):
    """Even with normalized rewards and a teacher with statistics, the student receives raw observations."""
    folders = (str(tmp_path / name) for name in ("run", "other"))
    args = [PolicyRunArguments(output_dir=folder, eval_episodes=2, report_to=["none"]) for folder in folders]
    run, other = (PolicyRun([ENVIRONMENT], one) for one in args)
    one = spec()
    stages = Distillation(run, [one], arguments())
    agents = [stages.student(), stages.control(), Distillation(other, [one], arguments()).ppd_student(1.0)]
    policies = [of[ENVIRONMENT].policy for of in agents]
    for policy in policies[1:]:
        assert parameters(policy) == parameters(policies[0])
        assert_equal(fitted(policy), fitted(policies[0]))
        assert not torch.equal(extractor(policy).bottleneck.values, extractor(policies[0]).bottleneck.values)
    loaded = stages.control()[ENVIRONMENT].policy  # the finished stage
    assert_equal(loaded.state_dict(), policies[1].state_dict())


def test_saved_student_selects_the_same_actions(tmp_path):
    model = student("CartPole-v1", StudentArguments(student=[8], codebooks=5, codebook_size=7, key_dim=3))
    rows = np.random.default_rng(0).normal(size=(200, 4)).astype(np.float32)
    StudentNetwork(model.policy, None).prepare(torch.as_tensor(rows))
    with torch.no_grad():
        extractor(model.policy).bottleneck.values.normal_()
    expected = model.predict(rows, deterministic=True)[0]
    assert len(set(expected.tolist())) == 2
    model.save(tmp_path / "student.zip")
    loaded = [PPO.load(tmp_path / "student.zip", device="cpu").policy]
    for trust in (False, True):
        spaces = model.observation_space, model.action_space
        loaded.append(load_policy(tmp_path / "student.zip", *spaces, trust_pickle=trust)[1])
    for policy in loaded:
        assert np.array_equal(policy.predict(rows, deterministic=True)[0], expected)
        assert_equal(policy.state_dict(), model.policy.state_dict())


def test_parameter_counts():
    """16 codebooks of 32 values of 4 numbers, decoded to 16 features; then linear heads to 4 actions and a value."""
    assert parameters(student().policy) == 16 * 32 * 4 + (16 * 4 * 16 + 16) + (16 * 4 + 4) + (16 + 1)


def test_students_of_several_environments_share_layers_after_the_bottleneck():
    args = StudentArguments(student=[8], codebooks=4, codebook_size=8)
    first, twin = student(args=args).policy, student(args=args, seed=1).policy
    share_bodies([first, twin])
    assert twin.mlp_extractor.policy_net[0] is first.mlp_extractor.policy_net[0]
    assert extractor(twin).bottleneck is not extractor(first).bottleneck


def test_bottleneck_for_frames_raises_an_error():
    frames = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    with pytest.raises(UserError, match=r"shape \(4, 84, 84\): leave out --codebooks"):
        validate_student(StudentArguments(codebooks=16), "Frames-v0", frames)


@pytest.mark.parametrize(
    "wrong", [{"codebooks": -1}, {"codebook_size": 0}, {"codebook_size": 2**16 + 1}, {"key_dim": 0}]
)
def test_invalid_sizes_raise_an_error(wrong):
    with pytest.raises(ValueError, match="--(codebooks|codebook_size|key_dim) must be"):
        StudentArguments(**wrong)
