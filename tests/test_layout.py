"""Every domain, a folder with scripts/, has the same layout and is importable by its name."""

import importlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from kd.common.utils import import_name
from kd_testing.installation import call, empty_environment
from kd_testing.paths import REPO

DOMAINS = sorted(scripts.parent for scripts in REPO.glob("*/scripts"))


@pytest.mark.parametrize("folder", DOMAINS, ids=lambda folder: folder.name)
def test_a_domain_is_importable_and_complete(folder: Path):
    package = importlib.import_module(f"kd.{import_name(folder.name)}")
    assert list(package.__path__) == [str(folder)], "run `pip install -r requirements.txt` once more"
    for part in ("README.md", "__init__.py", "teacher_model", "student_model", "data", "scripts"):
        assert (folder / part).exists(), f"{folder.name} lacks {part}"


def test_the_three_domains_exist():
    assert {"NLP", "image-classification", "reinforcement-learning"} <= {folder.name for folder in DOMAINS}


def test_domains_import_common_and_never_each_other():
    names = {import_name(folder.name): folder for folder in [*DOMAINS, REPO / "common"]}
    for name, folder in names.items():
        for path in folder.rglob("*.py"):
            imports = re.findall(r"^ *(?:import|from) kd\.(\w+)", path.read_text(), re.MULTILINE)
            foreign = set(imports) & (names.keys() - {name, "common"})
            assert not foreign, f"{path.relative_to(REPO)} imports {foreign}"


@pytest.mark.parametrize("folder", [*DOMAINS, REPO / "templates" / "domain"], ids=lambda folder: folder.name)
def test_teacher_model_does_not_use_student_model(folder: Path):
    for path in (folder / "teacher_model").rglob("*.py"):
        assert "student_model" not in path.read_text(), f"{path.relative_to(REPO)} uses student_model"


def test_no_folders_import_each_other(tmp_path: Path):
    arguments = ["benchmarks/architecture.py", "--static", "--json", tmp_path / "figures.json"]
    subprocess.run([sys.executable, *map(str, arguments)], cwd=REPO, check=True, capture_output=True, timeout=120)
    assert json.loads((tmp_path / "figures.json").read_text())["import cycles between folders"] == "none"


@pytest.mark.parametrize("script", sorted(REPO.glob("*/scripts/*.sh")), ids=lambda path: path.name)
def test_shell_scripts_can_be_run_and_their_recipes_exist(script: Path):
    assert os.access(script, os.X_OK)
    recipes = re.findall(r"\$here/(\w+\.yaml)", script.read_text())
    assert all((script.parent / recipe).exists() for recipe in recipes)


PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
NAME = re.compile(r"[^=<>\[]+")  # the name in a requirement
EXTRAS = {"common": (), "NLP": ("nlp",), "image-classification": ("images",), "reinforcement-learning": ("rl",)}
ELSEWHERE = {  # optional imports of the core, checked where a user needs them
    "common": {"onnx", "onnxruntime", "sacrebleu"},
    "NLP": {"onnxruntime"},
}


def declared(*extras: str) -> set[str]:
    groups = [PROJECT["dependencies"], *(PROJECT["optional-dependencies"][extra] for extra in extras)]
    return {NAME.findall(requirement)[0].lower().replace("_", "-") for group in groups for requirement in group}


@pytest.mark.parametrize("folder", EXTRAS)
def test_the_packages_that_a_folder_imports_are_its_dependencies(folder: str):
    packages = importlib.metadata.packages_distributions()
    allowed = declared(*EXTRAS[folder]) | ELSEWHERE.get(folder, set()) | {"kd", "knowledge-distillation"}
    for path in (REPO / folder).rglob("*.py"):
        imports = re.findall(r"^ *(?:import|from) (\w+)", path.read_text(), re.MULTILINE)
        for name in set(imports) - sys.stdlib_module_names - {"kd"}:
            found = {package.lower().replace("_", "-") for package in packages.get(name, [])}
            assert not found or found & allowed, f"{path.relative_to(REPO)} imports {name}, of {found}"


