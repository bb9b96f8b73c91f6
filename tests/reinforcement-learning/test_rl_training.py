"""Training from reward, and from reward and a teacher."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from torch import nn

from kd.common.outputs import Outputs
from kd.common.utils.errors import UserError
from kd.reinforcement_learning.data.environments import training_environments
from kd.reinforcement_learning.data.rollouts import returns_of
from kd.reinforcement_learning.student_model.ppd import PPD, DistillationSamples
from kd.reinforcement_learning.teacher_model.policies import greedy
from kd.reinforcement_learning.teacher_model.recipes import (
    TABLE,
    algorithm_class,
    check_steps,
    linear,
    training_recipe,
)
from kd.reinforcement_learning.teacher_model.teacher import Agent
from kd.reinforcement_learning.teacher_model.training import new_teacher, train
from kd_testing import known_answer  # noqa: F401 - registers the environments

SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "ppo": ("CartPole-v1", {"environments": 2, "normalize": True, "n_steps": 32, "batch_size": 32, "n_epochs": 2}),
    "dqn": (
        "CartPole-v1",
        {"learning_starts": 50, "buffer_size": 300, "batch_size": 32, "target_update_interval": 64},
    ),
    "sac": ("Pendulum-v1", {"learning_starts": 50, "buffer_size": 300, "batch_size": 16}),
}


class Interrupted(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", SMALL)
def test_resumed_training_gives_the_same_policy(algorithm, tmp_path):
    environment, changes = SMALL[algorithm]
    recipe = training_recipe(algorithm, environment, changes)

    def run(folder: Path, interrupted_at: int | None) -> tuple[dict[str, torch.Tensor], Any, Any]:
        logs = 0

        def evaluate(_: BaseAlgorithm) -> dict[str, float]:
            nonlocal logs
            logs += 1
            if logs == interrupted_at:
                raise Interrupted
            return {"logs": float(logs)}

        model = new_teacher(environment, recipe, seed=0)
        history = train(model, 500, folder, seed=0, evaluate=evaluate)
        agent = Agent.trained("", model)
        steps = [row["environment_steps"] for row in history]
        return model.policy.state_dict(), None if agent.statistics is None else agent.statistics.mean, steps

    weights, mean, steps = run(tmp_path / "whole", None)
    with pytest.raises(Interrupted):
        run(tmp_path / "interrupted", 7)
    assert list((tmp_path / "interrupted").glob("checkpoint-*/state.json"))
    again, mean_again, steps_again = run(tmp_path / "interrupted", None)
    assert steps_again == steps and len(steps) >= 5 and steps[-1] >= 500
    assert np.array_equal(mean, mean_again)
    for name, value in weights.items():
        assert torch.equal(value, again[name]), name


def test_every_row_of_the_table_builds_a_model():
    import yaml

    for algorithm, rows in yaml.safe_load(TABLE.read_text()).items():
        for environment in rows:
            recipe = training_recipe(algorithm, environment, {"buffer_size": 10} if algorithm != "ppo" else None)
            known = {"default": "Pendulum-v1" if algorithm == "sac" else "CartPole-v1", "ALE": "ALE/Pong-v5"}
            kind = algorithm_class(algorithm)
            policy = "CnnPolicy" if environment == "ALE" else "MlpPolicy"
            name = known.get(environment, environment)
            kind(policy, training_environments(name, 1, 0), device="cpu", **recipe.keywords)


def test_recipes():
    recipe = training_recipe("ppo", "CartPole-v1", {"steps": 7, "gamma": 0.5})
    assert (recipe.steps, recipe.environments, recipe.normalize) == (7, 8, False)
    assert recipe.keywords["gamma"] == 0.5 and recipe.keywords["learning_rate"](0.25) == pytest.approx(0.00025)
    assert training_recipe("ppo", "ALE/Breakout-v5").keywords["n_steps"] == 128
    assert training_recipe("ppo", "Swimmer-v5").keywords == {"gamma": 0.9999}
    assert training_recipe("ppo", "Hopper-v5").keywords["policy_kwargs"]["activation_fn"] is nn.ReLU
    with pytest.raises(ValueError, match="no activation function Bent"):
        training_recipe("ppo", "CartPole-v1", {"policy_kwargs": {"activation_fn": "Bent"}})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"learning_rate": math.nan}, "learning_rate must be a finite number"),
        ({"learning_rate": math.inf}, "learning_rate must be a finite number"),
        ({"learning_rate": -1e-3}, "learning_rate must be a finite number"),
        ({"learning_rate": "linear_nan"}, "learning_rate must be a finite number"),
        ({"learning_rate": "linear_x"}, "learning_rate must be a number or linear_NUMBER"),
        ({"learning_rate": 0}, "above 0, got 0"),
        ({"clip_range": -0.1}, "clip_range must be"),
        ({"gamma": 1.01}, "gamma must be a finite number, between 0 and 1, got 1.01"),
        ({"gamma": "linear_0.9"}, "gamma must be"),
        ({"gae_lambda": None}, "gae_lambda must be"),
        ({"n_steps": 0}, "n_steps must be a whole number"),
        ({"n_steps": 1.5}, "n_steps must be a whole number"),
        ({"batch_size": True}, "batch_size must be a whole number"),
        ({"environments": 0}, "environments must be a whole number"),
        ({"ent_coef": "auto"}, "ent_coef must be"),
        ({"normalize": "yes"}, "normalize must be true or false"),
        ({"policy": "x"}, "ppo has no hyper-parameter policy"),
        ({"policy_kwargs": {"activation_fn": "functional"}}, "no activation function functional"),
    ],
)
def test_hyper_parameters_out_of_range_raise_an_error(changes, expected):
    with pytest.raises(ValueError, match=expected):
        training_recipe("ppo", "CartPole-v1", changes)


@pytest.mark.parametrize(
    ("algorithm", "changes", "expected"),
    [
        (
            "ppo",
            {"steps": 255},
            r"n_steps \* environments = 32 \* 8 = 256 steps, and the training has 255",
        ),
        ("ppo", {"batch_size": 96}, "batch_size 96 does not divide"),
        ("dqn", {"steps": 100, "learning_starts": 100}, "raise --teacher_steps or lower learning_starts"),
        ("dqn", {"buffer_size": 10**15}, "buffer_size must be"),
        ("dqn", {"buffer_size": 10**12}, "invalid hyper-parameters of dqn: Unable to allocate"),
        ("ppo", {"policy_kwargs": {"net_arch": [-1]}}, "invalid hyper-parameters of ppo"),
    ],
)
def test_incompatible_hyper_parameters_raise_an_error_before_training(algorithm, changes, expected):
    with pytest.raises((UserError, ValueError), match=expected):
        new_teacher("CartPole-v1", training_recipe(algorithm, "CartPole-v1", changes), seed=0)


def test_every_row_of_the_table_is_consistent():
    import yaml

    for algorithm, rows in yaml.safe_load(TABLE.read_text()).items():
        for environment in rows:
            check_steps(training_recipe(algorithm, environment))
    assert training_recipe("sac", "Pendulum-v1", {"ent_coef": "auto_0.1"}).keywords["ent_coef"] == "auto_0.1"


class Expert(nn.Module):
    """The optimal policy of a known-answer environment."""

    def __init__(self, environment: str = "KnownAnswer-v0") -> None:
        super().__init__()
        self.discrete, self.scale, self.calls = environment == "KnownAnswer-v0", nn.Parameter(torch.tensor(5.0)), 0

    def forward(self, observations: torch.Tensor, value: bool = True) -> Outputs:
        self.calls += 1
        if self.discrete:
            return Outputs(logits=self.scale * observations, features={})
        mean = torch.stack([observations[:, 0], -observations[:, 1]], 1)
        return Outputs(features={"mean": mean, "log_std": torch.full_like(mean, -1.0)})


SETTINGS: dict[str, Any] = {
    "n_steps": 32,
    "batch_size": 64,
    "n_epochs": 3,
    "ent_coef": 0.01,
    "seed": 0,
    "device": "cpu",
}


def proximal(weight: float, teacher: nn.Module, environment: str = "KnownAnswer-v0", **changes: Any) -> PPD:
    environments = training_environments(environment, 4, 0)
    return PPD("MlpPolicy", environments, teacher=teacher, teacher_weight=weight, **(SETTINGS | changes))


def differs(one: PPO, other: PPO) -> bool:
    states = [model.policy.state_dict() for model in (one, other)]
    return any(not torch.allclose(value, states[1][name], atol=1e-4) for name, value in states[0].items())


@pytest.mark.parametrize("environment", ["KnownAnswer-v0", "KnownAnswerBox-v0"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"clip_range_vf": 0.05}, {"target_kl": 1e-5}, {"target_kl": 1e-5, "clip_range_vf": 0.05}],
    ids=str,
)
def test_ppd_without_teacher_weight_is_ppo(environment, changes):
    """The same weights, early stops and log as PPO after four rollouts."""
    environments = training_environments(environment, 4, 0)
    ppo = PPO("MlpPolicy", environments, **SETTINGS | changes).learn(512)
    ppd = proximal(0.0, Expert(environment), environment, **changes).learn(512)
    assert ppo._n_updates == ppd._n_updates and (ppo._n_updates < 12) == ("target_kl" in changes)
    assert not changes or differs(ppo, proximal(0.0, Expert(environment), environment).learn(512))
    for name, value in ppo.policy.state_dict().items():
        assert torch.allclose(value, ppd.policy.state_dict()[name], rtol=0, atol=1e-6), name
    logged, expected = ppd.logger.name_to_value, ppo.logger.name_to_value
    assert logged.keys() >= expected.keys()
    for name in ("entropy_loss", "policy_gradient_loss", "value_loss", "clip_fraction", "explained_variance"):
        assert logged[f"train/{name}"] == pytest.approx(expected[f"train/{name}"], rel=1e-4, abs=1e-6), name


def test_teacher_runs_once_per_rollout_and_is_not_trained():
    teacher = Expert()
    proximal(1.0, teacher).learn(3 * 128)
    assert teacher.calls == 3 and teacher.scale.grad is None and teacher.scale == 5.0


def test_teacher_improves_ppo():
    def reached(weight: float) -> float:
        model = proximal(weight, Expert(), learning_rate=1e-2, n_epochs=10).learn(2048)
        return float(returns_of(greedy(Agent.trained("", model).network()), "KnownAnswer-v0", 40, 9)[0].mean())

    alone, with_teacher = reached(0.0), reached(5.0)
    assert with_teacher > alone + 0.5, (alone, with_teacher)


@pytest.mark.parametrize(("ratio", "factor"), [(0.5, 0.8), (0.9, 0.9), (1.0, 1.0), (1.1, 1.1), (2.0, 2.0)])
@pytest.mark.parametrize(("remaining", "weight"), [(1.0, 3.0), (0.5, 1.5), (-0.2, 0.0)])
def test_distillation_term_matches_its_formula(ratio, factor, remaining, weight):
    """3 * remaining * max(r, clip(r, 0.8, 1.2)) * KL(teacher || student), where r is the ratio of the probabilities of
    the current and the collecting policy. The weight is not negative in a rollout that ends after the last step.
    """
    model, teacher = proximal(3.0, Expert(), vf_coef=0.0, ent_coef=0.0, n_epochs=1), Expert()
    model._current_progress_remaining = remaining
    rows = torch.randn(64, 4)
    distribution = model.policy.get_distribution(rows)
    actions = distribution.sample()
    collecting = distribution.log_prob(actions).detach() - math.log(ratio)
    none = torch.zeros(64)
    samples = DistillationSamples(rows, actions[:, None].float(), none, collecting, none, none, teacher(rows))
    p, q = teacher(rows).logits.softmax(-1), distribution.distribution.probs
    expected = weight * factor * (p * (p / q).log()).sum(-1).mean()
    assert model._loss(samples)[0].item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)


def test_linear_schedule_ends_at_zero():
    schedule = linear(0.1)
    assert [schedule(remaining) for remaining in (1.0, 0.5, 0.0, -0.6)] == [0.1, 0.05, 0.0, 0.0]


def test_every_version_of_an_environment_has_its_tuned_row():
    for old, new in (
        ("Hopper-v4", "Hopper-v5"),
        ("Walker2d-v4+time_feature", "Walker2d-v5"),
        ("Swimmer-v3", "Swimmer-v5"),
    ):
        assert training_recipe("ppo", old) == training_recipe("ppo", new) != training_recipe("ppo", "Other-v0")
    assert training_recipe("ppo", "Hopper-v4").keywords["vf_coef"] == 0.835671
    assert training_recipe("ppo", "mine:Hopper-v4") == training_recipe("ppo", "Other-v0")
