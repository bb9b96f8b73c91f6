"""The Distiller: solvable environments, collected observations, resumed distillations."""

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from torch import nn

from kd.common.outputs import Outputs
from kd.common.utils.errors import UserError
from kd.reinforcement_learning.data.environments import Environments, SB3Environments
from kd.reinforcement_learning.data.rollouts import (
    Observations,
    Recorder,
    mixture,
    play,
    play_in,
    random_actions,
    returns_of,
)
from kd.reinforcement_learning.student_model.arguments import DistillArguments, StudentArguments
from kd.reinforcement_learning.student_model.distillation import DistillationTask, Distiller
from kd.reinforcement_learning.student_model.evaluation import policy_agreement, random_metrics
from kd.reinforcement_learning.student_model.matching import check_loss, policy_and_value
from kd.reinforcement_learning.student_model.student import StudentNetwork, new_student
from kd.reinforcement_learning.teacher_model.policies import PolicyNetwork, greedy, sampling
from kd.reinforcement_learning.teacher_model.recipes import training_recipe
from kd_testing import known_answer  # noqa: F401 - registers the environments


def model(environment: str, hidden: list[int], seed: int = 0) -> PPO:
    sizes = StudentArguments(student=hidden)
    return new_student(SB3Environments(environment, 1), sizes, training_recipe("ppo", environment), seed)


class Expert(nn.Module):
    """The optimal policy of the known-answer environments, as a teacher."""

    def __init__(self, discrete: bool) -> None:
        super().__init__()
        self.discrete, self.scale = discrete, nn.Parameter(torch.tensor(3.0))

    def forward(self, observations: torch.Tensor, value: bool = True) -> Outputs:
        features = {"value": observations.float().mean(1)}
        if self.discrete:
            return Outputs(logits=self.scale * observations, features=features)
        mean = torch.stack([observations[:, 0], -observations[:, 1]], 1)
        return Outputs(features=features | {"mean": mean, "log_std": torch.full_like(mean, -2.0)})


def task(environment: str, teacher: nn.Module, student: PPO, count: int = 4, seed: int = 0) -> DistillationTask:
    environments = Environments(environment, count, seed)
    buffer = Observations(100_000, environments.observation_space.shape or (), torch.float32)
    return DistillationTask(Recorder(environments), teacher, StudentNetwork(student.policy, None), buffer)


def arguments(**changes: Any) -> DistillArguments:
    return DistillArguments(**({"steps": 800, "rounds": 4, "updates": 50, "batch_size": 64, "num_envs": 4} | changes))


def no_metrics() -> dict[str, float]:
    return {}


@pytest.mark.parametrize(
    ("environment", "loss"), [("KnownAnswer-v0", "mse"), ("KnownAnswer-v0", "kl"), ("KnownAnswerBox-v0", "kl")]
)
def test_a_linear_student_solves_the_known_answers_exactly(environment, loss, tmp_path):
    discrete = environment == "KnownAnswer-v0"
    student = model(environment, [])
    one = task(environment, Expert(discrete), student)
    args = arguments(loss=loss, learning_rate=0.05, updates=150, steps=2000)
    Distiller([one], args, tmp_path, 0).learn(no_metrics)
    returns, _ = returns_of(greedy(one.student), environment, 100, seed=123)
    assert len(returns) == 100
    if discrete:  # 1,000 optimal actions
        assert (returns == 10.0).mean() > 0.95 and returns.mean() > 9.97
    else:
        assert returns.min() > 9.9
    if loss == "mse":
        assert (returns == 10.0).all()


