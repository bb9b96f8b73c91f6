"""Students that observe less, or otherwise, than their teachers: the same states, the scripts, refused input."""

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from stable_baselines3 import PPO

from kd.common.utils.errors import UserError
from kd.common.utils.files import read_json
from kd.reinforcement_learning.data import video
from kd.reinforcement_learning.data.environment_ids import (
    of_both,
    student_environment,
    student_wrappers,
    view,
    wrapped,
)
from kd.reinforcement_learning.data.environments import Environments, SB3Environments
from kd.reinforcement_learning.data.rollouts import TEST_SEED, predict
from kd.reinforcement_learning.data.specs import find_spec
from kd.reinforcement_learning.student_model import distillation
from kd.reinforcement_learning.student_model.arguments import StudentArguments
from kd.reinforcement_learning.student_model.student import StudentNetwork, new_student
from kd.reinforcement_learning.teacher_model.policies import PolicyNetwork
from kd.reinforcement_learning.teacher_model.recipes import training_recipe
from kd_testing import known_answer  # noqa: F401 - registers the environments
from kd_testing.policies import SCRIPTS, distill, error_line
from kd_testing.readmes import code_of
from kd_testing.scripts import run_script

HIDDEN = ["--student_observation", "0", "2", "--frame_stack", "3"]  # positions, without velocities
DICT = 'KnownAnswerSpaces-v0{"actions": "Discrete"}'
NEXT_STEP, SAME_STEP = AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP


pytestmark = pytest.mark.usefixtures("in_tmp_path")


# ---- ids ----


@pytest.mark.parametrize(
    ("words", "frames", "written"),
    [
        ([], 1, ""),
        ([], 4, '+frame_stack{"n": 4, "padding": "reset"}'),
        (["0", "2-4"], 1, '+select{"indices": [0, 2, 3, 4]}'),
        (["position", "speed"], 2, '+select{"keys": ["position", "speed"]}+frame_stack{"n": 2, "padding": "reset"}'),
        (['frame_stack{"n": 3}'], 1, '+frame_stack{"n": 3}'),
        (["my.module:Blur", "time_feature"], 1, "+my.module:Blur+time_feature"),
        (["1", 'frame_stack{"n": 3}'], 1, '+select{"indices": [1]}+frame_stack{"n": 3}'),
    ],
)
def test_the_environment_of_a_student(words, frames, written):
    teacher = 'Pendulum-v1{"g": 5}+time_feature'
    student = wrapped(teacher, student_wrappers(words, frames))
    assert student == teacher + written
    both = of_both(teacher, student)
    assert both == (f"{teacher}+teacher_part{written}+student_part" if written else teacher)
    assert student_environment(both) == student
    assert view(teacher, student) == written[1:]


def test_a_student_in_another_environment_has_no_view():
    for student in ("Pendulum-v1", 'CartPole-v1+select{"indices": [0]}', "Pendulum-v1+select"):
        with pytest.raises(ValueError, match="with further wrappers"):
            view("Pendulum-v1+time_feature", student)


# ---- teacher and student observe the same states ----


@pytest.mark.parametrize("mode", [NEXT_STEP, SAME_STEP])
@pytest.mark.parametrize(
    ("teacher", "words", "frames"),
    [
        ("KnownAnswerBox-v0", ["0", "2"], 3),  # episodes of ten steps
        ("Acrobot-v1", ["4-5"], 1),
        (DICT, ["position", "low"], 2),
        (DICT, ["high"], 1),
        (DICT, [], 2),
        ('KnownAnswerSpaces-v0{"observations": "frames", "actions": "Discrete"}', [], 2),
    ],
)
def test_observations_of_both_are_those_of_each_alone(teacher, words, frames, mode):
    student = wrapped(teacher, student_wrappers(words, frames))
    ids = teacher, student, of_both(teacher, student)
    alone, own, both = (Environments(id, 3, seed=7, autoreset=mode) for id in ids)
    rng, ended = np.random.default_rng(0), 0
    for _ in range(25):
        expected = np.concatenate([part.observations.reshape(3, -1) for part in (alone, own)], axis=1)
        np.testing.assert_array_equal(both.observations, expected)
        assert both.observation_space.contains(both.observations[0])
        actions = np.stack([alone.action_space.sample() for _ in range(3)]) * int(rng.integers(2))
        steps = [environments.step(actions) for environments in (alone, own, both)]
        final = np.concatenate([step.final_observations.reshape(3, -1) for step in steps[:2]], axis=1)
        np.testing.assert_array_equal(steps[2].final_observations, final)
        for step in steps[1:]:
            np.testing.assert_array_equal(step.rewards, steps[0].rewards)
            np.testing.assert_array_equal(step.truncated, steps[0].truncated)
        ended += int(steps[2].truncated.sum())
    assert ended >= (0 if teacher == "Acrobot-v1" else 6)


