"""Recipes and flags become dataclasses; bad input becomes one line on stderr and exit code 2."""

import errno
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import pytest
import torch
import yaml
from safetensors import SafetensorError
from transformers import TrainingArguments

from kd.common import cli
from kd.common.reporting.tables import print_rich
from kd.common.utils import errors
from kd.common.utils.errors import UserError
from kd_testing.paths import REPO
from kd_testing.processes import Child


class Colour(Enum):
    red = "red"
    blue = "blue"


@dataclass
class Toy:
    method: Literal["soft", "hint"] = "soft"
    temperature: float = 4.0
    layers: list[str] = field(default_factory=lambda: ["last"])
    no_control: bool = False
    shuffle: bool = True
    colour: Colour = Colour.red
    note: str | None = None
    seeds: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature},\nmust be positive")


@dataclass
class Arguments(TrainingArguments):
    alpha: float = 0.9


def recipe(folder: Path, text: str, name: str = "recipe.yaml") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def one_line(capsys: pytest.CaptureFixture[str], *argv: str, types: tuple[type, ...] = (Toy,)) -> str:
    """The error message, in one line, for an invalid command line."""
    with pytest.raises(SystemExit) as exit:
        cli.parse(*types, argv=list(argv))
    output = capsys.readouterr()
    assert exit.value.code == 2
    assert output.out == ""
    assert output.err.startswith("error: ") and output.err.endswith("\n") and output.err.count("\n") == 1
    return output.err


def test_flags_override_recipes_and_later_recipes_earlier_ones(tmp_path: Path) -> None:
    first = recipe(tmp_path, "temperature: 2\nmethod: hint\nlayers: [a, b]\nnote: first\n", "first.yaml")
    second = recipe(tmp_path, "temperature: 1e-3\nno-control: true\nshuffle: false\nnote: null\n", "second.yml")
    (toy,) = cli.parse(Toy, argv=[first, second, "--layers", "c"])
    assert toy == Toy(method="hint", temperature=0.001, layers=["c"], no_control=True, shuffle=False, note="first")


def test_values_of_recipes_keep_their_spelling(tmp_path: Path) -> None:
    (toy,) = cli.parse(Toy, argv=[recipe(tmp_path, "note: no\nseeds: []\nlayers: [on, 1.50]\n")])
    assert (toy.note, toy.seeds, toy.layers) == ("no", [], ["on", "1.50"])
    (arguments,) = cli.parse(Arguments, argv=[recipe(tmp_path, f"output_dir: {tmp_path}\nsave_strategy: no\n")])
    assert arguments.save_strategy == "no"


def test_no_arguments_give_the_defaults(tmp_path: Path) -> None:
    assert cli.parse(Toy, argv=[]) == (Toy(),)
    assert cli.parse(Toy, argv=[recipe(tmp_path, "# nothing\n")]) == (Toy(),)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--temprature", "2"], "unknown flag --temprature; did you mean --temperature?"),
        (["--temp", "2"], "unknown flag --temp"),
        (["--temp=2"], "unknown flag --temp"),
        (["--method", "nonsense"], "invalid choice: 'nonsense'"),
        (["--temperature", "warm"], "invalid float value: 'warm'"),
        (["--temperature"], "expected one argument"),
        (["--shuffle", "perhaps"], "perhaps"),
        (["--temperature", "-1"], "temperature is -1.0, must be positive"),
        (["stray"], "unexpected argument 'stray'"),
        (["--method", "soft", "late.yaml"], "unexpected argument 'late.yaml'; recipes come first"),
        (["missing.yaml"], "recipe missing.yaml does not exist"),
    ],
)
def test_bad_flags(capsys: pytest.CaptureFixture[str], argv: list[str], expected: str) -> None:
    assert expected in one_line(capsys, *argv)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("temprature: 2", "recipe.yaml: unknown key temprature; did you mean temperature?"),
        ("temp: 2", "recipe.yaml: unknown key temp"),
        ("qqq: 2", "recipe.yaml: unknown key qqq\n"),
        ("method: nonsense", "invalid choice: 'nonsense'"),
        ("- temperature", "recipe.yaml must be a mapping"),
        ("temperature", "recipe.yaml must be a mapping"),
        ("temperature: {a: 1}", "recipe.yaml: temperature is a mapping"),
        ("temperature: [1", "recipe.yaml is not valid YAML"),
        ("temperature: [1, 2]", "unexpected argument '2'"),
    ],
)
def test_bad_recipes(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, expected: str) -> None:
    assert expected in one_line(capsys, recipe(tmp_path, text))


def test_a_folder_is_no_recipe(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "folder.yaml").mkdir()
    assert "cannot read recipe" in one_line(capsys, str(tmp_path / "folder.yaml"))


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--learning_rat", "1"], "unknown flag --learning_rat; did you mean --learning_rate?"),
        (["--fp16", "--bf16", "--use_cpu"], "At most one of fp16 and bf16"),
        (["--lr_scheduler_kwargs", "{broken"], "{broken is not valid JSON"),
        (["--accelerator_config", '{"nonsense": 1}'], "nonsense"),
        (["--optim", "magic"], "invalid choice: 'magic'"),
    ],
)
def test_bad_training_arguments(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, argv: list[str], expected: str
) -> None:
    assert expected in one_line(capsys, "--output_dir", str(tmp_path), *argv, types=(Toy, Arguments))


