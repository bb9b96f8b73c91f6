"""Image students for `python -m kd.common.export`: `pixel_values` -> logits."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification

from kd.common.export.exportable import Exportable
from kd.common.pretrained import load_model, reading
from kd.image_classification.student_model import bottleneck  # noqa: F401  registers BottleneckProbe with AutoModel

USAGE = """import json

import numpy as np
from PIL import Image

labels = json.load(open(f"{{folder}}/config.json"))["id2label"]
processor = json.load(open(f"{{folder}}/preprocessor_config.json"))
image = Image.open("image.png").convert("RGB")
{fit}
pixels = np.asarray(image) / 255  # (height, width, 3)
pixels = (pixels - processor["image_mean"]) / processor["image_std"]
inputs = {{"pixel_values": pixels.transpose(2, 0, 1)[None].astype(np.float32)}}
logits = model(inputs)
print(labels[str(logits.argmax())])"""
RESIZE = """image = image.resize(({size}, {size}), Image.Resampling.BILINEAR)"""
CROP = """size = [{shorter} * side // min(image.size) for side in image.size]
left, top = (round((side - {size}) / 2) for side in size)
image = image.resize(size, Image.Resampling.BILINEAR).crop((left, top, left + {size}, top + {size}))"""
UNTRAINED = """from transformers import AutoConfig, AutoModelForImageClassification
from kd.image_classification.student_model import bottleneck  # registers the classifiers of this project

network = AutoModelForImageClassification.from_config(AutoConfig.from_pretrained(folder))"""


def load(name: str, task: str | None) -> Exportable:
    """Loads the student in a folder; `task` is not used. Raises UserError if the folder does not contain one."""
    with reading(name, "an image classifier and its image processor"):
        model = load_model(AutoModelForImageClassification, name).eval()
        processor = AutoImageProcessor.from_pretrained(name)
    size = model.config.image_size
    images = torch.randn(20, 3, size, size, generator=torch.Generator().manual_seed(0))

    def write(folder: Path) -> None:
        model.config.save_pretrained(folder)
        processor.save_pretrained(folder)

    return Exportable(
        model,
        inputs={"pixel_values": images[:2]},
        test_inputs=[{"pixel_values": images[:1]}, {"pixel_values": images}],
        axes={0: "batch"},
        usage=USAGE.format(fit=_fit(processor, size)),
        write_files=write,
        untrained=UNTRAINED,
    )


def _fit(processor: Any, size: int) -> str:
    """Returns the code that resizes an image to the input size of the student."""
    shorter = processor.size.get("shortest_edge")
    return RESIZE.format(size=size) if shorter is None else CROP.format(size=size, shorter=shorter)
