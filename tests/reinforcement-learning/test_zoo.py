"""Agents as they were trained: ids with arguments and wrappers, settings of rl-baselines3-zoo, published agents."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from sb3_contrib import MaskablePPO
from sb3_contrib.common.wrappers import TimeFeatureWrapper
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack

from kd.common.utils.errors import UserError
from kd.common.utils.files import read_json
from kd.reinforcement_learning.data.environment_ids import EnvironmentId, base_id, parse_id
from kd.reinforcement_learning.data.environments import Environments, is_vectorized
from kd.reinforcement_learning.data.rollouts import TEST_SEED, returns_of
from kd.reinforcement_learning.data.specs import (
    current_id,
    environment_code,
    find_spec,
    fingerprint,
    registration_code,
    require_module_on_command_line,
)
from kd.reinforcement_learning.student_model.evaluation import return_warning
from kd.reinforcement_learning.teacher_model.files import environment_of, find_teacher
from kd.reinforcement_learning.teacher_model.policies import greedy
from kd.reinforcement_learning.teacher_model.recipes import EnvironmentArguments, folder_name
from kd.reinforcement_learning.teacher_model.teacher import load_agent
from kd.reinforcement_learning.teacher_model.zoo import Training, matching_environment
from kd_testing.scripts import run_script

SCRIPTS = "reinforcement-learning/scripts"
SHORT = "--steps 200 --rounds 1 --updates 5 --episodes 12 --eval_episodes 2 --num_envs 2 --no_control".split()


# Ids


@pytest.mark.parametrize(
    ("id", "parts"),
    [
        ("CartPole-v1", ("CartPole-v1", {}, ())),
        ("ALE/Pong-v5", ("ALE/Pong-v5", {}, ())),
        ("my_package:Mine-v0", ("my_package:Mine-v0", {}, ())),
        ('Pendulum-v1{"g": 5.0}', ("Pendulum-v1", {"g": 5.0}, ())),
        (
            'A-v0{"s": "}+{"}+time_feature+frame_stack{"n": 4}+a.b:C',
            ("A-v0", {"s": "}+{"}, (("time_feature", {}), ("frame_stack", {"n": 4}), ("a.b:C", {}))),
        ),
    ],
)
def test_id_is_parsed_and_written(id: str, parts: tuple[Any, ...]) -> None:
    assert parse_id(id) == EnvironmentId(*parts) and str(parse_id(id)) == id


def test_text_of_another_form_is_an_unknown_environment() -> None:
    for text in ("no such id", "CartPole-v1+", 'CartPole-v1{"a"', "CartPole-v1{}x", ""):
        assert parse_id(text) == EnvironmentId(text)
        with pytest.raises(UserError, match="unknown environment"):
            find_spec(text)


def test_parts_of_an_id() -> None:
    id = 'my_package:Mine-v0{"a": 1}+other.module:Wrapper+time_feature'
    assert parse_id(id).modules == ["my_package", "other.module"]
    assert parse_id("CartPole-v1+gymnasium.wrappers:FlattenObservation").modules == []
    assert base_id(id) == "Mine-v0"
    assert folder_name(id) == "my_package-Mine-v0-a-1-other.module-Wrapper-time_feature"
    assert folder_name("ALE/Pong-v5") == "ALE-Pong-v5"


def test_file_with_a_wrapper_of_another_module_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["script", "--wrapper", "cos:Wrapper"])
    with pytest.raises(UserError, match="importing os would run its code"):
        require_module_on_command_line("CartPole-v1+os:Wrapper", "a file")
    monkeypatch.setattr("sys.argv", ["script", "--environment=CartPole-v1+os:Wrapper"])
    require_module_on_command_line("CartPole-v1+os:Wrapper", "a file")


def test_arguments_change_the_environment_and_its_fingerprint() -> None:
    spec = find_spec('Pendulum-v1{"g": 0.5}')
    assert gym.make(spec).unwrapped.g == 0.5  # type: ignore[attr-defined]
    assert gym.make("Pendulum-v1").unwrapped.g == 10  # type: ignore[attr-defined]
    assert fingerprint("Pendulum-v1") != fingerprint('Pendulum-v1{"g": 0.5}')
    assert is_vectorized("CartPole-v1") and not is_vectorized("CartPole-v1+time_feature")
    with pytest.raises(UserError, match="cannot be made: .*unexpected keyword"):
        Environments('Pendulum-v1{"mass_of_the_moon": 1}', 1)


def test_code_that_makes_an_environment() -> None:
    for id in ("CartPole-v1", "CartPole-v1+time_feature", 'Pendulum-v1{"g": 0.5}'):
        names: dict[str, Any] = {}
        exec(f"{registration_code(id)}import gymnasium\nmade = gymnasium.make_vec({environment_code(id)})", names)
        assert names["made"].single_observation_space == Environments(id, 1).observation_space
    assert environment_code("CartPole-v1") == '"CartPole-v1"' and registration_code("CartPole-v1") == ""


@pytest.mark.parametrize("mode", ["time_feature", "frame_stack"])
def test_wrappers_equal_those_of_their_packages(mode: str) -> None:
    if mode == "time_feature":
        theirs: Any = DummyVecEnv([lambda: TimeFeatureWrapper(gym.make("CartPole-v1"))])
        ours = Environments("CartPole-v1+time_feature", 1, 3, autoreset=gym.vector.AutoresetMode.SAME_STEP)
    else:
        theirs = VecFrameStack(DummyVecEnv([lambda: gym.make("CartPole-v1")]), 3)
        ours = Environments('CartPole-v1+frame_stack{"n": 3}', 1, 3, autoreset=gym.vector.AutoresetMode.SAME_STEP)
    theirs.seed(3)
    np.testing.assert_allclose(ours.observations, theirs.reset())
    rng, ends = np.random.default_rng(0), 0
    while ends < 2:
        action = rng.integers(2, size=1)
        expected, _, dones, _ = theirs.step(action)
        ours.step(action)
        np.testing.assert_allclose(ours.observations, expected)
        ends += int(dones.sum())


def test_wrapper_errors_name_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def error_of(id: str) -> str:
        with pytest.raises(UserError) as caught:
            Environments(id, 1)
        return str(caught.value)

    assert "unknown wrapper time_features: pass time_feature, frame_stack, mask, select or" in error_of(
        "CartPole-v1+time_features"
    )
    assert "no module nowhere_at_all" in error_of("CartPole-v1+nowhere_at_all:Wrapper")
    assert "has no wrapper Wrapper" in error_of("CartPole-v1+json:Wrapper")
    assert "take no wrappers" in error_of("ALE/Pong-v5+time_feature")
    assert "missing 1 required" in error_of("CartPole-v1+frame_stack")
    assert "needs observations that are vectors" in error_of("FrozenLake-v1+time_feature")


def test_current_id() -> None:
    assert current_id("Hopper-v3")[0] == "Hopper-v4" and "is equal" in str(current_id("Hopper-v3")[1])
    assert current_id("LunarLander-v2")[0] == "LunarLander-v3"
    assert current_id("LunarLanderContinuous-v2")[0] == "LunarLanderContinuous-v3"
    for id in ("Hopper-v4", "Hopper-v5", "BipedalWalker-v3", "CartPole-v1", "Nothing-v3"):
        assert current_id(id) == (id, None)


# Settings


def test_environment_of_an_agent() -> None:
    training = Training("Walker2d-v3", {"a": 1}, (("time_feature", {}),), source="args.yml")
    id, notes = matching_environment(training, None, None, None)
    assert id == 'Walker2d-v4{"a": 1}+time_feature'
    assert "environment Walker2d-v3, from args.yml" in notes[0] and "is equal" in notes[1] and id in notes[2]
    assert matching_environment(training, "Walker2d-v5", {}, None)[0] == "Walker2d-v5+time_feature"
    assert matching_environment(training, "A-v0", {"b": 2}, ["m:W", 'frame_stack{"n": 2}'])[0] == (
        'A-v0{"b": 2}+m:W+frame_stack{"n": 2}'
    )
    assert matching_environment(training, "A-v0+m:W", {}, None) == ("A-v0+m:W", [])
    assert matching_environment(Training(), None, None, None) == (None, [])


def agent(folder: Path, environment: str, config: str = "n_envs: 1", args: str = "") -> Path:
    """A folder of rl-baselines3-zoo without weights."""
    (folder / environment).mkdir(parents=True)
    (folder / f"{environment}.zip").touch()
    (folder / environment / "config.yml").write_text(config)
    if args:
        (folder / environment / "args.yml").write_text(args)
    return folder


def test_settings_of_the_zoo(tmp_path: Path) -> None:
    nothing = EnvironmentArguments()
    config = "env_wrapper: [sb3_contrib.common.wrappers.TimeFeatureWrapper: {max_steps: 50}]\nframe_stack: 4"
    folder = agent(tmp_path / "tqc" / "A-v3_1", "A-v3", config, "env: B-v3\nenv_kwargs: {k: 2}")
    id = 'B-v3{"k": 2}+time_feature{"max_steps": 50}+frame_stack{"n": 4}'
    assert environment_of(str(folder), None, nothing)[0] == id
    assert find_teacher(str(folder), id).warnings == ()  # type: ignore[union-attr]
    with pytest.raises(UserError, match="was trained in time_feature, frame_stack: pass --environment 'B-v3"):
        find_teacher(str(folder), "B-v3")
    warnings = find_teacher(str(folder), "C-v0+time_feature").warnings  # type: ignore[union-attr]
    expected = ("trained on B-v3", "arguments {'k': 2}", "in time_feature, frame")
    assert all(words in one for words, one in zip(expected, warnings, strict=True))
    folder = agent(tmp_path / "dqn", "C-v0", "env_wrapper: {gym.wrappers.RescaleAction: {a: 1}}")
    assert environment_of(str(folder), None, nothing)[0] == 'C-v0+gymnasium.wrappers:RescaleAction{"a": 1}'
    folder = agent(tmp_path / "ppo", "D-v0", "env_wrapper: utils.wrappers.HistoryWrapper")
    with pytest.raises(UserError, match="trained in utils.wrappers.HistoryWrapper.*--wrapper package.module:Class"):
        find_teacher(str(folder), "D-v0")
    assert find_teacher(str(folder), "D-v0+time_feature") is not None
    config = "env_wrapper: [stable_baselines3.common.atari_wrappers.AtariWrapper]\nframe_stack: 4"
    folder = agent(tmp_path / "atari", "PongNoFrameskip-v4", config)
    assert find_teacher(str(folder), "ALE/Pong-v5") is not None


@pytest.mark.parametrize(
    ("environment", "expected", "zeros"),
    [
        ("CartPoleNoVel-v1", 'CartPole-v1+mask{"indices": [1, 3]}', [1, 3]),
        ("LunarLanderNoVel-v2", 'LunarLander-v3+mask{"indices": [2, 3, 5]}', [2, 3, 5]),
    ],
)
def test_environments_of_the_zoo_without_velocities(
    tmp_path: Path, environment: str, expected: str, zeros: list[int]
) -> None:
    folder = agent(tmp_path, environment, args=f"env: {environment}")
    id, _ = environment_of(str(folder), None, EnvironmentArguments())
    assert id == expected
    masked = Environments(id, 2, seed=1).observations
    others = [index for index in range(masked.shape[1]) if index not in zeros]
    selected = Environments(f'{parse_id(id).name}+select{{"indices": {others}}}', 2, seed=1).observations
    assert (masked[:, zeros] == 0).all() and np.array_equal(masked[:, others], selected)
    with pytest.raises(UserError, match="mask takes indices from 0 to 3, not \\[4\\]"):
        Environments('CartPole-v1+mask{"indices": [4]}', 1)


def test_environment_by_name(tmp_path: Path) -> None:
    for name in ("ppo-CartPole-v1.zip", "CartPole-v1.zip", "CartPole-v1_3/best_model.zip"):
        (path := tmp_path / name).parent.mkdir(exist_ok=True)
        path.touch()
        assert environment_of(str(path), None, EnvironmentArguments())[0] == "CartPole-v1"
        path.unlink()


def test_warning_of_a_return_that_differs() -> None:
    metrics = {"return_mean": 2374.0, "return_std": 1681.9, "episodes": 10}
    assert "--teacher_return is 5392" in str(return_warning("t", 5392, metrics, 0.0))
    assert return_warning("t", 2600, metrics, 0.0) is None  # within a tenth
    assert return_warning("t", 3400, metrics, 0.0) is None  # within two standard errors


# Scripts

MODULE = """
import gymnasium

