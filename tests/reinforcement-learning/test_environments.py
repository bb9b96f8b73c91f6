"""Environments: autoreset modes, the adapter to Stable-Baselines3, Atari games, errors."""

import runpy
import sys
import warnings
from collections.abc import Callable

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, Graph, MultiBinary, MultiDiscrete, Sequence, Tuple
from gymnasium.vector import AutoresetMode
from stable_baselines3 import DQN, PPO, SAC
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from kd.common.utils.errors import UserError
from kd.reinforcement_learning.data import environments as environments_module
from kd.reinforcement_learning.data import observations as observations_module
from kd.reinforcement_learning.data import rollouts, specs
from kd.reinforcement_learning.data.environments import Environments, SB3Environments, Step, training_environments
from kd.reinforcement_learning.data.observations import FILTER, FLATTEN
from kd.reinforcement_learning.data.specs import registration_code, time_limit_warning
from kd.reinforcement_learning.teacher_model.policies import greedy
from kd.reinforcement_learning.teacher_model.teacher import Agent
from kd_testing import known_answer
from kd_testing.known_answer import KnownAnswer, KnownAnswerBox

NEXT_STEP, SAME_STEP = AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP


def pixels(actions: int) -> Callable[[np.ndarray], np.ndarray]:
    """A policy that depends on every pixel."""
    return lambda observations: observations.reshape(len(observations), -1).sum(1, dtype=np.int64) % actions


def lander(observations: np.ndarray) -> np.ndarray:
    return (np.abs(observations).sum(1) * 1000).astype(np.int64) % 4


def rows(environments: Environments, policy: Callable[[np.ndarray], np.ndarray], steps: int) -> list[list[tuple]]:
    """The transitions of each environment: observation, reward, terminated, truncated, final observation."""
    found: list[list[tuple]] = [[] for _ in range(environments.count)]
    for _ in range(steps):
        observations, acting = environments.observations, environments.acting
        step = environments.step(policy(observations))
        for i in np.flatnonzero(acting):
            row = observations[i].tobytes(), step.rewards[i], step.terminated[i], step.truncated[i]
            found[i].append((*row, step.final_observations[i].tobytes()))
    environments.close()
    return found


@pytest.mark.parametrize(
    ("id", "policy", "steps", "kwargs"),
    [
        ("KnownAnswer-v0", lambda observations: (observations > 0).sum(1) % 4, 60, {}),
        ("KnownAnswerBox-v0", lambda observations: observations[:, :2] / 2, 60, {}),
        ("LunarLander-v3", lander, 400, {"max_episode_steps": 80}),  # crashes and time limits
        ("ALE/Breakout-v5", pixels(4), 100, {"training": True}),
        pytest.param("ALE/Pong-v5", pixels(6), 80, {"max_num_frames_per_episode": 60}, marks=pytest.mark.slow),
    ],
)
def test_both_autoreset_modes_give_the_same_transitions(id, policy, steps, kwargs):
    next_step, same_step = (rows(Environments(id, 3, 7, autoreset=mode, **kwargs), policy, steps)
                            for mode in (NEXT_STEP, SAME_STEP))  # fmt: skip
    for one, other in zip(next_step, same_step, strict=True):
        ends = sum(terminated or truncated for _, _, terminated, truncated, _ in one)
        assert ends >= 3
        assert len(other) == steps
        assert len(one) in (steps - ends, steps - ends + 1)  # a restart takes one step; the last may be missing
        assert one == other[: len(one)]


@pytest.mark.parametrize("id", ["CartPole-v1", "Acrobot-v1", "LunarLander-v3", "ALE/Breakout-v5"])
def test_one_step_after_an_episode_only_restarts(id):
    environments = Environments(id, 4, training=True)
    starts = is_initial_observation(id)
    rng, ended, ends = np.random.default_rng(0), np.zeros(4, dtype=bool), 0
    for _ in range(600 if id == "Acrobot-v1" else 300):
        np.testing.assert_array_equal(environments.acting, ~ended)
        step = environments.step(rng.integers(environments.action_space.n, size=4))
        assert not (step.rewards[ended].any() or step.terminated[ended].any() or step.truncated[ended].any())
        assert starts(environments.observations[ended]).all()
        assert step.final_observations is environments.observations
        ended = step.terminated | step.truncated
        ends += ended.sum()
    assert ends >= 4


def is_initial_observation(id: str) -> Callable[[np.ndarray], np.ndarray]:
    if id == "CartPole-v1":
        return lambda observations: np.abs(observations).max(1, initial=0) <= 0.05
    if id == "LunarLander-v3":
        return lambda observations: observations[:, 1] > 1.3  # high up
    return lambda observations: np.ones(len(observations), dtype=bool)


