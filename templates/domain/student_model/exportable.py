"""Loads students for `python -m kd.common.export`, from signals to logits."""

import torch

from kd.common.export.exportable import Exportable
from kd.common.pretrained import load_model, reading
from kd.example_domain.data.loading import LENGTH
from kd.example_domain.teacher_model.classifier import Classifier

USAGE = f"""import json

import numpy as np

labels = json.load(open(f"{{folder}}/config.json"))["id2label"]
logits = model({{"values": np.zeros((1, {LENGTH}), dtype=np.float32)}})  # one signal
print(labels[str(logits.argmax())])"""


def load(name: str, task: str | None) -> Exportable:
    """Loads the student from a folder. `task` is not used. Raises UserError if the folder contains no student."""
    with reading(name, "a classifier of this domain"):
        model = load_model(Classifier, name).eval()
    signals = torch.randn(20, LENGTH, generator=torch.Generator().manual_seed(0))
    return Exportable(
        model,
        inputs={"values": signals[:2]},
        test_inputs=[{"values": signals[:1, LENGTH // 2 :]}, {"values": signals}],
        axes={0: "batch", 1: "length"},
        usage=USAGE,
        write_files=model.config.save_pretrained,
    )