def test_identical_student_has_zero_loss_and_equal_network_converges_to_it(tmp_path):
    teacher = model("CartPole-v1", [8], seed=1)
    with torch.no_grad():
        teacher.policy.action_net.weight.mul_(100)  # an untrained head is nearly uniform
    network = PolicyNetwork(teacher.policy)
    twin = model("CartPole-v1", [8], seed=2)
    twin.policy.load_state_dict(teacher.policy.state_dict())
    rows = torch.randn(500, 4)
    objective = policy_and_value("kl", 0.5, 1.0, teacher.action_space).objective
    with torch.no_grad():
        parts = objective(StudentNetwork(twin.policy, None)(rows), network(rows), None)
    assert {name: part.item() for name, part in parts.items()} == {"policy": 0.0, "value": 0.0}

    one = task("CartPole-v1", network, model("CartPole-v1", [8], seed=3))
    history = Distiller([one], arguments(updates=500, learning_rate=0.01), tmp_path, 0).learn(no_metrics)
    assert history[-1]["loss_policy"] < 1e-3
    assert history[-1]["agreement"] > 0.97


def test_every_round_collects_observations_even_with_fewer_steps_than_rounds(tmp_path):
    teacher = PolicyNetwork(model("CartPole-v1", [8]).policy)
    one = task("CartPole-v1", teacher, model("CartPole-v1", []))
    history = Distiller([one], arguments(steps=1, rounds=3, updates=1), tmp_path, 0).learn(no_metrics)
    assert len(history) == 3 and len(set(one.round_ends)) == 4


def test_restart_steps_add_no_observation():
    """An episode of these environments has ten actions and then a step that only restarts."""
    environments = Environments("KnownAnswer-v0", 3)
    seen: list[tuple[np.ndarray, np.ndarray]] = []
    step = environments.step

    def spy(actions: np.ndarray) -> Any:
        before = environments.observations.copy(), environments.acting.copy()
        seen.append(before)
        return step(actions)

    environments.step = spy
    rows = Recorder(environments).collect(greedy(Expert(True)), 90)
    assert len(rows) == 90 and len(seen) == 32  # 30 steps of three environments, and two restarts
    assert [acting.all() for _, acting in seen].count(False) == 2
    assert np.array_equal(rows.numpy(), np.concatenate([observation[acting] for observation, acting in seen]))


@pytest.mark.parametrize(
    ("rollout_policy", "expected"),
    [("teacher", [1, 1, 1]), ("student", [0, 0, 0]), ("dagger", [1, 0, 0]), ("mixed", [1, None, 0])],
)
def test_rollout_policies(rollout_policy, expected, tmp_path, monkeypatch):
    """The teacher always goes right and the student always left, so that the actions show which policy acted."""

    class Always(nn.Module):
        def __init__(self, action: int) -> None:
            super().__init__()
            self.logits = nn.Parameter(torch.tensor([40.0, -40.0] if action == 0 else [-40.0, 40.0]))

        def forward(self, observations: torch.Tensor, value: bool = True) -> Outputs:
            return Outputs(logits=self.logits.expand(len(observations), 2), features={})

    one = task("CartPole-v1", Always(1), model("CartPole-v1", []))
    one.student.forward = Always(0).forward
    monkeypatch.setattr(Distiller, "_fit", lambda self, number: {"loss": 0.0})
    Distiller([one], arguments(rollout_policy=rollout_policy, rounds=3, steps=600), tmp_path, 0).learn(no_metrics)
    shares = [
        float(np.mean(one.recorder.actions[start:end]))
        for start, end in zip(one.round_ends[:-1], one.round_ends[1:], strict=True)
    ]
    for share, wanted in zip(shares, expected, strict=True):
        assert 0.3 < share < 0.7 if wanted is None else share == wanted