def test_the_tested_set_pins_every_dependency():
    lines = (REPO / "requirements.txt").read_text().splitlines()
    pinned = {NAME.findall(line)[0].lower() for line in lines if "==" in line}
    missing = declared(*(extra for extra in PROJECT["optional-dependencies"] if extra != "all")) - pinned
    assert missing <= {"huggingface-hub", "pyarrow", "pillow", "cloudpickle"}, "others are pinned by what needs them"
    assert {line for line in lines if line.startswith("-e")} == {"-e ."}


# A fork declares the operators, so that the imports of the parent do it again. A second call declares nothing, and
# neither does a call if torchvision's library loads.
NEW_PROCESS = """
import os, sys, torch
from unittest import mock
from kd.common.utils import startup
if not (child := os.fork()):
    startup.declare_missing_operators()
    assert startup.declare_missing_operators() == [], "declared twice"
    with mock.patch.object(startup, "_operator_library_loads", lambda: True), \\
            mock.patch.object(torch.library, "Library", side_effect=AssertionError):
        assert startup.declare_missing_operators() == []
    assert torch.ops.torchvision.nms
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert "torchvision" not in sys.modules
import timm
from transformers import Trainer
from torchvision.transforms import InterpolationMode
assert timm.create_model("resnet18", num_classes=2)
"""


@pytest.mark.slow
def test_timm_and_the_trainer_load_after_common_with_the_operators_that_are_missing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", NEW_PROCESS], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]


DISTILL = """
import sys
of_extras = "torchvision timm stable_baselines3 gymnasium imageio sentencepiece optuna sacrebleu onnx onnxruntime"
sys.modules |= dict.fromkeys(of_extras.split())  # cannot be imported
import torch; from kd.common import distill
rows = [(torch.randn(4), number % 2) for number in range(20)]
print(distill(torch.nn.Linear(4, 2), torch.nn.Linear(4, 2), rows, num_train_epochs=1))
"""


@pytest.mark.slow
def test_a_wheel_runs_elsewhere(tmp_path: Path) -> None:
    """The wheel has all modules, recipes and other data. An installation of it trains and exports, has no domain
    template, and distills without the packages of the extras.
    """
    flags = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    source = tmp_path / "source"  # setuptools builds inside the folder of the project
    shutil.copytree(REPO, source, ignore=shutil.ignore_patterns(".git", "runs", "build", "*.egg-info", ".mypy_cache"))
    call(tmp_path, sys.executable, "-m", "pip", "wheel", *flags, "--wheel-dir", tmp_path, source)
    (wheel,) = tmp_path.glob("*.whl")
    (tmp_path / "elsewhere").mkdir()
    python = empty_environment(tmp_path / "environment")
    call(tmp_path, python, "-m", "pip", "install", *flags, wheel)
    shutil.rmtree(source)
    where = Path(call(tmp_path, python, "-c", "import kd.common; print(kd.common.__path__[0])").strip())
    assert where.is_relative_to(tmp_path / "environment")
    for folder in (*DOMAINS, REPO / "common"):
        assert files_of(where.with_name(import_name(folder.name))) == files_of(folder)
    arguments = ["--max_steps", 2, "--no_control", "--output_dir", "run"]
    call(tmp_path / "elsewhere", python, "-m", "kd.nlp.scripts.distill_classifier", *arguments)
    call(tmp_path / "elsewhere", python, "-m", "kd.common.export", "run")
    assert (tmp_path / "elsewhere" / "run" / "export" / "model.onnx").exists()
    assert "student" in call(tmp_path / "elsewhere", python, "-c", DISTILL)
    error = call(tmp_path, python, "-m", "kd.common.new_domain", "speech", status=2)
    assert "checkout of the repository" in error and error.count("\n") == 1


def files_of(folder: Path) -> set[Path]:
    """The modules, recipes, shell scripts and tables of hyper-parameters in a folder."""
    found = {path.relative_to(folder) for path in folder.rglob("*") if path.suffix in (".py", ".pyi", ".yaml", ".sh")}
    assert found
    return found
