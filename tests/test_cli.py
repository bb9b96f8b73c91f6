"""Recipes and flags become dataclasses; bad input becomes one line on stderr and exit code 2."""

import shlex
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Literal

import pytest
import yaml
from transformers import TrainingArguments

from common import cli
from common.utils.errors import UserError


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
    """Parses what must be refused; returns the one line that says so."""
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


def test_words_stay_as_written(tmp_path: Path) -> None:
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


def test_run_names_the_way_on_after_an_interruption(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as exit:
        cli.run(main)
    error = capsys.readouterr().err
    assert exit.value.code == 130
    assert "--resume_from_checkpoint" in error and error.count("\n") == 1


def test_run_lets_other_exceptions_through() -> None:
    def main() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cli.run(main)