def test_mixture_chooses_for_each_environment():
    zeros, ones = (lambda rows, value=value: torch.full((len(rows),), value) for value in (0, 1))
    act = mixture(ones, zeros, 0.25, torch.Generator().manual_seed(0))
    assert act(torch.zeros(4000, 3)).float().mean().item() == pytest.approx(0.25, abs=0.03)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("environment", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize("at", [1, 3])
def test_resumed_distillation_gives_the_same_student(environment, at, tmp_path):
    teacher = PolicyNetwork(model(environment, [32], seed=7).policy)

    def run(folder: Path, interrupted_at: int | None) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
        one = task(environment, teacher, model(environment, [8]))
        distiller = Distiller([one], arguments(rollout_policy="mixed", steps=200, updates=10), folder, seed=5)
        calls = 0

        def evaluate() -> dict[str, float]:
            nonlocal calls
            calls += 1
            if calls == interrupted_at:
                raise Interrupted
            return {}

        history = distiller.learn(evaluate)
        return one.student.state_dict(), [{k: v for k, v in row.items() if k != "cpu_seconds"} for row in history]

    weights, history = run(tmp_path / "whole", None)
    with pytest.raises(Interrupted):
        run(tmp_path / "interrupted", at + 1)
    again, history_again = run(tmp_path / "interrupted", None)
    assert history_again == history
    for name, value in weights.items():
        assert torch.equal(value, again[name]), name


def test_seed_determines_the_student(tmp_path):
    def run(name: str, seed: int) -> torch.Tensor:
        one = task("CartPole-v1", PolicyNetwork(model("CartPole-v1", [8], seed=1).policy), model("CartPole-v1", [8]))
        Distiller([one], arguments(steps=200, updates=10), tmp_path / name, seed).learn(no_metrics)
        return one.student.state_dict()["network.policy.action_net.weight"]

    first = run("a", 0)
    assert torch.equal(first, run("b", 0))
    assert not torch.equal(first, run("c", 1))


def test_buffer_overwrites_oldest_observations_with_their_teacher_outputs():
    buffer = Observations(10, (4,), torch.float32)
    rows = torch.randn(25, 4)
    for chunk in rows.split(7):
        buffer.append(chunk, Expert(True))
    assert len(buffer) == 10 and buffer.seen == 25
    (observations, teacher), *_ = buffer.batches(10, 1, torch.Generator(), torch.device("cpu"))
    assert torch.equal(teacher.logits, 3 * observations)
    assert {tuple(row) for row in observations.tolist()} == {tuple(row) for row in rows[-10:].tolist()}


def test_buffer_keeps_the_last_rows_of_an_append_beyond_its_capacity():
    buffer = Observations(10, (4,), torch.float32)
    rows = torch.randn(35, 4)
    buffer.append(rows, Expert(True))
    (observations, teacher), *_ = buffer.batches(10, 1, torch.Generator(), torch.device("cpu"))
    assert torch.equal(teacher.logits, 3 * observations)
    assert {tuple(row) for row in observations.tolist()} == {tuple(row) for row in rows[-10:].tolist()}


def test_batches_contain_every_row_once_per_pass():
    buffer = Observations(64, (4,), torch.float32)
    buffer.append(torch.randn(64, 4), Expert(True))
    batches = [rows for rows, _ in buffer.batches(16, 4, torch.Generator(), torch.device("cpu"))]
    assert len({tuple(row) for rows in batches for row in rows.tolist()}) == 64


def test_value_is_learned_in_the_units_of_the_teacher(tmp_path):
    class LargeValues(Expert):
        def forward(self, observations: torch.Tensor, value: bool = True) -> Outputs:
            outputs = super().forward(observations, value)
            return Outputs(logits=outputs.logits, features={"value": 1000 + 50 * observations[:, 0]})

    one = task("KnownAnswer-v0", LargeValues(True), model("KnownAnswer-v0", []))
    Distiller([one], arguments(updates=300, learning_rate=0.02), tmp_path, 0).learn(no_metrics)
    rows = torch.randn(50, 4)
    with torch.no_grad():
        values = PolicyNetwork(one.student.folded_policy())(rows).features["value"]
    assert torch.allclose(values, 1000 + 50 * rows[:, 0], atol=5)


def test_non_finite_loss_raises_an_error(tmp_path):
    one = task("KnownAnswer-v0", Expert(True), model("KnownAnswer-v0", [8]))
    with torch.no_grad():
        one.student.policy.action_net.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="not finite in round 1 .*--learning_rate"):
        Distiller([one], arguments(), tmp_path, 0).learn(no_metrics)
    assert not list(tmp_path.iterdir())