def test_help_names_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.parse(Toy, Arguments, argv=["--help"])
    assert exit.value.code == 0
    assert {"--temperature", "--alpha", "--learning_rate"} <= set(capsys.readouterr().out.replace(",", " ").split())


@pytest.mark.parametrize(
    "command",
    [
        "",
        "--learning_rate 1e-5 --num_train_epochs 2.5 --eval_strategy epoch --save_strategy epoch --max_steps -1",
        "--load_best_model_at_end --eval_strategy steps --eval_steps 50 --save_steps 100",
        "--lr_scheduler_type cosine_with_restarts --lr_scheduler_kwargs '{\"num_cycles\": 3}'",
        '--accelerator_config \'{"split_batches": true, "use_seedable_sampler": false}\'',
        "--report_to tensorboard --label_names labels idx --max_grad_norm 0 --bf16 --use_cpu",
        "--report_to tensorboard wandb --include_for_metrics loss --alpha 0.5",
        "--gradient_checkpointing --gradient_checkpointing_kwargs '{\"use_reentrant\": false}'",
        "--no_remove_unused_columns --include_num_input_tokens_seen --debug underflow_overflow",
        "--tf32 false --disable_tqdm true --ddp_find_unused_parameters false --run_name no",
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_saved_recipe_gives_the_same_arguments(tmp_path: Path, command: str) -> None:
    toy_words = ["--method", "hint", "--colour", "blue", "--no_shuffle", "--seeds", "1", "2", "--note", "a: # 'b'\n"]
    argv = ["--output_dir", str(tmp_path / "run"), *shlex.split(command), *toy_words]
    toy, arguments = cli.parse(Toy, Arguments, argv=argv)
    cli.save_recipe(tmp_path / "recipe.yaml", toy, arguments)
    toy_again, arguments_again = cli.parse(Toy, Arguments, argv=[str(tmp_path / "recipe.yaml")])
    assert arguments.to_dict() == arguments_again.to_dict()
    assert toy == toy_again
    assert toy.seeds == [1, 2] and toy.note == "a: # 'b'\n" and toy.shuffle is False and toy.colour == "blue"


def test_saved_recipe_keeps_no_secret_and_no_none(tmp_path: Path) -> None:
    cli.save_recipe(tmp_path / "recipe.yaml", Arguments(output_dir=str(tmp_path), hub_token="secret"), Toy(seeds=[]))
    saved = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    assert "secret" not in (tmp_path / "recipe.yaml").read_text()
    assert None not in saved.values()
    assert saved["colour"] == "red" and saved["seeds"] == [] and saved["learning_rate"] == 5e-5


def test_run_turns_a_user_error_into_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise UserError("teacher runs/a not found;\n  train it first")

    with pytest.raises(SystemExit) as exit:
        cli.run(main)
    assert exit.value.code == 2
    assert capsys.readouterr().err == "error: teacher runs/a not found; train it first\n"


@dataclass
class Resumable:
    output_dir: str = "run"
    resume_from_checkpoint: bool = False


@pytest.mark.parametrize("begun", [True, False])
def test_an_interruption_names_the_flag_that_continues_a_run_that_has_started(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    monkeypatch.chdir(tmp_path)

    def main() -> None:
        cli.parse(Resumable, argv=[])
        if begun:
            Path("run").mkdir()
            recipe(tmp_path / "run", "seed: 0\n")
        raise KeyboardInterrupt

    assert ended(main) == 130
    hint = ": the same command with --resume_from_checkpoint continues the run" if begun else ""
    assert capsys.readouterr().err == f"interrupted{hint}\n"


def ended(main: Callable[[], None]) -> Any:
    """The exit code of a script."""
    with pytest.raises(SystemExit) as exit:
        cli.run(main)
    return exit.value.code


def raising(error: BaseException, cause: BaseException | None = None) -> Callable[[], None]:
    """A main that raises an error from another one."""

    def main() -> None:
        raise error from cause

    return main


FULL = OSError(errno.ENOSPC, "No space left on device", "a/b")


@pytest.mark.parametrize(
    ("error", "cause", "expected"),
    [
        (FULL, None, "a/b: No space left on device"),
        (OSError(errno.EMFILE, "Too many open files"), None, "Too many open files"),
        (PermissionError(errno.EACCES, "Permission denied", "a"), None, "a: Permission denied"),
        (OSError(errno.ENXIO, "No such device or address", "a"), None, "a: No such device or address"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"), FULL, "disk full"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"), None, "disk full"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), None, "no space left on the disk"),
        (RuntimeError("cannot save"), FULL, "a/b: No space left on device"),
        (MemoryError(), None, "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), None, "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), None, "out of memory"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), None, "--dataloader_num_workers 0"),
    ],
)
def test_an_error_of_the_operating_system_is_one_line(
    capsys: pytest.CaptureFixture[str], error: BaseException, cause: BaseException | None, expected: str
) -> None:
    assert ended(raising(error, cause)) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1 and expected in line


