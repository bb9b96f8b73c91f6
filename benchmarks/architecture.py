"""Measures the architecture of a checkout: sizes, import cycles, and the files and calls that a command uses.

    python benchmarks/architecture.py --json before.json
    python benchmarks/architecture.py --root OTHER_CHECKOUT --compare before.json

The project must be importable from ROOT (PYTHONPATH, or an editable install of ROOT). Its files are recognized by
their path, with links resolved, so checkouts with different import names can be compared.

Static figures. Project files: Python files that git does not ignore, without tests and without this file. Imports and
calls of benchmarks are not counted. Public functions, methods and classes have no leading underscore, and neither has
their module. The length of a function counts from `def` to its last line. Import cycles: strongly connected components
of two or more folders. A folder is a top folder with its first subfolder (`common/losses`); the template of a domain
is a top folder. Imports inside functions count.

Commands run for a few steps in separate processes. Files imported: the project's modules in `sys.modules` at the end,
and the script, without files that contain only a docstring. Files run: the files in which a function is called. One
step: the time between the ends of two calls of `optimizer.step()` in the last training without a control (for the
alignment: the last but one). Its figures are the calls of project functions (without comprehensions, with resumed
generators), the distinct files, and the moves, consecutive calls in different files; each is the median of three
steps.

Networks of SimKD: instances of a class named ImageClassifier or Backbone, or of a subclass, that are not part of
another one; copies do not count. Students have less than half of the parameters of the largest one. Probe forwards:
calls of such a network outside transformers' Trainer and outside functions or modules whose name contains `evaluat` or
`metrics`; the JSON file lists their callers. The teacher trains from the first optimizer step on.
"""

import argparse
import ast
import json
import os
import runpy
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from inspect import CO_OPTIMIZED  # flag of functions, not of modules and classes
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from types import FrameType
from typing import Any

TEMPLATES = ("common/new_domain/template", "templates/domain")
FOLDERS = ("common", "templates", "NLP", "image-classification", "reinforcement-learning", "benchmarks")
Function = ast.FunctionDef | ast.AsyncFunctionDef
COMPREHENSIONS = ("<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>")
WINDOWS = 4  # recorded steps per training; the first one is not used


@dataclass(frozen=True)
class Job:
    """A command, flags that shorten it, the trainings to record (from the end), and whether to record all files."""

    command: str
    short: str
    steps: dict[str, int]
    follow: bool = True


JOBS = {
    "keys carried": Job(
        "bash NLP/scripts/distill_keys_carried.sh", "--max_steps 6", {"text, alignment": -2, "text, values": -1}
    ),
    "SimKD": Job(
        "python image-classification/scripts/train_simkd.py --projector all-layer", "--max_steps 6", {"SimKD": -1}
    ),
    "policy": Job(
        "bash reinforcement-learning/scripts/distill_cartpole_tiny.sh",
        "--steps 400 --rounds 2 --updates 20 --num_envs 4 --teacher_steps 600",
        {"policy distillation": -1},
    ),
    "classifier": Job("bash NLP/scripts/distill_base.sh", "--max_steps 6", {"text, classifier": -1}, follow=False),
}