def test_losses_that_do_not_fit_raise_an_error():
    discrete, box = (Environments(name, 1).action_space for name in ("CartPole-v1", "Pendulum-v1"))
    with pytest.raises(UserError, match="--loss nll needs discrete actions"):
        check_loss("nll", box)
    with pytest.raises(UserError, match="--loss mse or huber"):
        check_loss("kl", box, deterministic_teacher=True)
    check_loss("nll", discrete)
    check_loss("mse", box, deterministic_teacher=True)


def test_play_counts_complete_episodes_of_every_environment():
    returns, met, lengths = play(greedy(Expert(True)), Environments("KnownAnswer-v0", 3), 7)
    assert returns.tolist() == [10.0] * 7 and len(met) == 70 and lengths.tolist() == [10] * 7
    random = random_metrics("KnownAnswer-v0", Environments("KnownAnswer-v0", 1).action_space, 200)
    assert random["return_mean"] == pytest.approx(2.5, abs=0.4)
    drawn = play(
        random_actions(Environments("KnownAnswerBox-v0", 1).action_space), Environments("KnownAnswerBox-v0", 2), 4
    ).returns
    assert len(drawn) == 4 and (drawn < 9).all()


def test_returns_are_in_the_order_of_the_environments():
    """So the returns of two policies are paired by their starts, whichever episodes end first."""

    def returns(episodes: int) -> np.ndarray:
        left = lambda rows: torch.zeros(len(rows), dtype=torch.long)  # noqa: E731
        return returns_of(left, "LunarLander-v3", episodes, seed=3)[0]

    first, all_three = returns(20), returns(60)  # of 20 environments
    assert np.array_equal(all_three[::3], first) and (np.diff(first) < 0).any()


@pytest.mark.parametrize("environment", ["LunarLander-v3", "CartPole-v1"])
def test_all_policies_play_the_same_episodes(environment):
    """Every episode starts in the same state, although episodes before it had other lengths and random events."""

    def observed(action: int) -> set[tuple[float, ...]]:
        played = play_in(environment, lambda rows: torch.full((len(rows),), action), 30, seed=5)
        return set(map(tuple, played.observations.tolist()))

    with closing(Environments(environment, 30, seed=5)) as environments:
        starts = set(map(tuple, environments.observations.tolist()))
    assert starts <= observed(0) and starts <= observed(1)


def test_policy_agreement():
    space = Environments("CartPole-v1", 1).action_space
    student, teacher = (
        {"logits": torch.tensor([[2.0, 0.0], [0.0, 1.0]])},
        {"logits": torch.tensor([[1.0, 0.0], [3.0, 1.0]])},
    )
    assert policy_agreement(student, student, space) == {"agreement": 1.0, "kl": 0.0}
    assert policy_agreement(student, teacher, space)["agreement"] == 0.5
    box = Environments("Pendulum-v1", 1).action_space  # from -2 to 2
    student, teacher = {"mean": torch.tensor([[9.0], [0.0]])}, {"mean": torch.tensor([[2.0], [1.0]])}
    assert policy_agreement(student, teacher, box) == {"agreement": pytest.approx(1 - (0 + 1 / 4) / 2)}


def test_sampling_does_not_use_the_global_generator():
    state = torch.get_rng_state()
    sampling(Expert(True), torch.Generator().manual_seed(0))(torch.randn(4, 4))
    torch.set_rng_state(state)
    before = torch.rand(1)
    torch.set_rng_state(state)
    sampling(Expert(True), torch.Generator().manual_seed(0))(torch.zeros(4, 4))
    assert torch.equal(torch.rand(1), before)


def test_a_share_of_the_environments_collects_with_greedy_actions(tmp_path):
    one = task("CartPole-v1", PolicyNetwork(model("CartPole-v1", [8]).policy), model("CartPole-v1", [8], seed=1))
    distiller = Distiller([one], arguments(greedy_share=0.5), tmp_path, 0)
    act, rows = distiller._rollout_policy(one, 1), torch.randn(4, 4)
    actions = torch.stack([act(rows) for _ in range(100)])  # (draws, environments)
    assert (actions[:, :2] == greedy(one.student)(rows[:2])).all()
    assert (actions[:, 2:].float().std(0) > 0).all(), "the others sample"