def test_a_user_error_in_a_worker_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    class Broken(torch.utils.data.Dataset):
        def __getitem__(self, i: int) -> int:
            raise UserError(f"row {i} is damaged")

        def __len__(self) -> int:
            return 4

    def main() -> None:
        list(torch.utils.data.DataLoader(Broken(), num_workers=1))

    assert ended(main) == 2
    assert capsys.readouterr().err == "error: row 0 is damaged\n"


def test_sigterm_is_one_line_and_143(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert ended(lambda: os.kill(os.getpid(), signal.SIGTERM)) == 143
    assert capsys.readouterr().err == "interrupted\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_run_lets_other_exceptions_through() -> None:
    def main() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cli.run(main)


PROGRAM = """
import sys
from kd.common.cli import UserError, run

def main():
    {body}

run(main)
"""


def program(body: str) -> subprocess.Popen[str]:
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    variables = os.environ | {"PYTHONPATH": f"{REPO}:{REPO / 'typings'}"}
    return subprocess.Popen([sys.executable, "-c", PROGRAM.format(body=body)], env=variables, text=True, **pipes)


def test_a_closed_pipe_is_not_an_error() -> None:
    """Uses a separate process, because Python reports output that it cannot write when a process ends."""
    process = program("[print('x' * 1000) for _ in range(10000)]")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == ("", 141)


def test_an_ascii_terminal_shows_tables_and_errors() -> None:
    def main() -> None:
        print_rich(["a"], [["0.8 ± 0.1"]], "mean ± std", "é – →")
        raise UserError("no folder é")

    process = Child(lambda: cli.run(main), encoding="ascii")
    output, error = process.stdout.read(), process.stderr.read()
    assert process.wait() == 2
    assert "0.8 ? 0.1" in output and "-----" in output
    assert error == "error: no folder ?\n"


@pytest.mark.parametrize("failing", [[0, 1], [1]])
def test_only_one_of_several_processes_prints_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: list[int]
) -> None:
    """Starts processes like torchrun, which ends the others when one has failed."""
    monkeypatch.setattr(errors, "PATIENCE", 1.0)

    def start(rank: int) -> Child:
        def main() -> None:
            print("started", flush=True)
            if rank in failing:
                raise UserError("no such thing")
            time.sleep(60)

        error_file = str(tmp_path / str(rank))
        variables = {"RANK": str(rank), "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_ERROR_FILE": error_file}
        with mock.patch.dict(os.environ, variables):
            return Child(lambda: cli.run(main))

    processes = [start(rank) for rank in (0, 1)]
    assert all(process.stdout.readline() == "started\n" for process in processes)
    first = failing[0]
    assert processes[first].wait() == 2
    processes[1 - first].end(signal.SIGTERM)
    assert processes[first].stderr.read() == "error: no such thing\n"
    assert processes[1 - first].stderr.read() == ""
    assert json.loads((tmp_path / str(first)).read_text())["message"] == "error: no such thing"


@pytest.mark.slow
@pytest.mark.parametrize(("failing", "printed"), [("True", 1), ("os.environ['RANK'] == '1'", 1)])
def test_only_one_process_of_torchrun_prints_the_error(tmp_path: Path, failing: str, printed: int) -> None:
    script = tmp_path / "script.py"
    body = f"import os, time\n    if {failing}:\n        raise UserError('no such thing')\n    time.sleep(60)"
    script.write_text(PROGRAM.format(body=body))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    variables = os.environ | {"PYTHONPATH": f"{REPO}:{REPO / 'typings'}"}
    done = subprocess.run([*launcher, str(script)], env=variables, capture_output=True, text=True, timeout=120)
    assert done.stderr.splitlines().count("error: no such thing") == printed
    assert done.returncode != 0 and "interrupted" not in done.stderr
    assert "traceback : error: no such thing" in done.stderr  # torchrun's summary names the reason


def test_an_interruption_of_imports_is_one_line(tmp_path: Path) -> None:
    script = tmp_path / "scripts" / "slow.py"
    script.parent.mkdir()
    # Imported code may suppress exceptions.
    body = "try:\n    print('ready', flush=True)\n    time.sleep(60)\nexcept BaseException:\n    time.sleep(60)\n"
    script.write_text(f"import time\nimport kd.common\n{body}")
    variables = os.environ | {"PYTHONPATH": str(REPO)}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, str(script)], env=variables, text=True, **pipes)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert (process.communicate()[1], process.returncode) == ("interrupted\n", 130)


def test_ctrl_c_in_a_script_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(lambda: os.kill(os.getpid(), signal.SIGINT)) == 130
    assert capsys.readouterr().err == "interrupted\n"