@pytest.mark.parametrize("mode", [NEXT_STEP, SAME_STEP])
@pytest.mark.parametrize(("id", "right"), [("KnownAnswer-v0", KnownAnswer), ("KnownAnswerBox-v0", KnownAnswerBox)])
def test_optimal_policy_has_return_ten(id, right, mode):
    environments = Environments(id, 5, autoreset=mode)
    assert returns(environments, right.right_action, 55) == [10.0] * 25
    wrong = returns(environments, lambda observations: right.right_action(-observations), 55)
    assert len(wrong) == 25
    assert max(wrong) < 5


def returns(environments: Environments, policy: Callable[[np.ndarray], np.ndarray], steps: int) -> list[float]:
    """The returns of all complete episodes."""
    environments.reset(3)
    totals, ended = np.zeros(environments.count), []
    for _ in range(steps):
        acting = environments.acting
        step = environments.step(policy(environments.observations))
        totals += np.where(acting, step.rewards, 0)
        done = step.terminated | step.truncated
        ended += totals[done].tolist()
        totals[done] = 0
    return ended


def test_seed_is_reproducible_and_differs_between_environments():
    first, second = Environments("CartPole-v1", 3, 5), Environments("CartPole-v1", 3, 5)
    start = first.observations
    np.testing.assert_array_equal(start, second.observations)
    assert len(np.unique(start, axis=0)) == 3
    first.reset()
    assert (first.observations != start).any()
    first.reset(5)
    np.testing.assert_array_equal(first.observations, start)


def test_vector_entry_points_are_used_if_they_support_the_autoreset_mode():
    names = [type(Environments("CartPole-v1", 2, autoreset=mode).vector).__name__ for mode in (None, NEXT_STEP)]
    assert names == ["CartPoleVectorEnv"] * 2
    assert type(Environments("CartPole-v1", 2, autoreset=SAME_STEP).vector).__name__ == "SyncVectorEnv"
    for mode in NEXT_STEP, SAME_STEP:
        assert type(Environments("ALE/Pong-v5", 1, autoreset=mode).vector).__name__ == "AtariVectorEnv"


@pytest.fixture
def registry():
    """Restores the registry after a test that registers environments."""
    before = dict(gym.registry)
    yield
    gym.registry.clear()
    gym.registry.update(before)


def test_nothing_is_rendered_by_default(registry):
    class Eager(KnownAnswer):
        metadata = {"render_modes": ["rgb_array"]}

        def __init__(self, render_mode="rgb_array"):
            self.render_mode = render_mode

    gym.register("Eager-v0", Eager, max_episode_steps=10)
    assert Environments("Eager-v0", 1).vector.render_mode is None
    assert Environments("Eager-v0", 1, render_mode="rgb_array").vector.render_mode == "rgb_array"


@pytest.mark.parametrize("mode", [NEXT_STEP, SAME_STEP])
def test_missing_time_limit_is_added_with_a_warning(registry, monkeypatch, mode):
    monkeypatch.setattr(specs, "EPISODE_STEPS", 7)
    gym.register("Endless-v0", KnownAnswer)
    environments = Environments("Endless-v0", 2, autoreset=mode)
    found, rows, _ = rollouts.play(
        lambda observations: torch.as_tensor(KnownAnswer.right_action(observations.numpy())), environments, 4
    )
    assert found.tolist() == [7.0] * 4 and len(rows) == 28
    assert "has no time limit: its episodes are cut after 7 steps" in (time_limit_warning("Endless-v0") or "")
    assert [time_limit_warning(id) for id in ("KnownAnswer-v0", "CartPole-v1", "ALE/Pong-v5")] == [None] * 3
    gym.register("EndlessCart-v0", vector_entry_point=gym.spec("CartPole-v1").vector_entry_point,
                 entry_point=gym.spec("CartPole-v1").entry_point)  # fmt: skip
    assert Environments("EndlessCart-v0", 2).vector.max_episode_steps == 7


@pytest.mark.parametrize("part", ["observation", "reward"])
def test_non_finite_observations_and_rewards_raise_an_error(registry, part):
    class Broken(KnownAnswer):
        def step(self, action):
            observation, reward, *rest = super().step(action)
            return (observation * np.nan, reward, *rest) if part == "observation" else (observation, np.inf, *rest)

    gym.register("Broken-v0", Broken, max_episode_steps=10)
    with pytest.raises(UserError, match="environment Broken-v0 returned an observation or a reward that is not fin"):
        Environments("Broken-v0", 2).step(np.zeros(2))


