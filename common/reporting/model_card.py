"""The folder of a student: its weights, its processor, and a model card with the code that loads it."""

import shlex
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import ModelCardData

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
from kd.common.utils.files import write_text, writing_folder


class Savable(Protocol):
    """A transformers model, tokenizer or image processor, or anything with the same method."""

    def save_pretrained(self, save_directory: Any) -> Any: ...


def save_student(
    folder: Path, student: Savable, results: Results, usage: str, processor: Savable | None = None, **metadata: Any
) -> None:
    """Writes a student, its `processor` and its model card, atomically. `usage` and `metadata`: see `model_card`."""
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
    front = ModelCardData(license=license, tags=["knowledge-distillation"], metrics=metrics, **metadata)
    student = results["models"]["student"]
    teacher = results["models"]["teacher"]
    source = f" from the teacher `{teacher['name']}`" if teacher else ""
    training = f"distilled{source} with\nthe method `{results['method']}`"
    if results.get("labels_only"):
        training = "trained on the labels alone, as a control of\ndistillation"
    return f"""---
{front}
---

# {results["task"]}: {results["method"]}

`{student["name"]}`, a student of {student["parameters"]:,} parameters for {results["task"]}, {training}.
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
    lines = [f"One run, seed {results['seed']}: these figures do not include the spread over seeds."]
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
