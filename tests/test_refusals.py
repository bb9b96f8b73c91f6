"""Every script rejects invalid input with one line on stderr and exit code 2, and writes nothing."""

import importlib
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from kd.common.cli import Parser, parse
from kd.common.training.arguments import KDTrainingArguments, RunArguments
from kd.common.training.checks import RANGES, UNSUPPORTED
from kd.common.utils.ranges import ranges_of
from kd_testing.paths import REPO
from kd_testing.scripts import run_script

TRAINED = [  # scripts that train with KDTrainer, and the flags that they require
    ("NLP/scripts/distill_classifier.py", []),
    ("NLP/scripts/distill_bottleneck.py", []),
    ("NLP/scripts/distill_glue.py", []),
    ("NLP/scripts/distill_gpt.py", []),
    ("NLP/scripts/distill_mlm.py", []),
    ("NLP/scripts/distill_translation.py", []),
    ("NLP/scripts/train_teacher.py", []),
    ("NLP/scripts/search.py", ["--teacher", "nowhere"]),
    ("image-classification/scripts/train_teacher.py", []),
    ("image-classification/scripts/train_student.py", []),
    ("image-classification/scripts/train_simkd.py", []),
    ("image-classification/scripts/distill_bottleneck.py", []),
    ("image-classification/scripts/sweep.py", []),
]
INVALID_TRAINING_FLAGS = [
    ("--alpha 1.5", "--alpha must be between 0 and 1, got 1.5"),
    ("--alpha nan", "--alpha must be between 0 and 1, got nan"),
    ("--temperature 0", "--temperature must be above 0, got 0.0"),
    ("--temperature inf", "--temperature must be above 0, got inf"),
    ("--num_train_epochs 0", "--num_train_epochs must be above 0"),
    ("--num_train_epochs -1", "--num_train_epochs must be above 0"),
    ("--max_steps 0", "--max_steps must be at least 1, or -1, got 0"),
    ("--learning_rate -0.1", "--learning_rate must be above 0"),
    ("--learning_rate nan", "--learning_rate must be above 0"),
    ("--weight_decay -1", "--weight_decay must be at least 0"),
    ("--max_grad_norm -1", "--max_grad_norm must be at least 0"),
    ("--warmup_steps inf", "--warmup_steps must be at least 0"),
    ("--lr_milestones 3 -1", "--lr_milestones must be above 0, got -1.0"),
    ("--lr_milestones 3 2", "--lr_milestones must be in order"),
    ("--per_device_train_batch_size 0", "--per_device_train_batch_size must be at least 1"),
    ("--per_device_eval_batch_size -2", "--per_device_eval_batch_size must be at least 1"),
    ("--gradient_accumulation_steps 0", "--gradient_accumulation_steps must be at least 1"),
    ("--seed -1", "--seed must be between 0 and 4294967295"),
    ("--adam_beta1 1", "--adam_beta1 must be at least 0 and below 1"),
    ("--label_smoothing_factor 1", "--label_smoothing_factor must be at least 0 and below 1"),
    ("--train_sampling_strategy foo", "invalid choice: 'foo'"),
    ("--eval_strategy foo", "foo"),
    ("--optim foo", "foo"),
    ("--lr_scheduler_type foo", "foo"),
    ("--optim sgd --optim_args momentun=0.9", "momentun is not read by --optim sgd; did you mean momentum?"),
    ("--optim sgd --optim_args momentum", "--optim_args must be name=value"),
    ("--optim sgd --optim_args momentum=fast", "momentum=fast"),
    ("--optim sgd --optim_args momentum=nan", "--optim_args momentum must be at least 0 and below 1, got nan"),
    ("--optim sgd --optim_args nesterov=yess,momentum=0.9", "--optim_args nesterov must be true or false, got yess"),
    ("--optim sgd --optim_args nesterov=true", "Nesterov"),
    ("--optim sgd --optim_args weight_decay=1", "pass --weight_decay"),
    ("--optim adamw_torch --optim_args momentum=0.9", "momentum is not read by --optim adamw_torch"),
    ('--lr_scheduler_type linear --lr_scheduler_kwargs {"cycles":3}', "cycles"),
    ("--lr_scheduler_kwargs {broken", "is not valid JSON"),
    ("--report_to foo", "--report_to foo is unknown or not installed"),
    ("--do_train", "--do_train has no effect"),
    ("--push_to_hub", "--push_to_hub has no effect"),
    ("--remove_unused_columns", "--remove_unused_columns has no effect"),
    ("--fp16", "--fp16 has no effect, because --precision replaces it"),
    ("--bf16 --precision fp32", "--bf16 has no effect"),
    ("--run_name a", "--run_name has no effect"),
    ("--metric_for_best_model accuracy", "has no effect without --load_best_model_at_end"),
    ("--eval_steps 5", "--eval_steps has no effect, because --eval_strategy is not steps"),
    ("--logging_steps 5", "--logging_steps has no effect"),
    ("--max_steps 5 --num_train_epochs 2", "--num_train_epochs has no effect"),
    ("--lr_milestones 1 --lr_scheduler_type constant", "--lr_scheduler_type has no effect"),
    ("--dataloader_persistent_workers", "--dataloader_persistent_workers has no effect without workers"),
    ("--output_dir=", "--output_dir is empty"),
    ("--no_such_flag", "unknown flag --no_such_flag"),
    ("twice.yaml", "duplicate key alpha"),
    ("latin.yaml", "latin.yaml is not valid YAML"),
    ("folder.yaml", "cannot read recipe folder.yaml"),
    ("python.yaml", "python.yaml is not valid YAML"),
    ("nested.yaml", "is a list with items other than"),
    (f"{'long' * 500}.yaml", "File name too long"),
]
CLASSIFY, BOTTLENECK = "NLP/scripts/distill_classifier.py", "NLP/scripts/distill_bottleneck.py"
GPT, MLM, TRANSLATE, GLUE = (f"NLP/scripts/distill_{name}.py" for name in ("gpt", "mlm", "translation", "glue"))
SEARCH, NLP_EXPORT, NLP_EVALUATE, NLP_TEACHER = (
    f"NLP/scripts/{name}.py" for name in ("search", "export", "evaluate", "train_teacher")
)
STUDY = "benchmarks/key_study.py"
IMAGES = "image-classification/scripts/"
POLICY, RL_TEACHER, RL_EVALUATE = (
    f"reinforcement-learning/scripts/{name}.py" for name in ("distill_policy", "train_teacher", "evaluate")
)
LONG = "x" * 5000
INVALID_SCRIPT_FLAGS = [
    (CLASSIFY, "--max_length 4", "--max_length must be at least 8"),
    (CLASSIFY, "--student_layers 0", "--student_layers must be at least 1"),
    (CLASSIFY, "--teacher_epochs 0", "--teacher_epochs must be above 0"),
    (CLASSIFY, "--teacher_epochs 3", "--teacher_epochs has no effect, because tiny-bert has random weights"),
    (CLASSIFY, "--align_epochs -1", "--align_epochs must be at least 0"),
    (CLASSIFY, "--align_epochs 0 --align_learning_rate 1", "--align_learning_rate has no effect"),
    (CLASSIFY, "--hidden_weight -1", "--hidden_weight must be at least 0"),
    (CLASSIFY, "--attention_weight nan", "--attention_weight must be at least 0"),
    (CLASSIFY, "--student_learning_rate 0", "--student_learning_rate must be above 0"),
    (CLASSIFY, "--hidden_loss l2", "--hidden_loss has no effect"),
    (CLASSIFY, "--layer_map last", "--layer_map has no effect"),
    (CLASSIFY, "--value_learning_rate 1", "--value_learning_rate has no effect"),
    (CLASSIFY, "--method dkd --alpha 0.5", "--alpha has no effect"),
    (CLASSIFY, f"--teacher {LONG}", "error: "),
    (CLASSIFY, f"--dataset {LONG}", "error: "),
    (CLASSIFY, f"--output_dir {LONG}", "File name too long"),
    (CLASSIFY, "--text_columns=", "--text_columns is empty"),
    (BOTTLENECK, "--codebooks 0", "--codebooks must be at least 1"),
    (BOTTLENECK, "--codebook_size 0", "--codebook_size must be between 1 and 65536"),
    (BOTTLENECK, "--value_dim 0", "--value_dim must be at least 1"),
    (BOTTLENECK, "--key_dim 4", "--key_dim has no effect"),
    (BOTTLENECK, "--decoder mean --value_dim 4", "--value_dim has no effect"),
    (BOTTLENECK, "--value_epochs -1", "--value_epochs must be above 0"),
    (BOTTLENECK, "--value_batch_size 0", "--value_batch_size must be at least 1"),
    (BOTTLENECK, "--num_train_epochs 2", "--num_train_epochs has no effect"),
    (GLUE, "--max_samples_seen 0", "--max_samples_seen must be at least 1"),
    (GLUE, "--seeds -1", "--seeds must be between 0 and"),
    (GLUE, "--seeds", "--seeds must name at least one seed"),
    (GLUE, "--dataset rte", "--dataset has no effect"),
    (GLUE, "--keys new", "--keys has no effect"),
    (MLM, "--alpha 0.5", "--alpha has no effect"),
    (MLM, "--alpha_ce 0 --temperature 3", "--temperature has no effect"),
    (MLM, "--alpha_ce 0 --soft_target_positions masked", "--soft_target_positions has no effect"),
    (MLM, "--alpha_cos -1", "--alpha_cos must be at least 0"),
    (MLM, "--mask_share 1", "--mask_share must be above 0 and below 1"),
    (MLM, "--student_width 33", "--student_width must be a multiple of 32"),
    (MLM, "--learning_rate 1", "--learning_rate has no effect"),
    (NLP_TEACHER, "--alpha 0.5", "--alpha has no effect"),
    (NLP_TEACHER, "--learning_rate 1", "--learning_rate has no effect"),
    (NLP_TEACHER, "--teacher nowhere --from_scratch_learning_rate 1", "--from_scratch_learning_rate has no effect"),
    (GPT, "--block_size 1", "--block_size must be at least 2"),
    (GPT, "--block_size 99999999999999999999", "--block_size must be at most 2147483647"),
    (GPT, "--method js:beta=1", "method js: beta must be above 0 and below 1"),
    (GPT, "--method kd:beta=0.5", "method kd has no argument 'beta'"),
    (GPT, "--teacher_width 33", "--teacher_width must be a multiple"),
    (GPT, "--vocabulary_size 10", "--vocabulary_size must be at least"),
    (GPT, "--teacher_layers -1", "--teacher_layers must be at least 1"),
    (GPT, "--student_width 64", "--student_width has no effect"),
    (TRANSLATE, "--beams 0", "--beams must be at least 1"),
    (TRANSLATE, "--dropout 1", "--dropout must be at least 0 and below 1"),
    (TRANSLATE, "--source_prefix \0", "--source_prefix contains a null character"),
    (TRANSLATE, "--teacher nowhere --vocabulary_size 300", "--vocabulary_size has no effect"),
    (SEARCH, "--teacher x --trials 0", "--trials must be at least 1"),
    (SEARCH, "--teacher x --alpha_range 0 2", "--alpha_range must be between 0 and 1, got 2.0"),
    (SEARCH, "--teacher x --alpha 0.3", "--alpha has no effect"),
    (SEARCH, "--teacher x --margin 0.1", "--margin has no effect, because a search has no verdict"),
    (CLASSIFY, "--margin 0", "--margin must be above 0"),
    (SEARCH, "--teacher x --search alpha --temperature_range 1 2", "--temperature_range has no effect"),
    (SEARCH, "--teacher x --load_best_model_at_end --metric_for_best_model f1", "leave out --load_best_model_at_end"),
    (NLP_EXPORT, "nowhere", "--dataset"),
    (NLP_EXPORT, "nowhere --dataset=", "--dataset is empty"),
    (NLP_EXPORT, f"{LONG} --dataset intents", "error: "),
    (NLP_EVALUATE, "nowhere --dataset intents --json=", "--json is empty"),
    (NLP_EVALUATE, f"{LONG} --dataset intents", "error: "),
    (STUDY, f"{LONG} --dataset intents", "File name too long"),
    (IMAGES + "train_teacher.py", "--validation_share 1", "--validation_share must be at least 0 and below 1"),
    (IMAGES + "train_teacher.py", "--image_size 0", "--image_size must be at least 1"),
    (IMAGES + "train_teacher.py", "--temperature 3", "--temperature has no effect"),
    (IMAGES + "train_teacher.py", "--margin 0.1", "--margin has no effect"),
    (IMAGES + "train_teacher.py", "--train_sampling_strategy group_by_length", "invalid choice"),
    (IMAGES + "train_teacher.py", "--architecture timm:hf-hub:a/b", "timm has no model"),
    (IMAGES + "train_student.py", "--max_train_samples -5", "--max_train_samples must be at least 1"),
    (IMAGES + "train_student.py", "--teacher_epochs 0", "--teacher_epochs must be above 0"),
    (IMAGES + "train_student.py", "--method kd --seeds 3 --seed 3", "--seed has no effect"),
    (
        IMAGES + "train_student.py",
        "--pair resnet8_vgg8",
        "unknown --pair resnet8_vgg8: choose from resnet32x4_resnet8x4",
    ),
    (IMAGES + "train_student.py", "--method none --teacher_epochs 2", "--teacher_epochs has no effect"),
    (IMAGES + "train_student.py", "--method none --margin 0.1", "--margin has no effect"),
    (IMAGES + "train_student.py", "--methods kd --seeds -1", "--seeds must be between 0 and"),
    (IMAGES + "train_student.py", f"--teacher {LONG}/x", "File name too long"),
    (IMAGES + "train_simkd.py", "--projector_factor 0", "--projector_factor must be at least 1"),
    (IMAGES + "train_simkd.py", "--projector_ratio 0.5", "--projector_ratio has no effect"),
    (IMAGES + "train_simkd.py", "--alpha 0.5", "--alpha has no effect"),
    (IMAGES + "train_simkd.py", "--kl_weight -1", "--kl_weight must be at least 0"),
    (IMAGES + "distill_bottleneck.py", "--codebooks 0", "--codebooks must be at least 1"),
    (IMAGES + "sweep.py", "--learning_rates 0.1 -1", "--learning_rates must be above 0, got -1.0"),
    (IMAGES + "sweep.py", "--learning_rate 0.1", "--learning_rate has no effect"),
    (IMAGES + "sweep.py", "--methods kd --projectors multi", "--projectors has no effect"),
    (IMAGES + "train_bottleneck.py", "--epochs_per_task 0", "--epochs_per_task must be at least 1"),
    (IMAGES + "train_bottleneck.py", "--value_learning_rate inf", "--value_learning_rate must be above 0"),
    (IMAGES + "train_bottleneck.py", f"--output_dir {LONG}", "File name too long"),
    (IMAGES + "evaluate.py", LONG, "File name too long"),
    (IMAGES + "prepare_data.py", "--output=", "--output is empty"),
    (IMAGES + "prepare_data.py", f"--output {LONG}", "File name too long"),
    (POLICY, "--steps 0", "--steps must be at least 1"),
    (POLICY, "--learning_rate nan", "--learning_rate must be above 0"),
    (POLICY, "--value_weight -1", "--value_weight must be at least 0"),
    (POLICY, "--codebooks -1", "--codebooks must be at least 0"),
    (POLICY, "--student 0", "--student must be at least 1"),
    (POLICY, "--channels 1 2 0", "--channels must be at least 1"),
    (POLICY, "--teacher_entropy 1", "--teacher_entropy must be above 0 and below 1"),
    (POLICY, "--teacher_temperature 0", "--teacher_temperature must be above 0"),
    (POLICY, "--teacher_weight 2", "--teacher_weight has no effect"),
    (POLICY, "--codebook_size 8", "--codebook_size has no effect"),
    (POLICY, "--method ppd --loss mse", "--loss has no effect"),
    (POLICY, "--seeds 0 1 --seed 3", "--seed has no effect"),
    (POLICY, "--teacher x.zip --teacher_steps 5", "--teacher_steps has no effect"),
    (POLICY, "--channels 4 4 4", "--channels has no effect, because CartPole-v1 has no frames"),
    (POLICY, f"--teacher {LONG}", "error: "),
    (RL_TEACHER, "--episodes 0", "--episodes must be at least 1"),
    (RL_TEACHER, "--teacher_steps -3", "--teacher_steps must be at least 1"),
    (RL_TEACHER, "--seed 99999999999", "--seed must be between 0"),
    (RL_TEACHER, "--margin 1", "--margin has no effect"),
    (RL_TEACHER, "--hyperparameters []", "--hyperparameters must be a JSON object"),
    (RL_TEACHER, "--hyperparameters {", "is not valid JSON"),
    (RL_EVALUATE, "x.zip --episodes 0", "--episodes must be at least 1"),
    (RL_EVALUATE, f"{LONG} --environment CartPole-v1", "File name too long"),
    ("common/export/__main__.py", LONG, "File name too long"),
    ("common/export/__main__.py", "nowhere --format pickle", "invalid choice: 'pickle'"),
    ("common/export/__main__.py", "nowhere --output_dir=", "--output_dir is empty"),
    ("common/reporting/__main__.py", "nowhere", "nowhere does not exist"),
    ("common/reporting/__main__.py", LONG, "File name too long"),
    ("common/reporting/__main__.py", "nowhere --markdown=", "--markdown is empty"),
    ("common/new_domain.py", "a/b", "is not a valid name"),
    ("common/new_domain.py", LONG, "error: "),
]


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, which contains only invalid recipes."""
    (tmp_path / "twice.yaml").write_text("alpha: 0.5\nseed: 1\nalpha: 0.1\n")
    (tmp_path / "latin.yaml").write_bytes("output_dir: Übung\n".encode("latin-1"))
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "python.yaml").write_text("output_dir: !!python/object/apply:os.mkdir [ran]\n")
    (tmp_path / "nested.yaml").write_text("lr_milestones: [[1, 2], [3]]\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def error_of(capsys: pytest.CaptureFixture[str], folder: Path, script: str, *words: str) -> str:
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit) as exit:
        run_script(script, *words)
    lines = capsys.readouterr().err.splitlines(keepends=True)
    line = "".join(part for part in lines if "\r" not in part and "%|" not in part)  # without progress bars
    assert exit.value.code == 2, line
    assert line.startswith("error: ") and line.endswith("\n") and line.count("\n") == 1, line
    assert sorted(folder.rglob("*")) == before
    return line


@pytest.mark.parametrize(("script", "needed"), TRAINED, ids=[script for script, _ in TRAINED])
def test_invalid_training_flags_are_errors_of_one_line(
    capsys: pytest.CaptureFixture[str], empty: Path, script: str, needed: list[str]
) -> None:
    for words, expected in INVALID_TRAINING_FLAGS:
        arguments = [*words.split(), *needed] if words.startswith("--") else [words, *needed]
        assert expected in error_of(capsys, empty, script, *arguments), (script, words)


@pytest.mark.parametrize(("script", "words", "expected"), INVALID_SCRIPT_FLAGS)
def test_invalid_flags_of_a_script_are_errors_of_one_line(
    capsys: pytest.CaptureFixture[str], empty: Path, script: str, words: str, expected: str
) -> None:
    assert expected in error_of(capsys, empty, script, *words.split())


def argument_types() -> list[type[Any]]:
    """The dataclasses of all command lines."""
    names = [
        "kd.common.training.arguments",
        "kd.nlp.student_model.arguments",
        "kd.nlp.student_model.search_arguments",
        "kd.nlp.scripts.distill_gpt",
        "kd.nlp.scripts.distill_mlm",
        "kd.nlp.scripts.distill_translation",
        "kd.nlp.scripts.train_teacher",
        "kd.image_classification.student_model.arguments",
        *(f"kd.image_classification.scripts.{name}" for name in ("train_teacher", "prepare_data")),
        "kd.reinforcement_learning.student_model.arguments",
        "kd.reinforcement_learning.teacher_model.recipes",
    ]
    modules = [importlib.import_module(name) for name in names]
    types = [kind for module in modules for kind in vars(module).values() if getattr(kind, "__module__", "") in names]
    return sorted({kind for kind in types if isinstance(kind, type) and "Arguments" in kind.__name__}, key=str)


@pytest.mark.parametrize("kind", argument_types())
def test_every_number_has_a_range_and_every_default_lies_in_it(kind: type[Any]) -> None:
    assert is_dataclass(kind)
    kind = kind.complete() if issubclass(kind, KDTrainingArguments) else kind
    hints, ranges = get_type_hints(kind), ranges_of(kind)
    numbers = [field for field in fields(kind) if field.init and "str" not in str(hints[field.name])]
    for field in numbers:
        if "int" in str(hints[field.name]) or "float" in str(hints[field.name]):
            assert field.name in ranges
    needed = ["--teacher", "nowhere"] if kind.__name__ == "SearchArguments" else []
    Parser([kind]).parse_known_args(needed)


def test_all_flags_with_a_range_or_without_support_exist() -> None:
    names = {field.name for field in fields(KDTrainingArguments.complete())}
    assert set(UNSUPPORTED) <= names and set(RANGES) <= names


def types_of(recipe: Path) -> list[type[Any]]:
    """The argument types of the script that a recipe belongs to."""
    texts, images, policies = (
        importlib.import_module(f"kd.{domain}.student_model.arguments")
        for domain in ("nlp", "image_classification", "reinforcement_learning")
    )
    if "reinforcement-learning" in recipe.parts:
        recipes = importlib.import_module("kd.reinforcement_learning.teacher_model.recipes")
        return [
            policies.PolicyArguments,
            policies.StudentArguments,
            policies.DistillArguments,
            recipes.TeacherArguments,
        ]
    if "image-classification" in recipe.parts:
        return [
            images.MethodArguments,
            images.PairArguments,
            images.SimKDWeights,
            images.DataArguments,
            images.ImageTrainingArguments,
        ]
    if recipe.stem in ("gpt", "answers", "mlm", "sentence_encoder", "translation", "multi30k"):
        name = {"multi30k": "translation", "answers": "gpt"}.get(recipe.stem, recipe.stem)
        return list(importlib.import_module(f"kd.nlp.scripts.distill_{name}").ARGUMENTS)
    if recipe.stem == "search":
        return [texts.TextArguments, KDTrainingArguments]
    glue = [texts.GlueArguments] if recipe.stem == "glue" else []
    return [
        *glue,
        texts.TextArguments,
        texts.PairArguments,
        texts.TextBottleneckArguments,
        texts.MatchingArguments,
        KDTrainingArguments,
    ]


@pytest.mark.parametrize("recipe", sorted(REPO.glob("*/scripts/**/*.yaml")), ids=lambda path: path.name)
def test_all_recipes_are_valid(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    parse(*types_of(recipe), argv=[str(recipe)])
    assert not list(tmp_path.iterdir())


def test_arguments_write_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    KDTrainingArguments(output_dir=str(tmp_path / "run")), RunArguments(output_dir=str(tmp_path / "run"))
    assert not list(tmp_path.iterdir())