def test_actions_are_cast_to_the_dtype_of_the_action_space():
    for dtype in np.int32, np.uint8:
        Environments("ALE/Pong-v5", 2).step(np.array([2, 3], dtype=dtype))
    Environments("KnownAnswerBox-v0", 1).step([[0.5, 0.5]])


def test_package_registers_environments_as_in_gym_make(tmp_path, monkeypatch, registry):
    code = "import gymnasium as gym; gym.register('Mine-v0', 'gymnasium.envs.classic_control:CartPoleEnv')"
    (tmp_path / "my_environments.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    assert Environments("my_environments:Mine-v0", 2).observations.shape == (2, 4)


def test_registration_code_for_environments_outside_gymnasium():
    assert registration_code("CartPole-v1") == "" and registration_code("my_package:Mine-v0") == ""
    assert registration_code("ALE/Pong-v5") == "import ale_py  # registers the environment\n"


def test_known_answer_environments_can_be_registered_twice():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runpy.run_path(known_answer.__file__)
        Environments("KnownAnswer-v0", 2).step(np.zeros(2))


# Stable-Baselines3


def dummy(id: str, count: int, **kwargs) -> DummyVecEnv:
    return DummyVecEnv([lambda: gym.make(id, **kwargs)] * count)


@pytest.mark.parametrize(
    ("id", "limit", "cut"),
    [
        ("CartPole-v1", 20, {True, False}),
        ("LunarLander-v3", 90, {True, False}),
        ("KnownAnswerBox-v0", 7, {True}),
        ("Hopper-v5", 20, {True, False}),  # observations of float64
    ],
)
def test_adapter_matches_dummy_vec_env(id, limit, cut):
    ours, theirs = SB3Environments(id, 3, max_episode_steps=limit), dummy(id, 3, max_episode_steps=limit)
    ours.seed(11), theirs.seed(11)
    np.testing.assert_array_equal(ours.reset(), theirs.reset())
    ours.action_space.seed(0)
    seen = set()
    for _ in range(400):
        actions = np.stack([ours.action_space.sample() for _ in range(3)])
        (*ours_step, our_infos), (*theirs_step, their_infos) = ours.step(actions), theirs.step(actions)
        for mine, its in zip(ours_step, theirs_step, strict=True):
            np.testing.assert_array_equal(mine, its)
            assert mine.dtype == its.dtype
        for done, mine, its in zip(ours_step[2], our_infos, their_infos, strict=True):
            assert mine["TimeLimit.truncated"] is its["TimeLimit.truncated"]
            assert ("terminal_observation" in mine) == ("terminal_observation" in its) == done
            if done:
                np.testing.assert_array_equal(mine["terminal_observation"], its["terminal_observation"])
                seen.add(mine["TimeLimit.truncated"])
    assert seen == cut


def test_adapter_starts_from_its_seed():
    adapter, environments = SB3Environments("KnownAnswer-v0", 2, 4), Environments("KnownAnswer-v0", 2, 4)
    np.testing.assert_array_equal(adapter.reset(), environments.observations)
    assert (adapter.reset() != environments.observations).any()
    assert adapter.get_attr("render_mode") == [None, None]
    assert adapter.env_is_wrapped(gym.Wrapper, indices=0) == [False]
    assert not adapter.has_attr("action_masks")


@pytest.mark.parametrize(
    ("algorithm", "id", "kwargs"),
    [
        (PPO, "KnownAnswer-v0", {"n_steps": 16, "batch_size": 16, "n_epochs": 1}),
        (DQN, "KnownAnswer-v0", {"learning_starts": 8}),
        (SAC, "KnownAnswerBox-v0", {"learning_starts": 8, "buffer_size": 100, "batch_size": 8}),
    ],
)
def test_sb3_learns_and_evaluates(algorithm, id, kwargs):
    model = algorithm("MlpPolicy", training_environments(id, 2, seed=0), device="cpu", seed=0, **kwargs)
    model.learn(64)
    assert len(model.ep_info_buffer) >= 4
    assert {episode["l"] for episode in model.ep_info_buffer} == {10}
    mean, _ = evaluate_policy(model, SB3Environments(id, 2), n_eval_episodes=4, warn=False)
    returns = rollouts.play(greedy(Agent.trained("", model).network()), Environments(id, 2), 4).returns
    assert mean == pytest.approx(returns.mean(), abs=1e-4)


def test_vec_normalize_wraps_the_adapter():
    normalized = VecNormalize(training_environments("KnownAnswerBox-v0", 2, seed=0))
    PPO("MlpPolicy", normalized, n_steps=32, batch_size=32, n_epochs=1, device="cpu").learn(64)
    assert normalized.obs_rms.count > 64
    assert len(normalized.get_original_reward()) == 2


def test_ppo_learns_atari_without_opencv(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    environments = training_environments("ALE/Pong-v5", 2, seed=0)
    model = PPO("CnnPolicy", environments, n_steps=4, batch_size=8, n_epochs=1, device="cpu")
    assert model.get_env() is environments  # the channels are first already, so nothing is transposed
    model.learn(8)


# Atari


def play(environments: Environments, steps: int, seed: int = 0) -> list[Step]:
    rng = np.random.default_rng(seed)
    assert isinstance(environments.action_space, Discrete)
    actions = rng.integers(environments.action_space.n, size=(steps, environments.count))
    return [environments.step(row) for row in actions]


def test_atari_frames():
    environments = Environments("ALE/Pong-v5", 2)
    assert environments.observation_space == Box(0, 255, (4, 84, 84), np.uint8)
    assert environments.action_space == Discrete(6)
    kept = environments.observations
    copy = kept.copy()
    play(environments, 10)
    assert environments.observations.shape == (2, 4, 84, 84) and environments.observations.dtype == np.uint8
    np.testing.assert_array_equal(kept, copy)  # a caller may keep the returned arrays


def test_atari_rewards_are_clipped_in_training_only():
    earned = {}
    for training in False, True:
        steps = play(Environments("ALE/MsPacman-v5", 2, training=training), 100)
        earned[training] = {float(reward) for step in steps for reward in step.rewards}
    assert earned == {False: {0.0, 10.0}, True: {0.0, 1.0}}


def test_loss_of_life_ends_episodes_in_training_only():
    ends = {training: sum(step.terminated.sum() for step in play(Environments("ALE/Breakout-v5", 2, training=training),
                                                                 100)) for training in (False, True)}  # fmt: skip
    assert ends[False] == 0
    assert ends[True] >= 4


def test_sticky_actions_are_set_by_the_id_or_an_argument():
    environments = Environments("ALE/Pong-v5", 1)
    assert environments.vector.spec.kwargs["repeat_action_probability"] == 0.25
    assert environments.vector.spec.kwargs["num_threads"] == 1
    with_argument = [
        Environments("ALE/Pong-v5", 1, repeat_action_probability=p, noop_max=1) for p in (0.25, 0.25, 0.0)
    ]
    id = Environments("ALE/Pong-v5", 1, noop_max=1)
    for each in (*with_argument, id):
        play(each, 60)
    for other in with_argument[1], id:
        np.testing.assert_array_equal(with_argument[0].observations, other.observations)
    assert (with_argument[0].observations != with_argument[2].observations).any()


def test_training_flag_changes_only_atari_games():
    one, other = (play(Environments("KnownAnswer-v0", 2, training=training), 20) for training in (False, True))
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a.rewards, b.rewards)
        np.testing.assert_array_equal(a.final_observations, b.final_observations)


# Errors


def error_of(*args, **kwargs) -> str:
    with pytest.raises(UserError) as error:
        Environments(*args, **kwargs)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


@pytest.mark.parametrize(
    ("id", "right"),
    [
        ("LunarLander-v2", "LunarLander-v3"),
        ("CartPole-v7", "CartPole-v1"),
        ("CartPole", "CartPole-v1"),
        ("cartpol-v1", "CartPole-v1"),
        ("Hopper-v1", "Hopper-v5"),
        ("Hopper-v3", "Hopper-v5"),  # registered only to raise that it has moved
        ("ALE/Pon-v5", "ALE/Pong-v5"),
        ("KnownAnswr-v0", "KnownAnswer-v0"),
    ],
)
def test_unknown_id_suggests_the_nearest(id, right):
    message = error_of(id, 1)
    assert id in message
    assert message.endswith(f"; did you mean {right}?")


def test_dissimilar_id_suggests_nothing():
    assert error_of("no spaces!", 1) == "unknown environment no spaces!"


@pytest.mark.parametrize("count", [0, -1])
def test_number_of_environments_is_checked(count):
    assert error_of("CartPole-v1", count) == f"the number of environments must be 1 or more, not {count}"


@pytest.mark.parametrize(
    ("id", "hidden", "hint"),
    [
        ("HalfCheetah-v5", "mujoco", "gymnasium[mujoco]"),
        ("LunarLander-v3", "Box2D", "gymnasium[box2d]"),
        ("ALE/Pong-v5", "ale_py", "pip install ale_py"),
        ("phys2d/CartPole-v1", "jax", "pip install jax"),
        ("nowhere_at_all:CartPole-v1", "nowhere_at_all", "pip install nowhere_at_all"),
    ],
)
def test_error_names_the_missing_package(id, hidden, hint, monkeypatch):
    for module in list(sys.modules):
        if module.split(".")[0] == hidden or module.startswith(("gymnasium.envs.mujoco", "gymnasium.envs.box2d")):
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, hidden, None)
    message = error_of(id, 1)
    assert message.startswith(f"environment {id} cannot be made: ")
    assert hint in message


