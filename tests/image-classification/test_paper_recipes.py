"""The pairs and recipes of the CIFAR-100 tables run unchanged: two steps on random images of the right shape."""

import inspect
from pathlib import Path

import pytest
import yaml

from kd.common.cli import parse
from kd.common.methods import fill_arguments, parse_method
from kd.common.utils.files import read_json
from kd.image_classification.student_model.arguments import (
    ImageTrainingArguments,
    PairArguments,
)
from kd.image_classification.student_model.data_arguments import (
    DataArguments,
)
from kd.image_classification.student_model.methods import METHODS
from kd.image_classification.student_model.pairs import PAIRS, PAIRS_BY_NAME
from kd.image_classification.teacher_model.backbones.timm_networks import known_weights
from kd_testing.image_files import pixels, write
from kd_testing.paths import REPO
from kd_testing.scripts import run_script

RECIPES = REPO / "image-classification" / "scripts"
QUICK = "resnet56_resnet20"
NAMES = [f"class {i}" for i in range(100)]


@pytest.fixture(scope="module")
def cifar100_shaped(tmp_path_factory: pytest.TempPathFactory) -> str:
    labels = [i % 100 for i in range(128)]
    folder = tmp_path_factory.mktemp("cifar100")
    return write(folder, NAMES, train=(pixels(128, 32, 32, 3), labels), test=(pixels(20, 32, 32, 3), labels[:20]))


def dry_run(dataset: str, folder: Path, pair: str, *words: object) -> None:
    """Runs one epoch of the protocol, which has two steps."""
    run_script("image-classification/scripts/train_student.py", RECIPES / "paper.yaml", "--pair", pair, *words,
               "--dataset", dataset, "--num_train_epochs", 1, "--report_to", "none",
               "--output_dir", folder)  # fmt: skip


@pytest.mark.parametrize(
    "pair", [pytest.param(p, marks=[] if p == QUICK else pytest.mark.slow) for p in PAIRS_BY_NAME]
)
def test_every_pair_of_the_tables_runs(pair, cifar100_shaped, tmp_path):
    few = ["--max_train_samples", 32, "--per_device_train_batch_size", 16, "--no_control"]
    dry_run(cifar100_shaped, tmp_path / "run", pair, "--method", "kd", *few)
    results = read_json(tmp_path / "run" / "results.json")
    assert results["data"]["train"] == 32 and results["method"] == "kd"
    teacher, student = pair.split("_", 1) if not pair.startswith("wrn") else (pair[:8], pair[9:])
    recipe = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert (recipe["teacher"], recipe["student"]) == (teacher, student) and "pair" not in recipe
    assert recipe["learning_rate"] == (0.01 if student.startswith(("shufflenet", "mobilenet")) else 0.05)
    assert recipe["lr_milestones"] == [150, 180, 210] and recipe["weight_decay"] == 5e-4


def test_command_line_flags_override_those_of_a_pair(tmp_path):
    (tmp_path / "recipe.yaml").write_text("learning_rate: 0.05\nstudent: vgg8\n")
    words = ["--pair", "vgg13_mobilenetv2", "--teacher", "resnet8", "--method_args", "kd:alpha=0"]
    types = PairArguments, DataArguments, ImageTrainingArguments
    pair, data, training = parse(*types, argv=[str(tmp_path / "recipe.yaml"), *words])
    pair.apply_pair(data, training)
    assert (pair.teacher, pair.student, pair.method_args) == ("resnet8", "mobilenetv2", ["kd:alpha=0"])
    assert data.dataset == "cifar100" and training.learning_rate == 0.01


# Arguments of the runs with the published figures. KD and MLKD with logit standardization: (temperature, weight), the
# authors' logs; DKD with it: (temperature, weight, beta), the same; DKD: beta, mdistiller's configurations; ReviewKD:
# weight, the authors' script; CAT-KD: (weight, size, normalized), the authors' configurations; RLD: (alpha, beta,
# temperature), and ABKD: (alpha, beta, weight * temperature^2), the authors' READMEs.
PUBLISHED: dict[str, dict[str, tuple]] = {
    "resnet32x4_resnet8x4": {"dkd": (8,), "lskd": (2, 9), "dkd_ls": (2, 9, 8), "mlkd_ls": (2, 9), "reviewkd": (5,),
                             "catkd": (15, 2, False)},
    "resnet32x4_shufflenetv1": {"dkd": (8,), "reviewkd": (5,), "catkd": (600, 4, True)},
    "resnet32x4_shufflenetv2": {"dkd": (8,), "lskd": (2, 9), "dkd_ls": (2, 9, 8), "mlkd_ls": (2, 6), "reviewkd": (8,),
                                "catkd": (600, 4, True)},
    "wrn_40_2_wrn_16_2": {"dkd": (6,), "lskd": (2, 9), "dkd_ls": (2, 12, 2), "mlkd_ls": (2, 9), "reviewkd": (5,),
                          "catkd": (12, 2, False)},
    "wrn_40_2_wrn_40_1": {"dkd": (6,), "lskd": (2, 9), "dkd_ls": (2, 12, 2), "mlkd_ls": (2, 9), "reviewkd": (5,),
                          "catkd": (1.5, 2, False)},
    "wrn_40_2_resnet8x4": {"lskd": (2, 9), "dkd_ls": (2, 18, 2), "mlkd_ls": (2, 9)},
    "wrn_40_2_shufflenetv1": {"dkd": (8,), "reviewkd": (5,), "catkd": (80, 4, True)},
    "vgg13_vgg8": {"dkd": (6,), "lskd": (3, 9), "dkd_ls": (2, 15, 2), "mlkd_ls": (2, 6), "catkd": (4.5, 2, False),
                   "rld": (1, 8, 4)},
    "vgg13_mobilenetv2": {"dkd": (6,), "lskd": (3, 9), "dkd_ls": (3, 9, 2), "mlkd_ls": (2, 6),
                          "catkd": (15, 2, True)},
    "resnet50_mobilenetv2": {"dkd": (8,), "lskd": (3, 1), "dkd_ls": (2, 15, 2), "mlkd_ls": (2, 9),
                             "catkd": (40, 2, True)},
    "resnet56_resnet20": {"dkd": (2,), "lskd": (2, 9), "dkd_ls": (3, 18, 2), "reviewkd": (0.6,),
                          "catkd": (0.7, 2, False), "abkd": (0.8, 0.3, 32)},
    "resnet110_resnet32": {"dkd": (2,), "lskd": (2, 9), "dkd_ls": (2, 15, 2), "mlkd_ls": (2, 9), "reviewkd": (1,),
                           "catkd": (1.8, 2, False)},
    "resnet110_resnet20": {"lskd": (4, 12), "dkd_ls": (2, 15, 2), "mlkd_ls": (2, 9)},
    "resnet32x4_shufflenetv2x1.5": {},
    "resnet32x4_vgg8": {},
    "resnet50_vgg8": {},
}  # fmt: skip


