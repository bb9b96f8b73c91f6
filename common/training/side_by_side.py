"""Several students trained on the same batches, so that one pass of the teacher serves them all.

    model = SideBySide({"kd": student_a, "simkd": student_b})
    objective = SideBySideObjective({"kd": Objective(...), "simkd": Objective(...)})

Students share neither weights nor gradients: each becomes what it would have become alone, with the same seed. That
holds as long as the optimizer treats parameters one by one and gradients are not clipped by a norm over all of them.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kd.common.objective import Objective
from kd.common.outputs import Outputs


class SideBySide(nn.Module):
    """Students by name. Its features are the students' outputs, {name: Outputs}."""

    def __init__(self, students: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.students = nn.ModuleDict(dict(students))

    def forward(self, **inputs: Tensor) -> Outputs:
        return Outputs(features={name: student(**inputs) for name, student in self.students.items()})

    @staticmethod
    def paths(features: dict[str, dict[str, str]]) -> dict[str, str]:
        """Paths of submodules by student and feature -> what `KDTrainer(features=...)` takes for all of them."""
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
    """The students' objectives; the parts of the loss are called NAME/PART."""

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

    def _each(self, method: str, student: Outputs, *others: Any) -> dict[str, Tensor]:
        return {
            f"{name}/{part}": value
            for name, objective in self.objectives.items()
            for part, value in getattr(objective, method)(_of(name, student), *others).items()
        }


def _of(name: str, all_students: Outputs) -> Outputs:
    """One student's outputs, with its hooked features, out of those of a SideBySide."""
    features: dict[str, Any] = all_students.features or {}
    hooked = {key.removeprefix(f"{name}/"): value for key, value in features.items() if key.startswith(f"{name}/")}
    plain = features[name]
    return Outputs(logits=plain["logits"], features={**plain["features"], **hooked}, sample_id=all_students.sample_id)