def test_error_for_missing_roms(tmp_path, monkeypatch):
    monkeypatch.setenv("ALE_ROMS_DIR", str(tmp_path))
    assert error_of("ALE/Pong-v5", 1).endswith("; the ROM files are part of pip install ale_py")
    (tmp_path / "pong.bin").write_bytes(b"not a game")
    assert "hash of pong.bin" in error_of("ALE/Pong-v5", 1)


def test_unknown_arguments_of_the_environment_raise_an_error():
    assert "unexpected keyword argument 'gravty'" in error_of("LunarLander-v3", 1, gravty=1)
    assert "unexpected keyword argument 'stack'" in error_of("ALE/Pong-v5", 1, stack=1)
    assert "gravity" in error_of("LunarLander-v3", 1, gravity=5.0)
    assert "use episodic_life=True" in error_of("ALE/Breakout-v5", 1, life_loss_info=True)


@pytest.mark.parametrize(
    ("space", "fault"),
    [
        (Tuple([Discrete(2), Discrete(3)]), f"Tuple observations: {FLATTEN}"),
        (Discrete(3, start=1), f"Discrete observations that do not start from 0: {FLATTEN}"),
        (MultiDiscrete(np.array([[2, 3]])), f"MultiDiscrete observations of shape (1, 2): {FLATTEN}"),
        (Dict({"a": Dict({"b": Discrete(2)})}), f"Dict observations at key a of its Dict observations: {FLATTEN}"),
        (Dict({"a": Box(0, 1, ())}), f"a single number at key a of its Dict observations: {FLATTEN}"),
        (Dict({"a.b": Discrete(2)}), f"a dot in the name at key a.b of its Dict observations: {FLATTEN}"),
        (Dict({"eye": Box(0, 255, (9, 9, 3), np.uint8)}), f"frames at key eye of its Dict observations: {FILTER}"),
        (Graph(Discrete(2), None), f"Graph observations; {observations_module.SUPPORTED}"),
        (Dict({"a": Sequence(Discrete(2))}), "Sequence observations at key a of its Dict observations; supported are"),
    ],
)  # fmt: skip
def test_unsupported_observations_raise_an_error(space, fault, monkeypatch):
    monkeypatch.setattr(KnownAnswer, "observation_space", space)
    monkeypatch.setattr(KnownAnswer, "_draw", lambda self: space.sample())
    assert fault in error_of("KnownAnswer-v0", 2)