gymnasium.register("Own-v0", "kd_testing.known_answer:KnownAnswer", max_episode_steps=10)


class Negated(gymnasium.ObservationWrapper):
    def observation(self, observation):
        return -observation
"""


@pytest.fixture
def own_module(tmp_path: Path) -> Iterator[str]:
    """A module in the working directory that registers Own-v0 when it is imported."""
    (tmp_path / "own_module.py").write_text(MODULE)
    yield "own_module"
    gym.registry.pop("Own-v0", None)
    sys.modules.pop("own_module", None)


def test_environment_and_wrapper_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], own_module: str
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--import_module", own_module, "--environment", "Own-v0", "--wrapper", "own_module:Negated"]
    monkeypatch.setattr("sys.argv", ["distill_policy.py", *words])
    teacher = ["--teacher_steps", 256, "--hyperparameters", '{"environments": 2, "n_steps": 64, "batch_size": 64}']
    run_script(f"{SCRIPTS}/distill_policy.py", *words, *teacher, *SHORT, "--teacher_return", 100, "--output_dir", "r")
    output = capsys.readouterr()
    assert "note: the environment is Own-v0+own_module:Negated" in output.out
    assert "--teacher_return is 100: check" in output.err
    results = read_json(Path("r/results.json"))
    assert results["task"] == "Own-v0+own_module:Negated" and "Negated" in results["inferred"]
    observation = Environments("Own-v0", 1, 5).observations
    np.testing.assert_array_equal(Environments(results["task"], 1, 5).observations, -observation)
    with pytest.raises(SystemExit):
        run_script(f"{SCRIPTS}/evaluate.py", "r", "--episodes", 1)
    assert "importing own_module would run its code" in capsys.readouterr().err
    run_script(f"{SCRIPTS}/evaluate.py", "r", "--episodes", 1, "--environment", results["task"])


def test_agent_of_the_zoo_needs_no_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A teacher with a time feature is found, wrapped, distilled and evaluated, without flags for the environment."""
    monkeypatch.chdir(tmp_path)
    folder = agent(
        tmp_path / "ppo" / "Pendulum-v1_1",
        "Pendulum-v1",
        "env_wrapper: sb3_contrib.common.wrappers.TimeFeatureWrapper",
        "!!python/object/apply:collections.OrderedDict\n- - - env\n    - Pendulum-v1\n  - - env_kwargs\n    - null\n",
    )
    model = PPO(
        "MlpPolicy", TimeFeatureWrapper(gym.make("Pendulum-v1")), seed=0, device="cpu", n_steps=8, batch_size=8
    )
    model.save(folder / "Pendulum-v1.zip")
    run_script(f"{SCRIPTS}/distill_policy.py", "--teacher", folder, *SHORT, "--output_dir", "r")
    assert "note: environment Pendulum-v1, from " in capsys.readouterr().out
    assert read_json(Path("r/results.json"))["task"] == "Pendulum-v1+time_feature"
    assert "find_spec('Pendulum-v1+time_feature')" in Path("r/student/README.md").read_text()
    run_script(f"{SCRIPTS}/evaluate.py", "r", "--episodes", 1)
    run_script(f"{SCRIPTS}/evaluate.py", folder, "--episodes", 1)
    run_script("common/export/__main__.py", "r")


