"""The scripts of reinforcement learning, with few steps."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from stable_baselines3 import PPO, TD3
from stable_baselines3.common.callbacks import CheckpointCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kd.common.utils.files import read_json
from kd.reinforcement_learning.data import video
from kd.reinforcement_learning.data.environments import SB3Environments
from kd.reinforcement_learning.data.rollouts import TEST_SEED, VALIDATION_SEED, returns_of
from kd.reinforcement_learning.student_model import distillation
from kd_testing.paths import REPO
from kd_testing.policies import SCRIPTS, SHORT, distill, error_line
from kd_testing.readmes import run_readme, run_readme_alone
from kd_testing.scripts import run_script
from kd_testing.verdicts import check_verdict, check_verdict_over_seeds

RUNS = Path("runs/reinforcement-learning")
TEACHER = ["--teacher_steps", "600", "--hyperparameters", '{"environments": 4}']


pytestmark = pytest.mark.usefixtures("in_tmp_path")


def mean_return(zip: Path, episodes: int, seed: int) -> float:
    model = PPO.load(zip, device="cpu")
    act = lambda rows: torch.as_tensor(model.predict(rows.numpy(), deterministic=True)[0])  # noqa: E731
    return float(returns_of(act, "CartPole-v1", episodes, seed)[0].mean())


def same_policy(first: Path, second: Path) -> bool:
    states = [PPO.load(path, device="cpu").policy.state_dict() for path in (first, second)]
    return all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_default_run_from_teacher_training_to_a_student_that_stable_baselines_loads(capsys):
    distill(*TEACHER)
    run = RUNS / "distill_CartPole-v1"
    assert f"student: {run / 'student'}\nreport:  {run / 'report.md'}" in capsys.readouterr().out
    assert [folder.name for folder in RUNS.iterdir()] == ["distill_CartPole-v1"], "the teacher is inside the run"
    results = read_json(run / "results.json")
    models: dict[str, Any] = results["models"]
    assert list(models) == ["teacher", "control", "student", "behaviour_cloning"]
    assert models["student"]["parameters"] == models["control"]["parameters"] == 755
    test = models["student"]["metrics"]["test"]
    check_verdict(results)
    assert test["episodes"] == 12 and 0 <= test["agreement"] <= 1 and test["kl"] >= 0
    assert test["return_ci95"][0] <= test["return_mean"] <= test["return_ci95"][1]
    assert results["data"]["train"] >= 400 and results["work"]["student"]["cpu_seconds"] > 0
    teacher, random = models["teacher"]["metrics"]["test"]["return_mean"], results["return_of_random_actions"]
    share = (test["return_mean"] - random) / (teacher - random)
    assert results["retention"] == (pytest.approx(share) if teacher > random else None)
    assert Image.open(run / "curves.png").width > 500

    teacher_zip = run / "stages" / "teacher" / "CartPole-v1" / "model.zip"
    zips = {"student": run / "student" / "student.zip", "teacher": teacher_zip}
    for role, path in zips.items():  # the episodes of the curves and of the table are the same for both
        assert mean_return(path, 12, TEST_SEED) == models[role]["metrics"]["test"]["return_mean"]
        assert mean_return(path, 2, VALIDATION_SEED) == models[role]["metrics"]["validation"]["return_mean"]
    run_script(f"{SCRIPTS}/evaluate.py", run, "--episodes", 12, "--json", "again.json", "--predictions", "p.csv")
    assert read_json("again.json")["metrics"]["test"]["return_mean"] == test["return_mean"]
    report = (run / "report.md").read_text()
    assert re.search(r"Data: train \d+ observations, validation 2 episodes, test 12 episodes\.", report)
    assert "paired bootstrap over the evaluation episodes" in report and "examples" not in report
    episodes = pandas.read_csv("p.csv")
    assert episodes.columns.tolist() == ["split", "episode", "return", "length"]
    assert episodes["return"].mean() == test["return_mean"] and episodes.episode.tolist() == list(range(12))
    assert (episodes["return"] == episodes.length).all()  # CartPole rewards each step with 1
    assert run_readme(run / "student")["actions"].shape == (1,)
    card = ModelCard.load(run / "student" / "README.md").data
    assert (card.library_name, card.pipeline_tag) == ("stable-baselines3", "reinforcement-learning")
    assert card.eval_results[0].metric_value == test["return_mean"] and "CartPole-v1" in card.tags

    words = ["--no_control", "--output_dir", "second", "--student", 7, "--student_value"]
    distill("--teacher", run / "stages" / "teacher", *words)  # the same teacher
    second = read_json("second/results.json")["models"]
    assert second["student"]["parameters"] == 56
    assert second["teacher"]["metrics"] == models["teacher"]["metrics"]


def test_trackers_get_losses_and_returns(cart_pole):
    """TensorBoard has the losses and returns of the distillation, and the log of Stable-Baselines3."""
    words = ["--teacher", cart_pole, "--output_dir"]
    distill(*words, "run")
    history = read_json("run/stages/student/stage.json")["history"]
    events = {stage.name: EventAccumulator(str(stage)).Reload() for stage in Path("run/tensorboard").iterdir()}
    assert events.keys() == {"control", "student", "behaviour_cloning"}
    for tag in ("loss", "loss_policy", "loss_value", "learning_rate"):
        assert f"train/{tag}" in events["student"].Tags()["scalars"]
    for tag, name in {"train/loss": "loss", "eval/return_mean": "eval_return_mean"}.items():
        logged = [(event.step, event.value) for event in events["student"].Scalars(tag)]
        assert logged == [(row["environment_steps"], pytest.approx(row[name])) for row in history]
    assert {"rollout/ep_rew_mean", "eval/return_mean"} <= set(events["control"].Tags()["scalars"])
    distill(*words, "run", "--overwrite_output_dir", "--report_to", "none", "--no_control")
    assert not Path("run/tensorboard").exists()


def test_a_control_of_equal_cpu_time_and_a_student_of_a_share_of_the_teachers_actor(cart_pole):
    """The actor of the teacher has 4 * 64 + 64, 64 * 64 + 64 and 64 * 2 + 2 parameters, that of a student of width w
    4w + w + w^2 + w + 2w + 2.
    """
    words = ["--teacher", cart_pole, "--control_cpu_time", "--student_share", 0.05, "--output_dir", "run"]
    distill(*words)
    results = read_json("run/results.json")
    work, actors = results["work"], results["actors"]
    per_step = work["control"]["cpu_seconds"] / work["control"]["environment_steps"]
    steps = work["student"]["cpu_seconds"] / per_step
    rollout = 256  # of 8 environments and 32 steps
    assert steps <= work["control_cpu_time"]["environment_steps"] < steps + rollout + 1
    assert results["models"]["control_cpu_time"]["metrics"]["test"]["episodes"] == 12
    assert "control_cpu_time" in results["verdict"]["others"]
    assert actors["teacher"]["parameters"] == 4610 and 0.05 * 4610 == 230.5
    assert {role: one["parameters"] for role, one in actors.items() if role != "teacher"} == dict.fromkeys(
        ("control", "student", "behaviour_cloning", "control_cpu_time"), 11**2 + 8 * 11 + 2
    )
    assert 12**2 + 8 * 12 + 2 > 230.5
    assert "hidden layers of [11, 11]" in Path("run/report.md").read_text()
    run_script(f"{SCRIPTS}/table.py", ".", "--markdown", "table.md")
    header, _, row, *_ = Path("table.md").read_text().splitlines()
    cells = dict(zip(*([cell.strip() for cell in line.split("|")] for line in (header, row)), strict=True))
    assert (cells["environment"], cells["actor"], cells["student's actor"]) == ("CartPole-v1", "4,610", "211 (4.6%)")
    assert cells["normalized return"].startswith(f"{results['retention']:.3f} (" if results["retention"] else "–")
    Path("run/results.json").unlink()
    distill(*words, "--resume_from_checkpoint")  # the steps follow from the logs of the finished stages
    assert read_json("run/results.json")["work"] == work


@pytest.mark.slow
def test_the_code_of_a_model_card_runs_without_this_project(cart_pole):
    distill("--teacher", cart_pole, "--no_control", "--output_dir", "run")
    assert run_readme_alone(Path("run", "student").absolute(), after="print(actions)") in ("[0]", "[1]")


def test_several_seeds_are_ordinary_runs_with_one_teacher(cart_pole, capsys):
    words = ["--teacher", cart_pole, "--no_control"]
    distill(*words, "--seeds", "0,1", "--output_dir", "runs")
    assert capsys.readouterr().out.count("statistics of observations: none") == 1, "the teacher is loaded once"
    distill(*words, "--seed", 1, "--output_dir", "alone")
    both, alone = read_json("runs/results.json"), read_json("alone/results.json")
    assert both["verdict"]["control"] is None and both["verdict"]["shared_teacher"]
    gains = [read_json(f"runs/seed{seed}/results.json")["verdict"]["teacher"]["gain"] for seed in (0, 1)]
    assert both["verdict"]["teacher"]["gain"] == pytest.approx(np.mean(gains))
    assert both["seeds"] == [0, 1] and read_json("runs/seed1/results.json")["seed"] == 1
    assert (
        read_json("runs/seed1/results.json")["models"]["student"]["metrics"] == alone["models"]["student"]["metrics"]
    )
    returns = [read_json(f"runs/seed{seed}/results.json")["models"]["student"]["metrics"]["test"] for seed in (0, 1)]
    mean = np.mean([test["return_mean"] for test in returns])
    assert both["models"]["student"]["metrics"]["test"]["return_mean"] == pytest.approx(mean)
    assert same_policy(Path("runs/seed1/student/student.zip"), Path("alone/student/student.zip"))
    assert same_policy(Path("runs/seed0/student/student.zip"), Path("runs/student/student.zip"))
    assert not same_policy(Path("runs/seed0/student/student.zip"), Path("alone/student/student.zip"))


@pytest.mark.slow
def test_the_verdict_over_seeds(cart_pole):
    distill("--teacher", cart_pole, "--seeds", "0,1", "--output_dir", "runs")
    runs = [read_json(f"runs/seed{seed}/results.json") for seed in (0, 1)]
    check_verdict_over_seeds(read_json("runs/results.json"), runs)


def test_resumed_run_gives_the_same_student(cart_pole, monkeypatch):
    words = ["--teacher", cart_pole, "--output_dir"]
    distill(*words, "whole")
    original, rounds = distillation.Distiller._fit, 0

    def interrupt(self: distillation.Distiller, number: int) -> dict[str, float]:
        nonlocal rounds
        rounds += 1
        if rounds == 2:
            raise KeyboardInterrupt
        return original(self, number)

    monkeypatch.setattr(distillation.Distiller, "_fit", interrupt)
    with pytest.raises(SystemExit) as stop:
        distill(*words, "interrupted")
    assert stop.value.code == 130
    monkeypatch.setattr(distillation.Distiller, "_fit", original)
    distill(*words, "interrupted", "--resume_from_checkpoint")
    assert same_policy(Path("whole/student/student.zip"), Path("interrupted/student/student.zip"))
    whole, interrupted = (read_json(f"{name}/results.json")["models"] for name in ("whole", "interrupted"))
    for role in whole:
        assert whole[role]["metrics"] == interrupted[role]["metrics"], role


def test_proximal_policy_distillation(cart_pole):
    distill("--teacher", cart_pole, "--method", "ppd", "--no_control")
    results = read_json(RUNS / "ppd_CartPole-v1" / "results.json")
    assert results["method"] == "ppd" and results["models"]["student"]["parameters"] == 755
    PPO.load(RUNS / "ppd_CartPole-v1" / "student" / "student.zip", device="cpu")


@pytest.mark.slow
def test_normalized_continuous_teacher_and_student_for_raw_observations():
    """The teacher was trained with VecNormalize; the student takes raw observations."""
    hopper = ["--environment", "Hopper-v5", "--teacher_steps", 600, "--episodes", 3]
    distill(*hopper, "--student", 8, "--steps", 300)
    stage = RUNS / "distill_Hopper-v5" / "stages" / "teacher" / "Hopper-v5"
    assert (stage / "vecnormalize.pkl").exists()
    results = read_json(RUNS / "distill_Hopper-v5" / "results.json")
    assert results["models"]["student"]["metrics"]["test"]["agreement"] > 0.5
    distill(*hopper[:2], "--teacher", stage, "--student", 8, "--method", "ppd", "--no_control")

    moved = Path(shutil.copytree(stage, "moved"))
    (moved / "vecnormalize.pkl").unlink()
    distill(
        *hopper[:2], "--teacher", "moved", "--no_control", "--output_dir", "raw"
    )  # no file records the normalization
    assert read_json("raw/results.json")["models"]["teacher"]["metrics"] != results["models"]["teacher"]["metrics"]


@pytest.mark.parametrize(
    ("algorithm", "environment"), [("dqn", "CartPole-v1"), pytest.param("sac", "Pendulum-v1", marks=pytest.mark.slow)]
)
def test_teachers_of_other_algorithms(algorithm, environment, capsys):
    settings = {"buffer_size": 500, "learning_starts": 50, "batch_size": 32}
    run_script(f"{SCRIPTS}/train_teacher.py", "--environment", environment, "--algorithm", algorithm,
               "--teacher_steps", 150, "--hyperparameters", json.dumps(settings),
               "--episodes", 2, "--eval_episodes", 1)  # fmt: skip
    folder = RUNS / f"teacher_{environment}_{algorithm}"
    assert read_json(folder / "results.json")["models"]["student"] is None
    assert f"teacher: {folder}/stages/teacher\nreport:  {folder}/report.md" in capsys.readouterr().out
    distill("--environment", environment, "--teacher", folder, "--no_control", "--episodes", 3)
    results = read_json(RUNS / f"distill_{environment}" / "results.json")
    assert results["models"]["teacher"]["name"].startswith(algorithm)
    if environment == "Pendulum-v1":  # returns are negative: retention counts from the random policy
        student = results["models"]["student"]["metrics"]["test"]
        assert student["return_mean"] < 0 and results["retention"] in (None, student["normalized_return"])


@pytest.mark.slow
def test_several_environments_share_one_body(capsys):
    teachers = []
    for name in ("CartPole-v1", "MountainCar-v0"):
        PPO("MlpPolicy", name, n_steps=32, batch_size=32, device="cpu").learn(64).save(f"{name}.zip")
        teachers.append(f"{name}.zip")
    distill("--environment", "CartPole-v1", "MountainCar-v0", "--teacher", *teachers, "--output_dir", "both",
            "--episodes", 3)  # fmt: skip
    names = ("CartPole-v1", "MountainCar-v0")
    students = [PPO.load(f"both/{name}/student/student.zip", device="cpu").policy for name in names]
    pole, car = (student.mlp_extractor.policy_net for student in students)
    assert torch.equal(pole[2].weight, car[2].weight) and pole[0].weight.shape != car[0].weight.shape
    assert [student.action_net.out_features for student in students] == [2, 3]
    history = read_json("both/stages/student/stage.json")["history"]
    for name in names:
        results = read_json(f"both/{name}/results.json")
        assert results["task"] == name
        last = history[-1][f"eval_return_mean/{name}"]
        assert last == results["models"]["student"]["metrics"]["validation"]["return_mean"]
    printed = capsys.readouterr().out
    assert all(f"student: both/{name}/student\n" in printed for name in names)
    words = ["--environment", "CartPole-v1", "MountainCar-v0", "--output_dir", "both"]
    assert "contains a finished run" in error_line(capsys, *words, "--teacher", *teachers)


@pytest.fixture
def short_videos(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "MAX_FRAMES", 40)


@pytest.mark.usefixtures("short_videos")
def test_videos(cart_pole):
    words = [cart_pole, "--environment", "CartPole-v1", "--episodes", 1, "--video"]
    run_script(f"{SCRIPTS}/evaluate.py", *words, "cart.gif")
    run_script(f"{SCRIPTS}/evaluate.py", *words, "cart.mp4")
    assert Image.open("cart.gif").size == (600, 400) and Image.open("cart.gif").n_frames > 3
    assert Path("cart.mp4").read_bytes()[4:8] == b"ftyp"


@pytest.mark.usefixtures("short_videos")
def test_gif_replaces_an_mp4_that_cannot_be_written(cart_pole, monkeypatch):
    write = video.imageio.v3.imwrite

    def without_ffmpeg(path: Path, *rest: Any, **more: Any) -> Any:
        if more.get("plugin") == "FFMPEG":
            raise OSError("no ffmpeg")
        return write(path, *rest, **more)

    monkeypatch.setattr(video.imageio.v3, "imwrite", without_ffmpeg)
    words = [cart_pole, "--environment", "CartPole-v1", "--episodes", 1, "--video", "c.mp4"]
    run_script(f"{SCRIPTS}/evaluate.py", *words)
    assert Path("c.gif").exists() and not Path("c.mp4").exists()


@pytest.mark.usefixtures("short_videos")
def test_incomplete_video_is_removed(cart_pole, monkeypatch, capsys):
    words = [cart_pole, "--environment", "CartPole-v1", "--episodes", 1, "--video"]
    Path("file").touch()
    Path("c.gif").write_text("another file")
    for name in ("file/c.gif", "file/deeper/c.mp4"):
        assert "is not a writable folder" in error_line(capsys, *words, name, script="evaluate.py")
    with monkeypatch.context() as broken:
        broken.setattr(video.imageio.v3, "imwrite", lambda path, *_, **__: Path(path).write_text("half") and 1 / 0)
        assert "c.gif exists: pass --video" in error_line(capsys, *words, "c.mp4", script="evaluate.py")
    assert sorted(path.name for path in Path().iterdir()) == ["c.gif", "file"]
    assert Path("c.gif").read_text() == "another file"
    run_script(f"{SCRIPTS}/evaluate.py", *words, "new/folder/cart.gif")
    assert Image.open("new/folder/cart.gif").n_frames > 3


@pytest.mark.parametrize("steps", [16, pytest.param(64, marks=pytest.mark.slow)])
def test_statistics_are_found_by_name_or_by_flag(steps, capsys):
    """Returns are those of `evaluate_policy` of Stable-Baselines3 with VecNormalize."""
    env = VecNormalize(SB3Environments("Pendulum-v1", 2), norm_reward=False)
    saving = CheckpointCallback(8, ".", save_vecnormalize=True)
    model = PPO("MlpPolicy", env, n_steps=16, batch_size=32, n_epochs=1, seed=0, device="cpu").learn(64, saving)
    with torch.no_grad():
        model.policy.action_net.weight.mul_(100)  # actions that depend on the observation
    zip, statistics = f"rl_model_{steps}_steps.zip", f"rl_model_vecnormalize_{steps}_steps.pkl"
    model.save(zip)
    env.save(statistics)
    normalized = VecNormalize.load(statistics, SB3Environments("Pendulum-v1", 2, TEST_SEED))
    normalized.training = False
    expected, _ = evaluate_policy(model, normalized, n_eval_episodes=2, warn=False)
    words = ["--environment", "Pendulum-v1", "--episodes", 2, "--json", "found.json"]

    def found(*more: object) -> tuple[float, str]:
        run_script(f"{SCRIPTS}/evaluate.py", zip, *words, *more)
        entry = read_json("found.json")
        return entry["metrics"]["test"]["return_mean"], entry["observation_statistics"]

    assert found() == (pytest.approx(expected, rel=1e-3), statistics)
    assert f"statistics of observations: {statistics}" in capsys.readouterr().out
    Path(statistics).rename("my_norm.pkl")
    assert "pass --vecnormalize" in error_line(capsys, zip, *words, script="evaluate.py")
    assert found("--vecnormalize", "my_norm.pkl") == (pytest.approx(expected, rel=1e-3), "my_norm.pkl")
    raw, source = found("--vecnormalize", "none")
    assert source == "none" and raw != pytest.approx(expected, rel=1e-3)
    assert "my_norm.pkl" in error_line(capsys, "--environment", "Pendulum-v1", "--teacher", zip)
    words = ["--teacher", zip, "--vecnormalize", "my_norm.pkl", "--no_control", "--episodes", 3]
    distill("--environment", "Pendulum-v1", *words)
    results = read_json(RUNS / "distill_Pendulum-v1" / "results.json")
    assert results["teacher_observation_statistics"] == "my_norm.pkl"
    assert "my_norm.pkl" in (RUNS / "distill_Pendulum-v1" / "report.md").read_text()
    VecNormalize(SB3Environments("CartPole-v1", 1)).save("cart.pkl")
    capsys.readouterr()
    words = ["--environment", "Pendulum-v1", "--teacher", zip, "--vecnormalize"]
    assert "of shape (4,), but the environment's have shape (3,)" in error_line(capsys, *words, "cart.pkl")


def test_teacher_no_better_than_random_gives_a_warning_before_distillation(monkeypatch, capsys):
    model = PPO("MlpPolicy", "CartPole-v1", n_steps=32, batch_size=32, device="cpu")
    with torch.no_grad():
        model.policy.action_net.bias.copy_(torch.tensor([9.0, 0.0]))  # always left: at most ten steps
    model.save("left.zip")
    warned = []

    def interrupt(*_: Any) -> dict[str, float]:
        warned.append(capsys.readouterr().err)
        raise KeyboardInterrupt

    fit = distillation.Distiller._fit
    monkeypatch.setattr(distillation.Distiller, "_fit", interrupt)
    with pytest.raises(SystemExit):
        distill("--teacher", "left.zip", "--output_dir", "left", "--no_control")
    assert "warning: teacher ppo left is no better than chance: its mean return is" in warned[0]
    monkeypatch.setattr(distillation.Distiller, "_fit", fit)
    distill("--teacher", "left.zip", "--output_dir", "left", "--no_control", "--resume_from_checkpoint")
    results = read_json("left/results.json")
    assert any("no better than chance" in warning for warning in results["warnings"])
    assert "**Warning:** teacher ppo left" in Path("left/report.md").read_text()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--environment", "CartPol-v1"], "did you mean CartPole-v"),
        (["--environment", "LunarLander-v2"], "LunarLander-v3"),
        (["--teacher", "nowhere.zip"], "there is no teacher at nowhere.zip"),
        (["--teacher", "sb3/ppo-CartPole-v1"], "the Hub cannot be reached"),
        (["--environment", "Pendulum-v1", "--teacher", "{cart_pole}"], "was trained for observations Box [4]"),
        (["--environment", "CartPole-v1", "Acrobot-v1", "--method", "ppd"], "one --environment at a time"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--hyperparameters", "{gamma"], "is not valid JSON"),
        (["--hyperparameters", '{"gama": 0.9}', "--teacher", "train"], "gama"),
        (["--hyperparameters", "[1]"], "must be a JSON object"),
        (["--hyperparameters", '{"policy_kwargs": 3}'], "policy_kwargs must be an object"),
        (["--hyperparameters", '{"use_sde": true}'], "use_sde"),
        (["--hyperparameters", '{"batch_size": 0}'], "invalid hyper-parameters of ppo"),
        (["--hyperparameters", '{"learning_rate": NaN}'], "learning_rate must be a finite number"),
        (["--hyperparameters", '{"gamma": 2}'], "gamma must be a finite number, between 0 and 1"),
        (["--teacher_steps", "100"], "raise --teacher_steps or lower n_steps"),
        (["--teacher", "{cart_pole}", "--vecnormalize", "nowhere.pkl"], "there is no file nowhere.pkl"),
        (["--teacher", "{cart_pole}", "--vecnormalize", "none", "none"], "one --vecnormalize for each --environment"),
        (["--vecnormalize", "none"], "leave it out for --teacher train"),
        (["--environment", "Pendulum-v1", "--loss", "nll"], "needs discrete actions"),  # before a teacher is trained
        (["--environment", "CartPole-v1", "CartPol-v1"], "did you mean CartPole-v"),
        (["--seed", "-1"], "--seed must be between 0"),
        (["--seeds", "0", "-1"], "--seeds must be between 0"),
        (["--seeds", "0", "0"], "each named once"),
        (["--teacher_weight", "-1"], "--teacher_weight must be at least 0"),
        (["--teacher", "{cart_pole}", "--output_dir", "{cart_pole}/run"], "Not a directory"),
        (["--channels", "8"], "three convolutions"),
        (["--teacher", "{cart_pole}", "--student_share", "0.001"], "is not enough for two hidden layers"),
        (["--student_share", "0.05", "--student", "8"], "--student_share sets the widths"),
        (["--environment", "CartPole-v1", "Acrobot-v1", "--student_share", "0.1"], "supports a single --environment"),
        (["--environment", "ALE/Pong-v5", "--student_share", "0.1"], "pass --student and --channels"),
        (["--no_control", "--control_cpu_time"], "--no_control leaves out every control"),
        (["--teacher_temperature", "0"], "--teacher_temperature must be above 0"),
        (["--report_to", "foo"], "--report_to foo is unknown or not installed"),
        (["--report_to", "none", "tensorboard"], "leave out none or the others"),
    ],
)
def test_invalid_input_gives_one_line(words, expected, cart_pole, capsys):
    assert expected in error_line(capsys, *[word.replace("{cart_pole}", cart_pole) for word in words])
    assert not RUNS.exists()


def test_folder_with_other_files_raises_an_error_before_training(capsys):
    Path("other").mkdir()
    Path("other/thesis.tex").write_text("text")
    assert "contains no run (thesis.tex)" in error_line(capsys, *TEACHER, "--output_dir", "other")
    assert not Path("runs").exists()


def test_loss_without_a_distribution_raises_an_error_before_writing(capsys):
    TD3("MlpPolicy", "Pendulum-v1", buffer_size=10, device="cpu").save("td3.zip")
    words = ["--environment", "Pendulum-v1", "--teacher", "td3.zip"]
    assert "a deterministic teacher has no distribution" in error_line(capsys, *words)
    assert "a deterministic teacher has no distribution" in error_line(capsys, *words, "--method", "ppd")
    assert not RUNS.exists()
    distill(*words, "--loss", "huber", "--no_control")


def test_student_of_several_teachers_learns_their_average(cart_pole):
    models = [
        PPO.load(cart_pole, device="cpu"),
        PPO("MlpPolicy", "CartPole-v1", policy_kwargs={"net_arch": [8]}, device="cpu"),
    ]
    for model, name, bias in zip(models, ("first", "other"), ([5.0, 0.0], [0.0, 50.0]), strict=True):
        with torch.no_grad():  # the first always goes left, the other and the average always right
            model.policy.action_net.bias.copy_(torch.tensor(bias))
        model.save(f"{name}.zip")

    distill("--teacher", "first.zip", "--ensemble_teachers", "other.zip", "--no_control", "--output_dir", "two")
    results = read_json("two/results.json")
    teacher = results["models"]["teacher"]
    assert teacher["name"] == "ppo first + ppo other" and teacher["observation_statistics"] == "none + none"
    assert teacher["parameters"] == sum(p.numel() for model in models for p in model.policy.parameters())
    test = teacher["metrics"]["test"]
    act = lambda rows: torch.ones(len(rows), dtype=torch.long)  # noqa: E731
    returns, _ = returns_of(act, "CartPole-v1", test["episodes"], TEST_SEED)
    assert test["return_mean"] == pytest.approx(returns.mean())
    student = PPO.load("two/student/student.zip", device="cpu")
    assert student.predict(np.zeros((1, 4), np.float32), deterministic=True)[0].item() == 1

    words = ["--teacher", "first.zip", "--ensemble_teachers", "other.zip", "--no_control", "--output_dir", "weighted"]
    distill(*words, "--ensemble_weights", 30, 1)  # 30 * 5 to the left, 50 to the right
    student = PPO.load("weighted/student/student.zip", device="cpu")
    assert student.predict(np.zeros((1, 4), np.float32), deterministic=True)[0].item() == 0


def test_invalid_ensemble_of_teachers_raises_an_error_before_training(cart_pole, capsys):
    more = [*TEACHER, "--ensemble_teachers", cart_pole]
    assert "supports a single --environment" in error_line(capsys, *more, "--environment", "CartPole-v1", "Acrobot-v1")
    assert "--method ppd needs a single teacher" in error_line(capsys, *more, "--method", "ppd")
    assert "was trained for" in error_line(capsys, *more, "--environment", "Acrobot-v1")
    assert "and one for each of --ensemble_teachers" in error_line(
        capsys, "--teacher", cart_pole, "--ensemble_teachers", cart_pole, "--vecnormalize", "none"
    )
    assert "pass a file or folder" in error_line(capsys, *TEACHER, "--ensemble_teachers", "train")
    TD3("MlpPolicy", "Pendulum-v1", buffer_size=10, device="cpu").save("td3.zip")
    PPO("MlpPolicy", "Pendulum-v1", device="cpu").save("ppo.zip")
    words = ["--environment", "Pendulum-v1", "--teacher", "ppo.zip", "--ensemble_teachers", "td3.zip"]
    assert "a deterministic teacher has no distribution" in error_line(capsys, *words)
    assert not RUNS.exists()
    distill(*words, "--loss", "mse", "--no_control", "--output_dir", "averaged")
    assert read_json("averaged/results.json")["models"]["teacher"]["name"] == "ppo ppo + td3 td3"


def test_train_teacher_takes_one_seed(capsys):
    assert "pass --seed instead of --seeds" in error_line(capsys, "--seeds", 0, 1, script="train_teacher.py")
    assert not RUNS.exists()


def test_evaluate_needs_the_environment(cart_pole, capsys):
    line = error_line(capsys, cart_pole, script="evaluate.py")
    assert "pass --environment" in line
    assert "--video writes an mp4 or a gif" in error_line(
        capsys, cart_pole, "--environment", "CartPole-v1", "--video", "cart.txt", script="evaluate.py"
    )


def zoo(*words: object) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(REPO / SCRIPTS / "distill_zoo.sh"), *map(str, words)]
    environment = os.environ | {"PYTHON": sys.executable}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "error: pass the folder of the agents first"),
        (["zoo", "ppo/Hoper-v3_1"], "error: ppo/Hoper-v3_1 is none of the agents of distill_zoo.sh"),
    ],
)
def test_agents_of_the_zoo_are_named(words, expected):
    done = zoo(*words)
    assert done.returncode == 2 and done.stderr.startswith(expected) and not RUNS.exists()


@pytest.mark.slow
def test_a_run_and_a_row_of_the_table_for_each_agent_of_the_zoo(shared):
    words = [shared / "agents", "qrdqn/CartPole-v1_1", "ppo/CartPole-v1_1", *SHORT, "--seeds", 0]
    assert "is none of the agents" in zoo(*words).stderr
    words.remove("ppo/CartPole-v1_1")
    assert (done := zoo(*words)).returncode == 0, done.stderr[-2000:]
    table = (RUNS / "zoo" / "table.md").read_text()
    assert "| qrdqn CartPole-v1 | CartPole-v1 | 67,586 | 3,350 (5%) | 500.0 |" in table
    assert "finished: " in zoo(*words).stdout, "a second command only writes the table"


@pytest.mark.slow
def test_pong_from_frames_to_small_students_of_one_teacher():
    short = ["--steps", 256, "--rounds", 2, "--updates", 2, "--batch_size", 32, "--episodes", 1, "--eval_episodes", 1]
    short += ["--env_kwargs", json.dumps({"max_num_frames_per_episode": 400})]
    frames = np.zeros((1, 4, 84, 84), np.uint8)
    of_first = ["--teacher", RUNS / "pong_25_percent" / "stages" / "teacher", "--no_control"]
    for size, words in ((25, ["--teacher", "train", "--teacher_steps", 1024]), (7, of_first), (4, of_first)):
        command = ["bash", REPO / SCRIPTS / "distill_pong.sh", size, *short, *words]
        environment = os.environ | {"PYTHON": sys.executable}
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
        student = RUNS / f"pong_{size}_percent" / "student" / "student.zip"
        assert PPO.load(student, device="cpu").predict(frames)[0].shape == (1,)
    assert {path.parts[-4] for path in RUNS.glob("*/stages/teacher/*")} == {"pong_25_percent"}


def test_size_of_a_pong_student_is_required():
    command = ["bash", str(REPO / SCRIPTS / "distill_pong.sh"), "--steps", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith("error: pass the size of the student first")
    assert not RUNS.exists()


@pytest.mark.slow
@pytest.mark.parametrize("script", ["distill_hopper.sh", "distill_pong.sh 7"])
def test_recipes_with_a_published_teacher_need_the_hub_or_a_teacher(script):
    """They do not continue with a weak teacher."""
    name, *words = script.split()
    environment = os.environ | {"PYTHON": sys.executable, "HF_HUB_OFFLINE": "1", "HF_HOME": "hub"}
    command = ["bash", str(REPO / SCRIPTS / name), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 2 and "pass --teacher" in done.stderr.splitlines()[-1] and not RUNS.exists()


@pytest.mark.slow
def test_default_command_in_a_new_process():
    command = [sys.executable, str(REPO / SCRIPTS / "distill_policy.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((RUNS / "distill_CartPole-v1" / "results.json").read_text())
    assert results["models"]["student"]["metrics"]["test"]["return_mean"] >= 475