def as_published(name: str, arguments: dict) -> tuple:
    """The arguments of a method in the form in which its authors publish them."""
    if name == "dkd_ls":  # alpha and beta are DKD's, 1 and beta, times the weight
        return arguments["temperature"], arguments["alpha"], arguments["beta"] / arguments["alpha"]
    if name == "abkd":  # its divergence is not scaled by T^2
        return arguments["alpha"], arguments["beta"], arguments["weight"] * arguments["temperature"] ** 2
    words = {
        "dkd": ["beta"],
        "reviewkd": ["weight"],
        "catkd": ["weight", "size", "normalized"],
        "rld": ["alpha", "beta", "temperature"],
    }
    return tuple(arguments[word] for word in words.get(name, ["temperature", "weight"]))


@pytest.mark.parametrize("pair", PAIRS_BY_NAME)
def test_a_pair_has_the_published_arguments(pair):
    arguments = PAIRS[PAIRS_BY_NAME[pair]]
    for name, expected in PUBLISHED[pair].items():
        spec = fill_arguments(name, arguments, METHODS)
        parameters = inspect.signature(parse_method(spec, METHODS)).parameters
        found = as_published(name, {key: p.default for key, p in parameters.items()})
        assert found == pytest.approx(expected), name
        if name == "dkd":
            assert (parameters["alpha"].default, parameters["temperature"].default) == (1, 4)
    listed = {spec.split(":")[0] for spec in arguments}
    assert listed <= PUBLISHED[pair].keys(), "nothing that no source has"


def test_multi_level_distillation_has_its_published_protocol():
    """480 epochs with the milestones of 240, and half the learning rate."""
    recipe = yaml.safe_load((RECIPES / "strong.yaml").read_text())
    assert recipe["strong_augmentation"] is True and recipe["num_train_epochs"] == 480
    assert recipe["lr_milestones"] == [150, 180, 210] and recipe["learning_rate"] == 0.025


def test_imagenet_has_the_published_teacher():
    """torchvision's first weights, which are not timm's default."""
    name = yaml.safe_load((RECIPES / "imagenet.yaml").read_text())["teacher"].removeprefix("timm:")
    assert known_weights(name).url == "https://download.pytorch.org/models/resnet50-0676ba61.pth"
    assert known_weights("resnet50").url != known_weights(name).url


def test_arguments_of_a_pair_are_reported_and_overridden_by_those_of_the_method(cifar100_shaped, tmp_path):
    few = ["--max_train_samples", 16, "--per_device_train_batch_size", 8, "--no_control", "--student", "resnet8"]
    few += ["--method_args", "dkd:beta=6", "lskd:temperature=3"]
    for name, words, expected in (
        ("bare", ["--method", "dkd"], "dkd:beta=6"),
        ("overridden", ["--method", "dkd:beta=1:alpha=2"], "dkd:beta=1:alpha=2"),
    ):
        dry_run(cifar100_shaped, tmp_path / name, QUICK, "--teacher", "resnet8", *words, *few)
        assert read_json(tmp_path / name / "results.json")["method"] == expected
    words = ["--teacher", "resnet8", "--methods", "kd,dkd", "--seed", 0]
    dry_run(cifar100_shaped, tmp_path / "several", QUICK, *words, *few)
    students = tmp_path / "several" / "seed0" / "students"
    assert {path.name for path in students.iterdir()} == {"kd_lr0.05", "dkd_beta_6_lr0.05"}


@pytest.mark.slow
def test_every_method_runs_with_its_defaults(cifar100_shaped, tmp_path):
    """All methods side by side, on the fastest pair of the tables."""
    specs = [*METHODS, "simkd"]
    dry_run(cifar100_shaped, tmp_path / "run", QUICK, "--methods", ",".join(specs))
    folders = (tmp_path / "run").glob("seed*/students/*/results.json")
    found = {path.parent.name: read_json(path) for path in folders}
    assert all(results["data"]["train"] == 128 for results in found.values())
    gains = {name: results["gain_over_control"] for name, results in found.items()}
    assert len(found) == len(specs) + 2, "and the controls, of simkd one with its projector"
    assert {name for name, gain in gains.items() if gain is None} == {"none_lr0.05", "control_lr0.05"}