@pytest.mark.parametrize("script", ["evaluate.py", "distill_policy.py"])
def test_settings_of_an_agent_import_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], script: str, own_module: str
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = agent(
        tmp_path / "ppo" / "Own-v0_1", "Own-v0", "env_wrapper: own_module.Negated", "env: own_module:Own-v0"
    )
    model = [folder] if script == "evaluate.py" else ["--teacher", folder]
    with pytest.raises(SystemExit) as stop:
        run_script(f"{SCRIPTS}/{script}", *model)
    assert stop.value.code == 2 and own_module not in sys.modules
    assert "importing own_module would run its code" in capsys.readouterr().err


class Masked(gym.Wrapper[Any, Any, Any, Any]):
    def action_masks(self) -> np.ndarray:
        return np.ones(2, bool)


def test_masks_of_an_environment_are_not_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    MaskablePPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, device="cpu").save(path := tmp_path / "a.zip")
    assert load_agent(str(path), "CartPole-v1").name == "maskable ppo a"
    (module := ModuleType("masked")).Masked = Masked  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "masked", module)
    with pytest.raises(UserError, match="with the action masks of .*Masked, which are not applied here: pass"):
        load_agent(str(path), "CartPole-v1+masked:Masked")


# Published agents: environment, mean and standard deviation of the returns in ../shared/agents/README.md

