"""The part of the model cards of image students that does not depend on their results."""

import os

from kd.common.data.sources import hub_dataset
from kd.common.reporting.model_card import Card
from kd.common.training.run import Run
from kd.image_classification.data.sources import KNOWN
from kd.image_classification.student_model.arguments import PIXELS
from kd.image_classification.teacher_model.backbones.names import PRETRAINED, TIMM, is_factory
from kd.image_classification.teacher_model.classifier import ImageClassifier
from kd.image_classification.teacher_model.teacher import HUB_NAME, IMAGENET_CLASSES, trained_folder

FOLDER = 'folder = "student"  # the path of this model, or huggingface_hub.snapshot_download("OWNER/NAME")'
USAGE = f"""from kd.image_classification.{{module}} import {{kind}}
from PIL import Image
from transformers import AutoImageProcessor

{FOLDER}
processor = AutoImageProcessor.from_pretrained(folder)
model = {{kind}}.from_pretrained(folder).eval()
logits = model(**processor(Image.open("image.png").convert("RGB"), return_tensors="pt")).logits
print(model.config.id2label[logits.argmax().item()])"""
TIMM_USAGE = f"""import json

import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor

{FOLDER}
labels = json.load(open(f"{{{{folder}}}}/config.json"))["id2label"]
weights = load_file(f"{{{{folder}}}}/model.safetensors")
backbone = timm.create_model("{{name}}", num_classes=0, global_pool="").eval()
head = torch.nn.Linear(*reversed(weights["head.weight"].shape))
head.load_state_dict({{{{name: weights.pop(f"head.{{{{name}}}}") for name in ("weight", "bias")}}}})
weights = {{{{name.removeprefix("backbone.model."): weight for name, weight in weights.items()}}}}
backbone.load_state_dict(weights, strict=False)  # the file also has buffers that timm computes itself

processor = AutoImageProcessor.from_pretrained(folder)
pixels = processor(Image.open("image.png").convert("RGB"), return_tensors="pt")["pixel_values"]
with torch.no_grad():
    logits = head(backbone(pixels).mean((2, 3)))
print(labels[str(logits.argmax().item())])"""


def card_of(run: Run, student: ImageClassifier, labels_only: bool) -> Card:
    """The card of the student of a run. A network of timm with a linear head is loaded without this project."""
    config = student.config
    added = config.projector or config.bottleneck or config.network
    usage = project_usage = USAGE.format(module="teacher_model.classifier", kind="ImageClassifier")
    if config.architecture.startswith(TIMM) and not added:
        usage = TIMM_USAGE.format(name=config.architecture.removeprefix(TIMM))
    elif is_factory(config.architecture) and not config.architecture.startswith(TIMM):
        usage = f"import {config.architecture.partition(':')[0]}  # defines the network\n{project_usage}"
    origins, licence = ([], None) if labels_only else _origins(run, len(config.label_names))
    return Card(
        usage,
        pipeline_tag="image-classification",
        dataset=hub_dataset(run.argument("dataset"), KNOWN),
        origins=origins,
        licence=licence,
    )


def card_of_probe(run: Run) -> Card:
    """The card of a head on a frozen encoder, trained on one task after another."""
    encoder = str(run.argument("encoder"))
    return Card(
        USAGE.format(module="student_model.bottleneck", kind="BottleneckProbe"),
        pipeline_tag="image-classification",
        dataset=hub_dataset(run.argument("dataset"), KNOWN),
        origins=[] if encoder == PIXELS else [encoder],
        training="trained on the labels of one task after another, with a frozen encoder and frozen keys",
    )


def _origins(run: Run, classes: int) -> tuple[list[str], str | None]:
    """The pretrained teachers, and the licence of timm's weights."""
    teacher: str = run.argument("teacher")
    others: list[str] = run.argument("ensemble_teachers") or []
    weights_file: str | None = run.argument("teacher_weights")
    if weights_file or os.path.isfile(teacher):
        return [weights_file or teacher, *others], None
    if teacher.startswith(PRETRAINED):
        return [str(trained_folder(teacher)), *others], None
    if trained_folder(teacher) or HUB_NAME.fullmatch(teacher):
        return [teacher, *others], None
    if teacher.startswith(TIMM) and classes == IMAGENET_CLASSES:
        from kd.image_classification.teacher_model.backbones.timm_networks import known_weights

        weights = known_weights(teacher.removeprefix(TIMM))
        return [f"timm/{weights.architecture}.{weights.tag}", *others], weights.license
    return others, None
