"""Trains several students on the same batches, so that they share one forward pass of the teacher.

    model = SideBySide({"kd": student_a, "simkd": student_b})
    objective = SideBySideObjective({"kd": Objective(...), "simkd": Objective(...)})

Students share neither weights nor gradients. The result of each student is the same as if it was trained alone with
the same seed, provided that the optimizer updates parameters independently and gradients are not clipped by a common
norm.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kd.common.objective import Objective
from kd.common.outputs import Outputs


class SideBySide(nn.Module):
    """Students by name. The features of its outputs are the students' outputs, {name: Outputs}."""

    def __init__(self, students: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.students = nn.ModuleDict(dict(students))

    def forward(self, **inputs: Tensor) -> Outputs:
        return Outputs(features={name: student(**inputs) for name, student in self.students.items()})

    @staticmethod
    def paths(features: dict[str, dict[str, str]]) -> dict[str, str]:
        """Joins {student: {feature: path of a submodule}} into one dict for `KDTrainer(features=...)`."""
        return {
            f"{name}/{feature}": f"students.{name}.{path}"
            for name, paths in features.items()
            for feature, path in paths.items()
        }

    def save_pretrained(self, folder: str | Path) -> None:
        for name, student in self.students.items():
            student.save_pretrained(Path(folder, name))  # type: ignore[operator]

    @classmethod
    def from_pretrained(cls, folder: str | Path, load: Callable[[str], nn.Module]) -> "SideBySide":
        names = sorted(path.parent.name for path in Path(folder).glob("*/config.json"))
        return cls({name: load(str(Path(folder, name))) for name in names})


class SideBySideObjective(nn.Module):
    """The students' objectives. The parts of the loss are called NAME/PART."""

    def __init__(self, objectives: dict[str, Objective]) -> None:
        super().__init__()
        self.objectives = nn.ModuleDict(objectives)

    def forward(self, student: Outputs, teacher: Outputs | None, labels: Tensor | None) -> dict[str, Tensor]:
        return self._each("__call__", student, teacher, labels)

    def watch(self, student: Outputs, teacher: Outputs | None, labels: Tensor | None) -> dict[str, Tensor]:
        return self._each("watch", student, teacher, labels)

    def set_progress(self, progress: float) -> None:
        for objective in self.objectives.values():
            objective.set_progress(progress)  # type: ignore[operator]

    def items(self, inputs: dict[str, Any], labels: Tensor | None) -> int:
        objective: Any = next(iter(self.objectives.values()))  # all students have the same batches
        return int(objective.items(inputs, labels))

    def _each(self, method: str, student: Outputs, *others: Any) -> dict[str, Tensor]:
        return {
            f"{name}/{part}": value
            for name, objective in self.objectives.items()
            for part, value in getattr(objective, method)(_student_outputs(name, student), *others).items()
        }


def _student_outputs(name: str, outputs: Outputs) -> Outputs:
    """One student's outputs, with its hooked features, from the outputs of a SideBySide."""
    features: dict[str, Any] = outputs.features or {}
    hooked = {key.removeprefix(f"{name}/"): value for key, value in features.items() if key.startswith(f"{name}/")}
    student = features[name]
    return Outputs(logits=student["logits"], features={**student["features"], **hooked}, sample_id=outputs.sample_id)