@pytest.mark.parametrize(
    ("space", "fault"),
    [
        (Dict({"a": Discrete(2)}), "Dict actions"),
        (MultiDiscrete([2, 3], start=[0, 1]), "MultiDiscrete actions from [0, 1]"),
        (MultiBinary([2, 3]), "MultiBinary actions of shape (2, 3)"),
        (Discrete(3, start=1), "Discrete actions from 1"),
        (Box(-np.inf, 1, (2,)), "unbounded Box actions"),
        (Box(-1, 1, (2, 2)), "Box actions of shape (2, 2)"),
    ],
)
def test_unsupported_actions_raise_an_error(space, fault, monkeypatch):
    monkeypatch.setattr(KnownAnswer, "action_space", space)
    assert error_of("KnownAnswer-v0", 2) == f"environment KnownAnswer-v0 has {fault}; {environments_module.SUPPORTED}"


def test_making_environments_prints_nothing(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "builtin type .* has no __module__")  # of SWIG, at the import of Box2D
        for id in "HalfCheetah-v5", "HalfCheetah-v4", "LunarLander-v3", "CartPole-v0", "KnownAnswer-v0", "ALE/Pong-v5":
            Environments(id, 2).close()
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
    assert not list(tmp_path.iterdir())  # MuJoCo logs warnings to a file in the working directory


def test_other_warnings_of_mujoco_are_shown():
    mujoco = pytest.importorskip("mujoco")
    before = mujoco.get_mju_user_warning()
    with pytest.warns(UserWarning, match="MuJoCo: out of memory"), environments_module.quiet_mujoco():
        mujoco.get_mju_user_warning()("settotalmass is deprecated")
        mujoco.get_mju_user_warning()("out of memory")
    assert mujoco.get_mju_user_warning() is before
