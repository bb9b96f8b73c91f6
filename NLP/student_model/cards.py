"""The part of the model cards of text students that does not depend on their results."""

from typing import Any

from kd.common.data.sources import KnownDatasets, hub_dataset
from kd.common.reporting.model_card import Card
from kd.common.training.run import Run
from kd.common.utils.tasks import TaskType
from kd.nlp.student_model.arguments import CUT
from kd.nlp.student_model.bottleneck_classifier import BottleneckClassifier
from kd.nlp.teacher_model import SCRATCH, TINY_BERT
from kd.nlp.teacher_model.untrained import has_no_weights

CLASSIFIER_USAGE = """{imports}

folder = "student"  # the path of this model, or its name on the Hub
tokenizer = AutoTokenizer.from_pretrained(folder)
model = {model}.from_pretrained(folder).eval()
logits = model(**tokenizer({texts}, return_tensors="pt")).logits
print({result})"""
PLAIN = "AutoModelForSequenceClassification"
PIPELINE_USAGE = """from transformers import pipeline

folder = "student"  # the path of this model, or its name on the Hub
classify = pipeline("{tag}", model=folder, {argument})
print(classify("some text"))  # {meaning}"""
PIPELINES: dict[TaskType, dict[str, str]] = {
    "multi_label": {"argument": "top_k=None", "meaning": "the probability of each label"},
    "token_classification": {"argument": 'aggregation_strategy="first"', "meaning": "the tag of a word's first token"},
}


def pipeline_tag(task: TaskType) -> str:
    """The name of the pipeline of transformers."""
    return "token-classification" if task == "token_classification" else "text-classification"


def usage_of(student: Any, pairs: bool, task: TaskType) -> str:
    """The code that loads a text classifier, or a regression model, and calls it."""
    if task in PIPELINES:
        return PIPELINE_USAGE.format(tag=pipeline_tag(task), **PIPELINES[task])
    model, imports = PLAIN, f"from transformers import {PLAIN}, AutoTokenizer"
    if isinstance(student, BottleneckClassifier):
        model = BottleneckClassifier.__name__
        imports = f"from transformers import AutoTokenizer\nfrom {BottleneckClassifier.__module__} import {model}"
    texts = '"some text", "another text"' if pairs else '"some text"'
    result = "logits.item()" if task == "regression" else "model.config.id2label[logits.argmax().item()]"
    return CLASSIFIER_USAGE.format(imports=imports, model=model, texts=texts, result=result)


def card_of(run: Run, usage: str, pipeline_tag: str, known: KnownDatasets) -> Card:
    """The card of the student of a run; `known` as of `read_splits`. The Hub loads with transformers what `usage`
    loads without this project.
    """
    names = [run.argument("student"), run.argument("teacher"), *(run.argument("ensemble_teachers") or [])]
    return Card(
        usage,
        library_name=None if "from kd." in usage else "transformers",
        pipeline_tag=pipeline_tag,
        dataset=hub_dataset(run.argument("dataset"), known),
        origins=[name for name in names if name not in (None, TINY_BERT, SCRATCH, CUT) and not has_no_weights(name)],
    )
