"""A saved image student with a bottleneck, to which images are added or which forgets them."""

from argparse import Namespace

import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification

from kd.common.bottleneck.changes import SavedStudent
from kd.common.bottleneck.training import CodeDataset, encode_samples
from kd.common.data.sources import print_notes
from kd.common.pretrained import load_model, reading
from kd.common.reporting.saved_models import saved_model
from kd.common.training.inference import identity_collate
from kd.common.utils.devices import best_device
from kd.common.utils.errors import UserError
from kd.image_classification.data.loading import load_examples
from kd.image_classification.student_model.bottleneck import BATCH_SIZE  # registers BottleneckProbe with AutoModel
from kd.image_classification.teacher_model.teacher import in_normalization_of, trained_folder


class SavedImageStudent(SavedStudent):
    """A student of images, of distill_bottleneck.py or train_bottleneck.py."""

    @classmethod
    def load(cls, name: str) -> "SavedImageStudent":
        """Loads the student of a run, or a folder. Raises UserError if it has no bottleneck."""
        folder = trained_folder(saved_model(name))
        if folder is None:
            raise UserError(f"no folder {name}: pass the folder of a classifier or of a run")
        with reading(folder, "an image classifier and its image processor"):
            model = load_model(AutoModelForImageClassification, folder).to(best_device()).eval()
            return cls(str(folder), model, AutoImageProcessor.from_pretrained(folder))

    def load_examples(self, args: Namespace, new_classes: bool = False) -> tuple[CodeDataset, list[str]]:
        """Codes and labels of the images that the flags of a script name, of all splits, and their classes by id.

        These are the student's, unless `new_classes` lets the images have others. Prints what was inferred. Raises
        UserError for images of another size.
        """
        columns = args.image_column, args.label_column
        data = load_examples(args.dataset, *columns, args.image_size, self.label_names, new_classes)
        print_notes(data.name, data.notes)
        data, codes = in_normalization_of(self.model.config, self.folder, data), list[torch.Tensor]()
        for split in data.splits:
            codes += encode_samples(self.model, data.views(split, best_device()), identity_collate, "fp32", BATCH_SIZE)
        labels = torch.cat([images.labels for images in data.splits.values()])
        return CodeDataset(codes, labels, torch.arange(len(codes))), data.label_names
