"""Links, files, flags and code in the Markdown documents are valid."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from kd_testing.paths import REPO
from kd_testing.processes import run_code

DOCUMENTS = sorted({*REPO.glob("*.md"), *REPO.glob("*/README.md"), *REPO.glob("*/RESULTS.md")})
FOLDERS = ("common", "NLP", "image-classification", "reinforcement-learning")
LINK = re.compile(r"\[[^]]*\]\(([^)\s]+)\)")
FILE = re.compile(
    r"(?<![\w/.-])(?:NLP|image-classification|reinforcement-learning|benchmarks|common|tests)/[\w./-]+\.\w+"
)
SCRIPTS = sorted(path for path in REPO.glob("*/scripts/[!_]*.py"))
BENCHMARKS = sorted(
    path
    for path in REPO.glob("benchmarks/*.py")
    if "__main__" in path.read_text() and not path.stem.endswith("worker")  # workers need other environments
)


def anchors(document: Path) -> set[str]:
    """GitHub's anchors of the headings of a Markdown file."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", document.read_text(), flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPO)))
def test_links_and_files_exist(document: Path):
    text = document.read_text()
    for link in LINK.findall(text):
        if link.startswith(("https://", "mailto:")):
            continue
        place, _, anchor = link.partition("#")
        target = document.parent / place if place else document
        assert target.exists(), f"{document.name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{document.name} links to {link}"
    for file in FILE.findall(text):
        assert (REPO / file).exists(), f"{document.name} names {file}"


def test_contributing_names_every_module():
    tree = (REPO / "CONTRIBUTING.md").read_text()
    for path in (path for folder in FOLDERS for path in (REPO / folder).rglob("*.py")):
        assert path.stem == "__init__" or re.search(rf"^ +{path.name} +\S", tree, re.M), f"{path} is not in the tree"
    for name in re.findall(r"^ +(\w+\.py) ", tree, re.M):
        assert any(list((REPO / folder).rglob(name)) for folder in FOLDERS), f"the tree names {name}"


@pytest.mark.parametrize("script", [*SCRIPTS, *sorted(REPO.glob("*/scripts/*.sh"))], ids=lambda path: path.name)
def test_every_script_is_in_the_readme_of_its_domain(script: Path):
    assert script.name in (script.parent.parent / "README.md").read_text()


def documented_flags(script: Path) -> set[str]:
    """The flags of a script, or of a .sh that runs it, in the commands of documents and of its docstring."""
    texts = [path.read_text() for path in [*DOCUMENTS, script]]
    shells = [path for path in script.parent.glob("*.sh") if f"/{script.name}" in path.read_text()]
    names = "|".join(re.escape(str(path.relative_to(REPO))) for path in [script, *shells])
    command = rf"(?:python|bash) (?:{names})((?:[^\n`]*\\\n)*[^\n`]*)"
    commands = [found for text in texts for found in re.findall(command, text)]
    return {flag for command in commands for flag in re.findall(r"(?<!\S)--[\w-]+", command.split("#")[0])}


START = """
import os, runpy, sys
import accelerate, datasets, matplotlib.figure, pandas, scipy.optimize, sklearn.metrics, stable_baselines3
import torch._dynamo, torch.distributed.tensor, transformers
assert not {'common', 'torchvision'} & sys.modules.keys()
failed = []
for number, script in enumerate(sys.argv[1:]):
    child = os.fork()  # the scripts share the imports above
    if not child:
        for stream in (1, 2):
            os.dup2(os.open(f"{number}.txt", os.O_WRONLY | os.O_CREAT), stream)
        sys.argv, sys.path[0] = [script, "--help"], os.path.dirname(script)
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as stopped:
            sys.stdout.flush()
            os._exit(stopped.code or 0)  # without cleanup
        os._exit(1)
    if os.waitpid(child, 0)[1]:
        failed.append(script)
sys.exit(" ".join(failed) or 0)
"""


@pytest.mark.slow
def test_scripts_start_without_earlier_imports_and_have_the_documented_flags(tmp_path: Path):
    scripts = [*SCRIPTS, *BENCHMARKS]
    command = [sys.executable, "-c", START, *map(str, scripts)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=250)
    assert done.returncode == 0, done.stderr[-2000:]
    for number, script in enumerate(scripts):
        usage = (tmp_path / f"{number}.txt").read_text()
        assert "usage:" in usage, usage[-2000:]
        missing = {flag for flag in documented_flags(script) if not re.search(rf"{flag}\b", usage)}
        assert not missing, f"{script.name} has no {missing}"


def code_blocks(document: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (REPO / document).read_text(), re.S)


@pytest.mark.parametrize("fork", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["forked", "new"])
def test_the_examples_in_python_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fork: bool):
    monkeypatch.chdir(tmp_path)
    images, texts, trainer = code_blocks("common/README.md")
    assert code_blocks("README.md") == [images, texts]
    output = run_code(images, fork=fork)
    accuracies = dict(re.findall(r"^(teacher|control|student) +Sequential +([\d.]+)", output, re.M))
    assert 0.8 < float(accuracies["control"]) < float(accuracies["student"]) < float(accuracies["teacher"])
    assert "Verdict: better than the control" in output
    assert "student  DistilBertForSequenceClassification" in run_code(texts, fork=fork)
    assert "loss" in run_code(trainer, fork=fork)
    assert (tmp_path / "runs" / "digits" / "student" / "model.safetensors").exists()
    assert (tmp_path / "runs" / "texts" / "student" / "config.json").exists()
