"""The folder of a student: its weights, what makes its inputs, and a model card that says how to load it."""

import shlex
from pathlib import Path
from typing import Any, Protocol

import yaml

from kd.common.reporting.results import (
    Results,
    data_sentence,
    environment_sentence,
    headline,
    metric_table,
    model_table,
    retained,
)
from kd.common.reporting.tables import markdown
from kd.common.utils.files import write_text
from kd.common.utils.folders import writing_folder


class Savable(Protocol):
    """A transformers model, tokenizer or image processor, or what saves itself alike."""

    def save_pretrained(self, save_directory: Any) -> Any: ...


def save_student(
    folder: Path, student: Savable, results: Results, usage: str, processor: Savable | None = None, **metadata: Any
) -> None:
    """Writes a student, with the `processor` that makes its inputs, and its model card; or nothing.

    `usage` and `metadata` are as of `model_card`.
    """
    with writing_folder(folder) as partial:
        for part in (student, processor):
            if part is not None:
                part.save_pretrained(partial)
        write_text(partial / "README.md", model_card(results, usage, **metadata))


def model_card(results: Results, usage: str, license: str = "mit", **metadata: Any) -> str:
    """README.md of a student for the Hugging Face Hub.

    `usage` is the Python code that loads and calls the student; `metadata` are more entries of the YAML header
    (library_name, pipeline_tag, base_model, datasets).
    """
    metrics = [results["primary_metric"]["name"]]
    front = {"license": license, "tags": ["knowledge-distillation"], "metrics": metrics} | metadata
    student = results["models"]["student"]
    teacher = results["models"]["teacher"]
    origin = f" from the teacher `{teacher['name']}`" if teacher else ""
    how = f"distilled{origin} with\nthe method `{results['method']}`"
    if results.get("labels_only"):
        how = "trained on the labels alone, as what a\ndistilled student is compared with"
    return f"""---
{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---

# {results["task"]}: {results["method"]}

`{student["name"]}`, a student of {student["parameters"]:,} parameters for {results["task"]}, {how}.
{headline(results)}

## Load it

```python
{usage.strip()}
```

## Results

{markdown(*model_table(results))}

{markdown(*metric_table(results))}

## How it was trained

```
{shlex.join(results["command"])}
```

{data_sentence(results)} {environment_sentence(results)}

## Limitations

{_limitations(results)}
"""


def _limitations(results: Results) -> str:
    split, gain = results["primary_metric"]["split"], results["gain_over_control"]
    student = results["models"]["student"]
    lines = [f"One run, seed {results['seed']}: the spread over seeds is not in these figures."]
    if results["data"][split] is not None:
        lines.append(f"The headline is measured on {results['data'][split]:,} samples of the {split} split.")
    if "test" not in student["metrics"]:
        lines.append("It was not evaluated on a test split.")
    if results["retention"] is not None and results["retention"] < 1:
        lines.append(f"It is behind its teacher: it reaches {retained(results)}.")
    if gain is None:
        lines.append("There was no control, so how much the teacher helped is unknown.")
    elif gain <= 0:
        lines.append("The control was as good or better.")
    batch, device = student["latency_ms"]["batch"], results["environment"]["device"]
    lines.append(f"Latency was measured with batches of {batch} on {device}; other hardware differs.")
    return "\n".join(f"- {line}" for line in lines)