def test_a_student_without_velocities_gets_the_last_positions():
    id = wrapped("Pendulum-v1", student_wrappers(["0", "1"], 3))
    plain, one = gym.make("Pendulum-v1"), gym.make(find_spec(id))
    for seed in (0, 1):  # the second episode begins without the end of the first
        positions = [plain.reset(seed=seed)[0][:2]] * 3
        observation = one.reset(seed=seed)[0]
        for _ in range(5):
            np.testing.assert_array_equal(observation, np.concatenate(positions[-3:]))
            positions.append(plain.step(np.array([1.5]))[0][:2])
            observation = one.step(np.array([1.5]))[0]


# ---- the networks ----


def test_each_network_uses_its_part():
    student, teacher = 'Pendulum-v1+select{"indices": [0, 1]}', "Pendulum-v1"
    recipe = training_recipe("ppo", teacher)
    taught, own = (new_student(SB3Environments(id, 1), StudentArguments(), recipe, 3) for id in (teacher, student))
    torch.manual_seed(0)
    rows = torch.randn(50, 5) * torch.tensor([1.0, 1, 1, 7, 0.1]) + torch.tensor([0.0, 0, 0, -4, 2])
    network = StudentNetwork(own.policy, None, slice(3, None))
    network.prepare(rows)
    np.testing.assert_allclose(network.mean.numpy(), rows[:, 3:].numpy().mean(0), rtol=1e-5)
    np.testing.assert_allclose(network.std.numpy(), rows[:, 3:].numpy().std(0), rtol=1e-5)
    deployed = network.folded_policy()
    expected = deployed.predict(rows[:, 3:].numpy(), deterministic=True)[0]
    found = predict(network, rows)["mean"].numpy()
    np.testing.assert_allclose(np.clip(found, -2, 2), expected, atol=1e-5)
    part = PolicyNetwork(taught.policy, columns=slice(0, 3))
    torch.testing.assert_close(part(rows).features["mean"], PolicyNetwork(taught.policy)(rows[:, :3]).features["mean"])


def test_keys_of_a_bottleneck_are_fitted_to_the_part_of_the_student():
    id = wrapped("Pendulum-v1", student_wrappers(["0", "1"], 1))
    args = StudentArguments(student=[], codebooks=2, codebook_size=4)
    model = new_student(SB3Environments(id, 1), args, training_recipe("ppo", id), 0)
    rows = torch.randn(40, 5)
    StudentNetwork(model.policy, None, slice(3, None)).prepare(rows)
    extractor: Any = model.policy.features_extractor
    torch.testing.assert_close(extractor.mean, rows[:, 3:].mean(0))


# ---- the scripts ----


def test_a_run_whose_student_has_no_velocities(cart_pole, capsys, monkeypatch):
    monkeypatch.setattr(video, "MAX_FRAMES", 4)
    distill("--teacher", cart_pole, *HIDDEN, "--environment", "CartPole-v1")
    student = 'CartPole-v1+select{"indices": [0, 2]}+frame_stack{"n": 3, "padding": "reset"}'
    folder = Path("runs/reinforcement-learning/distill_CartPole-v1-select-indices-0-2-frame_stack-n-3-padding-reset")
    results = read_json(folder / "results.json")
    assert (results["task"], results["teacher_environment"]) == (student, "CartPole-v1")
    assert results["student_observation"] == student.removeprefix("CartPole-v1+")
    assert "of shape (6,); the teacher CartPole-v1, of shape (4,)" in results["inferred"]
    sizes = {role: model["parameters"] for role, model in results["models"].items()}
    assert sizes["student"] == sizes["control"] == sizes["behaviour_cloning"] == 755 + 2 * 2 * 16  # 6 inputs, not 4
    assert all("validation" in model["metrics"] for model in results["models"].values())

    model, returns = PPO.load(folder / "student/student.zip", device="cpu"), []
    environment = gym.make(find_spec(student))
    for seed in range(TEST_SEED, TEST_SEED + 12):
        (observation, _), total, done = environment.reset(seed=seed), 0.0, False
        while not done:
            action, _ = model.predict(observation, deterministic=True)
            observation, reward, terminated, truncated, _ = environment.step(action)
            total, done = total + float(reward), terminated or truncated
        returns.append(total)
    test = results["models"]["student"]["metrics"]["test"]
    assert np.mean(returns) == pytest.approx(test["return_mean"])

    found: dict[str, Any] = {}
    exec(code_of(folder / "student").replace('"student"', f'"{folder}/student"'), found)
    assert found["observations"].shape == (1, 6) and found["actions"].shape == (1,)

    capsys.readouterr()
    run_script(f"{SCRIPTS}/evaluate.py", folder, "--episodes", 12, "--teacher", cart_pole, "--json", "e.json",
               "--video", "e.gif")  # fmt: skip
    again = read_json("e.json")["metrics"]["test"]
    assert again["return_mean"] == test["return_mean"] and again["agreement"] == pytest.approx(test["agreement"])
    assert Path("e.gif").exists()
    run_script(f"{SCRIPTS}/evaluate.py", folder, "--episodes", 12, "--json", "alone.json")
    assert read_json("alone.json")["metrics"]["test"]["return_mean"] == test["return_mean"]


