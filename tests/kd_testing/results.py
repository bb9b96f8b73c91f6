"""The results of a run of a classifier, as a dictionary."""

from typing import Any


def model(name: str, accuracy: float, parameters: int, milliseconds: float) -> dict[str, Any]:
    return {
        "name": name,
        "parameters": parameters,
        "megabytes": parameters * 4 / 1e6,
        "flops": 2 * parameters,
        "latency_ms": {"batch": 1, "median": milliseconds, "p90": 1.5 * milliseconds},
        "metrics": {
            "validation": {"accuracy": accuracy, "f1": accuracy - 0.01},
            "test": {"accuracy": accuracy - 0.02},
        },
    }


def results(seed: int = 0, student: float = 0.81, control: float | None = 0.78, **changes: Any) -> dict[str, Any]:
    teacher = 0.90
    models = {
        "teacher": model("bert-base", teacher, 109_482_240, 20.0),
        "control": model("tiny", control, 1_234_567, 2.5) if control is not None else None,
        "student": model("tiny", student, 1_234_567, 2.5),
    }
    return {
        "schema_version": 1,
        "domain": "NLP",
        "task": "clinc150",
        "method": "soft_targets",
        "seed": seed,
        "command": ["python", "distill.py", "--note", "two words"],
        "data": {"train": 15_000, "validation": 3_000, "test": 4_500, "fingerprint": "abc123"},
        "models": models,
        "primary_metric": {"split": "validation", "name": "accuracy"},
        "retention": student / teacher,
        "gain_over_control": student - control if control is not None else None,
        "seconds": {"teacher": None, "teacher_outputs": 3.0, "control": 10.0, "student": 12.5, "total": 25.5},
        "environment": {
            "python": "3.11.7",
            "torch": "2.13.0",
            "device": "Some CPU",
            "threads": 2,
            "precision": "fp32",
            "git_commit": None,
        },
    } | changes