AGENTS: dict[str, tuple[str, float, float]] = {
    "ppo/LunarLander-v2_1": ("LunarLander-v3", 245.6, 17.0),
    "ppo/Acrobot-v1_1": ("Acrobot-v1", -73.0, 17.3),
    "ppo/MountainCar-v0_1": ("MountainCar-v0", -113.8, 18.0),
    "ppo/CartPole-v1_1": ("CartPole-v1", 500, 0),
    "ppo/BipedalWalker-v3_1": ("BipedalWalker-v3", 259.6, 98.5),
    "ppo/BipedalWalkerHardcore-v3_1": ("BipedalWalkerHardcore-v3", 113.2, 142.7),
    "ppo/Hopper-v3_1": ("Hopper-v4", 2410.4, 10.0),
    "ppo/HalfCheetah-v3_1": ("HalfCheetah-v4", 5819.1, 663.5),
    "ppo/Pendulum-v1_1": ("Pendulum-v1", -172.2, 104.2),
    "ppo/Walker2d-v3_1": ("Walker2d-v4+time_feature", 3478.8, 821.7),
    "ppo/Swimmer-v3_1": ("Swimmer-v4+time_feature", 281.6, 9.7),
    "trpo/Swimmer-v3_1": ("Swimmer-v4", 365.7, 2.1),
    "trpo/HalfCheetah-v3_1": ("HalfCheetah-v4", 1785.5, 68.7),
    "trpo/LunarLanderContinuous-v2_1": ("LunarLanderContinuous-v3", 258.6, 15.4),
    "trpo/Walker2d-v3_1": ("Walker2d-v4", 5391.7, 39.8),
    "a2c/HalfCheetah-v3_1": ("HalfCheetah-v4", 3041.2, 157.3),
    "a2c/LunarLander-v2_1": ("LunarLander-v3", 156.1, 70.0),
    "a2c/MountainCar-v0_1": ("MountainCar-v0", -113.3, 22.6),
    "a2c/BipedalWalker-v3_1": ("BipedalWalker-v3", 299.8, 23.5),
    "dqn/LunarLander-v2_1": ("LunarLander-v3", 146.9, 59.6),
    "qrdqn/CartPole-v1_1": ("CartPole-v1", 500, 0),
    "sac/HalfCheetah-v3_1": ("HalfCheetah-v4", 9535.5, 100.5),
    "sac/Pendulum-v1_1": ("Pendulum-v1", -157.0, 88.7),
    "tqc/HalfCheetah-v3_1": ("HalfCheetah-v4", 12089.9, 127.4),
    "tqc/Hopper-v3_1": ("Hopper-v4", 3754.2, 8.3),
    "tqc/MountainCarContinuous-v0_1": ("MountainCarContinuous-v0", 83.9, 39.6),
    "ars/HalfCheetah-v3_1": ("HalfCheetah-v4", 4815.2, 1340.8),
    "ars/Swimmer-v3_1": ("Swimmer-v4", 355.3, 12.8),
}


def test_all_published_agents_load(shared: Path) -> None:
    found = {f"{path.parents[1].name}/{path.parent.name}" for path in (shared / "agents").glob("*/*/*.zip")}
    assert found == AGENTS.keys()
    for name, (environment, _, _) in AGENTS.items():
        path = str(shared / "agents" / name)
        id, _ = environment_of(path, None, EnvironmentArguments())
        assert id == environment
        loaded = load_agent(path, environment)
        assert loaded.name.startswith(name.partition("/")[0]) and loaded.warnings == ()


@pytest.mark.slow
@pytest.mark.parametrize("name", AGENTS)
def test_published_agent_has_its_return(shared: Path, name: str) -> None:
    environment, mean, std = AGENTS[name]
    torch.set_num_threads(1)
    network = load_agent(str(shared / "agents" / name), environment).network()
    returns, _ = returns_of(greedy(network), environment, 20, TEST_SEED)
    # The median, because some agents fall in a part of their episodes.
    assert abs(np.median(returns) - mean) <= max(std, 0.05 * abs(mean)), returns