def test_resumed_run_gives_the_same_student(cart_pole, monkeypatch):
    words = ["--teacher", cart_pole, "--environment", "CartPole-v1", *HIDDEN, "--no_control", "--output_dir"]
    distill(*words, "whole")
    original = distillation.Distiller._fit

    def interrupt(self: distillation.Distiller, number: int) -> dict[str, float]:
        if number == 1:
            raise KeyboardInterrupt
        return original(self, number)

    monkeypatch.setattr(distillation.Distiller, "_fit", interrupt)
    with pytest.raises(SystemExit) as stop:
        distill(*words, "interrupted")
    assert stop.value.code == 130
    monkeypatch.setattr(distillation.Distiller, "_fit", original)
    distill(*words, "interrupted", "--resume_from_checkpoint")
    whole, resumed = (PPO.load(f"{run}/student/student.zip").policy.state_dict() for run in ("whole", "interrupted"))
    for name, weight in whole.items():
        assert torch.equal(weight, resumed[name]), name


@pytest.mark.slow
def test_a_teacher_of_the_run_keeps_its_environment():
    teacher = ["--teacher_steps", 600, "--hyperparameters", '{"environments": 4}']
    distill(*teacher, *HIDDEN, "--no_control", "--output_dir", "first")
    distill("--teacher", "first/stages/teacher", "--no_control", "--output_dir", "second")
    assert read_json("second/results.json")["task"] == "CartPole-v1"
    distill("--teacher", "first", "--no_control", "--output_dir", "third")  # the student as a teacher
    assert read_json("third/results.json")["task"] == read_json("first/results.json")["task"]


@pytest.mark.slow
def test_ensembles_bottlenecks_keys_and_frames(cart_pole):
    both = ["--teacher", cart_pole, "--ensemble_teachers", cart_pole, "--environment", "CartPole-v1"]
    distill(*both, *HIDDEN, "--codebooks", 4, "--output_dir", "bottleneck")
    Path("pixels.py").write_text(PIXELS)
    distill(*both[:2], *both[4:], "--student_observation", "pixels:Pixels", "--output_dir", "frames", "--steps", 60)
    assert read_json("frames/results.json")["task"] == "CartPole-v1+pixels:Pixels"


PIXELS = """
import gymnasium, numpy as np
from gymnasium.spaces import Box

class Pixels(gymnasium.ObservationWrapper):
    observation_space = Box(0, 255, (1, 36, 40), np.uint8)

    def observation(self, observation):
        frame = np.zeros((1, 36, 40), np.uint8)
        frame[0, 18, int(np.clip(20 + 100 * observation[2], 0, 39))] = 255
        return frame
"""


# ---- refused input ----

PLACES = ["--environment", "CartPole-v1", "--teacher", "{cart_pole}"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([*PLACES, "--student_observation", "4"], "no observation 4 to select: the observations are 4 numbers"),
        ([*PLACES, "--student_observation", "3-1"], "--student_observation takes indices and ranges such as 0 2-5"),
        ([*PLACES, "--student_observation", "0", "x"], "--student_observation takes indices and ranges"),
        ([*PLACES, "--student_observation", "0", "0-1"], "names an index twice"),
        ([*PLACES, "--student_observation", "speed"], "no keys to select, such as speed"),
        ([*PLACES, "--student_observation", "nowhere:Wrapper"], "there is no module nowhere"),
        ([*PLACES, "--student_observation", "json:Wrapper"], "module json has no wrapper Wrapper"),
        ([*PLACES, "--student_observation", "frame_stack{n}"], "--student_observation takes wrappers such as"),
        ([*PLACES, "--wrapper", "frame_stack{n}"], "--wrapper takes wrappers such as"),
        ([*PLACES, "--frame_stack", "0"], "--frame_stack must be at least 1"),
        ([*PLACES, "--frame_stack", "2", "--method", "ppd"], "--method ppd gives the student the teacher's"),
        (["--environment", "CartPole-v1", "Acrobot-v1", "--frame_stack", "2"], "support a single --environment"),
        (["--environment", "ALE/Pong-v5", "--frame_stack", "2"], "take no wrappers"),
        (["--environment", DICT, "--student_observation", "speed"], "there is no observation speed"),
        (["--environment", "KnownAnswerBox-v0", "--student_observation", "gymnasium.wrappers:RescaleAction"
          '{"min_action": 0, "max_action": 2}'], "--student_observation changes the actions"),
    ],
)  # fmt: skip
def test_invalid_input_gives_one_line(words, expected, cart_pole, capsys):
    assert expected in error_line(capsys, *[word.replace("{cart_pole}", cart_pole) for word in words])
    assert not Path("runs").exists()


def test_a_recipe_imports_no_wrapper(capsys):
    Path("recipe.yaml").write_text("student_observation: [json:Wrapper]\n")
    assert "pass --student_observation on the command line if you trust it" in error_line(capsys, "recipe.yaml")


def test_padding_is_checked():
    with pytest.raises(UserError, match="padding zero or reset"):
        Environments('Pendulum-v1+frame_stack{"n": 2, "padding": "first"}', 1)