class Project:
    """The files of a checkout, as paths relative to its root."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self._known: dict[str, str | None] = {}

    @cached_property
    def files(self) -> list[str]:
        """Files that git does not ignore, without links, tests and this file."""
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(listed, cwd=self.root, capture_output=True, text=True, check=True).stdout.split("\0")
        paths = {name: self.root / name for name in names if name and name != "benchmarks/architecture.py"}
        return sorted(n for n, p in paths.items() if p.is_file() and not p.is_symlink() and "tests" not in p.parts)

    @cached_property
    def modules(self) -> dict[str, ast.Module]:
        return {name: ast.parse(self.text(name)) for name in self.files if name.endswith(".py")}

    @cached_property
    def package_files(self) -> set[str]:
        return {name for name in self.modules if top_folder(name) != "benchmarks"}

    def text(self, name: str) -> str:
        return (self.root / name).read_text(encoding="utf-8")

    def lines(self, *names: str) -> int:
        return sum(len(self.text(name).splitlines()) for name in names)

    def is_code(self, name: str) -> bool:
        return any(not isinstance(node, ast.Expr) for node in self.modules[name].body)

    def find(self, path: str) -> str | None:
        """The project file at a path, with links resolved; None for other files and for benchmarks."""
        if path not in self._known:
            name = os.path.relpath(os.path.realpath(path), self.root)
            self._known[path] = name if name in self.package_files else None
        return self._known[path]

    def imported(self, importer: str) -> Iterator[str]:
        """The project files that a file imports; for `from package import module`, the module."""
        for node in ast.walk(self.modules[importer]):
            if isinstance(node, ast.Import):
                found = [self._module(self._places(alias.name)) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                if node.level:
                    places = [(self.root / importer).parents[node.level - 1] / (node.module or "").replace(".", "/")]
                else:
                    places = self._places(node.module or "")
                whole = self._module(places)
                found = [self._module([place / alias.name for place in places]) or whole for alias in node.names]
            else:
                continue
            yield from filter(None, found)

    def _places(self, module: str) -> list[Path]:
        return [base / module.replace(".", "/") for base in (self.root / "typings", self.root)]

    def _module(self, places: list[Path]) -> str | None:
        found = (self.find(f"{place}{end}") for place in places for end in (".py", "/__init__.py"))
        return next(filter(None, found), None)


def folder_of(name: str) -> str:
    """Top folder and first subfolder."""
    for template in TEMPLATES:
        name = name.replace(f"{template}/", "templates/")
    return "/".join(name.split("/")[:-1][:2]) or "."


def top_folder(name: str) -> str:
    return folder_of(name).split("/")[0]


# ---- static figures ----


def static_figures(project: Project) -> dict[str, Any]:
    names = list(project.modules)
    figures: dict[str, Any] = {"Python files": len(names), "Python lines": project.lines(*names)}
    for folder in FOLDERS:
        inside = [name for name in names if top_folder(name) == folder]
        figures |= {f"Python files, {folder}": len(inside), f"Python lines, {folder}": project.lines(*inside)}
    functions = [node for tree in project.modules.values() for node in ast.walk(tree) if isinstance(node, Function)]
    lengths = [(node.end_lineno or node.lineno) - node.lineno + 1 for node in functions]
    public = [node for name, tree in project.modules.items() if is_public(name) for node in public_definitions(tree)]
    documented = sum(ast.get_docstring(node) is not None for node in public)
    cycles = import_cycles(project)
    return figures | {
        "lines of a function, median": statistics.median(lengths),
        "lines of a function, 90th percentile": round(statistics.quantiles(lengths, n=10)[8]),
        "public definitions": len(public),
        "public definitions with a docstring": f"{documented / len(public):.0%}",
        "YAML files": sum(name.endswith((".yaml", ".yml")) for name in project.files),
        "shell files": sum(name.endswith(".sh") for name in project.files),
        "folders": len({folder_of(name) for name in project.package_files}),
        "folders in import cycles": sum(map(len, cycles)),
        "import cycles between folders": "; ".join(" + ".join(cycle) for cycle in cycles) or "none",
    }


def is_public(name: str) -> bool:
    return not any(part.startswith("_") for part in Path(name).with_suffix("").parts if not part.endswith("__"))


def public_definitions(tree: ast.Module | ast.ClassDef) -> Iterator[Function | ast.ClassDef]:
    for node in tree.body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node)


def import_cycles(project: Project) -> list[list[str]]:
    """The strongly connected components of more than one folder, the largest first."""
    import numpy as np
    from scipy.sparse.csgraph import connected_components

    folders = sorted({folder_of(name) for name in project.package_files})
    graph = np.zeros((len(folders), len(folders)))
    for name in project.package_files:
        for other in project.imported(name):
            graph[folders.index(folder_of(name)), folders.index(folder_of(other))] = 1
    number, component = connected_components(graph, connection="strong")
    cycles = [[folders[i] for i in np.flatnonzero(component == c)] for c in range(number)]
    return sorted((cycle for cycle in cycles if len(cycle) > 1), key=len, reverse=True)


# ---- figures of running commands ----


class Recorder:
    """Records the networks and probe forwards of this process, and either all files that run or the steps."""

    def __init__(self, project: Project, follow: bool) -> None:
        from torch import nn
        from torch.nn.modules import module as every_module
        from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

        self.project, self.follow = project, follow
        self.files_run: set[str] = set()
        self.trainings: list[list[list[str]]] = []  # files of the calls, by training and step
        self.networks: list[tuple[nn.Module, bool]] = []  # and whether it was created before the first step
        self.probes: list[tuple[str, bool]] = []  # the caller, and whether it was before the first step
        self._optimizer: Optimizer | None = None
        self._calls: list[str] = []
        self._depth = 0  # nesting depth of the current forward pass
        init = nn.Module.__init__

        def recording_init(module: nn.Module, *args: Any, **kwargs: Any) -> None:
            if is_network(module):
                self.networks.append((module, not self.trainings))
            init(module, *args, **kwargs)

        nn.Module.__init__ = recording_init  # type: ignore[method-assign, assignment]
        every_module.register_module_forward_pre_hook(self._before_forward)
        every_module.register_module_forward_hook(self._after_forward, always_call=True)
        register_optimizer_step_post_hook(self._after_step)
        sys.setprofile(self._on_call if follow else None)

    def _before_forward(self, module: Any, _: Any) -> None:
        self._depth += 1
        if self._depth == 1 and is_network(module):
            caller = self._probing_function(sys._getframe(1))
            if caller:
                self.probes.append((caller, not self.trainings))

    def _after_forward(self, *_: Any) -> None:
        self._depth -= 1

    def _probing_function(self, frame: FrameType | None) -> str | None:
        """The project function that calls the network; None if the forward belongs to training or evaluation."""
        nearest = None
        while frame is not None:
            code = frame.f_code
            file = self.project.find(code.co_filename)
            name = f"{file}:{code.co_name}"
            if code.co_filename.endswith("transformers/trainer.py") or "evaluat" in name or "metrics" in name:
                return None
            nearest = nearest or (name if file else None)
            frame = frame.f_back
        return nearest

    def _after_step(self, optimizer: Any, *_: Any) -> None:
        if optimizer is not self._optimizer:
            self._optimizer = optimizer
            self.trainings.append([])
        elif len(self.trainings[-1]) < WINDOWS:
            self.trainings[-1].append(self._calls)
        self._calls = []
        sys.setprofile(self._on_call if self.follow or len(self.trainings[-1]) < WINDOWS else None)

    def _on_call(self, frame: FrameType, event: str, _: Any) -> None:
        file = self.project.find(frame.f_code.co_filename) if event == "call" else None
        if file is None or not frame.f_code.co_flags & CO_OPTIMIZED or frame.f_code.co_name in COMPREHENSIONS:
            return
        if self.follow:
            self.files_run.add(file)
        else:
            self._calls.append(file)

    def step(self, training: int) -> dict[str, int]:
        calls = sorted(self.trainings[training][1:], key=len)[(WINDOWS - 1) // 2]
        return {"calls": len(calls), "files": len(set(calls)), "moves": sum(a != b for a, b in pairwise(calls))}

    def network_figures(self) -> dict[str, Any]:
        inside = {id(part) for whole, _ in self.networks for part in whole.modules() if part is not whole}
        made = [(sum(p.numel() for p in m.parameters()), early) for m, early in self.networks if id(m) not in inside]
        students = [early for size, early in made if 2 * size < max(made)[0]]
        return {
            "probe forwards": len(self.probes),
            "probe forwards before the teacher trains": sum(early for _, early in self.probes),
            "probe forwards, by caller": ", ".join(f"{n} {c}" for c, n in Counter(c for c, _ in self.probes).items()),
            "networks made": len(made),
            "networks made before the teacher trains": sum(early for _, early in made),
            "student networks made": len(students),
            "student networks made before the teacher trains": sum(students),
        }


def is_network(module: Any) -> bool:
    return any(kind.__name__ in ("ImageClassifier", "Backbone") for kind in type(module).__mro__)


def run_job(name: str, root: Path, follow: bool) -> dict[str, Any]:
    """Runs a command in this process. Returns the figures of the whole run, or of the student's steps."""
    project, job = Project(root), JOBS[name]
    recorder = Recorder(project, follow)
    words = [*command_words(job.command, project.root), *job.short.split()]
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        sys.argv = [*words, "--output_dir", "run", *([] if follow else ["--no_control"])]
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as ended:  # the script calls sys.exit
            if ended.code:
                raise RuntimeError(f"{shlex.join(sys.argv)} ended with exit code {ended.code}") from None
        finally:
            sys.setprofile(None)
            os.chdir(project.root)
    if not follow:
        steps = {step: recorder.step(training) for step, training in job.steps.items()}
        return {f"one step: {figure}, {step}": n for step, found in steps.items() for figure, n in found.items()}
    paths = [words[0], *(getattr(module, "__file__", None) or "" for module in list(sys.modules.values()))]
    imported = [file for file in {*map(project.find, paths)} if file and project.is_code(file)]
    found = {"files imported": imported, "files run": recorder.files_run | {project.find(words[0])}}
    figures: dict[str, Any] = {f"{kind}, {name}": len(files) for kind, files in found.items()}
    figures |= {f"lines of {kind}, {name}": project.lines(*filter(None, files)) for kind, files in found.items()}
    return figures | (recorder.network_figures() if recorder.networks else {})


