"""The recipes of the CIFAR-100 tables run as they stand: two steps on random images of the right shape."""

from pathlib import Path

import pytest
import yaml
from paths import REPO
from pictures import pixels, write
from scripts import run_script

from common.utils.files import read_json
from image_classification.student_model.methods import METHODS

RECIPES = REPO / "image-classification" / "scripts"
QUICK = "resnet56_resnet20"
PAIRS = sorted(path.stem for path in (RECIPES / "pairs").glob("*.yaml"))
NAMES = [f"class {i}" for i in range(100)]


@pytest.fixture(scope="module")
def cifar100_shaped(tmp_path_factory: pytest.TempPathFactory) -> str:
    labels = [i % 100 for i in range(128)]
    folder = tmp_path_factory.mktemp("cifar100")
    return write(folder, NAMES, train=(pixels(128, 32, 32, 3), labels), test=(pixels(20, 32, 32, 3), labels[:20]))


def dry_run(dataset: str, folder: Path, pair: str, *words: object) -> None:
    """One epoch of the protocol, which is two steps."""
    architecture = yaml.safe_load((RECIPES / "pairs" / f"{pair}.yaml").read_text())["teacher"].split("cifar100_")[1]
    run_script("image-classification/scripts/train_student.py", RECIPES / "paper.yaml",
               RECIPES / "pairs" / f"{pair}.yaml", *words, "--dataset", dataset, "--teacher", architecture,
               "--num_train_epochs", 1, "--report_to", "none", "--output_dir", folder)  # fmt: skip


@pytest.mark.parametrize("pair", [pytest.param(p, marks=[] if p == QUICK else pytest.mark.slow) for p in PAIRS])
def test_every_pair_of_the_tables_runs(pair, cifar100_shaped, tmp_path):
    few = ["--train_samples", 32, "--per_device_train_batch_size", 16, "--no_control"]
    dry_run(cifar100_shaped, tmp_path / "run", pair, RECIPES / "methods" / "kd.yaml", *few)
    results = read_json(tmp_path / "run" / "results.json")
    assert results["data"]["train"] == 32 and results["method"] == "kd:alpha=0.1:temperature=4"
    teacher, student = pair.split("_", 1) if not pair.startswith("wrn") else (pair[:8], pair[9:])
    recipe = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert (recipe["teacher"], recipe["student"]) == (teacher, student)
    assert recipe["learning_rate"] == (0.01 if student.startswith(("shufflenet", "mobilenet")) else 0.05)
    assert recipe["lr_milestones"] == [150, 180, 210] and recipe["weight_decay"] == 5e-4


@pytest.mark.slow
def test_every_method_runs_as_its_recipe_has_it(cifar100_shaped, tmp_path):
    """All of them side by side, on the pair of the tables that takes the least time."""
    recipes = sorted((RECIPES / "methods").glob("*.yaml"))
    specs = [yaml.safe_load(path.read_text())["method"] for path in recipes]
    assert {spec.split(":")[0] for spec in specs} == set(METHODS)
    specs.append("simkd")
    dry_run(cifar100_shaped, tmp_path / "run", QUICK, "--methods", ",".join(specs))
    cells = {path.parent.name: read_json(path) for path in (tmp_path / "run" / "cells").glob("*/results.json")}
    assert all(results["data"]["train"] == 128 for results in cells.values())
    gains = {name: results["gain_over_control"] for name, results in cells.items()}
    assert len(cells) == len(specs) + 2, "and the controls, of simkd one with its projector"
    assert {name for name, gain in gains.items() if gain is None} == {"none_lr0.05_seed0", "control_lr0.05_seed0"}
