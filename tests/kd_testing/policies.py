"""Runs the scripts of reinforcement learning with few steps."""

import pytest

from kd_testing.scripts import recipe_of, run_script

SCRIPTS = "reinforcement-learning/scripts"
SHORT = "--steps 400 --rounds 2 --updates 20 --episodes 12 --eval_episodes 2 --num_envs 4".split()


def distill(*words: object) -> None:
    run_script(f"{SCRIPTS}/distill_policy.py", recipe_of(*SHORT), *words)


def error_line(capsys: pytest.CaptureFixture[str], *words: object, script: str = "distill_policy.py") -> str:
    """The error, one line, with which a script ends."""
    with pytest.raises(SystemExit) as stop:
        run_script(f"{SCRIPTS}/{script}", *words)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]