def command_words(command: str, root: Path) -> list[str]:
    """Script and arguments of a Python command, or of the command that a shell file passes to $PYTHON."""
    interpreter, script, *words = command.split()
    if interpreter == "python":
        return [str(root / script), *words]
    echoing = os.environ | {"PYTHON": "echo"}
    shown = subprocess.run(["bash", root / script, *words], env=echoing, capture_output=True, text=True, check=True)
    return shlex.split(shown.stdout)


def dynamic_figures(root: Path) -> dict[str, Any]:
    """The figures of all commands. A command that fails is reported and has no figures."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    figures: dict[str, Any] = {}
    for follow in (True, False):
        for name in [name for name, job in JOBS.items() if job.follow or not follow]:
            print(f"running {name}{'' if follow else ', without a control'}", file=sys.stderr)
            with ProcessPoolExecutor(1, get_context("spawn"), silence) as process:
                try:
                    figures |= process.submit(run_job, name, root, follow).result()
                except Exception as error:
                    print(f"no figures of {name}: {type(error).__name__}: {error}", file=sys.stderr)
    return figures


def silence() -> None:
    """Discards the output of commands."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def table(columns: dict[str, dict[str, Any]]) -> str:
    """A Markdown table with a row per figure and a column per checkout."""
    rows = list(dict.fromkeys(row for figures in columns.values() for row in figures))
    cells = [["figure", *columns], ["---"] * (1 + len(columns))]
    cells += [[row, *(str(figures.get(row, "-")) for figures in columns.values())] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(__file__).parent.parent, help="Root of the checkout.")
    parser.add_argument("--json", type=Path, help="File to which the figures are also written.")
    parser.add_argument("--compare", type=Path, help="JSON file of another checkout, for comparison.")
    parser.add_argument("--static", action="store_true", help="Do not run commands.")
    args = parser.parse_args()
    root = args.root.resolve()
    before = {"before": json.loads(args.compare.read_text(encoding="utf-8"))} if args.compare else {}
    figures = static_figures(Project(root)) | ({} if args.static else dynamic_figures(root))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(table(before | {"after" if before else "value": figures}))


if __name__ == "__main__":
    main()
