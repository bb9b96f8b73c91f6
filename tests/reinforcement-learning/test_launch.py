"""Starting the scripts: in one process, with environments of modules; the layers of the domain."""

import json
import re
from pathlib import Path

import pytest
import torch
from stable_baselines3 import PPO

from kd.common.utils.errors import UserError
from kd.reinforcement_learning.data.environments import choose_threads
from kd.reinforcement_learning.data.specs import require_module_on_command_line
from kd_testing.paths import REPO
from kd_testing.scripts import run_script

SCRIPTS = [f"reinforcement-learning/scripts/{name}.py" for name in ("distill_policy", "train_teacher", "evaluate")]
MODULE = """import gymnasium
open("imported", "w").close()
gymnasium.register("Mine-v0", "gymnasium.envs.classic_control:CartPoleEnv", max_episode_steps=20)
"""


@pytest.fixture(autouse=True)
def _in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("module_of_a_user.py").write_text(MODULE)


def error_line(capsys: pytest.CaptureFixture[str], script: str, *words: object) -> str:
    with pytest.raises(SystemExit) as stop:
        run_script(script, *words)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


@pytest.mark.parametrize("script", SCRIPTS)
def test_several_processes_raise_an_error(script, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert "in one process, not in 2" in error_line(capsys, script)


def test_module_named_only_in_a_file_is_not_imported(capsys):
    id = "module_of_a_user:Mine-v0"
    Path("run/student").mkdir(parents=True)
    PPO("MlpPolicy", "CartPole-v1", device="cpu").save("run/student/student.zip")
    Path("run/results.json").write_text(json.dumps({"domain": "reinforcement-learning", "task": id}))
    expected = f"results.json names the environment {id}, and importing module_of_a_user would run its code"
    line = error_line(capsys, SCRIPTS[2], "run")
    assert expected in line and f"pass --environment {id}" in line
    Path("several.yaml").write_text(f"environment: [{id}]\n")
    Path("one.yaml").write_text(f"environment: {id}\n")
    assert "the recipe names the environment" in error_line(capsys, SCRIPTS[0], "several.yaml")
    assert "the recipe names the environment" in error_line(capsys, SCRIPTS[1], "one.yaml")
    assert not Path("imported").exists()
    run_script(SCRIPTS[2], "run", "--environment", id, "--episodes", 1)
    assert Path("imported").exists()


@pytest.mark.parametrize("content", ["[]", "{}", '{"task": 3}', "{"])
def test_damaged_results_file_raises_an_error(content, capsys):
    Path("run").mkdir()
    Path("run/results.json").write_text(content)
    assert "results.json is" in error_line(capsys, SCRIPTS[2], "run")


def test_registered_environment_need_not_be_on_the_command_line(monkeypatch):
    monkeypatch.setattr("sys.argv", ["script"])
    require_module_on_command_line("ALE/Pong-v5", "a file")
    with pytest.raises(UserError, match="would run its code"):
        require_module_on_command_line("os:Mine-v0", "a file")
    monkeypatch.setattr("sys.argv", ["script", "--environment=os:Mine-v0"])
    require_module_on_command_line("os:Mine-v0", "a file")


LAYERS = ("data", "teacher_model", "student_model")


@pytest.mark.parametrize("layer", LAYERS)
def test_layer_does_not_import_higher_layers(layer):
    above = LAYERS[LAYERS.index(layer) + 1 :]
    for path in (REPO / "reinforcement-learning" / layer).glob("*.py"):
        imports = re.findall(r"^ *(?:from|import) kd\.reinforcement_learning\.(\w+)", path.read_text(), re.MULTILINE)
        assert not set(imports) & set(above), path


def test_policies_for_vectors_use_one_thread_unless_the_user_sets_it(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    try:
        for environments, expected in {("CartPole-v1",): 1, ("CartPole-v1", "ALE/Pong-v5"): 2}.items():
            torch.set_num_threads(2)
            choose_threads(*environments)
            assert torch.get_num_threads() == expected, environments
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        choose_threads("CartPole-v1")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
